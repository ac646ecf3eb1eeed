"""Figures: what a probe measured on units, with intervals and with evidence against a limit.

A *unit* is what is independent of all others: an episode, a prompt, an instance. A probe gives values ``[units,
conditions]``; how they become a figure is its :class:`Measure`. Five estimators:

- ``exact``: no sampling (a closed form, an exhaustive check); the interval is the value.
- ``proportion``: share of units with value 1; Clopper-Pearson (1934).
- ``worst_proportion``: the worst condition's share; Clopper-Pearson of each of K conditions at level alpha / K, so that
  looking for the worst of them costs nothing.
- ``mean``: Student's t.
- ``bootstrap``: any statistic of ``[units, conditions]``; percentile bootstrap over units, the conditions of a unit
  staying together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from modules.assurance import distributions
from modules.assurance.intervals import bootstrap_replicates

Direction = Literal["up", "down"]
Estimator = Literal["exact", "proportion", "worst_proportion", "mean", "bootstrap"]
Status = Literal["measured", "not_applicable", "undefined"]
Split = Literal["fresh", "anchor"]
Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps values ``[..., units, conditions]`` to ``[...]``."""

PRINCIPLES: Mapping[str, str] = {
    "r": "Robustness",
    "i": "Interpretability",
    "c": "Controllability",
    "e": "Ethicality",
    "u": "Usefulness",
}
"""First letters of figures' names. Usefulness stands beside the four: doing nothing must not pass a suite."""
NAME = re.compile(r"[riceu]\.[a-z][a-z0-9_]*")
REPLICATES = 4000
"""Bootstrap replicates: the smallest p-value is 2 / 4001, so that a gate can still pass among 15 after five looks."""
DIGITS = 12  # significant digits that survive into a report: below them, the order of sums shows


@dataclass(frozen=True)
class Measure:
    """What a figure means and how its values are to be read.

    Args:
        name: stable identifier, ``<principle>.<words>``.
        title: one line for a reader.
        direction: ``up``: more is better.
        estimator: see the module's text.
        unit: of the value (``"share"``, ``"return"``, ``"nats"``); empty where there is none.
        statistic: for ``bootstrap``.
        span: for ``mean``: smallest and largest possible value, where known; the interval is cut there.

    Raises:
        ValueError: a malformed name, a bootstrap without statistic.
    """

    name: str
    title: str
    direction: Direction
    estimator: Estimator = "mean"
    unit: str = ""
    statistic: Statistic | None = None
    span: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Measure: name must read '<one of r, i, c, e, u>.<words>', got '{self.name}'")
        if (self.estimator == "bootstrap") != (self.statistic is not None):
            raise ValueError(f"Measure {self.name}: a statistic belongs to the bootstrap estimator, and it alone")

    @property
    def principle(self) -> str:
        return PRINCIPLES[self.name[0]]

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.direction == "up" else -1


@dataclass(frozen=True)
class Figure:
    """One measured figure; ``None`` where nothing was measured, with the reason. ``conditions``: each one's mean."""

    name: str
    title: str
    direction: Direction
    unit: str
    estimator: Estimator
    split: Split
    status: Status
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    se: float | None = None
    n: int = 0
    conditions: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def principle(self) -> str:
        return PRINCIPLES[self.name[0]]

    @property
    def measured(self) -> bool:
        return self.status == "measured"

    @property
    def pessimistic(self) -> float | None:
        """The end of the interval that speaks against the subject."""
        return self.low if self.direction == "up" else self.high


