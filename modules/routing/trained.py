"""A trained solver from a checkpoint of any routing module: to evaluate it, or to go on from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from modules.assurance.subject import DataSource
from modules.contracts import RoutingSpec
from modules.routing.evaluation import RoutingEvaluation, check_spec
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings

Keep = Literal["last", "best_seen", "best_all"]


def load_solver(path: str | Path, keep: Keep = "last") -> RoutingSolver:
    """The solver of a checkpoint that ``POMO``, ``AttentionModel`` or ``ASP`` wrote.

    Args:
        path: a ``.ckpt`` file, or a run's folder (its ``checkpoints/last.ckpt``).
        keep: of ASP: the last solver or one of the best.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint of a routing module, or has no such solver.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "checkpoints" / "last.ckpt"
    if not file.is_file():
        raise FileNotFoundError(f"load_solver: no checkpoint {file}: name a .ckpt file or a run's folder")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"load_solver: {file} is no checkpoint, or is damaged ({error})") from None
    return solver_of(checkpoint, f"load_solver: {file}", keep)


def solver_of(checkpoint: Mapping[str, Any], owner: str, keep: Keep = "last") -> RoutingSolver:
    """The solver of a checkpoint's content; ``owner`` names it in messages.

    Raises:
        ValueError: as :func:`load_solver`.
    """
    if "routing_spec" not in checkpoint or "solver_settings" not in checkpoint:
        raise ValueError(f"{owner} holds no routing solver: another kind of module wrote it")
    solver = RoutingSolver(RoutingSpec(**checkpoint["routing_spec"]), SolverSettings(**checkpoint["solver_settings"]))
    if keep == "last":
        prefix = "solver."
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    else:
        best = checkpoint.get("population", {}).get("method", {}).get("best", {})
        if keep not in best:
            raise ValueError(f"{owner} has no {keep} solver, only {', '.join(['last', *best])}")
        weights = best[keep][1]
    solver.load_state_dict(weights)
    return solver


def start_from(solver: RoutingSolver, path: str | Path) -> None:
    """Give ``solver`` the weights of a checkpoint's.

    Raises:
        FileNotFoundError: as :func:`load_solver`.
        ValueError: as :func:`load_solver`, or a solver of another problem or with other sizes.
    """
    take_weights(solver, load_solver(path), f"start_from: the solver of {path}")


def take_weights(solver: RoutingSolver, trained: RoutingSolver, owner: str) -> None:
    """Give ``solver`` the weights of ``trained``; ``owner`` names it in messages.

    Raises:
        ValueError: a solver of another problem or with other sizes.
    """
    check_spec(owner.partition(":")[0], trained.spec, solver.spec)
    if trained.settings != solver.settings:
        raise ValueError(f"{owner} has {trained.settings}, the config {solver.settings}: set model.solver to the same")
    solver.load_state_dict(trained.state_dict())


class TrainedSolver(RoutingEvaluation):
    """A checkpoint's solver, for ``test``, ``validate`` and ``predict``; it does not train.

    Metrics: as :class:`~modules.routing.evaluation.RoutingEvaluation`.

    Args:
        checkpoint: a ``.ckpt`` file or a run's folder.
        keep: of ASP: the ``last`` solver, or that with the lowest mean gap over scales seen or all held-out scales.
        decoding: how routes are decoded.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a checkpoint of another kind of module; at set-up, a datamodule of another problem.
    """

    def __init__(self, checkpoint: str, keep: Keep = "last", decoding: Decoding = Decoding()) -> None:  # noqa: B008
        super().__init__(decoding)
        self.solver = load_solver(checkpoint, keep)
        self.spec = self.solver.spec

    def training_sources(self) -> list[DataSource]:
        return [DataSource("instances that the checkpoint does not tell of", "unknown")]

    def configure_optimizers(self) -> None:
        raise ValueError(
            "TrainedSolver: it does not train: use modules.baselines.POMO or modules.asp.ASP with `initial`"
        )
