"""A study's figures: learning curves, aggregate curve, intervals, performance profile. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from callbacks.compare import draw_band, values_at
from callbacks.study.plan import Study
from modules.assurance.intervals import Interval, bootstrap_interval, interquartile_mean, normalise, performance_profile
from modules.optional import require

GRID = 51
"""Points that curves are compared at."""
Runs = Mapping[tuple[str, str], Mapping[int, np.ndarray]]


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", extra="marl").Figure(figsize=(width, height), layout="constrained")


def curve_interval(values: np.ndarray, bootstrap: Mapping[str, Any]) -> Interval:
    """IQM at every point of curves ``[points, runs, tasks]``, with its interval; of one run there is none (low = high).

    Args:
        values: normalised or not; a run is drawn with all its points.
        bootstrap: keywords of :func:`bootstrap_interval`.
    """
    if values.shape[1] < 2:
        middle = interquartile_mean(values)
        return Interval(middle, middle, middle)
    return bootstrap_interval(interquartile_mean, values, **bootstrap)


def learning_curves(study: Study, runs: Runs, bootstrap: Mapping[str, Any]) -> Any:
    """One panel a task: IQM over seeds along x, in the metric's unit, over the span that an algorithm's runs share."""
    tasks = [task for task in study.tasks if any(key[0] == task for key in runs)]
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = _figure(4.6 * columns, 3.4 * rows)
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, number + 1)
        for algorithm in study.algorithms:
            curves = list(runs.get((task, algorithm), {}).values())
            start = max((curve[0, 0] for curve in curves), default=0.0)
            end = min((curve[-1, 0] for curve in curves), default=0.0)
            if start >= end:
                continue
            x = np.linspace(start, end, GRID)
            one = curve_interval(values_at(curves, x).T[..., None], bootstrap)
            draw_band(axes, x, one.estimate, one.low, one.high, f"{algorithm} ({len(curves)})")
        axes.set(title=task, xlabel=study.x, ylabel=study.metric)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize="small")
    figure.suptitle(study.name)
    return figure


def aggregate_curves(
    study: Study,
    runs: Runs,
    spans: Mapping[str, tuple[float, float]],
    algorithms: Sequence[str],
    bootstrap: Mapping[str, Any],
) -> Any:
    """IQM of normalised scores over all tasks and runs along x, or along the part of x if tasks differ in length.

    Args:
        spans: of the tasks that count.
    """
    same = len(set(spans.values())) == 1
    part = np.linspace(0, 1, GRID)
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    for algorithm in algorithms:
        fewest = min(len(runs[task, algorithm]) for task in spans)
        columns = []
        for task, (start, end) in spans.items():
            seeds = runs[task, algorithm]
            curves = [seeds[seed] for seed in sorted(seeds)][:fewest]
            bounds = study.tasks[task]
            values = values_at(curves, np.clip(start + part * (end - start), start, end))
            columns.append(normalise(values, bounds.low, bounds.high))
        one = curve_interval(np.stack(columns, -1).transpose(1, 0, 2), bootstrap)
        start, end = next(iter(spans.values()))
        x = start + part * (end - start) if same else part
        draw_band(axes, x, one.estimate, one.low, one.high, algorithm)
    axes.set(xlabel=study.x if same else f"part of each task's {study.x}", ylabel="IQM of normalised scores")
    axes.set_title(f"{study.name}: {len(spans)} task{'s' if len(spans) != 1 else ''}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def interval_plot(rows: Sequence[Mapping[str, Any]], measures: Sequence[str], confidence: float) -> Any:
    """A panel a measure: each algorithm's IQM as a stroke in the bar of its interval.

    Args:
        rows: of the aggregates table.
    """
    rows = [row for row in rows if row["statistic"] == "iqm"]
    measures = [measure for measure in measures if any(row["measure"] == measure for row in rows)]
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    figure = _figure(1.6 + 3.4 * len(measures), 1.2 + 0.42 * len(names))
    for number, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), number + 1)
        some = {row["algorithm"]: row for row in rows if row["measure"] == measure}
        for place, name in enumerate(names):
            if name not in some:
                continue
            row, colour = some[name], f"C{place % 10}"
            axes.barh(place, row["high"] - row["low"], left=row["low"], height=0.6, color=colour, alpha=0.6)
            axes.vlines(row["estimate"], place - 0.3, place + 0.3, color="black")
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        axes.invert_yaxis()
        axes.use_sticky_edges = False  # a bar's left end is no edge here
        axes.margins(x=0.08)
        axes.set(title=f"IQM, {measure}", xlabel=f"normalised score, {100 * confidence:g} % interval")
        axes.grid(axis="x", alpha=0.3)
    return figure


def performance_profiles(scores: Mapping[str, np.ndarray], bootstrap: Mapping[str, Any]) -> Any:
    """Share of runs above each normalised score; ``scores`` ``[runs, tasks]`` by algorithm."""
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    least = min(0.0, *(float(one.min()) for one in scores.values()))
    most = max(1.0, *(float(one.max()) for one in scores.values()))
    thresholds = np.linspace(least, most, 2 * GRID - 1)
    for name, one in scores.items():
        profile = performance_profile(one, thresholds, **bootstrap)
        draw_band(axes, thresholds, profile.estimate, profile.low, profile.high, name)
    axes.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
