"""Rollouts that go on from chunk to chunk, whole episodes, shares of ranks, and the datamodule around them."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules import ControlDataModule
from datamodules.envs.control.base import ControlEnv
from datamodules.envs.control.classic import CartPole, Pendulum
from datamodules.envs.control.games import IntegratorGame
from datamodules.rollout import control as rollouts
from datamodules.rollout.control import ControlStream, counter_uniforms, play_episodes
from modules.contracts import EpisodesRequest, RolloutRequest
from modules.control.actor import Agent, GameActor
from modules.control.adversary import LearnedAttacker
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.control.players import AdversarySettings, adversary_networks, agent_networks
from modules.control.policy import MemorySettings
from modules.seeds import global_seed, stream_seed

MEMORIES = {"none": MemorySettings(), "stack": MemorySettings(kind="stack", k=2), "lstm": MemorySettings(kind="lstm")}


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


def _cartpole(envs: int) -> CartPole:
    """Episodes of unequal lengths, some of them cut off."""
    return CartPole(envs, horizon=25)


def _actor(env: ControlEnv, memory: str = "none", members: int = 1, sampled: bool = True, **kwargs: Any) -> GameActor:
    """A random agent and a random coupled adversary of observations, each a population."""
    g = torch.Generator().manual_seed(8)
    settings = PerturbationSettings("state", "inf", 0.3, 0.1, first_step="zero")
    budget, adversary = PerturbationSet(settings, env.observation_size), AdversarySettings(hidden=(8,))
    nets = agent_networks(env.control_spec, MEMORIES[memory], (8,), 1.0)
    others = adversary_networks(env.control_spec, adversary, settings)
    agents, rivals = (
        {name: torch.randn(members, *value.shape, generator=g) * 0.3 for name, value in one.null_member().items()}
        for one in (nets, others)
    )
    for params in (agents, rivals):
        params["std"], params["active"] = params["std"].abs() + 0.5, torch.ones(members)
    weights = torch.arange(1, members + 1, dtype=torch.float64)
    agent = Agent(nets, agents, weights, MEMORIES[memory], sampled)
    attacker = LearnedAttacker(others, rivals, weights, adversary, budget, sampled)
    return GameActor(env.control_spec, agent, attacker, budget, "state", **{"learner": "agent", **kwargs})


def _chunks(stream: ControlStream, actor: GameActor, first: int, last: int, key: int = 1, steps: int = 20) -> list:
    with torch.no_grad():
        return [stream.collect(RolloutRequest(actor, "s", (key,), n, 0.9), steps) for n in range(first, last)]


def _assert_equal(one: TensorDict, other: TensorDict) -> None:
    assert set(one.keys()) == set(other.keys())
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# -- streams ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", ["none", "stack", "lstm"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_stream_goes_on_bitwise_from_its_saved_state(memory, after):
    """Through a file that is read without pickles; before any episode has been cut off, and later."""
    whole = ControlStream(_cartpole(6), 0, 6)
    actor = _actor(whole.env, memory, members=3)
    expected = _chunks(whole, actor, 0, 4)
    stopped = ControlStream(_cartpole(6), 0, 6)
    _chunks(stopped, actor, 0, after)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    again = ControlStream(_cartpole(6), 0, 6)
    again.load_state_dict(torch.load(file, weights_only=True))
    found = _chunks(again, _actor(again.env, memory, members=3), after, 4)
    for one, other in zip(expected[after:], found, strict=True):
        _assert_equal(one, other)
    assert sum(int((chunk["terminated"] | chunk["truncated"]).sum()) for chunk in found) > 6


def test_a_saved_state_is_a_copy():
    stream = ControlStream(_cartpole(4), 0, 4)
    actor = _actor(stream.env, "stack")
    _chunks(stream, actor, 0, 1)
    state = stream.state_dict()
    kept = [value.clone() for value in _leaves(state)]
    _chunks(stream, actor, 1, 3)
    for before, after in zip(kept, _leaves(state), strict=True):
        assert torch.equal(before, after)


def _leaves(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in _leaves(value)]
    return [state] if isinstance(state, Tensor) else []


@pytest.mark.parametrize("memory", ["none", "lstm"])
def test_ranks_share_out_one_stream(memory):
    """Environments 0 to 3 and 4 to 7 of eight, each by itself, do what they do together, up to rounding of products."""
    whole = ControlStream(_cartpole(8), 0, 8)
    parts = [ControlStream(_cartpole(4), first, 8) for first in (0, 4)]
    actors = [_actor(one.env, memory, members=3) for one in (whole, *parts)]
    expected = _chunks(whole, actors[0], 0, 2)
    halves = [_chunks(one, actor, 0, 2) for one, actor in zip(parts, actors[1:], strict=True)]
    for number, chunk in enumerate(expected):
        for name, value in chunk.items():
            both = torch.cat([half[number][name] for half in halves])
            if value.is_floating_point():
                torch.testing.assert_close(both, value, atol=1e-4, rtol=1e-4, msg=name)
            else:
                assert torch.equal(both, value), name


def test_shares_are_bitwise_where_nothing_is_multiplied_across_rows():
    """Starts, draws and noise are an environment's own: actions of a policy of zeros are noise alone."""

    def chunk(first: int, count: int) -> TensorDict:
        stream = ControlStream(Pendulum(count, horizon=6), first, 8)
        actor = _actor(stream.env)
        for value in actor.agent.policies.all.values():
            value.zero_()
        return _chunks(stream, actor, 0, 1)[0]

    whole, parts = chunk(0, 8), [chunk(0, 2), chunk(2, 5), chunk(7, 1)]
    for name in ("observation", "next_observation", "action", "reward", "truncated", "return_so_far"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
    assert len(whole["observation"][:, 0, 2].unique()) == 8
    assert len(whole["action"].flatten().unique()) > 150


def test_a_new_key_starts_afresh_and_an_old_one_again():
    stream = ControlStream(_cartpole(4), 0, 4)
    actor = _actor(stream.env, "stack", members=2)
    first, second = _chunks(stream, actor, 0, 2, key=1)
    (other,) = _chunks(stream, actor, 0, 1, key=2)
    assert bool(other["fresh"][:, 0].all())
    assert not bool(second["fresh"][:, 0].all())
    assert not torch.equal(other["observation"], first["observation"])
    (again,) = _chunks(stream, actor, 0, 1, key=1)
    _assert_equal(first, again)


def test_chunks_draw_other_noise_and_the_runs_seed_counts(monkeypatch):
    stream = ControlStream(Pendulum(3, horizon=20), 0, 3)
    actor = _actor(stream.env)
    for value in actor.agent.policies.all.values():
        value.zero_()
    first, second = _chunks(stream, actor, 0, 2)
    assert not torch.isclose(first["action"], second["action"]).any()
    assert not torch.equal(first["observation"][:, 0], second["observation"][:, 0])  # new episodes begin elsewhere
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    other = _chunks(ControlStream(Pendulum(3, horizon=20), 0, 3), actor, 0, 1)[0]
    assert not torch.isclose(first["action"], other["action"]).any()
    assert not torch.isclose(first["observation"][:, 0], other["observation"][:, 0]).all()


def test_sums_of_rewards_equal_a_loop_over_chunks():
    stream = ControlStream(_cartpole(5), 0, 5)
    chunks = _chunks(stream, _actor(stream.env), 0, 3)
    reward, fresh, so_far, discounted = (
        torch.cat([chunk[name] for chunk in chunks], 1)
        for name in ("reward", "fresh", "return_so_far", "discounted_return")
    )
    assert so_far.dtype == discounted.dtype == torch.float64
    for env in range(5):
        total, faded = 0.0, 0.0
        for t in range(60):
            if fresh[env, t]:
                total, faded = 0.0, 0.0
            total += float(reward[env, t])
            faded = 0.9 * faded + float(reward[env, t])
            assert float(so_far[env, t]) == pytest.approx(total, abs=1e-12)
            assert float(discounted[env, t]) == pytest.approx(faded, abs=1e-12)
    assert int(fresh.sum()) > 10


def test_what_follows_an_episodes_end_is_of_the_old_episode():
    """The integrator adds actions up: also at the end of an episode, although the next one begins at 0."""
    env = IntegratorGame(3, horizon=7)
    actor = _actor(env, "stack")
    chunk = _chunks(ControlStream(env, 0, 3), actor, 0, 1)[0]
    after = chunk["observation"] + chunk["action"]
    assert torch.equal(chunk["next_observation"], after)
    done, fresh = chunk["truncated"], chunk["fresh"]
    assert done.nonzero()[:, 1].tolist() == [6, 13] * 3
    assert torch.equal(fresh[:, 1:], done[:, :-1])
    assert bool(fresh[:, 0].all())
    goes_on = ~done[:, :-1]
    assert torch.equal(chunk["observation"][:, 1:][goes_on], chunk["next_observation"][:, :-1][goes_on])
    assert not chunk["observation"][fresh].any()
    assert not torch.equal(chunk["next_observation"][done], torch.zeros(6, 1))


def test_terminated_and_truncated_exclude_each_other_and_lengths_are_the_envs():
    env = _cartpole(16)
    chunks = _chunks(ControlStream(env, 0, 16), _actor(env), 0, 4)
    terminated, truncated, total = (
        torch.cat([chunk[name] for chunk in chunks], 1) for name in ("terminated", "truncated", "return_so_far")
    )
    assert bool(terminated.any())
    assert bool(truncated.any())
    assert not bool((terminated & truncated).any())
    assert (total[truncated] == 25).all()  # a reward of 1 a step
    assert (total[terminated] <= 25).all()


class Unstable(Pendulum):
    """Rewards are not finite from the third step on."""

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        reward, terminated = super()._step_all(action, parameters, rows)
        return torch.where(self.elapsed > 1, math.nan, reward), terminated


def test_numbers_that_are_not_finite_stop_the_run():
    env = Unstable(2, horizon=9)
    with pytest.raises(ValueError, match="pendulum: an observation or reward is not finite"):
        _chunks(ControlStream(env, 0, 2), _actor(env), 0, 1)


class Forgetful(Pendulum):
    exact_resume = False


def test_environments_that_cannot_go_on_start_new_episodes():
    stream = ControlStream(Forgetful(3, horizon=50), 0, 3)
    actor = _actor(stream.env)
    _chunks(stream, actor, 0, 1)
    again = ControlStream(Forgetful(3, horizon=50), 0, 3)
    again.load_state_dict(stream.state_dict())
    assert bool(_chunks(again, actor, 1, 2)[0]["fresh"][:, 0].all())


# -- starts -----------------------------------------------------------------------------------------------------------
def test_counter_uniforms_are_uniform_and_unrelated():
    """100,000 numbers: mean, variance, and correlations of neighbours within six standard errors."""
    index = torch.arange(250).repeat_interleave(100)
    episode = torch.arange(100).repeat(250)
    drawn = counter_uniforms(99, index, episode, 4)
    assert drawn.dtype == torch.float64
    assert 0 <= float(drawn.min()) < 1e-3
    assert 1 - 1e-3 < float(drawn.max()) < 1
    assert len(drawn.flatten().unique()) == 100_000
    assert abs(float(drawn.mean()) - 0.5) < 6 * math.sqrt(1 / 12 / 1e5)
    assert abs(float(drawn.var()) - 1 / 12) < 6 * math.sqrt(1 / 180 / 1e5)
    table = drawn.view(250, 100, 4) - 0.5
    for one, other in (
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table[..., 1:], table[..., :-1]),
        (table, counter_uniforms(100, index, episode, 4).view(250, 100, 4) - 0.5),
    ):
        assert abs(float((one * other).mean()) * 12) < 6 / math.sqrt(one.numel())
    rows = torch.tensor([7, 24_999, 3])
    assert torch.equal(counter_uniforms(99, index[rows], episode[rows], 4), drawn[rows])


