"""Files that are whole or absent, one plain error when the disk is full, and what identifies a content."""

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
        reason = "disk full while writing (nothing half-written was kept): free space or choose another folder"
        raise OSError(error.errno, reason, str(target)) from error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Write a file beside ``path``, fsync it and rename it over ``path``; its folder is created.

    Args:
        path: the file to replace.
        mode: ``"wb"`` or ``"w"`` (UTF-8).

    Raises:
        OSError: from the write, with the temporary file removed and the old content of ``path`` untouched; ENOSPC and
            EDQUOT as one line that names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_full_named(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_symlink(target_name: str, link: str | Path) -> None:
    """Point ``link`` at its neighbour ``target_name``; the link is whole at every instant."""
    link = Path(link)
    temporary = link.with_name(f".{link.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.symlink(target_name, temporary)
    os.replace(temporary, link)
    fsync_path(link.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Build a folder beside ``path`` and rename it into place when all of it is on disk, replacing an older one.

    Raises:
        OSError: from the writes, with the temporary folder removed and the old ``path`` untouched; ENOSPC and EDQUOT
            as one line that names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_full_named(path):
        try:
            temporary.mkdir()
            yield temporary
            for part in sorted(temporary.rglob("*")):
                fsync_path(part)
            fsync_path(temporary)
            retired = path.with_name(f".{path.name}.old-{os.getpid()}")
            if path.exists():
                os.replace(path, retired)
            os.replace(temporary, path)
            fsync_path(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    with atomic_write(path) as stream:
        write_bytes(stream, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json_object(path: Path, owner: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: not JSON, or not an object; the message begins with ``owner`` and names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{owner}: {path} is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{owner}: {path} must hold a JSON object")
    return content


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that is appended to, the empty ones and a last line cut by a kill left out."""
    content = path.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8")  # a kill may have cut a character in two
    return [line for line in text.split("\n") if line]  # other line separators are part of a text


def repair_lines(path: Path) -> None:
    """Drop a last line cut by a kill from a file that is appended to, so that the next one doesn't run into it."""
    if not path.is_file():
        return
    kept = "".join(line + "\n" for line in whole_lines(path)).encode()
    if kept != path.read_bytes():
        with atomic_write(path) as stream:
            write_bytes(stream, kept)


def read_json_rows(path: Path, owner: str) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line, as ``metrics.jsonl`` is (:func:`whole_lines`).

    Raises:
        ValueError: a line that is none; the message begins with ``owner`` and names file and line.
    """
    rows = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{owner}: {path}: line {number} must be a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def canonical_digest(value: Any) -> str:
    """sha256 of the canonical (sorted, compact) JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_digest(content: dict[str, Any]) -> str:
    """Identity of a tokenizer: the canonical ``tokenizer.json``, only what decides the token ids of plain text.

    Truncation, padding and the post-processor (which adds BOS and EOS) are left out: a corpus is encoded without them,
    and saving a tokenizer through transformers rewrites them.
    """
    left_out = ("truncation", "padding", "post_processor")
    return canonical_digest({key: value for key, value in content.items() if key not in left_out})
