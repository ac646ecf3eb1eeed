"""Statistics of a benchmark suite with few runs: interquartile means, stratified bootstrap, comparisons, profiles.

The protocol is that of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
Scores are ``[runs, tasks]``: a row is not a run over all tasks, a column holds the runs of one task, in any order. The
bootstrap is stratified: the runs of each task are drawn again with replacement, tasks stay. So the intervals say how an
aggregate would move with other seeds on the same tasks, not with other tasks. With three runs a task they are too
narrow (a resample cannot hold a value that was not seen); five to ten runs a task are the protocol's working range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

REPLICATES = 2000
"""Bootstrap replicates: the seed then moves an end of a 95 % interval by about 1.5 % of the interval's width (s.d.)."""
_CHUNK = 4_000_000  # resampled scores held at once: 32 MB

Statistic = Callable[..., np.ndarray]
"""Maps scores ``[..., runs, tasks]``, one array per algorithm, to ``[...]``; leading dimensions are independent."""


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval; all float64 of one shape, that of the statistic (``[]`` for a number)."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def plain(self) -> dict[str, Any]:
        """The three as floats or lists, for JSON."""
        return {"estimate": self.estimate.tolist(), "low": self.low.tolist(), "high": self.high.tolist()}


def _scores(values: ArrayLike, owner: str, least_runs: int = 1) -> np.ndarray:
    """``values`` as float64 ``[..., runs, tasks]``, or an error that names the culprit."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"{owner}: scores: must be [runs, tasks] and hold values, got shape {scores.shape}")
    if scores.shape[-2] < least_runs:
        raise ValueError(f"{owner}: scores: needs at least {least_runs} runs a task, got {scores.shape[-2]}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{owner}: scores: must be finite, got {int((~np.isfinite(scores)).sum())} NaN or infinite")
    return scores


def _same_tasks(first: np.ndarray, second: np.ndarray, owner: str) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"{owner}: scores: must have the same tasks, got {first.shape[-1]} and {second.shape[-1]}")


# -- aggregates --
def interquartile_mean(scores: ArrayLike) -> np.ndarray:
    """Mean of the middle half of all runs of all tasks: a quarter of the values (rounded down) is cut at each end.

    The same as ``scipy.stats.trim_mean(scores, 0.25, axis=None)``.

    Args:
        scores: ``[..., runs, tasks]``.

    Returns:
        ``[...]`` float64.

    Raises:
        ValueError: fewer than two dimensions, no values, NaN or infinity.
    """
    scores = _scores(scores, "interquartile_mean")
    flat = scores.reshape(*scores.shape[:-2], -1)
    cut = flat.shape[-1] // 4
    if cut:
        flat = np.partition(flat, (cut, flat.shape[-1] - cut - 1), axis=-1)[..., cut : flat.shape[-1] - cut]
    return flat.mean(-1)


def mean(scores: ArrayLike) -> np.ndarray:
    """Mean over runs and tasks. Shapes and errors as :func:`interquartile_mean`."""
    return _scores(scores, "mean").mean((-2, -1))


def median(scores: ArrayLike) -> np.ndarray:
    """Median over tasks of the tasks' means over runs. Shapes and errors as :func:`interquartile_mean`."""
    return np.median(_scores(scores, "median").mean(-2), axis=-1)


def optimality_gap(scores: ArrayLike, target: float = 1.0) -> np.ndarray:
    """How far runs stay below ``target`` on average: ``target - mean(min(score, target))``, lower is better.

    Args:
        scores: ``[..., runs, tasks]``, normalised so that ``target`` is the score that one wishes for.
        target: scores beyond it count as it.

    Raises:
        ValueError: as :func:`interquartile_mean`.
    """
    return target - np.minimum(_scores(scores, "optimality_gap"), target).mean((-2, -1))


AGGREGATES: Mapping[str, Statistic] = MappingProxyType(
    {"iqm": interquartile_mean, "mean": mean, "median": median, "optimality_gap": optimality_gap}
)


