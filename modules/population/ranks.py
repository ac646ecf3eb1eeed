"""Decisions, sums and rows over ranks, for modules whose steps reduce by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from torch import Tensor

T = TypeVar("T")


class RankModule(LightningModule):
    """A LightningModule that talks to the other ranks itself."""

    @property
    def world_size(self) -> int:
        """Ranks; 1 without a trainer."""
        return 1 if self._trainer is None else self.trainer.world_size

    def decide(self, make: Callable[[], T]) -> T:
        """The value of ``make()`` on rank 0, on all ranks: a decision is made once."""
        if self.world_size == 1:
            return make()
        value: Any = make() if self.trainer.is_global_zero else None
        return self.trainer.strategy.broadcast(value)

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum of ``value`` over ranks, the same on all."""
        if self.world_size == 1:
            return value
        total = value.to(self.device, copy=True)  # NCCL reduces on its devices only
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def gather(self, batch: TensorDict) -> TensorDict:
        """The rows of all ranks, rank by rank, where those of this one were; every rank has as many."""
        if self.world_size == 1:
            return batch
        parts: dict[str, Tensor] = {}
        for key, value in batch.items():
            mine = value.to(self.device).contiguous()
            gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
            torch.distributed.all_gather(gathered, mine)
            parts[str(key)] = torch.cat(gathered).to(value.device)
        return TensorDict(parts, batch_size=[self.world_size * len(batch)])
