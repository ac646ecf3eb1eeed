"""Attacks on linear policies and critics, whose best perturbations are known; interval bounds against samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from modules.control.attacks import (
    critic_attack,
    director_attack,
    maximal_action_difference,
    policy_divergence,
    sgld_worst_case,
)
from modules.control.bounds import interval_bounds
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.networks.stacked_mlp import StackedMLP

STEPS = 10


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def free(eps, size: int, norm: str = "inf") -> PerturbationSet:
    return PerturbationSet(PerturbationSettings("state", norm, eps, coupled=False), size)


def change(gain: Tensor, p: Tensor, std: Tensor) -> Tensor:
    """What MAD maximises, of ``mu(s) = s @ gain``."""
    return ((p @ gain) / (std / std.mean())).square().sum(-1)


def attack(gain: Tensor, std: Tensor, budget: PerturbationSet, rows: int, seed: int, previous=None) -> Tensor:
    size = gain.shape[0]
    previous = torch.zeros(rows, size) if previous is None else previous
    return maximal_action_difference(
        lambda seen: seen @ gain,
        normal(seed, rows, size),
        std,
        budget.eps,
        lambda p: budget.project(p, previous),
        normal(seed + 1, rows, size),
        normal(seed + 2, STEPS, rows, size),
        STEPS,
        budget.settings.norm,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 3, 17])
def test_mad_on_one_linear_action_reaches_the_bound(seed: int, size: int) -> None:
    """``|K p| = eps ||K||_1`` at the best ``p``; at least 99 % of it in every row."""
    eps, gain = 0.1, normal(seed, size, 1)
    p = attack(gain, torch.tensor([0.5]), free(eps, size), 64, seed + 10)
    reached = (p @ gain).abs().squeeze(-1) / (eps * gain.abs().sum())
    assert reached.min() >= 0.99
    assert reached.max() <= 1 + 1e-5
    assert p.abs().max() <= eps


@pytest.mark.parametrize("size", [2, 4, 6])
def test_mad_on_several_linear_actions_against_all_corners(size: int) -> None:
    """Every row ends in a corner that no change of one sign improves; the best of 32 starts finds the best corner."""
    eps, actions = 0.2, 3
    corners = torch.tensor(list(itertools.product([-eps, eps], repeat=size)))
    shares = []
    for seed in range(20):
        gain, std = (
            normal(seed, size, actions),
            torch.rand(actions, generator=torch.Generator().manual_seed(seed)) + 0.2,
        )
        best = change(gain, corners, std).max()
        p = attack(gain, std, free(eps, size), 32, seed + 100)
        share = change(gain, p, std) / best
        shares.append(share)
        assert share.max() >= 0.99
        assert share.max() <= 1 + 1e-5
    assert torch.cat(shares).mean() >= 0.9


def test_mad_within_a_ball_is_the_largest_singular_value() -> None:
    """With norm 2 and equal deviations the best change is ``eps`` times the first singular vector."""
    eps = 0.3
    for seed in range(10):
        gain = torch.linalg.qr(normal(seed, 5, 5))[0] @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.3, 0.1]))
        p = attack(gain, torch.ones(5), free(eps, 5, "2"), 32, seed + 50)
        reached = (p @ gain).norm(dim=-1) / (3.0 * eps)
        # a start nearly at right angles to that vector is not there after ten steps
        assert (reached >= 0.99).float().mean() >= 0.9
        assert reached.min() >= 0.8
        assert reached.max() <= 1 + 1e-5
        assert (p.norm(dim=-1) <= eps * (1 + 1e-6)).all()


def test_mad_divides_by_standard_deviations() -> None:
    """The action whose deviation is small is the one that is moved."""
    gain = torch.eye(2)
    budget = PerturbationSet(PerturbationSettings("state", "2", 0.1, coupled=False), 2)
    p = attack(gain, torch.tensor([0.1, 1.0]), budget, 32, 0)
    assert p[:, 0].abs().min() >= 0.099
    p = attack(gain, torch.tensor([1.0, 0.1]), budget, 32, 0)
    assert p[:, 1].abs().min() >= 0.099


def test_mad_within_coupling_reaches_the_best_feasible_corner() -> None:
    eps, eps_bar, size = 0.1, 0.02, 4
    budget = PerturbationSet(PerturbationSettings("state", "inf", eps, eps_bar), size)
    gain = normal(0, size, 1)
    previous = (torch.rand(64, size, generator=torch.Generator().manual_seed(1)) * 2 - 1) * eps
    p = attack(gain, torch.ones(1), budget, 64, 3, previous)
    low, high = budget.bounds(previous)
    most = torch.maximum(low * gain.T, high * gain.T).sum(-1)
    least = torch.minimum(low * gain.T, high * gain.T).sum(-1)
    moved = (p @ gain).squeeze(-1)
    # ascent of |K p| ends at the upper or the lower end: both are local maxima where the interval holds 0
    reached = torch.where(moved > 0, moved / most, moved / least)
    assert reached.min() >= 0.99
    assert budget.excess(p, previous)[1].max() <= budget.tolerance


@pytest.mark.parametrize("eps", [0.1, 0.3, [0.1, 0.0, 0.7, 0.2]])
def test_the_critic_attack_on_a_linear_value_is_exact(eps) -> None:
    slope = torch.tensor([0.5, 0.3, -1e-3, 40.0])
    budget = free(eps, 4)
    p = critic_attack(lambda seen: seen @ slope, normal(0, 16, 4), budget.eps, lambda p: budget.project(p, p))
    assert torch.equal(p, (-budget.eps * slope.sign()).expand(16, 4))


def test_the_critic_attack_leaves_what_the_value_ignores() -> None:
    slope = torch.tensor([0.5, 0.0, -1.0])
    budget = free(0.1, 3)
    p = critic_attack(lambda seen: seen @ slope, normal(0, 8, 3), budget.eps, lambda p: budget.project(p, p))
    assert torch.equal(p, torch.tensor([-0.1, 0.0, 0.1]).expand(8, 3))


def test_the_critic_attack_within_a_ball_and_within_coupling() -> None:
    slope = torch.tensor([3.0, -4.0])
    budget = free(0.1, 2, "2")
    p = critic_attack(lambda seen: seen @ slope, normal(0, 8, 2), budget.eps, lambda p: budget.project(p, p), norm="2")
    torch.testing.assert_close(p, torch.tensor([-0.06, 0.08]).expand(8, 2), rtol=0, atol=1e-6)
    coupled = PerturbationSet(PerturbationSettings("state", "inf", 0.1, 0.02), 2)
    previous = torch.tensor([[0.09, 0.05], [-0.1, -0.1], [0.0, 0.1]])
    p = critic_attack(lambda seen: seen @ slope, normal(0, 3, 2), coupled.eps, lambda p: coupled.project(p, previous))
    torch.testing.assert_close(p, torch.tensor([[0.07, 0.07], [-0.1, -0.08], [-0.02, 0.1]]), rtol=0, atol=1e-7)


def test_robust_sarsa_is_the_critic_attack_through_the_policy() -> None:
    """``Q(s, a) = s.v + a.w`` and ``mu(s) = s @ K``: only the action's part can be moved, ``p = -eps sign(K w)``."""
    gain, weight, slope = normal(0, 5, 2), normal(1, 2), normal(2, 5)
    clean, budget = normal(3, 8, 5), free(0.1, 5)
    p = critic_attack(
        lambda seen: clean @ slope + seen @ gain @ weight, clean, budget.eps, lambda p: budget.project(p, p)
    )
    assert torch.equal(p, (-0.1 * (gain @ weight).sign()).expand(8, 5))


