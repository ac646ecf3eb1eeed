"""A constrained Markov decision process of 3 states: multipliers against the dual of its linear program (scipy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from modules.objectives.advantage import gae
from modules.objectives.lagrangian import (
    effective_multipliers,
    fixed_coefficients,
    mix_advantages,
    multiplier_loss,
    multiplier_weights,
    stream_coefficients,
    weights_of_fixed,
)

STATES, ACTIONS, GAMMA = 3, 2, 0.9
START = torch.full((STATES,), 1 / STATES, dtype=torch.float64)


def decision_process(seed: int, rewards: int) -> tuple[Tensor, Tensor]:
    """Transitions ``[S, A, S']`` and rewards ``[N, S, A]``."""
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    return torch.from_numpy(transitions), torch.from_numpy(generator.random((rewards, STATES, ACTIONS)))


def linear_program(
    transitions: Tensor, maximised: Tensor, constrained: Tensor, thresholds: Sequence[float]
) -> tuple[Tensor, np.ndarray]:
    """Occupancies ``[S, A]`` and dual variables of most ``maximised`` with ``constrained`` returns over thresholds."""
    inflow = GAMMA * transitions.reshape(-1, STATES).T
    outflow = torch.eye(STATES, dtype=torch.float64).repeat_interleave(ACTIONS, 1)
    found = scipy.optimize.linprog(
        -maximised.flatten().numpy(),
        A_eq=(outflow - inflow).numpy(),
        b_eq=START.numpy(),
        A_ub=-constrained.flatten(1).numpy() if len(thresholds) else None,
        b_ub=-np.array(thresholds) if len(thresholds) else None,
        method="highs",
    )
    assert found.status == 0
    return torch.from_numpy(found.x).view(STATES, ACTIONS), -found.ineqlin.marginals


def evaluate(policy: Tensor, transitions: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[S, N]`` and advantages ``[S, A, N]`` of every reward, exactly."""
    chain = (policy.unsqueeze(-1) * transitions).sum(1)
    immediate = (policy * rewards).sum(-1).T
    values = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - GAMMA * chain, immediate)
    return values, rewards.permute(1, 2, 0) + GAMMA * transitions @ values - values.unsqueeze(1)


def learn(transitions: Tensor, rewards: Tensor, thresholds: Sequence[float], steps: int) -> tuple[Tensor, Tensor]:
    """Most ``rewards[0]`` by natural policy gradient, multipliers by descent: ``rho`` and returns of the last iterate.

    The descent-ascent of a linear program circles its saddle point; an entropy bonus, annealed from 0.05 to 0.001,
    brings the last iterate there.
    """
    theta = torch.tensor(thresholds, dtype=torch.float64)
    kinds = ["ge"] * len(thresholds)
    logits = torch.zeros(STATES, ACTIONS, dtype=torch.float64)
    raw = torch.zeros(len(thresholds), dtype=torch.float64)
    no_kl = torch.zeros(STATES, ACTIONS, 1, dtype=torch.float64)
    for step in range(steps):
        entropy_weight = max(0.05 * 0.02 ** (1.25 * step / steps), 1e-3)
        raw = raw.requires_grad_()
        weights = multiplier_weights(raw, kinds)
        values, advantages = evaluate(torch.softmax(logits, -1), transitions, rewards)
        mixed = mix_advantages(torch.cat([advantages, no_kl], -1), stream_coefficients(weights, kinds, "single"))
        logits = torch.log_softmax((1 - entropy_weight) * logits + mixed, -1)
        returns = START @ values
        (gradient,) = torch.autograd.grad(multiplier_loss(weights, returns[1:], theta), raw)
        raw = raw.detach() - 0.02 * gradient
    return effective_multipliers(multiplier_weights(raw, kinds), kinds), returns


def between_extremes(transitions: Tensor, rewards: Tensor, shares: Sequence[float]) -> list[float]:
    """Thresholds that lie a share of the way from the return at the best of reward 0 to the best return of each."""
    nothing = rewards[:0]
    first, _ = linear_program(transitions, rewards[0], nothing, [])
    thresholds = []
    for reward, share in zip(rewards[1:], shares, strict=True):
        own, _ = linear_program(transitions, reward, nothing, [])
        low, high = float((first * reward).sum()), float((own * reward).sum())
        thresholds.append(low + share * (high - low))
    return thresholds


@pytest.mark.parametrize(
    ("seed", "shares", "tolerance"), [(2, (0.6,), 3e-3), (5, (0.6,), 4e-3), (0, (0.7, 0.5), 0.02)], ids=str
)
def test_single_constraint_multipliers_equal_the_linear_programs_duals(seed, shares, tolerance):
    transitions, rewards = decision_process(seed, 1 + len(shares))
    thresholds = between_extremes(transitions, rewards, shares)
    occupancy, duals = linear_program(transitions, rewards[0], rewards[1:], thresholds)
    assert (duals > 0.2).all()  # every constraint binds
    rho, returns = learn(transitions, rewards, thresholds, steps=4000)
    assert rho.numpy() == pytest.approx(duals, abs=tolerance)
    assert returns.tolist() == pytest.approx((occupancy * rewards).sum((-2, -1)).tolist(), abs=0.03)


# -- advantage streams --
def all_episodes(policy: Tensor, transitions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every path of ``length`` steps: states ``[E, T]``, actions ``[E, T]``, probabilities ``[E]``."""
    steps = torch.cartesian_prod(*[torch.arange(STATES * ACTIONS)] * length)
    state, action = steps // ACTIONS, steps % ACTIONS
    moves = transitions[state[:, :-1], action[:, :-1], state[:, 1:]]
    return state, action, START[state[:, 0]] * policy[state, action].prod(1) * moves.prod(1)


def finite_values(policy: Tensor, transitions: Tensor, rewards: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Values ``[T + 1, S, N]`` and action values ``[T, S, A, N]`` of episodes of ``length`` steps."""
    values, action_values = [torch.zeros(STATES, len(rewards), dtype=torch.float64)], []
    for _ in range(length):
        action_values.append(rewards.permute(1, 2, 0) + GAMMA * transitions @ values[-1])
        values.append((policy.unsqueeze(-1) * action_values[-1]).sum(1))
    return torch.stack(values[::-1]), torch.stack(action_values[::-1])


@pytest.fixture
def episodes() -> dict[str, Tensor]:
    length, streams = 4, 3
    transitions, rewards = decision_process(7, streams)
    policy = torch.softmax(torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    state, action, probability = all_episodes(policy, transitions, length)
    assert probability.sum() == pytest.approx(1.0)
    values, action_values = finite_values(policy, transitions, rewards, length)
    time = torch.arange(length)
    ends = (time == length - 1).view(1, length, 1).expand(len(state), length, streams)
    value = values[time, state]
    return {
        "reward": rewards[:, state, action].permute(1, 2, 0),
        "value": value,
        "next_value": torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1),
        "ends": ends,
        "advantage": action_values[time, state, action] - value,
        "probability": probability,
        "cell": (time * STATES + state) * ACTIONS + action,
    }


def streams_of(episodes: dict[str, Tensor], lambda_: float, value: Tensor | None = None) -> Tensor:
    value = episodes["value"] if value is None else value
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return gae(episodes["reward"], value, following, episodes["ends"], episodes["ends"], GAMMA, lambda_)[0]


def test_streams_equal_monte_carlo_and_temporal_differences(episodes):
    reward, value = episodes["reward"], episodes["value"]
    returns = torch.zeros_like(reward)
    for start in range(reward.shape[1]):
        for step in range(start, reward.shape[1]):
            returns[:, start] += GAMMA ** (step - start) * reward[:, step]
    torch.testing.assert_close(streams_of(episodes, 1.0), returns - value)
    torch.testing.assert_close(streams_of(episodes, 0.0), reward + GAMMA * episodes["next_value"] - value)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_the_mean_of_each_stream_is_the_exact_advantage(episodes, lambda_):
    """With exact values the estimate is unbiased for every lambda, in each (time, state, action)."""
    estimate = streams_of(episodes, lambda_)
    cells = int(episodes["cell"].max()) + 1
    total, mass = torch.zeros(cells, 3, dtype=torch.float64), torch.zeros(cells, 1, dtype=torch.float64)
    weight = episodes["probability"].view(-1, 1, 1).expand_as(estimate[..., :1])
    total.index_add_(0, episodes["cell"].flatten(), (weight * estimate).flatten(0, 1))
    mass.index_add_(0, episodes["cell"].flatten(), weight.flatten(0, 1))
    torch.testing.assert_close((total / mass)[episodes["cell"]], episodes["advantage"])


def test_streams_equal_torchrl(episodes):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    theirs, _ = functional.vec_generalized_advantage_estimate(
        GAMMA,
        0.95,
        episodes["value"],
        episodes["next_value"],
        episodes["reward"],
        done=episodes["ends"].contiguous(),
        terminated=episodes["ends"].contiguous(),
    )
    torch.testing.assert_close(streams_of(episodes, 0.95), theirs)


def test_fixed_multipliers_mix_to_the_advantage_of_the_weighted_reward(episodes):
    """fixed_lambda equals PPO on sum_i alpha_i r_i + r_0 up to the factor N / (1 + sum alpha); the last is KL."""
    alpha = torch.tensor([0.75, 0.25], dtype=torch.float64)
    nothing = torch.zeros_like(episodes["value"])
    mixed = mix_advantages(streams_of(episodes, 0.95, nothing), fixed_coefficients(alpha))
    single = dict(episodes, reward=(episodes["reward"] @ fixed_coefficients(alpha)).unsqueeze(-1))
    single["ends"] = episodes["ends"][..., :1]
    plain = streams_of(single, 0.95, nothing[..., :1]).squeeze(-1)
    torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=1e-12)
    weights = weights_of_fixed(alpha)
    assert (weights < 1).all()
    held = mix_advantages(streams_of(episodes, 0.95, nothing), stream_coefficients(weights, ["ge", "ge"]))
    torch.testing.assert_close(held, plain * 2 / (1 + alpha.sum()), rtol=1e-12, atol=1e-12)
