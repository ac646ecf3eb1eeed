"""Level-Based Foraging: hand-made cases of its rules, starts, both ways of stepping, and exact positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from env_steps import assert_snapshot_goes_on_exactly, assert_torchrl_steps_as_without_tensordicts
from torchrl.envs.utils import check_env_specs

from datamodules.envs.foraging import Foraging

NONE, NORTH, SOUTH, WEST, EAST, LOAD = range(6)


def board(
    places: list[tuple[int, int]], levels: list[int], food: dict[tuple[int, int], int], **options: Any
) -> Foraging:
    """One board in a given state; food maps cells to levels."""
    env = Foraging(1, **{"rows": 6, "columns": 6, "agents": len(places), "food": max(len(food), 1), **options})
    field = torch.zeros(1, env.rows, env.columns, dtype=torch.int64)
    for (row, column), level in food.items():
        field[0, row, column] = level
    env.inject(torch.tensor([places]), torch.tensor([levels]), field)
    return env


def step(env: Foraging, *actions: int) -> tuple[list[float], bool, bool]:
    reward, terminated, truncated = env.advance(torch.tensor([actions]))
    return reward[0].tolist(), bool(terminated), bool(truncated)


def places(env: Foraging) -> list[list[int]]:
    return env.positions()[0].tolist()


@pytest.mark.parametrize(
    ("before", "actions", "after"),
    [
        ([(0, 0), (5, 5)], [NORTH, EAST], [[0, 0], [5, 5]]),  # walls
        ([(5, 0), (5, 5)], [WEST, SOUTH], [[5, 0], [5, 5]]),
        ([(2, 1), (4, 2)], [EAST, NORTH], [[2, 1], [3, 2]]),  # food blocks, the other goes beside it
        ([(1, 1), (1, 3)], [EAST, WEST], [[1, 1], [1, 3]]),  # both name one cell
        ([(1, 1), (1, 2)], [EAST, NONE], [[1, 1], [1, 2]]),  # the other stays
        ([(1, 1), (1, 2)], [EAST, LOAD], [[1, 1], [1, 2]]),  # loading stays, with food at its feet
        ([(1, 1), (1, 2)], [EAST, WEST], [[1, 2], [1, 1]]),  # swap
        ([(0, 1), (0, 2)], [EAST, EAST], [[0, 2], [0, 3]]),  # follow
        ([(0, 1), (0, 2), (0, 4)], [EAST, EAST, WEST], [[0, 2], [0, 2], [0, 4]]),  # overlap: 1 and 2 fail, 0 moves on 1
        ([(4, 4), (4, 5), (5, 4), (5, 5)], [EAST, SOUTH, NORTH, WEST], [[4, 5], [5, 5], [4, 4], [5, 4]]),  # round
    ],
)
def test_moves(before: list[tuple[int, int]], actions: list[int], after: list[list[int]]) -> None:
    env = board(before, [1] * len(before), {(2, 2): 9}, max_food_level=9)
    step(env, *actions)
    assert places(env) == after


def test_loading_shares_by_level() -> None:
    # levels 1 and 2 load 3 together; the player of level 2 at the other food does not suffice for 3
    env = board([(1, 2), (2, 1), (4, 5)], [1, 2, 2], {(2, 2): 3, (4, 4): 3}, penalty=0.25)
    reward, terminated, _ = step(env, LOAD, LOAD, LOAD)
    assert reward == pytest.approx([1 * 3 / (3 * 6), 2 * 3 / (3 * 6), -0.25])
    assert not terminated
    assert env.field()[0].nonzero().tolist() == [[4, 4]]
    # players beside that do not load do not count, and a load with nothing beside costs nothing
    step(env, SOUTH, NONE, NONE)
    reward, *_ = step(env, LOAD, LOAD, NONE)
    assert reward == [0, 0, 0]


def test_one_alone_fails_where_coop_is_needed_and_all_food_ends_it() -> None:
    env = board([(1, 2), (3, 2)], [2, 1], {(2, 2): 3}, penalty=0.5)
    assert step(env, LOAD, NONE) == ([-0.5, 0.0], False, False)
    reward, terminated, truncated = step(env, LOAD, LOAD)
    assert reward == pytest.approx([2 / 3, 1 / 3])
    assert (terminated, truncated) == (True, False)


def test_raw_rewards() -> None:
    env = board([(1, 2), (3, 2)], [2, 1], {(2, 2): 3, (4, 4): 1}, normalise_reward=False)
    assert step(env, LOAD, LOAD)[0] == [6.0, 3.0]


def test_observation_lists_food_in_order_then_self_then_others() -> None:
    env = board([(0, 5), (2, 5), (3, 1)], [1, 2, 1], {(4, 1): 2, (2, 4): 1, (1, 2): 3})
    seen = env.observe()[0][0]
    food = [1, 2, 3, 2, 4, 1, 4, 1, 2]
    assert seen[0].tolist() == [*food, 0, 5, 1, 2, 5, 2, 3, 1, 1]
    assert seen[1].tolist() == [*food, 2, 5, 2, 0, 5, 1, 3, 1, 1]
    assert seen[2].tolist() == [*food, 3, 1, 1, 0, 5, 1, 2, 5, 2]
    step(env, NONE, LOAD, NONE)  # eats the second in the list
    seen = env.observe()[0][0]
    assert seen[2].tolist() == [1, 2, 3, 4, 1, 2, -1, -1, 0, 3, 1, 1, 0, 5, 1, 2, 5, 2]


def test_limited_sight() -> None:
    # from (1, 1) with sight 1 the window starts at (0, 0); a player at (2, 2) is seen, food at (3, 1) is not
    env = board([(1, 1), (2, 2), (5, 5)], [1, 2, 1], {(3, 1): 2, (3, 4): 1}, sight=1)
    seen = env.observe()[0][0]
    nothing = [-1, -1, 0]
    assert seen[0].tolist() == [*nothing, *nothing, 1, 1, 1, 2, 2, 2, *nothing]
    assert seen[1].tolist() == [2, 0, 2, *nothing, 1, 1, 2, 0, 0, 1, *nothing]  # window from (1, 1)
    assert seen[2].tolist() == [*nothing, *nothing, 1, 1, 1, *nothing, *nothing]
    # in the corner the window starts at the agent: players are seen two cells on, food one
    env = board([(0, 0), (2, 2), (0, 3)], [1, 1, 1], {(2, 1): 2, (3, 4): 1}, sight=1)
    assert env.observe()[0][0, 0].tolist() == [*nothing, *nothing, 0, 0, 1, 2, 2, 1, *nothing]


@pytest.mark.parametrize(("kind", "flags"), [("terminated", (True, False)), ("truncated", (False, True))])
def test_time_limit(kind: Any, flags: tuple[bool, bool]) -> None:
    env = board([(0, 0), (5, 5)], [1, 1], {(2, 2): 2}, episode_limit=3, time_limit=kind)
    assert step(env, NONE, NONE)[1:] == (False, False)
    assert step(env, NONE, NONE)[1:] == (False, False)
    assert step(env, NONE, NONE)[1:] == flags


@pytest.mark.parametrize("coop", [False, True])
@pytest.mark.parametrize(("agents", "food", "size"), [(2, 2, 8), (4, 4, 10), (5, 3, 6), (3, 9, 5)])
def test_starts_keep_the_rules(coop: bool, agents: int, food: int, size: int) -> None:
    env = Foraging(500, rows=size, columns=size, agents=agents, food=food, coop=coop, seed=3)
    env.restart()
    field, level = env.field(), env.fields["level"]
    assert bool(((level == 1) | (level == 2)).all())
    cells = env.fields["position"].sort(1).values
    assert bool((cells[:, 1:] > cells[:, :-1]).all())
    there = field > 0
    most = level.sort(1).values[:, :3].sum(1)
    assert bool((field.flatten(1).amax(1) <= most).all())
    if coop:
        assert bool(((field == most[:, None, None]) | ~there).all())
    assert not bool(there.flatten(1).gather(1, cells).any())
    assert not bool(there[:, [0, -1]].any())
    assert not bool(there[:, :, [0, -1]].any())
    near = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)] + [(0, 2), (0, -2), (2, 0), (-2, 0)]
    barred = torch.zeros_like(there)
    for down, across in near:  # nothing wraps onto food, as the border has none
        moved = torch.roll(there, (down, across), (1, 2))
        barred |= moved
        assert (down, across) == (0, 0) or not bool((there & moved).any())
    # there is less food than asked for only where no cell is left
    barred = barred.flatten(1).scatter(1, cells, True).view_as(there)
    full = barred[:, 1:-1, 1:-1].flatten(1).all(1)
    assert bool(((there.sum((1, 2)) == food) | full).all())
    assert bool((there.sum((1, 2)) == food).all()) == (size >= 8)
    assert bool((env.fields["spawned"] == field.sum((1, 2))).all())


def test_restart_leaves_other_boards_alone() -> None:
    env = Foraging(6, seed=1)
    env.restart()
    env.advance(torch.randint(6, (6, 2)))
    before = env.snapshot()
    env.restart(torch.tensor([1, 4]))
    after = env.snapshot()
    kept = torch.tensor([0, 2, 3, 5])
    for name in ("fields.position", "fields.food", "fields.level", "elapsed"):
        assert torch.equal(before[name][kept], after[name][kept])
    assert after["elapsed"].tolist() == [1, 0, 1, 1, 0, 1]
    full = env.observe()
    some = env.observe(torch.tensor([4, 1]))
    for whole, part in zip(full, some, strict=True):
        assert torch.equal(whole[[4, 1]], part)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"agents": 1, "food": 1},
    {"rows": 5, "columns": 5, "agents": 4, "sight": 2, "coop": True, "penalty": 0.1},
    {"rows": 6, "columns": 9, "agents": 3, "food": 4, "time_limit": "truncated", "episode_limit": 7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_specs(options: dict[str, Any]) -> None:
    check_env_specs(Foraging(5, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_snapshot_goes_on_exactly(options: dict[str, Any]) -> None:
    assert_snapshot_goes_on_exactly(lambda envs, seed: Foraging(envs, **options, seed=seed))


@pytest.mark.parametrize("options", OPTIONS)
def test_torchrl_steps_as_without_tensordicts(options: dict[str, Any]) -> None:
    assert_torchrl_steps_as_without_tensordicts(lambda envs, seed: Foraging(envs, **options, seed=seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 2}, "rows, columns: must be >= 3"),
        ({"food": 0}, "food: must be >= 1"),
        ({"agents": 65}, "agents: at most 64"),
        ({"agents": 0}, "num_agents must be >= 1"),
        ({"min_agent_level": 3}, "1 <= min_agent_level <= max_agent_level, got 3, 2"),
        ({"max_food_level": 0}, "max_food_level: must be >= 1"),
        ({"sight": 0}, "sight: must be >= 1"),
        ({"penalty": -1.0}, "penalty: must be >= 0"),
        ({"time_limit": "none"}, "time_limit: terminated or truncated"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Foraging(2, **options)


@pytest.mark.parametrize(
    ("places", "levels", "food", "message"),
    [
        ([(6, 0), (1, 1)], [1, 1], {}, "position: must be on the 6 by 6 board"),
        ([(0, 0), (1, 1)], [1, 0], {}, "levels: must be in"),
        ([(0, 0), (1, 1)], [1, 1], {(2, 2): 5}, "levels: must be in"),
        ([(0, 0), (1, 1)], [1, 1], {(0, 2): 1}, "off the border"),
        ([(2, 2), (1, 1)], [1, 1], {(2, 2): 1}, "not under players"),
        ([(0, 0), (1, 1)], [1, 1], {(2, 2): 1, (2, 4): 1}, "not near each other"),
    ],
)
def test_bad_states(
    places: list[tuple[int, int]], levels: list[int], food: dict[tuple[int, int], int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        board(places, levels, food)


def test_bad_shapes() -> None:
    env = Foraging(2)
    with pytest.raises(ValueError, match="position: must be int64"):
        env.inject(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"action must be \[2, 2\]"):
        env.check_actions(torch.zeros(2, 3, dtype=torch.int64))
