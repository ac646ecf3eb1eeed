"""A module that ends by SIGKILL, for tests of exact resume."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import LightningModule


class Killed(LightningModule):
    """To inherit from beside the module in question.

    Args:
        kill_at: training steps completed when it kills itself, 0: never.
    """

    def __init__(self, kill_at: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kill_at = kill_at

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.kill_at > 0:
            os.kill(os.getpid(), signal.SIGKILL)
