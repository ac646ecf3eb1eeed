"""A module and a datamodule small enough to test the house itself: CLI, checkpoints, resume, DDP.

The module draws noise from python, numpy and torch in every step, so a resume that loses any generator shows.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset, Sampler


class TinyModule(LightningModule):
    """Linear regression with noise from three generators.

    Args:
        lr: learning rate.
        width: number of inputs.
        kill_at: optimiser step after which the process kills itself (SIGKILL), 0: never.
        kill_where: ``train`` (after the step), ``validation`` (inside validation).
    """

    work_unit = "tokens"

    def __init__(self, lr: float = 0.05, width: int = 4, kill_at: int = 0, kill_where: str = "train") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

    def work_per_batch(self, batch: TensorDict) -> int:
        return batch.batch_size[0]

    def training_step(self, batch: TensorDict, batch_idx: int) -> torch.Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()  # noqa: NPY002
        loss = ((self.net(batch["x"]) - batch["y"]) ** 2).mean() * (1 + 0.1 * noise)
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hparams["kill_where"] == "train" and self.global_step == self.hparams["kill_at"] > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        if self.hparams["kill_where"] == "validation" and self.global_step == self.hparams["kill_at"] > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.rand(()).item()
        loss = ((self.net(batch["x"]) - batch["y"]) ** 2).mean()
        self.log("val/loss", loss + noise, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: TensorDict, batch_idx: int) -> torch.Tensor:
        return self.net(batch["x"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + 0.1 * s)), "interval": "step"}
        ]


def _same(batch: TensorDict) -> TensorDict:
    return batch


class _Rows(Dataset):
    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(512, width, generator=generator)
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: list[int]) -> TensorDict:
        return TensorDict({"x": self.x[index], "y": self.y[index]}, batch_size=[len(index)])


class _Positions(Sampler[list[int]]):
    """Micro-batches as a pure function of the global sample index; ``len`` is the whole run's."""

    def __init__(self, start: int, batches: int, micro: int, rank: int, world: int) -> None:
        self.start, self.batches, self.micro, self.rank, self.world = start, batches, micro, rank, world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.batches):
            first = (batch * self.world + self.rank) * self.micro
            yield [(first + offset) % 512 for offset in range(self.micro)]


class TinyData(LightningDataModule):
    """Fixed regression data with an exact position.

    Args:
        batch_size: global samples per optimiser step.
        width: number of inputs.
    """

    def __init__(self, batch_size: int = 8, width: int = 4) -> None:
        super().__init__()
        self.batch_size, self.width = batch_size, width
        self.consumed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.trainer.global_step * self.batch_size}  # pyright: ignore

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = state_dict["consumed"]

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        micro = self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
        start = self.consumed // (micro * trainer.world_size)
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        sampler = _Positions(start, batches, micro, trainer.global_rank, trainer.world_size)
        return DataLoader(
            _Rows(self.width),
            sampler=sampler,
            batch_size=None,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Rows(self.width), sampler=_Positions(0, 2, 8, 0, 1), batch_size=None, collate_fn=_same)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
