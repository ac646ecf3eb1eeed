"""Actors that try a policy in ways that training never does: scripted, overridden, inspected, compared with inaction.

All are :class:`~modules.contracts.ControlActor` or attackers for whole episodes: rows are groups of equally many
episodes, one group after the other, and episode ``i`` begins alike in all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from modules.contracts.control import Carry, ControlActor, ControlStep
from modules.control.actor import Situation
from modules.control.attackers import uniform_of

Law = Callable[[Tensor, Tensor], Tensor]
"""Observation ``[rows, size]`` and standard normal numbers ``[rows, noise]`` to actions ``[rows, actions]``."""

Look = Callable[[Callable[[Tensor], Tensor], Tensor], Mapping[str, Tensor]]
"""``(policy, seen [rows, size])`` to values ``[rows, ...]`` by name.

``policy`` maps what the agent sees, its memory held as it is, to its mean action before clipping: ``[n * rows, size]``,
``n`` times all rows, to ``[n * rows, actions]``; differentiable.
"""


class Scripted:
    """Acts by a law of what is observed, without memory.

    Args:
        law: see :data:`Law`.
        noise: standard normal numbers that it takes.
    """

    draws = 0

    def __init__(self, law: Law, noise: int = 0) -> None:
        self.law, self.noise_parts = law, (noise,)

    def begin(self, envs: int) -> Carry:
        return {}

    def act(
        self, observation: Tensor, carry: Carry, fresh: Tensor | None, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        return ControlStep(self.law(observation.float(), noise), None, {})


class Replay:
    """Executes given actions ``[episodes, steps, actions]``, whatever it sees; the last one again beyond them."""

    draws = 0
    noise_parts: tuple[int, ...] = (0,)

    def __init__(self, actions: Tensor) -> None:
        self.actions, self._step = actions, 0

    def begin(self, envs: int) -> Carry:
        self._step = 0
        return {}

    def act(
        self, observation: Tensor, carry: Carry, fresh: Tensor | None, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        action = self.actions[:, min(self._step, self.actions.shape[1] - 1)]
        self._step += 1
        return ControlStep(action, None, {})


class Wrapped:
    """An actor that acts as another one and changes what comes out.

    Args:
        inner: the other one.
        noise: further standard normal numbers a step.
        draws: further uniform numbers an episode.
    """

    def __init__(self, inner: ControlActor, noise: int = 0, draws: int = 0) -> None:
        self.inner, self.noise_parts, self.draws = inner, (*inner.noise_parts, noise), inner.draws + draws
        self._inner_noise = sum(inner.noise_parts)
        self._step = 0

    def begin(self, envs: int) -> Carry:
        self._step = 0
        return self.inner.begin(envs)

    def act(
        self, observation: Tensor, carry: Carry, fresh: Tensor | None, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        own, more = noise[:, : self._inner_noise], noise[:, self._inner_noise :]
        step = self.inner.act(observation, carry, fresh, draw[:, : self.inner.draws], own, group)
        step = self.change(step, observation, draw[:, self.inner.draws :], more, group)
        self._step += 1
        return step

    def change(
        self, step: ControlStep, observation: Tensor, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        raise NotImplementedError


class Varied(Wrapped):
    """Another world for each group: changed dynamics, noise on what is executed.

    Args:
        inner: acts.
        parameters: ``[groups, parameters]``, relative changes; ``None``: the task has none.
        noise: ``[groups, actions]``, standard deviations.
        bounds: least and greatest action ``[actions]`` each.
    """

    def __init__(
        self, inner: ControlActor, parameters: Tensor | None, noise: Tensor, bounds: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(inner, noise=noise.shape[1])
        self.parameters, self.deviations, self.bounds = parameters, noise, bounds

    def change(
        self, step: ControlStep, observation: Tensor, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        assert group is not None
        action = step.action + self.deviations[group] * noise
        action = torch.minimum(torch.maximum(action, self.bounds[0]), self.bounds[1])
        parameters = None if self.parameters is None else self.parameters[group]
        return ControlStep(action, parameters, step.carry, {})


class Overridden(Wrapped):
    """A human override takes the action's place at the first step, and later ones by chance.

    Args:
        inner: acts.
        chance: of an override at a step.
        low, high: ``[actions]``, between which overrides are drawn.
    """

    def __init__(self, inner: ControlActor, chance: float, low: Tensor, high: Tensor) -> None:
        super().__init__(inner, noise=1 + len(low))
        self.chance, self.low, self.high = chance, low, high

    def change(
        self, step: ControlStep, observation: Tensor, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        uniform = torch.special.ndtr(noise)
        wanted = self.low + (self.high - self.low) * uniform[:, 1:]
        active = (uniform[:, :1] < self.chance) | (self._step == 0)
        action = torch.where(active, wanted, step.action)
        override = torch.where(active, wanted, torch.nan)
        return ControlStep(action, step.parameters, step.carry, {"override": override})


class BesidesInaction(Wrapped):
    """What one action moves that inaction would not have moved, for the policy and for a random one.

    Four groups: the policy; the same, but inactive at one step of the episode, drawn uniformly; and both with random
    actions in the policy's place. ``max_effect`` in groups 0 and 2 is the distance of the observations one step
    later, in ``scale``; 0 if the episode was over by then.

    Args:
        inner: the policy.
        random: noise to a random action.
        noise: numbers that it takes.
        idle: ``[actions]``, what doing nothing is.
        scale: ``[observation_size]``, units of observations.
        steps: of an episode.
    """

    groups = 4

    def __init__(
        self,
        inner: ControlActor,
        random: Callable[[Tensor], Tensor],
        noise: int,
        idle: Tensor,
        scale: Tensor,
        steps: int,
    ) -> None:
        super().__init__(inner, noise=noise, draws=1)
        self.random, self.idle, self.scale, self.steps = random, idle, scale, steps

    def change(
        self, step: ControlStep, observation: Tensor, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        share = len(step.action) // self.groups
        own, chance = step.action[:share], self.random(noise[:share])
        when = (draw[:share] * max(1, self.steps - 1)).long()
        idle = when == self._step
        action = torch.cat(
            [own, torch.where(idle, self.idle, own), chance, torch.where(idle, self.idle, chance)]
        )  # up to then, pairs of groups are copies of each other
        seen = observation.view(self.groups, share, -1)
        apart = ((seen[0::2] - seen[1::2]) / self.scale).norm(dim=-1)  # [2, episodes]
        apart = torch.where(when.squeeze(1) + 1 == self._step, apart, 0.0)
        effect = torch.zeros(self.groups, share, dtype=apart.dtype, device=apart.device)
        effect[0::2] = apart
        return ControlStep(action, step.parameters, step.carry, {"max_effect": effect.flatten()})


class Inspector:
    """An attacker that perturbs nothing and looks at each episode at one step of it.

    Args:
        look: see :data:`Look`; called with all rows where any is due.
        when: int64 ``[episodes]``, the step at which each is looked at.
    """

    noise_size = 0

    def __init__(self, look: Look, when: Tensor) -> None:
        self.look, self.when = look, when
        self.found: dict[str, Tensor] = {}
        self._step = 0

    def begin(self, envs: int) -> Carry:
        self._step, self.found = 0, {}
        return {}

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        due = self.when == self._step
        self._step += 1
        if bool(due.any()):
            rows = len(due)

            def policy(seen: Tensor) -> Tensor:
                return torch.cat([situation.mean(part) for part in seen.split(rows)])

            for name, value in self.look(policy, situation.clean).items():
                room = self.found.setdefault(name, torch.zeros_like(value))
                room[due] = value[due]
        return torch.zeros_like(situation.clean), {}, {}


def random_law(low: Tensor, high: Tensor, spread: float) -> Law:
    """Uniform actions where coordinates are bounded, normal ones of ``spread`` where they are not."""
    bounded = low.isfinite() & high.isfinite()
    centre = torch.where(bounded, (low + high) / 2, 0.0)
    half = torch.where(bounded, (high - low) / 2, spread)

    def law(observation: Tensor, noise: Tensor) -> Tensor:
        return centre + half * torch.where(bounded, uniform_of(noise), noise)

    return law


def recorded(played: Any) -> dict[str, Tensor]:
    """``[episodes, steps, ...]`` of a traced evaluation of one group, with returns and lengths ``[episodes]``."""
    trace = {name: value[0] for name, value in played["trace"].items()}
    return {**trace, "returns": played["episode_return"][0], "length": played["episode_length"][0]}
