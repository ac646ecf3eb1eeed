"""What oracles are: solvers of single instances, given as plain arrays, whose costs serve as references."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict

Route = list[int]
"""Node numbers; of depot problems without the first and the last visit to the depot 0, which separates trips."""


@dataclass(frozen=True)
class Instance:
    """One instance in float64; ``distance`` ``[N, N]`` holds its rounding, other fields are ``None`` where not theirs.

    ``demand``, ``prize`` (real ones), ``penalty`` are ``[N]`` with 0 for the depot. ``demand`` is in whole units of
    which a vehicle takes ``capacity``; ``limit`` is the longest route.
    """

    problem: str
    distance: np.ndarray
    demand: np.ndarray | None = None
    capacity: int = 0
    prize: np.ndarray | None = None
    penalty: np.ndarray | None = None
    limit: float = 0.0

    @property
    def nodes(self) -> int:
        return len(self.distance)

    def trips(self, route: Route) -> list[list[int]]:
        """``route`` cut at the depot."""
        parts: list[list[int]] = [[]]
        for node in route:
            if node:
                parts[-1].append(node)
            elif parts[-1]:
                parts.append([])
        return [part for part in parts if part]

    def cost(self, route: Route) -> float:
        """As the problem counts it."""
        if self.problem == "tsp":
            return self.length([*route, route[0]])
        total = sum(self.length([0, *trip, 0]) for trip in self.trips(route))
        if self.problem == "op":
            assert self.prize is not None
            return -float(self.prize[route].sum())
        if self.penalty is not None:
            total += float(self.penalty.sum() - self.penalty[route].sum())
        return total

    def length(self, path: Route) -> float:
        return float(self.distance[path[:-1], path[1:]].sum())


class Oracle(ABC):
    """Solves instances one by one; ``name`` holds the settings that results depend on."""

    name: str
    exact = False
    """Whether its costs are proven optima."""
    version = 1
    """Raised when routes change under the same name, so that those kept on disk are not taken for new ones."""

    @abstractmethod
    def route(self, instance: Instance) -> Route:
        """A feasible route.

        Raises:
            ValueError: a problem or size that this oracle does not solve.
        """

    def solve(self, instances: list[Instance]) -> list[Route]:
        return [self.route(instance) for instance in instances]


def instances_of(problem: str, batch: TensorDict) -> list[Instance]:
    """Plain arrays of instances ``[B]`` of the problem called ``problem``."""
    original = batch.get("original", None)
    locs = (batch["locs"] if original is None else original).double().cpu()
    distance = torch.cdist(locs, locs, compute_mode="donot_use_mm_for_euclid_dist")
    rounded = batch.get("rounded", None)
    if rounded is not None:
        distance = torch.where(rounded.cpu()[:, None, None], (distance + 0.5).floor(), distance)
    fields: dict[str, np.ndarray] = {}
    for name, key in (("demand", "demand"), ("prize", "prize"), ("real_prize", "prize"), ("penalty", "penalty")):
        value = batch.get(name, None)  # a real prize takes the place of an expected one
        if value is not None:
            fields[key] = np.pad(value.double().cpu().numpy(), ((0, 0), (1, 0)))
    capacity, limit = (batch.get(name, None) for name in ("capacity", "limit"))
    made = []
    for number in range(len(locs)):
        own = {key: value[number] for key, value in fields.items()}
        units = 0
        if "demand" in own:
            units = int(capacity[number]) if capacity is not None else _units(own["demand"])
            own["demand"] = np.rint(own["demand"] * units).astype(np.int64)
        longest = float(limit[number]) if limit is not None else 0.0
        made.append(Instance(problem, distance[number].numpy(), capacity=units, limit=longest, **own))
    return made


def _units(shares: np.ndarray) -> int:
    """The smallest capacity of which all demands are whole parts, up to float32's accuracy; else a million."""
    # float32 shares of at most 1 are off by 6e-8, products of two roundings by twice that
    for units in range(1, 2000):
        parts = shares * units
        if np.abs(parts - np.rint(parts)).max() <= 2e-7 * units:
            return units
    return 1_000_000