# -- whole episodes ---------------------------------------------------------------------------------------------------
def _played(env: ControlEnv, actor: GameActor, groups: int, episodes: int, rank: int = 0, world: int = 1, **kwargs):
    with torch.no_grad():
        return play_episodes(env, EpisodesRequest(actor, groups, episodes, (4,), **kwargs), rank, world)


@pytest.mark.parametrize("memory", ["none", "stack", "lstm"])
def test_returns_equal_a_plain_loop(memory):
    """One copy after the other, until it says that it is done; agent and adversary act by their means."""
    env = _cartpole(7)
    played = _played(env, _actor(env, memory, sampled=False, learner="none"), 1, 7)
    starts = stream_seed(global_seed(), rollouts._STARTS, 4)
    lengths = []
    for episode in range(7):
        one = _cartpole(1)
        actor = _actor(one, memory, sampled=False, learner="none")
        one.restart(counter_uniforms(starts, torch.tensor([episode]), torch.tensor([0]), one.reset_size))
        carry, fresh, total, length, done = actor.begin(1), torch.ones(1, dtype=torch.bool), 0.0, 0, False
        while not done:
            draw, noise = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 0)
            step = actor.act(one.observe(), carry, fresh if length == 0 else None, draw, noise, None)
            carry, (reward, terminated, truncated) = step.carry, one.advance(step.action)
            total, length = total + float(reward), length + 1
            done = bool(terminated | truncated)
        assert float(played["episode_return"][0, episode]) == pytest.approx(total, abs=1e-6)
        assert int(played["episode_length"][0, episode]) == length
        lengths.append(length)
    assert len(set(lengths)) > 1


