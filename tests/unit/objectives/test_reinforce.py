"""REINFORCE's pieces; the t-test against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from modules.objectives.reinforce import (
    exponential_baseline,
    paired_t_test,
    reinforce_loss,
    shared_baseline,
    standardised,
    warmup_mix,
)


@pytest.mark.parametrize("count", [2, 3, 10, 500, 10_000])
@pytest.mark.parametrize("shift", [-1.0, -0.02, 0.0, 0.02, 1.0])
def test_paired_t_test_equals_scipy(count, shift):
    rng = np.random.default_rng(count)
    candidate, baseline = rng.normal(shift, 1.0, count), rng.normal(0.0, 0.5, count)
    difference = candidate - baseline
    ours = paired_t_test(float(difference.sum()), float((difference**2).sum()), count)
    theirs = stats.ttest_rel(candidate, baseline, alternative="less").pvalue
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-300)


def test_paired_t_test_of_equal_differences():
    assert paired_t_test(0.0, 0.0, 5) == 0.5
    assert paired_t_test(-5.0, 5.0, 5) == 0.0
    assert paired_t_test(5.0, 5.0, 5) == 1.0
    with pytest.raises(ValueError, match="count must be >= 2, got 1"):
        paired_t_test(1.0, 1.0, 1)
    with pytest.raises(ValueError, match="must be finite, got nan and 1"):
        paired_t_test(float("nan"), 1.0, 3)


def test_shared_baseline_leaves_advantages_that_add_up_to_zero_and_refuses_one_rollout():
    cost = torch.rand(4, 7, dtype=torch.float64)
    assert float((cost - shared_baseline(cost)).sum(1).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="P >= 2 rollouts"):
        shared_baseline(cost[:, :1])


def test_loss_has_the_score_functions_gradient():
    cost = torch.tensor([[1.0, 3.0]], requires_grad=True)
    likelihood = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    loss = reinforce_loss(cost, likelihood, torch.tensor([[2.0]]))
    loss.backward()
    assert loss.item() == pytest.approx((-1 * -0.5 + 1 * -2.0) / 2)
    assert likelihood.grad is not None
    assert likelihood.grad.tolist() == [[-0.5, 0.5]]
    assert cost.grad is None
    with pytest.raises(ValueError, match="one shape"):
        reinforce_loss(cost, likelihood[0], torch.zeros(()))


def test_moving_mean_and_warm_up():
    assert float(exponential_baseline(torch.tensor(2.0), torch.tensor(4.0), 0.75)) == 2.5
    assert [warmup_mix(epoch, 2) for epoch in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert warmup_mix(0, 0) == 1.0
    assert standardised(torch.tensor([1.0, 3.0]), torch.tensor(2.0), torch.tensor(0.0), floor=0.5).tolist() == [-2, 2]
