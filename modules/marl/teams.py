"""Teams under examination: agents replaced, perception disturbed, actions prescribed, partners from elsewhere.

All are actors (:class:`~modules.contracts.ActsMultiAgent`) around other actors, for evaluation alone: batched over
episodes, with the random numbers of the generator that they are handed. A team under another change meets the same
missing agents, since these are drawn before anything else is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contracts import ActsMultiAgent, MultiAgentSpec, TeamChange
from modules.marl.dropout import IDLE, PRESENT, RANDOM, with_missing

Carry = dict[str, Tensor]


def _full(legal: Tensor | None, observation: Tensor, actions: int) -> Tensor:
    """``legal``, or that everything is available: bool ``[rows, agents, actions]``."""
    if legal is not None:
        return legal
    return torch.ones(*observation.shape[:2], actions, dtype=torch.bool, device=observation.device)


class ChangedTeam:
    """A team that a :class:`~modules.contracts.TeamChange` befalls.

    Args:
        actor: the team.
        change: what befalls it.
        spec: of the task.
        spread: ``[features]``, standard deviations that noise is measured in; needed with noise.
    """

    def __init__(
        self, actor: ActsMultiAgent, change: TeamChange, spec: MultiAgentSpec, spread: Tensor | None = None
    ) -> None:
        self.actor, self.change, self.spec, self.spread = actor, change, spec, spread
        if change.missing > spec.num_agents:
            raise ValueError(f"ChangedTeam: missing: the team has {spec.num_agents} agents, got {change.missing}")

    def begin(self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None) -> Carry:
        change, (rows, agents) = self.change, observation.shape[:2]
        order = torch.rand(rows, agents, generator=generator, device=generator.device).argsort(1)
        rank = order.argsort(1) if change.seat is None else (torch.arange(agents, device=order.device) != change.seat)
        kind = IDLE if change.kind == "idle" else RANDOM
        absent = torch.where(rank.expand(rows, agents) < change.missing, kind, PRESENT).to(torch.int8)
        carry = {"absent": absent, "seen": observation}
        if change.missing < agents:
            begun = self.actor.begin(observation, state, generator, frames)
            carry |= {f"inner.{name}": value for name, value in begun.items()}
        return carry

    def act(
        self, observation: Tensor, legal: Tensor | None, carry: Carry, generator: torch.Generator, frames: int | None
    ) -> tuple[Tensor, Carry]:
        change, spec = self.change, self.spec
        seen = observation
        if change.stale > 0.0:
            late = torch.rand(seen.shape[:2], generator=generator, device=generator.device) < change.stale
            seen = torch.where(late.unsqueeze(-1), carry["seen"], seen)
        if change.noise > 0.0:
            assert self.spread is not None
            noise = torch.randn(seen.shape, generator=generator, device=generator.device)
            seen = seen + change.noise * self.spread * noise
        after = {"absent": carry["absent"], "seen": observation}
        if change.missing < spec.num_agents:
            inner = {name[6:]: value for name, value in carry.items() if name.startswith("inner.")}
            action, inner = self.actor.act(seen, legal, inner, generator, frames)
            after |= {f"inner.{name}": value for name, value in inner.items()}
        else:
            action = torch.zeros(observation.shape[:2], dtype=torch.int64, device=observation.device)
        if change.missing:
            action = with_missing(action, carry["absent"], legal, spec.idle_action, spec.num_actions, generator)
        return action, after


class MaskedTeam:
    """A team that is told by the mask of available actions what it may do, and that is remembered for comparison.

    ``override``: at the first step, and from then on with probability ``share``, a person prescribes the action of
    ``seat``: the only one available to it. Without a seat: each action that is available stays so with probability
    ``share``, at least one of them.

    Args:
        actor: the team.
        spec: of the task.
        seat: whose actions are prescribed; ``None``: masks at random.
        share: as above.

    Attributes:
        masks: each step's mask as the team was given it, bool ``[rows, agents, actions]``.
        overrides: each step's prescribed action int64 ``[rows]``, -1 where there is none.
    """

    def __init__(self, actor: ActsMultiAgent, spec: MultiAgentSpec, seat: int | None, share: float) -> None:
        self.actor, self.spec, self.seat, self.share = actor, spec, seat, share
        self.masks: list[Tensor] = []
        self.overrides: list[Tensor] = []

    def begin(self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None) -> Carry:
        self.masks, self.overrides = [], []
        return self.actor.begin(observation, state, generator, frames)

    def act(
        self, observation: Tensor, legal: Tensor | None, carry: Carry, generator: torch.Generator, frames: int | None
    ) -> tuple[Tensor, Carry]:
        mask = _full(legal, observation, self.spec.num_actions)
        drawn = torch.rand(mask.shape, generator=generator, device=generator.device)
        favourite = torch.where(mask, drawn, -1.0).argmax(-1, keepdim=True)
        one = torch.zeros_like(mask).scatter(-1, favourite, True) & mask
        if self.seat is None:
            mask = mask & ((drawn < self.share) | one)
        else:
            coin = torch.rand(len(mask), generator=generator, device=generator.device)
            told = (coin < self.share) | (not self.masks)
            told = told & mask[:, self.seat].any(-1)  # who has no action left cannot be told one
            rows = torch.where(told.unsqueeze(-1), one[:, self.seat], mask[:, self.seat])
            mask = mask.clone()
            mask[:, self.seat] = rows
            self.overrides.append(torch.where(told, favourite[:, self.seat, 0], -1))
        self.masks.append(mask)
        return self.actor.act(observation, mask, carry, generator, frames)


class MixedTeam:
    """A team whose agents follow different policies, drawn per episode.

    A pair of policies, ``a`` and ``b``, and a seat are drawn for each row. With ``cross`` the agent in the seat follows
    ``a`` and all others ``b``; without, all follow ``a``. Equal generators give equal draws in both cases.

    Args:
        policies: at least two, each of which acts for whole teams.
        cross: as above.
        host: the only policy to be ``a``; ``None``: any.

    Raises:
        ValueError: fewer than two policies.
    """

    def __init__(self, policies: Sequence[ActsMultiAgent], cross: bool, host: int | None = None) -> None:
        if len(policies) < 2:
            raise ValueError(f"MixedTeam: policies: must be at least 2, got {len(policies)}")
        self.policies, self.cross, self.host = list(policies), cross, host

    def begin(self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None) -> Carry:
        (rows, agents), count = observation.shape[:2], len(self.policies)
        drawn = torch.rand(rows, 3, generator=generator, device=generator.device)
        first = (drawn[:, 0] * count).long().clamp_max(count - 1)
        if self.host is not None:
            first = torch.full_like(first, self.host)
        second = (first + 1 + (drawn[:, 1] * (count - 1)).long().clamp_max(count - 2)) % count
        seat = (drawn[:, 2] * agents).long().clamp_max(agents - 1)
        own = (torch.arange(agents, device=seat.device) == seat.unsqueeze(1)) | (not self.cross)
        carry = {"policy": torch.where(own, first.unsqueeze(1), second.unsqueeze(1))}
        for number, policy in enumerate(self.policies):
            begun = policy.begin(observation, state, generator, frames)
            carry |= {f"{number}.{name}": value for name, value in begun.items()}
        return carry

    def act(
        self, observation: Tensor, legal: Tensor | None, carry: Carry, generator: torch.Generator, frames: int | None
    ) -> tuple[Tensor, Carry]:
        chosen, after = [], {"policy": carry["policy"]}
        for number, policy in enumerate(self.policies):
            mark = f"{number}."
            inner = {name[len(mark) :]: value for name, value in carry.items() if name.startswith(mark)}
            action, inner = policy.act(observation, legal, inner, generator, frames)
            chosen.append(action)
            after |= {f"{mark}{name}": value for name, value in inner.items()}
        return torch.stack(chosen).gather(0, carry["policy"].unsqueeze(0)).squeeze(0), after
