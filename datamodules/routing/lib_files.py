"""Files of routing instances and solutions as people have them: TSPLIB95 and CVRPLIB.

Formats: Reinelt, "TSPLIB 95" (1995), sections 1 and 2; Uchoa et al., "New benchmark instances for the capacitated
vehicle routing problem" (2017). The text comes from anywhere, so all is bounded before it is stored.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from modules.files import atomic_write

MAX_BYTES = 1 << 23
MAX_NODES = 100_000
MAX_CAPACITY = 1_000_000
"""Up to here whole demands can be told from their float32 shares of the capacity."""
MAX_COORDINATE = 1e9
"""Largest coordinate in magnitude: rounded distances stay exact in float64."""

KINDS = {"tsp": "TSP", "cvrp": "CVRP"}
"""TYPE of the files of a problem."""

# Each has one way to match, so that no text takes more than time linear in its length.
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,9}", re.ASCII)
_KEYWORD = re.compile(r"([A-Z][A-Z0-9_]*)\s*:(.*)", re.ASCII)
_ROUTE = re.compile(r"route\s*(?:#\s*)?(?:\d+\s*)?:(.*)", re.IGNORECASE | re.ASCII)
_COST = re.compile(r"cost(?:\s*:)?\s*(\S+)", re.IGNORECASE | re.ASCII)

# Keywords that change the problem, with why; an unknown one is a remark.
_REFUSED = {
    "DISTANCE": "routes of limited length are not supported",
    "SERVICE_TIME": "service times are not supported",
}
_KEYWORDS = {"NAME", "TYPE", "COMMENT", "DIMENSION", "CAPACITY", "EDGE_WEIGHT_TYPE", "NODE_COORD_TYPE", *_REFUSED}
_DATA = {"NODE_COORD_SECTION", "DEMAND_SECTION", "DEPOT_SECTION", "TOUR_SECTION"}
_REMARKS = {"DISPLAY_DATA_SECTION"}
_SECTION_LINE = re.compile(r"[A-Z][A-Z0-9_]*_SECTION", re.ASCII)


@dataclass(frozen=True)
class LibInstance:
    """One instance with distances as EUC_2D has them: Euclidean, rounded to the nearest whole number.

    ``kind``: ``tsp`` or ``cvrp``. ``coordinates`` float64 ``[N, 2]``, node k + 1 of the file in row k (cvrp: row 0 is
    the depot). Of cvrp, ``demand`` int64 ``[N - 1]`` and ``capacity``; else ``None``. ``name`` is the file's NAME, and
    may be empty.
    """

    kind: str
    name: str
    coordinates: Tensor
    demand: Tensor | None = None
    capacity: int | None = None

    @property
    def size(self) -> int:
        """Customers: nodes without the depot."""
        return len(self.coordinates) - (self.kind == "cvrp")


class _Lines:
    """A text file's lines that are not empty, with what an error message needs to point at one."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self._lines = _read_lines(path)

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._lines, 1):
            self.number = number
            if line.strip():
                yield line.strip()

    def fail(self, message: str, number: int | None = None) -> NoReturn:
        raise ValueError(f"{self.path}, line {number or self.number}: {message}")

    def whole(self, text: str, what: str, low: int, high: int) -> int:
        if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
            self.fail(f"{what} must be a whole number in {low:,}..{high:,}, got {text[:40]!r}")
        return int(text)

    def integral(self, text: str, what: str, low: int, high: int) -> int:
        """As :meth:`whole`, and 7.0 or 1e3 are fine too."""
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not low <= value <= high or value != int(value):
            self.fail(f"{what} must be a whole number in {low:,}..{high:,}, got {text[:40]!r}")
        return int(value)

    def number_of(self, text: str, what: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not abs(value) <= MAX_COORDINATE:
            self.fail(f"{what} must be a number within +-{MAX_COORDINATE:g}, got {text[:40]!r}")
        return value


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: name a text file")
    with open(path, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a file of at most {MAX_NODES:,} nodes")
    if not data.strip():
        raise ValueError(f"{path} is empty: copy it again")
    if re.search(rb"[\x00-\x08\x0e-\x19\x1b-\x1f]", data):  # \x1a: how DOS marked the end of a file
        raise ValueError(f"{path} is binary: unpack it, or name a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # old comments with umlauts; all that is parsed is ASCII
    return re.split(r"\r\n|\r|\n", text.replace("\x1a", ""))


# -- instances ---------------------------------------------------------------------------------------------------------
def read_instance(path: str | Path) -> LibInstance:
    """Read a ``.tsp`` or ``.vrp`` file.

    Taken as they come: spaces anywhere, any line ends, scientific notation, comments of several lines, nodes in any
    order, no EOF. VEHICLES is a remark: the number of vehicles is not limited (CVRPLIB).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that breaks the format or asks for what is not supported (only EUC_2D, TYPE TSP and CVRP,
            one depot, node 1); the message names file, line and mend.
    """
    path = Path(path)
    lines = _Lines(path)
    header, sections = _parse(lines)
    kind = _kind(lines, header)
    weights, where = header.get("EDGE_WEIGHT_TYPE", ("", None))
    if weights.upper() != "EUC_2D":
        problem = f"is {weights[:40]!r}" if weights else "is missing"
        lines.fail(f"EDGE_WEIGHT_TYPE {problem}: only EUC_2D is supported", where)
    coordinate_type, where = header.get("NODE_COORD_TYPE", ("TWOD_COORDS", None))
    if coordinate_type.upper() != "TWOD_COORDS":
        lines.fail(f"NODE_COORD_TYPE must be TWOD_COORDS, got {coordinate_type[:40]!r}", where)
    _refuse_others(lines, sections, ("NODE_COORD_SECTION", "DEMAND_SECTION", "DEPOT_SECTION"))
    nodes = _dimension(lines, header)
    if nodes is None:
        raise ValueError(f"{path}: DIMENSION is missing: add DIMENSION : <number of nodes>")
    rows = _numbered(lines, sections, "NODE_COORD_SECTION", nodes, 2)
    flat = [lines.number_of(text, f"NODE_COORD_SECTION: coordinate of node {k}") for k, row in rows for text in row]
    coordinates = torch.tensor(flat, dtype=torch.float64).view(nodes, 2)
    name = header.get("NAME", ("", None))[0]
    if kind == "tsp":
        for section in ("DEMAND_SECTION", "DEPOT_SECTION"):
            if section in sections:
                lines.fail(f"{section} in a file of TYPE TSP: set TYPE : CVRP", sections[section].start)
        return LibInstance("tsp", name, coordinates)
    if "CAPACITY" not in header:
        raise ValueError(f"{path}: CAPACITY is missing: add CAPACITY : <number> before the sections")
    text, lines.number = header["CAPACITY"]
    capacity = lines.integral(text, "CAPACITY", 1, MAX_CAPACITY)
    _check_depot(lines, sections)
    demand = []
    for node, (text,) in _numbered(lines, sections, "DEMAND_SECTION", nodes, 1):
        amount = lines.integral(text, f"DEMAND_SECTION: demand of node {node}", 0, 2**53)
        if node == 1 and amount != 0:
            lines.fail(f"DEMAND_SECTION: the demand of the depot, node 1, must be 0, got {amount}")
        if amount > capacity:
            lines.fail(f"DEMAND_SECTION: demand {amount} of node {node} is above CAPACITY {capacity}: no vehicle fits")
        demand.append(amount)
    return LibInstance("cvrp", name, coordinates, torch.tensor(demand[1:]), capacity)


@dataclass
class _Section:
    """Lines of data: ``(line number, words)``, begun at line ``start``."""

    start: int
    rows: list[tuple[int, list[str]]]
    words: int = 0

    def add(self, lines: _Lines, line: str) -> None:
        words = line.split(None, MAX_NODES + 1)
        self.words += len(words)
        if self.words > 4 * MAX_NODES:
            lines.fail(f"too much data in a section: at most {MAX_NODES:,} nodes are supported")
        self.rows.append((lines.number, words))


_Header = dict[str, tuple[str, int]]


def _parse(lines: _Lines) -> tuple[_Header, dict[str, _Section]]:
    """Keywords with their value and line, and the sections."""
    header: _Header = {}
    sections: dict[str, _Section] = {}
    section, name = None, ""
    quoted: int | None = None  # line where a comment began whose quote is still open
    comment = False
    for line in lines:
        if quoted is not None:
            quoted = None if '"' in line else quoted
            continue
        if line == "EOF":
            break
        head = line.rstrip(": \t")
        matched = _KEYWORD.fullmatch(line)
        key = matched[1] if matched else ""
        if _SECTION_LINE.fullmatch(head):
            if head in sections:
                lines.fail(f"{head[:40]} comes twice: give each section once")
            section, name = _Section(lines.number, []), head
            sections[name] = section
        elif matched and (key in _KEYWORDS or section is None and not comment):
            section, comment, value = None, key == "COMMENT", matched[2].strip()
            if comment:
                quoted = lines.number if value.startswith('"') and value.count('"') % 2 else None
                continue
            if key in _REFUSED:
                lines.fail(f"{key}: {_REFUSED[key]}")
            if key in header:
                lines.fail(f"{key[:40]} comes twice: give each keyword once")
            header[key] = value, lines.number
        elif section is not None:
            if name in _DATA:  # of others, such as matrices, only the name is needed
                section.add(lines, line)
        elif not comment:
            lines.fail(f"expected KEYWORD : value or a section, got {line[:40]!r}")
    if quoted is not None:
        lines.fail('COMMENT opens a quote that nothing closes: add the missing "', quoted)
    return header, sections


def _refuse_others(lines: _Lines, sections: dict[str, _Section], known: Sequence[str]) -> None:
    for name, section in sections.items():
        if name not in known and name not in _REMARKS:
            lines.fail(f"{name[:40]} is not supported: only {', '.join(known)} are", section.start)


def _kind(lines: _Lines, header: _Header) -> str:
    if "TYPE" not in header:
        raise ValueError(f"{lines.path}: TYPE is missing: add TYPE : TSP or TYPE : CVRP")
    text, where = header["TYPE"]
    word = text.split()[0].upper() if text else ""  # some files add the author's name
    kind = word.lower()
    if KINDS.get(kind) != word:
        lines.fail(f"TYPE {text[:40]!r} is not supported: only TSP and CVRP are", where)
    return kind


def _dimension(lines: _Lines, header: _Header) -> int | None:
    if "DIMENSION" not in header:
        return None
    text, lines.number = header["DIMENSION"]
    return lines.whole(text, "DIMENSION", 2, MAX_NODES)


def _section(lines: _Lines, sections: dict[str, _Section], name: str) -> _Section:
    if name not in sections:
        raise ValueError(f"{lines.path}: {name} is missing: the file may be cut off, copy it again")
    return sections[name]


def _numbered(
    lines: _Lines, sections: dict[str, _Section], name: str, nodes: int, values: int
) -> Iterator[tuple[int, list[str]]]:
    """``(node, words)`` of a section in order of nodes, each of 1..nodes once; ``lines.number`` follows."""
    section = _section(lines, sections, name)
    found: dict[int, tuple[int, list[str]]] = {}
    for number, words in section.rows:
        lines.number = number
        if words == ["-1"]:
            break
        if len(words) != 1 + values:
            lines.fail(f"{name}: expected a node and {values} number{'s' * (values > 1)}, got {' '.join(words)[:40]!r}")
        node = lines.whole(words[0], f"{name}: a node (DIMENSION is {nodes})", 1, nodes)
        if node in found:
            lines.fail(f"{name}: node {node} comes twice: give each node once")
        found[node] = number, words[1:]
    if len(found) != nodes:
        missing = next(node for node in range(1, nodes + 1) if node not in found)
        lines.fail(
            f"{name}: DIMENSION is {nodes}, found are {len(found)} nodes, without node {missing}: "
            "set DIMENSION to what is there, or add what is missing",
            section.start,
        )
    for node in range(1, nodes + 1):
        lines.number, words = found[node]
        yield node, words


def _check_depot(lines: _Lines, sections: dict[str, _Section]) -> None:
    section = _section(lines, sections, "DEPOT_SECTION")
    words = [(number, word) for number, row in section.rows for word in row]
    ends = [place for place, (_, word) in enumerate(words) if word == "-1"]
    depots = words[: ends[0]] if ends else words
    given = [word for _, word in depots]
    if given != ["1"]:
        shown = ", ".join(given)[:40] or "none"
        lines.fail(f"DEPOT_SECTION: the one depot must be node 1, got {shown}: number the depot 1", section.start)


def instance_text(instance: LibInstance, comment: str = "") -> str:
    """The file of ``instance``, which :func:`read_instance` reads back exactly."""
    name, comment = (_one_line(text) for text in (instance.name, comment))
    nodes = len(instance.coordinates)
    lines = [f"NAME : {name}", *([f"COMMENT : {comment}"] if comment else []), f"TYPE : {KINDS[instance.kind]}"]
    lines += [f"DIMENSION : {nodes}", "EDGE_WEIGHT_TYPE : EUC_2D"]
    if instance.capacity is not None:
        lines.append(f"CAPACITY : {instance.capacity}")
    points = enumerate(instance.coordinates.tolist(), 1)
    lines += ["NODE_COORD_SECTION", *(f"{node} {_plain(x)} {_plain(y)}" for node, (x, y) in points)]
    if instance.demand is not None:
        amounts = enumerate([0, *instance.demand.tolist()], 1)
        lines += ["DEMAND_SECTION", *(f"{node} {amount}" for node, amount in amounts), "DEPOT_SECTION", "1", "-1"]
    return "\n".join([*lines, "EOF", ""])


def write_instance(path: str | Path, instance: LibInstance, comment: str = "") -> None:
    """Write ``instance`` as a ``.tsp`` or ``.vrp`` file, atomically."""
    with atomic_write(path, "w") as stream:
        stream.write(instance_text(instance, comment))


def _one_line(text: str) -> str:
    """``text`` as a value that reads back: no line ends, no quotes (they may span lines), nothing of a binary file."""
    printable = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return printable.replace('"', "'")


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


# -- solutions ---------------------------------------------------------------------------------------------------------
def read_tour(path: str | Path, nodes: int | None = None) -> Tensor:
    """The tour ``[N]`` int64 of a TSPLIB ``.tour`` file, counted from 0.

    Args:
        nodes: how many there must be; ``None``: as many as are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no tour of each node once, or of another number of nodes; names file, line and mend.
    """
    lines = _Lines(Path(path))
    header, sections = _parse(lines)
    text, where = header.get("TYPE", ("TOUR", None))
    if text.upper() != "TOUR":
        lines.fail(f"TYPE must be TOUR, got {text[:40]!r}", where)
    _refuse_others(lines, sections, ("TOUR_SECTION",))
    stated = _dimension(lines, header)
    section = _section(lines, sections, "TOUR_SECTION")
    tour: list[int] = []
    seen: set[int] = set()
    words = ((number, word) for number, row in section.rows for word in row)
    for lines.number, word in words:
        if word == "-1":
            break
        node = lines.whole(word, "TOUR_SECTION: a node", 1, nodes or stated or MAX_NODES)
        if node in seen:
            lines.fail(f"TOUR_SECTION: node {node} comes twice: give each node once")
        seen.add(node)
        tour.append(node - 1)
    for lines.number, word in words:
        if word != "-1":
            lines.fail("TOUR_SECTION: a second tour: give one in each file")
    wanted = nodes or stated or max(seen, default=0)
    if not tour or len(tour) != wanted or stated not in (None, wanted):
        lines.fail(
            f"TOUR_SECTION has {len(tour)} nodes, DIMENSION is {stated or 'not given'}, expected are "
            f"{wanted or 'some'}: the tour is of another instance or cut off",
            section.start,
        )
    return torch.tensor(tour)


@dataclass(frozen=True)
class LibSolution:
    """Routes of a CVRPLIB ``.sol`` file: lists of customers 1, 2, ... (depot 0); ``cost`` as stated, else ``None``."""

    routes: list[list[int]]
    cost: float | None

    def actions(self) -> Tensor:
        """``[T]`` int64: the routes as one, with the depot, 0, between them."""
        joined = [node for route in self.routes for node in (*route, 0)]
        return torch.tensor(joined[:-1], dtype=torch.int64)


def read_solution(path: str | Path, customers: int | None = None) -> LibSolution:
    """Read a CVRPLIB ``.sol`` file: lines ``Route #k: customers`` and ``Cost value``. Empty routes are left out.

    Args:
        customers: how many there must be; ``None``: as many as are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another line, or not each customer once; names file, line and mend.
    """
    lines = _Lines(Path(path))
    routes: list[list[int]] = []
    seen: set[int] = set()
    cost: float | None = None
    for line in lines:
        if route := _ROUTE.fullmatch(line):
            routes.append([])
            for word in route[1].split():
                node = lines.whole(word, "a customer", 1, customers or MAX_NODES)
                if node in seen:
                    lines.fail(f"customer {node} comes twice: give each customer once")
                seen.add(node)
                routes[-1].append(node)
        elif stated := _COST.fullmatch(line):
            if cost is not None:
                lines.fail("Cost comes twice: give it once")
            cost = float(stated[1]) if _NUMBER.fullmatch(stated[1]) else math.nan
            if not math.isfinite(cost):
                lines.fail(f"Cost must be a finite number, got {stated[1][:40]!r}")
        elif line != "EOF":
            lines.fail(f"expected Route #k: customers, or Cost value, got {line[:40]!r}")
    wanted = customers or max(seen, default=0)
    if not seen or len(seen) != wanted:
        missing = next((node for node in range(1, wanted + 1) if node not in seen), 1)
        raise ValueError(f"{path}: customer {missing} is on no route: the solution is of another instance or cut off")
    return LibSolution([route for route in routes if route], cost)


# -- optima ------------------------------------------------------------------------------------------------------------
_COST_COLUMNS = ("optimum", "best_known_cost")


def read_optima(path: str | Path) -> dict[str, float]:
    """Optimal or best known costs by instance name, from a CSV with ``name`` and ``optimum`` or ``best_known_cost``.

    An empty cost is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a cost that is not a positive number, or a name with two costs; names file, line
            and mend.
    """
    path = Path(path)
    reader = csv.reader(_read_lines(path), skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}: give comma-separated values") from None
    fields = rows[0][1]
    column = next((name for name in _COST_COLUMNS if name in fields), None)
    if "name" not in fields or column is None:
        raise ValueError(
            f"{path}, line 1: columns must be name and {' or '.join(_COST_COLUMNS)}, got {', '.join(fields)[:80]}"
        )
    optima: dict[str, float] = {}
    for number, row in rows[1:]:
        cells = dict(zip(fields, row, strict=False))
        name, text = cells.get("name", ""), cells.get(column, "")
        if not text:
            continue
        cost = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not (name and 0 < cost < math.inf):
            raise ValueError(f"{path}, line {number}: {column} of {name[:40]!r} must be > 0, got {text[:40]!r}")
        if optima.setdefault(name, cost) != cost:
            raise ValueError(f"{path}, line {number}: {name[:40]} has two values of {column}: keep one")
    return optima
