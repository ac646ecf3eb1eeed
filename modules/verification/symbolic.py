"""Symbolic comparison of two expression trees; the handler of the equivalence workers.

Loaded by path inside the sandbox (``zygote.py``), so it imports sympy and its neighbour file only. Its input is a tree,
never a string to be parsed or evaluated; its run time and memory are the sandbox's to limit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import mpmath
import sympy

Node = tuple[Any, ...]
DIGITS = 50
AGREEMENT = 1e-35
SOFT_SECONDS = 2.0
MAX_POWER_BITS = 1_000_000
MAX_EXPONENT = 1e12


def _neighbour(name: str) -> Any:
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_symbolic_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluation = _neighbour("evaluation")


class PreciseOps:
    """Complex arithmetic of 50 digits, with the interface of ``evaluation.FloatOps``."""

    def __init__(self) -> None:
        self.scale = mpmath.mpf(0)
        self.constants = {"pi": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}
        names = ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp")
        self.functions: dict[str, Any] = {name: getattr(mpmath, name) for name in names}
        self.functions |= {"ln": mpmath.log, "abs": mpmath.fabs, "factorial": mpmath.factorial}
        self.functions |= {"floor": mpmath.floor, "ceil": mpmath.ceil}

    def number(self, value: Fraction) -> Any:
        return mpmath.mpf(value.numerator) / value.denominator

    def power(self, base: Any, exponent: Any) -> Any:
        if mpmath.fabs(exponent) > MAX_EXPONENT:  # mpmath itself would carry that many digits
            raise OverflowError("power")
        return mpmath.power(base, exponent)

    def log(self, value: Any) -> Any:
        return mpmath.log(value)

    def seen(self, value: Any) -> Any:
        self.scale = max(self.scale, mpmath.fabs(value))
        return value


def points(names: list[str], assume: str, seed: int) -> Iterator[dict[str, Any]]:
    """Random places, then small integers (for factorials and floors)."""
    generator = random.Random(seed)

    def draw() -> Any:
        real = mpmath.mpf(generator.randint(10**18, 3 * 10**18)) / 10**18
        if assume == "complex":
            return mpmath.mpc(
                real * generator.choice((1, -1)), mpmath.mpf(generator.randint(-(10**18), 10**18)) / 10**18
            )
        return real if assume == "positive" else real * generator.choice((1, -1))

    for _ in range(8 if names else 1):
        yield {name: draw() for name in names}
    for _ in range(8 if names else 0):
        yield {name: mpmath.mpf(generator.randint(1, 12)) for name in names}


def build(tree: Node, assume: str) -> Any:
    """sympy expression of a tree, made by constructors alone."""
    kind = tree[0]
    if kind == "num":
        return sympy.Rational(tree[1])
    if kind == "sym":
        assumptions = {"complex": {}, "real": {"real": True}, "positive": {"positive": True}}[assume]
        return sympy.Symbol(tree[1], **assumptions)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[tree[1]]
    parts = [build(part, assume) for part in tree[1:] if not isinstance(part, str)]
    if kind == "fn":
        simple = {"abs": sympy.Abs, "ln": sympy.log, "ceil": sympy.ceiling, "factorial": sympy.factorial}
        return (simple.get(tree[1]) or getattr(sympy, tree[1]))(parts[0])
    if kind == "neg":
        return -parts[0]
    if kind in ("add", "mul"):
        return (sympy.Add if kind == "add" else sympy.Mul)(*parts)
    if kind == "log":
        return sympy.log(*parts)
    if kind == "binom":
        return sympy.binomial(*parts)
    a, b = parts
    if kind == "div":
        return a / b
    if kind == "pow":
        if a.is_Integer and b.is_Integer and abs(b) * int(a).bit_length() > MAX_POWER_BITS:
            return sympy.Pow(a, b, evaluate=False)
        return a**b
    if kind == "root":
        if a.is_negative and b.is_odd:
            return -sympy.root(-a, b)
        return sympy.root(a, b)
    raise ValueError(f"unknown node '{kind}'")


class _SoftLimitError(Exception):
    pass


@contextlib.contextmanager
def soft_limit(seconds: float) -> Iterator[None]:
    """Ask sympy to stop after a while. Only a courtesy: the server kills what does not listen."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _SoftLimitError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def compare(left: Node, right: Node, assume: str, seed: int) -> str:
    """ "symbolic" (simplify(left - right) is 0), "numeric" (50 digits agree, no proof), "different" or "undecided"."""
    names = sorted(_names(left) | _names(right))
    with mpmath.workdps(DIGITS):
        same = evaluation.agree(left, right, points(names, assume, seed), PreciseOps, AGREEMENT, trusted=1e12)
        if same is None:
            point = next(points(names, assume, seed))
            if _overflows(left, point) != _overflows(right, point):
                return "different"
    if same is False:
        return "different"
    try:
        with soft_limit(SOFT_SECONDS):
            difference = build(left, assume) - build(right, assume)
            if difference == 0 or sympy.expand(difference) == 0 or sympy.simplify(difference) == 0:
                return "symbolic"
    except (_SoftLimitError, ArithmeticError, TypeError, ValueError, NotImplementedError, AttributeError):
        return "numeric" if same else "undecided"
    return "numeric" if same else "different"


def _overflows(tree: Node, point: dict[str, Any]) -> bool:
    try:
        evaluation.evaluate_numeric(tree, point, PreciseOps())
    except OverflowError:
        return True
    except (ValueError, ZeroDivisionError, TypeError):
        return False
    return False


def _names(tree: Any) -> set[str]:
    if tree[0] == "sym":
        return {tree[1]}
    return {name for part in tree[1:] if not isinstance(part, str) for name in _names(part)}


def _tuples(tree: Any) -> Any:
    return tuple(part if isinstance(part, str) else _tuples(part) for part in tree)


def handle(text: str) -> str:
    """Request {"left", "right", "assume", "seed"} as JSON to one of the words of ``compare``."""
    request = json.loads(text)
    return compare(_tuples(request["left"]), _tuples(request["right"]), request["assume"], request["seed"])
