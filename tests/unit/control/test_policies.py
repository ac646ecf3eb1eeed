"""Policies, their grouping by member, memory, running moments."""

from __future__ import annotations

import pytest
import torch

from modules.control.normaliser import RunningMoments
from modules.control.policy import (
    Body,
    GaussianPolicy,
    Grouping,
    MemorySettings,
    PolicySet,
    gaussian_entropy,
    gaussian_log_probability,
)


def test_log_probability_and_entropy_equal_torch_distributions():
    torch.manual_seed(0)
    mean, log_std, action = torch.randn(7, 3), torch.randn(3), torch.randn(7, 3)
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(gaussian_log_probability(action, mean, log_std), normal.log_prob(action).sum(-1))
    torch.testing.assert_close(gaussian_entropy(log_std), normal.entropy().sum(-1)[0])


@pytest.mark.parametrize("recurrent", [False, True])
def test_each_row_is_evaluated_by_its_member(recurrent):
    generator = torch.Generator().manual_seed(1)
    body = Body(5, [8, 8], 2, recurrent, 1.0)
    params = body.init(4, generator)
    features, member = torch.randn(11, 5, generator=generator), torch.tensor([3, 0, 0, 3, 1, 3, 3, 0, 1, 3, 0])
    state = torch.randn(11, body.state_size, generator=generator) if recurrent else None
    group = PolicySet(body, params)
    group.assign(member)
    outputs, after = group.step(features, state)
    for row in range(11):
        mine = {name: value[member[row]].unsqueeze(0) for name, value in params.items()}
        before = None if state is None else state[row].view(1, 1, -1)
        one, then = body.step(mine, features[row].view(1, 1, -1), before)
        torch.testing.assert_close(outputs[row], one[0, 0])
        if recurrent:
            torch.testing.assert_close(after[row], then[0, 0])


def test_grouping_is_undone():
    rows = torch.randn(9, 2)
    grouping = Grouping(torch.tensor([2, 2, 0, 2, 5, 0, 2, 2, 2]))
    assert grouping.present.tolist() == [0, 2, 5]
    assert grouping.spread(rows).shape == (3, 6, 2)
    assert torch.equal(grouping.collect(grouping.spread(rows)), rows)


def test_a_fresh_policy_has_small_means_and_the_given_deviation():
    policy = GaussianPolicy(4, [64, 64], 3, False, init_std=0.5)
    params = policy.init(2, torch.Generator().manual_seed(0))
    assert torch.allclose(params["log_std"].exp(), torch.tensor(0.5))
    outputs, _ = policy.step(params, torch.randn(2, 100, 4), None)
    assert float(outputs.abs().max()) < 0.1
    gain = params["weight_1"][0].double()  # orthogonal, of gain sqrt(2)
    torch.testing.assert_close(gain.T @ gain, 2 * torch.eye(64, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_stack_holds_the_newest_first():
    memory = MemorySettings("stack", k=2)
    assert memory.features(1, 1) == 5
    held = torch.zeros(1, 4)
    for t in (1.0, 2.0, 3.0):
        held = memory.remembered(held, torch.tensor([[t]]), torch.tensor([[-t]]))
    assert held.tolist() == [[3.0, -3.0, 2.0, -2.0]]


@pytest.mark.parametrize(("kind", "k", "message"), [("gru", 1, "none, stack or lstm"), ("stack", 0, "k must be >= 1")])
def test_memory_refuses(kind, k, message):
    with pytest.raises(ValueError, match=message):
        MemorySettings(kind, k)


def test_running_moments_equal_those_of_all_rows():
    rows = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 5 + 1e6
    moments = RunningMoments(3)
    for piece in rows.split([1, 9, 400, 590]):
        moments.merge(piece)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.std, rows.std(0, correction=0))
    again = RunningMoments(3)
    again.load_state_dict(moments.state_dict())
    assert torch.equal(again.squares, moments.squares)


def test_running_moments_sum_over_ranks():
    """Two ranks that each see half: the reduction adds what the other sent."""
    rows = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    alone, both = RunningMoments(2), RunningMoments(2)
    alone.merge(rows)
    other = rows[20:]
    packed = torch.stack([torch.full((2,), 30.0, dtype=torch.float64), other.sum(0), other.square().sum(0)]).flatten()
    both.merge(rows[:20], reduce=lambda value: value + packed)
    torch.testing.assert_close(both.mean, alone.mean)
    torch.testing.assert_close(both.squares, alone.squares)


def test_moments_before_any_row_change_nothing():
    assert torch.equal(RunningMoments(2).std, torch.ones(2, dtype=torch.float64))
