"""The step of agent and attacker: coupling across restarts, who acts in an episode, memory, normalisers, bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.envs.control.base import ControlEnv
from datamodules.envs.control.classic import CartPole, Pendulum
from datamodules.rollout.control import ControlStream, play_episodes
from modules.contracts import EpisodesRequest, RolloutRequest
from modules.contracts.control import Carry
from modules.control.actor import Agent, Attacker, GameActor, Situation, drawn_member
from modules.control.adversary import LearnedAttacker
from modules.control.attackers import GradientAttacker, HeuristicAttacker
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.control.players import AdversarySettings, PlayerNetworks, adversary_networks, agent_networks
from modules.control.policy import MemorySettings

ONE = torch.ones(1, dtype=torch.float64)
PLAIN = MemorySettings()


class Bernoulli(ControlEnv):
    """Episodes of 1 to 6 steps, the long ones cut off after 5; a reward is the executed action's first coordinate.

    Observations are two numbers that hardly repeat. What was executed, and how dynamics were changed, is kept.
    """

    name = "bernoulli"

    def __init__(self, envs: int) -> None:
        super().__init__(
            envs,
            observation_size=2,
            action_size=2,
            low=-1.0,
            high=1.0,
            episode_limit=5,
            reset_size=2,
            parameters=("drag",),
        )
        self.fields = {"x": torch.zeros(envs, 2), "left": torch.zeros(envs, dtype=torch.int64)}
        self.executed: list[Tensor] = []
        self.changed: list[Tensor | None] = []

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        where: Any = slice(None) if rows is None else rows
        self.fields["x"][where] = uniforms.float() * 4.0 - 2.0
        self.fields["left"][where] = 1 + (uniforms[:, 0] * 6).long()

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        self.executed.append(action.clone())
        self.changed.append(parameters)
        self.fields["x"] = (self.fields["x"] * 1.7 + 0.3 * action).remainder(4.0) - 2.0
        self.fields["left"] = self.fields["left"] - 1
        return action[:, 0].clone(), self.fields["left"] <= 0

    def _look(self, rows: Tensor | None) -> Tensor:
        return self.fields["x"].clone() if rows is None else self.fields["x"][rows]


class Greedy:
    """Wants to be far out in every coordinate, always."""

    noise_size = 0

    def __init__(self, size: int) -> None:
        self.wish = torch.full((size,), 100.0)

    def begin(self, envs: int) -> Carry:
        return {}

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        return self.wish.expand(len(situation.previous), -1), {}, {}


def _params(networks: PlayerNetworks, members: int, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Members with random weights and statistics of their own, ``[members, ...]``."""
    g = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(members, *value.shape, generator=g) * scale for name, value in networks.null_member().items()
    }
    params["policy.log_std"] = params["policy.log_std"] * 0.1 - 0.5
    params["std"] = params["std"].abs() + 0.5
    params["active"] = torch.ones(members)
    return params


def _numbered(networks: PlayerNetworks, outputs: list[list[float]]) -> dict[str, Tensor]:
    """Members that do the same whatever they see: member ``i`` puts out ``outputs[i]``."""
    params = {name: value.expand(len(outputs), *value.shape).clone() for name, value in networks.null_member().items()}
    params["policy.bias_1"] = torch.tensor(outputs)
    params["active"] = torch.ones(len(outputs))
    return params


def _collect(env: ControlEnv, actor: GameActor, steps: int, key: int = 1) -> TensorDict:
    with torch.no_grad():
        return ControlStream(env, 0, env.envs).collect(RolloutRequest(actor, "train", (key,), 0), steps)


def _age(chunk: TensorDict) -> Tensor:
    """Steps ``[envs, steps]`` of the episode before this one, from ``fresh``."""
    age, now = [], torch.zeros(chunk.shape[0], dtype=torch.int64)
    for fresh in chunk["fresh"].unbind(1):
        now = torch.where(fresh, 0, now + 1)
        age.append(now)
    return torch.stack(age, 1)


def _agent(env: ControlEnv, memory: MemorySettings = PLAIN, sampled: bool = True, members: int = 1) -> Agent:
    networks = agent_networks(env.control_spec, memory, (8,), 1.0)
    return Agent(networks, _params(networks, members), torch.ones(members, dtype=torch.float64), memory, sampled)


def _learned(
    env: ControlEnv, settings: PerturbationSettings, kind: Any, budget: PerturbationSet, members: int = 1
) -> LearnedAttacker:
    adversary = AdversarySettings(kind=kind, hidden=(8,))
    networks = adversary_networks(env.control_spec, adversary, settings)
    params = _params(networks, members, seed=1)
    return LearnedAttacker(networks, params, torch.ones(members, dtype=torch.float64), adversary, budget, sampled=True)


