"""Prize-collecting travelling salesman problems: collect enough, pay a penalty for what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from datamodules.routing.problem import TOLERANCE, Problem, rule_for_size
from modules.contracts import RoutingSpec

TOUR_LENGTH = {20: 2.0, 30: 3.0, 40: 3.0, 50: 3.0, 60: 4.0, 70: 4.0, 80: 4.0, 90: 4.0, 100: 4.0}
"""K by number of customers (Kool et al. 2019, appendix E; Wang et al. 2024), linear between."""


class PCTSP(Problem):
    """The prize-collecting travelling salesman problem in the plane (Kool et al. 2019, appendix E).

    Instances: ``locs`` ``[B, N, 2]``, the depot first; for every customer, ``[B, customers]``, the ``prize`` that a
    solver expects, the ``real_prize`` that a visit brings (here the same), and the ``penalty``, a length in the units
    of ``locs`` (of ``original`` where there is one), that leaving the customer out costs. Drawn prizes are U(0, 4 / n)
    and penalties U(0, 3 K / n) for n customers.

    A route starts at the depot; entering it, action 0, ends the route, and is allowed once the real prizes collected
    reach 1 or all customers are visited. Cost: length of the closed tour plus the penalties left.

    Args:
        tour_length: K of drawn instances, roughly the length of a tour through half of the customers; ``None``: by
            number of customers, from 20 to 100 (:data:`TOUR_LENGTH`).

    Raises:
        ValueError: a ``tour_length`` that is not > 0; from :meth:`generate`, a size that has no rule.
    """

    spec = RoutingSpec("pctsp", depot=True, customer_features=2, context_features=1, closed=False)
    customer_fields = ("prize", "real_prize", "penalty")
    stochastic: ClassVar[bool] = False
    """Whether real prizes differ from the expected ones."""

    def __init__(self, tour_length: float | None = None) -> None:
        if tour_length is not None and not 0 < tour_length < float("inf"):
            raise ValueError(f"{self.name}: tour_length must be > 0, got {tour_length}")
        self.tour_length = tour_length

    def generate(self, locs: Tensor, generator: torch.Generator) -> TensorDict:
        batch, size = locs.shape[0], self.size_of(locs)
        length = self.tour_length or rule_for_size(self.name, "K", TOUR_LENGTH, size, "tour_length")
        draws = torch.rand(2 + self.stochastic, batch, size, generator=generator, device=locs.device).to(locs.dtype)
        prize, penalty = draws[0] * (4 / size), draws[1] * (3 * length / size)
        real = draws[2] * 2 * prize if self.stochastic else prize.clone()
        return TensorDict({"locs": locs, "prize": prize, "real_prize": real, "penalty": penalty}, [batch])

    def customer_features(self, instances: TensorDict) -> Tensor:
        """Expected prize, and the penalty in the units of the coordinates that solvers see."""
        penalty, scale = instances["penalty"], self.scale(instances)
        if scale is not None:
            penalty = penalty * scale.to(penalty.dtype)
        return torch.stack([instances["prize"], penalty], -1)

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        prize = instances["real_prize"]
        batch, size = prize.shape
        shape, place = (batch, rollouts), prize.device
        allowed = torch.ones(*shape, size + 1, dtype=torch.bool, device=place)
        allowed[..., 0] = False
        return {
            "current": torch.zeros(shape, dtype=torch.int64, device=place),
            "allowed": allowed,
            "prize": pad(prize, (1, 0)).unsqueeze(1).expand(-1, rollouts, -1),
            "collected": torch.zeros(shape, dtype=prize.dtype, device=place),
            "left": torch.full(shape, size, device=place),
            "done": torch.zeros(shape, dtype=torch.bool, device=place),
        }

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        index, at_depot = action.unsqueeze(-1), action == 0
        collected = state["collected"] + state["prize"].gather(-1, index).squeeze(-1)
        left = state["left"] - (~at_depot).long()
        done = state["done"] | at_depot
        allowed = state["allowed"].scatter_(-1, index, False)
        allowed &= ~done.unsqueeze(-1)
        allowed[..., 0] = done | (left == 0) | (collected >= 1.0 - TOLERANCE)
        state.update(current=action, collected=collected, left=left, done=done)

    def context(self, state: Mapping[str, Tensor]) -> Tensor:
        """What is still to collect, of real prizes."""
        return (1.0 - state["collected"]).clamp(min=0.0).unsqueeze(-1)

    def finished(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["done"] | (state["left"] == 0)

    def max_steps(self, nodes: int) -> int:
        return nodes

    def cost(self, instances: TensorDict, actions: Tensor) -> Tensor:
        length = self.trips_length(instances, actions)
        left_out = self.visits(actions, instances["locs"].shape[1])[..., 1:] == 0
        return length + (instances["penalty"].to(length.dtype).unsqueeze(1) * left_out).sum(-1)

    def check(self, instances: TensorDict, actions: Tensor) -> None:
        self.check_range(instances, actions)
        visits = self.visits(actions, instances["locs"].shape[1])[..., 1:]
        self.refuse((visits > 1).any(-1), "no customer may be visited twice")
        self.check_depot_ends(actions)
        collected = (instances["real_prize"].double().unsqueeze(1) * visits).sum(-1)
        too_little = (collected < 1.0 - 2 * TOLERANCE) & (visits == 0).any(-1)
        self.refuse(too_little, "prizes of at least 1 must be collected, or all customers visited")


class SPCTSP(PCTSP):
    """The stochastic one: real prizes are U(0, 2 ``prize``) and show when a customer is visited.

    A solver sees expected prizes, and through context and mask the real ones that it has collected.
    """

    spec = RoutingSpec("spctsp", depot=True, customer_features=2, context_features=1, closed=False)
    stochastic = True
