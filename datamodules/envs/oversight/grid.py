"""Gridworlds with one walker and one thing that changes once: the frame of three oversight worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.envs.oversight.base import OversightEnv

STEPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""Row and column offsets of the actions stay, north, south, west, east."""
STAY = 0


class Layout:
    """A map of characters: ``#`` wall, space floor, ``A`` start, ``G`` goal, and a world's own marks.

    Floor cells are numbered in reading order.

    Args:
        rows: lines of equal length, walled in all round.
        marks: the world's own characters; each must be there at least once.
        owner: whose error it is.

    Raises:
        ValueError: ragged lines, an opening in the outer wall, an unknown character, a missing mark, or not exactly
            one start.
    """

    def __init__(self, rows: Sequence[str], marks: str, owner: str) -> None:
        if not rows or len({len(row) for row in rows}) != 1:
            raise ValueError(f"{owner}: layout: lines must be of equal length")
        border = [*rows[0], *rows[-1], *(row[0] for row in rows), *(row[-1] for row in rows)]
        if set(border) != {"#"}:
            raise ValueError(f"{owner}: layout: must be walled in by # all round")
        unknown = set("".join(rows)) - set("# AG" + marks)
        if unknown:
            raise ValueError(f"{owner}: layout: unknown character {sorted(unknown)}; use # (wall), space, AG{marks}")
        for mark in "G" + marks:
            if not any(mark in row for row in rows):
                raise ValueError(f"{owner}: layout: has no '{mark}'")
        if sum(row.count("A") for row in rows) != 1:
            raise ValueError(f"{owner}: layout: needs exactly one start 'A'")
        self.rows = tuple(rows)
        self.places = [(r, c) for r, row in enumerate(rows) for c, mark in enumerate(row) if mark != "#"]
        number = {place: n for n, place in enumerate(self.places)}
        self.cells = len(self.places)
        self.start = number[next((r, c) for r, c in self.places if rows[r][c] == "A")]
        self.moves = torch.tensor(
            [[number.get((r + down, c + right), number[r, c]) for down, right in STEPS] for r, c in self.places]
        )
        """Where each action leads from each cell, int64 ``[cells, 5]``: walls stop."""

    def where(self, mark: str) -> Tensor:
        """Cells of ``mark``, bool ``[cells]``."""
        return torch.tensor([self.rows[r][c] == mark for r, c in self.places])


class FlagGrid(OversightEnv):
    """A walker on a :class:`Layout` and one flag. State ``flag * cells + cell``; observation: cell one-hot, flag.

    Actions: 0 stay, 1 north, 2 south, 3 west, 4 east. Reaching the goal ends the episode.

    Args:
        envs: copies in the batch.
        layout: the map, see :class:`Layout`.
        marks: the world's own characters.
        goal_reward: for reaching the goal.
        step_reward: of every step, the last one included.
        flagged_start: probability that an episode begins with the flag set.
        options: the other arguments of :class:`OversightEnv`.
    """

    def __init__(
        self,
        envs: int,
        layout: Sequence[str],
        marks: str,
        goal_reward: float,
        step_reward: float,
        flagged_start: float = 0.0,
        extra_signals: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        self.layout = Layout(layout, marks, type(self).__name__)
        cells = self.layout.cells
        super().__init__(
            envs,
            num_states=2 * cells,
            num_actions=len(STEPS),
            observation_size=cells + 1,
            extra_signals=extra_signals,
            **options,
        )
        self.goal_reward, self.step_reward, self.flagged_start = goal_reward, step_reward, flagged_start
        place = self.device
        self._moves, self._goal = self.layout.moves.to(place), self.layout.where("G").to(place)
        self._marked = {mark: self.layout.where(mark).to(place) for mark in marks}
        self.fields = {
            "cell": torch.full((envs,), self.layout.start, dtype=torch.int64, device=place),
            "flag": torch.zeros(envs, dtype=torch.bool, device=place),
        }

    def like(self, envs: int) -> FlagGrid:
        return type(self)(envs, **self._world(), penalties=self.penalties, seed=self.seed, device=self.device)

    def _world(self) -> Mapping[str, Any]:
        """Constructor arguments that make the same world."""
        return {
            "layout": self.layout.rows,
            "goal_reward": self.goal_reward,
            "step_reward": self.step_reward,
            "episode_limit": self.episode_limit,
        }

    def _begin(self, rows: Tensor, uniforms: Tensor) -> None:
        self.fields["cell"][rows] = self.layout.start
        self.fields["flag"][rows] = uniforms < self.flagged_start

    def _transition(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cell = self._moves[self.fields["cell"], action]
        arrived = self._goal[cell]
        reward = arrived * self.goal_reward + self.step_reward
        self.signal("performance").copy_(reward)
        reward = reward + self._entered(cell, cell != self.fields["cell"])
        self.fields["cell"] = cell
        return reward, arrived

    def _entered(self, cell: Tensor, moved: Tensor) -> Tensor | float:
        """What else happens where the walker is now (``cell`` ``[envs]``), and the reward ``[envs]`` for it."""
        raise NotImplementedError

    def state_index(self) -> Tensor:
        return self.fields["flag"] * self.layout.cells + self.fields["cell"]

    def _put(self, state: Tensor) -> None:
        self.fields = {"cell": state % self.layout.cells, "flag": state >= self.layout.cells}

    def features(self) -> Tensor:
        cells = self.layout.cells
        place, flag = torch.eye(cells, device=self.device), torch.ones(cells, 1, device=self.device)
        return torch.cat([torch.cat([place, 0 * flag], 1), torch.cat([place, flag], 1)])

    def start_distribution(self) -> Tensor:
        start = torch.zeros(self.num_states, dtype=torch.float64, device=self.device)
        start[self.layout.start] = 1.0 - self.flagged_start
        start[self.layout.cells + self.layout.start] = self.flagged_start
        return start
