"""Welfare measures against closed forms, plain definitions and, where installed, fairlearn."""

from __future__ import annotations

import numpy as np
import pytest

from modules.assurance.measures import welfare

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_equal_shares_and_one_owner(count):
    equal, owner = np.full(count, 3.0), np.eye(count)[count - 1] * 5
    shares = np.stack([equal, owner])
    np.testing.assert_allclose(welfare.gini(shares), [0.0, 1 - 1 / count], atol=1e-15)
    np.testing.assert_allclose(welfare.jain(shares), [1.0, 1 / count], atol=1e-15)
    np.testing.assert_array_equal(welfare.min_max_ratio(shares), [1.0, 0.0])
    np.testing.assert_array_equal(welfare.envy(welfare.common_valuations(shares)), [0.0, 5.0])
    assert welfare.gini([0, 0, 0, 1]) == 0.75


def test_gini_of_a_line_is_its_closed_form():
    """Shares 1, 2, ..., n have Gini (n - 1) / (3 n)."""
    for count in (2, 5, 100):
        assert welfare.gini(np.arange(1, count + 1)) == pytest.approx((count - 1) / (3 * count))


def test_random_shares_equal_the_definitions_by_pairs():
    shares = RNG.exponential(size=(50, 5))
    pairs = np.abs(shares[:, :, None] - shares[:, None, :]).sum((1, 2))
    np.testing.assert_allclose(welfare.gini(shares), pairs / (2 * 25 * shares.mean(1)), rtol=1e-12)
    moments = 1 / (1 + shares.var(1) / shares.mean(1) ** 2)  # Jain's index by the coefficient of variation
    np.testing.assert_allclose(welfare.jain(shares), moments, rtol=1e-12)
    valuations = RNG.normal(size=(50, 4, 4))
    expected = [max(max(v[i, j] - v[i, i] for j in range(4)) for i in range(4)) for v in valuations]
    np.testing.assert_allclose(welfare.envy(valuations), expected, rtol=1e-12)


def test_an_envy_free_split_among_different_tastes_has_envy_zero():
    """Each prefers its own unequal piece: equality is not needed."""
    assert welfare.envy([[6, 5, 1], [0, 2, 2], [3, 4, 9]]) == 0.0
    assert welfare.envy([[6, 5, 1], [0, 2, 2.5], [3, 4, 9]]) == 0.5


def test_price_of_fairness():
    """Bertsimas et al. 2011: rows of optimal and fair welfare."""
    np.testing.assert_allclose(welfare.price_of_fairness([10.0, 10.0, 4.0], [8.0, 10.0, 1.0]), [0.2, 0.0, 0.75])


def test_group_differences_equal_counts_by_hand():
    group = np.array(list("aabbbcc"))
    truth = np.array([1, 0, 1, 1, 0, 1, 0])
    chosen = np.array([1, 0, 1, 0, 1, 0, 0])
    assert welfare.demographic_parity_difference(chosen, group) == pytest.approx(2 / 3)  # 1/2, 2/3, 0
    # true-positive rates 1, 1/2, 0; false-positive rates 0, 1, 0
    assert welfare.equalised_odds_difference(truth, chosen, group) == 1.0
    assert welfare.equalised_odds_difference(truth, truth, group) == 0.0


def test_group_differences_equal_fairlearn():
    metrics = pytest.importorskip("fairlearn.metrics", reason="fairlearn is an optional oracle")
    for _ in range(20):
        group = RNG.integers(3, size=200)
        truth, chosen = RNG.integers(2, size=(2, 200))
        assert welfare.demographic_parity_difference(chosen, group) == pytest.approx(
            metrics.demographic_parity_difference(truth, chosen, sensitive_features=group), abs=1e-12
        )
        assert welfare.equalised_odds_difference(truth, chosen, group) == pytest.approx(
            metrics.equalized_odds_difference(truth, chosen, sensitive_features=group), abs=1e-12
        )


def test_collusion_gain_in_the_prisoners_dilemma_is_the_gap_to_its_equilibrium():
    """Two seats that play as one cooperate (3 each); each for itself, they defect (1 each)."""
    np.testing.assert_array_equal(welfare.collusion_gain([[3, 3], [5, 0]], [[1, 1], [1, 1]]), [4.0, 3.0])
