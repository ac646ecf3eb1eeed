"""Multi-agent runs through the command line: a module that kills itself, and data that ignore their rank."""

from __future__ import annotations

from killed import Killed

from datamodules.marl_data import MARLDataModule
from modules.emax import ValueMARL
from modules.seeds import global_seed, stream_seed


class KilledMARL(Killed, ValueMARL):
    """ValueMARL that ends by SIGKILL."""


class SameOnAllRanks(MARLDataModule):
    """Every rank has the environments and minibatches of a single one: its gradients averaged are that one's."""

    def _share(self, name: str, value: int) -> int:
        return value

    def rank_seed(self, purpose: int) -> int:
        return stream_seed(global_seed(), 0, purpose)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.world_size, self.rank = 1, 0
