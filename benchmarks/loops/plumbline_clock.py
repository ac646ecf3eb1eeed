"""Callback that times ``python -m train``; a module of its own because the command line imports it by name."""

from __future__ import annotations

from typing import Any

from common import LoopArgs, Meter
from lightning.pytorch import Callback, LightningModule, Trainer


class Clock(Callback):
    """Ticks at the start of each optimiser step (one batch is one step here)."""

    args: LoopArgs
    meter: Meter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.llama  # pyright: ignore[reportAttributeAccessIssue]
        parameters = sum(p.numel() for p in network.parameters())
        Clock.meter = Meter(Clock.args, "plumbline", parameters, lambda x: network.logits(network(x)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert Clock.meter is not None
        Clock.meter.tick()
