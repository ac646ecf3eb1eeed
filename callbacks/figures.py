"""Line charts of evaluation metrics, one per metric family, in TensorBoard and as PNG files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from modules.files import atomic_write
from modules.optional import require


def write_figure(trainer: Trainer, folder: Path, name: str, figure: Any) -> None:
    """Put ``figure`` into TensorBoard as ``name`` (``group/what``) and, as PNG ``group_what.png``, into ``folder``."""
    with atomic_write(folder / f"{name.replace('/', '_')}.png") as stream:
        figure.savefig(stream, format="png", dpi=120)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)


class MetricFigures(Callback):
    """Collects logged ``val/<family>_<member>`` metrics and draws each family as one chart over optimiser steps.

    ``val/ppl_web`` and ``val/ppl_code`` become the figure ``val/ppl`` with two lines. History is part of the
    checkpoint, so a resumed run draws whole curves.

    Args:
        families: prefixes to draw, e.g. ``["val/ppl"]``.
        log_scale: draw the value axis logarithmically.
    """

    def __init__(self, families: list[str], log_scale: bool = True) -> None:
        if not families:
            raise ValueError("MetricFigures: families must name at least one metric prefix, got []")
        self.families = families
        self.log_scale = log_scale
        self.history: dict[str, list[list[float]]] = {}
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "figures"  # a collective: on all ranks

    def state_dict(self) -> dict[str, Any]:
        return {"history": {key: [list(point) for point in points] for key, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {key: [list(point) for point in points] for key, points in state_dict["history"].items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or (trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")):
            return
        for key, value in trainer.callback_metrics.items():
            if any(key.startswith(f"{family}_") for family in self.families):
                points = self.history.setdefault(key, [])
                if not points or points[-1][0] < trainer.global_step:
                    points.append([float(trainer.global_step), float(value)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = self._folder
        for family in self.families:
            lines = {key: points for key, points in self.history.items() if key.startswith(f"{family}_")}
            if not lines:
                continue
            write_figure(trainer, folder, family, self._draw(family, lines))

    def _draw(self, family: str, lines: dict[str, list[list[float]]]) -> Any:
        figure = require("matplotlib.figure", extra="llemma").Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for key, points in sorted(lines.items()):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="o", markersize=3, label=key.removeprefix(f"{family}_"))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(family)
        if self.log_scale:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure
