"""The comparison of a study: scores of its finished runs, aggregates with intervals, tables and figures.

The protocol is that of :mod:`modules.assurance.intervals`. Scores are normalised by each task's ``low`` and ``high``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.compare import write_csv, write_png
from callbacks.metrics_file import read_metric
from callbacks.study.figures import aggregate_curves, interval_plot, learning_curves, performance_profiles
from callbacks.study.plan import STUDY_FILE, Run, Study, load_study, plan_runs, read_state
from modules.assurance.intervals import (
    AGGREGATES,
    REPLICATES,
    aggregate,
    area_under_curve,
    difference,
    normalise,
    probability_of_improvement,
)
from modules.files import atomic_write, write_json

MEASURES = {
    "final": "mean of the last evaluations",
    "auc": "mean height of the evaluation curve",
    "best": "best evaluation",
}
"""What a run is scored by. ``best`` picks its evaluation after the fact, so it is too high and never compared."""
SPAN = 0.98
"""Runs of a task whose common span is a smaller part of the longest one are named in the notes."""


@dataclass(frozen=True)
class Settings:
    """Of a report.

    Args:
        last: evaluations whose mean is the final score.
        replicates, confidence, seed: of the bootstrap.
    """

    last: int = 3
    replicates: int = REPLICATES
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"study: --last: must be at least 1, got {self.last}")

    def bootstrap(self) -> dict[str, Any]:
        """Keywords of the functions in :mod:`modules.assurance.intervals`."""
        return {"replicates": self.replicates, "confidence": self.confidence, "seed": self.seed}


@dataclass(frozen=True)
class Curves:
    """What was read of a study.

    Args:
        runs: task and algorithm to seed to curve ``[points, 2]`` of x and metric.
        spans: task to the part of x that all its runs cover.
        missing: run to why it is not counted.
        notes: what a reader of the results must know.
    """

    runs: Mapping[tuple[str, str], Mapping[int, np.ndarray]]
    spans: Mapping[str, tuple[float, float]]
    missing: Mapping[str, str]
    notes: Sequence[str]


def _curve(run: Run, study: Study) -> np.ndarray | str:
    """A finished run's curve, or why there is none."""
    state = read_state(run)
    if not state:
        return "not run with today's settings" if run.folder.is_dir() else "not started"
    if state["state"] != "done":
        return state.get("error", "not finished")
    try:
        curve = read_metric(run.folder / state["run_folder"], study.metric, study.x, keep_nan=True)
    except (OSError, ValueError) as error:
        return str(error)
    if not np.isfinite(curve).all():  # the run diverged: its last finite values would hide that
        return f"'{study.metric}' is not finite at {study.x} {curve[~np.isfinite(curve).all(1)][0, 0]:g}"
    return curve if len(curve) > 1 else "needs 2 evaluations at least, has 1"


def _revision(run: Run) -> str:
    path = run.folder / read_state(run)["run_folder"] / "environment.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return f"{str(record.get('git_revision'))[:12]}{' with changes' if record.get('git_dirty') else ''}"


def read_curves(study: Study, runs: Sequence[Run]) -> Curves:
    """The finished runs' curves; what is unfinished or unreadable is named, not an error."""
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    missing: dict[str, str] = {}
    revisions: dict[str, int] = {}
    for run in runs:
        curve = _curve(run, study)
        if isinstance(curve, str):
            missing[str(run)] = curve
        else:
            found.setdefault((run.task, run.algorithm), {})[run.seed] = curve
            revisions[_revision(run)] = revisions.get(_revision(run), 0) + 1
    notes, spans = [], {}
    for task in study.tasks:
        curves = [curve for (name, _), some in found.items() if name == task for curve in some.values()]
        if not curves:
            continue
        start, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
        longest = max(curve[-1, 0] for curve in curves) - min(curve[0, 0] for curve in curves)
        if start >= end:
            notes.append(f"{task}: its runs cover no common span of {study.x}; it is left out of auc")
            continue
        if end - start < SPAN * longest:
            notes.append(f"{task}: runs differ in length; auc is over the common span [{start:g}, {end:g}]")
        spans[task] = (float(start), float(end))
    if len(revisions) > 1:
        counts = ", ".join(f"{name} ({count})" for name, count in revisions.items())
        notes.append(f"runs come from several code revisions: {counts}")
    return Curves(found, spans, missing, notes)


# -- scores --
def run_scores(curve: np.ndarray, span: tuple[float, float] | None, last: int) -> dict[str, float]:
    """A run's score by each of :data:`MEASURES` that it has; ``curve`` ``[points, 2]``."""
    values = curve[:, 1]
    scores = {"final": float(values[-last:].mean()), "best": float(values.max())}
    if span is not None:
        scores["auc"] = area_under_curve(curve, *span)
    return scores


Scores = dict[tuple[str, str], dict[str, np.ndarray]]
"""Task and algorithm to measure to ``[runs]``, by rising seed."""


