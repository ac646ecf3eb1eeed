"""How a curriculum over scales goes: gap by scale, the staircase and its weights, the generators' densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.figures import write_figure
from callbacks.population import PopulationCallback
from modules.contracts import ReportsGenerators
from modules.optional import require

_EXTRA = "routing"
_GAP, _WEIGHT = "gap/held_out/", "curriculum/weight_"


class CurriculumFigures(PopulationCallback):
    """Draws, in TensorBoard and as PNG in ``<run>/figures/``, each time anew:

    ``curriculum/gaps``, the held-out gap of every scale after each iteration; ``curriculum/staircase``, the newest
    scale and the shares of scales; ``curriculum/generators``, where the newest scale's generators put their nodes.

    Args:
        every_n_iterations: how often to draw; the end of training always draws.
        side: cells along a side of the densities.

    Raises:
        ValueError: a number below 1; at set-up, a module without populations or generators.
    """

    def __init__(self, every_n_iterations: int = 5, side: int = 40) -> None:
        super().__init__()
        for key, value in (("every_n_iterations", every_n_iterations), ("side", side)):
            if value < 1:
                raise ValueError(f"CurriculumFigures: {key} must be >= 1, got {value}")
        self.every_n_iterations, self.side = every_n_iterations, side
        self._drawn: int | None = None

    def on_iteration(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        if int(report["iteration"]) % self.every_n_iterations == 0:
            self._draw(trainer, report)

    def on_last(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        if self._drawn != int(report["iteration"]):
            self._draw(trainer, report)

    def _draw(self, trainer: Trainer, report: Mapping[str, Any]) -> None:
        self._drawn = int(report["iteration"])
        if not trainer.is_global_zero:
            return
        module, history = trainer.lightning_module, report["history"]
        figures: dict[str, Any] = {}
        if any(key.startswith(_GAP) for key in history):
            figures["gaps"] = draw_gaps(history)
        if "curriculum/scale" in history:
            figures["staircase"] = draw_staircase(history)
        if isinstance(module, ReportsGenerators):
            figures["generators"] = draw_densities(module.generator_densities(self.side))
        for name, figure in figures.items():
            write_figure(trainer, self._folder / "figures", f"curriculum/{name}", figure)


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(width, height), layout="constrained")


def _members(
    history: Mapping[str, Sequence[Sequence[float]]], prefix: str
) -> list[tuple[str, list[float], list[float]]]:
    """(name, iterations, values) of all metrics that start with ``prefix``, by number."""
    names = sorted((key for key in history if key.startswith(prefix)), key=lambda key: int(key.removeprefix(prefix)))
    return [(n.removeprefix(prefix), [p[0] for p in history[n]], [p[2] for p in history[n]]) for n in names]


def draw_gaps(history: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """Gap in percent against iterations, a line per scale."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for name, iterations, values in _members(history, _GAP):
        axes.plot(iterations, values, marker="o", markersize=3, label=f"n = {name}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("held-out gap (percent)")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_staircase(history: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """The newest scale, and below it the shares of scales in adaptions."""
    figure = _figure(7, 5)
    above, below = figure.subplots(2, 1, sharex=True)
    scale = history["curriculum/scale"]
    above.step([point[0] for point in scale], [point[2] for point in scale], where="mid")
    above.set_ylabel("newest scale")
    for name, iterations, values in _members(history, _WEIGHT):
        below.plot(iterations, values, marker="o", markersize=3, label=f"n = {name}")
    below.set_xlabel("iteration")
    below.set_ylabel("share")
    below.set_ylim(0, 1.02)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    below.legend()
    return figure


def draw_densities(densities: Sequence[tuple[str, Tensor]]) -> Any:
    """Maps ``[side, side]`` (x along the first axis) of the unit square, side by side, each on its own scale."""
    figure = _figure(2.6 * len(densities), 2.9)
    for axes, (name, density) in zip(figure.subplots(1, len(densities), squeeze=False)[0], densities, strict=True):
        axes.imshow(density.T.cpu().numpy(), origin="lower", extent=(0, 1, 0, 1), vmin=0.0, cmap="magma")
        axes.set_title(name, fontsize=9)
        axes.set_xticks([0, 1])
        axes.set_yticks([0, 1])
    return figure
