"""Readers of TSPLIB95 and CVRPLIB files: tolerant of how people write them, strict about what they say."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.routing import lib_files
from datamodules.routing.lib_files import (
    LibInstance,
    read_instance,
    read_optima,
    read_solution,
    read_tour,
    write_instance,
)

TSP = """NAME : small
COMMENT : three nodes
TYPE : TSP
DIMENSION : 3
EDGE_WEIGHT_TYPE : EUC_2D
NODE_COORD_SECTION
1 0 0
2 3 0
3 3 4
EOF
"""
CVRP = """NAME : small
TYPE : CVRP
DIMENSION : 3
EDGE_WEIGHT_TYPE : EUC_2D
CAPACITY : 10
NODE_COORD_SECTION
1 0 0
2 3 0
3 3 4
DEMAND_SECTION
1 0
2 10
3 4
DEPOT_SECTION
1
-1
EOF
"""
TOUR = "NAME : t\nTYPE : TOUR\nDIMENSION : 3\nTOUR_SECTION\n1\n3\n2\n-1\nEOF\n"
SOLUTION = "Route #1: 1 3\nRoute #2: 2\nCost 12\n"


def saved(folder: Any, text: str | bytes) -> Any:
    path = folder / "file.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- what is taken as it comes -----------------------------------------------------------------------------------------
def test_plain_files(tmp_path):
    tsp = read_instance(saved(tmp_path, TSP))
    assert (tsp.kind, tsp.name, tsp.size, tsp.demand, tsp.capacity) == ("tsp", "small", 3, None, None)
    assert tsp.coordinates.dtype == torch.float64
    assert tsp.coordinates.tolist() == [[0, 0], [3, 0], [3, 4]]
    cvrp = read_instance(saved(tmp_path, CVRP))
    assert (cvrp.kind, cvrp.size, cvrp.capacity) == ("cvrp", 2, 10)
    assert cvrp.demand is not None
    assert cvrp.demand.dtype == torch.int64
    assert cvrp.demand.tolist() == [10, 4]
    assert read_tour(saved(tmp_path, TOUR)).tolist() == [0, 2, 1]
    solution = read_solution(saved(tmp_path, SOLUTION))
    assert (solution.routes, solution.cost, solution.actions().tolist()) == ([[1, 3], [2]], 12.0, [1, 3, 0, 2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("TYPE : TSP", "TYPE: TSP (M. Hofmeister)"),
        ("DIMENSION : 3", "DIMENSION\t  :3"),
        ("EOF\n", ""),
        ("EOF\n", "-1\nEOF\nwhat comes after the end is not read"),
        ("\n", "\r\n"),
        ("\n", "\r"),
        ("\n", "\n\n  "),
        ("2 3 0", "  2\t3.0e+00   .0"),
        ("2 3 0\n3 3 4", "3 3 4.\n2 +3 -0"),
        ("NODE_COORD_SECTION", "NODE_COORD_SECTION :"),
        ("three nodes", 'quoted: "x'),
        ("three nodes", '"over\nseveral : lines\nDIMENSION : 7"'),
        ("three nodes", "over\nseveral lines, even with\nREMARK : a colon"),
        ("COMMENT : three nodes", "COMMENT : one\nCOMMENT : two"),
        ("TYPE : TSP", "VEHICLES : 5\nTYPE : TSP"),
        ("NAME", "\ufeffNAME"),
        ("EOF\n", "EOF\n\x1a"),
        ("EOF\n", "DISPLAY_DATA_SECTION\n1 0 0\nEOF\n"),
    ],
)
def test_formatting_does_not_matter(tmp_path, old, new):
    text = TSP.replace(old, new)
    assert text != TSP
    read = read_instance(saved(tmp_path, text))
    assert (read.name, read.coordinates.tolist()) == ("small", [[0, 0], [3, 0], [3, 4]])


def test_latin_1_comments(tmp_path):
    assert read_instance(saved(tmp_path, TSP.replace("three", "Gr\u00f6tschel").encode("latin-1"))).size == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CAPACITY : 10", "CAPACITY: 1e1"),
        ("2 10\n3 4", "3 4.0\n2 1.0E1"),
        ("DEPOT_SECTION\n1\n-1", "DEPOT_SECTION\n1 -1"),
        ("DEPOT_SECTION\n1\n-1", "DEPOT_SECTION\n1"),
        ("CAPACITY", "VEHICLES : 2\nCAPACITY"),
    ],
)
def test_cvrp_formatting_does_not_matter(tmp_path, old, new):
    text = CVRP.replace(old, new)
    assert text != CVRP
    read = read_instance(saved(tmp_path, text))
    assert read.demand is not None
    assert (read.capacity, read.demand.tolist()) == (10, [10, 4])


@pytest.mark.parametrize("text", [TOUR.replace("1\n3\n2\n", "1 3 2\n"), TOUR.replace("-1\nEOF\n", ""), TOUR + "\n"])
def test_tour_formatting_does_not_matter(tmp_path, text):
    assert read_tour(saved(tmp_path, text), 3).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "text", ["route 1 : 1 3\nROUTE #2:2\ncost: 12", "Route #1:1 3\n\nRoute #2: 2\nRoute #3:\nCost 12"]
)
def test_solution_formatting_does_not_matter(tmp_path, text):
    solution = read_solution(saved(tmp_path, text), 3)
    assert (solution.routes, solution.cost) == ([[1, 3], [2]], 12.0)


finite = st.floats(-1e8, 1e8, allow_nan=False)


@st.composite
def instances(draw: Any) -> LibInstance:
    nodes = draw(st.integers(2, 8))
    points = draw(st.lists(st.tuples(finite, finite), min_size=nodes, max_size=nodes))
    coordinates = torch.tensor(points, dtype=torch.float64)
    name = draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 .:-]{0,10}[A-Za-z0-9]", fullmatch=True))
    if draw(st.booleans()):
        return LibInstance("tsp", " ".join(name.split()), coordinates)
    capacity = draw(st.integers(1, 1000))
    demand = draw(st.lists(st.integers(0, capacity), min_size=nodes - 1, max_size=nodes - 1))
    return LibInstance("cvrp", " ".join(name.split()), coordinates, torch.tensor(demand), capacity)


def equal(one: LibInstance, two: LibInstance) -> bool:
    same = (one.kind, one.name, one.capacity) == (two.kind, two.name, two.capacity)
    demands = one.demand is two.demand is None or torch.equal(one.demand, two.demand)  # pyright: ignore[reportArgumentType]
    return same and demands and torch.equal(one.coordinates, two.coordinates)


@given(instances(), st.text(max_size=30))  # perturbed formatting: test_lib_files_damage.py
@settings(deadline=None)
def test_what_is_written_reads_back_exactly(tmp_path_factory, instance, comment):
    path = tmp_path_factory.mktemp("written") / "x.txt"
    write_instance(path, instance, comment)
    assert equal(read_instance(path), instance)


# -- what is refused, in one line that names file, place and mend ------------------------------------------------------
TSP_REFUSALS = {
    "dimension above": (
        "DIMENSION : 3",
        "DIMENSION : 4",
        r"line 6: .*DIMENSION is 4, found are 3 nodes, without node 4",
    ),
    "dimension below": ("DIMENSION : 3", "DIMENSION : 2", r"line 9: .*DIMENSION is 2.* in 1\.\.2, got '3'"),
    "dimension huge": ("DIMENSION : 3", "DIMENSION : 100001", r"line 4: DIMENSION .* 2\.\.100,000, got '100001'"),
    "dimension negative": ("DIMENSION : 3", "DIMENSION : -3", r"line 4: DIMENSION .*got '-3'"),
    "dimension text": ("DIMENSION : 3", "DIMENSION : three", r"line 4: DIMENSION .*got 'three'"),
    "dimension long": ("DIMENSION : 3", "DIMENSION : " + "9" * 5000, r"line 4: DIMENSION must be"),
    "no dimension": ("DIMENSION : 3\n", "", r"DIMENSION is missing: add DIMENSION : <number of nodes>"),
    "no type": ("TYPE : TSP\n", "", r"TYPE is missing: add TYPE : TSP or TYPE : CVRP"),
    "empty type": ("TYPE : TSP", "TYPE :", r"line 3: TYPE '' is not supported"),
    "other type": ("TYPE : TSP", "TYPE : ATSP", r"line 3: TYPE 'ATSP' is not supported: only TSP and CVRP"),
    "weights": ("EUC_2D", "GEO", r"line 5: EDGE_WEIGHT_TYPE is 'GEO': only EUC_2D is supported"),
    "no weights": ("EDGE_WEIGHT_TYPE : EUC_2D\n", "", r"EDGE_WEIGHT_TYPE is missing: only EUC_2D"),
    "three dimensions": ("EUC_2D", "EUC_2D\nNODE_COORD_TYPE : THREED_COORDS", r"line 6: NODE_COORD_TYPE must be TWOD"),
    "no coordinates": ("NODE_COORD_SECTION\n1 0 0\n2 3 0\n3 3 4\n", "", r"NODE_COORD_SECTION is missing"),
    "twice the section": ("EOF", "NODE_COORD_SECTION\n1 0 0", r"line 10: NODE_COORD_SECTION comes twice"),
    "twice the keyword": ("TYPE : TSP", "TYPE : TSP\nTYPE : CVRP", r"line 4: TYPE comes twice"),
    "twice the node": ("3 3 4", "2 3 4", r"line 9: NODE_COORD_SECTION: node 2 comes twice"),
    "node zero": ("1 0 0", "0 0 0", r"line 7: .*a node .*got '0'"),
    "node not whole": ("1 0 0", "1.5 0 0", r"line 7: .*a node .*got '1.5'"),
    "not a number": ("3 3 4", "3 nan 4", r"line 9: .*coordinate of node 3 must be a number .*got 'nan'"),
    "infinite": ("3 3 4", "3 3 inf", r"line 9: .*got 'inf'"),
    "overflow": ("3 3 4", "3 3 1e999", r"line 9: .*got '1e999'"),
    "far away": ("3 3 4", "3 3 2e9", r"line 9: .*within \+-1e\+09, got '2e9'"),
    "digits of elsewhere": ("3 3 4", "3 3 \u0664", r"line 9: .*must be a number"),
    "underscored": ("3 3 4", "3 3 4_0", r"line 9: .*got '4_0'"),
    "too few numbers": ("3 3 4", "3 3", r"line 9: .*expected a node and 2 numbers, got '3 3'"),
    "too many numbers": ("3 3 4", "3 3 4 5", r"line 9: .*expected a node and 2 numbers"),
    "demands": ("EOF", "DEMAND_SECTION\n1 0", r"line 10: DEMAND_SECTION in a file of TYPE TSP: set TYPE : CVRP"),
    "fixed edges": ("EOF", "FIXED_EDGES_SECTION\n1 2\n-1", r"line 10: FIXED_EDGES_SECTION is not supported"),
    "open quote": ("three nodes", '"three nodes', r"line 2: COMMENT opens a quote that nothing closes"),
    "loose text": ("TYPE : TSP", "TYPE : TSP\nhello", r"line 4: expected KEYWORD : value or a section, got 'hello'"),
}
CVRP_REFUSALS = {
    "no capacity": ("CAPACITY : 10\n", "", r"CAPACITY is missing: add CAPACITY"),
    "capacity zero": ("CAPACITY : 10", "CAPACITY : 0", r"line 5: CAPACITY must be a whole number in 1\.\."),
    "capacity text": ("CAPACITY : 10", "CAPACITY : ten", r"line 5: CAPACITY must be a whole number"),
    "capacity not whole": ("CAPACITY : 10", "CAPACITY : 10.5", r"line 5: CAPACITY must be a whole number"),
    "no demands": ("DEMAND_SECTION\n1 0\n2 10\n3 4\n", "", r"DEMAND_SECTION is missing"),
    "demand missing": (
        "3 4\nDEPOT",
        "DEPOT",
        r"line 10: DEMAND_SECTION: DIMENSION is 3, found are 2 nodes, without node 3",
    ),
    "demand of the depot": ("1 0\n2 10", "1 1\n2 10", r"line 11: .*the demand of the depot, node 1, must be 0, got 1"),
    "above capacity": ("2 10", "2 11", r"line 12: .*demand 11 of node 2 is above CAPACITY 10"),
    "negative demand": ("3 4\nDEPOT", "3 -4\nDEPOT", r"line 13: .*demand of node 3 must be a whole number .*got '-4'"),
    "demand not whole": ("3 4\nDEPOT", "3 4.5\nDEPOT", r"line 13: .*whole number .*got '4.5'"),
    "demand not a number": ("3 4\nDEPOT", "3 nan\nDEPOT", r"line 13: .*got 'nan'"),
    "demand infinite": ("3 4\nDEPOT", "3 1e999\nDEPOT", r"line 13: .*got '1e999'"),
    "demand twice": ("3 4\nDEPOT", "2 4\nDEPOT", r"line 13: DEMAND_SECTION: node 2 comes twice"),
    "no depot": ("DEPOT_SECTION\n1\n-1\n", "", r"DEPOT_SECTION is missing"),
    "empty depots": ("DEPOT_SECTION\n1\n", "DEPOT_SECTION\n", r"line 14: DEPOT_SECTION: .*got none"),
    "another depot": ("DEPOT_SECTION\n1\n", "DEPOT_SECTION\n2\n", r"line 14: .*must be node 1, got 2"),
    "two depots": ("DEPOT_SECTION\n1\n", "DEPOT_SECTION\n1\n2\n", r"line 14: .*got 1, 2"),
    "route length": ("CAPACITY", "DISTANCE : 100\nCAPACITY", r"line 5: DISTANCE: routes of limited length"),
    "service": ("CAPACITY", "SERVICE_TIME : 1\nCAPACITY", r"line 5: SERVICE_TIME: service times are not supported"),
}


def refused(reader: Any, path: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("case", TSP_REFUSALS)
def test_tsp_refusals(tmp_path, case):
    old, new, message = TSP_REFUSALS[case]
    assert TSP.count(old) == 1
    refused(read_instance, saved(tmp_path, TSP.replace(old, new)), message)


@pytest.mark.parametrize("case", CVRP_REFUSALS)
def test_cvrp_refusals(tmp_path, case):
    old, new, message = CVRP_REFUSALS[case]
    assert CVRP.count(old) == 1
    refused(read_instance, saved(tmp_path, CVRP.replace(old, new)), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b" \r\n\t", "is empty"),
        (b"\x1f\x8b\x08\x00binary", "is binary: unpack it"),
        (TSP.encode("utf-16"), "is binary"),
    ],
)
@pytest.mark.parametrize("reader", [read_instance, read_tour, read_solution, read_optima])
def test_what_is_no_text(tmp_path, reader, text, message):
    refused(reader, saved(tmp_path, text), message)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(lib_files, "MAX_BYTES", 100)
    refused(read_instance, saved(tmp_path, TSP), "is larger than")
    monkeypatch.undo()
    monkeypatch.setattr(lib_files, "MAX_NODES", 4)
    refused(
        read_instance, saved(tmp_path, TSP.replace("EOF\n", "4 0 0\n" * 20)), "too much data in a section: at most 4"
    )


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (read_instance, TSP.replace("3 3 4", "3 3 " + "1" * 400_000 + "x")),
        (read_instance, TSP.replace("TYPE", "A" + " " * 400_000 + "x\nTYPE")),
        (read_solution, "route" + " " * 400_000 + "x"),
        (read_solution, "Route #" + "1" * 400_000 + "x"),
        (read_solution, "cost" + " " * 400_000 + "1 x"),
    ],
)
def test_long_lines_take_linear_time(tmp_path, reader, text):
    path = saved(tmp_path, text)
    began = time.process_time()
    with pytest.raises(ValueError, match="line"):
        reader(path)
    assert time.process_time() - began < 2.0  # quadratic: minutes


@pytest.mark.parametrize("reader", [read_instance, read_tour, read_solution, read_optima])
def test_no_file(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match="does not exist: check the name"):
        reader(tmp_path / "none")
    with pytest.raises(ValueError, match="is no regular file"):
        reader(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TOUR\nD", "TSP\nD", r"line 2: TYPE must be TOUR, got 'TSP'"),
        ("TOUR_SECTION\n1\n3\n2\n-1\n", "", r"TOUR_SECTION is missing"),
        ("3\n2\n", "3\n3\n", r"line 7: TOUR_SECTION: node 3 comes twice"),
        ("3\n2\n", "3\n", r"line 4: TOUR_SECTION has 2 nodes, DIMENSION is 3, expected are 3"),
        ("3\n2\n", "3\n4\n", r"line 7: .*1\.\.3, got '4'"),
        ("3\n2\n", "3\n0\n", r"line 7: .*got '0'"),
        ("3\n2\n", "3\nx\n", r"line 7: .*got 'x'"),
        ("-1\nEOF", "-1\n2 1 3\n-1\nEOF", r"line 9: TOUR_SECTION: a second tour"),
    ],
)
def test_tour_refusals(tmp_path, old, new, message):
    assert TOUR.count(old) == 1
    refused(read_tour, saved(tmp_path, TOUR.replace(old, new)), message)


def test_tour_of_another_instance(tmp_path):
    path = saved(tmp_path, TOUR)
    refused(lambda name: read_tour(name, 4), path, "has 3 nodes, DIMENSION is 3, expected are 4")
    assert read_tour(saved(tmp_path, TOUR.replace("DIMENSION : 3\n", "")), 3).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Route #1: 1 2\nRoute #2: 2", r"line 2: customer 2 comes twice"),
        ("Route #1: 1 3", r"customer 2 is on no route"),
        ("Cost 12", r"customer 1 is on no route"),
        ("Route #1: 1 x", r"line 1: a customer must be .*got 'x'"),
        ("Route #1: 0 1", r"line 1: a customer must be .*got '0'"),
        ("Route #1: 1\nCost 12\nCost 13", r"line 3: Cost comes twice"),
        ("Route #1: 1\nCost nan", r"line 2: Cost must be a finite number, got 'nan'"),
        ("Route #1: 1\nCost 1e999", r"line 2: Cost must be a finite number"),
        ("Route #1: 1\nhello", r"line 2: expected Route #k: customers, or Cost value, got 'hello'"),
    ],
)
def test_solution_refusals(tmp_path, text, message):
    refused(read_solution, saved(tmp_path, text), message)


def test_solution_of_another_instance(tmp_path):
    path = saved(tmp_path, SOLUTION)
    refused(lambda name: read_solution(name, 4), path, "customer 4 is on no route")
    refused(lambda name: read_solution(name, 2), path, r"line 1: a customer must be .*1\.\.2, got '3'")


# -- optima ------------------------------------------------------------------------------------------------------------
def test_optima(tmp_path):
    text = "set,name,best_known_cost\r\nA, a ,784\r\nB,b,\r\nX,c,1e3\r\n\r\nA,a,784\r\n"
    assert read_optima(saved(tmp_path, text)) == {"a": 784.0, "c": 1000.0}
    assert read_optima(saved(tmp_path, "name,optimum\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,cost\na,1\n", r"line 1: columns must be name and optimum or best_known_cost, got name, cost"),
        ("instance,optimum\na,1\n", r"line 1: columns must be name"),
        ("name,optimum\na,0\n", r"line 2: optimum of 'a' must be > 0, got '0'"),
        ("name,optimum\na,-1\n", r"line 2: .*got '-1'"),
        ("name,optimum\na,nan\n", r"line 2: .*got 'nan'"),
        ("name,optimum\na,1e999\n", r"line 2: .*got '1e999'"),
        ("name,optimum\na,much\n", r"line 2: .*got 'much'"),
        ("name,optimum\n,1\n", r"line 2: optimum of '' must be"),
        ("name,optimum\na,1\na,2\n", r"line 3: a has two values of optimum"),
        ("name,optimum\n" + "a" * 200_000 + ",1\n", r"line \d: .*field"),
    ],
)
def test_optima_refusals(tmp_path, text, message):
    refused(read_optima, saved(tmp_path, text), message)
