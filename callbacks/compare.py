"""One plot of several experiments: median and range over seeds, from the runs' ``metrics.jsonl``.

python -m callbacks.compare --metric meta/nashconv --out nashconv.png psro='runs/psro-*' psd='runs/psd-*'
"""

from __future__ import annotations

import argparse
import csv
import glob
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.metrics_file import read_metric
from modules.files import atomic_write
from modules.optional import require


@dataclass(frozen=True)
class Band:
    """An experiment's curve over its seeds; all ``[points]`` float64 but ``runs``, int64: seeds that reach a point."""

    x: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: np.ndarray


def values_at(curves: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    """``curves`` ``[points, 2]``, each linearly interpolated at ``x``: ``[curves, len(x)]``, NaN outside a curve."""
    return np.stack([np.interp(x, curve[:, 0], curve[:, 1], left=np.nan, right=np.nan) for curve in curves])


def band(curves: Sequence[np.ndarray]) -> Band:
    """Median, least and largest of ``curves`` ``[points, 2]`` at every ``x`` that one of them holds.

    A run counts between its first and its last point, linearly interpolated.
    """
    x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = values_at(curves, x)
    return Band(
        x=x,
        median=np.nanmedian(values, 0),
        low=np.nanmin(values, 0),
        high=np.nanmax(values, 0),
        runs=np.isfinite(values).sum(0),
    )


def compare_runs(
    run_folders: Mapping[str, Sequence[str | Path]],
    metric: str,
    out: str | Path,
    x: str = "step",
    log_scale: bool = False,
    title: str | None = None,
) -> dict[str, Band]:
    """Draw ``metric`` of all experiments in one plot and write it as PNG, with its numbers as CSV beside it.

    Args:
        run_folders: experiment name to its runs' folders, one per seed.
        metric: key in ``metrics.jsonl``, e.g. ``meta/nashconv``.
        out: the PNG file; the CSV has the same name with ``.csv``, columns experiment, x, median, min, max, runs.
        x: what runs along the horizontal axis: ``"step"`` or a metric logged in the same rows.
        log_scale: draw the value axis logarithmically (values of 0 or less are not drawn).
        title: above the plot.

    Returns:
        The curves that were drawn.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_metric`; no experiment, or one without runs.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"compare_runs: out: must end in .png, got {out}")
    if not run_folders:
        raise ValueError("compare_runs: run_folders: must name at least one experiment, got none")
    bands: dict[str, Band] = {}
    for name, folders in run_folders.items():
        if not folders:
            raise ValueError(f"compare_runs: experiment '{name}' has no run folders: check its path or pattern")
        bands[name] = band([read_metric(folder, metric, x) for folder in folders])
    write_png(_draw(bands, metric, x, log_scale, title), out)
    rows = []
    for name, one in bands.items():
        columns = (one.x, one.median, one.low, one.high, one.runs)
        rows += [[name, *row] for row in zip(*(column.tolist() for column in columns), strict=True)]
    write_csv(out.with_suffix(".csv"), ["experiment", x, "median", "min", "max", "runs"], rows)
    return bands


def write_png(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, atomically."""
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=150)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, atomically; None is an empty cell."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def draw_band(axes: Any, x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray, label: str) -> None:
    """A line with what lies between ``low`` and ``high`` shaded in its colour; all ``[points]``."""
    (line,) = axes.plot(x, middle, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _draw(bands: Mapping[str, Band], metric: str, x: str, log_scale: bool, title: str | None) -> Any:
    figure = require("matplotlib.figure", extra="games").Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, one in bands.items():
        median, low, high = (
            (v if not log_scale else np.where(v > 0, v, np.nan)) for v in (one.median, one.low, one.high)
        )
        seeds = int(one.runs.max())
        draw_band(axes, one.x, median, low, high, f"{name} ({seeds} run{'s' if seeds != 1 else ''})")
    if log_scale and any((one.median > 0).any() for one in bands.values()):
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=metric)
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _experiment(text: str) -> tuple[str, list[str]]:
    name, equals, pattern = text.partition("=")
    if not (name and equals and pattern):
        raise argparse.ArgumentTypeError(f"must be name=GLOB, got '{text}'")
    folders = [path for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]
    if not folders:
        raise argparse.ArgumentTypeError(f"no folder matches '{pattern}' of experiment '{name}'")
    return name, folders


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after one line on stderr (2 from argparse for a wrong command)."""
    parser = argparse.ArgumentParser(
        prog="python -m callbacks.compare", description="Draw a metric of several experiments over their seeds."
    )
    parser.add_argument("--metric", required=True, help="key in metrics.jsonl, e.g. meta/nashconv")
    parser.add_argument("--out", required=True, help="PNG file; the numbers go to a CSV file beside it")
    parser.add_argument("--x", default="step", help="horizontal axis: step, or a metric of the same rows")
    parser.add_argument("--log", action="store_true", help="logarithmic value axis")
    parser.add_argument("--title", default=None)
    parser.add_argument("experiments", nargs="+", type=_experiment, metavar="name=GLOB", help="an experiment's runs")
    options = parser.parse_args(argv)
    run_folders: dict[str, list[str]] = {}
    for name, folders in options.experiments:
        run_folders.setdefault(name, []).extend(folders)
    try:
        bands = compare_runs(run_folders, options.metric, options.out, options.x, options.log, options.title)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, one in bands.items():
        print(f"{name}: {one.median[-1]:.6g} [{one.low[-1]:.6g}, {one.high[-1]:.6g}] at {options.x} {one.x[-1]:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
