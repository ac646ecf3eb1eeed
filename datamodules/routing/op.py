"""The orienteering problem: the most prize that a route of limited length can collect."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from datamodules.routing.problem import TOLERANCE, Problem, rule_for_size
from modules.contracts import RoutingSpec

LIMIT = {20: 2.0, 50: 3.0, 100: 4.0}
"""Longest route by number of customers (Kool et al. 2019, appendix D), linear between."""


class OP(Problem):
    """The orienteering problem in the plane (Kool et al. 2019, appendix D, prizes by distance).

    Instances: ``locs`` ``[B, N, 2]``, the depot first; ``prize`` ``[B, customers]``; ``limit`` ``[B]``, the longest
    closed route, in the units of ``locs`` (of ``original`` where there is one). Drawn prizes grow with the distance d
    from the depot: ``(1 + floor(99 d / max d)) / 100``.

    A route starts at the depot; entering it, action 0, ends the route. A customer is allowed if the way there and back
    to the depot fits into the limit. Cost: minus the prizes collected.

    Args:
        limit: of drawn instances; ``None``: by number of customers, from 20 to 100 (:data:`LIMIT`).

    Raises:
        ValueError: a limit that is not > 0; from :meth:`generate`, a size that has no rule.
    """

    spec = RoutingSpec("op", depot=True, customer_features=1, context_features=1, closed=False)
    customer_fields = ("prize",)

    def __init__(self, limit: float | None = None) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"{self.name}: limit must be > 0, got {limit}")
        self.limit = limit

    def generate(self, locs: Tensor, generator: torch.Generator) -> TensorDict:
        batch, size = locs.shape[0], self.size_of(locs)
        limit = self.limit or rule_for_size(self.name, "the limit", LIMIT, size, "limit")
        away = (locs[:, 1:] - locs[:, :1]).norm(dim=-1)
        share = away / away.amax(-1, keepdim=True).clamp(min=torch.finfo(locs.dtype).tiny)
        fields = {"locs": locs, "prize": (1 + (99 * share).floor()) / 100, "limit": locs.new_full((batch,), limit)}
        return TensorDict(fields, [batch])

    def check_instances(self, instances: TensorDict) -> None:
        super().check_instances(instances)
        batch = instances["locs"].shape[0]
        if "limit" not in instances or tuple(instances["limit"].shape) != (batch,):
            raise ValueError(f"{self.name}: instances need limit [{batch}]")
        limit = instances["limit"]
        self.refuse_field(~(limit.isfinite() & (limit > 0)), "limit must be finite and > 0")

    def customer_features(self, instances: TensorDict) -> Tensor:
        return instances["prize"].unsqueeze(-1)

    def starts(self, instances: TensorDict) -> Tensor:
        """Every customer; in place of one that is out of reach the nearest, and the depot if that is too."""
        back = self._back(instances)[:, 1:]
        reached = 2 * back <= self._longest(instances, 1)
        nearest = back.argmin(-1, keepdim=True)
        other = torch.where(reached.gather(-1, nearest), nearest + 1, 0)
        return torch.where(reached, super().starts(instances), other)

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        locs, back = self.measured(instances), self._back(instances)
        batch, nodes = back.shape
        shape, place = (batch, rollouts), back.device
        limit = instances["limit"].to(back.dtype).unsqueeze(-1)
        state = {
            "current": torch.zeros(shape, dtype=torch.int64, device=place),
            "locs": locs.unsqueeze(1).expand(-1, rollouts, -1, -1),
            "back": back.unsqueeze(1).expand(-1, rollouts, -1),
            "distance": back.unsqueeze(1).expand(-1, rollouts, -1),  # from the current node
            "remaining": limit.expand(shape),
            "slack": (limit * TOLERANCE).expand(shape),
            "open": torch.ones(*shape, nodes, dtype=torch.bool, device=place),
            "done": torch.zeros(shape, dtype=torch.bool, device=place),
        }
        scale = self.scale(instances)
        if scale is not None:
            state["scale"] = scale.to(back.dtype).expand(shape)
        if "rounded" in instances:
            state["rounded"] = instances["rounded"].unsqueeze(-1).expand(shape)
        self._allow(state)
        return state

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        index = action.unsqueeze(-1)
        state["remaining"] = state["remaining"] - state["distance"].gather(-1, index).squeeze(-1)
        state["open"].scatter_(-1, index, False)
        state["done"] = state["done"] | (action == 0)
        state["current"] = action
        here = state["locs"].gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 2)).squeeze(2)
        # every rollout's coordinates are those of its instance
        distance = torch.cdist(here, state["locs"][:, 0], compute_mode="donot_use_mm_for_euclid_dist")
        if "rounded" in state:
            distance = torch.where(state["rounded"].unsqueeze(-1), (distance + 0.5).floor(), distance)
        state["distance"] = distance
        self._allow(state)

    def _allow(self, state: dict[str, Tensor]) -> None:
        reach = torch.where(state["done"], -math.inf, state["remaining"] + state["slack"])
        allowed = state["distance"] + state["back"] <= reach.unsqueeze(-1)
        allowed &= state["open"]
        allowed[..., 0] = True
        state["allowed"] = allowed

    def context(self, state: Mapping[str, Tensor]) -> Tensor:
        """The length that is left, in the units of the coordinates that solvers see."""
        remaining = state["remaining"] * state["scale"] if "scale" in state else state["remaining"]
        return remaining.unsqueeze(-1)

    def finished(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["done"]

    def max_steps(self, nodes: int) -> int:
        return nodes

    def cost(self, instances: TensorDict, actions: Tensor) -> Tensor:
        prize = pad(instances["prize"].to(self.measured(instances).dtype), (1, 0)).unsqueeze(1)
        return -prize.expand(-1, actions.shape[1], -1).gather(-1, actions).sum(-1)

    def check(self, instances: TensorDict, actions: Tensor) -> None:
        self.check_range(instances, actions)
        visits = self.visits(actions, instances["locs"].shape[1])[..., 1:]
        self.refuse((visits > 1).any(-1), "no customer may be visited twice")
        self.check_depot_ends(actions)
        length = self.trips_length(instances, actions).double()
        self.refuse(length > self._longest(instances, 2), "the route with the way back may not exceed the limit")

    def _longest(self, instances: TensorDict, slack: int) -> Tensor:
        """``[B, 1]`` float64: the limit with so many tolerances on top."""
        return (instances["limit"].double() * (1.0 + slack * TOLERANCE)).unsqueeze(-1)

    def _back(self, instances: TensorDict) -> Tensor:
        """``[B, N]``: the distance of every node from the depot."""
        locs = self.measured(instances)
        back = (locs - locs[:, :1]).norm(dim=-1)
        if "rounded" in instances:
            back = torch.where(instances["rounded"].unsqueeze(-1), (back + 0.5).floor(), back)
        return back
