"""Our batched foraging against lbforaging: the same states, actions, observations, rewards, ends and start law."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.envs.foraging import LOAD, STEPS, Foraging

package = pytest.importorskip("lbforaging.foraging.environment", reason="needs the extra 'marl'")
gymnasium = pytest.importorskip("gymnasium", reason="needs the extra 'marl'")


def settings(board: int, agents: int, food: int, **changes: Any) -> dict[str, Any]:
    """Keywords of lbforaging's class, as it registers them, with changes."""
    return {
        "players": agents,
        "min_player_level": 1,
        "max_player_level": 2,
        "field_size": (board, board),
        "min_food_level": 1,
        "max_food_level": None,
        "max_num_food": food,
        "sight": board,
        "max_episode_steps": 50,
        "force_coop": False,
        "grid_observation": False,
        "penalty": 0.0,
        **changes,
    }


TASKS = {
    "8x8-2p-2f-coop": settings(8, 2, 2, force_coop=True),
    "2s-8x8-2p-2f-coop": settings(8, 2, 2, force_coop=True, sight=2),
    "8x8-3p-1f-coop": settings(8, 3, 1, force_coop=True),
    "10x10-4p-4f-coop": settings(10, 4, 4, force_coop=True),
    "10x10-3p-3f": settings(10, 3, 3),
    "crowded 5x5-4p-2f": settings(5, 4, 2),
    "crowded 5x5-4p-2f-1s with a penalty": settings(5, 4, 2, penalty=0.1, sight=1),
    "raw rewards and levels to 4": settings(
        6, 3, 3, penalty=0.5, normalize_reward=False, max_player_level=4, max_food_level=5, max_episode_steps=30
    ),
}


def ours(task: dict[str, Any], envs: int, **changes: Any) -> Foraging:
    return Foraging(
        envs,
        rows=task["field_size"][0],
        columns=task["field_size"][1],
        agents=task["players"],
        food=task["max_num_food"],
        sight=task["sight"],
        coop=task["force_coop"],
        min_agent_level=task["min_player_level"],
        max_agent_level=task["max_player_level"],
        max_food_level=task["max_food_level"],
        penalty=task["penalty"],
        normalise_reward=task.get("normalize_reward", True),
        episode_limit=task["max_episode_steps"],
        **changes,
    )


def inject(env: Foraging, games: list[Any], rows: list[int]) -> None:
    """Copy the package's states at ``rows``, which are at the start of an episode."""
    env.inject(
        torch.tensor([[player.position for player in games[row].players] for row in rows]),
        torch.tensor([[player.level for player in games[row].players] for row in rows]),
        torch.from_numpy(np.stack([games[row].field for row in rows])).long(),
        torch.tensor(rows),
    )


def choose(game: Any, rng: np.random.Generator) -> list[int]:
    """Actions that often load, run into other players or go for food; the rest is random."""
    actions = []
    food = np.argwhere(game.field)
    for player in game.players:
        row, column = player.position
        urge = rng.random()
        if urge < 0.6 and game.adjacent_food(row, column) > 0:
            actions.append(LOAD)
        elif urge < 0.8:
            places = [other.position for other in game.players if other is not player]
            if urge < 0.5 and len(food):
                places = food
            to_row, to_column = places[rng.integers(len(places))]
            down, across = to_row - row, to_column - column
            if abs(down) > abs(across) or (abs(down) == abs(across) and rng.random() < 0.5):
                actions.append(2 if down > 0 else 1)
            else:
                actions.append(4 if across > 0 else 3)
        else:
            actions.append(int(rng.integers(len(STEPS))))
    return actions


def count_events(game: Any, before: list[tuple[int, ...]], actions: list[int], rewards: list[float]) -> Counter[str]:
    after = [tuple(map(int, player.position)) for player in game.players]
    events: Counter[str] = Counter()
    for i, (start, end) in enumerate(zip(before, after, strict=True)):
        for j in range(i + 1, len(after)):
            events["overlap"] += end == after[j]
            events["swap"] += start != end and end == before[j] and after[j] == start
        for j in range(len(after)):
            left = j != i and start != end == before[j] and after[j] != before[j]
            events["follow"] += left and after[j] != start
    events["load"] += sum(reward > 0 for reward in rewards)
    events["load of several"] += sum(reward > 0 for reward in rewards) > 1
    return events


