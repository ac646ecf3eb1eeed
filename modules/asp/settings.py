"""Settings of ASP, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from modules.routing.baselines import Baseline, RolloutBaseline, SharedBaseline
from modules.routing.solver import RoutingSolver


@dataclass(frozen=True)
class SolverTraining:
    """The solver's own algorithm.

    Args:
        base: ``pomo`` (rollouts from every customer, their mean as baseline) or ``am`` (one rollout, a frozen policy's
            greedy cost as baseline).
        epochs: per best response or adaption.
        epoch_batches: batches of an epoch; a rollout baseline takes stock after each.
        batch_size: instances per batch, over all ranks.
        lr, weight_decay: Adam's.
        max_grad_norm: greatest norm of the whole gradient; ``null``: none.
        beta, warmup_epochs, baseline_instances, significance: of the rollout baseline.

    Raises:
        ValueError: a number out of range.
    """

    base: Literal["pomo", "am"] = "pomo"
    epochs: int = 5
    epoch_batches: int = 1562
    batch_size: int = 64
    lr: float = 1e-4
    weight_decay: float = 1e-6
    max_grad_norm: float | None = None
    beta: float = 0.8
    warmup_epochs: int = 1
    baseline_instances: int = 10_000
    significance: float = 0.05

    def __post_init__(self) -> None:
        if self.base not in ("pomo", "am"):
            raise ValueError(f"SolverTraining: base must be pomo or am, got {self.base!r}")
        for key in ("epochs", "epoch_batches", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"SolverTraining: {key} must be >= 1, got {getattr(self, key)}")
        if not self.lr > 0:
            raise ValueError(f"SolverTraining: lr must be > 0, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"SolverTraining: weight_decay must be >= 0, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"SolverTraining: max_grad_norm must be > 0 or null, got {self.max_grad_norm}")

    def make_baseline(self, solver: RoutingSolver) -> Baseline:
        if self.base == "pomo":
            return SharedBaseline()
        return RolloutBaseline(solver, self.beta, self.warmup_epochs, self.baseline_instances, self.significance)

    def make_optimizer(self, solver: RoutingSolver) -> torch.optim.Adam:
        return torch.optim.Adam(solver.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class StaircaseSettings:
    """Scales, and when to go on to the next.

    Args:
        start, step, end: customers of the first scale, between scales, and of the last at most.
        threshold: mean held-out gap in percent below which the next scale opens.
        patience: adaptions without a better mean gap after which it opens anyway.
    """

    start: int = 20
    step: int = 20
    end: int = 100
    threshold: float = 0.5
    patience: int = 5


@dataclass(frozen=True)
class EvaluationSettings:
    """Instances that gaps are measured on.

    Args:
        game_instances: of every generator, for the payoff table.
        held_out: name of the datamodule's held-out sets that the staircase looks at.
        held_out_instances: of every one of these.
        held_out_scales: their sizes; those of the staircase are always among them. ``null``: only these.
        keep: the solver that ``test`` and ``predict`` use: the ``last``, or that with the lowest mean gap over the
            scales seen (``best_seen``) or over all held-out scales (``best_all``).

    Raises:
        ValueError: a number out of range.
    """

    game_instances: int = 1000
    held_out: str = "mixture_file"
    held_out_instances: int = 100
    held_out_scales: list[int] | None = None
    keep: Literal["last", "best_seen", "best_all"] = "best_all"

    def __post_init__(self) -> None:
        for key in ("game_instances", "held_out_instances"):
            if getattr(self, key) < 1:
                raise ValueError(f"EvaluationSettings: {key} must be >= 1, got {getattr(self, key)}")
        if self.keep not in ("last", "best_seen", "best_all"):
            raise ValueError(f"EvaluationSettings: keep must be last, best_seen or best_all, got {self.keep!r}")
