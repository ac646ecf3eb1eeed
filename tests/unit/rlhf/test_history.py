"""The bounded record of training: rows evenly spread, state that resumes, checkpoints from before it."""

from __future__ import annotations

import pytest
import torch

from modules.rlhf.history import History
from modules.rlhf.multipliers import Multipliers


@pytest.mark.parametrize(("added", "want"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (9, [0, 4, 8])])
def test_rows_are_evenly_spread_over_all_that_were_added(added, want):
    history = History(1, rows=4)
    for number in range(added):
        history.add([float(number)])
    assert history.values().flatten().tolist() == want


def test_a_long_record_covers_the_whole_run_within_its_bound():
    history = History(1, rows=8)
    for number in range(1000):
        history.add([float(number)])
    kept = history.values().flatten()
    assert 4 <= len(kept) <= 8
    assert kept[0] == 0
    assert (kept.diff() == kept.diff()[0]).all()
    assert kept[-1] + kept.diff()[0] >= 1000


def test_a_resumed_record_is_that_of_an_uninterrupted_run_also_in_half_precision():
    whole, part = History(2, rows=4), History(2, rows=4)
    for number in range(7):
        whole.add([number / 3, 1.0])
        part.add([number / 3, 1.0])
    resumed = History(2, rows=4).half()
    resumed.load_state_dict(part.state_dict())
    for number in range(7, 20):
        whole.add([number / 3, 1.0])
        resumed.add([number / 3, 1.0])
    assert resumed.kept.dtype == torch.float64
    assert torch.equal(whole.values(), resumed.values())


def test_errors_and_checkpoints_without_a_record():
    with pytest.raises(ValueError, match="rows must be even"):
        History(1, rows=3)
    with pytest.raises(ValueError, match="want 2 values a row, got 1"):
        History(2).add([1.0])
    multipliers = Multipliers(["x"], ["ge"], [0.5])
    multipliers.update(torch.tensor([0.2]))
    old = {name: value for name, value in multipliers.state_dict().items() if not name.startswith("trace.")}
    fresh = Multipliers(["x"], ["ge"], [0.5])
    fresh.load_state_dict(old)
    assert torch.equal(fresh.raw, multipliers.raw)
    assert len(fresh.recorded()[0]) == 0


def test_multipliers_record_weights_and_gaps_of_every_kind():
    multipliers = Multipliers(["a", "b", "c"], ["ge", "le", "eq"], [0.5, 0.5, 0.5])
    multipliers.update(torch.tensor([0.2, 0.6, 0.4]))
    weights, gap = multipliers.recorded()
    assert torch.equal(weights[0], multipliers.weights())
    assert gap[0].tolist() == pytest.approx([0.3, 0.1, -0.1], abs=1e-6)
    frozen = Multipliers(["a"], ["ge"], [0.0], frozen_weights=[0.3])
    frozen.update(torch.tensor([0.2]))
    assert frozen.recorded()[0].numel() == 0


def test_starting_anew_keeps_what_was_learnt_and_nothing_else():
    trained = Multipliers(["x"], ["ge"], [0.5], window=3)
    for _ in range(5):
        trained.update(torch.tensor([0.1]))
    fresh = Multipliers(["x"], ["ge"], [0.7], window=3)
    fresh.update(torch.tensor([0.9]))
    fresh.start_anew(trained.raw)
    state, own = fresh.state_dict(), Multipliers(["x"], ["ge"], [0.7], window=3).state_dict()
    assert torch.equal(state.pop("raw"), trained.raw)
    own.pop("raw")
    assert all(torch.equal(state[name], value) for name, value in own.items())
    assert fresh.thresholds.tolist() == [0.7]
