"""A progress bar that counts optimiser steps, the unit that runs are configured in."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar without the epoch count, which means nothing for runs of ``max_steps``, and with the speed."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for name, value in trainer.logged_metrics.items():
            if name.startswith("speed/") and name.endswith("_per_s"):
                items[name.removeprefix("speed/").replace("_per_s", "/s")] = f"{float(value):,.0f}"
        return items  # pyright: ignore[reportReturnType]

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._describe(trainer)  # a run resumed inside an epoch sees no epoch start

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._describe(trainer)

    def _describe(self, trainer: Trainer) -> None:
        if trainer.max_epochs == -1:
            self.train_progress_bar.set_description(f"fit to step {trainer.max_steps:,}")
