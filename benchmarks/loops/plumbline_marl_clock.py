"""Callback that times ``python -m train`` on multi-agent replay; the command line imports it by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from marl_common import IterationClock, MarlArgs


class Clock(Callback):
    """One training batch is one iteration: the frames it was collected from and all updates of them.

    Between the end of one training batch and the start of the next nothing happens but Lightning's bookkeeping and the
    datamodule's own work, so that is the time counted as collection; drawing the minibatches is in it.
    """

    args: MarlArgs
    clock: IterationClock | None = None
    parameters: int = 0
    done: list[tuple[int, int]]
    """Environment frames and optimiser updates that had been made at either end of the timed span."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Clock.clock = IterationClock(Clock.args.warmup, Clock.args.iterations)
        Clock.done = []
        Clock.parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert Clock.clock is not None
        Clock.clock.collected()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert Clock.clock is not None
        before = len(Clock.clock.marks)
        Clock.clock.trained()
        if len(Clock.clock.marks) > before:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            updates = max(int(state["step"]) for state in trainer.optimizers[0].state.values())  # Adam's own count
            Clock.done.append((int(data.frames), updates))
