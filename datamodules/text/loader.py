"""Loaders: the blended training stream by position, and held-out windows sharded by index.

Both are plain iterables over a torch ``DataLoader``, not ``DataLoader`` subclasses: Lightning replaces the sampler of
a ``DataLoader`` under DDP (``use_distributed_sampler`` is on by default), which would destroy the index function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset

from datamodules.text.disturbance import Disturber
from datamodules.text.mixture import Blend
from datamodules.text.packing import HeldOutWindows, PackedSource


def _same(batch: Any) -> Any:
    return batch  # the default collate would take a TensorDict apart


class _TrainWindows(Dataset):
    """(source [m], item [m]) -> TensorDict batch."""

    def __init__(self, sources: list[PackedSource], document_ids: bool, disturber: Disturber | None = None) -> None:
        self.sources, self.document_ids, self.disturber = sources, document_ids, disturber

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> TensorDict:
        source, items = index
        seq_len = self.sources[0].seq_len
        tokens = np.empty((source.size, seq_len + 1), dtype=np.int64)
        ids = np.empty((source.size, seq_len + 1), dtype=np.int32) if self.document_ids else None
        for number in np.unique(source).tolist():
            rows = np.flatnonzero(source == number)
            part, part_ids = self.sources[number].fetch(items[rows], self.document_ids)
            tokens[rows] = part
            if ids is not None:
                ids[rows] = part_ids
        if self.disturber is not None:
            self.disturber(tokens, ids, [self.sources[number].name for number in source.tolist()], items)
        window = torch.from_numpy(tokens)
        batch = {
            "input_ids": window[:, :-1].contiguous(),
            "labels": window[:, 1:].contiguous(),
            "source_id": torch.from_numpy(source.copy()),
        }
        if ids is not None:
            batch["document_ids"] = torch.from_numpy(ids[:, :-1].copy())
        return TensorDict(batch, batch_size=[source.size])


class _HeldOut(Dataset):
    """window numbers [m] -> TensorDict batch."""

    def __init__(self, windows: HeldOutWindows, source_id: int, document_ids: bool) -> None:
        self.windows, self.source_id, self.document_ids = windows, source_id, document_ids

    def __getitem__(self, index: np.ndarray) -> TensorDict:
        inputs, labels, ids = self.windows.fetch(index, self.document_ids)
        batch = {
            "input_ids": torch.from_numpy(inputs.copy()),
            "labels": torch.from_numpy(labels),
            "source_id": torch.full((index.size,), self.source_id, dtype=torch.int64),
        }
        if ids is not None:
            batch["document_ids"] = torch.from_numpy(ids)
        return TensorDict(batch, batch_size=[index.size])


def _load(dataset: Dataset, indices: Iterable[Any], num_workers: int) -> Iterator[TensorDict]:
    # Nothing happens before the first batch is asked for: Lightning calls iter() once more just to test for it,
    # which must not start workers.
    # Own generator: without it every new iterator would draw a seed from the global torch RNG.
    # batch_size=None: an index from the sampler is a whole batch already.
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_same,
        generator=torch.Generator().manual_seed(0),
    )


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Sequences per rank and micro-batch.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    micro, rest = divmod(batch_size, world_size * accumulate)
    if rest or micro < 1:
        raise ValueError(
            f"batch_size {batch_size} (global sequences per optimiser step) must be a multiple of world_size "
            f"{world_size} x accumulate_grad_batches {accumulate} = {world_size * accumulate}"
        )
    return micro


class StreamPosition:
    """Where the blended stream stands after a number of optimiser steps, and the blend from any step at hand.

    ``offsets[d]`` items of source d were used before this blend began (non-zero only after a tolerated data change).
    """

    def __init__(self, weights: list[float], batch_size: int) -> None:
        self.weights, self.batch_size = weights, batch_size
        self.offsets = [0] * len(weights)
        self.step = 0  # optimiser step of the snapshot in `counts`
        self.counts = [0] * len(weights)
        self.index = 0
        self._ahead: dict[int, list[int]] = {}

    def restore(self, step: int, index: int, counts: list[int], offsets: list[int]) -> None:
        """Set the snapshot: after ``step`` optimiser steps the blend stands at (index, counts)."""
        Blend(self.weights, index, counts)  # raises on counts that don't fit
        self.step, self.index, self.counts, self.offsets = step, index, list(counts), list(offsets)
        self._ahead = {}

    def at(self, step: int) -> Blend:
        """The blend after ``step`` optimiser steps; also moves the snapshot there."""
        if step < self.step:
            raise ValueError(f"StreamPosition: step {step} lies before the restored step {self.step}")
        known = self._ahead.get(step)
        blend = Blend(self.weights, self.index, self.counts)
        if known is not None:
            blend = Blend(self.weights, self.index + (step - self.step) * self.batch_size, known)
        elif step > self.step:
            blend.take((step - self.step) * self.batch_size)
        self.step, self.index, self.counts = step, blend.index, list(blend.counts)
        self._ahead = {later: counts for later, counts in self._ahead.items() if later > step}
        return blend

    def remember(self, step: int, counts: list[int]) -> None:
        """Keep the counts of a step the sampler has reached, so that saving there replays nothing."""
        self._ahead[step] = list(counts)
        if len(self._ahead) > 1024:  # far more than any prefetch; older ones can be replayed
            del self._ahead[min(self._ahead)]


class TrainLoader:
    """Batches of this rank, from the trainer's optimiser step on.

    The blend's outputs of step s are ``batch_size`` consecutive ones; micro-batch a of rank r takes outputs
    ``((s - 1) * A + (a - 1)) * R * m + r * m + [0, m)`` (steps and micro-batches from 1, ranks from 0). The samples of
    a step are hence the same for every split of the batch into R ranks and A micro-batches.

    Args:
        steps_done: gives the completed optimiser steps; asked whenever iteration starts.
        max_steps: optimiser steps of the whole run.
        disturber: of the windows' text, or None.

    ``len()`` is ``max_steps * A`` also after a resume, as Lightning counts batches from the start of the run, while
    iteration yields the batches that are left.
    """

    def __init__(
        self, sources: list[PackedSource], position: StreamPosition, *, max_steps: int, world_size: int, rank: int,
        accumulate: int, steps_done: Callable[[], int], document_ids: bool = False, num_workers: int = 0,
        disturber: Disturber | None = None,
    ) -> None:  # fmt: skip
        self.micro_batch = micro_batch_size(position.batch_size, world_size, accumulate)
        self._position = position
        self._max_steps, self._world_size, self._rank = max_steps, world_size, rank
        self._accumulate, self._steps_done, self._num_workers = accumulate, steps_done, num_workers
        self._windows = _TrainWindows(sources, document_ids, disturber)

    def __len__(self) -> int:
        return self._max_steps * self._accumulate

    def __iter__(self) -> Iterator[TensorDict]:
        return _load(self._windows, self._indices(), self._num_workers)

    def _indices(self) -> Iterator[tuple[np.ndarray, ...]]:
        step = self._steps_done()
        blend = self._position.at(step)
        offsets = np.array(self._position.offsets, dtype=np.int64)
        while step < self._max_steps:
            source, item = blend.take(self._position.batch_size)
            item = item + offsets[source]
            step += 1
            self._position.remember(step, blend.counts)
            for micro in range(self._accumulate):
                first = (micro * self._world_size + self._rank) * self.micro_batch
                chosen = slice(first, first + self.micro_batch)
                yield self._select(source, item, chosen)

    def _select(self, source: np.ndarray, item: np.ndarray, chosen: slice) -> tuple[np.ndarray, ...]:
        """What the dataset is asked for: this micro-batch's part of the step's samples."""
        return source[chosen], item[chosen]

    # Having these two tells Lightning that a mid-epoch resume is safe; the position itself lives in the DataModule.
    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["steps"] != self._steps_done():
            raise ValueError(f"checkpoint: data loader at step {state['steps']}, trainer at {self._steps_done()}")


class HeldOutLoader:
    """One source's held-out windows, every rank the same number of batches.

    Global batch b holds windows ``[b*G, (b+1)*G)``; rank r takes its contiguous share of ceil(G / R). The union over
    ranks is the same for every world size; rows beyond the end have labels of -100 only, so sums and counts over
    ranks are exact.

    Args:
        batch_size: G, windows per global batch.
    """

    def __init__(
        self, windows: HeldOutWindows, source_id: int, *, batch_size: int, world_size: int, rank: int,
        document_ids: bool = False, num_workers: int = 0,
    ) -> None:  # fmt: skip
        self._dataset = _HeldOut(windows, source_id, document_ids)
        self._batch_size, self._world_size, self._rank = batch_size, world_size, rank
        self._num_workers = num_workers

    def __len__(self) -> int:
        return -(-len(self._dataset.windows) // self._batch_size)

    def __iter__(self) -> Iterator[TensorDict]:
        return _load(self._dataset, self._indices(), self._num_workers)

    def _indices(self) -> Iterator[np.ndarray]:
        count = len(self._dataset.windows)
        share = -(-self._batch_size // self._world_size)
        local = self._rank * share + np.arange(share)
        for batch in range(len(self)):
            # A number past the end reads as an empty window.
            yield np.where(local < self._batch_size, batch * self._batch_size + local, count)


def position_state(position: StreamPosition, trainer: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of one stream of samples: ``identity``, completed optimiser steps, and samples taken."""
    step = trainer.global_step if trainer is not None else position.step
    blend = position.at(max(step, position.step))
    return {
        **identity,
        "step": position.step,
        "consumed_samples": blend.index,
        "accumulate_grad_batches": trainer.accumulate_grad_batches if trainer is not None else 1,
    }


