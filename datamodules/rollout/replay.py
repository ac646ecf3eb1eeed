"""Replay on TorchRL's storages: steps or whole episodes in, minibatches out; saved in parts beside a checkpoint."""

from __future__ import annotations

import logging
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, RandomSampler, ReplayBuffer

from modules.files import read_json_object, write_bytes, write_json

logging.getLogger("torchrl").setLevel(logging.WARNING)  # or every storage announces that it was allocated

INDEX = "replay.json"
PART_ITEMS = 16_384
"""Items of one file of a saved replay: what a checkpoint rewrites where anything of it changed."""


def _checked(path: Path, size: int, crc: int) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Replay: {path} is missing: resume from another checkpoint") from None
    if len(data) != size or zlib.crc32(data) != crc:
        raise ValueError(f"Replay: {path} is damaged (size or checksum): resume from another checkpoint")
    return data


def _memory_bytes() -> int:
    """Physical memory of the machine, or a very large number where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


class Replay:
    """A ring of items with uniform sampling with replacement, on TorchRL's ``ReplayBuffer``.

    Args:
        capacity: items kept.
        storage: ``memory``, or ``memmap``: files in ``folder``, for replay larger than memory.
        folder: of the memory-mapped files; they are scratch, a checkpoint has copies.
        seed: of the sampler.

    Raises:
        ValueError: ``capacity`` below 1, no ``folder`` for memory-mapped storage; from :meth:`extend`, a ring that does
            not fit into memory or on the disk (before anything is allocated).
    """

    def __init__(
        self,
        capacity: int,
        storage: Literal["memory", "memmap"] = "memory",
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"Replay: capacity must be >= 1, got {capacity}")
        if storage not in ("memory", "memmap"):
            raise ValueError(f"Replay: storage: memory or memmap, got '{storage}'")
        if storage == "memmap" and folder is None:
            raise ValueError("Replay: folder: memory-mapped storage needs one, got none")
        self.capacity, self.storage = capacity, storage
        self.folder = None if folder is None else Path(folder)
        self.generator = torch.Generator().manual_seed(seed)
        self.written = 0
        self._saved: tuple[Path, int] | None = None  # the last save's folder and what was written by then
        self._buffer: ReplayBuffer | None = None

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    @property
    def cursor(self) -> int:
        """Where the next item goes."""
        return self.written % self.capacity

    def require_room(self, item_bytes: int, saved_copies: int = 0) -> None:
        """Raises: ValueError: if the full ring does not fit into memory, or on the disk with its saved copies."""
        size = item_bytes * self.capacity
        if self.storage == "memory" and size > _memory_bytes():
            raise ValueError(
                f"Replay: capacity: {self.capacity:,} items of {item_bytes:,} bytes take {size / 1e9:.1f} GB, the "
                f"machine has {_memory_bytes() / 1e9:.1f} GB of memory: lower capacity to at most "
                f"{_memory_bytes() // (2 * item_bytes):,}, or set storage: memmap"
            )
        copies = saved_copies + (self.storage == "memmap")
        if copies and self.folder is not None:
            place = self.folder
            while not place.exists():
                place = place.parent
            free = shutil.disk_usage(place).free
            if copies * size > free:
                raise ValueError(
                    f"Replay: capacity: {self.capacity:,} items of {item_bytes:,} bytes, {copies} times for "
                    f"checkpoints and storage, take {copies * size / 1e9:.1f} GB, the disk of {place} has "
                    f"{free / 1e9:.1f} GB free: lower capacity to at most "
                    f"{int(0.9 * free / (copies * item_bytes)):,}, or point --runs elsewhere"
                )

    def _ring(self) -> ReplayBuffer:
        if self._buffer is None:
            if self.storage == "memmap":
                assert self.folder is not None
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                ring: Any = LazyMemmapStorage(self.capacity, scratch_dir=str(self.folder))
            else:
                ring = LazyTensorStorage(self.capacity)
            self._buffer = ReplayBuffer(storage=ring, sampler=RandomSampler())
            self._buffer.set_rng(self.generator)
        return self._buffer

    def extend(self, items: TensorDict) -> None:
        """Add ``items`` ``[count]``, the oldest of a full ring making room."""
        count = len(items)
        if count == 0:
            return
        if count > self.capacity:
            raise ValueError(
                f"Replay: capacity must be at least the {count} items that arrive at once, got {self.capacity}"
            )
        self._ring().extend(items)
        self.written += count

    def sample(self, count: int) -> TensorDict:
        """``count`` items drawn uniformly with replacement.

        Raises:
            ValueError: from an empty ring.
        """
        if len(self) == 0:
            raise ValueError("Replay: sample: nothing is stored yet")
        return cast(TensorDict, self._ring().sample(count))

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Without the items: those go through :meth:`save`."""
        return {"written": self.written, "capacity": self.capacity, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: ValueError: if the state is of a ring of another capacity."""
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"Replay: capacity: the checkpoint has {state['capacity']}, the config {self.capacity}: keep them equal"
            )
        self.generator.set_state(state["generator"])

    def _items(self) -> dict[str, Tensor]:
        """The ring's tensors, ``[capacity, ...]`` each; empty before the first item."""
        ring: Any = self._ring().storage
        if len(self) == 0:
            return {}
        held = ring._storage
        return {str(name): held[name] for name in sorted(map(str, held.keys()))}

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write all items to ``folder`` as raw parts and an index with sizes and checksums.

        Parts unchanged since ``previous`` (the last save of this very object) are hard-linked.
        """
        stale = self.written
        before: dict[str, Any] = {}
        if previous is not None and self._saved is not None and self._saved[0] == previous:
            index = previous / INDEX
            if index.is_file():
                before = read_json_object(index, "Replay")["parts"]
                stale = self.written - self._saved[1]
        changed = self._changed_parts(stale)
        parts: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for name, values in self._items().items():
            tensors[name] = {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape[1:])}
            for part in range(math.ceil(len(self) / PART_ITEMS)):
                file = f"{name}.{part:06d}.bin"
                if part not in changed and file in before and previous is not None:
                    os.link(previous / file, folder / file)
                    parts[file] = before[file]
                    continue
                block = values[part * PART_ITEMS : min((part + 1) * PART_ITEMS, len(self))]
                data = block.contiguous().view(torch.uint8).numpy().tobytes() if block.numel() else b""
                with open(folder / file, "wb") as stream:
                    write_bytes(stream, data)
                parts[file] = {"size": len(data), "crc32": zlib.crc32(data)}
        write_json(folder / INDEX, {"written": self.written, "length": len(self), "tensors": tensors, "parts": parts})

    def saved_as(self, folder: Path) -> None:
        """Note that the last :meth:`save` ended up as ``folder``."""
        self._saved = (folder, self.written)

    def _changed_parts(self, count: int) -> set[int]:
        """Parts that the last ``count`` items went to."""
        if count >= self.capacity:
            return set(range(math.ceil(self.capacity / PART_ITEMS)))
        first, parts = (self.cursor - count) % self.capacity, set()
        # up to the ring's end, and from its start where they went around it
        for start, stop in ((first, min(first + count, self.capacity)), (0, first + count - self.capacity)):
            if stop > start:
                parts |= set(range(start // PART_ITEMS, (stop - 1) // PART_ITEMS + 1))
        return parts

    def load(self, folder: Path) -> None:
        """Fill the ring from what :meth:`save` wrote.

        Raises:
            ValueError: naming a missing or damaged file, or if the ring is too small.
        """
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(f"Replay: {path} is missing: resume from another checkpoint")
        index = read_json_object(path, "Replay")
        length = int(index["length"])
        if length > self.capacity:
            raise ValueError(f"Replay: capacity must be >= {length} to hold {folder}, got {self.capacity}")
        for start in range(0, length, PART_ITEMS):
            count, values = min(PART_ITEMS, length - start), {}
            for name, kind in index["tensors"].items():
                file = f"{name}.{start // PART_ITEMS:06d}.bin"
                entry = index["parts"].get(file)
                if entry is None:
                    raise ValueError(f"Replay: {path} does not list {file}: resume from another checkpoint")
                data = bytearray(_checked(folder / file, entry["size"], entry["crc32"]))
                flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
                values[name] = flat.view(getattr(torch, kind["dtype"])).view(count, *kind["shape"])
            self._ring().extend(TensorDict(values, [count]))
        self.written = int(index["written"])
        writer: Any = self._ring()._writer
        writer._cursor = self.cursor
        self._saved = (folder, self.written)

    def close(self) -> None:
        """Remove memory-mapped scratch files."""
        self._buffer = None
        if self.storage == "memmap" and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
