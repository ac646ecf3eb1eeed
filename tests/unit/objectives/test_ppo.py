from __future__ import annotations

import math

import pytest
import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate

from modules.objectives.advantage import discounted_returns, gae, reverse_scan, standardise
from modules.objectives.ppo import (
    approximate_kl,
    clipped_surrogate,
    entropy,
    masked_log_softmax,
    minibatch_of,
    ppo_loss,
    value_loss,
    weighted_mean,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- advantages ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16])
def test_reverse_scan_equals_the_loop(steps):
    addend, factor = _random(3, steps, 2), _random(3, steps, 2, seed=1)
    expected, x = torch.empty_like(addend), torch.zeros(3, 2, dtype=torch.float64)
    for t in reversed(range(steps)):
        x = addend[:, t] + factor[:, t] * x
        expected[:, t] = x
    torch.testing.assert_close(reverse_scan(addend, factor, 1), expected)
    torch.testing.assert_close(reverse_scan(addend.movedim(1, -1), factor.movedim(1, -1), -1), expected.movedim(1, -1))


@pytest.mark.parametrize("lambda_", [0.0, 0.9, 1.0])
def test_gae_equals_torchrl(lambda_):
    reward, value, next_value = (_random(4, 20, 1, seed=seed) for seed in range(3))
    done = _random(4, 20, 1, seed=3) > 1
    terminated = done & (_random(4, 20, 1, seed=4) > 0)
    assert (done & ~terminated).any()
    assert terminated.any()
    advantage, target = gae(reward, value, next_value, terminated, done, 0.97, lambda_)
    expected = generalized_advantage_estimate(0.97, lambda_, value, next_value, reward, done, terminated)
    # torchrl multiplies the discount with a mask in single precision
    torch.testing.assert_close(advantage, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, expected[1], rtol=1e-5, atol=1e-5)


def test_truncation_bootstraps_and_termination_does_not():
    reward, value = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    next_value, done = torch.tensor([[0.0, 10.0]]), torch.tensor([[False, True]])
    cut = gae(reward, value, next_value, torch.zeros_like(done), done, 0.5, 1.0)[1]
    ended = gae(reward, value, next_value, done, done, 0.5, 1.0)[1]
    assert cut.tolist() == [[1 + 0.5 * 6, 6.0]]
    assert ended.tolist() == [[1.5, 1.0]]


def test_discounted_returns_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    done = torch.tensor([[False, True, False, False]])
    assert discounted_returns(reward, done, 0.5).tolist() == [[2.0, 2.0, 5.0, 4.0]]
    bootstrap = torch.tensor([[7.0, 10.0, 7.0, 20.0]])  # read at the cut and at the window's end only
    assert discounted_returns(reward, done, 0.5, bootstrap).tolist() == [[4.5, 7.0, 10.0, 14.0]]


def test_standardise_ignores_padding_and_joins_ranks():
    advantage, weights = 100 + _random(2, 10), torch.ones(2, 10)
    weights[0, 7:] = 0
    advantage[0, 7:] = 1e6
    whole = standardise(advantage, weights)
    kept = whole[0, :7]
    assert (whole[0, 7:] == 0).all()
    assert kept.mean().abs() < 1e-6
    assert kept.std(unbiased=False) == pytest.approx(1, abs=1e-6)

    halves = [(advantage[:, :4], weights[:, :4]), (advantage[:, 4:], weights[:, 4:])]
    sums: list[torch.Tensor] = []
    for stage in range(2):  # the second reduction needs the first one's result
        parts = []
        for half in halves:
            calls: list[torch.Tensor] = []

            def probe(flat, calls=calls):
                calls.append(flat)
                return sums[len(calls) - 1] if len(calls) <= len(sums) else flat

            standardise(*half, reduce=probe)
            parts.append(calls[stage])
        sums.append(parts[0] + parts[1])
    for half, columns in zip(halves, (slice(4), slice(4, None)), strict=True):
        queue = iter(sums)
        torch.testing.assert_close(standardise(*half, reduce=lambda _, q=queue: next(q)), whole[:, columns])


