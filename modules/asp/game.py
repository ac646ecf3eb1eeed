"""The game at one scale, beside populations and payoffs: mixtures of generators, their instance sets, ended rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.asp.generator import GeneratorLearner
from modules.population.members import Members
from modules.routing.solver import RoutingSolver


class ScaleGame:
    """Generator -> its fixed instances with references (on the CPU, of all ranks); gaps after every round."""

    def __init__(self) -> None:
        self.sets: dict[int, TensorDict] = {}
        self.means: list[float] = []
        self.gaps: list[dict[int, float]] = []

    @property
    def rounds_done(self) -> int:
        return len(self.means)

    def record(self, mean_seen: float, gaps: Mapping[int, float]) -> None:
        """A round has ended: mean held-out gap over the scales seen, and the gaps of all scales, in percent."""
        self.means.append(mean_seen)
        self.gaps.append(dict(gaps))

    def best(self) -> tuple[int, dict[int, float]]:
        """The round whose solver has the lowest mean gap, from 0, and its gaps."""
        number = min(range(len(self.means)), key=self.means.__getitem__)
        return number, dict(self.gaps[number])

    def share(self, generator: int, rank: int, world: int) -> TensorDict:
        """This rank's instances of a generator."""
        return self.sets[generator][rank::world]  # pyright: ignore[reportReturnType]

    def state_dict(self) -> dict[str, Any]:
        sets = {number: dict(instances.items()) for number, instances in self.sets.items()}
        return {"sets": sets, "means": list(self.means), "gaps": [dict(gaps) for gaps in self.gaps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sets = {int(n): TensorDict(fields, [len(fields["index"])]) for n, fields in state["sets"].items()}
        self.means = [float(mean) for mean in state["means"]]
        self.gaps = [{int(scale): float(gap) for scale, gap in gaps.items()} for gaps in state["gaps"]]


class Mixture:
    """Coordinates of instances that each come from one of several generators, drawn by weight.

    Args:
        numbers: ``[K]`` int64, members that may be drawn; weights: ``[K]``, adding up to 1.
    """

    def __init__(self, learner: GeneratorLearner, members: Members, numbers: Tensor, weights: Tensor) -> None:
        self.learner, self.members, self.numbers, self.weights = learner, members, numbers, weights

    def __call__(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """``[B, N, 2]`` of uniform ``noise`` of that shape."""
        drawn = torch.multinomial(self.weights, noise.shape[0], replacement=True, generator=generator)
        return self.learner.member_coordinates(self.members.stacked(), self.numbers[drawn], noise)


def weights_of(solver: RoutingSolver) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in solver.state_dict().items()}
