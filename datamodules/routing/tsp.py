"""The travelling salesman problem: the shortest closed tour through all nodes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.routing.problem import Problem
from modules.contracts import RoutingSpec


class TSP(Problem):
    """The travelling salesman problem in the plane (Kool et al. 2019, appendix B).

    Instances: ``locs`` ``[B, N, 2]``. A route is a permutation of the nodes, its cost the length of the closed tour.
    """

    spec = RoutingSpec("tsp", depot=False, customer_features=0, context_features=0, closed=True)

    def generate(self, locs: Tensor, generator: torch.Generator) -> TensorDict:
        self.size_of(locs)
        return TensorDict({"locs": locs}, [locs.shape[0]])

    def customer_features(self, instances: TensorDict) -> Tensor:
        locs = instances["locs"]
        return locs[..., :0]

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        locs = instances["locs"]
        shape = (locs.shape[0], rollouts)
        return {
            "current": torch.zeros(shape, dtype=torch.int64, device=locs.device),
            "allowed": torch.ones((*shape, locs.shape[1]), dtype=torch.bool, device=locs.device),
        }

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        state["current"] = action
        state["allowed"].scatter_(-1, action.unsqueeze(-1), False)

    def finished(self, state: Mapping[str, Tensor]) -> Tensor:
        return ~state["allowed"].any(-1)

    def max_steps(self, nodes: int) -> int:
        return nodes

    def cost(self, instances: TensorDict, actions: Tensor) -> Tensor:
        return self.length(instances, actions, closed=True)

    def check(self, instances: TensorDict, actions: Tensor) -> None:
        nodes = instances["locs"].shape[1]
        self.check_instances(instances)
        self.check_range(instances, actions)
        if actions.shape[-1] != nodes:
            raise ValueError(f"TSP: routes must have {nodes} steps, one per node, got {actions.shape[-1]}")
        visits = self.visits(actions, nodes)
        self.refuse((visits != 1).any(-1), "every node must be visited exactly once")
