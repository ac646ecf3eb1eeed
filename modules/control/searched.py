"""An adversary found by search: a linear law of what the agent sees, chosen by the returns it leaves the agent.

It needs neither gradients nor a model of the task, works in every space, and takes a fraction of the frames of an
adversary that is trained. A gradient attack that is weaker than it warns of masked gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.control import Carry
from modules.control.actor import Situation
from modules.control.adversary import previous_scale
from modules.control.perturbation import PerturbationSet
from modules.seeds import stream

Scores = Callable[[Tensor], Tensor]
"""Laws ``[laws, size, features]`` to the mean return that each leaves the agent ``[laws]``."""


class LinearAttacker:
    """``p = eps * clip(W [observation, p before / eps, 1], -1, 1)``, projected on the feasible set.

    Args:
        laws: ``W`` ``[laws, size, features]``, ``features`` = observation + size + 1; with several, evaluation's cells
            prescribe which one perturbs.
        budget: feasible perturbations.
    """

    noise_size = 0

    def __init__(self, laws: Tensor, budget: PerturbationSet) -> None:
        self.laws, self.budget = laws, budget
        self.previous_scale = previous_scale(budget)

    def begin(self, envs: int) -> Carry:
        return {}

    def attack(self, situation: Situation, carry: Carry) -> tuple[Tensor, Carry, dict[str, Tensor]]:
        seen = situation.clean
        features = torch.cat([seen, situation.previous * self.previous_scale, torch.ones_like(seen[:, :1])], -1)
        if len(self.laws) == 1 or situation.member is None:
            z = features @ self.laws[0].t()
        else:  # rows are sorted by their law
            z = torch.bmm(self.laws, features.view(len(self.laws), -1, features.shape[-1]).transpose(1, 2))
            z = z.transpose(1, 2).reshape(len(features), -1)
        return self.budget.eps * z.clamp(-1.0, 1.0), {}, {}


@dataclass(frozen=True)
class SearchSettings:
    """The cross-entropy method (Rubinstein 1999) over linear laws.

    Args:
        laws: tried in each generation.
        elites: whose mean and spread the next generation is drawn from.
        generations: how often.
        spread: standard deviation of the first generation's entries.
    """

    laws: int = 32
    elites: int = 6
    generations: int = 4
    spread: float = 1.0


def search(scores: Scores, size: int, observation: int, settings: SearchSettings, seed: int) -> Tensor:
    """The law ``[1, size, features]`` that left the agent the lowest return, of all that were tried.

    The first generation holds constant biases of full size in both directions of every coordinate (as many as fit):
    so the search is never weaker than the worst of them on the episodes it scores by.
    """
    generator = stream(seed)
    shape = (settings.laws, size, observation + size + 1)
    centre, spread = torch.zeros(shape[1:]), torch.full(shape[1:], settings.spread)
    best, lowest = torch.zeros(1, *shape[1:]), torch.inf
    for generation in range(settings.generations):
        laws = centre + spread * torch.randn(shape, generator=generator)
        if generation == 0:
            for place in range(min(2 * size, settings.laws // 2)):
                laws[place] = 0.0
                laws[place, place // 2, -1] = 1.0 if place % 2 else -1.0
        else:
            laws[0] = best[0]
        found = scores(laws).cpu().double()
        order = found.argsort(stable=True)
        if float(found[order[0]]) < lowest:
            best, lowest = laws[order[:1]].clone(), float(found[order[0]])
        chosen = laws[order[: settings.elites]]
        centre = chosen.mean(0)
        # the floor keeps later generations exploring
        spread = chosen.std(0).clamp_min(0.1 * settings.spread)
    return best
