"""Replies written down as they come, and answered from the file later, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modules.files import canonical_digest, disk_full_named, read_json_rows
from modules.language.backends.base import Backend, BackendError, Reply, Request
from modules.language.backends.texts import excerpt


def request_record(request: Request) -> dict[str, Any]:
    """A request as JSON; equal requests give equal records (``temperature: 0`` is ``0.0``)."""
    return {
        "turns": [[turn.role, turn.text] for turn in request.turns],
        "max_new_tokens": int(request.max_new_tokens),
        "temperature": float(request.temperature),
        "top_p": float(request.top_p),
        "stop": list(request.stop),
        "seed": int(request.seed),
    }


class RecordingBackend:
    """Answers as ``backend`` does and appends every request with its reply to a file of JSON lines.

    Each line is written at once, when its batch is done; a file that a kill left with half a line at its end loses that
    half when the next recording is appended. One writer a file: give ranks files of their own.

    Args:
        backend: who answers.
        path: file to append to, made with its folder by the first reply. It holds prompts and replies in full.
    """

    def __init__(self, backend: Backend, path: str | Path) -> None:
        self.backend, self.path = backend, Path(path)
        self._descriptor: int | None = None

    @property
    def identity(self) -> str:
        return self.backend.identity

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. Raises also: OSError, if the file can't be written."""
        replies = self.backend.generate(requests)
        for request, reply in zip(requests, replies, strict=True):
            row = {"model": self.backend.identity, "request": request_record(request), "reply": asdict(reply)}
            self._append((json.dumps(row, sort_keys=True) + "\n").encode())
        return replies

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.backend.close()

    def _append(self, line: bytes) -> None:
        with disk_full_named(self.path):
            if self._descriptor is None:
                self._descriptor = _open_for_appending(self.path)
            if os.write(self._descriptor, line) != len(line):
                raise OSError(f"RecordingBackend: {self.path}: a line could not be written whole; is the disk full?")


def _open_for_appending(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    end = size = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":  # what a kill left of a line, at most one line long
        end -= 1
    if end != size:
        os.ftruncate(descriptor, end)
    return descriptor


class ReplayBackend:
    """Answers from a file that :class:`RecordingBackend` wrote; a last line cut by a kill does not count.

    A request that was recorded several times is answered in the order of recording, and the last reply repeats.

    Args:
        path: the file.
        strict: turns, sampling and seed must be those recorded; False: the turns alone.

    Raises:
        BackendError: no such file. When first asked: a line that is no recording.
    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path, self.strict = Path(path), strict
        if not self.path.is_file():
            raise BackendError(f"ReplayBackend: {self.path} does not exist; record it first (RecordingBackend)")
        self._replies: dict[str, list[Reply]] | None = None
        self._answered: dict[str, int] = {}
        self._models: list[str] = []

    @property
    def identity(self) -> str:
        """``replay of <model> (<file>)``."""
        self._load()
        return f"replay of {', '.join(self._models) or 'nothing'} ({self.path.name})"

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. Raises BackendError for a request not recorded."""
        known, replies = self._load(), []
        for request in requests:
            key = self._key(request_record(request))
            if key not in known:
                wanted, mend = (
                    ("turns, sampling and seed", "record it, or set strict: false to match the turns alone")
                    if self.strict
                    else ("turns", "record it")
                )
                raise BackendError(
                    f"ReplayBackend: {self.path} has no reply to these {wanted}: {excerpt(request.text)}; {mend}"
                )
            turn = self._answered.get(key, 0)
            replies.append(known[key][min(turn, len(known[key]) - 1)])
            self._answered[key] = turn + 1
        return replies

    def close(self) -> None:
        """Forget the file; the next request reads it again, from its first reply."""
        self._replies = None
        self._answered.clear()

    def _key(self, record: dict[str, Any]) -> str:
        return canonical_digest(record if self.strict else record["turns"])

    def _load(self) -> dict[str, list[Reply]]:
        if self._replies is not None:
            return self._replies
        try:
            rows = read_json_rows(self.path, "ReplayBackend")
        except (OSError, ValueError) as error:
            raise BackendError(str(error)) from None
        found: dict[str, list[Reply]] = {}
        for number, row in enumerate(rows, 1):
            try:
                found.setdefault(self._key(dict(row["request"])), []).append(Reply(**row["reply"]))
            except (KeyError, TypeError, ValueError):
                raise BackendError(
                    f"ReplayBackend: {self.path}: line {number} is no recorded reply; want what RecordingBackend writes"
                ) from None
        self._models = list(dict.fromkeys(str(row.get("model", "?")) for row in rows))
        self._replies = found
        return found
