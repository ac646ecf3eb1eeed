"""Partner drop-out: in training, some agents do not act by themselves for an episode, so that others learn to go on.

Which agents, and whether they stand still or act at random, is drawn per environment and episode, like the dropping of
units from a network. The other agents are not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.contracts import MultiAgentSpec

PRESENT, IDLE, RANDOM = range(3)
"""What an agent is for an episode."""


@dataclass
class PartnerDropout:
    """How often agents are missing in training.

    Args:
        probability: of each agent and episode, in [0, 1); one agent always stays.
        kind: what a missing agent does: ``idle`` nothing, ``random`` any available action, ``both`` one or the other
            with even chances. Where a task has no idle action, ``both`` is ``random``.

    Raises:
        ValueError: a value out of range.
    """

    probability: float = 0.0
    kind: Literal["both", "idle", "random"] = "both"

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability < 1.0:
            raise ValueError(f"PartnerDropout: probability must be in [0, 1), got {self.probability}")
        if self.kind not in ("both", "idle", "random"):
            raise ValueError(f"PartnerDropout: kind must be one of both, idle, random, got '{self.kind}'")

    @property
    def active(self) -> bool:
        return self.probability > 0.0

    def check(self, spec: MultiAgentSpec) -> None:
        """Raises: ValueError: a task in which agents cannot be missing in this way."""
        if not self.active:
            return
        if spec.num_agents < 2:
            raise ValueError(f"PartnerDropout: task {spec.task} has one agent, and one always stays: set probability 0")
        if self.kind == "idle" and spec.idle_action is None:
            raise ValueError(f"PartnerDropout: task {spec.task} has no idle action: set kind: random")

    def draw(self, rows: int, spec: MultiAgentSpec, generator: torch.Generator) -> Tensor:
        """int8 ``[rows, agents]`` of :data:`PRESENT`, :data:`IDLE` and :data:`RANDOM`, one row an episode."""
        drawn = torch.rand(rows, spec.num_agents, 2, generator=generator, device=generator.device)
        coin, still = drawn.unbind(-1)
        missing = (coin < self.probability) & (coin < coin.amax(-1, keepdim=True))  # the largest coin stays
        idle = still < {"both": 0.5, "idle": 1.0, "random": 0.0}[self.kind]
        if spec.idle_action is None:
            idle = torch.zeros_like(idle)
        return torch.where(missing, torch.where(idle, IDLE, RANDOM), PRESENT).to(torch.int8)


def with_missing(
    action: Tensor,
    absent: Tensor,
    legal: Tensor | None,
    idle_action: int | None,
    actions: int,
    generator: torch.Generator,
) -> Tensor:
    """``action`` ``[rows, agents]``, replaced where an agent is missing.

    Args:
        absent: ``[rows, agents]``, as :meth:`PartnerDropout.draw` gives it.
        legal: bool ``[rows, agents, actions]``, available actions; an idle agent whose idle action is not available
            takes one at random. Where nothing is available, action 0.
        idle_action: the task's.
        actions: how many there are.
        generator: of the random actions; equally many numbers are drawn whoever is missing.
    """
    noise = torch.rand(*action.shape, actions, generator=generator, device=generator.device)
    random = (noise if legal is None else torch.where(legal, noise, -1.0)).argmax(-1)
    if legal is not None:
        random = torch.where(legal.any(-1), random, 0)
    still = random
    if idle_action is not None:
        idle = torch.full_like(action, idle_action)
        still = idle if legal is None else torch.where(legal[..., idle_action], idle, random)
    return torch.where(absent == IDLE, still, torch.where(absent == RANDOM, random, action))


def followed_value(
    values: Tensor, greedy: Tensor, legal: Tensor | None, absent: Tensor | None, idle_action: int | None
) -> Tensor:
    """What agents are worth from a state on if missing ones go on as they do: ``greedy`` ``[...]``, for an idle agent
    the value of its idle action, for a random one the mean over available actions (expected Sarsa).

    Args:
        values: ``[..., actions]``.
        legal: bool, broadcastable to ``values``; where nothing is available the value is 0.
        absent: broadcastable to ``greedy``; ``None``: nobody is missing.
        idle_action: the task's.
    """
    if absent is None:
        return greedy
    mean = values.mean(-1)
    if legal is not None:
        mean = torch.where(legal, values, 0.0).sum(-1) / legal.sum(-1).clamp_min(1)
    still = mean
    if idle_action is not None:
        still = values[..., idle_action]
        if legal is not None:
            still = torch.where(legal[..., idle_action], still, mean)
    return torch.where(absent == IDLE, still, torch.where(absent == RANDOM, mean, greedy))
