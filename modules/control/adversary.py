"""Adversaries that are learned: SA-RL's and PA-AD's policies, increments, and mixed actions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modules.contracts.control import Carry
from modules.control.actor import Situation, drawn_member
from modules.control.attacks import director_attack
from modules.control.perturbation import PerturbationSet
from modules.control.players import OBSERVATION_CLIP, AdversarySettings, PlayerNetworks, part
from modules.control.policy import PolicySet


def previous_scale(budget: PerturbationSet | None) -> Tensor | float:
    """Factor by which networks see the perturbation before: a share of ``eps``, or itself where there is no budget."""
    if budget is None:
        return 1.0
    eps = budget.eps if budget.settings.norm == "inf" else budget.eps.expand(budget.size)
    return torch.where(eps > 0, 1.0 / eps.clamp_min(1e-30), 0.0)


class LearnedAttacker:
    """Members of an adversary population that perturb.

    Args:
        networks: their shape.
        params: ``[members, ...]`` as members are stored, with ``active`` (0: a member that does nothing).
        weights: ``[members]``, from which each episode draws.
        settings: how an output becomes a perturbation.
        budget: feasible perturbations.
        sampled: draw outputs; else the mean is taken.
        bounds: least and greatest action, for mixed actions.
    """

    def __init__(
        self,
        networks: PlayerNetworks,
        params: Mapping[str, Tensor],
        weights: Tensor,
        settings: AdversarySettings,
        budget: PerturbationSet | None,
        sampled: bool,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.networks, self.weights, self.settings, self.budget = networks, weights, settings, budget
        self.sampled, self.bounds = sampled, bounds
        self.policies = PolicySet(networks.policy, part(params, "policy"))
        self.mean, self.scale = params["mean"].float(), 1.0 / params["std"].float()
        self.active = params["active"].float()
        self.std = self.policies.all["log_std"].exp()
        self.all_active = bool((self.active == 1).all())
        self.previous_scale = previous_scale(budget)
        self.outputs = networks.outputs if sampled else 0
        self.start = budget.size if settings.kind == "pa_ad" and budget is not None else 0
        self.coin = 1 if settings.kind == "pr" else 0
        self.noise_size = self.outputs + self.start + self.coin
        self._assigned = False

    def begin(self, envs: int) -> Carry:
        if self.policies.members == 1:
            return {}
        return {"attack_member": torch.zeros(envs, dtype=torch.int64, device=self.mean.device)}

    def _member(self, situation: Situation, carry: Carry) -> Tensor | None:
        if self.policies.members == 1:
            return None
        member = carry["attack_member"]
        if situation.fresh is not None:
            drawn = drawn_member(situation.uniform, self.weights)
            if situation.member is not None:
                drawn = torch.where(situation.member >= 0, situation.member, drawn)
            member = torch.where(situation.fresh, drawn, member)
        if situation.fresh is not None or not self._assigned:
            self.policies.assign(member)
            self._assigned = True
        return member

    def features(self, observation: Tensor, previous: Tensor, member: Tensor | None) -> Tensor:
        """What the adversary's networks see: the true observation, normalised, and the perturbation before."""
        centre, scale = self.mean, self.scale
        if member is not None:
            centre, scale = centre[member], scale[member]
        seen = ((observation - centre) * scale).clamp_(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        if not self.settings.observe_previous:
            return seen
        return torch.cat([seen, previous * self.previous_scale], -1)

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        member = self._member(situation, carry)
        features = self.features(situation.observation, situation.previous, member)
        z = self.policies.step(features, None)[0]
        if self.sampled:
            std = self.std if member is None else self.std[member]
            z = torch.addcmul(z, std, situation.noise[:, : self.outputs])
        p = self._perturbation(z, situation)
        if not self.all_active:
            p = p * (self.active if member is None else self.active[member].unsqueeze(-1))
        extra = {} if member is None else {"attack_member": member}
        return p, extra, {"adversary_features": features, "adversary_action": z}

    def _perturbation(self, z: Tensor, situation: Situation) -> Tensor:
        settings, budget = self.settings, self.budget
        if settings.mixes:
            assert situation.action is not None
            other = z
            if self.bounds is not None:
                other = torch.minimum(torch.maximum(z, self.bounds[0]), self.bounds[1])
                own = torch.minimum(torch.maximum(situation.action, self.bounds[0]), self.bounds[1])
            else:
                own = situation.action
            if settings.kind == "nr":
                return settings.alpha * (other - own)
            uniform = torch.special.ndtr(situation.noise[:, self.outputs + self.start :])
            return torch.where(uniform < settings.alpha, other - situation.action, torch.zeros_like(z))
        assert budget is not None
        if settings.kind == "pa_ad":
            start = torch.special.ndtr(situation.noise[:, self.outputs : self.outputs + self.start]) * 2.0 - 1.0

            def project(p: Tensor) -> Tensor:
                return budget.project(p, situation.previous, situation.fresh)

            return director_attack(
                situation.mean, situation.clean, z, budget.eps, project, start, settings.steps, budget.settings.norm
            )
        squashed = torch.nn.functional.hardtanh(z)
        if settings.kind == "direct" or not budget.coupled:
            return budget.eps * squashed
        p = situation.previous + budget.eps_bar * squashed
        if situation.fresh is not None and budget.settings.first_step == "free":
            p = torch.where(situation.fresh.unsqueeze(-1), budget.eps * squashed, p)
        return p
