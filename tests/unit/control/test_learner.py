"""PPO of one player: targets, ratios, minibatches over ranks, annealing, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from modules.control.learner import PPOLearner
from modules.control.players import PlayerNetworks
from modules.control.policy import MemorySettings, gaussian_log_probability
from modules.control.ppo_settings import PPOSettings

ENVS, STEPS, SIZE, ACTIONS = 4, 10, 3, 2
SETTINGS = PPOSettings(epochs=2, minibatches=5, normalise_rewards=False, normalise_observations=False, anneal=False)


def _rollout(learner: PPOLearner, seed: int = 0, noise: float = 1.0) -> TensorDict:
    """A rollout of made-up observations in which the learner's own policy acts."""
    g = torch.Generator().manual_seed(seed)
    observation = torch.randn(ENVS, STEPS, SIZE, generator=g)
    params = learner.policy.views(learner.policy.flat.detach())["policy"]
    z = torch.randn(ENVS, STEPS, ACTIONS, generator=g) * noise
    if learner.networks.recurrent:
        mean = torch.zeros(ENVS, STEPS, ACTIONS)
    else:
        mean = learner.networks.policy.step(params, observation.flatten(0, 1).unsqueeze(0), None)[0]
        mean = mean.view(ENVS, STEPS, ACTIONS)
    terminated = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    truncated = terminated.clone()
    terminated[0, 3], truncated[1, 5], truncated[2, 9] = True, True, True
    following = torch.cat([observation[:, 1:], torch.randn(ENVS, 1, SIZE, generator=g)], 1)
    after = torch.where((terminated | truncated).unsqueeze(-1), torch.randn(ENVS, STEPS, SIZE, generator=g), following)
    fresh = torch.cat([torch.ones(ENVS, 1, dtype=torch.bool), (terminated | truncated)[:, :-1]], 1)
    return TensorDict(
        {
            "observation": observation,
            "features": observation,
            "next_observation": after,
            "action": mean + params["log_std"][0].exp() * z,
            "reward": torch.randn(ENVS, STEPS, generator=g),
            "terminated": terminated,
            "truncated": truncated,
            "fresh": fresh,
            "discounted_return": torch.randn(ENVS, STEPS, generator=g, dtype=torch.float64),
        },
        [ENVS, STEPS],
    )


def _learner(settings=SETTINGS, **kwargs) -> PPOLearner:
    networks = PlayerNetworks(SIZE, ACTIONS, [8], False, 0.7, SIZE)
    learner = PPOLearner(networks, settings, "agent", **kwargs)
    learner.begin((1, 2))
    return learner


def test_targets_equal_a_quadratic_reference_with_truncation_and_termination():
    learner = _learner()
    batch = _rollout(learner)
    rows = learner.prepare(batch, None)
    params = learner.value.views(learner.value.flat.detach())["value"]

    def value(observation):
        return float(learner.networks.value.step(params, observation.view(1, 1, -1), None)[0])

    gamma, decay = SETTINGS.gamma, SETTINGS.gamma * SETTINGS.gae_lambda
    expected = torch.zeros(ENVS, STEPS)
    for env in range(ENVS):
        for start in range(STEPS):
            total, weight = 0.0, 1.0
            for t in range(start, STEPS):
                ended = bool(batch["terminated"][env, t])
                beyond = 0.0 if ended else value(batch["next_observation"][env, t])
                here = value(batch["observation"][env, t])
                total += weight * (float(batch["reward"][env, t]) + gamma * beyond - here)
                if ended or bool(batch["truncated"][env, t]):
                    break
                weight *= decay
            expected[env, start] = total
    found = (rows.target - rows.value).view(ENVS, STEPS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    spread = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(rows.advantage.view(ENVS, STEPS), spread, atol=1e-4, rtol=0)


def test_the_first_ratio_is_one():
    learner = _learner()
    batch = _rollout(learner)
    rows = learner.prepare(batch, None)
    params = learner.policy.views(learner.policy.flat.detach())["policy"]
    mean = learner.networks.policy.step(params, rows.features.unsqueeze(0), None)[0][0]
    ratio = (gaussian_log_probability(rows.action, mean, params["log_std"][0]) - rows.log_probability).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_an_adversarys_reward_is_the_agents_negated():
    agent = _learner()
    adversary = PPOLearner(agent.networks, SETTINGS, "adversary")
    adversary.begin((1, 2))
    batch = _rollout(agent)
    batch["adversary_features"], batch["adversary_action"] = batch["features"], batch["action"]
    batch["perturbation"] = torch.zeros(ENVS, STEPS, 1)
    mirrored = batch.clone()
    mirrored["reward"] = -batch["reward"]
    mine, theirs = agent.prepare(mirrored, None), adversary.prepare(batch, None)
    assert torch.equal(mine.target, theirs.target)
    assert torch.equal(mine.advantage, theirs.advantage)


def test_ranks_shares_of_a_rollout_add_up_to_one_ranks_update():
    """Two halves whose sums are added equal the whole, up to the order of additions."""
    alone = _learner()
    batch = _rollout(alone)
    alone.update(batch, (7,), 10, 0, ENVS * STEPS)
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, parts = Barrier(2), [None, None]

    def run(rank):
        def reduce(value):
            parts[rank] = value
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        learner = _learner()
        half = ENVS // 2
        learner.update(batch[rank * half : (rank + 1) * half], (7,), 10, rank * half * STEPS, ENVS * STEPS, reduce)
        return learner

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, range(2)))
    assert torch.equal(both[0].policy.flat, both[1].policy.flat)
    torch.testing.assert_close(both[0].policy.flat, alone.policy.flat, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[0].value.flat, alone.value.flat, atol=1e-5, rtol=1e-4)


