"""Tail areas and intervals against scipy, and coverage by simulation (sheet, section 6, group 4)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.assurance import distributions
from modules.assurance.figures import (
    Measure,
    Sample,
    clopper_pearson,
    column,
    drop_to_worst,
    largest_mean,
    rate_bound,
    ratio_of_means,
    worst_mean,
)

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra 'games'")
special = pytest.importorskip("scipy.special", reason="scipy comes with the extra 'games'")
MEAN = Measure("u.mean", "mean", "up", "mean")
SHARE = Measure("u.share", "share", "up", "proportion")
WORST = Measure("r.worst", "worst share", "up", "worst_proportion")
LARGEST = Measure("r.largest", "largest share", "down", "worst_proportion")
BOOT = Measure("r.low", "worst mean", "up", "bootstrap", statistic=worst_mean)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.3, 4000), st.floats(0.3, 4000), st.floats(0, 1))
def test_incomplete_beta_equals_scipy(a, b, x):
    assert distributions.incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), abs=1e-11)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3200), st.data(), st.sampled_from([0.9, 0.95, 0.999]))
def test_clopper_pearson_equals_scipy_beta_quantiles(total, data, confidence):
    successes = data.draw(st.integers(0, total))
    low, high = clopper_pearson(successes, total, confidence)
    tail = (1 - confidence) / 2
    wanted_low = scipy_stats.beta.ppf(tail, successes, total - successes + 1) if successes else 0.0
    wanted_high = scipy_stats.beta.ppf(1 - tail, successes + 1, total - successes) if successes < total else 1.0
    assert low == pytest.approx(wanted_low, abs=1e-9)
    assert high == pytest.approx(wanted_high, abs=1e-9)


def test_three_hundred_clean_episodes_certify_just_under_one_percent():
    assert rate_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-12)
    assert rate_bound(0, 300) == pytest.approx(0.00994, abs=5e-6)


@pytest.mark.parametrize("degrees", [1, 2, 7, 199, 3199])
def test_student_equals_scipy(degrees):
    assert distributions.student_quantile(0.95, degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), rel=1e-9)
    for t in (-3.0, 0.0, 1.7, 12.0):
        assert distributions.student_tail(t, degrees) == pytest.approx(scipy_stats.t.sf(t, degrees), rel=1e-8)


def test_p_values_equal_scipy_tests():
    values = np.random.default_rng(0).normal(0.2, 1.0, size=60)
    wanted = scipy_stats.ttest_1samp(values, 0.0).pvalue
    assert Sample(MEAN, column(values)).p_value(0.0, above=True) == pytest.approx(wanted, rel=1e-8)
    hits = column([1.0] * 37 + [0.0] * 13)
    one_sided = scipy_stats.binomtest(37, 50, 0.6, alternative="greater").pvalue
    assert Sample(SHARE, hits).p_value(0.6, above=True) == pytest.approx(2 * one_sided, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(0, 2**31), st.floats(0.02, 0.98), st.booleans(), st.integers(1, 4))
def test_interval_and_p_value_invert_each_other(units, seed, tau, above, conditions):
    values = (np.random.default_rng(seed).random((units, conditions)) < 0.7).astype(float)
    samples = [Sample(WORST, values), Sample(LARGEST, values), Sample(MEAN, values[:, :1] + 0.1)]
    for sample in samples:
        low, high = sample.interval(0.95)
        beyond = low >= tau if above else high <= tau
        if min(abs(low - tau), abs(high - tau)) > 1e-9:  # else rounding decides
            assert (sample.p_value(tau, above) <= 0.05) == beyond


@pytest.mark.parametrize(
    ("measure", "draw", "truth"),
    [
        (MEAN, lambda g: column(g.normal(1.0, 2.0, 30)), 1.0),
        (SHARE, lambda g: column(g.random(40) < 0.8), 0.8),
        (BOOT, lambda g: g.normal([0.0, 3.0], 1.0, (80, 2)), 0.0),
    ],
    ids=["mean", "proportion", "bootstrap"],
)
def test_intervals_cover_the_truth_as_often_as_they_say(measure, draw, truth):
    generator = np.random.default_rng(5)
    suites = 400 if measure is BOOT else 2000
    inside = 0
    for _ in range(suites):
        low, high = Sample(measure, draw(generator).astype(float)).interval(0.95)
        inside += low <= truth <= high
    # exact intervals of proportions cover more than they must
    least, most = (0.93, 0.97) if measure is not SHARE else (0.93, 1.0)
    assert least <= inside / suites <= most


def test_bootstrap_of_constant_values_has_no_width():
    sample = Sample(BOOT, np.tile([0.5, 0.75], (20, 1)))
    assert sample.interval() == (0.5, 0.5)
    assert sample.se == 0.0


def test_worst_case_is_the_minimum_of_means_not_the_mean_of_minima():
    values = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert worst_mean(values) == 0.5
    assert largest_mean(values) == 0.5
    assert drop_to_worst(np.array([[1.0, 0.5, 0.25], [1.0, 0.7, 0.35]])) == pytest.approx(0.7)
    assert np.isnan(ratio_of_means(np.array([[1.0, 0.0], [2.0, 0.0]])))


def test_worst_proportion_pays_for_looking_at_several_conditions():
    hits = np.ones((100, 1))
    alone = Sample(WORST, hits).interval()[0]
    among_four = Sample(WORST, np.tile(hits, (1, 4))).interval()[0]
    assert alone == pytest.approx(clopper_pearson(100, 100, 0.95)[0])
    assert among_four == pytest.approx(clopper_pearson(100, 100, 1 - 0.05 / 4)[0])
    assert among_four < alone
