"""The staircase's decisions on scripted gaps, and the scales' weights."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules.asp.staircase import Staircase, shares


def trace(staircase, script):
    """(scales, phase) after each of the mean gaps of ``script``, all scales alike."""
    seen = []
    for gap in script:
        staircase.observe(dict.fromkeys(staircase.scales, gap))
        seen.append((staircase.scales[-1], staircase.phase, staircase.finished))
    return seen


def test_below_the_threshold_the_next_scale_is_explored():
    assert trace(Staircase(20, 20, 60, 0.5, 5), [0.4, 0.3, 0.49, 0.2]) == [
        (40, "explore", False),
        (60, "explore", False),
        (60, "adapt", True),
        (60, "adapt", True),
    ]


def test_above_the_threshold_it_adapts_until_below():
    assert trace(Staircase(20, 20, 40, 0.5, 5), [3.0, 2.0, 1.0, 0.4, 0.6, 0.5, 0.1]) == [
        (20, "adapt", False),
        (20, "adapt", False),
        (20, "adapt", False),
        (40, "explore", False),
        (40, "adapt", False),
        (40, "adapt", False),  # 0.5 is not below 0.5
        (40, "adapt", True),
    ]


def test_patience_counts_adaptions_since_the_best_and_more_than_patience_opens():
    # explored at 1.0; 1.1, 1.2 count 1, 2; 0.9 resets; 1.0, 1.0, 1.0 count to 3 > 2
    assert trace(Staircase(20, 20, 40, 0.5, 2), [1.0, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0]) == [(20, "adapt", False)] * 6 + [
        (40, "explore", False)
    ]
    equal = trace(Staircase(20, 20, 40, 0.5, 0), [1.0, 1.0, 1.0, 1.01])  # an equal gap is a new best
    assert [scale for scale, _, _ in equal] == [20, 20, 20, 40]


def test_patience_does_not_close_the_last_scale():
    last = trace(Staircase(20, 20, 20, 0.5, 1), [1.0, 2.0, 2.0, 2.0, 2.0])
    assert last == [(20, "adapt", False)] * 5


def test_patience_ends_the_run_where_no_whole_step_is_left():
    assert trace(Staircase(20, 30, 60, 0.5, 0), [0.1, 1.0, 2.0])[-1] == (50, "adapt", True)


def ready(gaps, history=None, threshold=1.0):
    staircase = Staircase(10, 10, 10 * len(gaps), threshold, 3)
    staircase.scales = [10 * (index + 1) for index in range(len(gaps))]
    staircase.history = {
        scale: list(history[index] if history else [gap])
        for index, (scale, gap) in enumerate(zip(staircase.scales, gaps, strict=True))
    }
    return staircase


def test_gaps_below_the_threshold_and_equal_spread_give_equal_weights():
    weights = ready([0.5, 0.2, 0.9]).weights()
    assert weights == pytest.approx({10: 1 / 3, 20: 1 / 3, 30: 1 / 3})


def test_one_scale_above_the_threshold_gets_half_and_its_share():
    history = [[3.0, 2.0], [0.0, 1.0], [1.5, 0.5]]  # equal spread
    weights = ready([2.0, 1.0, 0.5], history).weights()
    assert weights == pytest.approx({10: (1 + 1 / 3) / 2, 20: 1 / 6, 30: 1 / 6})


def test_ablations():
    history = [[2.0, 2.0], [1.0, 3.0]]  # gaps 2 and 3 above 1; only the second varies
    staircase = ready([2.0, 3.0], history)
    assert staircase.weights() == pytest.approx({10: (1 / 3 + 0) / 2, 20: (2 / 3 + 1) / 2})
    assert staircase.weights(use_std=False) == pytest.approx({10: 1 / 3, 20: 2 / 3})
    assert staircase.weights(use_gap=False) == pytest.approx({10: 0.0, 20: 1.0})
    assert staircase.weights(use_gap=False, use_std=False) == pytest.approx({10: 0.5, 20: 0.5})
    assert ready([0.5, 0.5]).weights(use_std=False) == pytest.approx({10: 0.5, 20: 0.5})


@given(
    st.lists(st.lists(st.floats(-5, 1e6), min_size=0, max_size=12), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_weights_add_up_to_one(history, use_gap, use_std):
    staircase = ready([0.0] * len(history), history)
    weights = staircase.weights(use_gap, use_std)
    assert math.fsum(weights.values()) == pytest.approx(1.0)
    assert all(weight >= 0 for weight in weights.values())
    counts = shares(weights, 17)
    assert sum(counts.values()) == 17
    assert all(abs(counts[scale] - 17 * weights[scale]) < 1 + 1e-9 for scale in counts)


def test_shares_are_whole_and_refuse_what_does_not_add_up():
    assert shares({10: 0.5, 20: 0.25, 30: 0.25}, 5) == {10: 3, 20: 1, 30: 1}  # 2.5, 1.25, 1.25: the largest remainder
    assert shares({10: 1 / 3, 20: 1 / 3, 30: 1 / 3}, 4) == {10: 2, 20: 1, 30: 1}  # a tie goes to the earlier
    assert shares({10: 0.0, 20: 1.0}, 3) == {10: 0, 20: 3}
    assert shares({10: 1.0}, 0) == {10: 0}
    for weights in ({10: 0.5, 20: 0.6}, {10: -0.5, 20: 1.5}, {10: math.nan, 20: 1.0}, {}):
        with pytest.raises(ValueError, match="must be >= 0 and add up to 1"):
            shares(weights, 4)
    with pytest.raises(ValueError, match="batches must be >= 0, got -1"):
        shares({10: 1.0}, -1)


def test_history_keeps_the_last_ten_gaps():
    staircase = Staircase(20, 20, 20, 0.5, 5)
    trace(staircase, [float(gap) for gap in range(1, 14)])
    assert staircase.history == {20: [float(gap) for gap in range(4, 14)]}


def test_state_round_trip_goes_on_alike():
    script = [3.0, 2.0, 0.4, 1.0, 0.3]
    whole = Staircase(20, 20, 60, 0.5, 5)
    expected = trace(whole, script)
    first, second = Staircase(20, 20, 60, 0.5, 5), Staircase(20, 20, 60, 0.5, 5)
    begun = trace(first, script[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert begun + trace(second, script[3:]) == expected
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="the config has"):
        Staircase(20, 20, 80, 0.5, 5).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((20, 0, 40, 0.5, 5), "step must be >= 1, got 0"),
        ((20, 20, 10, 0.5, 5), r"end must be >= start \(20\), got 10"),
        ((20, 20, 40, 0.0, 5), "threshold must be > 0, got 0"),
        ((20, 20, 40, 0.5, -1), "patience must be >= 0, got -1"),
        ((1, 20, 40, 0.5, 1), "start must be >= 2, got 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Staircase(*settings)


def test_gaps_are_checked():
    staircase = Staircase(20, 20, 40, 0.5, 5)
    with pytest.raises(ValueError, match=r"must be of the scales \[20\], got \[20, 40\]"):
        staircase.observe({20: 1.0, 40: 1.0})
    with pytest.raises(ValueError, match="the gap of scale 20 must be finite, got nan"):
        staircase.observe({20: math.nan})
