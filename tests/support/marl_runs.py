"""Multi-agent runs through the command line: a module that kills itself, and data that ignore their rank."""

from __future__ import annotations

import os
import signal
from typing import Any

from datamodules.marl_data import MARLDataModule
from datamodules.rollout.environments import rank_seed
from modules.emax import ValueMARL
from modules.seeds import global_seed


class KilledMARL(ValueMARL):
    """ValueMARL that ends by SIGKILL.

    Args:
        kill_at: training steps completed when it does, 0: never.
    """

    def __init__(self, kill_at: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kill_at = kill_at

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.kill_at > 0:
            os.kill(os.getpid(), signal.SIGKILL)


class SameOnAllRanks(MARLDataModule):
    """Every rank has the environments and minibatches of a single one: its gradients averaged are that one's."""

    def _share(self, name: str, value: int) -> int:
        return value

    def rank_seed(self, purpose: int) -> int:
        return rank_seed(global_seed(), 0, purpose)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.world_size, self.rank = 1, 0
