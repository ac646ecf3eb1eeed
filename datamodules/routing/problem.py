"""What routing problems share: lengths, visits, complaints. The rules' contract is modules.contracts.RoutingProblem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import RoutingSpec

TOLERANCE = 1e-5
"""By how much sums of float32 shares (demands over capacity, prizes) may be off."""


class Problem(ABC):
    """Base of the problems; a subclass implements the rest of :class:`~modules.contracts.RoutingProblem`."""

    spec: ClassVar[RoutingSpec]

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

    def length(self, instances: TensorDict, actions: Tensor, closed: bool) -> Tensor:
        """``[B, P]``: length of the routes ``actions`` ``[B, P, T]``, back to the first node where ``closed``.

        Measured in ``original`` coordinates with their rounding where the instances have them.
        """
        locs = instances["original"] if "original" in instances.keys() else instances["locs"]
        batch, rollouts, steps = actions.shape
        index = actions.reshape(batch, -1, 1).expand(-1, -1, 2)
        path = locs.gather(1, index).view(batch, rollouts, steps, 2)
        legs = (path[:, :, 1:] - path[:, :, :-1]).norm(dim=-1)
        if closed:
            back = (path[:, :, :1] - path[:, :, -1:]).norm(dim=-1)
            legs = torch.cat([legs, back], -1)
        if "rounded" in instances.keys():
            legs = torch.where(instances["rounded"][:, None, None], (legs + 0.5).floor(), legs)
        return legs.sum(-1)

    def visits(self, actions: Tensor, nodes: int) -> Tensor:
        """``[B, P, N]`` int64: how often each route visits each node."""
        counts = torch.zeros((*actions.shape[:2], nodes), dtype=torch.int64, device=actions.device)
        return counts.scatter_add_(-1, actions, torch.ones_like(actions))

    def check_range(self, instances: TensorDict, actions: Tensor) -> None:
        """Raises: ValueError for routes of another shape or nodes that are not there."""
        batch, nodes = instances["locs"].shape[:2]
        if actions.ndim != 3 or actions.shape[0] != batch:
            raise ValueError(
                f"{self.name}: routes must be [instances, rollouts, steps] of {batch} instances, "
                f"got {tuple(actions.shape)}"
            )
        self.refuse(((actions < 0) | (actions >= nodes)).any(-1), f"nodes must be in [0, {nodes})")

    def refuse(self, wrong: Tensor, rule: str) -> None:
        """Raise a ValueError that names the first instance and route marked in ``wrong`` ``[B, P]``."""
        if bool(wrong.any()):
            instance, route = wrong.nonzero()[0].tolist()
            raise ValueError(f"{self.name}: instance {instance}, route {route}: {rule}")
