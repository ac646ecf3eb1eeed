"""Random damage to files of instances and solutions, and random order and spelling of what stays the same."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.routing.lib_files import (
    MAX_CAPACITY,
    MAX_COORDINATE,
    LibInstance,
    instance_text,
    read_instance,
    read_optima,
    read_solution,
    read_tour,
)

SOUND = [
    instance_text(LibInstance("tsp", "three", torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.5, -10.0]]).double())),
    instance_text(LibInstance("cvrp", "two", torch.tensor([[0.0, 0.0], [3.0, 4.0]]).double(), torch.tensor([4]), 10)),
    "TYPE : TOUR\nDIMENSION : 3\nTOUR_SECTION\n2\n1\n3\n-1\nEOF\n",
    "Route #1: 2 3\nRoute #2: 1\nCost 17\n",
    "name,optimum\na,7\n",
]
READERS = (read_instance, read_tour, read_solution, read_optima)


def complaints(text: str) -> list[str]:
    """What the readers say of a file of ``text``, its name left out."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.txt"
        path.write_bytes(text.encode())
        for read in READERS:
            try:
                read(path)
            except ValueError as error:
                name, found, rest = str(error).partition(str(path))
                said.append(rest if (name, found) == ("", str(path)) else f"without name: {error}")
    return said


def test_each_sound_file_has_one_reader() -> None:
    assert [len(complaints(text)) for text in SOUND] == [len(READERS) - 1] * len(SOUND)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SOUND))
    piece = st.text('0123456789-+.eE :#\n"_,ACDEIMNOPRSTU\x00\x85\u2028é', max_size=8)
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(piece) + text[start + length :]
    said = complaints(text)  # any error but a ValueError ends the test
    assert len(said) >= len(READERS) - 1  # damage does not make a file one of two kinds
    for message in said:
        assert not message.startswith("without name")
        assert "\n" not in message
        assert len(message) < 200


COORDINATE = st.one_of(st.integers(-10_000, 10_000).map(float), st.floats(-MAX_COORDINATE, MAX_COORDINATE, width=64))


@st.composite
def instances(draw: st.DrawFn) -> LibInstance:
    nodes = draw(st.integers(2, 10))
    name = " ".join(draw(st.text("abcXYZ019-_.: ", max_size=12)).split())
    points = draw(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=nodes, max_size=nodes))
    coordinates = torch.tensor(points, dtype=torch.float64)
    if draw(st.booleans()):
        return LibInstance("tsp", name, coordinates)
    capacity = draw(st.integers(1, MAX_CAPACITY))
    demand = draw(st.lists(st.integers(0, capacity), min_size=nodes - 1, max_size=nodes - 1))
    return LibInstance("cvrp", name, coordinates, torch.tensor(demand), capacity)


def reordered(text: str, draw: st.DrawFn) -> str:
    """The same content with keywords, sections and nodes in another order, and a comment that looks like more."""
    gap, end = st.sampled_from([" ", "  ", "\t", " \t "]), st.sampled_from(["", " "])
    head, *sections = re.split(r"^(?=[A-Z_]+_SECTION$|EOF$)", text, flags=re.MULTILINE)
    out = []
    for line in draw(st.permutations(head.splitlines())):
        key, value = line.split(" :", 1)
        out.append(key + draw(st.sampled_from([":", " :", " : ", ":\t"])) + value)
    if draw(st.booleans()):
        out.insert(draw(st.integers(0, len(out))), 'COMMENT: "first\n  DIMENSION : 1\nTOUR_SECTION\nlast"')
    for section in draw(st.permutations(sections[:-1])):
        name, *lines = section.splitlines()
        out.append(name + draw(st.sampled_from(["", " ", "  :"])))
        rows = [line.split() for line in lines]
        if name == "NODE_COORD_SECTION" and draw(st.booleans()):
            rows = [[row[0], *(f"{float(word):.17e}" for word in row[1:])] for row in rows]
        if name != "DEPOT_SECTION":
            rows = draw(st.permutations(rows))
        out += [draw(end) + draw(gap).join(row) + draw(end) for row in rows]
    out += draw(st.sampled_from([[], ["EOF"], ["", "EOF", ""]]))
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(out)


@settings(max_examples=60, deadline=None)
@given(instances(), st.data())
def test_order_and_spelling_do_not_matter(instance: LibInstance, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.vrp"
        path.write_bytes(reordered(instance_text(instance), data.draw).encode())
        read = read_instance(path)
    assert (read.kind, read.name, read.capacity) == (instance.kind, instance.name, instance.capacity)
    assert torch.equal(read.coordinates, instance.coordinates)
    if instance.kind == "cvrp":
        assert read.demand is not None
        assert instance.demand is not None
        assert torch.equal(read.demand, instance.demand)
