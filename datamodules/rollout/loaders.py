"""Loaders of batches that the datamodule makes itself, one for each item of a dataset."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset


class MakesBatches(Protocol):
    """A datamodule that collects the next of ``batches`` when it is asked."""

    @property
    def batches(self) -> int: ...

    def next_batch(self) -> TensorDict: ...


class CollectedBatches(Dataset):
    """A batch per collection of the whole run, made when it is asked for.

    Which step it is the datamodule knows: a run resumed in the middle takes what is left.
    """

    def __init__(self, data: MakesBatches) -> None:
        self.data = data

    def __len__(self) -> int:  # sized, or the loader would fetch one batch ahead, collected by the policy before
        return self.data.batches

    def __getitem__(self, index: int) -> TensorDict:
        return self.data.next_batch()


def _same(batch: Any) -> Any:
    return batch


def training_loader(dataset: Dataset) -> DataLoader:
    """Each item of ``dataset`` as a batch, in this process."""
    # a generator of its own, or every epoch would draw a seed from the global stream
    return DataLoader(dataset, batch_size=None, collate_fn=_same, num_workers=0, generator=torch.Generator())


def evaluation_loader(dataset: Dataset) -> DataLoader:
    """Each item of ``dataset`` as a batch, in this process."""
    return DataLoader(dataset, batch_size=None, collate_fn=_same, num_workers=0)
