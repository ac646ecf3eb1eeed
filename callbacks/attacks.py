"""A policy under a suite of attacks, as files, as pictures and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.compare import write_csv
from callbacks.figures import write_figure
from modules.contracts import ReportsAttacks
from modules.files import atomic_write, write_json
from modules.optional import require

_EXTRA = "control"
COLUMNS = (
    "attack", "coupled", "episodes", "return_mean", "return_std", "return_se", "length_mean", "linf", "step_linf",
    "runs", "frames",
)  # fmt: skip
_SHOWN = {
    "attack": "attack", "episodes": "episodes", "return_mean": "return", "return_se": "+- s.e.", "return_std": "std",
    "length_mean": "length", "linf": "|p|", "step_linf": "|dp|", "runs": "runs", "frames": "frames spent",
}  # fmt: skip
_ACROSS = 3  # traces side by side


class AttackMatrix(Callback):
    """Writes what the last evaluation under attacks found, after ``test`` and after each validation anew.

    ``<run>/attacks/attacks.csv``, a row for each attack, floats exact; ``attacks.json``, the same and all else that the
    module reports; ``traces.npz``, the perturbation ``[steps, size]`` of one episode of each attack. In TensorBoard and
    as PNG in ``<run>/figures/``: ``attacks/returns``, mean returns, and ``attacks/traces``. ``test`` prints the table.
    A sanity check before training is not counted.

    Raises:
        ValueError: at set-up, a module that has no ``attack_report()``.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._lines: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ReportsAttacks):
            raise ValueError(f"AttackMatrix: module: must offer attack_report(), got {type(pl_module).__name__}")
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, pl_module.attack_report())

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        report = pl_module.attack_report()
        self._write(trainer, report)
        if trainer.is_global_zero and report.get("attacks"):
            self._lines = [*table(report), f"attacks: {self._folder / 'attacks'}"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for line in self._lines:  # only now is the progress bar closed
            print(line)
        self._lines = []

    def _write(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        if not trainer.is_global_zero or not report.get("attacks"):
            return
        folder, rows = self._folder / "attacks", [{**row, "attack": label(row)} for row in report["attacks"]]
        traces = {name: _array(trace) for name, trace in report.get("traces", {}).items()}
        traces = {name: trace for name, trace in traces.items() if trace.size}
        write_csv(folder / "attacks.csv", COLUMNS, ([row[key] for key in COLUMNS] for row in rows))
        others = {key: value for key, value in report.items() if key != "traces"}
        write_json(folder / "attacks.json", {**others, "attacks": rows})
        figures = {"returns": draw_returns(report)}
        if traces:
            with atomic_write(folder / "traces.npz") as stream:
                np.savez_compressed(stream, **traces)  # pyright: ignore[reportArgumentType]
            figures["traces"] = draw_traces(traces, report.get("perturbation", {}))
        for name, figure in figures.items():
            write_figure(trainer, self._folder / "figures", f"attacks/{name}", figure)


def label(row: Mapping[str, Any]) -> str:
    """An attack's name in files and figures: that of its metrics."""
    return f"{row['name']}_coupled" if row["coupled"] else str(row["name"])


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines: a row for each attack, the worst marked, then what is to be known of them."""
    cells = [[*_SHOWN.values(), ""]]
    for row in report["attacks"]:
        named = {**row, "attack": label(row)}
        mark = "<- worst" if named["attack"] == report["worst_attack"] else ""
        cells.append([*(_short(named[key]) for key in _SHOWN), mark])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *figures, mark in cells:
        shown = "".join(f"  {cell:>{width}}" for cell, width in zip(figures, widths[1:-1], strict=True))
        lines.append(f"{name:<{widths[0]}}{shown}  {mark}".rstrip())
    natural = report.get("natural")
    known = "" if natural is None else f", natural return {_short(natural)}"
    lines.append(f"worst case {_short(report['worst_case'])} ({report['worst_attack']}){known}")
    return lines + [f"note: {flag}" for flag in report.get("flags", ())]


def draw_returns(report: Mapping[str, Any]) -> Any:
    """A bar of the mean return, with its standard error, for each attack; the worst in red, the natural one dashed."""
    rows = report["attacks"]
    names = [label(row) for row in rows]
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(7, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:red" if name == report["worst_attack"] else "tab:blue" for name in names]
    means, errors = ([float(row[key]) for row in rows] for key in ("return_mean", "return_se"))
    axes.barh(names, means, xerr=errors, color=colours, capsize=3)
    axes.get_yticklabels()[names.index(report["worst_attack"])].set_color("tab:red")
    if report.get("natural") is not None:
        axes.axvline(float(report["natural"]), color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("mean return, with standard error")
    axes.set_title(f"worst case {_short(report['worst_case'])}: {report['worst_attack']}")
    axes.grid(alpha=0.3, axis="x")
    return figure


def draw_traces(traces: Mapping[str, np.ndarray], perturbation: Mapping[str, Any]) -> Any:
    """Perturbations ``[steps, size]`` of one episode, a panel for each attack and a line for each coordinate.

    Args:
        traces: by attack.
        perturbation: its settings; a number ``eps`` under the norm ``inf`` is drawn as bounds.
    """
    across = min(_ACROSS, len(traces))
    down = math.ceil(len(traces) / across)
    size = (1 + 3.2 * across, 0.8 + 1.7 * down)
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    eps, norm = perturbation.get("eps"), perturbation.get("norm")
    for axes, (name, trace) in zip(panels, traces.items(), strict=False):
        axes.plot(np.arange(len(trace)), trace, linewidth=0.8)
        if norm == "inf" and isinstance(eps, int | float):
            for bound in (-eps, eps):
                axes.axhline(bound, color="black", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
    for axes in panels[len(traces) :]:
        axes.set_axis_off()
    figure.supxlabel("step")
    figure.supylabel("perturbation")
    return figure


def _array(trace: Any) -> np.ndarray:
    """``[steps, size]`` of a tensor or of nested sequences."""
    values = np.asarray(trace.detach().cpu() if hasattr(trace, "detach") else trace)
    return values.reshape(len(values), -1)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