# -- coupling ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first_step", ["free", "zero"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("kind", ["random", "ou", "constant", "mad", "critic", "direct", "temporal_delta", "pa_ad"])
def test_budgets_hold_at_every_step_of_unequal_episodes(kind, norm, first_step):
    """Checked from the recorded perturbations alone: the one before is the recorded one, but for restarts."""
    env = Bernoulli(16)
    eps, eps_bar = 0.5, 0.15
    settings = PerturbationSettings("state", norm, eps, eps_bar, first_step=first_step)
    budget = PerturbationSet(settings, 2)
    if kind in ("random", "ou", "constant"):
        attacker: Attacker = HeuristicAttacker(kind, budget)
    elif kind in ("mad", "critic"):
        attacker = GradientAttacker(kind, budget)
    else:
        attacker = _learned(env, settings, kind, budget, members=3)
    actor = GameActor(env.control_spec, _agent(env, members=2), attacker, budget, "state", learner="agent")
    chunk = _collect(env, actor, 60)
    lengths = (_age(chunk) + 1)[(chunk["terminated"] | chunk["truncated"])].unique()
    assert lengths.tolist() == [1, 2, 3, 4, 5]
    assert bool(chunk["truncated"].any())
    p, fresh = chunk["perturbation"], chunk["fresh"]
    before = torch.cat([torch.zeros_like(p[:, :1]), p[:, :-1]], 1).masked_fill(fresh.unsqueeze(-1), 0.0)
    assert torch.equal(chunk["previous"], before)
    order = torch.inf if norm == "inf" else 2
    size, leap = p.norm(order, dim=-1), (p - before).norm(order, dim=-1)
    assert float(size.max()) <= eps + 1e-6
    bound = torch.where(fresh, eps if first_step == "free" else eps_bar, eps_bar)
    assert float((leap - bound).max()) <= 1e-6
    held = kind == "constant" and first_step == "free"
    assert (float(leap[~fresh].max()) > 0.9 * eps_bar) is not held  # they do move
    if first_step == "free":
        assert float(leap[fresh].max()) > 1.5 * eps_bar


@pytest.mark.parametrize("space", ["state", "action", "params"])
@pytest.mark.parametrize("first_step", ["free", "zero"])
def test_the_size_after_k_steps_is_k_times_eps_bar(space, first_step):
    """Who always wants more gets ``min(eps, k * eps_bar)`` at the k-th step of every episode: no step early or late."""
    env = Bernoulli(12)
    settings = PerturbationSettings(space, "inf", 0.35, 0.1, first_step=first_step)
    budget = PerturbationSet(settings, 1 if space == "params" else 2)
    actor = GameActor(env.control_spec, _agent(env), Greedy(budget.size), budget, space, learner="agent")
    chunk = _collect(env, actor, 50)
    expected = ((_age(chunk) + 1) * 0.1).clamp_max(0.35) if first_step == "zero" else torch.full(chunk.shape, 0.35)
    torch.testing.assert_close(chunk["perturbation"], expected.unsqueeze(-1).expand_as(chunk["perturbation"]))


def test_the_size_after_k_steps_in_evaluation_too():
    env = Bernoulli(12)
    budget = PerturbationSet(PerturbationSettings("action", "inf", 0.35, 0.1, first_step="zero"), 2)
    actor = GameActor(env.control_spec, _agent(env, sampled=False), Greedy(2), budget, detail=True)
    with torch.no_grad():
        played = play_episodes(env, EpisodesRequest(actor, 1, 12, (3,), trace=12), 0, 1)
    length = played["episode_length"]
    assert len(length.unique()) >= 4
    torch.testing.assert_close(played["max_linf"], (length * 0.1).clamp_max(0.35).float())
    torch.testing.assert_close(played["max_step_linf"], torch.full((1, 12), 0.1))
    trace = played["trace"]
    steps = (torch.arange(5) + 1) * 0.1
    for episode in range(12):
        running = trace["running"][0, episode]
        assert int(running.sum()) == int(length[0, episode])
        found = trace["perturbation"][0, episode][running]
        torch.testing.assert_close(found[:, 0], steps[: len(found)].clamp_max(0.35))


