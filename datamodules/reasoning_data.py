"""Reasoning questions for evaluation: one loader per set, sharded over ranks by item index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from datamodules.math_data import task_dataloaders
from datamodules.text.reasoning_sets import ReasoningItem, check_sets, load_set
from modules.files import canonical_digest


class ReasoningDataModule(pl.LightningDataModule):
    """Serves reasoning sets to ``test``, ``validate`` and ``predict``.

    A batch is a list of :class:`~datamodules.text.reasoning_sets.ReasoningItem` (plain dicts with ``set``, ``item_id``,
    ``question``, ``gold``, ``kind``), all of one set; dataloader i belongs to ``set_names[i]``. Ranks share the items
    out without repeating any, so some batches may be empty on some ranks.

    Args:
        sets: ``gsm8k``, ``multiarith``, ``addsub``, ``svamp``, ``singleeq``, ``aqua``, ``commonsenseqa``,
            ``strategyqa`` (from files), ``synthetic`` (made-up word problems, no file).
        data_dir: folder that holds ``reasoning/``; not needed for ``synthetic``.
        limit: items per set, the first ones of a seeded order (the paper evaluated 254); None: all.
        seed: of that order and of the synthetic problems.
        batch_size: items per batch over all ranks.

    Raises:
        ValueError: an unknown or repeated set, a value out of range, or (at ``setup``) a bad row or an empty file.
        FileNotFoundError: at ``setup``: a set's file is missing.
    """

    def __init__(
        self,
        sets: list[str],
        data_dir: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        check_sets(list(sets))
        for name, value, least in (("limit", limit, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ValueError(f"ReasoningDataModule: {name} must be >= {least}, got {value}")
        self.set_names = list(sets)
        self.data_dir, self.limit, self.seed, self.batch_size = data_dir, limit, seed, batch_size
        self.save_hyperparameters(logger=False)
        self._items: dict[str, list[ReasoningItem]] | None = None

    @property
    def items(self) -> dict[str, list[ReasoningItem]]:
        """All items by set, on every rank; read at first use."""
        if self._items is None:
            self._items = {name: load_set(name, self.data_dir, self.limit, self.seed) for name in self.set_names}
        return self._items

    def setup(self, stage: str) -> None:
        """Reads the files, so that a missing or bad one is reported before any model is asked."""
        _ = self.items

    def val_dataloader(self) -> list[DataLoader]:
        return self._loaders()

    def test_dataloader(self) -> list[DataLoader]:
        return self._loaders()

    def predict_dataloader(self) -> list[DataLoader]:
        return self._loaders()

    def describe(self) -> dict[str, str]:
        """Keys and types of an item in a batch (a list of them), and one line a set."""
        keys = {key: getattr(kind, "__forward_arg__", str(kind)) for key, kind in ReasoningItem.__annotations__.items()}
        for name, items in self.items.items():
            lengths = [len(item["question"]) for item in items]
            golds = Counter(item["gold"] for item in items).most_common(1)[0]
            keys[f"set {name}"] = (
                f"{len(items)} items, {items[0]['kind']}, question characters min/mean/max "
                f"{min(lengths)}/{sum(lengths) // len(lengths)}/{max(lengths)}, most frequent answer {golds[0]} "
                f"({golds[1]} times)"
            )
        return keys

    def digest(self) -> dict[str, str]:
        """What every rank must agree on: the items, by set, and the batch size."""
        items = {f"set {name}": canonical_digest(rows) for name, rows in self.items.items()}
        return {"batch_size": str(self.batch_size), **items}

    def _loaders(self) -> list[DataLoader]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # the loaders only hand items through; they are typed for the maths tasks
        items = cast(Mapping[str, Sequence[Any]], self.items)
        return task_dataloaders(items, rank, world_size, self.batch_size)