def restore_position(
    position: StreamPosition, state: Mapping[str, Any], identity: Mapping[str, Any], trained: str
) -> int:
    """Put ``position`` where :func:`position_state` found it; the micro-batches a step then had.

    Args:
        identity: of the data now; every field must be the saved one. trained: what was done on them, for the message.

    Raises:
        ValueError: the data differ, naming the first field that does.
    """
    for field, now in identity.items():
        if state.get(field) != now:
            raise ValueError(
                f"checkpoint was {trained} on other data: {field} was {state.get(field)}, is {now}; restore the data, "
                "or start anew from the checkpoint's weights"
            )
    consumed = state["consumed_samples"]
    position.restore(state["step"], consumed, [consumed], [0])
    return state["accumulate_grad_batches"]


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any], fields: Iterable[str]) -> str:
    """The first of ``fields`` that differs, and how; empty where none does."""
    for field in fields:
        old, new = saved.get(field), now[field]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            name = next(key for key in (*old, *new) if old.get(key) != new.get(key))
            return f"{field}[{name!r}] was {_short(old.get(name))}, is {_short(new.get(name))}"
        return f"{field} was {_short(old)}, is {_short(new)}"
    return ""


def _short(value: Any) -> str:
    return "absent" if value is None else value[:12] if isinstance(value, str) else str(value)


