"""The attention model with REINFORCE (Kool et al. 2019)."""

from __future__ import annotations

from typing import Literal

from modules.routing.baselines import Baseline, ExponentialBaseline, RolloutBaseline
from modules.routing.policy_gradient import RoutingPolicyGradient
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings


class AttentionModel(RoutingPolicyGradient):
    """REINFORCE over one sampled route per instance, with a frozen greedy policy's cost as baseline (algorithm 1).

    For all problems of ``datamodules.RoutingDataModule``. Metrics and remaining arguments:
    :class:`~modules.routing.policy_gradient.RoutingPolicyGradient`; ``baseline/*`` tell of the t-tests.

    Args:
        solver: by default three layers, batch norm, graph context.
        decoding: by default one greedy route.
        baseline: ``rollout``, or the ``exponential`` moving mean alone.
        beta: of the moving mean.
        warmup_epochs: over which the moving mean gives way to the frozen policy.
        baseline_instances: of a t-test, over all ranks.
        significance: of the t-test.
        epoch_steps: training steps between t-tests.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        solver: SolverSettings = SolverSettings(layers=3, norm="batch", graph_context=True),  # noqa: B008
        decoding: Decoding = Decoding(starts=False),  # noqa: B008
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        lr_decay_steps: list[int] | None = None,
        lr_decay: float = 0.1,
        epoch_steps: int = 2500,
        baseline: Literal["rollout", "exponential"] = "rollout",
        beta: float = 0.8,
        warmup_epochs: int = 1,
        baseline_instances: int = 10_000,
        significance: float = 0.05,
        initial: str | None = None,
    ) -> None:
        super().__init__(solver, decoding, lr, weight_decay, lr_decay_steps, lr_decay, epoch_steps, initial)
        if baseline not in ("rollout", "exponential"):
            raise ValueError(f"AttentionModel: baseline must be rollout or exponential, got {baseline!r}")
        self.kind, self.beta, self.warmup_epochs = baseline, beta, warmup_epochs
        self.baseline_instances, self.significance = baseline_instances, significance
        self.save_hyperparameters(logger=False)

    def baseline_of(self, solver: RoutingSolver) -> Baseline:
        if self.kind == "exponential":
            return ExponentialBaseline(self.beta)
        return RolloutBaseline(solver, self.beta, self.warmup_epochs, self.baseline_instances, self.significance)
