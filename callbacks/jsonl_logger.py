"""Metrics as one JSON object a line: exact floats, kill-safe appends, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from modules.files import atomic_write, whole_lines


class JsonlLogger(Logger):
    """Writes ``<run>/metrics.jsonl``: ``{"step": n, "<metric>": value, ...}`` per logging call, flushed at once.

    Floats are written with ``repr`` precision, so two runs that trained bitwise equal have equal files but for the
    ``speed/`` metrics.

    Args:
        folder: the run folder.
        resume_step: number of logged steps that the checkpoint holds; lines at or past it are dropped, since the
            resumed run writes them again. ``None`` for a fresh run.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._resume_step = resume_step
        self._opened = False
        self._last_row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters live in the run's ``config.yaml``; nothing is written twice."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._opened:
            self._open()
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        if row == self._last_row:  # the checkpoint callback flushes a step's row early, Lightning then repeats it
            return
        self._last_row = row
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in whole_lines(self.path) if self._keeps(json.loads(line))]
            with atomic_write(self.path, "w") as stream:
                stream.writelines(line + "\n" for line in kept)
        self._opened = True

    def _keeps(self, row: dict[str, Any]) -> bool:
        return self._resume_step is None or row["step"] is None or row["step"] < self._resume_step


def _plain(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value
