"""Token shards: the on-disk format of a tokenised corpus.

A shard is a folder of three files::

    tokens.bin      uint16 or uint32, little endian: all documents' tokens, each document followed by the
                    end-of-document token. uint16 if and only if the vocabulary has at most 65,536 entries.
    documents.bin   int64, little endian: offsets [documents + 1] into tokens.bin; the first is 0, the last the
                    number of tokens; document i is tokens[offsets[i]:offsets[i + 1]].
    shard.json      {"format": "plumbline-tokens", "version": 1, "dtype", "tokens", "documents", "text_bytes" (UTF-8
                    bytes of the text, for bits per byte), "vocab_size", "max_token", "tokenizer_hash",
                    "source_digest", "sha256": {"tokens.bin", "documents.bin"}}

The folder appears under its name only when it is whole. Opening checks sizes and identities in constant time;
``verify()`` reads everything and compares the checksums.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tensordict import MemoryMappedTensor

from datamodules.text.tokenizer import check_tokenizer
from modules.files import atomic_directory, sha256_file, write_bytes, write_json

FORMAT = "plumbline-tokens"
VERSION = 1
_DTYPES = {"uint16": (np.uint16, torch.uint16), "uint32": (np.uint32, torch.uint32)}
_FIELDS = {
    "dtype": str, "tokens": int, "documents": int, "text_bytes": int, "vocab_size": int, "max_token": int,
    "tokenizer_hash": str, "source_digest": str, "sha256": dict,
}  # fmt: skip
_CHUNK = 1 << 20


class ShardError(ValueError):
    """A shard that can't be used; the message names folder, fault and mend."""

    def __init__(self, path: Path, fault: str, mend: str = "delete the folder and prepare the corpus again") -> None:
        super().__init__(f"token shard {path}: {fault}; {mend}")


