"""Our batched Boulder-Push against a slow one, written cell by cell from the rules in the class's docstring."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.envs.boulder_push import BoulderPush

Cell = tuple[int, int]
WAY = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
NAMES = list(WAY)


class Reference:
    """One board; ``order`` is the order in which agents move when nothing is pushed."""

    def __init__(self, settings: dict[str, Any], agents: list[Cell], first: Cell, direction: str) -> None:
        self.settings, self.agents, self.direction = settings, list(agents), direction
        self.height, self.width = settings["height"], settings["width"]
        along = (0, 1) if direction in ("north", "south") else (1, 0)
        self.boulder = [(first[0] + k * along[0], first[1] + k * along[1]) for k in range(len(agents))]

    def moved(self, cell: Cell, way: str) -> Cell:
        return cell[0] + WAY[way][0], cell[1] + WAY[way][1]

    def on_board(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.height and 0 <= cell[1] < self.width

    def at_goal(self) -> bool:
        return not all(self.on_board(self.moved(cell, self.direction)) for cell in self.boulder)

    def step(self, actions: Sequence[str | None], order: list[int]) -> tuple[list[np.float32], bool, Counter[str]]:
        events: Counter[str] = Counter()
        count, number = len(self.agents), np.float32
        behind = {cell: self.moved(cell, self.direction) for cell in self.agents}
        together = all(action == self.direction for action in actions)
        if together and set(behind.values()) == set(self.boulder) and not self.at_goal():
            self.agents = [behind[cell] for cell in self.agents]
            self.boulder = [self.moved(cell, self.direction) for cell in self.boulder]
            reward = number(self.settings["push_reward"])
            events["push"] += 1
            if self.at_goal():
                events["goal"] += 1
                reward = reward + number(self.settings["goal_reward"])
            return [reward] * count, self.at_goal(), events
        rewards, start = [number(0)] * count, list(self.agents)
        for agent in order:
            action = actions[agent]
            if action is None:
                continue
            to = self.moved(self.agents[agent], action)
            if not self.on_board(to):
                events["wall"] += 1
            elif to in self.agents:
                events["blocked"] += 1
            elif to in self.boulder:
                rewards[agent] = -number(self.settings["penalty"])
                side = "behind" if action == self.direction else "elsewhere"
                events[f"ran into the boulder from {side}"] += 1
            else:
                events["follow"] += to in start
                self.agents[agent] = to
        return rewards, False, events

    def observe(self) -> np.ndarray:
        sight = self.settings["sight"]
        heading = [float(name == self.direction) for name in NAMES]
        rows = []
        for index, (row, column) in enumerate(self.agents):
            if sight is None:
                cells = [(row, column), self.boulder[0], *(c for j, c in enumerate(self.agents) if j != index)]
                flat = [v for r, c in cells for v in (r / (self.height - 1), c / (self.width - 1))]
                rows.append(flat[:4] + heading + flat[4:])
                continue
            around = [(r, c) for r in range(-sight, sight + 1) for c in range(-sight, sight + 1)]
            seen = [float((row + r, column + c) in layer) for layer in (self.agents, self.boulder) for r, c in around]
            rows.append(heading + seen)
        return np.array(rows, dtype=np.float32)


class Recorded(BoulderPush):
    """Ours, with the order of the last step at hand."""

    turns: torch.Tensor

    def _turns(self) -> torch.Tensor:
        self.turns = super()._turns()
        return self.turns


BASE = {"height": 8, "width": 8, "agents": 2, "push_reward": 0.1, "goal_reward": 1.0, "penalty": 0.01, "sight": None}
TASKS: dict[str, dict[str, Any]] = {
    "8x8-2ag": BASE,
    "8x8-3ag": {**BASE, "agents": 3},
    "12x12-4ag": {**BASE, "height": 12, "width": 12, "agents": 4},
    "crowded 4x4-4ag": {**BASE, "height": 4, "width": 4, "agents": 4},
    "5x7-3ag with windows of 1": {**BASE, "height": 5, "width": 7, "agents": 3, "sight": 1, "penalty": 0.3},
    "7x5-2ag with windows of 4, no noop": {**BASE, "height": 7, "width": 5, "sight": 4, "noop": False},
    "3x3-1ag": {**BASE, "height": 3, "width": 3, "agents": 1, "push_reward": 0.7, "goal_reward": 2.5},
}


def choose(board: Reference, rng: random.Random) -> Sequence[str | None]:
    """Mostly towards a place behind the boulder, each agent to its own, and push when all are there; else random."""
    back = {"north": "south", "south": "north", "west": "east", "east": "west"}[board.direction]
    actions: list[str | None] = []
    spots = [board.moved(cell, back) for cell in board.boulder]
    if sorted(spots) == sorted(board.agents) and rng.random() < 0.8:
        return [board.direction] * len(spots)
    for (row, column), (to_row, to_column) in zip(board.agents, spots, strict=True):
        ways = ["south"] * (to_row > row) + ["north"] * (to_row < row)
        ways += ["east"] * (to_column > column) + ["west"] * (to_column < column)
        urge = rng.random()
        if urge < 0.7:
            actions.append(rng.choice(ways) if ways else None)
        elif urge < 0.8:
            actions.append(board.direction)
        else:
            actions.append(rng.choice([None, *NAMES]))
    return actions


def play(task: dict[str, Any], boards: int, steps: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    rng = random.Random(seed)
    env = Recorded(boards, **task, time_limit="terminated", episode_limit=40, seed=seed)
    env.restart()
    offset = 0 if task.get("noop", True) else -1

    def copy(row: int) -> Reference:
        agents = [(r, c) for r, c in env.positions()[row].tolist()]
        first = env.boulders()[row, 0].tolist()
        return Reference(task, agents, (first[0], first[1]), NAMES[int(env.fields["direction"][row])])

    references = [copy(row) for row in range(boards)]
    elapsed = [0] * boards
    wrong: Counter[str] = Counter()
    events: Counter[str] = Counter()
    for _ in range(steps):
        choices = [choose(board, rng) for board in references]
        if offset:
            choices = [[rng.choice(NAMES) if action is None else action for action in row] for row in choices]
        numbers = [[0 if action is None else 1 + NAMES.index(action) + offset for action in row] for row in choices]
        reward, terminated, truncated = env.advance(torch.tensor(numbers))
        orders = env.turns.t().tolist()
        over = []
        for row, board in enumerate(references):
            rewards, done, happened = board.step(choices[row], orders[row])
            elapsed[row] += 1
            done = done or elapsed[row] == 40
            events += happened
            wrong["reward"] += reward[row].tolist() != [float(value) for value in rewards]
            wrong["end"] += bool(terminated[row]) != done or bool(truncated[row])
            wrong["agents"] += env.positions()[row].tolist() != [list(cell) for cell in board.agents]
            wrong["boulder"] += env.boulders()[row].tolist() != [list(cell) for cell in board.boulder]
            if done:
                over.append(row)
        seen = env.observe()[0].numpy()
        wrong["observation"] += int((seen != np.stack([board.observe() for board in references])).any((1, 2)).sum())
        if over:
            env.restart(torch.tensor(over))
            for row in over:
                references[row], elapsed[row] = copy(row), 0
        events["steps"] += boards
        events["episodes"] += len(over)
    return wrong, events


def check(wrong: Counter[str], events: Counter[str], agents: int) -> None:
    assert not +wrong, f"{dict(+wrong)} of {events['steps']} steps"
    happened = ["push", "goal", "wall", "ran into the boulder from elsewhere"]
    happened += ["follow", "blocked", "ran into the boulder from behind"] if agents > 1 else []
    assert all(events[event] for event in happened), events


@pytest.mark.parametrize("name", TASKS)
def test_steps_equal(name: str) -> None:
    wrong, events = play(TASKS[name], boards=8, steps=90, seed=1)
    assert not +wrong, f"{dict(+wrong)} of {events['steps']} steps"


def test_steps_hold_every_event() -> None:
    wrong, events = play(TASKS["8x8-3ag"], boards=8, steps=150, seed=3)
    check(wrong, events, agents=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_many_steps_equal(name: str) -> None:
    wrong, events = play(TASKS[name], boards=16, steps=900, seed=2)
    print(f"\n{name}: {dict(wrong)} mismatches, {dict(events)}")
    check(wrong, events, TASKS[name]["agents"])


# -- start law and order, against closed forms -------------------------------------------------------------------------
def close(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square of counts: within five standard deviations of what the law gives."""
    assert bool(((expected > 0) | (counts == 0)).all())
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_start_law() -> None:
    height, width, agents, count = 5, 6, 2, 60_000
    env = BoulderPush(count, height=height, width=width, agents=agents, seed=4)
    env.restart()
    cells = height * width
    direction, first, position = env.fields["direction"], env.fields["boulder"][:, 0], env.fields["position"]
    law = torch.zeros(4, cells, dtype=torch.float64)
    places: dict[tuple[int, int], list[int]] = {}
    for name in range(4):
        # off the edge that it heads for and the opposite one: rows 1-3 or columns 1-4
        rows = range(1, height - 1) if name < 2 else range(height - agents + 1)
        columns = range(width - agents + 1) if name < 2 else range(1, width - 1)
        spots = [(r, c) for r in rows for c in columns]
        for r, c in spots:
            law[name, r * width + c] = count / 4 / len(spots)
            other = r * width + c + (1 if name < 2 else width)
            places[name, r * width + c] = [r * width + c, other]
    close((direction * cells + first).bincount(minlength=4 * cells), law.flatten())
    # each agent is uniform over the cells off the boulder, and so is the pair without replacement
    single, pair = torch.zeros(cells, dtype=torch.float64), torch.zeros(cells, cells, dtype=torch.float64)
    for (name, cell), stone in places.items():
        free = torch.ones(cells, dtype=torch.float64)
        free[stone] = 0
        both = free[:, None] * free[None]
        both.fill_diagonal_(0)
        single += law[name, cell] * free / free.sum()
        pair += law[name, cell] * both / both.sum()
    for agent in range(agents):
        close(position[:, agent].bincount(minlength=cells), single)
    close((position[:, 0] * cells + position[:, 1]).bincount(minlength=cells**2), pair.flatten())


def test_order_is_uniform() -> None:
    env = BoulderPush(60_000, agents=3, seed=5)
    turns = env._turns()
    counts = (turns[0] * 9 + turns[1] * 3 + turns[2]).bincount(minlength=27)
    law = torch.zeros(27)
    for a in range(3):
        for b in range(3):
            if a != b:
                law[a * 9 + b * 3 + 3 - a - b] = 10_000
    close(counts, law)
