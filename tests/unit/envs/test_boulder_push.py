"""Boulder-Push: hand-made cases of its rules, both ways of stepping, and exact positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from env_steps import assert_snapshot_goes_on_exactly, assert_torchrl_steps_as_without_tensordicts
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from datamodules.envs.boulder_push import BoulderPush

NONE, NORTH, SOUTH, WEST, EAST = range(5)


class InOrder(BoulderPush):
    """Agents move in a given order."""

    turns: list[int]

    def _turns(self) -> Tensor:
        return torch.tensor(self.turns).unsqueeze(1).expand(-1, self.envs).contiguous()


def board(agents: list[tuple[int, int]], boulder: tuple[int, int], direction: int, **options: Any) -> InOrder:
    env = InOrder(1, **{"height": 6, "width": 6, "agents": len(agents), **options})
    env.turns = list(range(len(agents)))
    env.inject(torch.tensor([agents]), torch.tensor([boulder]), torch.tensor([direction - 1]))
    return env


def step(env: BoulderPush, *actions: int) -> tuple[list[float], bool, bool]:
    reward, terminated, truncated = env.advance(torch.tensor([actions]))
    return reward[0].tolist(), bool(terminated), bool(truncated)


@pytest.mark.parametrize(
    ("direction", "agents", "boulder", "pushes"),
    [
        (NORTH, [(3, 2), (3, 3)], (2, 2), 2),
        (SOUTH, [(2, 3), (2, 2)], (3, 2), 2),
        (WEST, [(2, 4), (3, 4)], (2, 3), 3),
        (EAST, [(3, 1), (2, 1)], (2, 2), 3),
    ],
)
def test_pushing_to_the_goal(
    direction: int, agents: list[tuple[int, int]], boulder: tuple[int, int], pushes: int
) -> None:
    env = board(agents, boulder, direction, push_reward=0.25, goal_reward=2.0)
    start, stone = env.positions(), env.boulders()
    way = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)][direction - 1])
    for push in range(1, pushes + 1):
        last = push == pushes
        assert step(env, direction, direction) == ([2.25 if last else 0.25] * 2, last, False)
        assert torch.equal(env.positions(), start + push * way)
        assert torch.equal(env.boulders(), stone + push * way)
    # nobody restarted the board: the boulder stays at its goal, and running into it costs the penalty
    reward, terminated, _ = step(env, direction, direction)
    assert reward == pytest.approx([-0.01, -0.01])
    assert not terminated
    assert torch.equal(env.boulders(), stone + pushes * way)


@pytest.mark.parametrize(
    ("actions", "reward", "after"),
    [
        ([NORTH, NONE], [-0.5, 0.0], [[3, 2], [3, 3]]),  # pushes alone
        ([NONE, NORTH], [0.0, -0.5], [[3, 2], [3, 3]]),
        ([NORTH, EAST], [-0.5, 0.0], [[3, 2], [3, 4]]),  # the other leaves
        ([WEST, WEST], [0.0, 0.0], [[3, 1], [3, 2]]),  # the second follows the first
        ([EAST, EAST], [0.0, 0.0], [[3, 2], [3, 4]]),  # the first comes too early
        ([EAST, WEST], [0.0, 0.0], [[3, 2], [3, 3]]),  # no swap
        ([SOUTH, SOUTH], [0.0, 0.0], [[4, 2], [4, 3]]),
    ],
)
def test_no_push(actions: list[int], reward: list[float], after: list[list[int]]) -> None:
    env = board([(3, 2), (3, 3)], (2, 2), NORTH, penalty=0.5)
    got, terminated, truncated = step(env, *actions)
    assert got == pytest.approx(reward)
    assert not terminated
    assert not truncated
    assert env.positions()[0].tolist() == after
    assert env.boulders()[0].tolist() == [[2, 2], [2, 3]]


@pytest.mark.parametrize(
    ("turns", "actions", "after"),
    [
        ([0, 1], [EAST, WEST], [[4, 3], [4, 4]]),  # both to (4, 3): who is first gets it
        ([1, 0], [EAST, WEST], [[4, 2], [4, 3]]),
        ([0, 1, 2], [EAST, EAST, EAST], [[4, 3], [4, 5], [4, 2]]),  # the third takes the cell that the first left
        ([2, 0, 1], [EAST, EAST, EAST], [[4, 3], [4, 5], [4, 1]]),
    ],
)
def test_agents_move_in_turns(turns: list[int], actions: list[int], after: list[list[int]]) -> None:
    agents = [(4, 2), (4, 4), (4, 1)][: len(turns)]
    env = board(agents, (2, 2), NORTH)
    env.turns = turns
    step(env, *actions)
    assert env.positions()[0].tolist() == after


def test_boulder_stops_agents_from_all_sides() -> None:
    env = board([(2, 1), (1, 2)], (2, 2), NORTH, penalty=0.5)
    assert step(env, EAST, SOUTH)[0] == [-0.5, -0.5]
    assert env.positions()[0].tolist() == [[2, 1], [1, 2]]
    # pushed from the wrong side by all it does not move either
    env = board([(1, 2), (1, 3)], (2, 2), NORTH, penalty=0.5)
    assert step(env, SOUTH, SOUTH)[0] == [-0.5, -0.5]
    assert env.boulders()[0].tolist() == [[2, 2], [2, 3]]


def test_board_ends_at_walls() -> None:
    env = board([(0, 0), (5, 5)], (2, 2), NORTH)
    assert step(env, NORTH, SOUTH)[0] == [0, 0]
    assert step(env, WEST, EAST)[0] == [0, 0]
    assert env.positions()[0].tolist() == [[0, 0], [5, 5]]


def test_coordinates() -> None:
    env = board([(4, 0), (2, 6), (0, 3)], (1, 1), WEST, height=5, width=7)
    seen = env.observe()[0][0]
    stone, west = [1 / 4, 1 / 6], [0, 0, 1, 0]
    places = [[1, 0], [2 / 4, 1], [0, 3 / 6]]
    for agent, (first, second) in enumerate([(1, 2), (0, 2), (0, 1)]):
        expected = torch.tensor([*places[agent], *stone, *west, *places[first], *places[second]])
        assert torch.equal(seen[agent], expected)


def test_windows() -> None:
    env = board([(0, 0), (1, 2)], (0, 1), EAST, height=4, width=4, sight=1)
    seen = env.observe()[0][0]
    east = [0, 0, 0, 1]
    assert seen[0].tolist() == [*east, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert seen[1].tolist() == [*east, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]


def test_without_noop_actions_are_directions() -> None:
    env = board([(3, 2), (3, 3)], (2, 2), NORTH, noop=False)
    assert env.num_actions == 4
    assert step(env, 0, 0)[0] == pytest.approx([0.1, 0.1])
    step(env, 1, 1)
    assert env.positions()[0].tolist() == [[3, 2], [3, 3]]
    step(env, 2, 3)
    assert env.positions()[0].tolist() == [[3, 1], [3, 4]]


@pytest.mark.parametrize(("kind", "flags"), [("terminated", (True, False)), ("truncated", (False, True))])
def test_time_limit(kind: Any, flags: tuple[bool, bool]) -> None:
    env = board([(0, 0), (5, 5)], (2, 2), NORTH, episode_limit=2, time_limit=kind)
    assert step(env, NONE, NONE)[1:] == (False, False)
    assert step(env, NONE, NONE)[1:] == flags


def test_restart_leaves_other_boards_alone() -> None:
    env = BoulderPush(6, seed=1)
    env.restart()
    env.advance(torch.randint(5, (6, 2)))
    before = env.snapshot()
    env.restart(torch.tensor([1, 4]))
    after = env.snapshot()
    kept = torch.tensor([0, 2, 3, 5])
    for name in ("fields.position", "fields.boulder", "fields.direction", "elapsed"):
        assert torch.equal(before[name][kept], after[name][kept])
    assert after["elapsed"].tolist() == [1, 0, 1, 1, 0, 1]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"agents": 1, "noop": False},
    {"agents": 4, "height": 4, "width": 5, "sight": 2, "episode_limit": 9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_specs(options: dict[str, Any]) -> None:
    check_env_specs(BoulderPush(5, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_observing_some_rows(options: dict[str, Any]) -> None:
    env = BoulderPush(5, **options)
    env.restart()
    for whole, part in zip(env.observe(), env.observe(torch.tensor([4, 1])), strict=True):
        assert torch.equal(whole[[4, 1]], part)


@pytest.mark.parametrize("options", OPTIONS)
def test_snapshot_goes_on_exactly(options: dict[str, Any]) -> None:
    assert_snapshot_goes_on_exactly(lambda envs, seed: BoulderPush(envs, **options, seed=seed))


@pytest.mark.parametrize("options", OPTIONS)
def test_torchrl_steps_as_without_tensordicts(options: dict[str, Any]) -> None:
    assert_torchrl_steps_as_without_tensordicts(lambda envs, seed: BoulderPush(envs, **options, seed=seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 2}, "height, width: must be >= 3"),
        ({"agents": 9}, "agents: the boulder is as wide, at most 8"),
        ({"agents": 0}, "num_agents must be >= 1"),
        ({"sight": 0}, "sight: must be >= 1"),
        ({"penalty": -1.0}, "penalty: must be >= 0"),
        ({"time_limit": "none"}, "time_limit: terminated or truncated"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoulderPush(2, **options)


@pytest.mark.parametrize(
    ("agents", "boulder", "direction", "message"),
    [
        ([(6, 0), (1, 1)], (2, 2), NORTH, "must be on the 6 by 6 board"),
        ([(0, 0), (1, 1)], (2, 5), NORTH, "must be on the 6 by 6 board"),
        ([(0, 0), (1, 1)], (5, 2), EAST, "must be on the 6 by 6 board"),
        ([(0, 0), (2, 3)], (2, 2), NORTH, "on the boulder or on each other"),
        ([(0, 0), (0, 0)], (2, 2), NORTH, "on the boulder or on each other"),
        ([(0, 0), (1, 1)], (2, 2), 5, r"direction: must be in \[0, 4\)"),
    ],
)
def test_bad_states(agents: list[tuple[int, int]], boulder: tuple[int, int], direction: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        board(agents, boulder, direction)


def test_bad_shapes() -> None:
    env = BoulderPush(2)
    with pytest.raises(ValueError, match="position: must be int64"):
        env.inject(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2))