class _ChecksumFile:
    """A file that keeps count and SHA-256 of what went into it."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = open(path, "wb")  # noqa: SIM115 - lives as long as its ShardWriter
        self._sha = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        write_bytes(self._stream, data)
        self._sha.update(data)

    def close(self) -> str:
        self._stream.close()
        return self._sha.hexdigest()


class ShardWriter:
    """Append tokenised documents to a shard being built; memory holds one batch.

    Use through ``write_shard``, which makes the result appear whole or not at all.
    """

    def __init__(self, folder: Path, vocab_size: int, eod_id: int, tokenizer_hash: str, source_digest: str) -> None:
        if not 0 <= eod_id < vocab_size:
            raise ValueError(f"ShardWriter: eod_id must be in [0, {vocab_size}), got {eod_id}")
        if vocab_size > 1 << 32:
            raise ValueError(f"ShardWriter: vocab_size must be <= 2**32, got {vocab_size}")
        self._folder = folder
        self._vocab_size, self._eod = vocab_size, eod_id
        self._tokenizer_hash, self._source_digest = tokenizer_hash, source_digest
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._tokens_file = _ChecksumFile(folder / "tokens.bin")
        self._documents_file = _ChecksumFile(folder / "documents.bin")
        self.tokens = self.documents = self.text_bytes = 0
        self._max_token = eod_id

    def append(self, batch: Sequence[Sequence[int]], text_bytes: int) -> None:
        """Write documents, each given as its token ids without the end-of-document token.

        Args:
            batch: token ids per document.
            text_bytes: UTF-8 bytes of the batch's text.

        Raises:
            ValueError: a token id outside the vocabulary.
        """
        if not batch:
            return
        lengths = np.fromiter((len(ids) + 1 for ids in batch), dtype=np.int64, count=len(batch))
        ends = np.cumsum(lengths)
        flat = np.empty(int(ends[-1]), dtype=np.int64)
        start = 0
        for ids, end in zip(batch, ends.tolist(), strict=True):
            flat[start : end - 1] = ids
            flat[end - 1] = self._eod
            start = end
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ShardWriter: token id {wrong} outside the tokenizer's vocabulary of {self._vocab_size}")
        if not self.documents:
            self._documents_file.write(np.zeros(1, dtype=np.int64))
        self._tokens_file.write(flat.astype(_DTYPES[self._dtype][0]))
        self._documents_file.write(ends + self.tokens)
        self.tokens += flat.size
        self.documents += len(batch)
        self.text_bytes += text_bytes
        self._max_token = max(self._max_token, high)

    def finish(self) -> None:
        """Close the data files and write ``shard.json``.

        Raises:
            ValueError: nothing was appended.
        """
        sums = {"tokens.bin": self._tokens_file.close(), "documents.bin": self._documents_file.close()}
        if not self.documents:
            raise ValueError(f"token shard {self._folder.name}: no document was written")
        write_json(
            self._folder / "shard.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "dtype": self._dtype,
                "tokens": self.tokens,
                "documents": self.documents,
                "text_bytes": self.text_bytes,
                "vocab_size": self._vocab_size,
                "max_token": self._max_token,
                "tokenizer_hash": self._tokenizer_hash,
                "source_digest": self._source_digest,
                "sha256": sums,
            },
        )

    def close(self) -> None:
        """Release the files of an abandoned shard."""
        try:
            self._tokens_file.close()
        finally:
            self._documents_file.close()


@contextmanager
def write_shard(
    path: str | Path, *, vocab_size: int, eod_id: int, tokenizer_hash: str, source_digest: str = ""
) -> Iterator[ShardWriter]:
    """Write a shard atomically: on any error nothing is left behind and an older shard at ``path`` stays.

    Raises:
        OSError: from the disk; a full one as one line naming ``path``.
        ValueError: no document was appended, or a token is outside the vocabulary.
    """
    with atomic_directory(Path(path)) as folder:
        writer = ShardWriter(folder, vocab_size, eod_id, tokenizer_hash, source_digest)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


class TokenShard:
    """A shard opened for reading, memory-mapped.

    Args:
        path: the shard's folder.
        tokenizer_hash: if given, the tokenizer the reader works with.
        vocab_size: if given, the reader's (model's) vocabulary.

    Attributes:
        tokens: MemoryMappedTensor [tokens], uint16 or uint32.
        offsets: MemoryMappedTensor [documents + 1], int64.
        token_array, offset_array: the same memory as numpy arrays.

    Raises:
        FileNotFoundError: folder or file missing.
        ShardError: empty, truncated, of an unknown version, or token ids beyond ``vocab_size``.
        TokenizerMismatchError: written with another tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        if tokenizer_hash is not None:
            check_tokenizer(self.meta["tokenizer_hash"], tokenizer_hash, f"data {self.path}")
        if vocab_size is not None and self.meta["max_token"] >= vocab_size:
            fault = f"holds token id {self.meta['max_token']}, outside the model's vocabulary of {vocab_size}"
            raise ShardError(self.path, fault, "use the tokenizer the model was made for")
        numpy_dtype, torch_dtype = _DTYPES[self.meta["dtype"]]
        self._check_size("tokens.bin", self.meta["tokens"] * np.dtype(numpy_dtype).itemsize)
        self._check_size("documents.bin", (self.meta["documents"] + 1) * 8)
        if sys.byteorder != "little":
            raise ShardError(self.path, "is little endian, this machine is not", "run on a little-endian machine")
        self.tokens = _map(self.path / "tokens.bin", torch_dtype, self.meta["tokens"])
        self.offsets = _map(self.path / "documents.bin", torch.int64, self.meta["documents"] + 1)
        self.token_array: np.ndarray = self.tokens.numpy()
        self.offset_array: np.ndarray = self.offsets.numpy()
        if self.offset_array[0] != 0 or self.offset_array[-1] != self.meta["tokens"]:
            raise ShardError(self.path, "documents.bin does not span tokens.bin")

    def __reduce__(self) -> tuple[type[TokenShard], tuple[Path]]:
        return TokenShard, (self.path,)  # a spawned worker maps the file again instead of receiving a copy

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens counted as tokens."""
        return self.meta["text_bytes"] / self.meta["tokens"]

    def release(self) -> None:
        """Take the pages read so far out of this process's resident memory (they stay in the system's file cache).

        Without this a long run ends up with the whole file resident. Linux only; elsewhere it does nothing.
        """
        if sys.platform == "linux" and self.tokens.data_ptr() % mmap.PAGESIZE == 0:
            # The mapping is never written to, so dropping its pages loses nothing; they fault back in when needed.
            address, length = self.tokens.data_ptr(), self.token_array.nbytes
            ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    def _check_size(self, name: str, expected: int) -> None:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"token shard {self.path}: {name} is missing; prepare the corpus again")
        size = path.stat().st_size
        if size == 0:
            raise ShardError(self.path, f"{name} is empty, expected {expected} bytes")
        if size != expected:
            kind = "truncated" if size < expected else "too long (or of another dtype)"
            raise ShardError(self.path, f"{name} is {kind}: {size} bytes, expected {expected}")

    def verify(self) -> None:
        """Read the whole shard: checksums, document offsets, token range.

        Raises:
            ShardError: naming the file whose content is not what was written.
        """
        for name, expected in self.meta["sha256"].items():
            found = sha256_file(self.path / name)
            if found != expected:
                raise ShardError(self.path, f"{name} has sha256 {found[:12]}, shard.json says {str(expected)[:12]}")
        for start in range(0, self.meta["documents"], _CHUNK):
            if (np.diff(self.offset_array[start : start + _CHUNK + 1]) < 1).any():
                raise ShardError(self.path, "documents.bin is not increasing")
        highest = max(
            int(self.token_array[start : start + _CHUNK].max()) for start in range(0, self.meta["tokens"], _CHUNK)
        )
        if highest != self.meta["max_token"] or highest >= self.meta["vocab_size"]:
            raise ShardError(self.path, f"largest token id is {highest}, shard.json says {self.meta['max_token']}")


def _map(path: Path, dtype: torch.dtype, count: int) -> MemoryMappedTensor:
    return MemoryMappedTensor.from_filename(path, dtype=dtype, shape=torch.Size([count]))


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"token shard {path} does not exist; prepare the corpus first")
    file = path / "shard.json"
    if not file.is_file():
        raise FileNotFoundError(f"token shard {path}: shard.json is missing; prepare the corpus again")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ShardError(path, "shard.json is not valid JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ShardError(path, f"shard.json is not of format {FORMAT!r}", "point at a folder written by this project")
    if meta.get("version") != VERSION:
        fault = f"has version {meta.get('version')!r}, this release reads {VERSION}"
        raise ShardError(path, fault, "prepare the corpus again")
    for key, kind in _FIELDS.items():
        value = meta.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ShardError(path, f"shard.json: {key!r} must be {kind.__name__}, got {value!r}")
    if meta["dtype"] not in _DTYPES:
        raise ShardError(path, f"unknown dtype {meta['dtype']!r}, known: {', '.join(_DTYPES)}")
    if set(meta["sha256"]) != {"tokens.bin", "documents.bin"}:
        raise ShardError(path, "shard.json: 'sha256' must name tokens.bin and documents.bin")
    if meta["tokens"] == 0 or meta["documents"] == 0:
        raise ShardError(path, "is empty (0 tokens)", "check the source and its filter, then prepare again")
    return meta
