"""What a population game shows while it is solved: payoff heat-map, meta-strategies, payoff table, and when to stop."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.figures import write_figure
from modules.contracts import ReportsPopulation
from modules.files import atomic_write
from modules.optional import require

_EXTRA = "games"
_PATIENCE = 10  # iterations: NashConv may be measured less often than every one


class PopulationCallback(Callback):
    """Calls :meth:`on_iteration` once per iteration of the population loop, with its report, on all ranks.

    An iteration counts as finished when the number in the report has changed, and again at the end of training if it
    was not seen before.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ReportsPopulation):
            name = type(self).__name__
            raise ValueError(f"{name}: module: must offer population_report(), got {type(pl_module).__name__}")
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = state_dict["seen"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(trainer, pl_module)
        self.on_last(trainer, pl_module.population_report())

    def _look(self, trainer: Trainer, pl_module: Any) -> None:
        report = pl_module.population_report()
        iteration = int(report["iteration"])
        if iteration != self._seen:
            self._seen = iteration
            self.on_iteration(trainer, report)

    def on_iteration(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        """After each iteration."""

    def on_last(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        """At the end of training."""


class PopulationFigures(PopulationCallback):
    """Exploitability, heat-map of the payoff table, bars of the meta-strategies, and the meta-strategies over time.

    Drawn in TensorBoard (``population/exploitability``, against iterations and frames, ``population/payoffs``,
    ``population/meta_strategy``, ``population/meta_strategy_over_time``) and, each time anew, as PNG in
    ``<run>/figures/``. The meta-strategies' history is part of the checkpoint, so that a resumed run draws whole areas.
    The heat-map needs two players.

    Args:
        every_n_iterations: how often to draw; the end of training always draws.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        super().__init__()
        if every_n_iterations < 1:
            raise ValueError(f"PopulationFigures: every_n_iterations: must be >= 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self.iterations: list[int] = []
        self.meta_strategies: list[list[list[float]]] = []
        self._drawn: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "iterations": list(self.iterations),
            "meta_strategies": [[list(one) for one in each] for each in self.meta_strategies],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.iterations = [int(number) for number in state_dict["iterations"]]
        self.meta_strategies = [[list(one) for one in each] for each in state_dict["meta_strategies"]]

    def on_iteration(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        iteration = int(report["iteration"])
        self.iterations.append(iteration)
        self.meta_strategies.append([strategy.tolist() for strategy in report["meta_strategies"]])
        if iteration % self.every_n_iterations == 0:
            self._draw(trainer, report)

    def on_last(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        if self._drawn != int(report["iteration"]):
            self._draw(trainer, report)

    def _draw(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        iteration = int(report["iteration"])
        self._drawn = iteration
        if not trainer.is_global_zero:
            return
        figures = {
            "meta_strategy": draw_meta_strategies(report["meta_strategies"], iteration),
            "meta_strategy_over_time": draw_meta_strategies_over_time(self.iterations, self.meta_strategies),
        }
        curves = draw_curves(report["history"])
        if curves is not None:
            figures["exploitability"] = curves
        if report["payoffs"].ndim == 3 and report["payoffs"].numel():
            figures["payoffs"] = draw_payoffs(report["payoffs"][0], iteration)
        for name, figure in figures.items():
            write_figure(trainer, self._folder / "figures", f"population/{name}", figure)


class PayoffTableWriter(PopulationCallback):
    """Writes the payoff table and the meta-strategies at the end of training, each file atomically.

    ``<run>/population/payoffs.npz``: ``payoffs`` ``[players, members_0, ...]``, ``meta_strategy_<i>``, ``iteration``,
    all float64 but the last. ``<run>/population/payoffs.csv``: a row for each profile of members, ``member_<i>`` then
    ``payoff_<i>`` columns, floats exact.
    """

    def on_last(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        payoffs = report["payoffs"].detach().cpu().double().numpy()
        strategies: dict[str, Any] = {
            f"meta_strategy_{i}": _array(sigma) for i, sigma in enumerate(report["meta_strategies"])
        }
        folder = self._folder / "population"
        with atomic_write(folder / "payoffs.npz") as stream:
            np.savez_compressed(stream, payoffs=payoffs, iteration=np.int64(report["iteration"]), **strategies)
        players = payoffs.shape[0]
        with atomic_write(folder / "payoffs.csv", "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([f"member_{i}" for i in range(players)] + [f"payoff_{i}" for i in range(players)])
            profiles = itertools.product(*(range(size) for size in payoffs.shape[1:]))
            cells = payoffs.reshape(players, -1).T.tolist()
            writer.writerows([*profile, *cell] for profile, cell in zip(profiles, cells, strict=True))


class StopAtExploitability(PopulationCallback):
    """Ends training after the first iteration whose metric has come down to ``threshold``.

    Args:
        threshold: in the metric's own scale (NashConv sums over players; exploitability is half of it for two).
        metric: a key of the report's ``history``.
    """

    def __init__(self, threshold: float, metric: str = "meta/nashconv") -> None:
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"StopAtExploitability: threshold: must be >= 0, got {threshold}")
        self.threshold = threshold
        self.metric = metric
        self._missed = 0

    def on_iteration(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        history = report["history"]
        points = history.get(self.metric, ())
        self._missed = 0 if points else self._missed + 1
        if self._missed == _PATIENCE:
            rank_zero_warn(
                f"StopAtExploitability: metric '{self.metric}' was not reported in {_PATIENCE} iterations, the run "
                f"can't stop by it; reported are: {', '.join(sorted(history)) or 'none'}"
            )
        reached = bool(points) and float(points[-1][-1]) <= self.threshold
        if trainer.world_size > 1:  # reports are equal on all ranks, but only one answer can be right
            reached = trainer.strategy.reduce_boolean_decision(reached, all=False)
        if reached:
            trainer.should_stop = True


def draw_payoffs(payoffs: Tensor, iteration: int) -> Any:
    """Heat-map of the first player's payoffs ``[rows, columns]``; red gains, blue loses, white is 0."""
    values = _array(payoffs)
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xlabel="member of the second player", ylabel="member of the first player")
    axes.set_title(f"payoffs to the first player, iteration {iteration}")
    figure.colorbar(image, ax=axes)
    return figure


CURVES = ("meta/nashconv", "meta/population_exploitability", "psro/gap")


def draw_curves(history: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """NashConv, population exploitability or the empirical gap against iterations and, where games were played, frames.

    Args:
        history: metric -> points (iteration, frames, value); values of 0 and less cannot be drawn and are left out.

    Returns:
        a figure, or ``None`` where there is nothing to draw.
    """
    drawn = {name: [point for point in history.get(name, ()) if point[-1] > 0] for name in CURVES}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return None
    axes_of = (
        ["iteration", "frames"] if any(point[1] > 0 for points in drawn.values() for point in points) else ["iteration"]
    )
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(6 * len(axes_of), 4), layout="constrained")
    for place, (axis, label) in enumerate(
        zip(figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of, strict=True)
    ):
        for name, points in drawn.items():
            axis.plot(
                [point[place] for point in points],
                [point[-1] for point in points],
                marker="o",
                markersize=2.5,
                label=name.split("/")[-1].replace("_", " "),
            )
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_meta_strategies(strategies: list[Tensor], iteration: int) -> Any:
    """Bars of every population's meta-strategy ``[members]``."""
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(
        figsize=(7, 1.2 + 2.2 * len(strategies)), layout="constrained"
    )
    rows = figure.subplots(len(strategies), squeeze=False)[:, 0]
    for number, (axes, sigma) in enumerate(zip(rows, strategies, strict=True)):
        values = _array(sigma)
        axes.bar(np.arange(len(values)), values, width=0.9)
        axes.set(xlabel="member", ylabel="probability", title=f"population {number}, iteration {iteration}")
        axes.set_ylim(bottom=0)
    return figure


def draw_meta_strategies_over_time(iterations: list[int], meta_strategies: list[list[list[float]]]) -> Any:
    """Stacked areas: ``meta_strategies[t][population][member]`` over ``iterations[t]``; members that come later
    weigh 0 before."""
    populations = len(meta_strategies[-1]) if meta_strategies else 1
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(
        figsize=(7, 1.2 + 2.4 * populations), layout="constrained"
    )
    rows = figure.subplots(populations, squeeze=False)[:, 0]
    colours = require("matplotlib", extra=_EXTRA).colormaps["viridis"]
    for number, axes in enumerate(rows):
        weights = [each[number] for each in meta_strategies]
        members = max((len(one) for one in weights), default=0)
        if members:
            area = np.zeros((members, len(weights)))
            for column, one in enumerate(weights):
                area[: len(one), column] = one
            axes.stackplot(iterations, area, colors=colours(np.linspace(0, 1, members)), linewidth=0)
            axes.set_xlim(iterations[0], max(iterations[-1], iterations[0] + 1))
        axes.set_ylim(0, 1)
        axes.set(
            xlabel="iteration", ylabel="probability", title=f"population {number}: oldest member dark, newest light"
        )
    return figure


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
