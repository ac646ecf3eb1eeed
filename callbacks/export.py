"""Write the trained model in its ecosystem's own format at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from modules.contracts import Exports


class ExportModel(Callback):
    """Calls the module's ``export_pretrained`` on all ranks after ``fit``, ``validate`` or ``test``.

    Args:
        folder: where to; replaced as a whole, atomically. ``null``: ``export`` in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Exports):
            raise ValueError(f"ExportModel: {type(pl_module).__name__} has no export_pretrained(folder)")
        # trainer.log_dir is a collective: asked on all ranks
        log_dir = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.folder) if self.folder is not None else Path(log_dir) / "export"

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.export_pretrained(self._folder)  # a collective where weights are sharded; rank 0 writes
        trainer.strategy.barrier("ExportModel")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._export(trainer, pl_module)