def test_learning_rates_fall_to_zero_and_metrics_are_whole():
    learner = _learner(replace(SETTINGS, anneal=True))
    rates = []
    for number in range(4):
        metrics = learner.update(_rollout(learner, number), (number,), 4, 0, ENVS * STEPS)
        rates.append(learner.policy.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([SETTINGS.lr * share for share in (1.0, 0.75, 0.5, 0.25)])
    assert {"policy_loss", "value_loss", "kl", "clip_fraction", "entropy", "std"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_target_kl_ends_the_epochs():
    eager = replace(SETTINGS, lr=0.05, epochs=10)
    free, held = _learner(eager), _learner(replace(eager, target_kl=1e-4))
    batch = _rollout(free)
    for learner in (free, held):
        learner.update(batch, (7,), 10, 0, ENVS * STEPS)
    start = _learner().policy.flat.detach()
    assert float((held.policy.flat.detach() - start).norm()) < 0.5 * float((free.policy.flat.detach() - start).norm())


def test_the_normaliser_takes_a_rollout_in_after_its_update():
    learner = _learner(replace(SETTINGS, normalise_observations=True))
    batch = _rollout(learner)
    learner.update(batch, (0,), 10, 0, ENVS * STEPS)
    flat = batch["observation"].flatten(0, 1).double()
    torch.testing.assert_close(learner.moments.mean, flat.mean(0))
    member = learner.member()
    torch.testing.assert_close(member["std"].double(), flat.std(0, correction=0), atol=1e-6, rtol=1e-5)


def test_a_state_taken_and_put_back_goes_on_bitwise():
    one = _learner()
    one.update(_rollout(one), (0,), 10, 0, ENVS * STEPS)
    other = _learner()
    other.load_state_dict(one.state_dict())
    batch = _rollout(one, 5)
    for learner in (one, other):
        learner.update(batch, (1,), 10, 0, ENVS * STEPS)
    assert torch.equal(one.policy.flat, other.policy.flat)
    assert torch.equal(one.value.flat, other.value.flat)


def test_a_loss_that_is_not_finite_stops():
    learner = _learner()
    batch = _rollout(learner)
    batch["reward"][0, 0] = math.inf
    with pytest.raises(ValueError, match="no longer finite"):
        learner.update(batch, (0,), 10, 0, ENVS * STEPS)


def test_recurrent_rollouts_must_divide_into_pieces():
    networks = PlayerNetworks(SIZE, ACTIONS, [8], True, 0.7, SIZE)
    learner = PPOLearner(networks, SETTINGS, "agent", MemorySettings("lstm", history=4))
    learner.begin((1, 2))
    batch = _rollout(learner)
    for name in ("state", "value_state", "value_state_after"):
        batch[name] = torch.zeros(ENVS, STEPS, networks.policy.state_size)
    with pytest.raises(ValueError, match="history must divide the 10 steps"):
        learner.prepare(batch, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0"),
        ({"clip": -1.0}, "clip must be > 0"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"gamma": 1.5}, "gamma must be in"),
        ({"entropy": math.nan}, "entropy must be >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or null"),
    ],
)
def test_settings_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        PPOSettings(**change)