# -- the loss --------------------------------------------------------------------------------------------------------
def test_masked_policy_gives_illegal_actions_exactly_nothing():
    logits = _random(3, 4).requires_grad_()
    legal = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    log_policy = masked_log_softmax(logits, legal)
    assert (log_policy.exp()[~legal] == 0).all()
    assert log_policy.exp()[:2].sum(-1).tolist() == pytest.approx([1, 1])
    expected = torch.log_softmax(logits[0, [0, 2, 3]], -1)
    torch.testing.assert_close(log_policy[0, [0, 2, 3]], expected)
    assert log_policy[1, 1] == 0
    entropy(log_policy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~legal] == 0).all()


def test_entropy_of_uniform_legal_actions_is_the_log_of_their_number():
    legal = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert entropy(masked_log_softmax(torch.zeros(2, 4), legal)).tolist() == pytest.approx([math.log(3), 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.1, 2.0, -2.2, True),  # inside
        (1.5, 2.0, -2.4, False),  # gained enough
        (0.5, 2.0, -1.0, True),  # a bad turn is not clipped
        (0.5, -2.0, 1.6, False),
        (1.5, -2.0, 3.0, True),
    ],
)
def test_clipped_surrogate_by_cases(ratio, advantage, loss, moves):
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert log_ratio.grad is not None
    assert (log_ratio.grad.item() != 0) == moves


def test_value_loss_clipped_takes_the_worse_error():
    value, old, target = torch.tensor([2.0, 0.1]), torch.zeros(2), torch.tensor([3.0, 3.0])
    assert value_loss(value, target).tolist() == pytest.approx([0.5, 0.5 * 2.9**2])
    assert value_loss(value, target, old, 0.5).tolist() == pytest.approx([0.5 * 2.5**2, 0.5 * 2.9**2])
    with pytest.raises(ValueError, match="old_value"):
        value_loss(value, target, None, 0.5)


def test_approximate_kl_is_unbiased_for_the_exact_one():
    old, new = (torch.log_softmax(_random(5, seed=seed), -1) for seed in (0, 1))
    exact = (old.exp() * (old - new)).sum()
    estimate = approximate_kl(new - old)
    assert (estimate >= 0).all()
    torch.testing.assert_close((old.exp() * estimate).sum(), exact)


def test_padding_changes_nothing_and_every_learner_has_its_own_mean():
    log_probability, old, advantage, value, target, spread = (_random(2, 6, seed=seed) for seed in range(6))
    weights = torch.ones(2, 6)
    weights[1, 3:] = 0
    with torch.no_grad():
        value[1, 3:] = float("nan")
        log_probability[1, 3:] = float("inf")
    found = ppo_loss(
        log_probability, old, advantage, value, target, spread, weights, value_weight=0.7, entropy_weight=0.1
    )
    for learner, size in ((0, 6), (1, 3)):
        rows = (tensor[learner, :size] for tensor in (log_probability, old, advantage, value, target, spread))
        alone = ppo_loss(*rows, value_weight=0.7, entropy_weight=0.1)
        assert set(found) == set(alone)
        for key in alone:
            torch.testing.assert_close(found[key][learner], alone[key])
    parts = found["policy_loss"] + 0.7 * found["value_loss"] - 0.1 * found["entropy"]
    torch.testing.assert_close(found["loss"], parts)


def test_weighted_mean_of_nothing_is_zero():
    assert weighted_mean(torch.tensor([float("nan"), 2.0]), torch.zeros(2)) == 0
    assert weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])) == 2


def test_loss_has_the_gradient_of_finite_differences():
    old, advantage, target = (0.1 * _random(2, 5, seed=seed) for seed in range(3))
    inputs = (0.1 * _random(2, 5, seed=7)).requires_grad_(), _random(2, 5, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logp, value: ppo_loss(logp, old, advantage, value, target)["loss"], inputs, atol=1e-6
    )


def test_minibatches_are_near_equal_and_differ_by_seed_and_epoch():
    rows = torch.arange(8000)
    part = minibatch_of(rows, seed=123456789012345, epoch=0, minibatches=4)
    sizes = part.bincount(minlength=4)
    assert sizes.sum() == 8000
    assert (sizes - 2000).abs().max() < 200  # 5 standard deviations of a fair draw
    torch.testing.assert_close(minibatch_of(rows[3000:], 123456789012345, 0, 4), part[3000:])
    for seed, epoch in ((123456789012346, 0), (123456789012345, 1)):
        same = (minibatch_of(rows, seed, epoch, 4) == part).double().mean()
        assert 0.2 < same < 0.3
