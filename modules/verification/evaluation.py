"""Evaluation of expression trees: exactly over the rationals, or numerically in any arithmetic.

This file needs the standard library alone; the symbolic worker loads it inside the sandbox. Trees: ``expression.py``.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]
MAX_BITS = 20_000


class NotExactError(ValueError):
    """The tree has no exact rational value within the bounds (a root, a function, too many digits)."""


def symbols(tree: Node) -> set[str]:
    """Names of the free symbols."""
    if tree[0] == "sym":
        return {tree[1]}
    return {name for part in tree[1:] if isinstance(part, tuple) for name in symbols(part)}


def contains_infinity(tree: Node) -> bool:
    return tree == ("const", "oo") or any(contains_infinity(part) for part in tree[1:] if isinstance(part, tuple))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise NotExactError("too many digits")
    return value


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or not 2 <= degree <= 64:
        raise NotExactError("degree")
    n, negative = int(degree), value < 0
    if negative and n % 2 == 0:
        raise NotExactError("not real")

    def integer_root(number: int) -> int:
        low, high = 0, 1 << (number.bit_length() // n + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= number else (low, middle - 1)
        if low**n != number:
            raise NotExactError("irrational")
        return low

    root = Fraction(integer_root(abs(value.numerator)), integer_root(value.denominator))
    return -root if negative else root


def is_rational_function(tree: Node) -> bool:
    """Whether symbols occur under sums, products, quotients and powers alone (not under roots, abs, factorials)."""
    if tree[0] in ("num", "sym", "const"):
        return True
    if tree[0] in ("root", "fn", "log", "binom"):
        return not symbols(tree)
    return all(is_rational_function(part) for part in tree[1:] if isinstance(part, tuple))


def evaluate_exact(tree: Node, values: Mapping[str, Fraction]) -> Fraction:
    """Exact rational value with the symbols' ``values``.

    Raises:
        NotExactError: irrational, not closed under rationals, or too many digits.  ZeroDivisionError.
    """
    kind = tree[0]
    if kind == "num":
        return Fraction(tree[1])
    if kind == "sym":
        return values[tree[1]]
    if kind == "const":
        raise NotExactError(tree[1])
    if kind == "fn" and tree[1] not in ("abs", "factorial", "floor", "ceil"):
        raise NotExactError(tree[1])
    if kind == "log":
        raise NotExactError("log")
    arguments = [evaluate_exact(part, values) for part in tree[1:] if isinstance(part, tuple)]
    if kind == "neg":
        return -arguments[0]
    if kind == "add":
        return _bounded(sum(arguments, Fraction(0)))
    if kind == "mul":
        product = Fraction(1)
        for argument in arguments:
            product = _bounded(product * argument)
        return product
    if kind == "div":
        return _bounded(arguments[0] / arguments[1])
    if kind == "root":
        return _exact_root(*arguments)
    if kind == "pow":
        base, exponent = arguments
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS:
            raise NotExactError("power")
        return base ** int(exponent)
    if kind == "fn" and tree[1] == "abs":
        return abs(arguments[0])
    if kind == "fn" and tree[1] in ("floor", "ceil"):
        return Fraction(math.floor(arguments[0]) if tree[1] == "floor" else math.ceil(arguments[0]))
    if kind in ("fn", "binom"):  # factorial, binomial
        if any(value.denominator != 1 or not 0 <= value <= 1000 for value in arguments):
            raise NotExactError("range")
        return Fraction(math.factorial(int(arguments[0])) if kind == "fn" else math.comb(*map(int, arguments)))
    raise NotExactError(kind)


class FloatOps:
    """Complex double arithmetic; ``scale`` is the largest summand or argument met, the yardstick of rounding errors."""

    def __init__(self) -> None:
        self.scale = 0.0
        self.functions: dict[str, Any] = {
            name: getattr(cmath, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
        }
        self.functions |= {"exp": cmath.exp, "ln": cmath.log, "abs": abs}
        self.functions |= {
            "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
            "factorial": lambda z: math.gamma(self._real(z) + 1), "floor": lambda z: math.floor(self._real(z)),
            "ceil": lambda z: math.ceil(self._real(z)),
        }  # fmt: skip
        self.constants = {"pi": cmath.pi, "e": cmath.e, "i": 1j}

    @staticmethod
    def _real(value: complex) -> float:
        if abs(value.imag) > 1e-9:
            raise ValueError("real number expected")
        return value.real

    def number(self, value: Fraction) -> complex:
        return complex(float(value))

    def power(self, base: complex, exponent: complex) -> complex:
        return base**exponent

    def log(self, value: complex) -> complex:
        return cmath.log(value)

    def seen(self, value: complex) -> complex:
        self.scale = max(self.scale, abs(value))
        return value


def evaluate_numeric(tree: Node, values: Mapping[str, Any], ops: Any) -> Any:
    """Value in the arithmetic of ``ops`` (``FloatOps``, or mpmath in the worker); odd roots of negatives are real.

    Raises:
        ValueError, OverflowError, ZeroDivisionError: outside the domain or the range.
    """
    kind = tree[0]
    if kind == "num":
        return ops.number(Fraction(tree[1]))
    if kind == "sym":
        return values[tree[1]]
    if kind == "const":
        if tree[1] == "oo":
            raise ValueError("infinite")
        return ops.constants[tree[1]]
    a, *rest = [evaluate_numeric(part, values, ops) for part in tree[1:] if isinstance(part, tuple)]
    if kind == "neg":
        return -a
    if kind in ("add", "mul"):
        for b in rest:
            a = a * b if kind == "mul" else ops.seen(ops.seen(a) + ops.seen(b))
        return a
    if kind == "div":
        return a / rest[0]
    if kind == "pow":
        return ops.power(a, rest[0])
    if kind == "root":
        degree = rest[0].real
        if a.imag == 0 and a.real < 0 and degree == int(degree) and int(degree) % 2 == 1:
            return -ops.power(-a, 1 / rest[0])
        return ops.power(a, 1 / rest[0])
    if kind == "log":
        ops.seen(ops.number(Fraction(1)))
        return ops.log(a) / ops.log(rest[0])
    if kind == "fn":
        if tree[1] not in ("abs", "exp", "factorial", "floor", "ceil"):
            ops.seen(ops.seen(a) * 0 + 1)  # near its zeros a function is exact to the size of its argument, or of 1
        return ops.functions[tree[1]](a) + 0
    if kind == "binom":
        factorial = ops.functions["factorial"]
        return factorial(a) / factorial(rest[0]) / factorial(a - rest[0])
    raise ValueError(f"unknown node '{kind}'")


def agree(
    left: Node,
    right: Node,
    points: Iterable[Mapping[str, Any]],
    make_ops: Callable[[], Any],
    tolerance: float,
    wanted: int = 3,
    trusted: float = 1e15,
) -> bool | None:
    """Whether two trees have the same value at the first ``wanted`` points where both are defined.

    Returns:
        False at the first clear difference (relative to the largest summand met), True if there was none, None if
        no point could be used.
    """
    used = 0
    for point in points:
        ops = make_ops()
        try:
            a, b = evaluate_numeric(left, point, ops), evaluate_numeric(right, point, ops)
            difference, size = abs(a - b), max(abs(a), abs(b), ops.scale)
            if difference != difference or size - size != 0:  # NaN or infinite
                continue
            if difference > tolerance * size:
                return False
            if size > trusted:  # too large for the digits carried: no sign of equality
                continue
        except (ValueError, OverflowError, ZeroDivisionError, TypeError):
            continue
        used += 1
        if used >= wanted:
            return True
    return True if used else None
