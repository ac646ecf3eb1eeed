"""Proxy points from the metrics of finished runs, as a verb: ``python -m train test -c rlhf/proxy_fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningModule

from modules.files import atomic_write, write_json
from modules.optional import require
from modules.rlhf.proxy_points import ProxyFit, fit_proxy_points


class ProxyPointStudy(LightningModule):
    """Fits the evaluation score over the rewards and writes where it is greatest (Moskovitz et al. 2024, section 3).

    The batch holds all points: see ``datamodules.run_points_data.RunPointsDataModule``. Logs ``test/theta_<component>``
    and ``test/score``; writes the thresholds as JSON, which a constrained run can be started from, and a figure.

    Args:
        out: file of thresholds, JSON; relative to the folder that the command is started in. ``null``:
            ``proxy_points.json`` in the run folder.
        degree, ridge, weights, reach, density_floor, bootstrap: see
            :func:`modules.rlhf.proxy_points.fit_proxy_points`.
        figure: draw ``proxy_points.png`` in the run folder, which needs matplotlib.
    """

    def __init__(
        self,
        out: str | None = None,
        degree: int | None = None,
        ridge: float = 1e-6,
        weights: Literal["kde", "uniform"] = "kde",
        reach: float = 0.25,
        density_floor: float = 0.01,
        bootstrap: int = 0,
        figure: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.out, self.figure = out, figure
        self.options = {
            "degree": degree,
            "ridge": ridge,
            "weights": weights,
            "reach": reach,
            "density_floor": density_floor,
            "bootstrap": bootstrap,
        }

    def setup(self, stage: str) -> None:
        if stage != "test":
            raise ValueError(f"ProxyPointStudy: nothing is trained here; use the verb test, not {stage}")
        if self.figure:
            require("matplotlib", extra="rlhf")  # before the work, not after it

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        names = list(batch["components"])
        points, scores = batch["points"].cpu().numpy(), batch["scores"].cpu().numpy()
        fit = fit_proxy_points(points, scores, groups=batch["run"].cpu().numpy(), **self.options)
        figures = {f"test/theta_{name}": value for name, value in zip(names, fit.theta.tolist(), strict=True)}
        figures |= {"test/score": fit.score, "test/error": fit.error, "test/degree": fit.degree}
        self.log_dict({key: float(value) for key, value in figures.items()}, batch_size=1)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # a collective: asked on all ranks
        if self.trainer.is_global_zero:
            write_json(folder / "proxy_points.json" if self.out is None else Path(self.out), fit.plain(names))
            if self.figure:
                draw(fit, points, scores, names, folder / "proxy_points.png")


def draw(fit: ProxyFit, points: np.ndarray, scores: np.ndarray, names: list[str], path: Path) -> None:
    """The points over the first two rewards, coloured by score, the fitted surface behind and the proxy point.

    One reward: its curve. A third reward is held at the proxy point for the surface.
    """
    figure = require("matplotlib.figure", extra="rlhf").Figure(figsize=(6.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    if points.shape[1] == 1:
        _draw_curve(axes, fit, points, scores, names)
    else:
        _draw_surface(figure, axes, fit, points, scores, names)
    axes.legend(loc="best", fontsize=8)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _draw_curve(axes: Any, fit: ProxyFit, points: np.ndarray, scores: np.ndarray, names: list[str]) -> None:
    along = np.linspace(points.min(), points.max(), 300)[:, None]
    axes.scatter(points[:, 0], scores, s=14, color="0.4", label=f"{len(points)} evaluations")
    axes.plot(along[:, 0], fit.surface(along), color="tab:blue", label=f"polynomial of degree {fit.degree}")
    axes.axvline(fit.theta[0], color="tab:red", linestyle="--", label=f"proxy point {fit.theta[0]:.3g}")
    margin = 0.1 * float(np.ptp(scores))
    axes.set(xlabel=names[0], ylabel="score", ylim=(scores.min() - margin, scores.max() + margin))


def _draw_surface(
    figure: Any, axes: Any, fit: ProxyFit, points: np.ndarray, scores: np.ndarray, names: list[str]
) -> None:
    low, high = points.min(0), points.max(0)
    first, second = np.meshgrid(np.linspace(low[0], high[0], 160), np.linspace(low[1], high[1], 160))
    where = np.tile(fit.theta, (first.size, 1))
    where[:, 0], where[:, 1] = first.ravel(), second.ravel()
    height = np.where(fit.eligible(where), fit.surface(where), np.nan).reshape(first.shape)
    span = {"vmin": scores.min(), "vmax": scores.max(), "cmap": "viridis"}
    axes.pcolormesh(first, second, height, alpha=0.55, shading="auto", rasterized=True, **span)
    shown = axes.scatter(points[:, 0], points[:, 1], c=scores, s=16, edgecolors="black", linewidths=0.3, **span)
    label = f"proxy point ({fit.theta[0]:.3g}, {fit.theta[1]:.3g})"
    axes.plot(
        *fit.theta[:2], marker="x", markersize=11, markeredgewidth=2.5, color="tab:red", linestyle="", label=label
    )
    axes.axvline(fit.alone[0], color="0.5", linestyle=":", linewidth=1, label="each reward by itself")
    axes.axhline(fit.alone[1], color="0.5", linestyle=":", linewidth=1)
    figure.colorbar(shown, ax=axes, label="score")
    axes.set(xlabel=names[0], ylabel=names[1])
