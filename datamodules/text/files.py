"""Files the corpus core writes: whole or absent, and one plain error when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_bytes(stream: IO[bytes], data: bytes | memoryview) -> None:
    """The one place where bulk data goes to disk (tests make it fail to play a full disk)."""
    stream.write(data)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's renames, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_full_named(target: Path) -> Iterator[None]:
    """Turn "no space left" from anywhere inside into one line naming ``target`` and the mend."""
    try:
        yield
    except OSError as error:
        # `filename` marks our own, already reworded error: nested uses must not reword it again.
        if error.errno not in _DISK_FULL or error.filename is not None and "disk full" in str(error.strerror):
            raise
        reason = "disk full while writing (nothing half-written was kept): free space or choose another cache_dir"
        raise OSError(error.errno, reason, str(target)) from error


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Build a folder beside ``target`` and rename it into place when all of it is on disk.

    On any error the temporary folder is removed and an older ``target`` stays as it was.

    Raises:
        OSError: from the writes; ENOSPC and EDQUOT as one line that names ``target``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_full_named(target):
        try:
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.rglob("*")):
                fsync_path(path)
            fsync_path(temporary)
            retired = target.parent / f".{target.name}.{os.getpid()}.old.tmp"
            if target.exists():
                os.replace(target, retired)
            os.replace(temporary, target)
            fsync_path(target.parent)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """Write a file beside ``target``, fsync it and rename it over ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    with disk_full_named(target):
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
            fsync_path(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    with atomic_file(target) as stream:
        write_bytes(stream, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def canonical_digest(value: Any) -> str:
    """sha256 of the canonical (sorted, compact) JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, read in 1 MiB pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class FileDigests:
    """sha256 of many files, remembered between runs by (path, size, modification time).

    Large corpora are then hashed once, and later starts only ``stat`` them.
    """

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if memo.is_file():
            try:
                self._known = dict(json.loads(memo.read_text()))
            except (ValueError, TypeError):
                self._known = {}  # a damaged memo costs time only: everything is hashed again

    def __getitem__(self, path: Path) -> str:
        stat = path.stat()
        key = str(path.resolve())
        seen = self._known.get(key)
        if seen is not None and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
            return seen[2]
        digest = sha256_file(path)
        self._known[key] = [stat.st_size, stat.st_mtime_ns, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write the memo if something new was hashed."""
        if self._changed:
            write_json(self._memo, self._known)
            self._changed = False
