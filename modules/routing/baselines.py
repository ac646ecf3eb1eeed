"""What a route's cost is compared with in REINFORCE: the other rollouts, a moving mean, or a frozen policy."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from modules.contracts import RoutingProblem
from modules.objectives.reinforce import (
    exponential_baseline,
    paired_t_test,
    reinforce_loss,
    shared_baseline,
    warmup_mix,
)
from modules.routing.solver import RoutingSolver

AllSum = Callable[[Tensor], Tensor]
"""Sums over ranks."""
Draw = Callable[[int, int], Iterable[TensorDict]]
"""``draw(count, number)``: this rank's share of ``count`` fresh instances, in batches; a function of ``number``."""


class Baseline(nn.Module):
    """What REINFORCE subtracts from costs; state in buffers, so that checkpoints hold it."""

    multi_start = False
    """Whether it needs several rollouts per instance, forced apart."""

    @abstractmethod
    def value(self, problem: RoutingProblem, instances: TensorDict, cost: Tensor, all_sum: AllSum) -> Tensor:
        """What to subtract from ``cost`` ``[B, P]`` of sampled routes; broadcasts with it."""

    def end_epoch(
        self, problem: RoutingProblem, solver: RoutingSolver, draw: Draw, all_sum: AllSum
    ) -> dict[str, float]:
        """Take stock after an epoch; returns metrics, equal on all ranks."""
        return {}

    def start_from(self, solver: RoutingSolver) -> None:
        """The solver in training has got other weights before the first step."""


class SharedBaseline(Baseline):
    """Mean cost of an instance's rollouts (Kwon et al. 2020, eq. 5)."""

    multi_start = True

    def value(self, problem: RoutingProblem, instances: TensorDict, cost: Tensor, all_sum: AllSum) -> Tensor:
        return shared_baseline(cost)


class ExponentialBaseline(Baseline):
    """Exponential moving mean of the batch's cost (Kool et al. 2019, section 4).

    Args:
        beta: share of the old mean, in [0, 1).

    Raises:
        ValueError: beta out of range.
    """

    mean: Tensor
    started: Tensor

    def __init__(self, beta: float = 0.8) -> None:
        super().__init__()
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"ExponentialBaseline: beta must be in [0, 1), got {beta}")
        self.beta = beta
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def value(self, problem: RoutingProblem, instances: TensorDict, cost: Tensor, all_sum: AllSum) -> Tensor:
        total, count = all_sum(torch.stack([cost.detach().double().sum(), cost.new_tensor(cost.numel()).double()]))
        batch = (total / count).to(self.mean.device)
        new = torch.where(self.started, exponential_baseline(self.mean, batch, self.beta), batch)
        self.mean.copy_(new)
        self.started.fill_(True)
        return self.mean.to(cost.dtype)


class RolloutBaseline(Baseline):
    """Greedy cost of the best policy so far, frozen (Kool et al. 2019, algorithm 1).

    After an epoch the policy in training replaces the frozen one if a one-sided paired t-test on fresh instances says
    that it is better. In the first epochs the moving mean serves, mixed with the frozen policy's cost.

    Args:
        solver: whose network is frozen first.
        beta: of the moving mean.
        warmup_epochs: over which the mix goes from the moving mean to the frozen policy.
        instances: of the t-test, over all ranks.
        significance: of the t-test.

    Raises:
        ValueError: a number out of range.
    """

    epochs: Tensor
    replaced: Tensor

    def __init__(
        self,
        solver: RoutingSolver,
        beta: float = 0.8,
        warmup_epochs: int = 1,
        instances: int = 10_000,
        significance: float = 0.05,
    ) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise ValueError(f"RolloutBaseline: warmup_epochs must be >= 0, got {warmup_epochs}")
        if instances < 2:
            raise ValueError(f"RolloutBaseline: instances must be >= 2 for a t-test, got {instances}")
        if not 0.0 < significance < 1.0:
            raise ValueError(f"RolloutBaseline: significance must be in (0, 1), got {significance}")
        self.frozen = copy.deepcopy(solver).requires_grad_(False)
        self.moving = ExponentialBaseline(beta)
        self.warmup_epochs, self.instances, self.significance = warmup_epochs, instances, significance
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64))

    def start_from(self, solver: RoutingSolver) -> None:
        self.frozen.load_state_dict(solver.state_dict())

    def value(self, problem: RoutingProblem, instances: TensorDict, cost: Tensor, all_sum: AllSum) -> Tensor:
        share = warmup_mix(int(self.epochs), self.warmup_epochs)
        value = cost.new_zeros(())
        if share < 1.0:
            value = (1.0 - share) * self.moving.value(problem, instances, cost, all_sum)
        if share > 0.0:
            value = value + share * greedy_cost(problem, self.frozen, instances)
        return value

    def end_epoch(
        self, problem: RoutingProblem, solver: RoutingSolver, draw: Draw, all_sum: AllSum
    ) -> dict[str, float]:
        differences = torch.cat(
            [
                (greedy_cost(problem, solver, batch) - greedy_cost(problem, self.frozen, batch)).double().flatten()
                for batch in draw(self.instances, int(self.replaced))
            ]
        )
        count = differences.new_tensor(float(differences.numel()))
        total, squares, count = all_sum(torch.stack([differences.sum(), differences.square().sum(), count])).tolist()
        p_value = paired_t_test(total, squares, int(count))
        better = p_value < self.significance
        if better:
            self.frozen.load_state_dict(solver.state_dict())
            self.replaced += 1
        self.epochs += 1
        return {"baseline/p_value": p_value, "baseline/difference": total / count, "baseline/replaced": float(better)}


@torch.no_grad()
def greedy_cost(problem: RoutingProblem, solver: RoutingSolver, instances: TensorDict) -> Tensor:
    """``[B, 1]`` costs of greedy routes, in evaluation mode."""
    training = solver.training
    solver.eval()
    try:
        routes, _ = solver.rollout(problem, instances, starts=False, seed=None)
    finally:
        solver.train(training)
    return problem.cost(instances, routes)


def policy_gradient(
    problem: RoutingProblem,
    solver: RoutingSolver,
    baseline: Baseline,
    instances: TensorDict,
    seed: int,
    all_sum: AllSum,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """REINFORCE's loss on sampled routes of ``instances`` ``[B]``, and metrics (Williams 1992).

    Raises:
        ValueError: costs or likelihoods that are not finite.
    """
    routes, log_likelihood = solver.rollout(problem, instances, baseline.multi_start, seed)
    cost = problem.cost(instances, routes)
    loss = reinforce_loss(cost, log_likelihood, baseline.value(problem, instances, cost, all_sum))
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"{type(solver).__name__}: the policy gradient's loss is {float(loss)}: training has diverged; resume from "
            "the last checkpoint with a smaller learning rate, and look for instances with NaN"
        )
    metrics = {
        "loss": loss.detach(),
        "cost": cost.mean(),
        "best_cost": cost.min(1).values.mean(),
        "entropy": -cast(Tensor, log_likelihood.detach()).mean(),  # of whole routes; unbiased
    }
    return loss, metrics
