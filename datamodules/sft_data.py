"""Supervised finetuning data: masked-prompt batches, in an order that is a pure function of the optimiser step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch.utils.data import Dataset

from datamodules.text.excerpts import UNKNOWN, frequencies, pieces
from datamodules.text.loader import (
    HeldOutLoader,
    StreamPosition,
    TrainLoader,
    align_batch_progress,
    check_epoch_length,
    micro_batch_size,
    position_state,
    restore_position,
    training_steps,
)
from datamodules.text.sft import SFTRows, SFTSource, prepare_sft, sft_folder
from datamodules.text.specs import as_spec
from datamodules.text.tokenizer import TextTokenizer
from modules.contracts.corpora import Excerpts, TextSplit


class _SFTBatches(Dataset):
    """(unused source [m], item [m], items of the whole optimiser step) -> TensorDict batch."""

    def __init__(self, rows: SFTRows, document_ids: bool) -> None:
        self.rows, self.document_ids = rows, document_ids

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray, np.ndarray]) -> TensorDict:
        rows = self.rows.rows_of(index[1])
        step_targets = int(self.rows.row_targets[self.rows.rows_of(index[2])].sum())
        inputs, labels, ids = self.rows.fetch(rows, self.document_ids)
        batch = {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "source_id": torch.from_numpy(self.rows.row_source[rows].astype(np.int64)),
            "step_targets": torch.full((rows.size,), step_targets, dtype=torch.int64),
        }
        if ids is not None:
            batch["document_ids"] = torch.from_numpy(ids)
        return TensorDict(batch, batch_size=[rows.size])


class SFTLoader(TrainLoader):
    """The corpus' step-to-samples function (see :class:`datamodules.text.loader.TrainLoader`) over SFT rows."""

    def __init__(self, rows: SFTRows, position: StreamPosition, *, document_ids: bool, **options: Any) -> None:
        super().__init__([], position, document_ids=document_ids, **options)
        self._windows = _SFTBatches(rows, document_ids)

    def _select(self, source: np.ndarray, item: np.ndarray, chosen: slice) -> tuple[np.ndarray, ...]:
        return source[chosen], item[chosen], item


