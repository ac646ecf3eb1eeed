"""A routing solver trained by REINFORCE on the instances that the datamodule draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import InstanceRequest, RoutingSpec
from modules.routing.baselines import Baseline, policy_gradient
from modules.routing.evaluation import RoutingEvaluation
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings
from modules.routing.trained import start_from
from modules.seeds import global_seed, stream_seed

INIT_STREAM = 62
ROLLOUT_STREAM = 63
BASELINE_STREAM = 64
BASELINE_BATCH = 512
"""Instances at once where policies are compared."""


def build_solver(spec: RoutingSpec, settings: SolverSettings, initial: str | None = None) -> RoutingSolver:
    """A solver whose weights are those of a checkpoint, or a function of the run's seed.

    The global random stream is left as it was. Raises: as :func:`~modules.routing.trained.start_from`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(global_seed(), INIT_STREAM))
        solver = RoutingSolver(spec, settings)
    if initial is not None:
        start_from(solver, initial)
    return solver


class RoutingPolicyGradient(RoutingEvaluation):
    """REINFORCE with one of the baselines; a training step is one batch. A subclass says which by :meth:`baseline_of`.

    Metrics: ``train/loss``, ``train/cost`` (mean over sampled routes), ``train/best_cost`` (mean over instances of the
    best rollout), ``train/entropy`` (nats per route), ``train/grad_norm``; those of evaluation as in
    :class:`~modules.routing.evaluation.RoutingEvaluation`.

    Args:
        solver: the network.
        decoding: how routes are decoded in evaluation.
        lr, weight_decay: Adam's.
        lr_decay_steps: training steps at which the learning rate is multiplied by ``lr_decay``.
        lr_decay: in (0, 1].
        epoch_steps: training steps after which the baseline takes stock.
        initial: checkpoint or run's folder to take the first weights from; ``null``: random ones.

    Raises:
        ValueError: a setting out of range.
    """

    work_unit = "instances"

    def __init__(
        self,
        solver: SolverSettings,
        decoding: Decoding,
        lr: float,
        weight_decay: float,
        lr_decay_steps: list[int] | None,
        lr_decay: float,
        epoch_steps: int,
        initial: str | None,
    ) -> None:
        super().__init__(decoding)
        name = type(self).__name__
        if not lr > 0:
            raise ValueError(f"{name}: lr must be > 0, got {lr}")
        if weight_decay < 0:
            raise ValueError(f"{name}: weight_decay must be >= 0, got {weight_decay}")
        if not 0.0 < lr_decay <= 1.0:
            raise ValueError(f"{name}: lr_decay must be in (0, 1], got {lr_decay}")
        if epoch_steps < 1:
            raise ValueError(f"{name}: epoch_steps must be >= 1, got {epoch_steps}")
        self.settings, self.initial = solver, initial
        self.lr, self.weight_decay, self.epoch_steps = lr, weight_decay, epoch_steps
        self.lr_decay_steps, self.lr_decay = list(lr_decay_steps or []), lr_decay
        self.solver: RoutingSolver | None = None
        self.baseline: Baseline | None = None
        self._size = 0

    def baseline_of(self, solver: RoutingSolver) -> Baseline:
        raise NotImplementedError

    def build(self, spec: RoutingSpec) -> None:
        self.solver = build_solver(spec, self.settings, None if self.resuming else self.initial)
        self.baseline = self.baseline_of(self.solver)

    def configure_optimizers(self) -> Any:
        assert self.solver is not None
        optimizer = torch.optim.Adam(self.solver.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if not self.lr_decay_steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.lr_decay_steps, self.lr_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        assert self.solver is not None
        assert self.baseline is not None
        seed = stream_seed(global_seed(), ROLLOUT_STREAM, self.trainer.global_step)
        loss, metrics = policy_gradient(self.problem, self.solver, self.baseline, batch, seed, self.all_sum)
        self._size = batch["locs"].shape[1] - int(self.solver.spec.depot)
        self.instances += batch.shape[0] * self.trainer.world_size
        self._log(metrics)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.solver is not None
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            norms = [value.grad.norm() for value in self.solver.parameters() if value.grad is not None]
            self.log("train/grad_norm", torch.stack(norms).norm())

    def on_train_batch_end(self, outputs: Any, batch: TensorDict, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step % self.epoch_steps or self.baseline is None or self.solver is None:
            return
        metrics = self.baseline.end_epoch(self.problem, self.solver, self._draw, self.all_sum)
        if metrics:
            for logger in self.loggers:
                logger.log_metrics(metrics, step=step)

    def _draw(self, count: int, number: int) -> Iterable[TensorDict]:
        """Fresh instances of the size trained last, from the datamodule's own distribution."""
        world = self.trainer.world_size
        for first in range(0, count, BASELINE_BATCH * world):
            part = min(BASELINE_BATCH * world, count - first)
            part += -part % world  # equal shares
            key = (BASELINE_STREAM, number, first)
            batch = self.data.batch(InstanceRequest(self._size, part, key))
            yield cast(TensorDict, batch.to(self.device))

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        self.log_dict({f"train/{key}": value for key, value in metrics.items()}, sync_dist=self.trainer.world_size > 1)