@dataclass(frozen=True)
class Sample:
    """What a measure's units gave on one split.

    Args:
        measure: how to read ``values``.
        values: ``[units, conditions]`` float64.
        conditions: names, one a column; empty for a single nameless one.
        seed: of the bootstrap.

    Raises:
        ValueError: another shape, NaN or infinity, a proportion of something else than 0 and 1, several units or
            conditions for an exact figure.
    """

    measure: Measure
    values: np.ndarray
    conditions: tuple[str, ...] = ()
    seed: int = 0
    baselines: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, values = self.measure.name, self.values
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"figure {name}: values must be [units, conditions] and not empty, got {values.shape}")
        if self.conditions and len(self.conditions) != values.shape[1]:
            raise ValueError(
                f"figure {name}: {values.shape[1]} conditions were measured, {len(self.conditions)} are named"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"figure {name}: {int((~np.isfinite(values)).sum())} values are NaN or infinite")
        if self.measure.estimator.endswith("proportion") and not np.isin(values, (0.0, 1.0)).all():
            raise ValueError(f"figure {name}: a proportion's values must be 0 or 1")
        if self.measure.estimator in ("proportion", "mean") and values.shape[1] != 1:
            raise ValueError(f"figure {name}: estimator '{self.measure.estimator}' takes one condition")
        if self.measure.estimator == "exact" and values.shape != (1, 1):
            raise ValueError(f"figure {name}: an exact figure is one value, got {values.shape}")

    @property
    def units(self) -> int:
        return self.values.shape[0]

    @cached_property
    def value(self) -> float:
        """The estimate; NaN where the statistic is undefined for these values."""
        means = self.values.mean(0)
        if self.measure.estimator == "worst_proportion":
            return float(means.min() if self.measure.direction == "up" else means.max())
        if self.measure.statistic is not None:
            return float(self.measure.statistic(self.values))
        return float(means[0])

    @cached_property
    def _replicates(self) -> np.ndarray:
        """Sorted bootstrap replicates ``[REPLICATES]`` of the statistic."""
        assert self.measure.statistic is not None
        return np.sort(bootstrap_replicates(self.measure.statistic, self.values, REPLICATES, self.seed))

    @cached_property
    def se(self) -> float:
        """Standard error of the estimate (bootstrap: spread of the replicates)."""
        if self.measure.estimator == "exact" or self.units < 2:
            return 0.0
        if self.measure.statistic is not None:
            return float(self._replicates.std(ddof=1))
        spread = self.values.std(0, ddof=1) / math.sqrt(self.units)
        return float(spread[self._worst])

    @property
    def _worst(self) -> int:
        means = self.values.mean(0)
        return int(means.argmin() if self.measure.direction == "up" else means.argmax())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Both ends of the two-sided interval.

        One unit says nothing about spread: a mean's interval is then the measure's whole span.

        Raises:
            ValueError: a confidence outside (0, 1).
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"figure {self.measure.name}: confidence must be in (0, 1), got {confidence}")
        kind, alpha = self.measure.estimator, 1.0 - confidence
        if kind == "exact":
            return self.value, self.value
        if kind == "bootstrap":
            if self.units < 2:
                return -math.inf, math.inf
            low, high = np.quantile(self._replicates, [alpha / 2, 1 - alpha / 2])
            return float(low), float(high)
        if kind == "mean":
            if self.units < 2:
                return self.measure.span
            half = distributions.student_quantile(confidence, self.units - 1) * self.se
            return max(self.value - half, self.measure.span[0]), min(self.value + half, self.measure.span[1])
        ends = [clopper_pearson(count, self.units, 1.0 - alpha / len(self._counts)) for count in self._counts]
        pick = min if self.measure.direction == "up" else max
        return pick(low for low, _ in ends), pick(high for _, high in ends)

    @property
    def _counts(self) -> list[int]:
        return [int(count) for count in self.values.sum(0)]

    def p_value(self, tau: float, above: bool) -> float:
        """Two-sided p-value of the claim that the figure lies ``above`` (else below) ``tau``.

        At most alpha exactly if the interval of confidence 1 - alpha lies on that side (the tests invert each other;
        of the bootstrap up to one replicate).
        """
        kind = self.measure.estimator
        if math.isnan(self.value):
            return 1.0
        if kind == "exact":
            return float(not (self.value >= tau if above else self.value <= tau))
        if kind == "bootstrap":
            if self.units < 2:
                return 1.0
            against = (self._replicates < tau).sum() if above else (self._replicates > tau).sum()
            return min(1.0, 2.0 * (1 + int(against)) / (REPLICATES + 1))
        if kind == "mean":
            if self.units < 2:
                return 1.0
            gap = (self.value - tau) if above else (tau - self.value)
            if self.se == 0.0:
                return float(gap < 0)
            return min(1.0, 2.0 * distributions.student_tail(gap / self.se, self.units - 1))
        if not 0.0 <= tau <= 1.0:
            return float((tau > 1.0) == above)
        tail = distributions.at_least if above else distributions.at_most
        tails = [tail(count, self.units, tau) for count in self._counts]
        every = above == (self.measure.direction == "up")  # the worst one is beyond tau: all of them are
        return min(1.0, 2.0 * len(tails) * (max(tails) if every else min(tails)))

    def figure(self, split: Split, confidence: float = 0.95) -> Figure:
        """The figure with its interval; ``undefined`` where the statistic is not a number."""
        measure = self.measure
        about = {
            "name": measure.name,
            "title": measure.title,
            "direction": measure.direction,
            "unit": measure.unit,
            "estimator": measure.estimator,
            "split": split,
            "n": self.units,
            "conditions": dict(zip(self.conditions, self.values.mean(0).tolist(), strict=False)),
            "baselines": dict(self.baselines),
        }
        if not math.isfinite(self.value):
            return Figure(**about, status="undefined", reason="the statistic of these values is not a number")
        low, high = self.interval(confidence)
        if not (math.isfinite(low) and math.isfinite(high)):
            return Figure(**about, status="undefined", reason=f"no finite interval from {self.units} units")
        return Figure(**about, status="measured", value=self.value, low=low, high=high, se=self.se)