def test_groups_begin_alike_and_draw_the_same_numbers():
    """Groups of the same players have the same episodes, whatever the group beside them does."""
    env = Pendulum(4 * 6, horizon=12)
    cells = torch.tensor([[0, 1], [2, 0], [0, 1], [-1, -1]])
    played = _played(env, _actor(env, members=3, learner="none", cells=cells), 4, 6)
    returns = played["episode_return"]
    torch.testing.assert_close(returns[0], returns[2], atol=1e-3, rtol=1e-5)
    assert not torch.isclose(returns[0], returns[1], atol=1e-2).any()
    assert len(returns[0].unique()) == 6


def test_two_ranks_play_one_ranks_episodes():
    cells = torch.tensor([[0, 1], [2, 0], [-1, -1]])
    env = _cartpole(3 * 8)
    whole = _played(env, _actor(env, "stack", members=3, learner="none", cells=cells), 3, 8)
    halves = []
    for rank in range(2):
        env = _cartpole(3 * 4)
        halves.append(_played(env, _actor(env, "stack", members=3, learner="none", cells=cells), 3, 8, rank, 2))
    assert torch.equal(whole["episode_length"], torch.cat([half["episode_length"] for half in halves], 1))
    for name in ("episode_return", "max_linf", "max_step_linf"):
        torch.testing.assert_close(whole[name], torch.cat([half[name] for half in halves], 1), atol=1e-5, rtol=1e-5)
    assert len(whole["episode_length"].unique()) > 2