def test_the_director_gets_the_direction_that_it_asks_for() -> None:
    """With ``K = 1`` and one coordinate an action, the step is ``eps`` times the sign of the objective's gradient."""
    rows, size, eps = 256, 3, 0.2
    budget = free(eps, size)
    start = torch.rand(rows, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    direction, observation = normal(1, rows, size), normal(2, rows, size)
    p = director_attack(
        lambda seen: seen, observation, direction, budget.eps, lambda p: budget.project(p, p), start, STEPS
    )
    unit = torch.nn.functional.normalize(direction, dim=-1)
    begin = (start * eps / STEPS).double()
    begin = begin * (begin * unit).sum(-1, keepdim=True).sign()
    length = begin.norm(dim=-1, keepdim=True)
    cosine = (begin * unit).sum(-1, keepdim=True) / length
    slope = (unit - cosine * begin / length) / length + begin / length
    expected = (begin + eps * slope.sign()).clamp(-eps, eps).float()
    sure = slope.abs() > 1e-3
    torch.testing.assert_close(p[sure], expected[sure], rtol=0, atol=1e-5)
    assert sure.float().mean() > 0.95
    agreement = torch.nn.functional.cosine_similarity(p, direction, dim=-1)
    assert agreement.mean() > 0.6  # of 3 signs, the best corner agrees by 0.87 on average
    opposite = director_attack(
        lambda seen: seen, observation, -direction, budget.eps, lambda p: budget.project(p, p), start, STEPS
    )
    torch.testing.assert_close(opposite, -p, rtol=0, atol=1e-5)


def test_the_director_of_one_action_decides_its_sign() -> None:
    """The cosine is constant on either side of 0, so that the start has to be on the right one."""
    gain, budget = normal(0, 4, 1), free(0.1, 4)
    direction = normal(1, 128, 1)
    start = torch.rand(128, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    p = director_attack(
        lambda seen: seen @ gain, normal(3, 128, 4), direction, budget.eps, lambda p: budget.project(p, p), start, STEPS
    )
    moved = (p @ gain).squeeze(-1)
    assert torch.equal(moved.sign(), direction.squeeze(-1).sign())
    assert (moved.abs() / (0.1 * gain.abs().sum())).min() >= 0.9  # a step of eps from a start within eps / 10


def test_the_director_within_a_ball() -> None:
    budget = free(0.1, 3, "2")
    start = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    direction = normal(1, 64, 3)
    p = director_attack(
        lambda seen: seen, normal(2, 64, 3), direction, budget.eps, lambda p: budget.project(p, p), start, norm="2"
    )
    assert (p.norm(dim=-1) <= 0.1 * (1 + 1e-6)).all()
    assert p.norm(dim=-1).min() >= 0.09
    assert torch.nn.functional.cosine_similarity(p, direction, dim=-1).mean() > 0.6


def test_the_inner_maximum_of_sa_ppo_on_a_linear_policy() -> None:
    """At least 80 % of the bound in every row: a start on the wrong side leaves a step of ten unmade."""
    eps, size = 0.1, 8
    for seed in range(5):
        gain, std = normal(seed, size, 1), torch.tensor([0.3])
        p = sgld_worst_case(
            lambda seen: seen @ gain,  # noqa: B023 - used within the iteration
            normal(seed + 1, 64, size),
            std,
            torch.full((size,), eps),
            normal(seed + 2, 64, size),
            normal(seed + 3, STEPS, 64, size),
            STEPS,
        )
        most = (eps * gain.abs().sum() / std).square()
        share = policy_divergence(p @ gain, torch.zeros(64, 1), std) / most
        assert share.min() >= 0.8
        assert share.max() <= 1 + 1e-5
        assert not p.requires_grad


def test_divergence_is_twice_the_gaussian_one() -> None:
    one, other, std = normal(0, 6, 3), normal(1, 6, 3), normal(2, 3).abs() + 0.1
    whole = torch.distributions.kl_divergence(
        torch.distributions.Normal(one, std), torch.distributions.Normal(other, std)
    ).sum(-1)
    torch.testing.assert_close(policy_divergence(one, other, std), 2 * whole)


def test_interval_bounds_of_a_linear_layer_are_exact() -> None:
    """Against all corners of the box."""
    net = StackedMLP(5, [], 3, "tanh")
    params = net.init(2, torch.Generator().manual_seed(0))
    params["bias_0"] = normal(1, 2, 3)
    centre, reach = normal(2, 2, 4, 5), normal(3, 2, 4, 5).abs()
    low, high = interval_bounds(net, params, centre - reach, centre + reach)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    outputs = torch.stack([net.apply(params, centre + reach * sign) for sign in signs])
    torch.testing.assert_close(low, outputs.amin(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(high, outputs.amax(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
def test_interval_bounds_contain_ten_thousand_samples(activation: str, eps: float) -> None:
    net = StackedMLP(6, [16, 16], 3, activation)
    params = net.init(2, torch.Generator().manual_seed(0))
    centre = normal(1, 6)
    low, high = interval_bounds(net, params, (centre - eps).expand(1, 6), (centre + eps).expand(1, 6))
    draws = torch.rand(10_000, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    draws[5000:] = draws[5000:].sign()  # half of them corners
    outputs = net.apply(params, centre + eps * draws)
    assert (outputs >= low - 1e-5).all()
    assert (outputs <= high + 1e-5).all()
    # and a box of no width is the network's output
    low, high = interval_bounds(net, params, centre.expand(1, 6), centre.expand(1, 6))
    exact = net.apply(params, centre.expand(1, 6))
    torch.testing.assert_close(low, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(high, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.5])
def test_gradient_attacks_stay_below_interval_bounds(eps: float) -> None:
    size, rows = 6, 128
    net = StackedMLP(size, [16, 16], 2, "tanh")
    params = net.init(1, torch.Generator().manual_seed(0))
    observation, std, budget = normal(1, rows, size), torch.tensor([0.4, 0.6]), free(eps, size)

    def mean(seen: Tensor) -> Tensor:
        return net.apply(params, seen)[0]

    low, high = interval_bounds(net, params, observation - eps, observation + eps)
    at_rest = mean(observation)
    reach = torch.maximum(high[0] - at_rest, at_rest - low[0])
    drawn = normal(2, rows, size), normal(3, STEPS, rows, size)
    found = sgld_worst_case(mean, observation, std, eps, *drawn, STEPS)
    mad = maximal_action_difference(mean, observation, std, eps, lambda p: budget.project(p, p), *drawn, STEPS)
    lowest = critic_attack(lambda seen: mean(seen)[:, 0], observation, eps, lambda p: budget.project(p, p))
    bound = (reach / std).square().sum(-1)
    for p in (found, mad):
        assert (policy_divergence(mean(observation + p), at_rest, std) <= bound * (1 + 1e-5)).all()
    assert (mean(observation + lowest)[:, 0] >= low[0, :, 0] - 1e-5).all()
    if eps == 0.01:  # nearly linear: what the gradient promises is found
        seen = observation.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mean(seen)[:, 0].sum(), seen)
        fall = (at_rest - mean(observation + lowest))[:, 0]
        torch.testing.assert_close(fall, eps * slope.abs().sum(-1), rtol=0.05, atol=1e-4)
