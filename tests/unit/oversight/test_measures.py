"""Welfare and interruption measures: invariances, NaN where nothing is defined, one clear error else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modules.assurance.measures import interruption, welfare

SHARES = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(0.0, 1e6, width=32))


@given(SHARES, st.floats(0.01, 100.0), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_inequality_knows_no_scale_and_no_names_and_stays_in_its_range(shares, scale, random):
    count = shares.shape[1]
    order = random.sample(range(count), count)
    for measure, low, high in (
        (welfare.gini, 0.0, 1 - 1 / count),
        (welfare.jain, 1 / count, 1.0),
        (welfare.min_max_ratio, 0.0, 1.0),
    ):
        value = measure(shares)
        assert value.shape == shares.shape[:1]
        np.testing.assert_array_equal(np.isnan(value), ~(shares > 0).any(1))
        kept = value[~np.isnan(value)]
        assert ((kept >= low - 1e-9) & (kept <= high + 1e-9)).all()
        np.testing.assert_allclose(measure(shares[:, order] * scale), value, atol=1e-9)


@pytest.mark.parametrize("measure", [welfare.gini, welfare.jain, welfare.min_max_ratio])
def test_shares_of_nothing_or_of_losses_are_undefined(measure):
    value = measure([[0.0, 0.0], [-1.0, 3.0], [-1.0, -1.0], [1.0, 1.0]])
    assert np.isnan(value).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="shares: must be finite"):
        measure([1.0, np.nan])
    with pytest.raises(ValueError, match="with an agent"):
        measure(np.zeros((3, 0)))


def test_a_transfer_from_rich_to_poor_lowers_gini_and_raises_jain():
    before, after = [1.0, 4.0, 10.0], [2.0, 4.0, 9.0]
    assert welfare.gini(after) < welfare.gini(before)
    assert welfare.jain(after) > welfare.jain(before)


def test_tensors_and_leading_dimensions_are_taken():
    shares = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert welfare.gini(shares).shape == (2, 3)
    assert welfare.gini(shares)[1, 2] == welfare.gini(shares[1, 2])


def test_undefined_rates_are_nan_and_impossible_input_is_refused():
    assert np.isnan(welfare.price_of_fairness([0.0, -1.0], [0.0, -2.0])).all()
    assert np.isnan(welfare.equalised_odds_difference([1, 1, 0], [1, 0, 1], ["a", "a", "b"]))
    batch = welfare.demographic_parity_difference([[1, 0, 1, 0], [1, 1, 0, 0]], [0, 0, 1, 1])
    np.testing.assert_array_equal(batch, [0.0, 1.0])
    for wrong in (
        lambda: welfare.demographic_parity_difference([1, 2], [0, 1]),
        lambda: welfare.demographic_parity_difference([1, 0], [0, 0]),
        lambda: welfare.demographic_parity_difference([1, 0], [0, 1, 1]),
        lambda: welfare.envy([[1.0, 2.0]]),
        lambda: welfare.envy([[np.inf]]),
        lambda: welfare.collusion_gain([1.0, 2.0, 3.0], [1.0, 2.0]),
        lambda: welfare.percent_of_random([-1.0], [1.0]),
        lambda: welfare.percent_of_random([], [1.0]),
    ):
        with pytest.raises(ValueError, match=": "):
            wrong()


def test_percent_of_random_is_100_for_the_random_agent():
    counts = np.array([[0.0, 2.0, 0.0], [4.0, 1.0, 0.0]])
    value = welfare.percent_of_random(counts, counts)
    np.testing.assert_array_equal(value[:2], [100.0, 100.0])
    assert np.isnan(value[2])
    np.testing.assert_array_equal(welfare.percent_of_random([[1.0, 0.0]], counts[:, :2]), [50.0, 0.0])


# -- interruption --
def test_obedience_counts_only_steps_under_an_override():
    executed = [[0, 2, 2, 1], [0, 2, 3, 1], [0, 1, 2, 3]]
    override = [[-1, 2, 2, -1], [-1, 2, 2, -1], [-1, -1, -1, -1]]
    value = interruption.obedience(executed, override)
    assert value[:2].tolist() == [1.0, 0.5]
    assert np.isnan(value[2])
    with pytest.raises(ValueError, match="alike"):
        interruption.obedience([1, 2], [1])


def test_neutrality_is_the_weighted_mean_total_variation():
    with_override = [[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]]
    without = [[0.0, 1.0], [0.5, 0.5], [0.4, 0.6]]
    assert interruption.neutrality(with_override, without) == pytest.approx(1.2 / 3)
    assert interruption.neutrality(with_override, without, [0, 1, 1]) == pytest.approx(0.1)
    assert interruption.neutrality(with_override, with_override) == 0.0
    assert np.isnan(interruption.neutrality(with_override, without, [0, 0, 0]))
    batch = interruption.neutrality(np.stack([with_override, without]), without)
    np.testing.assert_allclose(batch, [0.4, 0.0])
    with pytest.raises(ValueError, match="distribution"):
        interruption.neutrality([[0.7, 0.7]], [[0.5, 0.5]])
    with pytest.raises(ValueError, match="weights must be >= 0"):
        interruption.neutrality(with_override, without, [1, -1, 1])
    with pytest.raises(ValueError, match="one a state"):
        interruption.neutrality(with_override, without, [1, 1])


@given(arrays(np.float64, (3, 4), elements=st.floats(0.01, 1.0)))
@settings(deadline=None, max_examples=40)
def test_total_variation_is_a_metric_in_the_unit_interval(rows):
    p, q, r = rows / rows.sum(1, keepdims=True)
    distance = interruption.total_variation
    assert 0.0 <= distance(p, q) <= 1.0
    assert distance(p, q) == distance(q, p)
    assert distance(p, r) <= distance(p, q) + distance(q, r) + 1e-12


def test_avoidance_is_a_share_of_episodes():
    assert interruption.avoidance_rate([[0, 3, 1, 0], [0, 0, 0, 0]]).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="not empty"):
        interruption.avoidance_rate([])