def normalise(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Min-max normalisation with given bounds: ``low`` becomes 0, ``high`` 1; values beyond them are kept.

    Args:
        values: ``[..., tasks]``, e.g. scores ``[runs, tasks]``; NaN stays NaN.
        low, high: ``[tasks]`` or one number for all; e.g. a random policy's return and the best possible one.

    Raises:
        ValueError: bounds that are not finite, ``low`` not below ``high``, or shapes that do not fit.
    """
    values, low, high = (np.asarray(one, dtype=np.float64) for one in (values, low, high))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"normalise: low, high: must be finite with low < high, got {low.tolist()}, {high.tolist()}")
    for name, bound in (("low", low), ("high", high)):
        if bound.ndim > 1 or bound.ndim == 1 and values.shape[-1:] != bound.shape:
            raise ValueError(
                f"normalise: {name}: must be one number or one a task {values.shape[-1:]}, got {bound.shape}"
            )
    return (values - low) / (high - low)


# -- bootstrap --
def bootstrap_interval(
    statistic: Statistic,
    *scores: ArrayLike,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic by the stratified bootstrap.

    Each algorithm's runs are drawn on their own; leading dimensions of scores (points of a curve) share the drawn runs,
    as a run is one curve.

    Args:
        statistic: maps one array ``[..., runs, tasks]`` per algorithm to ``[...]``; may add dimensions at the end.
        scores: ``[..., runs, tasks]`` per algorithm, the same tasks and leading dimensions, any number of runs.
        replicates: how many times runs are drawn.
        confidence: share of replicates inside the interval.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        The statistic of ``scores`` and the interval's ends.

    Raises:
        ValueError: as :func:`interquartile_mean`; fewer than 2 runs (their spread would be unknown); unequal tasks;
            ``replicates`` below 1 or ``confidence`` outside (0, 1).
    """
    if replicates < 1:
        raise ValueError(f"bootstrap_interval: replicates: must be at least 1, got {replicates}")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence: must be in (0, 1), got {confidence}")
    if not scores:
        raise ValueError("bootstrap_interval: scores: needs at least one algorithm's, got none")
    arrays = [_scores(one, "bootstrap_interval", least_runs=2) for one in scores]
    for other in arrays[1:]:
        _same_tasks(arrays[0], other, "bootstrap_interval")
        if other.shape[:-2] != arrays[0].shape[:-2]:
            raise ValueError(
                f"bootstrap_interval: scores: leading dimensions must agree, got {arrays[0].shape} and {other.shape}"
            )
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(one.size for one in arrays))
    found = [
        np.asarray(statistic(*(_resample(one, min(chunk, replicates - start), generator) for one in arrays)))
        for start in range(0, replicates, chunk)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail], axis=0)
    estimate = np.asarray(statistic(*(one[None] for one in arrays)), dtype=np.float64)[0]
    return Interval(np.asarray(estimate), np.asarray(low), np.asarray(high))


def bootstrap_replicates(
    statistic: Callable[[np.ndarray], np.ndarray], values: np.ndarray, replicates: int = REPLICATES, seed: int = 0
) -> np.ndarray:
    """The statistic of units drawn with replacement; what was measured on one unit stays together.

    Args:
        statistic: maps values ``[..., units, conditions]`` to ``[...]``.
        values: ``[units, conditions]``.
        replicates: how many times units are drawn.
        seed: of the draws.

    Returns:
        ``[replicates]`` float64.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // values.size)
    drawn = (
        values[generator.integers(len(values), size=(min(chunk, replicates - start), len(values)))]
        for start in range(0, replicates, chunk)
    )
    return np.concatenate([np.asarray(statistic(one), dtype=np.float64) for one in drawn])


def _resample(scores: np.ndarray, replicates: int, generator: np.random.Generator) -> np.ndarray:
    """``[replicates, ..., runs, tasks]``: every task's runs drawn with replacement, alike for all leading indices."""
    runs, tasks = scores.shape[-2:]
    drawn = generator.integers(runs, size=(replicates, runs, tasks)) * tasks + np.arange(tasks)
    flat = scores.reshape(*scores.shape[:-2], runs * tasks)
    return np.moveaxis(flat[..., drawn], -3, 0)


def aggregate(
    scores: ArrayLike,
    statistic: str = "iqm",
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """One algorithm's aggregate over a suite, with its interval.

    Args:
        scores: normalised, ``[..., runs, tasks]``.
        statistic: ``iqm``, ``mean``, ``median`` (of tasks' means) or ``optimality_gap``.
        replicates, confidence, seed: as :func:`bootstrap_interval`, which names the errors too.

    Raises:
        ValueError: an unknown ``statistic``.
    """
    if statistic not in AGGREGATES:
        raise ValueError(f"aggregate: statistic: must be one of {', '.join(AGGREGATES)}, got '{statistic}'")
    return bootstrap_interval(AGGREGATES[statistic], scores, replicates=replicates, confidence=confidence, seed=seed)


# -- proportions --
def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): sound for few items and for rates near 0 and 1.

    Raises:
        ValueError: no items, more successes than items, confidence outside (0, 1).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"wilson_interval: need 0 <= successes <= total >= 1, got {successes} of {total}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"wilson_interval: confidence must be in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


