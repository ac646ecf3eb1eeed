"""The capacitated vehicle routing problem: all customers served by vehicles of one capacity, at the least length."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from datamodules.routing.problem import TOLERANCE, Problem, rule_for_size
from modules.contracts import RoutingSpec

CAPACITY = {10: 20, 20: 30, 30: 40, 40: 40, 50: 40, 60: 50, 70: 50, 80: 50, 90: 50, 100: 50}
"""Capacity by number of customers (Kool et al. 2019, appendix C; Wang et al. 2024), linear between."""
LARGEST_DEMAND = 9


class CVRP(Problem):
    """The capacitated vehicle routing problem in the plane (Kool et al. 2019, appendix C).

    Instances: ``locs`` ``[B, N, 2]``, the depot first; ``demand`` ``[B, customers]``, shares of the capacity in [0, 1];
    perhaps ``capacity`` int64 ``[B]``, with which demands are exact whole numbers ``demand * capacity``. Drawn demands
    are whole, uniform in 1..9.

    A route starts at the depot and ends there, neither of which it need say: ``[3, 1, 0, 2]`` is two trips. Its cost is
    the length of all trips. The depot, action 0, refills the vehicle; it may not follow itself until all are served.

    Args:
        capacity: of drawn instances; ``None``: by number of customers, from 10 to 100 (:data:`CAPACITY`).

    Raises:
        ValueError: a capacity below the largest demand; from :meth:`generate`, a size that has no rule.
    """

    spec = RoutingSpec("cvrp", depot=True, customer_features=1, context_features=1, closed=False)
    customer_fields = ("demand",)

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and (not isinstance(capacity, int) or capacity < LARGEST_DEMAND):
            raise ValueError(
                f"{self.name}: capacity must be a whole number >= {LARGEST_DEMAND}, the largest demand, got {capacity}"
            )
        self.capacity = capacity

    def generate(self, locs: Tensor, generator: torch.Generator) -> TensorDict:
        batch, size = locs.shape[0], self.size_of(locs)
        capacity = self.capacity or round(rule_for_size(self.name, "the capacity", CAPACITY, size, "capacity"))
        whole = torch.randint(1, LARGEST_DEMAND + 1, (batch, size), generator=generator, device=locs.device)
        fields = {"locs": locs, "demand": whole.to(locs.dtype) / capacity}
        return TensorDict({**fields, "capacity": torch.full((batch,), capacity, device=locs.device)}, [batch])

    def check_instances(self, instances: TensorDict) -> None:
        super().check_instances(instances)
        demand = instances["demand"]
        self.refuse_field(demand > 1.0 + TOLERANCE, "demand must be <= 1, the capacity of a vehicle")
        if "capacity" not in instances:
            return
        capacity, batch = instances["capacity"], demand.shape[0]
        if tuple(capacity.shape) != (batch,) or capacity.is_floating_point():
            raise ValueError(f"{self.name}: capacity must be int64 [{batch}], got {capacity.dtype} {[*capacity.shape]}")
        self.refuse_field(capacity < 1, "capacity must be >= 1")
        units = demand.double() * capacity.unsqueeze(-1)
        self.refuse_field(
            (units - units.round()).abs() > 0.1, "demand * capacity must be whole: leave capacity out if it is not"
        )

    def customer_features(self, instances: TensorDict) -> Tensor:
        return instances["demand"].unsqueeze(-1)

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        units, full = self.units(instances)
        batch, size = units.shape
        shape = (batch, rollouts)
        # what is asked of the vehicle: infinite where nothing is, so that one comparison makes the mask
        demand = pad(units, (1, 0), value=math.inf).unsqueeze(1).repeat(1, rollouts, 1)
        return {
            "current": torch.zeros(shape, dtype=torch.int64, device=units.device),
            "allowed": demand < math.inf,
            "demand": demand,
            "full": full.expand(shape),
            "remaining": full.expand(shape),
            "left": torch.full(shape, size, device=units.device),
        }

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        index, at_depot = action.unsqueeze(-1), action == 0
        demand = state["demand"]
        remaining = state["remaining"] - demand.gather(-1, index).squeeze(-1)
        remaining = torch.where(at_depot, state["full"], remaining)
        demand.scatter_(-1, index, math.inf)
        left = state["left"] - (~at_depot).long()
        allowed = demand <= (remaining + TOLERANCE).unsqueeze(-1)
        allowed[..., 0] = ~at_depot | (left == 0)
        state.update(current=action, allowed=allowed, remaining=remaining, left=left)

    def context(self, state: Mapping[str, Tensor]) -> Tensor:
        return (state["remaining"] / state["full"]).unsqueeze(-1)

    def finished(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["left"] == 0

    def max_steps(self, nodes: int) -> int:
        return 2 * (nodes - 1)

    def cost(self, instances: TensorDict, actions: Tensor) -> Tensor:
        return self.trips_length(instances, actions)

    def check(self, instances: TensorDict, actions: Tensor) -> None:
        self.check_range(instances, actions)
        visits = self.visits(actions, instances["locs"].shape[1])[..., 1:]
        self.refuse((visits != 1).any(-1), "every customer must be visited exactly once")
        units, full = self.units(instances)
        asked = pad(units, (1, 0)).double().unsqueeze(1).expand(-1, actions.shape[1], -1).gather(-1, actions)
        trip = (actions == 0).cumsum(-1)
        load = asked.new_zeros(*actions.shape[:2], actions.shape[2] + 1).scatter_add_(-1, trip, asked)
        self.refuse((load > full.unsqueeze(-1) + 2 * TOLERANCE).any(-1), "a trip may not carry more than the capacity")
        self.check_depot_turns(actions)

    def units(self, instances: TensorDict) -> tuple[Tensor, Tensor]:
        """Demands ``[B, customers]`` and the capacity ``[B, 1]`` in one unit: whole numbers where it is known."""
        demand = instances["demand"]
        if "capacity" not in instances:
            return demand, torch.ones_like(demand[:, :1])
        full = instances["capacity"].to(demand.dtype).unsqueeze(-1)
        return (demand * full).round(), full
