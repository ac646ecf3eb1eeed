"""Packing: a source's token stream cut into windows of T + 1 tokens (stride T), with nothing large in memory.

Epoch e of a source: its documents in an order keyed by (seed, source, e), their tokens concatenated, windows
``stream[w*T : w*T + T + 1]`` for w in 0..W-1, taken in an order keyed likewise. W = (tokens - 1) // T, so a window
never spans two epochs: the last ``(tokens - 1) % T`` targets of an epoch's stream are not used in that epoch, and as
the order changes every epoch they are other tokens each time.

Orders are computed permutations. Finding the documents of a window needs the running length of the shuffled
documents; that is a memory-mapped file of int64 [documents + 1] in the cache, written once per (seed, source, epoch)
in chunks. Resident memory is therefore independent of the corpus size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.shards import TokenShard
from modules.files import atomic_write, write_bytes

_CHUNK = 1 << 15
_EPOCHS_OPEN = 2
_RELEASE_EVERY = 64  # windows; each maps some hundred kB of neighbouring pages


@dataclass(slots=True)
class EpochOrder:
    """One epoch's order: ``starts`` int64 [documents + 1] positions of the shuffled documents in the stream."""

    starts: np.ndarray
    documents: Permutation
    windows: Permutation


class PackedSource:
    """Training windows of one source, addressed by a running item number.

    Item i is window ``i % W`` of epoch ``i // W``.

    Args:
        shard: the source's training shard.
        name: source name, part of the shuffle key.
        seq_len: T, tokens per window without the extra target, >= 1.
        seed: shuffle seed.
        cache_dir: where order files are kept; only needed when shuffling.
        shuffle: False = stored document order and window order in every epoch.

    Raises:
        ValueError: seq_len < 1, or the source holds fewer than T + 1 tokens.
    """

    def __init__(
        self, shard: TokenShard, name: str, seq_len: int, seed: int = 0, cache_dir: Path | None = None,
        shuffle: bool = True,
    ) -> None:  # fmt: skip
        if seq_len < 1:
            raise ValueError(f"PackedSource: seq_len must be >= 1, got {seq_len}")
        tokens = int(shard.meta["tokens"])
        if tokens < seq_len + 1:
            raise ValueError(f"source {name!r}: {tokens} tokens, fewer than one window of seq_len + 1 = {seq_len + 1}")
        if shuffle and cache_dir is None:
            raise ValueError("PackedSource: shuffling needs a cache_dir for its order files")
        self.shard, self.name, self.seq_len = shard, name, seq_len
        self.windows_per_epoch = (tokens - 1) // seq_len
        self._seed, self._cache_dir, self._shuffle = seed, cache_dir, shuffle
        self._orders: dict[int, EpochOrder] = {}
        self._read = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}  # workers map the order files themselves

    def fetch(self, items: np.ndarray, document_ids: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Read windows.

        Args:
            items: int64 [n] item numbers.
            document_ids: also number the documents inside each window.

        Returns:
            tokens int64 [n, T + 1]; document ids int32 [n, T + 1] counted from 0 in each window, or None.
        """
        tokens = np.empty((items.size, self.seq_len + 1), dtype=np.int64)
        ids = np.empty((items.size, self.seq_len + 1), dtype=np.int32) if document_ids else None
        epochs, windows = np.divmod(items, self.windows_per_epoch)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            self._fetch_epoch(self.order(epoch), windows[rows], rows, tokens, ids)
        self._read += items.size
        if self._read >= _RELEASE_EVERY:
            self.shard.release()
            self._read = 0
        return tokens, ids

    def _fetch_epoch(
        self, order: EpochOrder, windows: np.ndarray, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray | None
    ) -> None:
        begin = order.windows(windows) * self.seq_len
        segment_row, length, source = gather_plan(
            order.starts, self.shard.offset_array, order.documents, begin, begin + self.seq_len + 1
        )
        shape = (rows.size, self.seq_len + 1)
        # Source position of every token: segment start plus the running number inside the segment.
        shift = source - (np.cumsum(length) - length)
        index = np.arange(int(length.sum())) + np.repeat(shift, length)
        tokens[rows] = self.shard.token_array[index].reshape(shape)
        if ids is not None:
            first = np.searchsorted(segment_row, np.arange(rows.size))
            within = np.arange(segment_row.size) - first[segment_row]
            ids[rows] = np.repeat(within, length).reshape(shape)

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; its file is made on first use."""
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_OPEN:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._open_order(epoch)
        return self._orders[epoch]

    def _open_order(self, epoch: int) -> EpochOrder:
        count = int(self.shard.meta["documents"])
        if not self._shuffle:
            identity = Permutation(count, None)
            return EpochOrder(self.shard.offset_array, identity, Permutation(self.windows_per_epoch, None))
        documents = Permutation(count, derive_keys(self._seed, self.name, epoch, "documents"))
        windows = Permutation(self.windows_per_epoch, derive_keys(self._seed, self.name, epoch, "windows"))
        assert self._cache_dir is not None
        content = self.shard.meta["sha256"]["documents.bin"][:16]
        path = self._cache_dir / f"order-{self.name}-{content}-seed{self._seed}-epoch{epoch}.bin"
        if not path.is_file() or path.stat().st_size != 8 * (count + 1):
            self._write_order(path, documents, count)
        starts = np.memmap(path, dtype="<i8", mode="r", shape=(count + 1,))
        if starts[-1] != self.shard.meta["tokens"]:
            raise ValueError(f"source {self.name!r}: order file {path} does not fit its shard; delete it")
        return EpochOrder(starts, documents, windows)

    def _write_order(self, path: Path, documents: Permutation, count: int) -> None:
        offsets = self.shard.offset_array
        total = 0
        # Ranks may do this at the same time; each writes its own temporary file and the last rename wins.
        with atomic_write(path) as stream:
            write_bytes(stream, np.zeros(1, dtype="<i8").tobytes())
            for start in range(0, count, _CHUNK):
                chosen = documents(np.arange(start, min(start + _CHUNK, count)))
                ends = np.cumsum(offsets[chosen + 1] - offsets[chosen]) + total
                write_bytes(stream, ends.astype("<i8").tobytes())
                total = int(ends[-1])


def gather_plan(
    starts: np.ndarray, offsets: np.ndarray, documents: Permutation, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut stream ranges into pieces of single documents.

    Args:
        starts: int64 [documents + 1] positions of the documents in the (shuffled) stream.
        offsets: int64 [documents + 1] positions of the documents in the shard.
        documents: shuffled position -> document number.
        begin, end: int64 [n] stream ranges.

    Returns:
        row int64 [pieces] (which range, ascending), length int64 [pieces], shard position int64 [pieces].
    """
    low = np.searchsorted(starts, begin, side="right") - 1
    high = np.searchsorted(starts, end - 1, side="right") - 1
    count = high - low + 1
    row = np.repeat(np.arange(begin.size), count)
    position = np.arange(int(count.sum())) + np.repeat(low - (np.cumsum(count) - count), count)
    piece_begin = np.maximum(starts[position], begin[row])
    piece_end = np.minimum(starts[position + 1], end[row])
    source = offsets[documents(position)] + (piece_begin - starts[position])
    return row, piece_end - piece_begin, source


class HeldOutWindows:
    """Evaluation windows: unshuffled, non-overlapping targets, every token but the first a target exactly once.

    The last window is short; its missing targets are -100 and its missing inputs the end-of-document filler.

    Args:
        shard: held-out shard; needs at least 2 tokens.
        seq_len: T.
        filler: token id for missing inputs.
    """

    def __init__(self, shard: TokenShard, name: str, seq_len: int, filler: int) -> None:
        if seq_len < 1:
            raise ValueError(f"HeldOutWindows: seq_len must be >= 1, got {seq_len}")
        self._tokens = int(shard.meta["tokens"])
        if self._tokens < 2:
            raise ValueError(f"held-out source {name!r}: needs at least 2 tokens, has {self._tokens}")
        self.shard, self.seq_len, self._filler = shard, seq_len, filler

    def __len__(self) -> int:
        return -(-(self._tokens - 1) // self.seq_len)

    def fetch(
        self, windows: np.ndarray, document_ids: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Read windows; numbers >= len(self) give windows without any target (padding for even ranks).

        Returns:
            input_ids int64 [n, T], labels int64 [n, T] (-100 where there is no target), document ids int32 [n, T].
        """
        index = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        valid = index < self._tokens
        index = np.minimum(index, self._tokens - 1)
        tokens = np.where(valid, self.shard.token_array[index].astype(np.int64), self._filler)
        labels = np.where(valid[:, 1:], tokens[:, 1:], -100)
        ids = None
        if document_ids:
            document = np.searchsorted(self.shard.offset_array, index[:, :-1], side="right") - 1
            ids = (document - document[:, :1]).astype(np.int32)
        return tokens[:, :-1], labels, ids
