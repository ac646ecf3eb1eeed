from __future__ import annotations

import pytest
import torch
from counting_env import Counting

from datamodules.envs.foraging import Foraging
from datamodules.envs.matrix_games import MatrixGame
from datamodules.marl_data import MARLDataModule
from datamodules.rollout.evaluation import play_episodes, team_return


class _Always:
    """Takes the same action for ever, if it is available, else 0; remembers whether it was told to explore."""

    def __init__(self, action: int) -> None:
        self.action, self.frames = action, set()

    def begin(self, observation, state, generator, frames):
        return {}

    def act(self, observation, legal, carry, generator, frames):
        self.frames.add(frames)
        action = torch.full(observation.shape[:2], self.action)
        if legal is not None:
            action = torch.where(legal[..., self.action], action, 0)
        return action, carry


def test_returns_and_lengths_by_hand():
    """Action 1 pays each of two agents 1 a step until the copy's own end."""
    env, actor = Counting(64, limit=7), _Always(1)
    result = play_episodes(env, actor, seed=3)
    length = result["episode_length"]
    assert torch.equal(result["episode_return"], 2.0 * length)
    assert torch.equal(result["agent_return"], length.float().unsqueeze(1).expand(64, 2))
    assert int(length.min()) == 1
    assert int(length.max()) == 7
    assert actor.frames == {None}


def test_masks_reach_the_actor():
    """Action 2 is available from the third step on: an episode of n steps pays each agent 2 * (n - 2)."""
    result = play_episodes(Counting(64, limit=7), _Always(2), seed=3)
    expected = 2.0 * 2.0 * (result["episode_length"] - 2).clamp_min(0)
    assert torch.equal(result["episode_return"], expected)


def test_a_common_reward_counts_once():
    result = play_episodes(MatrixGame(3, rounds=4), _Always(0), seed=0)
    assert result["episode_return"].tolist() == [44.0] * 3
    assert team_return(torch.tensor([[1.0, 1.0, 1.0]]), True).tolist() == [1.0]
    assert team_return(torch.tensor([[1.0, 0.5, 0.25]]), False).tolist() == [1.75]


@pytest.mark.parametrize("played", [0, 1])
def test_a_seed_brings_back_its_starts(played):
    """Whatever was played before in the same environment."""
    env = Foraging(32, rows=5, columns=5, agents=2, food=2, episode_limit=20)
    for number in range(played):
        play_episodes(env, _Always(1), seed=100 + number)
    first = play_episodes(env, _Always(5), seed=1)
    starts = {name: value.clone() for name, value in env.fields.items()}
    again = play_episodes(env, _Always(5), seed=1)
    for name, value in env.fields.items():
        assert torch.equal(value, starts[name])
    assert torch.equal(first["agent_return"], again["agent_return"])
    play_episodes(env, _Always(5), seed=2)
    assert any(not torch.equal(value, starts[name]) for name, value in env.fields.items())


def test_a_trace_holds_every_step():
    env = Counting(32, limit=7)
    result = play_episodes(env, _Always(2), seed=3, trace=True)
    plain = play_episodes(Counting(32, limit=7), _Always(2), seed=3)
    for name in ("episode_return", "agent_return", "episode_length"):
        assert torch.equal(result[name], plain[name])
    trace = result["trace"]
    steps = int(result["episode_length"].max())
    assert trace["action"].shape == (32, steps, 2)
    assert trace["observation"].shape == (32, steps + 1, 2, 2)
    assert trace["state"].shape == (32, steps + 1, 1)
    running = trace["running"]
    assert torch.equal(running.sum(1), result["episode_length"])
    assert torch.equal((trace["reward"] * running.unsqueeze(-1)).sum(1), result["agent_return"])
    # what is seen before the first step and after the last one; who acted on what was available
    assert torch.equal(trace["observation"][..., 1], torch.arange(steps + 1.0).view(1, -1, 1).expand(32, -1, 2))
    assert torch.equal(trace["state"][..., 0], trace["observation"][:, :, 0, 1])
    taken = trace["legal"][:, :-1].gather(-1, trace["action"].unsqueeze(-1))
    assert bool(taken.all())
    last = result["episode_length"] - 1
    ends = (trace["terminated"] | trace["truncated"])[torch.arange(32), last]
    assert bool(ends.all())


def test_teams_play_on_demand_apart_from_training():
    data = MARLDataModule("lbf/5x5-2p-1f", envs=4, frames_per_batch=8, options={"episode_limit": 9})
    data.setup("test")
    assert data.reference_return == 1.0
    assert data.spec.idle_action == 0
    first = data.team_episodes(_Always(1), 16, 5)
    other = data.team_episodes(_Always(1), 16, 6, trace=True)
    with torch.inference_mode():
        again = data.team_episodes(_Always(1), 16, 5, trace=True)
        assert not again["trace", "observation"].is_inference()
    assert torch.equal(first["agent_return"], again["agent_return"])
    assert not torch.equal(again["trace", "observation"][:, 0], other["trace", "observation"][:, 0])
    data.team_episodes(_Always(1), 16, 5)  # the environments of an inference run go on without it
    data.teardown("test")
    given = MARLDataModule("matrix/penalty-100", reference_return=7.0, envs=4, frames_per_batch=8)
    given.setup("test")
    assert given.reference_return == 7.0
    bound = MARLDataModule("matrix/penalty-100", envs=4, frames_per_batch=8)
    bound.setup("test")
    assert (bound.reference_return, bound.spec.idle_action) == (10.0, None)
    with pytest.raises(ValueError, match="MARLDataModule: reference_return must be finite, got nan"):
        MARLDataModule("matrix/climbing", reference_return=float("nan"))
