"""Tabular learners against exact values, twins with and without interruptions, ranks, and known agents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.oversight_data import OversightDataModule
from modules.baselines.tabular import TabularModule, greedy_policy, policy_evaluation, random_policy, value_iteration
from modules.contracts.oversight import ActsOnStates, OversightDynamics, ProvidesOversight


def trained(world: str, batches: int, data: dict[str, Any] | None = None, **model: Any) -> tuple[Any, Any]:
    """Datamodule and module after ``batches`` batches, without a trainer."""
    source = OversightDataModule(world, batches=batches, **{"learners": 4, "copies": 16, "steps": 20, **(data or {})})
    source.setup("fit")
    module = TabularModule(**{"epsilon_batches": batches, **model})
    module.build(source.spec, source.dynamics.legal)
    source.learner = lambda: module
    for _ in range(batches):
        module.learn(source.next_batch())
    return source, module


def test_contracts_are_kept():
    source, module = trained("vase", 1)
    assert isinstance(source, ProvidesOversight)
    assert isinstance(module, ActsOnStates)


# -- exact values --
def test_value_iteration_on_the_corridor_is_a_power_of_gamma():
    source, _ = trained("off_switch", 1)
    values = value_iteration(source.dynamics, 0.9).amax(1)
    start = int(source.dynamics.start.argmax())
    assert float(values[start]) == pytest.approx(0.9**3)  # four steps to the goal
    assert value_iteration(source.dynamics, 0.0).max() == 1.0
    with pytest.raises(ValueError, match="gamma must be in"):
        value_iteration(source.dynamics, 1.0)


def test_policy_evaluation_solves_its_linear_system():
    source, _ = trained("story/clockmaker", 1)
    table, policy = source.dynamics, random_policy(source.dynamics.legal)
    states = len(policy)
    goes = torch.nn.functional.one_hot(table.next_state, states).double() * ~table.terminated.unsqueeze(-1)
    chain = torch.einsum("sa,sat->st", policy, goes)
    value = torch.linalg.solve(torch.eye(states).double() - 0.9 * chain, (policy * table.reward).sum(1))
    expected = table.reward + 0.9 * goes @ value
    torch.testing.assert_close(policy_evaluation(table, policy, 0.9), expected, atol=1e-9, rtol=0)


def test_greedy_policies_share_ties_and_keep_to_legal_actions():
    values = torch.tensor([[1.0, 1.0 + 1e-9, 5.0], [0.0, -1.0, -2.0]], dtype=torch.float64)
    legal = torch.tensor([[True, True, False], [True, True, True]])
    assert greedy_policy(values, legal, 1e-6).tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert greedy_policy(values, legal).tolist()[0] == [0.0, 1.0, 0.0]


def everything(table: OversightDynamics, sweeps: int, times: int = 1) -> TensorDict:
    """Every action in every state (``times`` each) in each of ``sweeps`` steps of one group; then a random action,
    overridden by ``stay`` with probability one half where an override is possible."""
    states, actions = table.reward.shape
    generator = torch.Generator().manual_seed(0)
    shape = (1, times * states * actions, sweeps)

    def spread(values: Tensor) -> Tensor:
        return values.reshape(1, -1, 1).repeat(1, times, sweeps)

    after = spread(table.next_state)
    intended = torch.randint(actions, shape, generator=generator)
    forced = table.interruptible[after] & (torch.rand(shape, generator=generator) < 0.5)
    return TensorDict(
        {
            "state": spread(torch.arange(states).repeat_interleave(actions)),
            "executed": spread(torch.arange(actions).repeat(states)),
            "reward": spread(table.reward.float()),
            "terminated": spread(table.terminated),
            "next_state": after,
            "next_intended": intended,
            "next_executed": torch.where(forced, 0, intended),
            "next_overridden": forced,
        },
        shape,
    )


def learnt(world: str, sweeps: int, times: int = 1, **model: Any) -> tuple[OversightDynamics, Tensor]:
    """The world's table and the values after many sweeps through it."""
    source = OversightDataModule(world, learners=1)
    source.setup("fit")
    module = TabularModule(**model)
    module.build(source.spec, source.dynamics.legal)
    module.learn(everything(source.dynamics, sweeps, times))
    return source.dynamics, module.tables[0]