def test_a_budget_of_each_coordinates_own():
    env = Bernoulli(6)
    settings = PerturbationSettings("state", "inf", [0.0, 0.3], [0.1, 0.2], first_step="zero")
    budget = PerturbationSet(settings, 2)
    actor = GameActor(env.control_spec, _agent(env), Greedy(2), budget, "state", learner="agent")
    chunk = _collect(env, actor, 20)
    assert not chunk["perturbation"][..., 0].any()
    torch.testing.assert_close(chunk["perturbation"][..., 1], ((_age(chunk) + 1) * 0.2).clamp_max(0.3))


# -- who acts ---------------------------------------------------------------------------------------------------------
SIGMA_A = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
SIGMA_V = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)


def _populations(env: ControlEnv, **kwargs: Any) -> GameActor:
    """Four agents whose first action is 0, 1, 2 or 3, three adversaries that add 0.1, 0.2 or 0.3 to the second."""
    settings = PerturbationSettings("action", "inf", 1.0, 0.1, coupled=False, clip_executed=False)
    budget = PerturbationSet(settings, 2)
    networks = agent_networks(env.control_spec, MemorySettings(), (8,), 1.0)
    agents = _numbered(networks, [[float(i), 0.0] for i in range(4)])
    agent = Agent(networks, agents, SIGMA_A, MemorySettings(), sampled=False)
    adversary = AdversarySettings(kind="direct", hidden=(8,))
    others = adversary_networks(env.control_spec, adversary, settings)
    rivals = _numbered(others, [[0.0, 0.1 * (j + 1)] for j in range(3)])
    attacker = LearnedAttacker(others, rivals, SIGMA_V, adversary, budget, sampled=False)
    return GameActor(env.control_spec, agent, attacker, budget, "action", clip_executed=False, **kwargs)


def test_members_are_drawn_for_each_episode_and_stay():
    env = Bernoulli(64)
    chunk = _collect(env, _populations(env, learner="agent"), 60)
    agent = chunk["action"][..., 0].round().long()
    adversary = (chunk["perturbation"][..., 1] * 10).round().long() - 1
    torch.testing.assert_close(chunk["perturbation"][..., 1], (adversary + 1) * 0.1)
    fresh = chunk["fresh"]
    for member in (agent, adversary):
        changed = member[:, 1:] != member[:, :-1]
        assert not bool((changed & ~fresh[:, 1:]).any())
        assert bool(changed.any())
    table = torch.zeros(4, 3, dtype=torch.float64)
    table.index_put_((agent[fresh], adversary[fresh]), torch.ones(int(fresh.sum()), dtype=torch.float64), True)
    expected = torch.outer(SIGMA_A, SIGMA_V) * table.sum()
    possible = expected > 0
    assert float(table[~possible].sum()) == 0.0
    assert float(expected[possible].min()) > 50
    chi_square = float(((table - expected).square()[possible] / expected[possible]).sum())
    assert chi_square < 24.3  # 0.999 quantile with 7 degrees of freedom: frequencies, and independence of each other


def test_draws_reach_the_ends_of_the_distribution():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9999999999999999], dtype=torch.float64)
    assert drawn_member(uniform, weights).tolist() == [1, 1, 3, 3]
    thirds = torch.full((3,), 1.0 / 3.0, dtype=torch.float64)
    assert drawn_member(torch.tensor([1.0 - 2.0**-53], dtype=torch.float64), thirds).tolist() == [2]


def test_cells_prescribe_members_and_minus_one_draws():
    """Groups of one evaluation; an episode's return is its length times the agent's number, ``max_linf`` tells the
    adversary."""
    cells = torch.tensor([[3, 0], [1, 2], [-1, 1], [2, -1]])
    env = Bernoulli(4 * 50)
    actor = _populations(env, cells=cells)
    with torch.no_grad():
        played = play_episodes(env, EpisodesRequest(actor, 4, 50, (9,)), 0, 1)
    agent = (played["episode_return"] / played["episode_length"]).round().long()
    torch.testing.assert_close(agent * played["episode_length"].double(), played["episode_return"])
    adversary = (played["max_linf"] * 10).round().long() - 1
    assert (agent[0] == 3).all()
    assert (agent[1] == 1).all()
    assert agent[2].unique().tolist() == [0, 1, 2, 3]
    assert (agent[3] == 2).all()
    assert (adversary[0] == 0).all()
    assert (adversary[1] == 2).all()
    assert (adversary[2] == 1).all()
    assert adversary[3].unique().tolist() == [0, 2]  # the second has no weight