def test_a_trace_holds_the_first_groups_first_episodes():
    env = _cartpole(2 * 5)
    played = _played(env, _actor(env, learner="none", detail=True), 2, 5, trace=3)
    trace = played["trace"]
    length = int(played["episode_length"].max())
    assert trace["observation"].shape == (2, 5, length, 4)
    assert not trace["observation"][1].any()
    assert not trace["observation"][0, 3:].any()
    running = trace["running"][0, :3]
    assert torch.equal(running.sum(-1), played["episode_length"][0, :3])
    sums = torch.where(running, trace["reward"][0, :3], 0.0).sum(-1)
    torch.testing.assert_close(sums.double(), played["episode_return"][0, :3])
    largest = torch.where(running, trace["perturbation"][0, :3].abs().amax(-1), 0.0).amax(-1)
    assert torch.equal(largest, played["max_linf"][0, :3])


# -- the datamodule ---------------------------------------------------------------------------------------------------
def _data(**kwargs: Any) -> ControlDataModule:
    return ControlDataModule("cartpole", **{"options": {"horizon": 25}, "envs": 8, "frames_per_batch": 96, **kwargs})


def _ranked(rank: int, world: int, **kwargs: Any) -> ControlDataModule:
    data = _data(**kwargs)
    data.rank, data.world_size = rank, world
    data.setup("fit")
    return data


def test_the_datamodules_ranks_share_out_envs_and_episodes():
    one, two = _ranked(0, 1), [_ranked(rank, 2) for rank in range(2)]

    def asked(data: ControlDataModule, number: int) -> TensorDict:
        return data.rollout(RolloutRequest(_actor(_cartpole(1), "stack", members=2), "agent", (1,), number, 0.9))

    for number in range(2):
        whole, halves = asked(one, number), [asked(data, number) for data in two]
        assert whole.shape == (8, 12)
        assert torch.equal(whole["fresh"], torch.cat([half["fresh"] for half in halves]))
        observed = torch.cat([half["observation"] for half in halves])
        torch.testing.assert_close(whole["observation"], observed, atol=1e-4, rtol=1e-4)
    request = EpisodesRequest(_actor(_cartpole(1), learner="none"), 2, 6, (1,))
    whole, halves = one.episodes(request), [data.episodes(request) for data in two]
    assert torch.equal(whole["episode_length"], torch.cat([half["episode_length"] for half in halves], 1))
    for data in (one, *two):
        data.teardown("fit")


