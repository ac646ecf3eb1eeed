"""The game of an agent and an attacker, one step of all environments at a time.

The attack happens inside the batched step: one forward pass a side, whatever the number of environments, and each
environment's players may be other members of their populations, drawn once an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from modules.contracts import ControlSpec, ControlStep
from modules.contracts.control import Carry
from modules.control.perturbation import PerturbationSet
from modules.control.players import OBSERVATION_CLIP, PlayerNetworks, part
from modules.control.policy import MemorySettings, PolicySet


@dataclass
class Situation:
    """What an attacker knows: everything of the agent that acts, for attacks that use it.

    Args:
        observation: ``[envs, observation_size]``, true.
        clean: the same as the agent would see it without attack, normalised.
        previous: ``[envs, size]``, the perturbation before, 0 where ``fresh``.
        fresh: bool ``[envs]``, or ``None``.
        noise: ``[envs, noise_size]`` standard normal, the attacker's.
        uniform: ``[envs]``, the episode's number, from which members are drawn.
        member: int64 ``[envs]`` or ``None``, a member that evaluation prescribes.
        action: ``[envs, action_size]``, the agent's, where actions are attacked.
        std: ``[envs or 1, action_size]``, the agent's standard deviation.
        mean: perturbed observation ``[envs, observation_size]`` to the agent's mean action, differentiable.
        value: the same to the agent's critic ``[envs]``, or ``None``.
    """

    observation: Tensor
    clean: Tensor
    previous: Tensor
    fresh: Tensor | None
    noise: Tensor
    uniform: Tensor
    member: Tensor | None
    action: Tensor | None
    std: Tensor
    mean: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]


class Attacker(Protocol):
    """Chooses perturbations. ``noise_size`` normal numbers a step; its own carry, names beginning with ``attack``."""

    noise_size: int

    def begin(self, envs: int) -> Carry: ...

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        """A perturbation ``[envs, size]`` (it is projected on the feasible set afterwards), its carry, its record."""
        ...


def drawn_member(uniform: Tensor, weights: Tensor) -> Tensor:
    """int64 ``[envs]``: members drawn from ``weights`` ``[members]`` with uniform numbers ``[envs]``."""
    edges = weights.to(torch.float64).cumsum(0)
    edges = edges / edges[-1]
    member = torch.searchsorted(edges, uniform.double().contiguous(), right=True)
    last = int(weights.nonzero().max())  # rounding must not lead beyond the last member that has a weight
    return member.clamp_max(last)


class Agent:
    """Members of an agent population that act.

    Args:
        networks: their shape.
        params: ``[members, ...]`` as members are stored: ``policy.*``, ``value.*``, ``mean``, ``std``.
        weights: ``[members]``, from which each episode draws.
        memory: what they see of the past.
        sampled: draw actions; else the mean is taken.
    """

    def __init__(
        self,
        networks: PlayerNetworks,
        params: Mapping[str, Tensor],
        weights: Tensor,
        memory: MemorySettings,
        sampled: bool,
    ) -> None:
        self.networks, self.memory, self.sampled = networks, memory, sampled
        self.policies = PolicySet(networks.policy, part(params, "policy"))
        self.critics = PolicySet(networks.value, part(params, "value"))
        self.weights = weights
        self.mean, self.scale = params["mean"].float(), 1.0 / params["std"].float()
        self.std = self.policies.all["log_std"].exp()

    @property
    def members(self) -> int:
        return self.policies.members


class GameActor:
    """An agent, and an attacker or none, as a :class:`~modules.contracts.ControlActor`.

    Args:
        spec: of the task.
        agent: acts.
        attacker: perturbs; ``None``: nobody does.
        budget: the feasible perturbations; ``None``: unbounded (mixed actions), or no attacker.
        space: what is perturbed: ``state``, ``action`` or ``params``.
        clip_executed: clip executed actions to the task's bounds.
        learner: whose experience is recorded: ``agent``, ``adversary`` or ``none``.
        cells: int64 ``[groups, 2]`` on the module's device, agent and adversary of each group of evaluation episodes,
            -1: drawn.
        detail: record perturbations in evaluation too.
    """

    draws = 2

    def __init__(
        self,
        spec: ControlSpec,
        agent: Agent,
        attacker: Attacker | None = None,
        budget: PerturbationSet | None = None,
        space: str = "action",
        clip_executed: bool = True,
        learner: str = "none",
        cells: Tensor | None = None,
        detail: bool = False,
    ) -> None:
        self.spec, self.agent, self.attacker, self.budget, self.space = spec, agent, attacker, budget, space
        self.learner, self.cells, self.detail = learner, cells, detail
        device = agent.mean.device
        low, high = (torch.tensor(bound, device=device) for bound in (spec.action_low, spec.action_high))
        self.bounds = (low, high) if clip_executed and bool((low.isfinite() | high.isfinite()).any()) else None
        self.agent_noise = spec.action_size if agent.sampled else 0
        self.noise_parts = (self.agent_noise, attacker.noise_size if attacker is not None else 0)
        self._assigned = False

    def begin(self, envs: int) -> Carry:
        agent, spec = self.agent, self.spec
        device = agent.mean.device
        carry: Carry = {}
        if agent.memory.kind == "stack":
            width = agent.memory.k * (spec.observation_size + spec.action_size)
            carry["memory"] = torch.zeros(envs, width, device=device)
        elif agent.memory.kind == "lstm":
            carry["state"] = torch.zeros(envs, agent.networks.policy.state_size, device=device)
            carry["value_state"] = torch.zeros(envs, agent.networks.value.state_size, device=device)
        if agent.members > 1:
            carry["agent"] = torch.zeros(envs, dtype=torch.int64, device=device)
        if self.attacker is not None:
            size = self.budget.size if self.budget is not None else spec.action_size
            carry["previous"] = torch.zeros(envs, size, device=device)
            carry.update(self.attacker.begin(envs))
        return carry

    def act(
        self, observation: Tensor, carry: Carry, fresh: Tensor | None, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        agent, after = self.agent, dict(carry)
        observation = observation.float()
        if fresh is not None:
            keep = (~fresh).unsqueeze(-1)
            for name in ("memory", "state", "value_state", "previous"):
                if name in after:
                    after[name] = after[name] * keep
        member = self._members(after, fresh, draw, group)
        centre, scale = agent.mean, agent.scale
        if member is not None:
            centre, scale = centre[member], scale[member]
        clean = ((observation - centre) * scale).clamp_(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        record: dict[str, Tensor] = {}
        p: Tensor | None = None
        seen = clean
        attacks_state = self.attacker is not None and self.space == "state"
        if attacks_state:
            p = self._perturb(observation, clean, after, fresh, draw, noise, group, member, None, record)
            seen = clean + p
        features = self._features(seen, after)
        recording = self.learner == "agent" and group is None
        if recording:
            record["features"] = features
            for name in ("state", "value_state"):
                if name in after:
                    record[name] = after[name]
        mean, state = agent.policies.step(features, after.get("state"))
        if state is not None:
            after["state"] = state
            after["value_state"] = cast(Tensor, agent.critics.step(features, after["value_state"])[1])
            if recording:
                record["value_state_after"] = after["value_state"]
        action = mean
        if agent.sampled:
            std = agent.std if member is None else agent.std[member]
            action = torch.addcmul(mean, std, noise[:, : self.agent_noise])
        if agent.memory.kind == "stack":
            after["memory"] = agent.memory.remembered(after["memory"], seen, action)
        if recording:
            record["action"] = action
        executed, parameters = action, None
        if self.attacker is not None and not attacks_state:
            p = self._perturb(observation, clean, after, fresh, draw, noise, group, member, action, record)
            if self.space == "action":
                executed = action + p
            else:
                parameters = p
        if p is not None:
            after["previous"] = p
        if self.bounds is not None:
            executed = torch.minimum(torch.maximum(executed, self.bounds[0]), self.bounds[1])
        return ControlStep(executed, parameters, after, record)

    def _members(self, carry: Carry, fresh: Tensor | None, draw: Tensor, group: Tensor | None) -> Tensor | None:
        """Which member acts in each environment; ``None`` where there is one."""
        agent = self.agent
        if agent.members == 1:
            return None
        if fresh is not None:
            member = drawn_member(draw[:, 0], agent.weights)
            if group is not None and self.cells is not None:
                prescribed = self.cells[group, 0]
                member = torch.where(prescribed >= 0, prescribed, member)
            carry["agent"] = torch.where(fresh, member, carry["agent"])
        if fresh is not None or not self._assigned:
            agent.policies.assign(carry["agent"])
            agent.critics.assign(carry["agent"])
            self._assigned = True
        return carry["agent"]

    def _features(self, seen: Tensor, carry: Carry) -> Tensor:
        return torch.cat([seen, carry["memory"]], -1) if "memory" in carry else seen

    def _perturb(
        self,
        observation: Tensor,
        clean: Tensor,
        carry: Carry,
        fresh: Tensor | None,
        draw: Tensor,
        noise: Tensor,
        group: Tensor | None,
        member: Tensor | None,
        action: Tensor | None,
        record: dict[str, Tensor],
    ) -> Tensor:
        assert self.attacker is not None
        agent, previous = self.agent, carry["previous"]
        prescribed = None if group is None or self.cells is None else self.cells[group, 1]
        memory = {name: carry[name] for name in ("memory", "state", "value_state") if name in carry}

        def mean(seen: Tensor) -> Tensor:
            return agent.policies.step(self._features(seen, memory), memory.get("state"))[0]

        def value(seen: Tensor) -> Tensor:
            return agent.critics.step(self._features(seen, memory), memory.get("value_state"))[0].squeeze(-1)

        situation = Situation(
            observation=observation,
            clean=clean,
            previous=previous,
            fresh=fresh,
            noise=noise[:, self.agent_noise :],
            uniform=draw[:, 1],
            member=prescribed,
            action=action,
            std=agent.std if member is None else agent.std[member],
            mean=mean,
            value=value,
        )
        p, extra, more = self.attacker.attack(situation, carry)
        carry.update(extra)
        if self.budget is not None:
            p = self.budget.project(p, previous, fresh)
        if group is None:
            if self.learner == "adversary":
                record.update(more)
            record["perturbation"], record["previous"] = p, previous
        elif self.budget is not None:
            leap = self.budget.norms(p - previous)
            if fresh is not None and self.budget.settings.first_step == "free":
                leap = leap.masked_fill(fresh, 0.0)
            over, step_over = self.budget.excess(p, previous, fresh)
            record["max_linf"], record["max_step_linf"] = self.budget.norms(p), leap
            record["max_over"], record["max_step_over"] = over, step_over
            if self.detail:
                record["perturbation"] = p
        return p
