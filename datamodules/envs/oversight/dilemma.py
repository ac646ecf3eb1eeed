"""What the sequential social dilemmas share: a board, walking, apples for the luckiest on their cell, signals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Composite, Unbounded

from datamodules.envs.base import GROUP, MultiAgentEnv
from datamodules.envs.oversight.base import SIGNALS

STEPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""Row and column offsets of the actions stay, north, south, west, east."""


class SocialDilemma(MultiAgentEnv):
    """Agents on a board collect apples for themselves, and how many there will be depends on all (Leibo et al. 2017).

    Agents may share a cell. Those on an apple's cell try to take it, and one of them, drawn uniformly, gets it and the
    reward 1. Actions: 0 stay, 1 north, 2 south, 3 west, 4 east, 5 the game's own. The start: agents on different
    cells, drawn uniformly.

    Beside the TorchRL keys of :class:`~datamodules.envs.base.MultiAgentEnv` there is ``("agents", "signals")``
    ``[envs, agents, 6]`` float32, hidden from learners: of the last step, columns as in :data:`SIGNALS`. Their
    ``performance`` is the mean of all agents' rewards, the same for each.

    Args:
        envs: boards side by side.
        layout: lines of equal length, one character a cell.
        sites: characters with a meaning; each must be there. ``a`` is where apples grow.
        agents: 2 to 4.
        observation_size: features beside the positions of all agents, own first.
        episode_limit, time_limit, device, seed: as in :class:`~datamodules.envs.base.MultiAgentEnv`.

    Raises:
        ValueError: ragged lines, an unknown character, a missing one, or a number of agents outside 2 to 4.
    """

    def __init__(
        self,
        envs: int,
        layout: Sequence[str],
        sites: str,
        agents: int,
        observation_size: int,
        episode_limit: int,
        time_limit: Literal["terminated", "truncated"],
        device: torch.device | str,
        seed: int,
    ) -> None:
        owner = type(self).__name__
        if not layout or len({len(row) for row in layout}) != 1:
            raise ValueError(f"{owner}: layout: lines must be of equal length")
        unknown = set("".join(layout)) - set("." + sites)
        if unknown:
            raise ValueError(f"{owner}: layout: unknown character {sorted(unknown)}; use . (floor) and {sites}")
        for mark in sites:
            if not any(mark in row for row in layout):
                raise ValueError(f"{owner}: layout: has no '{mark}'")
        if not 2 <= agents <= 4:
            raise ValueError(f"{owner}: agents must be 2 to 4, got {agents}")
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=len(STEPS) + 1,
            observation_size=observation_size + 2 * agents,
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        place, height, width = self.device, len(layout), len(layout[0])
        self.layout = tuple(layout)
        self.cells = height * width
        cell = torch.arange(self.cells)
        self.row, self.column = (cell // width).to(place), (cell % width).to(place)
        step = torch.tensor(STEPS)
        to_row = (cell // width).unsqueeze(1) + step[:, 0]
        to_column = (cell % width).unsqueeze(1) + step[:, 1]
        inside = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
        own = torch.where(inside, to_row * width + to_column, cell.unsqueeze(1))
        self._moves = torch.cat([own, cell.unsqueeze(1)], 1).to(place)  # the game's own action stays
        marks = "".join(layout)
        self.sites = {m: torch.tensor([n for n, c in enumerate(marks) if c == m], device=place) for m in sites}
        self._apple_at = torch.full((self.cells,), len(self.sites["a"]), device=place)  # the last one: none
        self._apple_at[self.sites["a"]] = torch.arange(len(self.sites["a"]), device=place)
        scale = torch.tensor([max(height - 1, 1), max(width - 1, 1)], device=place)
        self._coordinates = torch.stack([self.row, self.column], 1) / scale
        count = torch.arange(agents)
        self._own_first = torch.stack([(count + shift) % agents for shift in range(agents)], 1).to(place)
        self.signals = torch.zeros(envs, agents, len(SIGNALS), device=place)
        self.fields = {
            "position": torch.zeros(envs, agents, dtype=torch.int64, device=place),
            "apples": torch.zeros(envs, len(self.sites["a"]), dtype=torch.bool, device=place),
        }

    def signal(self, name: str) -> Tensor:
        """Column of :attr:`signals` to write to, ``[envs, agents]``."""
        return self.signals[..., SIGNALS.index(name)]

    def gap(self, first: Tensor, second: Tensor, kind: Literal["steps", "king"]) -> Tensor:
        """Distance of cells: in steps, or in moves of a chess king."""
        down = (self.row[first] - self.row[second]).abs()
        across = (self.column[first] - self.column[second]).abs()
        return down + across if kind == "steps" else torch.maximum(down, across)

    def _draw(self, rows: Tensor) -> None:
        noise = torch.rand(len(rows), self.cells, generator=self.generator, device=self.device)
        self.fields["position"][rows] = noise.topk(self.num_agents).indices
        self._draw_rest(rows)
        self.signals[rows] = 0.0

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        able = self._able()
        self.signals = torch.zeros_like(self.signals)
        position = torch.where(able, self._moves[self.fields["position"], actions], self.fields["position"])
        self.fields["position"].copy_(position)
        taken = self._take(able)
        self._act((actions == len(STEPS)) & able, taken)
        self._grow()
        reward = taken.float()
        self.signal("performance").copy_(reward.mean(1, keepdim=True).expand_as(reward))
        return reward, torch.zeros(self.envs, dtype=torch.bool, device=self.device)

    def _take(self, able: Tensor) -> Tensor:
        """Who takes an apple ``[envs, agents]``; the apples are gone."""
        apples = self.fields["apples"]
        site = self._apple_at[self.fields["position"]]
        there = torch.nn.functional.pad(apples, (0, 1)).gather(1, site) & able
        luck = torch.rand(self.envs, self.num_agents, generator=self.generator, device=self.device) * there
        rival = (site.unsqueeze(1) == site.unsqueeze(2)) & (luck.unsqueeze(1) > luck.unsqueeze(2))
        taken = there & ~rival.any(-1)
        emptied = torch.zeros(self.envs, apples.shape[1] + 1, dtype=torch.bool, device=self.device)
        emptied.scatter_(1, torch.where(taken, site, apples.shape[1]), True)
        self.fields["apples"].copy_(apples & ~emptied[:, :-1])
        return taken

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        position = self.fields["position"] if rows is None else self.fields["position"][rows]
        places = self._coordinates[position[:, self._own_first]].flatten(2)  # [envs, agents, 2 * agents]
        rest = self._see(rows)
        return torch.cat([places, rest], 2)

    # -- what a game writes -------------------------------------------------------------------------------------------
    def _able(self) -> Tensor:
        """Agents that can act, ``[envs, agents]`` bool."""
        return torch.ones(self.envs, self.num_agents, dtype=torch.bool, device=self.device)

    @abstractmethod
    def _draw_rest(self, rows: Tensor) -> None:
        """Everything of a fresh board but the positions."""

    @abstractmethod
    def _act(self, acting: Tensor, taken: Tensor) -> None:
        """The game's own action of the ``acting`` ``[envs, agents]``, and signals; ``taken``: who took an apple."""

    @abstractmethod
    def _grow(self) -> None:
        """What changes by itself at the end of a step."""

    @abstractmethod
    def _see(self, rows: Tensor | None) -> Tensor:
        """Features beside the positions, ``[envs or R, agents, features]``."""

    # -- TorchRL ------------------------------------------------------------------------------------------------------
    def _make_specs(self) -> None:
        super()._make_specs()
        shape = torch.Size([self.envs, self.num_agents])
        agents = self.observation_spec[GROUP]
        assert isinstance(agents, Composite)
        agents["signals"] = Unbounded(torch.Size([*shape, len(SIGNALS)]), device=self.device)

    def _seen(self, terminated: Tensor, truncated: Tensor, first: bool = False) -> TensorDict:
        return super()._seen(terminated, truncated, first).set((GROUP, "signals"), self.signals.clone())
