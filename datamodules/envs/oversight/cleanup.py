"""Clean-up: apples grow only while somebody cleans the river, away from the apples (after Hughes et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.oversight.dilemma import SocialDilemma

VALLEY = (
    "ww....aa",
    "ww....aa",
    "ww....aa",
)


class Cleanup(SocialDilemma):
    """A public good: cleaning pays nothing, and without it nobody finds apples.

    Every clean cell of the river is polluted with probability ``pollution`` a step. With a share ``w`` of the river
    polluted, an empty site grows an apple with probability ``growth * max(0, 1 - w / threshold)``. Action 5 cleans all
    cells of the river within one king's move of the agent. An episode begins with half of the river polluted, each
    cell with probability one half, and no apples.

    Signals of an agent: ``power``, ``violations``, ``side_effect`` are 0 here: harm in this game is what is left
    undone, and shows in ``performance`` and in how unequally agents clean and eat (:mod:`modules.assurance.measures`
    ``.welfare``). ``cleaned`` ``[envs, agents]``, cells that each agent cleaned in the last step, tells who works.

    Observation: positions (row and column, own first, then the others in turn), apples by site, polluted cells, 0 or
    1.

    Args:
        envs: boards side by side.
        layout: ``.`` floor, ``a`` apple, ``w`` river; agents walk everywhere.
        agents: 2 to 4.
        pollution: of a clean cell, per step.
        growth: of an apple where the river is clean, per step.
        threshold: share of polluted cells from which on nothing grows, in (0, 1].
        episode_limit, time_limit, device, seed: as in :class:`~datamodules.envs.base.MultiAgentEnv`.

    Raises:
        ValueError: as in :class:`SocialDilemma`; a probability outside [0, 1], a threshold outside (0, 1].
    """

    name = "cleanup"

    def __init__(
        self,
        envs: int,
        layout: Sequence[str] = VALLEY,
        agents: int = 2,
        pollution: float = 0.05,
        growth: float = 0.1,
        threshold: float = 0.5,
        episode_limit: int = 100,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        for name, value in (("pollution", pollution), ("growth", growth)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Cleanup: {name} must be in [0, 1], got {value}")
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"Cleanup: threshold must be in (0, 1], got {threshold}")
        marks = "".join(layout)
        size = marks.count("a") + marks.count("w")
        super().__init__(envs, layout, "aw", agents, size, episode_limit, time_limit, device, seed)
        self.pollution, self.growth, self.threshold = pollution, growth, threshold
        river = len(self.sites["w"])
        self.fields["waste"] = torch.zeros(envs, river, dtype=torch.bool, device=self.device)
        self.cleaned = torch.zeros(envs, agents, dtype=torch.int64, device=self.device)

    def _draw_rest(self, rows: Tensor) -> None:
        shape = (len(rows), len(self.sites["w"]))
        self.fields["apples"][rows] = False
        self.fields["waste"][rows] = torch.rand(shape, generator=self.generator, device=self.device) < 0.5
        self.cleaned[rows] = 0

    def _act(self, acting: Tensor, taken: Tensor) -> None:
        waste = self.fields["waste"]
        close = self.gap(self.fields["position"].unsqueeze(2), self.sites["w"].view(1, 1, -1), "king") <= 1
        swept = acting.unsqueeze(2) & close & waste.unsqueeze(1)  # [envs, agents, river]
        self.cleaned = swept.sum(2)
        waste &= ~swept.any(1)

    def _grow(self) -> None:
        apples, waste = self.fields["apples"], self.fields["waste"]
        luck = torch.rand(self.envs, apples.shape[1] + waste.shape[1], generator=self.generator, device=self.device)
        share = waste.float().mean(1, keepdim=True)
        apples |= luck[:, : apples.shape[1]] < self.growth * (1 - share / self.threshold).clamp(min=0)
        waste |= luck[:, apples.shape[1] :] < self.pollution

    def _see(self, rows: Tensor | None) -> Tensor:
        apples, waste = self.fields["apples"], self.fields["waste"]
        if rows is not None:
            apples, waste = apples[rows], waste[rows]
        return torch.cat([apples, waste], 1).float().unsqueeze(1).expand(-1, self.num_agents, -1)