def all_scores(curves: Curves, last: int) -> Scores:
    """Every finished run's scores, in the metric's own unit."""
    scores: Scores = {}
    for (task, algorithm), seeds in curves.runs.items():
        each = [run_scores(seeds[seed], curves.spans.get(task), last) for seed in sorted(seeds)]
        scores[task, algorithm] = {measure: np.array([one[measure] for one in each]) for measure in each[0]}
    return scores


def compared(study: Study, scores: Scores, measure: str) -> tuple[list[str], list[str], list[str]]:
    """Algorithms with runs, tasks on which each of them has two or more, and notes on what is left out.

    Aggregates over different tasks can't be compared, so a task counts for all algorithms or for none.
    """
    algorithms = [name for name in study.algorithms if any((task, name) in scores for task in study.tasks)]

    def count(task: str, name: str) -> int:
        return len(scores.get((task, name), {}).get(measure, ()))

    tasks = [task for task in study.tasks if algorithms and all(count(task, name) > 1 for name in algorithms)]
    notes = [f"algorithm {name}: no finished run" for name in study.algorithms if name not in algorithms]
    for task in study.tasks:
        few = [name for name in algorithms if count(task, name) < 2]
        if few:
            notes.append(f"{task}: left out of aggregates: fewer than 2 runs of {', '.join(few)}")
    for name in algorithms:
        if len({count(task, name) for task in tasks}) > 1:
            least = min(count(task, name) for task in tasks)
            notes.append(f"{name}: aggregates use the first {least} runs of each task, the fewest there are")
    return algorithms, tasks, notes


def score_matrix(study: Study, scores: Scores, algorithm: str, tasks: Sequence[str], measure: str) -> np.ndarray:
    """Normalised scores ``[runs, tasks]``, with as many runs as the task with the fewest has."""
    columns = [scores[task, algorithm][measure] for task in tasks]
    runs = min(len(column) for column in columns)
    low, high = ([getattr(study.tasks[task], bound) for task in tasks] for bound in ("low", "high"))
    return normalise(np.stack([column[:runs] for column in columns], axis=1), low, high)


def task_rows(study: Study, scores: Scores) -> list[dict[str, Any]]:
    """Mean, standard error and number of runs of every task and algorithm, in the metric's unit."""
    rows = []
    for task in study.tasks:
        for algorithm in study.algorithms:
            for measure, values in scores.get((task, algorithm), {}).items():
                error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
                rows.append(
                    {
                        "task": task,
                        "algorithm": algorithm,
                        "measure": measure,
                        "mean": float(values.mean()),
                        "standard_error": error,
                        "n": len(values),
                        "values": values.tolist(),
                    }
                )
    return rows


