"""Kinds of instances (distribution, size, scaling): fixed sets of them, and fresh ones from a seed alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.routing.distribution import Distribution, unit_box
from modules.contracts import RoutingProblem
from modules.seeds import stream, text_seed

FILE = 100
"""Instances of the set that a fresh one is taken from, where instances of a set depend on each other."""


@dataclass(frozen=True)
class InstanceKind:
    """What instances of a set have in common.

    Args:
        name: of the set.
        distribution: of coordinates.
        size: customers.
        normalize: ``unit_box``: solvers see each instance stretched to the unit square; costs stay as drawn.
    """

    name: str
    distribution: Distribution
    size: int
    normalize: Literal["none", "unit_box"] = "none"

    def make(self, problem: RoutingProblem, locs: Tensor, generator: torch.Generator) -> TensorDict:
        """Instances ``[B]`` at ``locs`` ``[B, N, 2]``, the rest drawn from ``generator``."""
        instances = problem.generate(locs, generator)
        if self.normalize == "unit_box":
            instances["original"] = locs.double()
            instances["rounded"] = torch.zeros(len(locs), dtype=torch.bool)
            instances["locs"] = unit_box(locs)
        return instances

    def fresh(self, problem: RoutingProblem, count: int, seed: int) -> TensorDict:
        """``count`` instances that are independent of each other, a function of ``seed``, with ``index``.

        Where a distribution makes a set as a whole, each is the first of a set of its own.
        """
        generator = stream(seed, text_seed(str(self.distribution)), self.size)
        nodes = problem.nodes(self.size)
        if self.distribution.joint:
            locs = torch.stack([self.distribution.sample(FILE, nodes, generator)[0] for _ in range(count)])
        else:
            locs = self.distribution.sample(count, nodes, generator)
        instances = self.make(problem, locs, generator)
        instances["index"] = torch.arange(count)
        return instances


@dataclass(frozen=True)
class HeldOutKind(InstanceKind):
    """A held-out set of ``count`` instances before it is made."""

    count: int = 1


Solve = Callable[[TensorDict, int], tuple[Tensor, Tensor]]
"""(instances of one size, their size) -> the oracle's routes ``[B, T]`` and costs ``[B]`` float64."""


def add_references(instances: Mapping[str, TensorDict], kinds: Mapping[str, InstanceKind], solve: Solve) -> None:
    """Give every set ``reference`` ``[B]`` and ``reference_route`` ``[B, T]``: one call of ``solve`` per size."""
    for size in sorted({kind.size for kind in kinds.values()}):
        names = [name for name, kind in kinds.items() if kind.size == size]
        together: dict[tuple[str, ...], list[str]] = {}
        for name in names:  # only sets with the same fields can be joined
            together.setdefault(tuple(sorted(map(str, instances[name].keys()))), []).append(name)
        for members in together.values():
            routes, costs = solve(cast(TensorDict, torch.cat([instances[name] for name in members])), size)
            first = 0
            for name in members:
                rows = slice(first, first + len(instances[name]))
                instances[name]["reference"], instances[name]["reference_route"] = costs[rows], routes[rows]
                first = rows.stop