def training_steps(trainer: Any, owner: str) -> int:
    """``trainer.max_steps``, which is the length of a run of ``owner``.

    Raises:
        ValueError: no trainer, or no ``max_steps``.
    """
    if trainer is None or trainer.max_steps < 1:
        found = "no trainer" if trainer is None else f"max_steps={trainer.max_steps}"
        raise ValueError(f"{owner}: training length must be given as trainer.max_steps >= 1, got {found}")
    return trainer.max_steps


def check_epoch_length(batches: int, trainer: Any, owner: str) -> None:
    """Refuse a ``limit_train_batches`` that would cut an optimiser step short.

    Raises:
        ValueError: the limited epoch is no multiple of ``accumulate_grad_batches``.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    if batches % trainer.accumulate_grad_batches:
        raise ValueError(
            f"{owner}: limit_train_batches gives epochs of {batches} batches, not a multiple of "
            f"accumulate_grad_batches {trainer.accumulate_grad_batches}; the last step of each would be cut short"
        )


def align_batch_progress(trainer: Any, accumulate_before: int) -> None:
    """Put Lightning's micro-batch counters on the optimiser step the data goes on from.

    Lightning counts micro-batches. Its counters point elsewhere if the checkpoint was written between two micro-batches
    of one step (whose partial gradient is lost: the step is done again, whole), or if the batch is now split into
    another number of micro-batches.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    now = trainer.accumulate_grad_batches
    # Saved in on_train_batch_end: the batch is processed but not yet counted as completed.
    open_batch = progress.current.processed == progress.current.completed + 1
    done = progress.current.processed if open_batch else progress.current.completed
    if now == accumulate_before and done % accumulate_before == 0:
        return
    whole = done % accumulate_before == 0
    for counter in (progress.current, progress.total):
        reached = counter.processed if open_batch else counter.completed
        reached = reached // accumulate_before * now
        counter.ready = counter.started = counter.processed = reached
        counter.completed = reached - 1 if open_batch and whole else reached