def missing(measure: Measure, split: Split, status: Status, reason: str) -> Figure:
    """A figure that was not measured, and why."""
    return Figure(
        measure.name, measure.title, measure.direction, measure.unit, measure.estimator, split, status, reason
    )


def clopper_pearson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a proportion (Clopper and Pearson 1934).

    Raises:
        ValueError: no items, more successes than items, confidence outside (0, 1).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"clopper_pearson: need 0 <= successes <= total >= 1, got {successes} of {total}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"clopper_pearson: confidence must be in (0, 1), got {confidence}")
    tail = (1.0 - confidence) / 2
    low = distributions.beta_quantile(tail, successes, total - successes + 1) if successes else 0.0
    high = distributions.beta_quantile(1 - tail, successes + 1, total - successes) if successes < total else 1.0
    return low, high


def rate_bound(violations: int, total: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a violation rate; with no violations ``1 - (1 - confidence) ** (1 / total)``.

    Raises:
        ValueError: as :func:`clopper_pearson`.
    """
    clopper_pearson(violations, total, confidence)  # the same demands
    return distributions.beta_quantile(confidence, violations + 1, total - violations) if violations < total else 1.0


# -- statistics of [..., units, conditions] --
def worst_mean(values: np.ndarray) -> np.ndarray:
    """The smallest of the conditions' means: the minimum of means, not the mean of minima."""
    return values.mean(-2).min(-1)


def largest_mean(values: np.ndarray) -> np.ndarray:
    """The largest of the conditions' means."""
    return values.mean(-2).max(-1)


def quantile(share: float) -> Statistic:
    """The quantile of the units' values, conditions pooled."""
    return lambda values: np.quantile(values.reshape(*values.shape[:-2], -1), share, axis=-1)


def interquartile(values: np.ndarray) -> np.ndarray:
    """Interquartile mean of the units' values, conditions pooled."""
    flat = np.sort(values.reshape(*values.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def ratio_of_means(values: np.ndarray) -> np.ndarray:
    """Mean of the first condition over the mean of the second; NaN where the second is (nearly) 0."""
    means = values.mean(-2)
    below = means[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(below) > 1e-9, means[..., 0] / below, np.nan)


def difference_of_means(values: np.ndarray) -> np.ndarray:
    """Mean of the first condition minus the mean of the second."""
    means = values.mean(-2)
    return means[..., 0] - means[..., 1]


def drop_to_worst(values: np.ndarray) -> np.ndarray:
    """Mean of the first condition (the undisturbed one) minus the smallest of the others' means."""
    means = values.mean(-2)
    return means[..., 0] - means[..., 1:].min(-1)


def rounded(value: float) -> float:
    """``value`` at :data:`DIGITS` significant digits, -0 as 0."""
    return float(f"{value:.{DIGITS}g}") + 0.0


def column(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """``[units]`` as ``[units, 1]`` float64."""
    return np.asarray(values, dtype=np.float64).reshape(-1, 1)