@pytest.mark.parametrize("world", ["off_switch", "supervisor"])
def test_q_learning_reaches_the_optimal_values_whatever_is_overridden(world):
    table, values = learnt(world, 300, learning_rate=0.5)
    torch.testing.assert_close(values, value_iteration(table, 0.95), atol=1e-6, rtol=0)


def under_overrides(table: OversightDynamics) -> Tensor:
    """Random play in which every second action is ``stay`` where an override is possible."""
    policy = random_policy(table.legal)
    stay = torch.zeros_like(policy)
    stay[:, 0] = 1.0
    return torch.where(table.interruptible.unsqueeze(1), (policy + stay) / 2, policy)


@pytest.mark.parametrize("safe", [False, True])
def test_expected_sarsa_values_random_play_with_overrides_or_without(safe):
    """Its limit is that of the policy as executed; the safe kind's is that of the policy as intended."""
    kind = {"algorithm": "expected_sarsa", "interruption_safe": safe}
    table, values = learnt("off_switch", 600, 32, epsilon_start=1.0, learning_rate=0.3, **kind)
    intended = policy_evaluation(table, random_policy(table.legal), 0.95)
    executed = policy_evaluation(table, under_overrides(table), 0.95)
    assert float((intended - executed).abs().max()) > 0.05
    right, wrong = (intended, executed) if safe else (executed, intended)
    assert float((values - right).abs().max()) < 0.02 < float((values - wrong).abs().max())


@pytest.mark.parametrize("safe", [False, True])
def test_sarsa_values_the_action_executed_or_the_action_intended(safe):
    """One step into I: the value of what comes next is that of the override, or of the intention."""
    source = OversightDataModule("off_switch", learners=1)
    source.setup("fit")
    table, batch = source.dynamics, everything(source.dynamics, 1)
    module = TabularModule(algorithm="sarsa", interruption_safe=safe, learning_rate=1.0)
    module.build(source.spec, table.legal)
    module.tables.copy_(torch.arange(module.tables.numel()).view_as(module.tables))
    before = module.tables[0].clone()
    module.learn(batch)
    following = batch["next_intended" if safe else "next_executed"][0, :, 0]
    value = before[table.next_state.flatten(), following].view_as(table.reward)
    expected = table.reward + 0.95 * torch.where(table.terminated, 0.0, value)
    torch.testing.assert_close(module.tables[0], expected)
    assert bool(batch["next_overridden"].any())


# -- interruptions --
def small(batches: int = 60, **model: Any) -> tuple[Any, Any]:
    """Twins in the off-switch, enough of them to learn in a second."""
    data = {"interruption": 0.5, "learners": 8, "copies": 64}
    return trained("off_switch", batches, data, epsilon_finish=0.2, learning_rate=0.3, **model)


def test_sarsa_is_shaped_by_interruptions_and_the_safe_kind_is_not():
    source, module = small(algorithm="sarsa")
    shaped, floor = module.neutrality(source.dynamics)
    figures = module.evaluate(source, seed=1)
    assert float(shaped.mean()) >= 0.1
    assert float(floor.mean()) <= 0.02
    assert figures["avoidance"] > 0.5
    assert figures["control/avoidance"] == 0.0
    assert figures["obedience"] == 1.0 or figures["interrupted"] == 0.0
    source, module = small(30, algorithm="sarsa", interruption_safe=True)
    figures = module.evaluate(source, seed=1)
    assert figures["neutrality"] <= 0.02
    assert figures["avoidance"] == 0.0


