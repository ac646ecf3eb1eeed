"""The split delivery vehicle routing problem: as the capacitated one, but several vehicles may serve one customer."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from datamodules.routing.cvrp import CVRP
from datamodules.routing.problem import TOLERANCE
from modules.contracts import RoutingSpec


class SDVRP(CVRP):
    """Split delivery vehicle routing (Kool et al. 2019, appendix C).

    Instances as in :class:`~datamodules.routing.cvrp.CVRP`, with demands > 0. A visit delivers all that is left of the
    customer's demand, or what the vehicle still has; the rest waits for another visit. A customer without demand left,
    or any customer with an empty vehicle, may not be visited.

    The features of customers are those at the start: a solver sees what is left of a demand through the mask only, that
    is, whether anything is. (Kool et al. add what is left to keys and values at every step.)
    """

    spec = RoutingSpec("sdvrp", depot=True, customer_features=1, context_features=1, closed=False)

    def check_instances(self, instances: TensorDict) -> None:
        super().check_instances(instances)
        self.refuse_field(instances["demand"] <= TOLERANCE, "demand must be > 0")

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        state = super().begin(instances, rollouts)
        state["demand"][..., 0] = 0.0  # the depot asks for nothing
        return state

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        index, at_depot = action.unsqueeze(-1), action == 0
        demand = state["demand"]
        before = demand.gather(-1, index).squeeze(-1)
        given = torch.minimum(before, state["remaining"])
        after = before - given
        demand.scatter_(-1, index, after.unsqueeze(-1))
        remaining = torch.where(at_depot, state["full"], state["remaining"] - given)
        left = state["left"] - ((before > TOLERANCE) & (after <= TOLERANCE)).long()
        worth = torch.where(remaining > TOLERANCE, TOLERANCE, math.inf)  # no demand is, with an empty vehicle
        allowed = demand > worth.unsqueeze(-1)
        allowed[..., 0] = ~at_depot | (left == 0)
        state.update(current=action, allowed=allowed, remaining=remaining, left=left)

    def max_steps(self, nodes: int) -> int:
        """A visit ends a demand or empties a full vehicle, each at most once per customer; the depot comes between."""
        return 4 * (nodes - 1)

    def check(self, instances: TensorDict, actions: Tensor) -> None:
        self.check_range(instances, actions)
        units, full = self.units(instances)
        rollouts = actions.shape[1]
        left = pad(units.double(), (1, 0)).unsqueeze(1).repeat(1, rollouts, 1)
        vehicle = full = full.double().expand(-1, rollouts)
        vain = torch.zeros_like(vehicle, dtype=torch.bool)
        for action in actions.unbind(-1):
            index, customer = action.unsqueeze(-1), action != 0
            asked = left.gather(-1, index).squeeze(-1)
            given = torch.minimum(asked, vehicle)
            # half: what rounding leaves of a demand or of a load differs from the masks' by less
            vain |= customer & (given <= TOLERANCE / 2)
            left.scatter_(-1, index, (asked - given).unsqueeze(-1))
            vehicle = torch.where(customer, vehicle - given, full)
        self.refuse((left > 2 * TOLERANCE).any(-1), "every customer's demand must be delivered in full")
        self.refuse(vain, "a visit must deliver something: not with an empty vehicle, not where nothing is left to do")
        self.check_depot_turns(actions)
