"""The path of training in the plane of two metrics, coloured by a third: where overoptimisation shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from modules.optional import require


class TrajectoryFigure(Callback):
    """Draws one point per validation: metric ``x`` against ``y``, coloured by ``colour``; and ``colour`` against ``x``.

    The figures go to TensorBoard and, as PNG, to the run folder when training ends. History is part of the checkpoint.

    Args:
        x, y, colour: logged metrics.
        cross: metrics of a point to mark, such as ``[constraint/a/threshold, constraint/b/threshold]``; left out where
            they are not logged.
    """

    def __init__(self, x: str, y: str, colour: str = "val/score", cross: list[str] | None = None) -> None:
        if cross is not None and len(cross) != 2:
            raise ValueError(f"TrajectoryFigure: cross must name two metrics, got {cross}")
        self.x, self.y, self.colour, self.cross = x, y, colour, cross or []
        self.points: list[list[float]] = []
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "figures"  # a collective: on all ranks

    def state_dict(self) -> dict[str, Any]:
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = [list(point) for point in state_dict["points"]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for name in (self.x, self.y, self.colour):
            if name not in metrics:
                near = ", ".join(sorted(key for key in metrics if key.startswith("val/")))
                raise ValueError(f"TrajectoryFigure: no metric {name} is logged; validation has {near}")
        step = float(trainer.global_step)
        if not self.points or self.points[-1][0] < step:
            self.points.append([step, *(float(metrics[name]) for name in (self.x, self.y, self.colour))])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.points:
            return
        metrics = trainer.callback_metrics
        marked = [float(metrics[name]) for name in self.cross if name in metrics]
        figure = self._draw(marked if len(marked) == 2 else None)
        self._folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self._folder / "trajectory.png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("trajectory", figure, trainer.global_step)

    def _draw(self, marked: list[float] | None) -> Any:
        figure = require("matplotlib.figure", extra="rlhf").Figure(figsize=(10, 4.2), layout="constrained")
        plane, curve = figure.subplots(1, 2)
        steps, xs, ys, colours = (list(column) for column in zip(*self.points, strict=True))
        plane.plot(xs, ys, color="0.8", zorder=1)
        shown = plane.scatter(xs, ys, c=colours, cmap="viridis", zorder=2)
        figure.colorbar(shown, ax=plane, label=self.colour)
        if marked is not None:
            plane.plot(*marked, marker="x", color="red", markersize=10, markeredgewidth=2, linestyle="none")
        plane.set_xlabel(self.x)
        plane.set_ylabel(self.y)
        for name, values in ((self.x, xs), (self.y, ys)):
            curve.plot(values, colours, marker="o", markersize=3, label=name)
        curve.set_xlabel("reward")
        curve.set_ylabel(self.colour)
        curve.set_title(f"up to step {int(steps[-1])}", fontsize=9)
        curve.legend()
        curve.grid(alpha=0.3)
        return figure
