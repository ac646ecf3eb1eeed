"""Statistics over runs and tasks: values by hand, properties of the bootstrap, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modules.assurance import intervals as iv

RANDOM = np.random.default_rng(0).random((5, 4))


def test_aggregates_by_hand():
    scores = [[0.0, 0.4], [0.2, 1.0], [0.1, 5.0], [0.3, 0.6]]  # sorted: 0 .1 | .2 .3 .4 .6 | 1 5
    assert iv.interquartile_mean(scores) == pytest.approx(0.375)
    assert iv.mean(scores) == pytest.approx(7.6 / 8)
    assert iv.median(scores) == pytest.approx((0.15 + 1.75) / 2)  # of the tasks' means
    assert iv.optimality_gap(scores) == pytest.approx(1 - (0 + 0.4 + 0.2 + 1 + 0.1 + 1 + 0.3 + 0.6) / 8)
    assert iv.optimality_gap(scores, target=0.3) == pytest.approx(0.3 - (0.3 * 5 + 0.2 + 0.1) / 8)


def test_interquartile_mean_cuts_whole_values_only():
    assert iv.interquartile_mean([[1.0], [2.0], [30.0]]) == 11.0  # three values: a quarter is less than one
    assert iv.interquartile_mean([[1.0], [2.0], [4.0], [30.0]]) == 3.0
    assert iv.interquartile_mean([[1.0], [2.0], [6.0], [4.0], [-30.0]]) == pytest.approx(7 / 3)


@pytest.mark.parametrize("statistic", sorted(iv.AGGREGATES))
def test_leading_dimensions_are_independent(statistic):
    of = iv.AGGREGATES[statistic]
    scores = np.random.default_rng(1).random((2, 3, 5, 4))
    together = of(scores)
    assert together.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert together[index] == pytest.approx(of(scores[index]))


def test_normalisation_by_hand():
    scores = iv.normalise([[1.0, -5.0], [3.0, 10.0]], low=[1.0, 0.0], high=[3.0, 5.0])
    np.testing.assert_allclose(scores, [[0, -1], [1, 2]])
    np.testing.assert_allclose(iv.normalise([[2.0, 4.0]], 2, 6), [[0, 0.5]])


def test_win_probability_by_hand():
    x, y = [[1.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
    # task 1: 1 beats 0, 3 beats all: 4 of 6; task 2: 4 ties of 6 pairs, 2 lost: 1/3
    assert iv.win_probability(x, y) == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert iv.win_probability(x, y) + iv.win_probability(y, x) == pytest.approx(1)
    assert iv.win_probability(x, x) == 0.5


def test_area_under_curve_by_hand():
    curve = [[0.0, 0.0], [10.0, 1.0], [30.0, 1.0]]
    assert iv.area_under_curve(curve) == pytest.approx((5 + 20) / 30)
    assert iv.area_under_curve(curve, 5, 20) == pytest.approx((0.75 * 5 + 10) / 15)
    assert iv.area_under_curve(curve, 2, 4) == pytest.approx(0.3)  # inside one piece


def test_profile_by_hand():
    profile = iv.performance_profile([[0.1, 0.5], [0.5, 0.9]], [0.0, 0.1, 0.5, 0.9])
    np.testing.assert_allclose(profile.estimate, [1, 0.75, 0.25, 0])  # above, not at
    assert (np.diff(profile.low) <= 0).all()
    assert (np.diff(profile.high) <= 0).all()


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    one, same, other = (iv.aggregate(RANDOM, seed=seed) for seed in (1, 1, 2))
    assert (one.low, one.high) == (same.low, same.high)
    assert (one.low, one.high) != (other.low, other.high)
    assert one.estimate == other.estimate == iv.interquartile_mean(RANDOM)
    assert one.low < one.estimate < one.high


def test_small_chunks_change_nothing_but_the_draws(monkeypatch):
    whole = iv.aggregate(RANDOM, replicates=5000)
    monkeypatch.setattr(iv, "_CHUNK", RANDOM.size * 7)
    calls = []

    def counted(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        return iv.interquartile_mean(x)

    parts = iv.bootstrap_interval(counted, RANDOM, replicates=5000)
    assert calls == [7] * 714 + [2, 1]
    assert abs(parts.low - whole.low) < 0.05 * (whole.high - whole.low)


def test_strata_are_kept():
    """Tasks on different scales: with strata, a task's mean never mixes with another's."""
    scores = np.array([[0.0, 100.0], [1.0, 101.0], [2.0, 102.0]])

    def ranges(x: np.ndarray) -> np.ndarray:
        assert x[..., 0].max() <= 2
        assert x[..., 1].min() >= 100
        return x.mean((-2, -1))

    iv.bootstrap_interval(ranges, scores, replicates=200)


def test_tasks_are_drawn_on_their_own():
    """Rows are no units: were they drawn whole, these two tasks would always cancel."""
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    interval = iv.aggregate(scores, "mean")
    assert interval.high - interval.low > 0.2


def test_points_of_a_curve_share_their_draws():
    curves = np.stack([RANDOM, RANDOM + 1, 2 * RANDOM])  # [points, runs, tasks]
    interval = iv.bootstrap_interval(iv.interquartile_mean, curves)
    for end in (interval.estimate, interval.low, interval.high):
        assert end.shape == (3,)
        np.testing.assert_allclose(end[1], end[0] + 1)
        np.testing.assert_allclose(end[2], end[0] * 2)


def test_two_algorithms_are_drawn_on_their_own():
    """The same scores twice: a paired bootstrap would have no spread at all."""
    interval = iv.difference(RANDOM, RANDOM)
    assert interval.estimate == 0
    assert interval.low < -0.05
    assert interval.high > 0.05


def test_difference_and_improvement_of_shifted_scores():
    interval = iv.difference(RANDOM + 2, RANDOM[:4])
    assert interval.estimate == pytest.approx(2 + iv.interquartile_mean(RANDOM) - iv.interquartile_mean(RANDOM[:4]))
    sure = iv.probability_of_improvement(RANDOM + 2, RANDOM[:4])
    assert (sure.estimate, sure.low, sure.high) == (1, 1, 1)
    better = iv.difference(RANDOM + 0.2, RANDOM, "optimality_gap")
    assert better.estimate < 0  # a smaller gap


def test_constant_scores_have_an_interval_of_no_width():
    interval = iv.aggregate(np.full((3, 2), 0.7))
    assert interval.low == interval.high == interval.estimate == pytest.approx(0.7)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = (iv.aggregate(RANDOM, confidence=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_intervals_cover_the_truth():
    """10 runs of 5 tasks, 400 studies: a 95 % interval of the mean covers it in 90 to 98 % (it is a little narrow)."""
    generator = np.random.default_rng(7)
    covered = 0
    for study in range(400):
        interval = iv.aggregate(generator.normal(size=(10, 5)), "mean", replicates=400, seed=study)
        covered += bool(interval.low <= 0 <= interval.high)
    assert 0.90 <= covered / 400 <= 0.98


def test_plain_values_are_json():
    assert set(json.loads(json.dumps(iv.aggregate(RANDOM).plain()))) == {"estimate", "low", "high"}
    assert isinstance(iv.aggregate(RANDOM).plain()["low"], float)
    assert len(iv.performance_profile(RANDOM, [0, 1]).plain()["high"]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iv.interquartile_mean([1.0, 2.0]), r"interquartile_mean: scores: must be \[runs, tasks\]"),
        (
            lambda: iv.mean(np.zeros((0, 2))),
            r"mean: scores: must be \[runs, tasks\] and hold values, got shape \(0, 2\)",
        ),
        (lambda: iv.median([[np.nan, 1.0]]), "median: scores: must be finite, got 1 NaN or infinite"),
        (lambda: iv.aggregate([[np.inf], [1.0]]), "bootstrap_interval: scores: must be finite"),
        (lambda: iv.aggregate([[1.0, 2.0]]), "bootstrap_interval: scores: needs at least 2 runs a task, got 1"),
        (lambda: iv.aggregate(RANDOM, "iqr"), "aggregate: statistic: must be one of iqm, mean.*got 'iqr'"),
        (lambda: iv.difference(RANDOM, RANDOM, "iqr"), "difference: statistic: must be one of"),
        (lambda: iv.difference(RANDOM, RANDOM[:, :2]), "scores: must have the same tasks, got 4 and 2"),
        (lambda: iv.win_probability(RANDOM, RANDOM[:, :2]), "win_probability: scores: must have the same tasks"),
        (lambda: iv.difference(RANDOM[None], RANDOM), "leading dimensions must agree"),
        (lambda: iv.aggregate(RANDOM, replicates=0), "replicates: must be at least 1, got 0"),
        (lambda: iv.aggregate(RANDOM, confidence=95), r"confidence: must be in \(0, 1\), got 95"),
        (lambda: iv.bootstrap_interval(iv.mean), "needs at least one algorithm's"),
        (lambda: iv.normalise([[1.0]], 1, 1), "normalise: low, high: must be finite with low < high"),
        (lambda: iv.normalise([[1.0]], np.nan, 1), "normalise: low, high: must be finite"),
        (lambda: iv.normalise([[1.0, 2.0]], [0, 0, 0], 1), r"normalise: low: must be one number or one a task \(2,\)"),
        (lambda: iv.performance_profile(RANDOM, [np.nan]), "thresholds: must be a list of finite numbers"),
        (lambda: iv.area_under_curve([[0.0, 1.0]]), r"curve: must be \[points, 2\] with 2 points or more"),
        (lambda: iv.area_under_curve([[0.0, 1.0], [0.0, 2.0]]), "must be finite with rising x"),
        (lambda: iv.area_under_curve([[0.0, 1.0], [1.0, np.nan]]), "must be finite with rising x"),
        (lambda: iv.area_under_curve([[0, 1], [1, 2]], end=2), r"inside the curve's \[0, 1\], got \[0, 2\]"),
        (lambda: iv.area_under_curve([[0, 1], [1, 2]], 0.5, 0.5), "must be a span inside"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
