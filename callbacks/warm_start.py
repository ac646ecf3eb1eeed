"""Starting a run from another run's weights, with everything else fresh."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint import AtomicCheckpointIO, CheckpointError
from modules.contracts import WarmStarts


class WarmStart(Callback):
    """Loads weights before the first step of ``fit``; optimisers, schedules, counters, data and seeds start anew.

    A run that resumes by ``--ckpt_path`` has its weights from there: it leaves them alone.

    Args:
        path: the checkpoint file.

    Raises:
        CheckpointError: at the start of ``fit``, weights that do not fit the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return
        checkpoint = AtomicCheckpointIO().load_checkpoint(self.path)
        try:
            if isinstance(pl_module, WarmStarts):
                pl_module.warm_start(checkpoint)
            else:
                pl_module.load_state_dict(checkpoint["state_dict"])
        except (RuntimeError, KeyError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"--warm_start {self.path}: its weights do not fit {type(pl_module).__name__}: {said}"
            ) from None
