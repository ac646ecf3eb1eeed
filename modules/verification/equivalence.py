"""Do two answers mean the same? Fast exact rules in this process; sympy, rarely, in a sandboxed worker.

Order: empty answers never agree; equal after cleaning; structure (tuples, intervals, sets, lists, matrices, relations,
units) compared part by part; two scalars by exact rational value, by rational identity at random rational points, by a
clear numerical difference. Only scalars that are irrational *and* agree numerically reach the worker, which looks at
50 digits and then at ``simplify(a - b) == 0``. No string is ever evaluated, and no input can hang the caller.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from modules.optional import require
from modules.verification.answers import (
    Answer,
    Collection,
    Matrix,
    Relation,
    Scalar,
    Text,
    Union,
    canonical_text,
    clean,
    is_simple_name,
    parse_answer,
)
from modules.verification.contracts import Problem, Verdict
from modules.verification.evaluation import (
    FloatOps,
    NotExactError,
    agree,
    contains_infinity,
    evaluate_exact,
    evaluate_numeric,
    is_rational_function,
    symbols,
)
from modules.verification.expression import Node, ParseError, parse_expression
from modules.verification.minerva import normalise_minerva
from modules.verification.sandbox import MIB, Backend, Limits
from modules.verification.server import ForkServerPool

Assumption = Literal["complex", "real", "positive"]
FOLDER = Path(__file__).resolve().parent
MAX_ANSWER_LENGTH = 10_000
FLOAT_TOLERANCE = 1e-7
_LOOSE_SPACE = re.compile(r" (?!\d)|(?<!\d) ")  # any but one between digits
Outcome = tuple[bool, str]
DIFFERENT: Outcome = (False, "different")
_FLIPPED = {"<": ">", ">": "<", "\u2264": "\u2265", "\u2265": "\u2264"}


class SymbolicEquivalence:
    """Checks an answer against the gold answer of a problem. A ``Verifier``; thread-safe; workers start when needed.

    Args:
        workers: symbolic workers, i.e. comparisons that may need sympy at once.
        wall_seconds: limit of one symbolic comparison; then the answers do not agree (reason "timeout").
        memory_bytes: address space of a worker's comparison.
        relative_tolerance: real numbers agree within this share of the gold value; 0 is exact. Published OCW scores
            allow 0.01.
        assume: domain of free symbols. "complex" is sympy's default: sqrt(x^2) is not x, sqrt(ab) not sqrt(a)sqrt(b).
        official_compat: normalise by the Minerva paper first (keeps what follows the last "=", removes unit words).
        backend: isolation of the workers; they run our code on data, so rlimits alone are accepted where no namespace
            can be had.

    Raises:
        ValueError: a limit or tolerance out of range.  ImportError: sympy is missing (at the first symbolic question).
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        wall_seconds: float = 5.0,
        memory_bytes: int = 1024 * MIB,
        relative_tolerance: float = 0.0,
        assume: Assumption = "complex",
        official_compat: bool = False,
        backend: str | Backend | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"SymbolicEquivalence: workers must be >= 1, got {workers}")
        if not 0.0 <= relative_tolerance < 1.0:
            raise ValueError(f"SymbolicEquivalence: relative_tolerance must be in [0, 1), got {relative_tolerance}")
        if assume not in ("complex", "real", "positive"):
            raise ValueError(f"SymbolicEquivalence: assume must be complex, real or positive, got '{assume}'")
        self.workers = workers
        self.limits = Limits(
            wall_seconds=wall_seconds, cpu_seconds=None, memory_bytes=memory_bytes, open_files=16, processes=0
        )
        self.relative_tolerance = relative_tolerance
        self.assume: Assumption = assume
        self.official_compat = official_compat
        self.backend = backend
        self.counts: Counter[str] = Counter()
        self._pool: ForkServerPool | None = None
        self._lock = threading.Lock()

    # ----------------------------------------------------------------------------------------------------- public API
    def check(self, problem: Problem, answer: str | None) -> Verdict:
        """Judge ``answer`` against ``problem.answer``."""
        return self.compare(problem.answer, answer)

    def compare(self, gold: str, answer: str | None) -> Verdict:
        """Judge ``answer`` against ``gold``; None and blank answers are never right."""
        started = time.perf_counter()
        ok, reason = self._judge(gold, answer)
        with self._lock:
            self.counts[reason] += 1
        return Verdict(ok, reason, time.perf_counter() - started)

    def compare_many(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """``compare`` for many pairs (gold, answer), ``workers`` at once; verdicts in order."""
        if self.workers == 1:
            return [self.compare(*pair) for pair in pairs]
        with ThreadPoolExecutor(self.workers) as executor:
            return list(executor.map(lambda pair: self.compare(*pair), pairs))

    def compare_answers(
        self, gold: Answer, answer: Answer, *, relative_tolerance: float | None = None
    ) -> tuple[bool, str]:
        """Judge parsed answers; (ok, reason). ``relative_tolerance`` overrides that of the constructor."""
        checker = self
        if relative_tolerance is not None and relative_tolerance != self.relative_tolerance:
            checker = _Tolerant(self, relative_tolerance)
        return checker._answers(gold, answer)

    def equal(self, a: str, b: str | None) -> bool:
        return self.compare(a, b).ok

    def close(self) -> None:
        """Stop the workers. Idempotent; they start again if needed."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------- comparison
    def _judge(self, gold: str, answer: str | None) -> Outcome:
        if answer is None or not answer.strip() or not gold.strip():
            return False, "empty"
        if gold.strip() == answer.strip():
            return True, "string"
        if max(len(gold), len(answer)) > MAX_ANSWER_LENGTH:
            return False, "too long"
        if self.official_compat:
            gold, answer = normalise_minerva(gold), normalise_minerva(answer)
            if not gold or not answer:
                return False, "empty"
            if gold == answer:
                return True, "string"
        cleaned = clean(gold), clean(answer)
        if not all(cleaned):
            return False, "empty"
        spaceless = [_LOOSE_SPACE.sub("", text) for text in cleaned]
        if spaceless[0] == spaceless[1]:
            return True, "string"
        if not any(" " in text or "\\" in text for text in spaceless):
            names = [canonical_text(text) for text in spaceless]
            if names[0] == names[1] != "":
                return True, "string"
        return self._answers(parse_answer(gold), parse_answer(answer))

    def _answers(self, a: Answer, b: Answer) -> Outcome:
        if isinstance(a, Relation) or isinstance(b, Relation):
            return self._relations(a, b)
        if isinstance(a, Scalar) and isinstance(b, Scalar):
            return self._scalars(a, b)
        if isinstance(a, Text) or isinstance(b, Text):
            return self._texts(a, b)
        if isinstance(a, Collection) and isinstance(b, Collection):
            return self._collections(a, b)
        if isinstance(a, Union) and isinstance(b, Union):
            return self._unordered(a.items, b.items)
        if isinstance(a, Matrix) and isinstance(b, Matrix):
            if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
                return DIFFERENT
            return self._ordered([x for row in a.rows for x in row], [y for row in b.rows for y in row])
        return DIFFERENT

    def _texts(self, a: Answer, b: Answer) -> Outcome:
        names = []
        for side in (a, b):
            if isinstance(side, Text):
                names.append(side.canonical)
            elif isinstance(side, Scalar) and side.tree[0] == "sym":
                names.append(side.tree[1])  # "(C)" is a letter to one side and a symbol to the other
            else:
                return DIFFERENT
        return (True, "text") if names[0] == names[1] != "" else DIFFERENT

    def _collections(self, a: Collection, b: Collection) -> Outcome:
        unordered = {"", "{}"}
        if a.brackets in unordered and b.brackets in unordered:
            return self._unordered(a.items, b.items)
        if a.brackets != b.brackets:
            return DIFFERENT
        return self._ordered(a.items, b.items)

    def _ordered(self, a: Sequence[Answer], b: Sequence[Answer]) -> Outcome:
        if len(a) != len(b):
            return DIFFERENT
        reason = "structure"
        for x, y in zip(a, b, strict=True):
            ok, why = self._answers(x, y)
            if not ok:
                return False, why
            reason = why if why in ("symbolic", "numeric") else reason
        return True, reason

    def _unordered(self, a: Sequence[Answer], b: Sequence[Answer]) -> Outcome:
        if len(a) != len(b):
            return DIFFERENT
        left, reason = list(b), "structure"
        for x in a:
            for index, y in enumerate(left):
                ok, why = self._answers(x, y)
                if ok:
                    del left[index]
                    reason = why if why in ("symbolic", "numeric") else reason
                    break
            else:
                return DIFFERENT
        return True, reason

    # ------------------------------------------------------------------------------------------------------ relations
    def _relations(self, a: Answer, b: Answer) -> Outcome:
        a, b = _value_of(a), _value_of(b)
        if isinstance(a, Relation) and isinstance(b, Relation):
            return self._two_relations(a, b)
        if isinstance(a, Relation) or isinstance(b, Relation):
            relation, other = (a, b) if isinstance(a, Relation) else (b, a)
            assert isinstance(relation, Relation)
            interval = _interval(relation)
            if interval is not None:
                return self._answers(interval[1], other) if not isinstance(other, Relation) else DIFFERENT
            name = relation.sides[0]
            if relation.signs == "=" and is_simple_name(name):
                return self._answers(parse_answer(relation.sides[1]), other)
            return DIFFERENT
        return self._answers(a, b)

    def _two_relations(self, a: Relation, b: Relation) -> Outcome:
        first, second = _interval(a), _interval(b)
        if first is not None and second is not None:
            return self._answers(first[1], second[1]) if first[0] == second[0] else DIFFERENT
        a, b = _rising(a), _rising(b)
        if a.signs != b.signs:
            return DIFFERENT
        sides_a, sides_b = [parse_answer(s) for s in a.sides], [parse_answer(s) for s in b.sides]
        outcome = self._ordered(sides_a, sides_b)
        if outcome[0] or len(a.sides) != 2 or a.signs not in ("=", "\u2260"):
            return outcome
        if all(is_simple_name(side) for side in (a.sides[0], b.sides[0])) and a.sides[0] != b.sides[0]:
            return DIFFERENT  # "x = 5" is not "y = 5"
        if any(not isinstance(side, Scalar) or contains_infinity(side.tree) for side in sides_a + sides_b):
            return self._ordered(sides_a, sides_b[::-1])
        left, right = (("add", s[0].tree, ("neg", s[1].tree)) for s in (sides_a, sides_b))  # pyright: ignore
        return self._proportional(left, right)

    def _proportional(self, left: Node, right: Node) -> Outcome:
        """Same equation up to a constant factor: left = k right, with k read off at one exact point."""
        names = symbols(left) | symbols(right)
        for point in _rational_points(names, left, right):
            try:
                a, b = evaluate_exact(left, point), evaluate_exact(right, point)
            except (NotExactError, ZeroDivisionError):
                continue
            if a and b:
                scaled: Node = ("mul", ("num", str(a / b)), right)
                return self._scalars(Scalar(left), Scalar(scaled))
        for sign in (right, ("neg", right)):
            ok, why = self._scalars(Scalar(left), Scalar(sign))
            if ok:
                return True, why
        return DIFFERENT

    # -------------------------------------------------------------------------------------------------------- scalars
    def _scalars(self, a: Scalar, b: Scalar) -> Outcome:
        if a.unit and b.unit and a.unit != b.unit:
            return False, "unit"
        outcome = self._trees(a.tree, b.tree)
        if outcome[0] or a.percent == b.percent:
            return outcome
        # "50%" is written for 50 (the field's habit) and for 0.5 (its value).
        shifted = [("div", s.tree, ("num", "100")) if s.percent else s.tree for s in (a, b)]
        return self._trees(shifted[0], shifted[1])

    def _trees(self, a: Node, b: Node) -> Outcome:
        if a == b:
            return True, "structure"
        if contains_infinity(a) or contains_infinity(b):
            return DIFFERENT
        names = symbols(a) | symbols(b)
        exact = _exact_verdict(a, b, names)
        if exact:
            return True, "identity" if names else "number"
        if self.relative_tolerance and not names and _within(a, b, self.relative_tolerance):
            return True, "tolerance"
        if exact is False:
            return DIFFERENT
        if agree(a, b, _float_points(names, self.assume, a, b), FloatOps, FLOAT_TOLERANCE) is False:
            return DIFFERENT
        return self._symbolic(a, b)

    def _symbolic(self, a: Node, b: Node) -> Outcome:
        request = json.dumps({"left": a, "right": b, "assume": self.assume, "seed": _seed(a, b)})
        reply = self._workers().call([request], limits=self.limits)[0]
        word = reply.get("value") or reply.get("error") or "crashed"
        return (True, word) if word in ("symbolic", "numeric") else (False, word)

    def _workers(self) -> ForkServerPool:
        with self._lock:
            if self._pool is None:
                require("sympy", extra="llemma")
                self._pool = ForkServerPool(
                    self.workers,
                    preload=("sympy", "mpmath"),
                    handler=FOLDER / "symbolic.py",
                    read_only_paths=[FOLDER / "evaluation.py"],
                    backend=self.backend,
                    allow_unsafe_exec=True,
                )
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pool", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool, self._lock = None, threading.Lock()


class _Tolerant(SymbolicEquivalence):
    """The same checker with another tolerance, on the same workers."""

    def __init__(self, parent: SymbolicEquivalence, relative_tolerance: float) -> None:
        self.__dict__.update(parent.__dict__)
        self._parent, self.relative_tolerance = parent, relative_tolerance

    def _workers(self) -> ForkServerPool:
        return self._parent._workers()


# ----------------------------------------------------------------------------------------------------------- functions
def _seed(a: Node, b: Node) -> int:
    """Points depend on both formulas: the same question has the same answer, and nobody can aim at known points."""
    return int.from_bytes(hashlib.sha256(repr((a, b)).encode()).digest()[:8], "big")


def _rational_points(names: set[str], a: Node, b: Node, count: int = 6) -> Iterator[dict[str, Fraction]]:
    generator = random.Random(_seed(a, b))
    for _ in range(count if names else 1):
        yield {name: Fraction(generator.randint(10**9, 10**12), generator.choice((1, 7, 64))) for name in sorted(names)}


def _float_points(names: set[str], assume: Assumption, a: Node, b: Node) -> Iterator[dict[str, complex]]:
    generator = random.Random(_seed(a, b))
    for _ in range(8 if names else 1):
        point = {}
        for name in sorted(names):
            real = generator.uniform(0.5, 2.0) * (1 if assume == "positive" else generator.choice((1, -1)))
            point[name] = complex(real, generator.uniform(-1.5, 1.5) if assume == "complex" else 0.0)
        yield point


def _exact_verdict(a: Node, b: Node, names: set[str]) -> bool | None:
    """Equality of two rational numbers, or of two rational functions at three random points; None if not rational.

    Two different rational functions of degree d agree at a random point with probability below d / 10^11.
    """
    if not (is_rational_function(a) and is_rational_function(b)):
        return None
    used = 0
    for point in _rational_points(names, a, b):
        try:
            same = evaluate_exact(a, point) == evaluate_exact(b, point)
        except ZeroDivisionError:
            continue
        except NotExactError:
            return None
        if not same:
            return False
        used += 1
        if used >= (3 if names else 1):
            return True
    return None


def _within(gold: Node, answer: Node, tolerance: float) -> bool:
    try:
        a, b = evaluate_numeric(gold, {}, FloatOps()), evaluate_numeric(answer, {}, FloatOps())
        return abs(a - b) <= tolerance * (abs(a) or 1e-3)
    except (ValueError, OverflowError, ZeroDivisionError, TypeError):
        return False


def _value_of(answer: Answer) -> Answer:
    """The set in "x in S" ; other answers unchanged."""
    if isinstance(answer, Relation) and answer.signs == "\u2208" and is_simple_name(answer.sides[0]):
        return parse_answer(answer.sides[1])
    return answer


def _rising(relation: Relation) -> Relation:
    """The same relation written with < and \u2264 only."""
    if relation.signs and all(sign in ">\u2265" for sign in relation.signs):
        return Relation(relation.sides[::-1], "".join(_FLIPPED[sign] for sign in reversed(relation.signs)))
    return relation


def _interval(relation: Relation) -> tuple[str, Answer] | None:
    """Variable and interval of "x < 5", "2 < x \u2264 5", "5 \u2265 x"; None if the relation is not of that form."""
    relation = _rising(relation)
    sides, signs = list(relation.sides), relation.signs
    if not signs or any(sign not in "<\u2264" for sign in signs) or len(sides) > 3:
        return None
    if len(sides) == 2:
        if is_simple_name(sides[0]):
            sides, signs = ["-\u221e", *sides], "<" + signs
        elif is_simple_name(sides[1]):
            sides, signs = [*sides, "\u221e"], signs + "<"
        else:
            return None
    if not is_simple_name(sides[1]):
        return None
    try:
        bounds = [Scalar(parse_expression(side)) for side in (sides[0], sides[2])]
    except ParseError:
        return None
    if any(sides[1] in symbols(bound.tree) for bound in bounds):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return sides[1], Collection(brackets, tuple(replace(bound) for bound in bounds))