def play(task: dict[str, Any], boards: int, steps: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Step the package and ours side by side from equal starts: mismatches by kind, and what happened."""
    rng = np.random.default_rng(seed)
    games = [package.ForagingEnv(**task) for _ in range(boards)]
    env = ours(task, boards)
    theirs = [np.stack(game.reset(seed=seed + row)[0]) for row, game in enumerate(games)]
    inject(env, games, list(range(boards)))
    wrong: Counter[str] = Counter()
    events: Counter[str] = Counter()

    def compare_observations() -> None:
        got = env.observe()[0].numpy()
        wrong["observation"] += int((got != np.stack(theirs)).any((1, 2)).sum())

    compare_observations()
    for _ in range(steps):
        actions = [choose(game, rng) for game in games]
        reward, terminated, truncated = env.advance(torch.tensor(actions))
        over = []
        for row, game in enumerate(games):
            before = [tuple(map(int, player.position)) for player in game.players]
            tries = [
                action == LOAD and game.adjacent_food(*player.position) > 0
                for player, action in zip(game.players, actions[row], strict=True)
            ]
            seen, rewards, done, cut, _ = game.step(actions[row])
            theirs[row] = np.stack(seen)
            wrong["reward"] += bool((reward[row].numpy() != np.array(rewards, dtype=np.float32)).any())
            wrong["end"] += bool(terminated[row]) != bool(done) or bool(truncated[row]) != bool(cut)
            events += count_events(game, before, actions[row], rewards)
            events["failed load"] += sum(bool(t) and r <= 0 for t, r in zip(tries, rewards, strict=True))
            if done:
                over.append(row)
        places = np.array([[player.position for player in game.players] for game in games])
        wrong["position"] += int((env.positions().numpy() != places).any((1, 2)).sum())
        fields = np.stack([game.field for game in games])
        wrong["field"] += int((env.field().numpy() != fields).any((1, 2)).sum())
        compare_observations()
        for row in over:
            theirs[row] = np.stack(games[row].reset()[0])
        if over:
            inject(env, games, over)
            compare_observations()
        events["steps"] += boards
        events["episodes"] += len(over)
    return wrong, events


def check(wrong: Counter[str], events: Counter[str], agents: int) -> None:
    assert not +wrong, f"{dict(+wrong)} of {events['steps']} steps"
    happened = ["load", "failed load", "swap", "follow", "episodes"]
    # with two players a move fails only if both name one cell, or the other stays: nobody can end up on the other
    happened += ["overlap"] if agents > 2 else []
    assert all(events[event] for event in happened), events


@pytest.mark.parametrize("name", TASKS)
def test_steps_equal(name: str) -> None:
    wrong, events = play(TASKS[name], boards=8, steps=75, seed=1)
    assert not +wrong, f"{dict(+wrong)} of {events['steps']} steps"


def test_crowded_steps_equal_and_hold_every_collision() -> None:
    wrong, events = play(TASKS["crowded 5x5-4p-2f"], boards=8, steps=150, seed=2)
    check(wrong, events, agents=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_many_steps_equal(name: str) -> None:
    wrong, events = play(TASKS[name], boards=16, steps=900, seed=3)
    print(f"\n{name}: {dict(wrong)} mismatches, {dict(events)}")
    check(wrong, events, TASKS[name]["players"])


def test_tasks_are_as_registered() -> None:
    pytest.importorskip("lbforaging")
    for identifier in ("8x8-2p-2f-coop", "8x8-3p-1f-coop", "10x10-4p-4f-coop", "10x10-3p-3f"):
        assert gymnasium.spec(f"Foraging-{identifier}-v3").kwargs == TASKS[identifier]
    assert gymnasium.spec("Foraging-2s-8x8-2p-2f-coop-v3").kwargs == TASKS["2s-8x8-2p-2f-coop"]


# -- start law ---------------------------------------------------------------------------------------------------------
def chi_square(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """Two samples' counts in the same cells: the statistic and its degrees of freedom."""
    both = first + second
    kept = both > 0
    a, b = first[kept].astype(float), second[kept].astype(float)
    ratio = np.sqrt(b.sum() / a.sum())
    return float(((a * ratio - b / ratio) ** 2 / (a + b)).sum()), int(kept.sum()) - 1


def close(first: np.ndarray, second: np.ndarray) -> None:
    """Accept unless the statistic is five standard deviations above what equal laws give."""
    assert first.shape == second.shape
    statistic, freedom = chi_square(first, second)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)