def test_members_beside_each_other_act_as_each_alone():
    """Random networks and statistics: rows of a mixed population equal the same rows of populations of one."""
    env = Bernoulli(32)
    whole = _agent(env, MemorySettings(kind="lstm"), sampled=False, members=3)
    actor = GameActor(env.control_spec, whole, learner="agent")
    chunk = _collect(env, actor, 12)
    draws = torch.zeros(32, 2, dtype=torch.float64)
    parts = {name: value.cpu() for name, value in _params(whole.networks, 3).items()}
    first = chunk["fresh"][:, 0]
    assert bool(first.all())
    matched = torch.zeros(32, dtype=torch.int64)
    for member in range(3):
        alone = {name: value[member : member + 1] for name, value in parts.items()}
        agent = Agent(whole.networks, alone, ONE, whole.memory, sampled=False)
        other = GameActor(env.control_spec, agent, learner="agent")
        step = other.act(chunk["observation"][:, 0], other.begin(32), first, draws, torch.zeros(32, 0), None)
        matched += ((step.record["action"] - chunk["action"][:, 0]).abs() < 1e-5).all(-1)
    assert (matched == 1).all()


def test_normaliser_statistics_are_each_members():
    env = Bernoulli(24)
    settings = PerturbationSettings("state", "inf", 0.2, 0.1)
    budget = PerturbationSet(settings, 2)
    agent = _agent(env, members=3)
    params = _params(agent.networks, 3)
    params["std"] = torch.tensor([[1.0, 2.0], [0.5, 0.1], [3.0, 0.02]])  # the last ones clip
    agent = Agent(agent.networks, params, torch.ones(3, dtype=torch.float64), agent.memory, sampled=False)
    attacker = _learned(env, settings, "direct", budget, members=2)
    actor = GameActor(env.control_spec, agent, attacker, budget, "state", learner="agent")
    seen, carry = env.observe() + torch.randn(24, 2), actor.begin(24)
    draw = torch.rand(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(24, sum(actor.noise_parts), generator=torch.Generator().manual_seed(1))
    fresh = torch.ones(24, dtype=torch.bool)
    step = actor.act(seen, carry, fresh, draw, noise, None)
    mine, theirs = (draw[:, 0] * 3).long(), (draw[:, 1] * 2).long()
    assert torch.equal(step.carry["agent"], mine)
    assert torch.equal(step.carry["attack_member"], theirs)
    clean = ((seen - params["mean"][mine]) / params["std"][mine]).clamp(-10, 10)
    assert bool((clean.abs() == 10).any())
    torch.testing.assert_close(step.record["features"], clean + step.record["perturbation"])
    actor.learner = "adversary"
    record = actor.act(seen, carry, fresh, draw, noise, None).record
    rivals = _params(attacker.networks, 2, seed=1)
    normal = ((seen - rivals["mean"][theirs]) / rivals["std"][theirs]).clamp(-10, 10)
    torch.testing.assert_close(record["adversary_features"], torch.cat([normal, torch.zeros(24, 2)], -1))


# -- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", ["state", "action"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_stack_holds_what_was_seen_and_done(k, space):
    """What was seen is perturbed; what was done is the agent's own action, before any attack on it."""
    env = Bernoulli(8)
    settings = PerturbationSettings(space, "inf", 0.4, 0.1)
    budget = PerturbationSet(settings, 2)
    agent = _agent(env, MemorySettings(kind="stack", k=k))
    actor = GameActor(env.control_spec, agent, HeuristicAttacker("random", budget), budget, space, learner="agent")
    chunk = _collect(env, actor, 40)
    age, features = _age(chunk), chunk["features"]
    seen = ((chunk["observation"] - agent.mean) * agent.scale).clamp(-10, 10)
    if space == "state":
        seen = seen + chunk["perturbation"]
    torch.testing.assert_close(features[..., :2], seen)
    both = torch.cat([seen, chunk["action"]], -1)
    for back in range(1, k + 1):
        part = features[..., 2 + 4 * (back - 1) : 2 + 4 * back]
        earlier = torch.cat([torch.zeros(8, back, 4), both[:, :-back]], 1)
        torch.testing.assert_close(part, earlier.masked_fill((age < back).unsqueeze(-1), 0.0))
    assert features.shape[-1] == 2 + 4 * k


@pytest.mark.parametrize("kind", ["mad", "critic", "pa_ad"])
def test_attacks_do_not_advance_an_lstm(kind):
    """A state is what its network makes of the state before and what was seen, whatever an attack asked; with a budget
    of 0 it is the state without attack."""
    memory = MemorySettings(kind="lstm")

    def collect(eps: float | None) -> tuple[TensorDict, Agent]:
        env = Bernoulli(8)
        agent = _agent(env, memory, sampled=False)
        if eps is None:
            return _collect(env, GameActor(env.control_spec, agent, learner="agent"), 25), agent
        settings = PerturbationSettings("state", "inf", eps, eps / 3)
        budget = PerturbationSet(settings, 2)
        attacker = _learned(env, settings, kind, budget) if kind == "pa_ad" else GradientAttacker(kind, budget)
        actor = GameActor(env.control_spec, agent, attacker, budget, "state", learner="agent")
        return _collect(env, actor, 25), agent

    plain, agent = collect(None)
    nothing, _ = collect(0.0)
    names = ("observation", "features", "action", "state", "value_state", "value_state_after")
    for name in names:
        assert torch.equal(plain[name], nothing[name]), name
    attacked, _ = collect(0.5)
    assert not torch.equal(plain["action"], attacked["action"])
    states, fresh = attacked["state"], attacked["fresh"]
    assert not states[fresh].any()
    for policies, name in ((agent.policies, "state"), (agent.critics, "value_state")):
        for t in range(24):
            after = policies.step(attacked["features"][:, t], attacked[name][:, t])[1]
            assert after is not None
            expected = after.masked_fill(fresh[:, t + 1].unsqueeze(-1), 0.0)
            assert torch.equal(attacked[name][:, t + 1], expected)


# -- what is executed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [True, False])
def test_executed_actions_are_clipped_after_the_attack(clip):
    env = Bernoulli(16)
    budget = PerturbationSet(PerturbationSettings("action", "inf", 0.8, 0.4), 2)
    agent = _agent(env)
    attacker = HeuristicAttacker("random", budget)
    actor = GameActor(env.control_spec, agent, attacker, budget, "action", clip_executed=clip, learner="agent")
    chunk = _collect(env, actor, 30)
    executed = torch.stack(env.executed, 1)
    sum_of_both = chunk["action"] + chunk["perturbation"]
    assert float(sum_of_both.abs().max()) > 1.5
    assert torch.equal(executed, sum_of_both.clamp(-1, 1) if clip else sum_of_both)
    assert all(one is None for one in env.changed)


def test_perturbed_observations_change_nothing_in_the_task():
    env = Bernoulli(16)
    budget = PerturbationSet(PerturbationSettings("state", "inf", 0.8, 0.4), 2)
    actor = GameActor(env.control_spec, _agent(env), Greedy(2), budget, "state", learner="agent")
    chunk = _collect(env, actor, 30)
    assert torch.equal(torch.stack(env.executed, 1), chunk["action"].clamp(-1, 1))
    assert all(one is None for one in env.changed)


def test_changes_of_parameters_reach_the_pendulum():
    """The next angular velocity is that of a pendulum of another mass, length and gravity; actions are the agent's."""
    env = Pendulum(8, horizon=9)
    budget = PerturbationSet(PerturbationSettings("params", "inf", [0.5, 0.3, 0.2], [0.2, 0.1, 0.1]), 3)
    agent = _agent(env)
    attacker = HeuristicAttacker("random", budget)
    actor = GameActor(env.control_spec, agent, attacker, budget, "params", learner="agent")
    chunk = _collect(env, actor, 30)
    mass, length, gravity = (1.0 + chunk["perturbation"].double()).unbind(-1)
    gravity = 10.0 * gravity
    sine, speed = chunk["observation"][..., 1].double(), chunk["observation"][..., 2].double()
    torque = chunk["action"][..., 0].double().clamp(-2, 2)
    turned = speed + 0.05 * (1.5 * gravity / length * sine + 3.0 / (mass * length**2) * torque)
    found = chunk["next_observation"][..., 2].double()
    torch.testing.assert_close(found, turned.clamp(-8, 8), atol=1e-5, rtol=1e-5)
    assert float(chunk["perturbation"].abs().amax((0, 1)).min()) > 0.15


def test_changes_of_parameters_reach_the_cart_pole_in_evaluation():
    """A stronger motor, drawn once and held, ends episodes of the same agent elsewhere."""
    env = CartPole(20, horizon=60)
    lengths = []
    for eps in (0.0, 0.9):
        budget = PerturbationSet(PerturbationSettings("params", "inf", [0.0, 0.0, eps], 1.0, coupled=False), 3)
        actor = GameActor(env.control_spec, _agent(env, sampled=False), Greedy(3), budget, "params")
        with torch.no_grad():
            played = play_episodes(env, EpisodesRequest(actor, 1, 20, (3,)), 0, 1)
        assert float(played["max_linf"].max()) == pytest.approx(eps)
        lengths.append(played["episode_length"])
    assert not torch.equal(*lengths)
