"""What routing problems share: lengths, visits, complaints. The rules' contract is modules.contracts.RoutingProblem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from modules.contracts import RoutingSpec

TOLERANCE = 1e-5
"""By how much sums of float32 shares (demands over capacity, prizes) may be off."""


def rule_for_size(owner: str, what: str, table: Mapping[int, float], size: int, option: str) -> float:
    """The value of ``table`` (customers to value) at ``size``, linear between its sizes.

    Raises:
        ValueError: beyond the table's sizes; names the constructor argument ``option`` that sets the value.
    """
    known = sorted(table)
    if not known[0] <= size <= known[-1]:
        raise ValueError(
            f"{owner}: {what} is known for {known[0]} to {known[-1]} customers, got {size}: set '{option}' for others"
        )
    above = next(n for n in known if n >= size)
    below = max(n for n in known if n <= size)
    share = (size - below) / max(above - below, 1)
    return table[below] + share * (table[above] - table[below])


def distances(difference: Tensor, rounded: Tensor | None) -> Tensor:
    """Euclidean lengths ``[B, ...]`` of ``difference`` ``[B, ..., 2]``.

    They are rounded to the nearest integer, halves up as in TSPLIB's EUC_2D, in the instances marked in ``rounded``
    ``[B]``; ``None``: in none.
    """
    exact = difference.norm(dim=-1)
    if rounded is None:
        return exact
    return torch.where(rounded.view(-1, *[1] * (exact.ndim - 1)), (exact + 0.5).floor(), exact)


class Problem(ABC):
    """Base of the problems; a subclass implements the rest of :class:`~modules.contracts.RoutingProblem`."""

    spec: ClassVar[RoutingSpec]
    customer_fields: ClassVar[tuple[str, ...]] = ()
    """Fields ``[B, customers]`` of instances, all >= 0."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def generate(self, locs: Tensor, generator: torch.Generator) -> TensorDict: ...

    @abstractmethod
    def customer_features(self, instances: TensorDict) -> Tensor: ...

    @abstractmethod
    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]: ...

    @abstractmethod
    def step(self, state: dict[str, Tensor], action: Tensor) -> None: ...

    @abstractmethod
    def finished(self, state: Mapping[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def max_steps(self, nodes: int) -> int: ...

    @abstractmethod
    def cost(self, instances: TensorDict, actions: Tensor) -> Tensor: ...

    @abstractmethod
    def check(self, instances: TensorDict, actions: Tensor) -> None: ...

    def nodes(self, size: int) -> int:
        """Nodes of an instance of ``size`` customers."""
        return size + int(self.spec.depot)

    def starts(self, instances: TensorDict) -> Tensor:
        """Every customer, ``[B, customers]``."""
        batch, nodes = instances["locs"].shape[:2]
        first = int(self.spec.depot)
        return torch.arange(first, nodes, device=instances["locs"].device).expand(batch, -1)

    def context(self, state: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def size_of(self, locs: Tensor) -> int:
        """Customers of instances at ``locs``.

        Raises:
            ValueError: not floating point ``[B, N, 2]``, or no customer.
        """
        least = self.nodes(1)
        if locs.ndim != 3 or locs.shape[-1] != 2 or locs.shape[1] < least or not locs.is_floating_point():
            raise ValueError(
                f"{self.name}: locs must be floating point [instances, nodes, 2] with at least {least} nodes, "
                f"got {locs.dtype} {list(locs.shape)}"
            )
        return locs.shape[1] - int(self.spec.depot)

    def check_instances(self, instances: TensorDict) -> None:
        """Whether instances that came from elsewhere can be solved at all.

        Raises:
            ValueError: naming the first field that is missing, of another shape, or has a number that cannot be.
        """
        locs = instances.get("locs", None)
        if locs is None:
            known = ", ".join(sorted(map(str, instances.keys())))
            raise ValueError(f"{self.name}: instances need locs, got {known or 'nothing'}")
        batch, size = locs.shape[0], self.size_of(locs)
        for key in ("locs", "original"):
            if key in instances:
                self.refuse_field(~self.field(instances, key, *locs.shape).isfinite(), f"{key} must be finite")
        if "rounded" in instances and self.field(instances, "rounded", batch).dtype != torch.bool:
            raise ValueError(f"{self.name}: rounded must be bool, got {instances['rounded'].dtype}")
        for key in self.customer_fields:
            value = self.field(instances, key, batch, size)
            # one comparison: NaN is neither
            self.refuse_field(~((value >= 0) & (value < torch.inf)), f"{key} must be finite and >= 0")

    def field(self, instances: TensorDict, key: str, *shape: int) -> Tensor:
        """The field ``key`` of instances. Raises: ValueError if it is missing or not of ``shape``."""
        value = instances.get(key, None)
        if value is None or value.shape != shape:
            got = "nothing" if value is None else list(value.shape)
            raise ValueError(f"{self.name}: {key} must be {list(shape)}, got {got}")
        return value

    def refuse_field(self, wrong: Tensor, rule: str) -> None:
        """Raise a ValueError that names the first instance with a mark in ``wrong`` ``[B, ...]``."""
        if bool(wrong.any()):
            raise ValueError(f"{self.name}: instance {int(wrong.nonzero()[0, 0])}: {rule}")

    def measured(self, instances: TensorDict) -> Tensor:
        """``[B, N, 2]``: the coordinates that lengths are measured in."""
        return instances["original"] if "original" in instances else instances["locs"]

    def scale(self, instances: TensorDict) -> Tensor | None:
        """``[B, 1]``: what a length of 1 measures in the coordinates that solvers see; ``None``: 1."""
        if "original" not in instances:
            return None
        seen, measured = (
            (value.amax(-2) - value.amin(-2)).amax(-1, keepdim=True).double()
            for value in (instances["locs"], instances["original"])
        )
        return torch.where(measured > 0, seen / measured.where(measured > 0, 1.0), 1.0)

    def length(self, instances: TensorDict, actions: Tensor, closed: bool) -> Tensor:
        """``[B, P]``: length of the routes ``actions`` ``[B, P, T]``, back to the first node where ``closed``.

        Measured in ``original`` coordinates with their rounding where the instances have them.
        """
        locs, rounded = self.measured(instances), instances.get("rounded", None)
        batch, rollouts, steps = actions.shape
        index = actions.reshape(batch, -1, 1).expand(-1, -1, 2)
        path = locs.gather(1, index).view(batch, rollouts, steps, 2)
        if closed:
            path = torch.cat([path, path[:, :, :1]], 2)
        return distances(path[:, :, 1:] - path[:, :, :-1], rounded).sum(-1)

    def trips_length(self, instances: TensorDict, actions: Tensor) -> Tensor:
        """``[B, P]``: length of the routes from the depot, through ``actions`` ``[B, P, T]``, back to the depot."""
        return self.length(instances, pad(actions, (1, 1)), closed=False)

    def visits(self, actions: Tensor, nodes: int) -> Tensor:
        """``[B, P, N]`` int64: how often each route visits each node."""
        counts = torch.zeros((*actions.shape[:2], nodes), dtype=torch.int64, device=actions.device)
        return counts.scatter_add_(-1, actions, torch.ones_like(actions))

    def check_range(self, instances: TensorDict, actions: Tensor) -> None:
        """Raises: ValueError for routes of another shape or nodes that are not there."""
        batch, nodes = instances["locs"].shape[:2]
        if actions.ndim != 3 or actions.shape[0] != batch or actions.shape[2] < 1:
            raise ValueError(
                f"{self.name}: routes must be [instances, rollouts, steps] of {batch} instances, "
                f"got {tuple(actions.shape)}"
            )
        if actions.dtype != torch.int64:
            raise ValueError(f"{self.name}: routes must be int64, got {actions.dtype}")
        self.refuse(((actions < 0) | (actions >= nodes)).any(-1), f"nodes must be in [0, {nodes})")

    def check_depot_ends(self, actions: Tensor) -> None:
        """Raises: ValueError for routes that leave the depot after they came back to it."""
        back = (actions == 0).cumsum(-1) > 0
        self.refuse((back & (actions != 0)).any(-1), "the depot ends a route: only the depot may follow it")

    def check_depot_turns(self, actions: Tensor) -> None:
        """Raises: ValueError for routes that are at the depot twice in a row and go on, the start being there."""
        here, before = actions == 0, pad(actions, (1, 0))[..., :-1] == 0
        goes_on = (~here).flip(-1).cumsum(-1).flip(-1) > 0
        self.refuse((here & before & goes_on).any(-1), "the depot may not follow itself before all are served")

    def refuse(self, wrong: Tensor, rule: str) -> None:
        """Raise a ValueError that names the first instance and route marked in ``wrong`` ``[B, P]``."""
        if bool(wrong.any()):
            instance, route = wrong.nonzero()[0].tolist()
            raise ValueError(f"{self.name}: instance {instance}, route {route}: {rule}")
