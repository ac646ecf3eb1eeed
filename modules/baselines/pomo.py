"""POMO: policy optimisation with multiple optima (Kwon et al. 2020)."""

from __future__ import annotations

from modules.routing.baselines import Baseline, SharedBaseline
from modules.routing.policy_gradient import RoutingPolicyGradient
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings


class POMO(RoutingPolicyGradient):
    """REINFORCE over one rollout from every customer, with their mean cost as baseline (Kwon et al. 2020, eq. 5).

    For all problems of ``datamodules.RoutingDataModule``. Metrics and remaining arguments:
    :class:`~modules.routing.policy_gradient.RoutingPolicyGradient`.

    Args:
        solver: by default six layers, instance norm, no graph context.
        decoding: by default greedy from every customer.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        solver: SolverSettings = SolverSettings(),  # noqa: B008
        decoding: Decoding = Decoding(),  # noqa: B008
        lr: float = 1e-4,
        weight_decay: float = 1e-6,
        lr_decay_steps: list[int] | None = None,
        lr_decay: float = 0.1,
        epoch_steps: int = 1562,
        initial: str | None = None,
    ) -> None:
        super().__init__(solver, decoding, lr, weight_decay, lr_decay_steps, lr_decay, epoch_steps, initial)
        self.save_hyperparameters(logger=False)

    def baseline_of(self, solver: RoutingSolver) -> Baseline:
        return SharedBaseline()
