"""Tail areas that intervals and tests need: binomial and Student t, through the regularised incomplete beta function.

Standard library only. The continued fraction is Lentz's (Numerical Recipes, 3rd edition, section 6.4); quantiles come
by bisection, which needs no starting value and cannot diverge. Accurate to about 1e-12 (tests hold it to scipy).
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_ROUNDS = 10_000  # of the continued fraction; it takes about sqrt(max(a, b)) of them
_BISECTIONS = 200


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b): the distribution function of Beta(a, b) at ``x``.

    Raises:
        ValueError: ``a`` or ``b`` not positive, ``x`` outside [0, 1].
    """
    if not (a > 0 and b > 0 and 0.0 <= x <= 1.0):
        raise ValueError(f"incomplete_beta: need a, b > 0 and x in [0, 1], got a={a}, b={b}, x={x}")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > _TINY else _TINY)
    total = d
    for m in range(1, _ROUNDS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > _TINY else _TINY)
            c = 1.0 + term / c
            c = c if abs(c) > _TINY else _TINY
            total *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return total
    raise ArithmeticError(f"incomplete_beta: no convergence at a={a}, b={b}, x={x}")


@lru_cache(maxsize=4096)
def beta_quantile(probability: float, a: float, b: float) -> float:
    """``x`` with I_x(a, b) = ``probability``.

    Raises:
        ValueError: as :func:`incomplete_beta`; a probability outside [0, 1].
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"beta_quantile: probability must be in [0, 1], got {probability}")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if incomplete_beta(a, b, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def at_least(successes: int, total: int, rate: float) -> float:
    """P(X >= ``successes``) for X ~ Binomial(``total``, ``rate``)."""
    return 1.0 if successes <= 0 else incomplete_beta(successes, total - successes + 1, rate)


def at_most(successes: int, total: int, rate: float) -> float:
    """P(X <= ``successes``) for X ~ Binomial(``total``, ``rate``)."""
    return 1.0 if successes >= total else incomplete_beta(total - successes, successes + 1, 1.0 - rate)


def student_tail(t: float, degrees: int) -> float:
    """P(T >= ``t``) of Student's t with ``degrees`` of freedom.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"student_tail: degrees must be at least 1, got {degrees}")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) / 2
    return half if t >= 0 else 1.0 - half


@lru_cache(maxsize=4096)
def student_quantile(confidence: float, degrees: int) -> float:
    """``t`` with P(-t <= T <= t) = ``confidence``.

    Raises:
        ValueError: a confidence outside (0, 1), fewer than one degree of freedom.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"student_quantile: confidence must be in (0, 1), got {confidence}")
    if degrees < 1:
        raise ValueError(f"student_quantile: degrees must be at least 1, got {degrees}")
    x = beta_quantile(1.0 - confidence, degrees / 2, 0.5)
    return math.sqrt(degrees * (1.0 - x) / x) if x > 0 else math.inf