def their_starts(task: dict[str, Any], count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells and levels of players, ``[count, agents]``, and fields, ``[count, cells]``, each of a fresh package."""
    game = package.ForagingEnv(**task)
    game.reset(seed=seed)
    width = task["field_size"][1]
    places, levels, fields = [], [], []
    for _ in range(count):
        for player in game.players:
            player.position = None  # as before a game's first episode
        game.reset()
        places.append([player.position[0] * width + player.position[1] for player in game.players])
        levels.append([player.level for player in game.players])
        fields.append(game.field.flatten())
    return np.array(places), np.array(levels), np.array(fields)


@pytest.mark.parametrize(("coop", "top"), [(False, None), (True, None), (False, 2)])
def test_start_law(coop: bool, top: int | None) -> None:
    task = settings(6, 3, 3, force_coop=coop, max_food_level=top)
    count, cells = 4000, 36
    places, levels, fields = their_starts(task, count, seed=0)
    env = ours(task, 5 * count, seed=1)
    env.restart()
    our_places = (env.positions()[..., 0] * 6 + env.positions()[..., 1]).numpy()
    our_levels, our_fields = env.fields["level"].numpy(), env.field().flatten(1).numpy()

    def counts(values: np.ndarray, size: int) -> np.ndarray:
        return np.bincount(values.flatten(), minlength=size)

    close(counts(our_places[:, 0], cells), counts(places[:, 0], cells))
    close(counts(our_places, cells), counts(places, cells))
    pair = our_places[:, 0] * cells + our_places[:, 1], places[:, 0] * cells + places[:, 1]
    close(counts(pair[0], cells**2), counts(pair[1], cells**2))
    close(counts(our_levels, 3), counts(levels, 3))
    close((our_fields > 0).sum(0), (fields > 0).sum(0))
    close(counts((our_fields > 0).sum(1), 4), counts((fields > 0).sum(1), 4))
    # food levels go with player levels
    mark = our_levels.sum(1) * 32 + our_fields.sum(1), levels.sum(1) * 32 + fields.sum(1)
    close(counts(mark[0], 256), counts(mark[1], 256))
    # pairs of food cells: the distance rule
    where = [np.stack([np.flatnonzero(f)[:2] for f in some if (f > 0).sum() >= 2]) for some in (our_fields, fields)]
    close(*(counts(w[:, 0] * cells + w[:, 1], cells**2) for w in where))


def test_start_law_that_remembers_positions() -> None:
    """The package bars a player from the cells where it and players after it ended."""
    size, count = 4, 4000
    task = settings(size, 3, 1)
    game = package.ForagingEnv(**task)
    game.reset(seed=0)
    last = [(0, 0), (0, 0), (2, 1)]
    theirs = np.zeros((3, size**2), dtype=np.int64)
    for _ in range(count):
        for player, position in zip(game.players, last, strict=True):
            player.position = position
        game.reset()
        for index, player in enumerate(game.players):
            theirs[index, player.position[0] * size + player.position[1]] += 1
    env = ours(task, 4 * count, remember_positions=True, seed=1)
    env.restart()
    env.inject(
        torch.tensor(last).expand(4 * count, 3, 2),
        torch.ones(4 * count, 3, dtype=torch.int64),
        torch.zeros(4 * count, size, size, dtype=torch.int64),
    )
    env.restart()
    cells = (env.positions()[..., 0] * size + env.positions()[..., 1]).numpy()
    for index in range(3):
        mine = np.bincount(cells[:, index], minlength=size**2)
        assert ((mine > 0) == (theirs[index] > 0)).all()
        close(mine, theirs[index])
    second = 2 * size + 1
    assert theirs[0, 0] == theirs[0, second] == theirs[1, 0] == theirs[1, second] == theirs[2, second] == 0
    assert theirs[2, 0] > 0
