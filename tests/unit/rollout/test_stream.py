"""Both streams against each other, against TorchRL's own rollout, and the lag between acting and learning."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from counting_env import Counting
from emax_batches import make_learner
from tensordict import TensorDict

from datamodules.envs.base import MultiAgentEnv
from datamodules.envs.foraging import Foraging
from datamodules.envs.matrix_games import MatrixGame
from datamodules.rollout.stream import CollectorStream, Stream, TensorStream
from modules.contracts import MultiAgentSpec
from modules.emax import AgentNetwork, Ensemble, Explorer, Mixing, ValueMARL

EXPLORERS = ("epsilon_greedy", "ucb", "thompson_member", "boltzmann")


def _env(name: str, seed: int = 0) -> MultiAgentEnv:
    if name == "matrix":
        return MatrixGame(6, rounds=3, seed=seed)
    if name == "foraging":
        return Foraging(6, rows=5, columns=5, food=1, coop=True, episode_limit=8, seed=seed)
    return Counting(6, seed=seed)


def _spec(env: MultiAgentEnv) -> MultiAgentSpec:
    return MultiAgentSpec(
        "test",
        env.num_agents,
        env.num_actions,
        env.observation_size,
        env.state_size,
        env.episode_limit,
        env.own_state,
        env.restricts_actions,
        env.common_reward,
    )


def _learner(env: MultiAgentEnv, kind: str = "ucb", recurrent: bool = True, prior: float = 0.0) -> ValueMARL:
    return make_learner(
        _spec(env),
        ensemble=Ensemble(3, prior_scale=prior),
        explorer=Explorer(kind=kind, epsilon_start=0.3, epsilon_finish=0.0, epsilon_frames=200),  # pyright: ignore
        network=AgentNetwork(hidden=8, recurrent=recurrent),
        mixing=Mixing("vdn"),
    )


def _stream(kind: str, env: MultiAgentEnv, learner: ValueMARL, steps: int = 5) -> Stream:
    generator = torch.Generator().manual_seed(1)
    if kind == "tensor":
        return TensorStream(env, learner, generator)
    return CollectorStream(env, learner.policy, generator, steps)


def _assert_equal(one: TensorDict, other: TensorDict) -> None:
    assert set(one.keys()) == set(other.keys())
    for name in one.keys():  # noqa: SIM118 - a TensorDict
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("env", ["matrix", "foraging", "counting"])
@pytest.mark.parametrize("explorer", EXPLORERS)
@pytest.mark.parametrize("recurrent", [False, True])
def test_both_streams_give_the_same_chunks(env, explorer, recurrent):
    streams = []
    for kind in ("tensor", "torchrl"):
        made = _env(env)
        streams.append(_stream(kind, made, _learner(made, explorer, recurrent, prior=0.5)))
    ended = 0
    for chunk in range(6):
        ours, theirs = (stream.collect(5, 30 * chunk) for stream in streams)
        _assert_equal(ours, theirs)
        ended += int((ours["terminated"] | ours["truncated"]).sum())
    assert ended > 10
    for stream in streams:
        stream.close()


def test_chunks_say_what_happened():
    """Consistent with themselves and with the rules of ``Counting``, over the ends of episodes and of chunks."""
    env = _env("counting")
    stream = _stream("tensor", env, _learner(env))
    chunk = cast(TensorDict, torch.cat([stream.collect(5, 0) for _ in range(20)], 1))  # pyright: ignore
    done = chunk["terminated"] | chunk["truncated"]
    assert not (chunk["terminated"] & chunk["truncated"]).any()
    assert bool(chunk["first"][:, 0].all())
    assert torch.equal(chunk["first"][:, 1:], done[:, :-1])
    number, steps = chunk["observation"][..., 0, :].unbind(-1)
    after_number, after_steps = chunk["next_observation"][..., 0, :].unbind(-1)
    assert torch.equal(number, after_number)  # an episode's last observation is not the next one's first
    assert torch.equal(after_steps, steps + 1)
    assert torch.equal(steps[chunk["first"]], torch.zeros(int(chunk["first"].sum())))
    going = ~done[:, :-1]
    assert torch.equal(chunk["observation"][:, 1:][going], chunk["next_observation"][:, :-1][going])
    assert torch.equal(chunk["legal"][:, 1:][going], chunk["next_legal"][:, :-1][going])
    assert len(set(number[chunk["first"]].tolist())) == int(chunk["first"].sum())
    assert torch.equal(chunk["reward"], chunk["action"].float())
    assert torch.equal(chunk["state"], chunk["observation"][..., 0, 1:])
    assert bool(chunk["legal"].gather(-1, chunk["action"].unsqueeze(-1)).all())
    assert bool((chunk["truncated"] <= (after_steps == env.episode_limit)).all())


def test_only_what_an_environment_has_is_in_its_chunks():
    for name, extra in (("matrix", set()), ("counting", {"legal", "next_legal", "state", "next_state"})):
        env = _env(name)
        for kind in ("tensor", "torchrl"):
            names = set(_stream(kind, env, _learner(env)).collect(5, 0).keys())
            assert names == extra | {
                "observation", "next_observation", "action", "reward", "terminated", "truncated", "first"
            }  # fmt: skip


def test_a_policy_forgets_at_the_end_of_an_episode():
    """Hidden states and drawn members are the episode's: replayed alone, each episode gives the same actions."""
    env = _env("counting")
    learner = make_learner(
        _spec(env),
        ensemble=Ensemble(3),
        explorer=Explorer(kind="ucb", epsilon_start=0.0, epsilon_finish=0.0),
        network=AgentNetwork(hidden=8, recurrent=True),
    )
    chunk = _stream("tensor", env, learner).collect(40, 0)
    done, checked = chunk["terminated"] | chunk["truncated"], 0
    for row in range(env.envs):
        start = 0
        for step in range(40):
            if bool(done[row, step]):
                seen = chunk["observation"][row, start : step + 1].unsqueeze(0)
                values = learner.agents.sequence(learner.online.detach(), seen)[:, 0]
                bonus = values.mean(0) + values.std(0, correction=0)
                bonus = torch.where(chunk["legal"][row, start : step + 1], bonus, -torch.inf)
                assert torch.equal(bonus.argmax(-1), chunk["action"][row, start : step + 1])
                start, checked = step + 1, checked + 1
    assert checked > 20