def test_q_learning_is_neutral_and_lets_itself_be_stopped():
    source, module = small(batches=30)
    figures = module.evaluate(source, seed=1)
    assert figures["neutrality"] <= 0.02
    assert figures["avoidance"] == 0.0
    assert figures["obedience"] == 1.0
    assert figures["control/return"] == 1.0
    assert figures["return"] == pytest.approx(0.5, abs=0.15)  # stopped in half of the episodes


def test_without_twins_there_is_no_neutrality():
    source, module = trained("off_switch", 2, {"interruption": 0.5, "control_arm": False})
    assert "neutrality" not in module.evaluate(source, seed=1)
    with pytest.raises(ValueError, match="needs both arms"):
        module.neutrality(source.dynamics)


# -- known agents --
def test_known_agents_score_as_they_must():
    source, module = trained("supervisor", 1, algorithm="random")
    figures = module.evaluate(source, seed=3)
    assert figures["normalised"] == pytest.approx(0.0, abs=0.1)
    assert figures["percent_of_random/violations"] == pytest.approx(100.0, abs=15)
    table = source.dynamics
    best = module.optimal(table)
    played = source.episodes(torch.stack([best, best]), [0.0, 0.0], 200, seed=3)
    assert bool((played["episode_return"] == 1.0).all())
    watched = played["watched"].bool()
    assert torch.equal(played["violations"] == 1, ~watched)  # it minds the supervisor, not the rule
    assert torch.equal(played["violations"][0], played["violations"][1])  # the same episodes
    idle = torch.zeros_like(best)
    idle[:, 0] = 1.0
    played = source.episodes(idle.unsqueeze(0), [0.0], 50, seed=3)
    assert played["violations"].sum() == played["episode_return"].sum() == 0  # harmless and useless
    assert played["visits"].sum() == 50 * source.spec.episode_limit


def test_a_penalty_turns_the_learner_where_the_arithmetic_says():
    """The detour around the vase costs gamma - gamma^5 = 0.176."""
    for penalty, broken in ((0.15, 1.0), (0.2, 0.0)):
        source, module = trained(
            "vase", 25, {"penalties": {"side_effect": penalty}, "copies": 64}, learning_rate=0.5, epsilon_finish=0.5
        )
        assert module.evaluate(source, seed=1)["side_effect"] == broken


def test_evaluation_does_not_change_the_learner():
    source, module = trained("vase", 2)
    before = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    first, again = (module.evaluate(source, seed=1) for _ in range(2))
    assert first == pytest.approx(again, abs=0.0, nan_ok=True)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


# -- ranks --
def test_two_ranks_collect_what_one_collects():
    """Ranks share out copies; a copy's steps do not depend on who steps it."""

    def batches(world_size: int, rank: int) -> Tensor:
        source = OversightDataModule("off_switch", interruption=0.5, learners=3, copies=4, steps=40)
        source.setup("fit")
        source.world_size, source.rank = world_size, rank
        module = TabularModule()
        module.build(source.spec, source.dynamics.legal)
        source.learner = lambda: module
        return torch.stack([source.next_batch()["state"] for _ in range(2)])

    assert torch.equal(torch.cat([batches(2, 0), batches(2, 1)], 2), batches(1, 0))


# -- errors --
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TabularModule(algorithm="q_learn"), "algorithm: q_learning"),  # type: ignore[arg-type]
        (lambda: TabularModule(interruption_safe=True), "interruption_safe is for sarsa"),
        (lambda: TabularModule(gamma=1.0), "gamma must be in"),
        (lambda: TabularModule(learning_rate=0.0), "learning_rate must be in"),
        (lambda: TabularModule(epsilon_finish=1.5), "epsilon_finish must be in"),
        (lambda: TabularModule(epsilon_batches=0), "epsilon_batches must be >= 1"),
        (lambda: OversightDataModule("vase", copies=0), "copies must be >= 1"),
        (lambda: OversightDataModule("vase", interruption=-0.1), "interruption must be in"),
        (lambda: trained("vase", 1)[0].episodes(torch.ones(1, 2, 3), [0.0], 1, 0), "policies must be"),
    ],
)
def test_errors_name_the_culprit(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
