"""Descent-ascent on a bandit reaches the closed form: p0 exp(sum_i mu_i r_i / beta), mu by the convex dual (scipy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import logsumexp
from torch import Tensor

from modules.objectives.lagrangian import (
    effective_multipliers,
    mix_advantages,
    multiplier_loss,
    multiplier_weights,
    project_raw,
    raw_multipliers,
    stream_coefficients,
)
from modules.rlhf.multipliers import Multipliers

BETA, ACTIONS = 0.1, 20


def bandit() -> tuple[Tensor, Tensor]:
    """Reference policy ``[K]`` and rewards ``[2, K]``."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.softmax(torch.randn(ACTIONS, generator=generator, dtype=torch.float64), 0)
    return reference, torch.rand(2, ACTIONS, generator=generator, dtype=torch.float64)


REFERENCE, REWARDS = bandit()
START = REWARDS @ REFERENCE  # returns of the reference policy
NEGATIVE = (START + torch.tensor([0.10, -0.03], dtype=torch.float64)).tolist()


def tilt(mu: Sequence[float] | Tensor) -> Tensor:
    tilted = REFERENCE.log() + torch.as_tensor(mu, dtype=torch.float64) @ REWARDS / BETA
    return torch.softmax(tilted, 0)


def dual_multipliers(thetas: Sequence[float], kinds: Sequence[str]) -> np.ndarray:
    """argmin of ``beta logsumexp(log p0 + mu r / beta) - mu theta``; ``ge`` wants mu >= 0, ``le`` mu <= 0."""
    log_reference, rewards, theta = REFERENCE.log().numpy(), REWARDS.numpy(), np.array(thetas)

    def dual(mu: np.ndarray) -> tuple[float, np.ndarray]:
        tilted = log_reference + mu @ rewards / BETA
        return BETA * logsumexp(tilted) - mu @ theta, rewards @ np.exp(tilted - logsumexp(tilted)) - theta

    ranges = {"ge": (0, None), "le": (None, 0), "eq": (None, None)}
    found = scipy.optimize.minimize(
        dual,
        np.zeros(2),
        jac=True,
        bounds=[ranges[kind] for kind in kinds],
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    return found.x


def descend_ascend(
    thetas: Sequence[float],
    kinds: Sequence[str],
    objective: str = "kl",
    parameterisation: str = "bounded",
    steps: int = 3000,
    lr: float = 0.2,
    raw: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-gradient steps of 0.5 on the policy, gradient steps of ``lr`` on the multipliers, exact gradients.

    Returns:
        Signed weights ``[2]``, effective multipliers ``[2]``, policy ``[K]``.
    """
    theta, bounded = torch.tensor(thetas, dtype=torch.float64), parameterisation == "bounded"
    logits = REFERENCE.log()
    raw = torch.zeros(2, dtype=torch.float64) if raw is None else raw
    for _ in range(steps):
        raw = raw.requires_grad_()
        weights = multiplier_weights(raw, kinds, parameterisation)
        coefficients = stream_coefficients(weights, kinds, objective, bounded=bounded)
        log_policy = torch.log_softmax(logits, 0)
        streams = torch.cat([REWARDS, -BETA * (log_policy - REFERENCE.log()).unsqueeze(0)])
        logits = log_policy + 0.5 * mix_advantages(streams.T, coefficients)
        loss = multiplier_loss(weights, REWARDS @ log_policy.exp(), theta)
        (gradient,) = torch.autograd.grad(loss, raw)
        raw = project_raw(raw.detach() - lr * gradient, kinds, parameterisation)
    weights = multiplier_weights(raw, kinds, parameterisation)
    return weights, effective_multipliers(weights, kinds, bounded), torch.softmax(logits, 0)


def total_variation(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().sum() / 2)


@pytest.mark.parametrize(
    ("thetas", "expected"), [((0.60, 0.65), (0.0648, 0.1232)), (NEGATIVE, (0.0952, -0.0396))], ids=["both", "negative"]
)
@pytest.mark.parametrize("parameterisation", ["bounded", "free"])
def test_equalities_reach_the_dual_solution(thetas, expected, parameterisation):
    optimum = dual_multipliers(thetas, ["eq", "eq"])
    assert optimum == pytest.approx(expected, abs=6e-5)
    lr = 0.2 if parameterisation == "bounded" else 0.1
    _, rho, policy = descend_ascend(thetas, ["eq", "eq"], parameterisation=parameterisation, lr=lr)
    assert rho.numpy() == pytest.approx(optimum, abs=1e-5)
    assert total_variation(policy, tilt(optimum)) < 1e-5
    assert (REWARDS @ policy).tolist() == pytest.approx(list(thetas), abs=1e-5)


def test_a_slack_inequality_ends_at_zero_only_where_zero_can_be_reached():
    thetas, kinds = (0.60, 0.30), ["ge", "ge"]
    optimum = dual_multipliers(thetas, kinds)
    assert optimum == pytest.approx((0.0715, 0.0), abs=5e-5)
    assert (REWARDS @ tilt(optimum)).tolist() == pytest.approx([0.600, 0.559], abs=1e-3)
    _, rho, policy = descend_ascend(thetas, kinds, parameterisation="projected", lr=0.05)
    assert rho.numpy() == pytest.approx(optimum, abs=1e-5)
    assert total_variation(policy, tilt(optimum)) < 1e-5
    weights, rho, policy = descend_ascend(thetas, kinds)  # a sigmoid comes near, and its slope dies on the way
    assert float(raw_multipliers(weights, kinds)[1]) < -4
    assert rho.numpy() == pytest.approx(optimum, abs=6e-3)
    assert 1e-4 < total_variation(policy, tilt(optimum)) < 6e-3


@pytest.mark.parametrize("parameterisation", ["softplus", "exp"])
def test_other_unbounded_forms_reach_active_inequalities(parameterisation):
    thetas, kinds = (0.60, 0.65), ["ge", "ge"]
    raw = raw_multipliers(torch.full((2,), 0.5, dtype=torch.float64), kinds, parameterisation)
    _, rho, policy = descend_ascend(thetas, kinds, parameterisation=parameterisation, lr=0.5, raw=raw)
    optimum = dual_multipliers(thetas, kinds)
    assert rho.numpy() == pytest.approx(optimum, abs=1e-4)
    assert total_variation(policy, tilt(optimum)) < 1e-4


def test_upper_and_lower_bounds_together_reach_the_dual_solution():
    thetas, kinds = (0.45, 0.60), ["le", "ge"]
    optimum = dual_multipliers(thetas, kinds)
    assert optimum[0] < -0.01
    assert optimum[1] > 0.01
    weights, rho, policy = descend_ascend(thetas, kinds, steps=6000, lr=1.0)
    assert weights[0] < 0 < weights[1]
    assert rho.numpy() == pytest.approx(optimum, abs=1e-5)
    assert total_variation(policy, tilt(optimum)) < 1e-5


def test_all_ppo_reaches_its_own_multipliers_and_the_policy_of_equalities():
    thetas, kinds = (0.60, 0.65), ["le", "le"]
    weights, rho, policy = descend_ascend(thetas, kinds, objective="all")
    multipliers = -rho
    assert multipliers.tolist() == pytest.approx([0.935, 0.877], abs=5e-4)
    # most v_0 + sum_i v_i subject to v_i <= theta_i is p0 exp(sum_i (1 - mu_i) r_i / beta)
    equalities = dual_multipliers(thetas, ["eq", "eq"])
    assert (1 - multipliers).numpy() == pytest.approx(equalities, abs=1e-5)
    coefficients = stream_coefficients(weights, kinds, "all")
    assert (coefficients[:2] / coefficients[2]).numpy() == pytest.approx(equalities, abs=1e-5)
    assert total_variation(policy, tilt(equalities)) < 1e-5


def learn(multipliers: Multipliers, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """Figures and policy after ``steps`` of the learner's own multipliers."""
    logits = REFERENCE.log()
    for _ in range(steps):
        log_policy = torch.log_softmax(logits, 0)
        streams = torch.cat([REWARDS, -BETA * (log_policy - REFERENCE.log()).unsqueeze(0)])
        coefficients = stream_coefficients(multipliers.weights(), multipliers.kinds)
        logits = log_policy + 0.5 * mix_advantages(streams.T, coefficients)
        multipliers.update(REWARDS @ log_policy.exp())
    return multipliers.figures(), torch.softmax(logits, 0)


def test_the_multipliers_module_reaches_the_dual_solution():
    multipliers = Multipliers(["first", "second"], ["eq", "ge"], [0.60, 0.65], lr=0.5, momentum=0.1, clip=0.5)
    figures, policy = learn(multipliers, 1500)
    optimum = dual_multipliers((0.60, 0.65), ["eq", "ge"])
    assert multipliers.effective().numpy() == pytest.approx(optimum, abs=1e-5)
    assert total_variation(policy, tilt(optimum)) < 1e-5
    assert float(figures["constraint/first/violation"]) == pytest.approx(0.0, abs=1e-5)


def test_an_infeasible_threshold_saturates_its_multiplier_and_is_named_once():
    multipliers = Multipliers(["first", "second"], ["ge", "ge"], [1.2, 0.3], lr=1.0, momentum=0.1, clip=0.5)
    with pytest.warns(UserWarning, match=r"constraints\.first: threshold 1\.2 looks infeasible") as seen:
        figures, policy = learn(multipliers, 1500)
    assert len(seen) == 1  # once, and never for the second
    assert figures["constraint/first/infeasible"] == 1
    assert figures["constraint/second/infeasible"] == 0
    assert float(figures["multiplier/first/w"]) > 0.99
    # With two constraints rho_1 is bounded by 1 / (1 - w_2), so that the policy is a tilt, not the maximum.
    rho = multipliers.effective()
    assert 0.95 < float(rho[0]) <= 1 / (1 - float(multipliers.weights()[1]))
    assert total_variation(policy, tilt(rho)) < 1e-3


def test_an_infeasible_single_constraint_brings_the_return_to_its_maximum():
    raw = torch.full((1,), 0.0, dtype=torch.float64)
    logits, theta = REFERENCE.log(), torch.tensor([1.2], dtype=torch.float64)
    for _ in range(6000):
        raw = raw.requires_grad_()
        weights = multiplier_weights(raw, ["ge"])
        log_policy = torch.log_softmax(logits, 0)
        streams = torch.stack([REWARDS[0], -BETA * (log_policy - REFERENCE.log())], -1)
        logits = log_policy + 0.5 * mix_advantages(streams, stream_coefficients(weights, ["ge"]))
        (gradient,) = torch.autograd.grad(multiplier_loss(weights, REWARDS[:1] @ log_policy.exp(), theta), raw)
        raw = raw.detach() - 2.0 * gradient
    assert float(multiplier_weights(raw, ["ge"])) > 0.99
    assert float(REWARDS[0] @ torch.softmax(logits, 0)) == pytest.approx(float(REWARDS[0].max()), abs=1e-6)


def test_thresholds_at_the_references_returns_leave_the_reference():
    weights, _, policy = descend_ascend(START.tolist(), ["eq", "eq"], steps=500)
    assert weights.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert total_variation(policy, REFERENCE) < 1e-12
    # a ge multiplier has to come down from 1/2 first, which moves the policy away and back
    _, rho, policy = descend_ascend(START.tolist(), ["ge", "ge"], parameterisation="projected", steps=6000)
    assert rho.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert total_variation(policy, REFERENCE) < 1e-5


def test_without_multipliers_the_reference_policy_is_a_fixed_point():
    kinds = ["eq"]
    coefficients = stream_coefficients(torch.zeros(1, dtype=torch.float64), kinds)
    assert coefficients.tolist() == [0.0, 1.0]
    streams = torch.stack([REWARDS[0], torch.zeros(ACTIONS, dtype=torch.float64)], -1)  # log-ratio 0: r_0 = 0
    assert mix_advantages(streams, coefficients).abs().max() == 0