# -- two algorithms --
def difference(
    scores: ArrayLike,
    baseline: ArrayLike,
    statistic: str = "iqm",
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Aggregate of ``scores`` minus that of ``baseline`` on the same tasks; each one's runs are drawn on their own.

    A positive difference of ``optimality_gap`` is a worse algorithm, of all others a better one.

    Args:
        scores, baseline: normalised, ``[..., runs, tasks]``; the number of runs may differ, tasks stand in one order.
        statistic: as :func:`aggregate`.
        replicates, confidence, seed: as :func:`bootstrap_interval`, which names the errors too.
    """
    if statistic not in AGGREGATES:
        raise ValueError(f"difference: statistic: must be one of {', '.join(AGGREGATES)}, got '{statistic}'")
    of = AGGREGATES[statistic]
    return bootstrap_interval(
        lambda x, y: of(x) - of(y), scores, baseline, replicates=replicates, confidence=confidence, seed=seed
    )


def win_probability(scores: ArrayLike, baseline: ArrayLike) -> np.ndarray:
    """Mean over tasks of P(a run of ``scores`` beats one of ``baseline``) + P(they tie) / 2.

    On a task that is the Mann-Whitney U statistic divided by the number of pairs.

    Args:
        scores, baseline: ``[..., runs, tasks]``; the number of runs may differ.

    Returns:
        ``[...]`` float64 in [0, 1].

    Raises:
        ValueError: as :func:`interquartile_mean`; unequal tasks.
    """
    x, y = _scores(scores, "win_probability"), _scores(baseline, "win_probability")
    _same_tasks(x, y, "win_probability")
    wins = np.zeros(np.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    for run in range(y.shape[-2]):  # a loop over a few runs keeps the pairs' array small
        other = y[..., run, None, :]
        wins += (x > other).mean((-2, -1)) + (x == other).mean((-2, -1)) / 2
    return wins / y.shape[-2]


def probability_of_improvement(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """:func:`win_probability` with its interval; 0.5 inside the interval means that neither is shown to be better.

    Args:
        scores, baseline: ``[..., runs, tasks]``; the number of runs may differ, tasks stand in one order.
        replicates, confidence, seed: as :func:`bootstrap_interval`, which names the errors too.
    """
    return bootstrap_interval(
        win_probability, scores, baseline, replicates=replicates, confidence=confidence, seed=seed
    )


# -- curves --
def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    *,
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Share of all runs of all tasks that score above each threshold.

    Args:
        scores: normalised, ``[..., runs, tasks]``.
        thresholds: ``[points]``.
        replicates, confidence, seed: as :func:`bootstrap_interval`, which names the errors too.

    Returns:
        ``[..., points]``.

    Raises:
        ValueError: thresholds that are not a list of finite numbers.
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.ndim != 1 or not limits.size or not np.isfinite(limits).all():
        raise ValueError(f"performance_profile: thresholds: must be a list of finite numbers, got shape {limits.shape}")

    def share_above(x: np.ndarray) -> np.ndarray:
        return np.stack([(x > limit).mean((-2, -1)) for limit in limits], axis=-1)

    return bootstrap_interval(share_above, scores, replicates=replicates, confidence=confidence, seed=seed)


def area_under_curve(curve: ArrayLike, start: float | None = None, end: float | None = None) -> float:
    """Mean height of an evaluation curve between ``start`` and ``end``: the trapezoid area divided by the span.

    It is in the curve's unit, so it normalises like a score. A curve that rises earlier has more of it: it measures
    sample efficiency when ``x`` counts frames.

    Args:
        curve: ``[points, 2]`` of ``x``, rising, and value; linear between points.
        start, end: the span; default: the curve's own. Compared runs need the same span.

    Returns:
        The area over the span.

    Raises:
        ValueError: another shape, fewer than 2 points, NaN or infinity, ``x`` that does not rise, an empty span or one
            that the curve does not cover.
    """
    points = np.asarray(curve, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise ValueError(f"area_under_curve: curve: must be [points, 2] with 2 points or more, got {points.shape}")
    x, y = points.T
    if not np.isfinite(points).all() or (np.diff(x) <= 0).any():
        raise ValueError("area_under_curve: curve: must be finite with rising x, got NaN, infinity or x out of order")
    left, right = float(x[0]) if start is None else start, float(x[-1]) if end is None else end
    if not x[0] <= left < right <= x[-1]:
        raise ValueError(
            f"area_under_curve: start, end: must be a span inside the curve's [{x[0]:g}, {x[-1]:g}], "
            f"got [{left:g}, {right:g}]"
        )
    at = np.concatenate([[left], x[(x > left) & (x < right)], [right]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (right - left))
