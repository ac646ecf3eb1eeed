"""Our statistics against rliable 1.2.0 (Agarwal et al. 2021), scipy, and enumerated bootstrap distributions.

rliable's answers stand in ``rliable.json``, written by ``record_rliable.py``: it does not fit into our environment.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from modules.assurance import intervals as iv

RLIABLE = json.loads(Path(__file__).with_name("rliable.json").read_text(encoding="utf-8"))
CASES = sorted(RLIABLE["cases"])
REPLICATES = RLIABLE["replicates"]


def _agree(ours: iv.Interval, theirs: dict[str, list[float]], atom: float = 0.0) -> None:
    """Estimates equal up to rounding, interval ends up to the noise of two bootstraps.

    With 20,000 replicates an end has a standard deviation of about 0.5 % of the interval's width; ``atom`` is the step
    between values that the statistic can take at all.
    """
    np.testing.assert_allclose(np.ravel(ours.estimate), theirs["estimate"], rtol=1e-12, atol=1e-12)
    width = np.array(theirs["high"]) - np.array(theirs["low"])
    assert (width > 0).all()
    for end in ("low", "high"):
        error = np.abs(np.ravel(getattr(ours, end)) - theirs[end])
        assert (error <= 0.03 * width + 1.001 * atom).all(), (end, error / width)


@pytest.mark.parametrize("statistic", sorted(iv.AGGREGATES))
@pytest.mark.parametrize("case", CASES)
def test_aggregates_equal_rliable(case, statistic):
    one = RLIABLE["cases"][case]
    ours = iv.aggregate(one["x"], statistic, replicates=REPLICATES, seed=1)
    atom = 0.1 / np.size(one["x"]) * 2 if case == "ties" else 0.0
    _agree(ours, one["aggregates"][statistic], atom)


@pytest.mark.parametrize("case", CASES)
def test_difference_of_iqms_equals_rliable(case):
    one = RLIABLE["cases"][case]
    ours = iv.difference(one["x"], one["y"], "iqm", replicates=REPLICATES, seed=1)
    _agree(ours, one["iqm_difference"], 0.2 / np.size(one["x"]) * 2 if case == "ties" else 0.0)


@pytest.mark.parametrize("case", CASES)
def test_probability_of_improvement_equals_rliable(case):
    one = RLIABLE["cases"][case]
    ours = iv.probability_of_improvement(one["x"], one["y"], replicates=REPLICATES, seed=1)
    pairs = len(one["x"]) * np.size(one["y"])
    _agree(ours, one["probability_of_improvement"], 1 / pairs)


@pytest.mark.parametrize("case", CASES)
def test_performance_profile_equals_rliable(case):
    one = RLIABLE["cases"][case]
    ours = iv.performance_profile(one["x"], RLIABLE["taus"], replicates=REPLICATES, seed=1)
    _agree(ours, one["profile"], 1 / np.size(one["x"]))


@pytest.mark.parametrize(("runs", "tasks"), [(1, 1), (1, 3), (2, 2), (3, 1), (5, 7), (10, 21)])
def test_interquartile_mean_equals_scipy_trim_mean(runs, tasks):
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=(runs, tasks))
        expected = scipy.stats.trim_mean(scores, 0.25, axis=None)
        np.testing.assert_allclose(iv.interquartile_mean(scores), expected, rtol=1e-12, atol=1e-15)


def test_win_probability_equals_mann_whitney():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        x, y = generator.integers(0, 5, (6, 4)), generator.integers(0, 5, (9, 4))
        u = [scipy.stats.mannwhitneyu(x[:, task], y[:, task]).statistic for task in range(4)]
        np.testing.assert_allclose(iv.win_probability(x, y), np.mean(u) / 54, rtol=1e-12)


def test_area_under_curve_equals_scipy_trapezoid():
    x = np.sort(np.random.default_rng(0).random(30))
    y = np.random.default_rng(1).random(30)
    expected = scipy.integrate.trapezoid(y, x) / (x[-1] - x[0])
    np.testing.assert_allclose(iv.area_under_curve(np.stack([x, y], 1)), expected, rtol=1e-12)


def _stratified_resamples(scores: np.ndarray) -> np.ndarray:
    """All equally likely stratified resamples of scores ``[runs, tasks]``."""
    runs, tasks = scores.shape
    draws = list(itertools.product(range(runs), repeat=runs))
    return np.array(
        [
            np.stack([scores[list(draw), task] for task, draw in enumerate(each)], axis=1)
            for each in itertools.product(draws, repeat=tasks)
        ]
    )


@pytest.mark.parametrize("statistic", sorted(iv.AGGREGATES))
def test_replicates_follow_the_enumerated_bootstrap_distribution(statistic):
    """3 runs of 2 tasks: 27 x 27 equally likely resamples. Kolmogorov distance of 20,000 replicates: 0.0115 at 1 %."""
    scores = np.array([[0.1, 0.9], [0.35, 0.2], [0.8, 1.3]])
    exact = np.sort(iv.AGGREGATES[statistic](_stratified_resamples(scores)))
    seen: list[np.ndarray] = []

    def recorded(x: np.ndarray) -> np.ndarray:
        seen.append(iv.AGGREGATES[statistic](x))
        return seen[-1]

    iv.bootstrap_interval(recorded, scores, replicates=20_000, seed=3)
    drawn = np.sort(np.concatenate(seen[:-1]))  # the last call is the estimate's
    assert len(drawn) == 20_000
    at = np.unique(np.round(exact, 9)) + 1e-7  # between the values, as sums round differently
    distance = np.searchsorted(exact, at) / len(exact) - np.searchsorted(drawn, at) / len(drawn)
    assert np.abs(distance).max() < 0.0115


def test_one_task_interval_of_the_mean_equals_scipy_bootstrap():
    x = np.random.default_rng(5).normal(size=12)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = iv.aggregate(x[:, None], "mean", replicates=40_000)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.02 * width
    assert abs(ours.high - theirs.high) < 0.02 * width