def test_streams_by_name_have_environments_of_their_own():
    data = _ranked(0, 1)
    actor = _actor(_cartpole(1))
    first = data.rollout(RolloutRequest(actor, "agent", (1,), 0))
    data.rollout(RolloutRequest(actor, "adversary", (2,), 0))
    data.episodes(EpisodesRequest(_actor(_cartpole(1), learner="none"), 1, 4, (1,)))
    second = data.rollout(RolloutRequest(actor, "agent", (1,), 1))
    undisturbed = _ranked(0, 1)
    for number, chunk in enumerate((first, second)):
        _assert_equal(chunk, undisturbed.rollout(RolloutRequest(actor, "agent", (1,), number)))


def test_the_datamodule_goes_on_bitwise():
    """Both streams, one of which is asked for only after the next checkpoint."""

    def ask(data: ControlDataModule, name: str, number: int) -> TensorDict:
        actor = _actor(_cartpole(1), "lstm", members=2)  # as modules do, one for each request
        return data.rollout(RolloutRequest(actor, name, (1,), number, 0.9))

    whole = _ranked(0, 1)
    for number in range(2):
        ask(whole, "agent", number)
        ask(whole, "adversary", number)

    def moved(data: ControlDataModule) -> ControlDataModule:
        file = io.BytesIO()
        torch.save([data.state_dict(), data.rank_state_dict()], file)
        file.seek(0)
        state, rank_state = torch.load(file, weights_only=True)
        other = _ranked(0, 1)
        other.load_state_dict(state)
        other.load_rank_state_dict(rank_state)
        return other

    again = moved(whole)
    _assert_equal(ask(whole, "agent", 2), ask(again, "agent", 2))
    later = moved(again)
    _assert_equal(ask(whole, "adversary", 2), ask(later, "adversary", 2))
    _assert_equal(ask(whole, "agent", 3), ask(later, "agent", 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"envs": 0}, "ControlDataModule: envs must be >= 1, got 0"),
        ({"frames_per_batch": 0}, "frames_per_batch must be >= 1, got 0"),
        ({"frames_per_batch": 100}, r"frames_per_batch must be a multiple of envs \(8\), got 100"),
    ],
)
def test_counts_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _data(**kwargs)


def test_shares_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="envs must be a multiple of the 3 ranks, got 8"):
        _ranked(0, 3)
    data = _ranked(0, 2)
    with pytest.raises(ValueError, match="episodes must be a multiple of the 2 ranks, got 5"):
        data.episodes(EpisodesRequest(_actor(_cartpole(1)), 1, 5, (1,)))


def test_unknown_tasks_and_options_are_refused_at_setup():
    data = ControlDataModule("cartpol")
    with pytest.raises(ValueError, match="unknown 'cartpol'; the nearest are cartpole"):
        data.setup("fit")
    data = _data(options={"length": 3})
    with pytest.raises(ValueError, match="options of cartpole"):
        data.setup("fit")


def test_modules_that_ask_for_no_rollouts_are_refused():
    data = _ranked(0, 1)
    data.trainer = SimpleNamespace(lightning_module=torch.nn.Linear(1, 1))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="Linear does not learn from control rollouts"):
        data.learner()
    with pytest.raises(ValueError, match=r"Linear has no evaluation_names\(\)"):
        data.evaluator()


@pytest.mark.parametrize(("kwargs", "field"), [({"envs": 4}, "envs"), ({"frames_per_batch": 48}, "frames_per_batch")])
def test_a_checkpoint_of_other_counts_is_refused(kwargs, field):
    with pytest.raises(ValueError, match=f"{field}: the checkpoint has .*, the config .*: keep them equal"):
        _data(**kwargs).load_state_dict(_data().state_dict())
    with pytest.raises(ValueError, match="task: the checkpoint has pendulum"):
        _data().load_state_dict({**_data().state_dict(), "task": "pendulum"})


def test_the_digest_tells_tasks_options_and_copies_apart():
    digests = [_data(**kwargs).digest() for kwargs in ({}, {"envs": 4}, {"options": {}})]
    digests.append(ControlDataModule("pendulum", options={"horizon": 25}, envs=8, frames_per_batch=96).digest())
    assert len({str(sorted(digest.items())) for digest in digests}) == 4
