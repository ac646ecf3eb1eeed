"""Attackers that are not learned by reinforcement: noise, drift, bias, gradient steps on the agent's networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from modules.contracts.control import Carry
from modules.control.actor import Situation
from modules.control.attacks import (
    constant_bias,
    critic_attack,
    maximal_action_difference,
    ornstein_uhlenbeck,
    random_uniform,
)
from modules.control.perturbation import PerturbationSet

GRADIENT_STEPS = 10
"""Inner steps of gradient attacks (SA-MDP, Zhang et al. 2020)."""


def uniform_of(normal: Tensor) -> Tensor:
    """Standard normal numbers as uniform ones in [-1, 1]."""
    return torch.special.ndtr(normal) * 2.0 - 1.0


class HeuristicAttacker:
    """Perturbations that look at no network.

    Args:
        kind: ``random``: uniform in the feasible box; ``ou``: an Ornstein-Uhlenbeck path; ``constant``: a corner, drawn
            for each episode and held.
        budget: feasible perturbations.
    """

    def __init__(self, kind: Literal["random", "ou", "constant"], budget: PerturbationSet) -> None:
        if kind not in ("random", "ou", "constant"):
            raise ValueError(f"HeuristicAttacker: kind: random, ou or constant, got {kind!r}")
        self.kind, self.budget, self.noise_size = kind, budget, budget.size

    def begin(self, envs: int) -> Carry:
        if self.kind == "random":
            return {}
        return {"attack_path": torch.zeros(envs, self.budget.size, device=self.budget.eps.device)}

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        budget, fresh, previous = self.budget, situation.fresh, situation.previous
        if self.kind == "random":
            return random_uniform(previous, fresh, uniform_of(situation.noise), budget), {}, {}
        path = carry["attack_path"]
        if self.kind == "ou":
            if fresh is not None:
                path = path.masked_fill(fresh.unsqueeze(-1), 0.0)
            path = ornstein_uhlenbeck(path, situation.noise, budget.eps)
            return path, {"attack_path": path}, {}
        p, target = constant_bias(path, fresh, situation.noise, budget)
        return p, {"attack_path": target}, {}


class GradientAttacker:
    """Perturbations of observations along gradients of the agent's policy or of a critic.

    Args:
        kind: ``mad``: maximal action difference (Zhang et al. 2020); ``critic``: lowest value of the agent's critic, or
            of ``q``.
        budget: feasible perturbations.
        q: ``(observation as the agent sees it unattacked [envs, size], action) -> [envs]``: robust Sarsa's, in place of
            the critic.
        steps: inner steps of an attack.
    """

    def __init__(
        self,
        kind: Literal["mad", "critic"],
        budget: PerturbationSet,
        q: Callable[[Tensor, Tensor], Tensor] | None = None,
        steps: int = GRADIENT_STEPS,
    ) -> None:
        if kind not in ("mad", "critic"):
            raise ValueError(f"GradientAttacker: kind: mad or critic, got {kind!r}")
        self.kind, self.budget, self.q, self.steps = kind, budget, q, steps
        self.noise_size = budget.size * (steps + 1) if kind == "mad" else 0

    def begin(self, envs: int) -> Carry:
        return {}

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        budget, clean = self.budget, situation.clean

        def project(p: Tensor) -> Tensor:
            return budget.project(p, situation.previous, situation.fresh)

        if self.kind == "mad":
            noise = situation.noise.view(len(clean), self.steps + 1, budget.size).transpose(0, 1)
            return (
                maximal_action_difference(
                    situation.mean,
                    clean,
                    situation.std.expand(len(clean), -1),
                    budget.eps,
                    project,
                    noise[0],
                    noise[1:],
                    self.steps,
                    budget.settings.norm,
                ),
                {},
                {},
            )
        value = situation.value
        if self.q is not None:
            judge = self.q

            def judged(seen: Tensor) -> Tensor:
                return judge(clean, situation.mean(seen))

            value = judged

        p = critic_attack(value, clean, budget.eps, project, self.steps, budget.settings.norm)
        return p, {}, {}
