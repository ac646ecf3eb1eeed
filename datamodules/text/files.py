"""Digests of corpus files, remembered between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modules.files import sha256_file, write_json


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
