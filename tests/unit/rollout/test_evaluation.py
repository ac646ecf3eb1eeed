from __future__ import annotations

import pytest
import torch
from counting_env import Counting

from datamodules.envs.foraging import Foraging
from datamodules.envs.matrix_games import MatrixGame
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