def aggregate_rows(study: Study, scores: Scores, settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Every aggregate of every measure and algorithm over the suite, and notes."""
    rows = []
    _, _, notes = compared(study, scores, "final")  # that every finished run has
    for measure in MEASURES:
        algorithms, tasks, _ = compared(study, scores, measure)
        for algorithm in algorithms if tasks else ():
            matrix = score_matrix(study, scores, algorithm, tasks, measure)
            for statistic in AGGREGATES:
                interval = aggregate(matrix, statistic, **settings.bootstrap()).plain()
                head = {"algorithm": algorithm, "measure": measure, "statistic": statistic}
                rows.append({**head, **interval, "runs": len(matrix), "tasks": len(tasks)})
    return rows, notes


def comparison_rows(study: Study, scores: Scores, settings: Settings) -> list[dict[str, Any]]:
    """IQM differences and probabilities of improvement over baselines, for the suite and for each of its tasks."""
    rows = []
    for name, baseline in study.baselines.items():
        for measure in ("final", "auc"):
            algorithms, tasks, _ = compared(study, scores, measure)
            if not tasks or name not in algorithms or baseline not in algorithms:
                continue
            for label, some in {"all": tasks, **{task: [task] for task in tasks}}.items():
                mine, theirs = (score_matrix(study, scores, one, some, measure) for one in (name, baseline))
                gain = difference(mine, theirs, "iqm", **settings.bootstrap()).plain()
                better = probability_of_improvement(mine, theirs, **settings.bootstrap()).plain()
                head = {"algorithm": name, "baseline": baseline, "measure": measure, "task": label}
                both = (("iqm_difference", gain), ("probability_of_improvement", better))
                values = {f"{key}_{end}": one[end] for key, one in both for end in ("estimate", "low", "high")}
                rows.append({**head, **values})
    return rows


# -- tables --
def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Aligned columns, with Markdown's bars if wanted."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(row: Mapping[str, Any], prefix: str = "") -> str:
    estimate, low, high = (row[f"{prefix}{end}"] for end in ("estimate", "low", "high"))
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def text(study: Study, results: Mapping[str, Any], markdown: bool = False) -> str:
    """The report as tables."""
    percent = f"{100 * results['settings']['confidence']:g} %"
    mark = "**" if markdown else ""
    parts = [f"{mark}{study.name}{mark}: {study.metric} along {study.x}"]
    cells = {(r["task"], r["algorithm"], r["measure"]): r for r in results["tasks"]}
    algorithms = [name for name in study.algorithms if any(key[1] == name for key in cells)]
    for measure in ("final", "auc") if algorithms else ():
        rows = []
        for task in study.tasks:
            row = [task]
            for name in algorithms:
                one = cells.get((task, name, measure))
                error = "" if one is None or one["standard_error"] is None else f" ± {one['standard_error']:.3g}"
                row.append("-" if one is None else f"{one['mean']:.3g}{error} ({one['n']})")
            rows.append(row)
        parts.append(f"{measure} ({MEASURES[measure]}): mean ± standard error (runs)")
        parts.append(table(["task", *algorithms], rows, markdown))
    by = {(r["algorithm"], r["measure"], r["statistic"]): r for r in results["aggregates"]}
    wanted = [("iqm", "final"), ("iqm", "auc"), ("optimality_gap", "final"), ("median", "final")]
    wanted = [one for one in wanted if any(key[1:] == one[::-1] for key in by)]
    if wanted:
        rows = [
            [name, *(_interval(by[name, measure, statistic]) for statistic, measure in wanted)]
            for name in algorithms
            if (name, wanted[0][1], wanted[0][0]) in by
        ]
        parts.append(f"normalised scores over all tasks, {percent} stratified bootstrap intervals")
        parts.append(table(["algorithm", *(f"{s} {m}" for s, m in wanted)], rows, markdown))
    if results["comparisons"]:
        rows = [
            [
                f"{r['algorithm']} - {r['baseline']}",
                r["task"],
                r["measure"],
                _interval(r, "iqm_difference_"),
                _interval(r, "probability_of_improvement_"),
            ]
            for r in results["comparisons"]
        ]
        parts.append(f"against baselines, {percent} intervals")
        header = ["algorithm - baseline", "task", "measure", "IQM difference", "P(improvement)"]
        parts.append(table(header, rows, markdown))
    said = [f"note: {one}" for one in results["notes"]]
    said += [f"missing: {run}: {why}" for run, why in results["missing"].items()]
    if said:
        parts.append("\n".join(f"* {one}" if markdown else one for one in said))
    return "\n\n".join(parts)


# -- the command --
def report_study(out: Path, settings: Settings, figures: bool = True) -> tuple[Study, dict[str, Any]]:
    """Compare a study's finished runs and write tables and figures into ``<out>/report``.

    Args:
        out: the study's folder.
        settings: of the report.
        figures: draw PNGs too, which needs matplotlib.

    Returns:
        The study, and what ``report.json`` holds.

    Raises:
        FileNotFoundError, ValueError: no study in ``out``, or none of its runs is finished.
        ImportError: figures without matplotlib.
    """
    if not (out / STUDY_FILE).is_file():
        raise FileNotFoundError(f"study: {out / STUDY_FILE} does not exist: name the --out folder of a study that ran")
    study, _ = load_study(out / STUDY_FILE)
    curves = read_curves(study, plan_runs(study, out))
    if not curves.runs:
        run, why = next(iter(curves.missing.items()))
        raise ValueError(f"study: {out}: no run can be compared yet; {run}: {why}")
    scores = all_scores(curves, settings.last)
    aggregates, notes = aggregate_rows(study, scores, settings)
    results = {
        "name": study.name,
        "metric": study.metric,
        "x": study.x,
        "settings": {"last": settings.last, **settings.bootstrap()},
        "bounds": {name: [task.low, task.high] for name, task in study.tasks.items()},
        "tasks": task_rows(study, scores),
        "aggregates": aggregates,
        "comparisons": comparison_rows(study, scores, settings),
        "notes": [*curves.notes, *notes],
        "missing": dict(curves.missing),
    }
    folder = out / "report"
    write_json(folder / "report.json", results)
    for name in ("tasks", "aggregates", "comparisons"):
        rows = [{key: value for key, value in row.items() if key != "values"} for row in results[name]]
        if rows:
            write_csv(folder / f"{name}.csv", list(rows[0]), [list(row.values()) for row in rows])
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    with atomic_write(folder / "report.md", "w") as stream:
        stream.write(text(study, results, markdown=True) + "\n")
    if figures:
        _figures(study, curves, scores, settings, results, folder)
    return study, results


def _figures(
    study: Study, curves: Curves, scores: Scores, settings: Settings, results: Mapping[str, Any], folder: Path
) -> None:
    bootstrap = settings.bootstrap()
    drawn = {"learning_curves": learning_curves(study, curves.runs, bootstrap)}
    algorithms, tasks, _ = compared(study, scores, "final")
    if tasks:
        matrices = {name: score_matrix(study, scores, name, tasks, "final") for name in algorithms}
        drawn["performance_profile"] = performance_profiles(matrices, bootstrap)
        drawn["intervals"] = interval_plot(results["aggregates"], ("final", "auc"), settings.confidence)
        spans = {task: curves.spans[task] for task in tasks if task in curves.spans}
        if spans:
            drawn["aggregate_curve"] = aggregate_curves(study, curves.runs, spans, algorithms, bootstrap)
    for name, figure in drawn.items():
        write_png(figure, folder / f"{name}.png")
