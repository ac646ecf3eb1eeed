"""Reading of a run's ``metrics.jsonl``; no Lightning here, so that commands that only read start quickly."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from modules.files import read_json_rows


def read_metric(run_folder: str | Path, metric: str, x: str = "step", keep_nan: bool = False) -> np.ndarray:
    """A run's ``[points, 2]`` pairs of ``x`` and ``metric``, by rising ``x``; the last value counts where one repeats.

    Args:
        run_folder: holds ``metrics.jsonl``.
        metric: its key.
        x: ``"step"`` or another metric logged in the same rows, e.g. a count of episodes.
        keep_nan: whether points where ``metric`` is not a number stay; left out otherwise.

    Raises:
        FileNotFoundError: no ``metrics.jsonl``.
        ValueError: a line that is not a JSON object, or no row with both keys (names the nearest key there is).
    """
    path = Path(run_folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"read_metric: {path} does not exist: name run folders that hold a metrics.jsonl")
    points: dict[float, float] = {}
    keys: set[str] = set()
    for row in read_json_rows(path, "read_metric"):
        keys.update(row)
        if row.get(metric) is not None and row.get(x) is not None and (keep_nan or row[metric] == row[metric]):
            points[float(row[x])] = float(row[metric])
    if not points:
        for name in (metric, x):
            if name not in keys:
                near = difflib.get_close_matches(name, keys, 1, 0.4)
                hint = f"the nearest is '{near[0]}'" if near else f"it has {', '.join(sorted(keys)) or 'no rows'}"
                raise ValueError(f"read_metric: {path} has no metric '{name}'; {hint}")
        raise ValueError(f"read_metric: {path} has no row with both '{x}' and '{metric}'")
    return np.array(sorted(points.items()), dtype=np.float64)
