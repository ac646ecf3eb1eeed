"""All ranks must start from the same data, weights of the mixture, vocabulary and seed: checked once, before step 1."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from modules.contracts import HasDigest


class RankAgreement(Callback):
    """Gathers the digests of datamodule and module from all ranks and stops with the first field that differs."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        mine: dict[str, str] = {"max_steps": str(trainer.max_steps)}
        for part in (getattr(trainer, "datamodule", None), pl_module):
            if isinstance(part, HasDigest):
                mine.update(part.digest())
        gathered: list[dict[str, str] | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, mine)
        for rank, other in enumerate(gathered):
            for field, value in mine.items():
                theirs = (other or {}).get(field)
                if theirs != value:
                    raise ValueError(
                        f"RankAgreement: '{field}' differs between ranks: rank {trainer.global_rank} has {value}, "
                        f"rank {rank} has {theirs}; start every rank from the same files and config"
                    )