class SFTDataModule(LightningDataModule):
    """Prompt and response pairs for finetuning a causal language model (Azerbayev et al. 2024, section 5).

    Batches are TensorDicts of batch size [B] as in continued pretraining: ``input_ids`` int64 [B, T], ``labels`` int64
    [B, T] (``labels[t]`` is the token after ``input_ids[t]``; -100 on prompt and filler), ``source_id`` int64 [B], and
    with ``document_mask`` ``document_ids`` int32 [B, T]. Training batches also hold ``step_targets`` int64 [B], the
    number of labels that are not -100 in the whole optimiser step over all ranks and micro-batches: the loss is to be
    averaged over those, or the weight of a token would depend on the micro-batch it fell into.

    Which rows step s trains on is a pure function of s: the same for every number of ranks and of accumulated
    micro-batches, and after every resume.

    Args:
        sources: files of examples.
        tokenizer: directory with ``tokenizer.json``.
        cache_dir: where tokenised examples are kept; safe to delete.
        seq_len: T, places per row; an example of n tokens (end-of-document included) takes n - 1.
        batch_size: rows per optimiser step over all ranks and accumulated micro-batches.
        packing: several examples a row, which saves the filler; set ``document_mask`` to keep them from seeing each
            other.
        overlong: an example longer than a row is an error, or is dropped and counted.
        holdout_fraction: share of the examples, chosen by the hash of their text, kept for validation.
        eval_batch_size: held-out rows per batch over all ranks; None = batch_size / accumulation.
        seed: of the order of rows in each epoch.
        document_mask: add ``document_ids``.
        num_workers: loader processes; 0 is right for memory-mapped tokens on a local disk.

    Raises:
        ValueError, FileNotFoundError: wrong arguments, an unreadable, empty or overlong example; one line, before any
            training.
    """

    def __init__(
        self,
        sources: list[SFTSource],
        tokenizer: str,
        cache_dir: str,
        seq_len: int,
        batch_size: int,
        packing: bool = False,
        overlong: Literal["error", "drop"] = "error",
        holdout_fraction: float = 0.0,
        eval_batch_size: int | None = None,
        seed: int = 0,
        document_mask: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.sources = [as_spec(SFTSource, source) for source in sources]
        self.tokenizer_dir, self.cache_dir = tokenizer, Path(cache_dir)
        self.seq_len, self.batch_size, self.eval_batch_size = seq_len, batch_size, eval_batch_size
        self.packing, self.overlong, self.holdout_fraction = packing, overlong, holdout_fraction
        self.seed, self.document_mask, self.num_workers = seed, document_mask, num_workers
        self._check()
        self._rows: SFTRows | None = None
        self._held_out: dict[str, SFTRows] = {}
        self._accumulated: int | None = None
        if holdout_fraction == 0:
            # Lightning takes the base class's method for "no validation"; an empty list would make it warn.
            self.val_dataloader = super().val_dataloader
        # Plain values only: checkpoints must load with weights_only=True.
        self.save_hyperparameters(
            {
                "sources": [asdict(source) for source in self.sources],
                "tokenizer": tokenizer,
                "seq_len": seq_len,
                "batch_size": batch_size,
                "packing": packing,
                "overlong": overlong,
                "holdout_fraction": holdout_fraction,
                "seed": seed,
                "document_mask": document_mask,
            },
            logger=False,
        )

    def _check(self) -> None:
        for key in ("seq_len", "batch_size", "eval_batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"SFTDataModule: {key} must be >= 1, got {value}")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(f"SFTDataModule: seed and num_workers must be >= 0, got {self.seed}, {self.num_workers}")
        if not 0 <= self.holdout_fraction < 1:
            raise ValueError(f"SFTDataModule: holdout_fraction must be in [0, 1), got {self.holdout_fraction}")
        if self.overlong not in ("error", "drop"):
            raise ValueError(f"SFTDataModule: overlong must be 'error' or 'drop', got {self.overlong!r}")
        if not self.sources:
            raise ValueError("SFTDataModule: sources is empty")
        names = self.source_names
        for source in self.sources:
            source.check()
            if names.count(source.name) > 1:
                raise ValueError(f"SFTDataModule: source name {source.name!r} is used twice")

    # ---------------------------------------------------------------- preparation

    def prepare_data(self) -> None:
        """Tokenise the examples once (one process per node)."""
        prepare_sft(self.sources, TextTokenizer(self.tokenizer_dir), self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised examples and lay out the rows; a second call does nothing.

        Raises:
            FileNotFoundError: ``prepare_data`` has not run for this configuration.
            ValueError: an overlong example with ``overlong: error``, or nothing left to train on.
        """
        if self._rows is not None:
            return
        self._tokenizer = TextTokenizer(self.tokenizer_dir)
        folder = sft_folder(self.sources, self._tokenizer, self.cache_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"SFTDataModule: {folder} does not exist; call prepare_data() first")
        shared = (folder, self.sources, self._tokenizer.hash, self._tokenizer.eod_id, self.seq_len)
        options = {"overlong": self.overlong, "holdout_fraction": self.holdout_fraction, "seed": self.seed}
        rows = SFTRows(*shared, packing=self.packing, **options)  # type: ignore[arg-type]
        if self.holdout_fraction > 0:
            for number, source in enumerate(self.sources):
                part = SFTRows(*shared, split="validation", source=number, **options)  # type: ignore[arg-type]
                if len(part):
                    self._held_out[source.name] = part
            if not self._held_out:
                raise ValueError(
                    f"SFTDataModule: holdout_fraction {self.holdout_fraction} keeps no example to validate"
                )
        self._folder = folder.name
        self._position = StreamPosition([1.0], self.batch_size)
        self._rows = rows

    def _need_setup(self) -> SFTRows:
        if self._rows is None:
            raise RuntimeError("SFTDataModule: call prepare_data() and setup() first")
        return self._rows

    # ---------------------------------------------------------------- what the data are

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer in use (``directory``, ``hash``, ``vocab_size``, ``eod_id``)."""
        self._need_setup()
        return self._tokenizer

    @property
    def source_names(self) -> list[str]:
        """Names by ``source_id``."""
        return [source.name for source in self.sources]

    @property
    def val_names(self) -> list[str]:
        """Source of each validation dataloader."""
        self._need_setup()
        return list(self._held_out)

    def corpora(self, split: TextSplit) -> tuple[str, ...]:
        """Sources that have examples in ``split``; ``test`` are the held-out ones."""
        self._need_setup()
        return tuple(self.source_names if split == "train" else self._held_out)

    def excerpts(self, split: TextSplit, corpus: str, length: int) -> Excerpts:
        """Examples, prompt and response, cut into pieces of ``length`` tokens.

        Raises:
            ValueError: the source has no example in ``split``.
        """
        if corpus not in self.corpora(split):
            raise ValueError(
                f"excerpts: source {corpus!r} has no {split} example; those that have: {self.corpora(split)}"
            )
        rows = self._need_setup() if split == "train" else self._held_out[corpus]
        return pieces(corpus, rows.shard, length, rows.examples_of(self.source_names.index(corpus)))

    def token_counts(self) -> np.ndarray:
        """``[vocab_size]`` float64: relative frequencies of tokens in the examples."""
        return frequencies(self._need_setup().shard, self._tokenizer.vocab_size)

    def stream_shares(self) -> dict[str, float]:
        """Source -> its share of the rows trained on."""
        counts = np.bincount(self._need_setup().row_source, minlength=len(self.sources))
        return {name: float(count / counts.sum()) for name, count in zip(self.source_names, counts, strict=True)}

    def licences(self) -> dict[str, str]:
        """Source -> licence of its text."""
        return {source.name: source.licence or UNKNOWN for source in self.sources}

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that go once through all rows, rounded up."""
        return -(-len(self._need_setup()) // self.batch_size)

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank."""
        rows = "B"
        if self.trainer is not None:
            rows = str(micro_batch_size(self.batch_size, self.trainer.world_size, self.trainer.accumulate_grad_batches))
        shape = f"[{rows}, {self.seq_len}]"
        row = f"int64 [{rows}]"
        keys = {"input_ids": f"int64 {shape}", "labels": f"int64 {shape}", "source_id": row, "step_targets": row}
        return {**keys, "document_ids": f"int32 {shape}"} if self.document_mask else keys

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        return {key: str(value) for key, value in {**self._identity(), "batch_size": self.batch_size}.items()}

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> SFTLoader:
        """This rank's batches from the trainer's current optimiser step to ``max_steps``."""
        rows = self._need_setup()
        trainer: Any = self.trainer
        steps = training_steps(trainer, f"SFTDataModule ({self.steps_per_epoch} steps are one epoch)")
        loader = SFTLoader(
            rows,
            self._position,
            max_steps=steps,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            accumulate=trainer.accumulate_grad_batches,
            steps_done=lambda: trainer.global_step,
            document_ids=self.document_mask,
            num_workers=self.num_workers,
        )
        check_epoch_length(len(loader), trainer, "SFTDataModule")
        if self._accumulated is not None:
            align_batch_progress(trainer, self._accumulated)
        return loader

    def val_dataloader(self) -> list[HeldOutLoader]:
        """One loader per name in ``val_names``: held-out examples, one a row, prompts masked."""
        self._need_setup()
        trainer = self.trainer
        world_size, rank, accumulate = (
            (trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches) if trainer else (1, 0, 1)
        )
        return [
            HeldOutLoader(
                rows,  # type: ignore[arg-type]  # reads like HeldOutWindows
                self.source_names.index(name),
                batch_size=self.eval_batch_size or max(1, self.batch_size // accumulate),
                world_size=world_size,
                rank=rank,
                document_ids=self.document_mask,
                num_workers=self.num_workers,
            )
            for name, rows in self._held_out.items()
        ]

    # ---------------------------------------------------------------- position

    def _identity(self) -> dict[str, Any]:
        self._need_setup()
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "overlong": self.overlong,
            "holdout_fraction": self.holdout_fraction,
            "tokenizer_hash": self._tokenizer.hash,
            "data": self._folder,
        }

    def state_dict(self) -> dict[str, Any]:
        """Exact position: the trainer's completed optimiser steps and the rows they took, in plain values."""
        if self._rows is None:
            return {}
        return position_state(self._position, self.trainer, self._identity())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: the data differ, naming the first field that does.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return  # validation reads held-out rows only
        self._accumulated = restore_position(self._position, state_dict, self._identity(), "finetuned")