@pytest.mark.parametrize("kind", ["tensor", "torchrl"])
@pytest.mark.parametrize("explorer", ["ucb", "thompson_member"])
def test_a_restored_stream_goes_on_where_it_was(kind, explorer):
    def fresh(seed: int) -> Stream:
        env = _env("foraging", seed)
        return _stream(kind, env, _learner(env, explorer))

    stream = fresh(0)
    for chunk in range(3):
        stream.collect(5, 30 * chunk)
    state = stream.state_dict()
    other = fresh(7)
    other.collect(5, 0)
    other.load_state_dict(state)
    for chunk in range(3, 6):
        _assert_equal(stream.collect(5, 30 * chunk), other.collect(5, 30 * chunk))


def test_schedules_see_the_frames_of_the_whole_run():
    """Epsilon falls from 1 to 0 over 200 frames: later chunks are greedy."""
    env = _env("matrix")
    explorer = Explorer(kind="epsilon_greedy", epsilon_start=1.0, epsilon_finish=0.0, epsilon_frames=200)
    learner = make_learner(_spec(env), explorer=explorer)
    greedy, _ = learner.act(torch.ones(6, 2, 1), None, {}, torch.Generator(), None)
    stream = _stream("tensor", env, learner)
    assert not torch.equal(stream.collect(5, 0)["action"], greedy.unsqueeze(1).expand(6, 5, 2))
    assert torch.equal(stream.collect(5, 200)["action"], greedy.unsqueeze(1).expand(6, 5, 2))


def test_another_number_of_steps_than_the_collectors_is_named():
    env = _env("matrix")
    with pytest.raises(ValueError, match="CollectorStream: steps must be 5 as the collector was made, got 6"):
        _stream("torchrl", env, _learner(env)).collect(6, 0)


# -- lag --------------------------------------------------------------------------------------------------------------
class Watched(ValueMARL):
    """Notes which weights acted for a batch, and which there are when it is learnt from."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.acted: set[float] = set()
        self.lags: list[tuple[set[float], float]] = []

    def _fingerprint(self) -> float:
        return float(self.online.detach().double().sum())

    def act(self, observation, legal, carry, generator, frames):
        if frames is not None:
            self.acted.add(self._fingerprint())
        return super().act(observation, legal, carry, generator, frames)

    def training_step(self, batch, batch_idx):
        self.lags.append((self.acted, self._fingerprint()))
        self.acted = set()
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("collector", ["tensor", "torchrl"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_data_are_collected_by_the_newest_policy(tmp_path, collector, recurrent):
    """All frames since the step before were acted by exactly the weights that are about to be updated."""
    from lightning.pytorch import Trainer

    from datamodules.marl_data import MARLDataModule

    learner = Watched(network=AgentNetwork(hidden=8, recurrent=recurrent), explorer=Explorer(epsilon_start=0.2))
    data = MARLDataModule(
        "lbf/5x5-2p-1f-coop",
        options={"episode_limit": 5},
        envs=4,
        frames_per_batch=16,
        updates_per_batch=2,
        total_frames=400,
        learning_starts=80,
        batch_size=4,
        capacity=500,
        collector=collector,
        evaluation_episodes=4,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=5,
        default_root_dir=tmp_path,
    )
    trainer.fit(learner, data)
    assert len(learner.lags) == data.batches == 21
    for acted, learning in learner.lags:
        assert acted == {learning}
    assert len({learning for _, learning in learner.lags}) == 21
    assert data.frames == 400
