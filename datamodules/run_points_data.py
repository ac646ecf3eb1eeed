"""Points of finished runs: the rewards reached and the evaluation score at every evaluation."""

from __future__ import annotations

import difflib
import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from modules.files import read_json_rows


class RunPointsDataModule(LightningDataModule):
    """One batch of all points in the ``metrics.jsonl`` of some runs, for fits over runs.

    The batch is a dict: ``points`` float64 ``[n, N]``, ``scores`` float64 ``[n]``, ``run`` int64 ``[n]`` (number of
    the run's folder), and ``components``, the names of the ``N`` columns. A row of a metrics file counts where it has
    the score and all components; of rows with the same step the last one counts.

    Args:
        runs: run folders, as shell patterns.
        components: names of the rewards, in the order of the columns.
        score: metric that is the score.
        prefix: what stands before a component's name in its metric.
        skip: points left out at the beginning of each run.

    Raises:
        ValueError: no runs or components named, or a pattern, run or metric that there is nothing of.
    """

    def __init__(
        self,
        runs: list[str],
        components: list[str],
        score: str = "val/score",
        prefix: str = "val/reward/",
        skip: int = 0,
    ) -> None:
        super().__init__()
        if not runs or not components:
            raise ValueError("RunPointsDataModule: runs and components: name at least one of each")
        if len(set(components)) < len(components):
            raise ValueError(f"RunPointsDataModule: components: named twice in {', '.join(components)}")
        if skip < 0:
            raise ValueError(f"RunPointsDataModule: skip: must be at least 0, got {skip}")
        self.runs, self.components = list(runs), list(components)
        self.score, self.prefix, self.skip = score, prefix, skip
        self.folders: list[Path] = []
        """Run folders found, in the order of their numbers."""
        self._batch: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        if self._batch is not None:
            return
        self.folders = self._found()
        metrics = [self.score, *(self.prefix + name for name in self.components)]
        rows, numbers = [], []
        for number, folder in enumerate(self.folders):
            found = _points(folder / "metrics.jsonl", metrics)[self.skip :]
            rows += found
            numbers += [number] * len(found)
        if not rows:
            raise ValueError(f"RunPointsDataModule: skip: {self.skip} leaves no point of {len(self.folders)} runs")
        table = torch.tensor(rows, dtype=torch.float64)
        self._batch = {
            "points": table[:, 1:].contiguous(),
            "scores": table[:, 0].contiguous(),
            "run": torch.tensor(numbers, dtype=torch.int64),
            "components": list(self.components),
        }

    def _found(self) -> list[Path]:
        folders: set[Path] = set()
        for pattern in self.runs:
            here = {Path(path) for path in glob.glob(pattern) if (Path(path) / "metrics.jsonl").is_file()}
            if not here:
                raise ValueError(f"RunPointsDataModule: runs: '{pattern}' matches no folder with a metrics.jsonl")
            folders |= here
        return sorted(folders)

    def test_dataloader(self) -> DataLoader:
        assert self._batch is not None, "setup() comes first"
        return DataLoader([self._batch], batch_size=None)  # pyright: ignore[reportArgumentType]  (a list is a map)


def _points(path: Path, metrics: Sequence[str]) -> list[list[float]]:
    """Rows that have all ``metrics``, by rising step.

    Raises:
        ValueError: a line that is not a JSON object, or no row with all metrics; names the file.
    """
    points: dict[float, list[float]] = {}
    keys: set[str] = set()
    for row in read_json_rows(path, "RunPointsDataModule"):
        keys.update(row)
        values = [row.get(name) for name in metrics]
        if all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            points[float(row.get("step") or 0)] = [float(value) for value in values if value is not None]
    if points:
        return [points[step] for step in sorted(points)]
    for name in metrics:
        if name not in keys:
            near = difflib.get_close_matches(name, keys, 1, 0.4)
            hint = f"; the nearest is '{near[0]}'" if near else ""
            raise ValueError(f"RunPointsDataModule: {path} has no metric '{name}'{hint}")
    raise ValueError(f"RunPointsDataModule: {path} has no row with all of {', '.join(metrics)}")
