"""Calibration error, Brier score, rank correlation: values by hand and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modules.assurance.measures.calibration import average_ranks, brier_score, expected_calibration_error, spearman


def test_calibration_error_by_hand():
    confidence, correct = [0.1, 0.2, 0.6, 0.9], [0, 1, 0, 1]
    # two bins of width 1/2: |1 - 0.3| / 4 + |1 - 1.5| / 4
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(1.2 / 4)
    # one bin: |2 - 1.8| / 4; four bins of one sample each: (.1 + .8 + .6 + .1) / 4
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.2 / 4)
    assert expected_calibration_error(confidence, correct, bins=4, binning="mass") == pytest.approx(1.6 / 4)


def test_edges_belong_to_the_lower_bin_and_ends_to_a_bin():
    assert expected_calibration_error([0.5, 0.6], [1, 0], bins=2) == pytest.approx((0.5 + 0.6) / 2)
    assert expected_calibration_error([0.0, 1.0], [0, 1], bins=10) == 0.0
    assert expected_calibration_error(np.float32([1.0000001]), [1]) == 0.0  # a softmax's rounding


def test_mass_bins_hold_equal_numbers_and_keep_ties_together():
    p = np.linspace(0.9, 0.99, 100)  # one bin of width 1/10 holds them all
    right = (np.arange(100) < 50).astype(int)  # the less sure half is right
    by_width = expected_calibration_error(p, right, bins=10)
    by_mass = expected_calibration_error(p, right, bins=2, binning="mass")
    assert by_width == pytest.approx(abs((right - p).mean()), abs=0.02)
    assert by_mass == pytest.approx((abs(1 - p[:50].mean()) + p[50:].mean()) / 2)
    tied = np.array([0.7] * 9 + [0.9])
    hits = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    values = {
        expected_calibration_error(tied, np.roll(hits[:9], k).tolist() + [1], bins=5, binning="mass") for k in (0, 4)
    }
    assert len(values) == 1  # the order of samples says nothing
    assert values.pop() == pytest.approx((9 * abs(6 / 9 - 0.7) + 0.1) / 10)


def test_calibrated_forecasts_have_little_error():
    generator = np.random.default_rng(0)
    p = generator.random(20_000)
    for binning in ("width", "mass"):
        assert expected_calibration_error(p, generator.random(20_000) < p, binning=binning) < 0.015
        assert expected_calibration_error(p, generator.random(20_000) < p**2, binning=binning) > 0.15


def test_brier_by_hand():
    assert brier_score([0.8, 0.3], [1, 0]) == pytest.approx((0.04 + 0.09) / 2)
    assert brier_score([[0.2, 0.8], [0.7, 0.3]], [1, 0]) == pytest.approx(0.04 + 0.09)  # twice as much
    assert brier_score([[0.2, 0.5, 0.3]], [2]) == pytest.approx(0.04 + 0.25 + 0.49)
    assert brier_score([1.0, 0.0], [True, False]) == 0.0


def test_ranks_and_correlation_by_hand():
    assert average_ranks([30, 10, 20, 10]).tolist() == [4.0, 1.5, 3.0, 1.5]
    assert spearman([1, 2, 3], [10, 100, 1000]) == 1.0
    assert spearman([1, 2, 3], [3.0, 2.0, -1e9]) == -1.0
    assert spearman([1, 1, 2, 3], [2, 1, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 2, 3, 4], [1, -1, -1, 1]) == 0.0


def test_a_constant_has_no_correlation():
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1, 2, 3], [0.1, 0.1, 0.1]))
    assert math.isnan(spearman([1], [2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([], []), "confidence: must be"),
        (lambda: expected_calibration_error([0.5], [1, 0]), "one value of each a sample"),
        (lambda: expected_calibration_error([1.5], [1]), r"confidence: must be in \[0, 1\]"),
        (lambda: expected_calibration_error([math.nan], [1]), "confidence: must be finite"),
        (lambda: expected_calibration_error([0.5], [0.5]), "correct: must be 0 or 1"),
        (lambda: expected_calibration_error([0.5], [1], bins=0), "bins: must be at least 1"),
        (lambda: expected_calibration_error([0.5], [1], binning="area"), "binning: must be"),  # pyright: ignore
        (lambda: brier_score([[0.5, 0.4]], [1]), "rows must sum to 1"),
        (lambda: brier_score([[0.5, 0.5]], [2]), "integers from 0 to 1"),
        (lambda: brier_score([0.5], [0.5]), "integers from 0 to 1"),
        (lambda: brier_score(np.zeros((1, 1, 1)), [0]), r"\[N\] or \[N, K\]"),
        (lambda: brier_score([], []), "must be"),
        (lambda: spearman([1.0, math.nan], [1.0, 2.0]), "first: must be finite"),
        (lambda: spearman([1.0, 2.0], [1.0]), "one value of each a sample"),
        (lambda: spearman([], []), "first: must be"),
        (lambda: average_ranks([[1.0]]), "values: must be"),
    ],
)
def test_refusals_name_the_culprit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
