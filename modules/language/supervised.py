"""What the modules that are trained on given answers share: optimiser, schedule, and means over all ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from torch import Tensor

from modules.language.optim import build_optimizer
from modules.language.schedule import lr_lambda
from modules.networks.causal_lm import context_limit


@dataclass
class OptimizerSpec:
    """Optimiser and learning-rate schedule.

    Args:
        name: see :func:`modules.language.optim.build_optimizer`.
        lr: peak learning rate.
        schedule: after the warm-up the rate stays, or falls as a cosine to ``min_lr_ratio * lr``.
        warmup_steps: linear warm-up, optimiser steps.
        decay_steps: optimiser steps until the cosine's end, from step 0; ``null``: the trainer's ``max_steps``.
        min_lr_ratio: floor of the cosine as a fraction of ``lr``.
        betas, eps: of AdamW.
        weight_decay: on matrices only.
    """

    name: str = "adamw"
    lr: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr_ratio: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0

    def check(self, owner: str) -> None:
        """Raise ValueError for a value out of range; the message begins with ``owner`` and names the key."""
        for key in ("lr", "eps"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{owner}: optimizer.{key} must be > 0, got {getattr(self, key)}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"{owner}: optimizer.schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps < max(1, self.warmup_steps)):
            raise ValueError(
                f"{owner}: want 0 <= optimizer.warmup_steps <= optimizer.decay_steps, got {self.warmup_steps} and "
                f"{self.decay_steps}"
            )
        if not 0 <= self.min_lr_ratio <= 1 or self.weight_decay < 0:
            raise ValueError(
                f"{owner}: want optimizer.min_lr_ratio in [0, 1] and weight_decay >= 0, got {self.min_lr_ratio} and "
                f"{self.weight_decay}"
            )
        if len(self.betas) != 2:
            raise ValueError(f"{owner}: optimizer.betas wants two numbers, got {self.betas}")


class SupervisedModule(LightningModule):
    """Minimises a mean over targets, and reports means over the targets of all ranks.

    Subclasses have :meth:`measure` and name the ``task`` of datamodules that fit; ``network`` is built in
    ``configure_model``. A training batch may hold
    ``step_targets`` int64 ``[B]``, the targets of the whole optimiser step over ranks and micro-batches; else all parts
    of a step must hold equally many.
    """

    task = ""

    def __init__(self, optimizer: OptimizerSpec | dict[str, Any] | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.optimizer_spec = optimizer if isinstance(optimizer, OptimizerSpec) else OptimizerSpec(**(optimizer or {}))
        self.optimizer_spec.check(type(self).__name__)
        # plain values only: checkpoints load with weights_only=True
        self.save_hyperparameters({**options, "optimizer": asdict(self.optimizer_spec)})
        self.network: Any = None  # built by configure_model
        self._sums: dict[str, Tensor] = {}

    @abstractmethod
    def measure(self, batch: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over the batch's targets by name, ``loss`` (differentiable) among them, and the number of targets."""

    def setup(self, stage: str) -> None:
        """Check the data's kind.

        Raises:
            ValueError: the datamodule has a ``task``, and it is another one.
        """
        task = getattr(getattr(self.trainer, "datamodule", None), "task", self.task)
        if task != self.task:
            raise ValueError(f"{type(self).__name__}: data.task must be {self.task!r}, got {task!r}")

    def data_tokenizer(self) -> Any:
        """The datamodule's tokenizer, or None outside a trainer."""
        return getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)

    def configure_optimizers(self) -> Any:
        spec = self.optimizer_spec
        optimizer = build_optimizer(
            self.network, spec.name, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps,
            weight_decay=spec.weight_decay,
        )  # fmt: skip
        decay = spec.decay_steps or self.trainer.max_steps
        floor = spec.min_lr_ratio if spec.schedule == "cosine" else 1.0
        schedule = lr_lambda(spec.warmup_steps, max(decay, spec.warmup_steps, 1), floor)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        """Sum of the losses over the optimiser step's targets.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        sums, count = self.measure(batch)
        targets = batch.get("step_targets", None)
        if targets is None:
            share = 1 / count
        else:  # gradients are averaged over ranks and micro-batches
            share = self.trainer.world_size * self.trainer.accumulate_grad_batches / targets[0]
        means = {name: value * share for name, value in sums.items()}
        if not math.isfinite(means["loss"].item()):
            raise FloatingPointError(
                f"{type(self).__name__}: the loss is {means['loss'].item()} at step {self.global_step + 1}; resume "
                "from the last checkpoint with a lower optimizer.lr"
            )
        self.log_dict(
            {f"train/{name}": value.detach().float() for name, value in means.items()},
            sync_dist=self.trainer.world_size > 1,
        )
        self.log("lr", float(self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]
        return means["loss"]

    # ------------------------------------------------------------------------------------------------------ evaluation

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        sums, count = self.measure(batch)
        for name, value in {**sums, "count": count}.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()  # type: ignore[operator]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        names, values = list(self._sums), torch.stack(list(self._sums.values()))
        self._sums = {}
        totals = dict(zip(names, self.all_ranks_sum(values).tolist(), strict=True))
        count = totals.pop("count")
        if count:
            for name, value in self.finish({name: total / count for name, total in totals.items()}).items():
                self.log(f"{stage}/{name}", value, sync_dist=True)  # equal on all ranks already

    def all_ranks_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor of sums and counts over ranks."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]

    def finish(self, means: dict[str, float]) -> dict[str, float]:
        """Held-out figures from the means of :meth:`measure`'s sums."""
        return means


def check_length(owner: str, network: Any, data: Any) -> None:
    """Refuse data whose rows are longer than the model's context.

    Raises:
        ValueError: ``data.seq_len`` (where it has one) is too large.
    """
    length, limit = getattr(data, "seq_len", None), context_limit(network)
    if length is not None and length > limit:
        raise ValueError(f"{owner}: rows of {length} tokens exceed the model's context of {limit}; shorten them")


def tokenizer_directory(owner: str, tokenizer: Any, path: str | None) -> Path:
    """Folder whose tokenizer files go along with an exported model.

    Raises:
        ValueError: neither the data's tokenizer nor the start model has one.
    """
    directory = getattr(tokenizer, "directory", None) or path
    if directory is None:
        raise ValueError(f"{owner}: exporting needs a tokenizer: use data with a tokenizer folder, or model.path")
    return Path(directory)
