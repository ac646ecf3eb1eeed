"""The routes that a solver found, as files that others read, as tables and as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensordict import TensorDict
from torch import Tensor

from callbacks.compare import write_csv, write_png
from modules.contracts import ProvidesRoutingInstances
from modules.files import atomic_write, write_json
from modules.optional import require

_EXTRA = "routing"
_OUTPUTS = ("index", "actions", "cost", "reference", "gap")
COLUMNS = ("set", "name", "size", "cost", "reference", "gap")


@dataclass(frozen=True)
class SolvedInstance:
    """One instance with the route found: ``actions`` int64 ``[T]``; costs, ``gap`` in percent (NaN: not known).

    ``points`` float64 ``[N, 2]``, what to draw, or ``None``. ``size``: customers.
    """

    dataloader: int
    index: int
    size: int
    actions: Tensor
    cost: float
    reference: float
    gap: float
    points: Tensor | None = None


class RouteFiles(Callback):
    """Writes what ``test`` and ``predict`` found into the run folder.

    ``routes/<name>.tour`` (TSPLIB 95, TOUR_SECTION, nodes from 1) of problems without depot, ``routes/<name>.sol``
    (CVRPLIB, ``Route #k: customers``, from 1, the depot being 0) of those with one, each when its batch is solved; in
    the end ``routes.csv`` and ``routes.json`` with set, name, size (customers), cost, reference and gap (percent; both
    empty where not known) of each instance and, in the JSON, the mean and largest gap of each set. ``test`` prints the
    sets, ``predict`` every instance. No route that breaks the problem's rules is written.

    The module's ``test_step`` and ``predict_step`` return a TensorDict ``[B]`` with ``index`` int64 (-1: a row that
    only fills the batch up), ``actions`` int64 ``[B, T]``, ``cost``, ``reference`` and ``gap`` ``[B]``.

    Args:
        draw: pictures of so many instances, the first of each set, then the second of each, and so on: PNG beside the
            routes, and TensorBoard where the run has it.

    Raises:
        ValueError: ``draw`` below 0; a datamodule of other data, a step that returns something else, or a route that
            breaks the rules.
        ImportError: pictures are asked for and matplotlib is not installed.
    """

    def __init__(self, draw: int = 8) -> None:
        if draw < 0:
            raise ValueError(f"RouteFiles: draw must be >= 0, got {draw}")
        self.draw = draw
        self._folder = Path()
        self._solved: list[SolvedInstance] = []
        self._lines: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks
        if stage not in ("test", "predict"):
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ProvidesRoutingInstances):
            raise ValueError(
                "RouteFiles: needs a datamodule of routing instances (datamodules.RoutingDataModule, "
                f"datamodules.RoutingLibDataModule), got {type(data).__name__}"
            )
        if self.draw:
            require("matplotlib.figure", extra=_EXTRA)  # not after hours of solving
        self._solved, self._lines = [], []

    # -- collecting ---------------------------------------------------------------------------------------------------
    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._collect(trainer.datamodule, f"{type(pl_module).__name__}.test_step", outputs, batch, dataloader_idx)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._collect(trainer.datamodule, f"{type(pl_module).__name__}.predict_step", outputs, batch, dataloader_idx)

    def _collect(self, data: Any, step: str, outputs: Any, batch: TensorDict, dataloader: int) -> None:
        if not isinstance(outputs, TensorDict) or any(key not in outputs.keys() for key in _OUTPUTS):  # noqa: SIM118
            got = ", ".join(map(str, outputs.keys())) if isinstance(outputs, TensorDict) else type(outputs).__name__
            raise ValueError(f"RouteFiles: {step} must return a TensorDict with {', '.join(_OUTPUTS)}, got {got}")
        data.problem.check(batch, outputs["actions"].unsqueeze(1).to(batch["locs"].device))
        solved = outputs.select(*_OUTPUTS).detach().cpu()
        points = batch["original"] if "original" in batch.keys() else batch["locs"]  # noqa: SIM118
        size = points.shape[1] - int(data.problem.spec.depot)
        index = solved["index"].tolist()
        numbers = zip(*(solved[key].double().tolist() for key in ("cost", "reference", "gap")), strict=True)
        for row, (number, (cost, reference, gap)) in enumerate(zip(index, numbers, strict=True)):
            if number < 0:
                continue
            drawn = points[row].detach().double().cpu() if number < self.draw else None
            actions = solved["actions"][row].clone()  # alone: a view would send the whole batch to other ranks
            one = SolvedInstance(dataloader, number, size, actions, cost, reference, gap, drawn)
            name = data.instance_name(dataloader, number)
            with atomic_write(self._path(data, name), "w") as stream:  # now: a kill takes only what is not solved
                stream.write(_text(data, one, name))
            self._solved.append(one)

    # -- writing ------------------------------------------------------------------------------------------------------
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self._write(trainer)
        if found is None:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._lines = _set_lines(summary_by_set([_row(data, one) for one in found]))
        self._lines.append(f"routes: {self._folder / 'routes'}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self._write(trainer)
        if found is None:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for one in found:
            row = _row(data, one)
            gap = "" if math.isnan(one.gap) else f", gap {one.gap:.2f} %"
            line = f"{_printable(row['name'])}: cost {_short(one.cost)}{gap}, {self._path(data, row['name'])}"
            self._lines.append(line)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for line in self._lines:  # only now is the progress bar closed
            print(line)
        self._lines = []

    def _write(self, trainer: Trainer) -> list[SolvedInstance] | None:
        """Everything that all ranks solved, in order, once it is on disk; ``None`` on other ranks than 0."""
        found = _gathered(self._solved, trainer.world_size)
        self._solved = []
        if not trainer.is_global_zero:
            return None
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        rows = [_row(data, one) for one in found]
        write_csv(self._folder / "routes.csv", COLUMNS, ([row[key] for key in COLUMNS] for row in rows))
        write_json(self._folder / "routes.json", {"instances": rows, "sets": summary_by_set(rows)})
        pictures = sorted((one for one in found if one.points is not None), key=lambda one: (one.index, one.dataloader))
        for one in pictures[: self.draw]:
            name = _row(data, one)["name"]
            figure = draw_routes(one, name, data.problem.spec.depot)
            path = self._path(data, name)
            write_png(figure, path.with_name(f"{path.name.removesuffix(path.suffix)}.png"))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"routes/{name}", figure, trainer.global_step)
        return found

    def _path(self, data: Any, name: str) -> Path:
        """Where the route of an instance goes, inside the run folder whatever its name is."""
        # one name, one path; "%" is quoted too, and a leading dot neither hides nor leaves the folder
        parts = [quote(part, safe=" +=,()@") for part in name.split("/")]
        parts = [f"%2E{part[1:]}" if part.startswith(".") else part or "%" for part in parts]
        suffix = ".sol" if data.problem.spec.depot else ".tour"
        return self._folder.joinpath("routes", *parts[:-1], parts[-1] + suffix)


def _gathered(mine: list[SolvedInstance], world: int) -> list[SolvedInstance]:
    """What all ranks found, each instance once, by set and number."""
    parts: list[Any] = [mine]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, mine)
    found = {(one.dataloader, one.index): one for part in reversed(parts) for one in part}
    return [found[key] for key in sorted(found)]


def _row(data: Any, one: SolvedInstance) -> dict[str, Any]:
    known = {"reference": one.reference, "gap": one.gap}
    return {
        "set": data.evaluation_sets[one.dataloader],
        "name": data.instance_name(one.dataloader, one.index),
        "size": one.size,
        "cost": one.cost,
        **{key: value if math.isfinite(value) else None for key, value in known.items()},
    }


def summary_by_set(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of rows with ``set``, ``name``, ``cost`` and ``gap`` (percent or ``None``), one for each set, in their order.

    Each has ``set``, ``instances``, ``mean_cost``, ``with_gap`` (instances whose gap is known) and, over these,
    ``mean_gap``, ``max_gap`` and ``worst`` (the name of the instance with it), ``None`` where there are none.
    """
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    summary = []
    for name, members in sets.items():
        known = [row for row in members if row["gap"] is not None]
        worst = max(known, key=lambda row: row["gap"], default=None)
        summary.append({
            "set": name,
            "instances": len(members),
            "mean_cost": math.fsum(row["cost"] for row in members) / len(members),
            "with_gap": len(known),
            "mean_gap": math.fsum(row["gap"] for row in known) / len(known) if known else None,
            "max_gap": worst["gap"] if worst else None,
            "worst": worst["name"] if worst else None,
        })  # fmt: skip
    return summary


def _set_lines(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for one in summary:
        line = f"{_printable(one['set'])}: {one['instances']} instances, mean cost {_short(one['mean_cost'])}"
        if one["with_gap"]:
            of = "" if one["with_gap"] == one["instances"] else f" of {one['with_gap']}"
            worst = _printable(one["worst"])
            line += f", mean gap{of} {one['mean_gap']:.2f} %, largest {one['max_gap']:.2f} % ({worst})"
        lines.append(line)
    return lines


# -- formats ----------------------------------------------------------------------------------------------------------
def trips(actions: Tensor) -> list[list[int]]:
    """``actions`` int64 ``[T]`` cut at the depot, 0: lists of customers, empty ones left out."""
    cut: list[list[int]] = [[]]
    for node in actions.tolist():
        if node:
            cut[-1].append(node)
        elif cut[-1]:
            cut.append([])
    return [trip for trip in cut if trip]


def tour_text(name: str, actions: Tensor, comment: str = "") -> str:
    """A TSPLIB 95 tour (Reinelt 1995, section 1.1.3) of ``actions`` int64 ``[N]``, nodes from 0."""
    name, comment = (_printable(text).replace('"', "'") for text in (name, comment))  # a quote opens a long comment
    lines = [f"NAME : {name}", *([f"COMMENT : {comment}"] if comment else []), "TYPE : TOUR"]
    lines += [f"DIMENSION : {len(actions)}", "TOUR_SECTION", *(str(node + 1) for node in actions.tolist()), "-1", "EOF"]
    return "\n".join([*lines, ""])


def solution_text(actions: Tensor, cost: float) -> str:
    """A CVRPLIB solution of ``actions`` int64 ``[T]``, in which 0 is the depot."""
    lines = [f"Route #{number}: {' '.join(map(str, trip))}" for number, trip in enumerate(trips(actions), 1)]
    return "\n".join([*lines, f"Cost {_plain(cost)}", ""])


def _text(data: Any, one: SolvedInstance, name: str) -> str:
    if data.problem.spec.depot:
        return solution_text(one.actions, one.cost)
    known = "" if math.isnan(one.reference) else f", reference {_plain(one.reference)}"
    return tour_text(name, one.actions, f"length {_plain(one.cost)}{known}")


def _plain(value: float) -> str:
    return str(int(value)) if value == round(value) else repr(value)


def _short(value: float) -> str:
    return str(int(value)) if value == round(value) else f"{value:.6g}"


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)


# -- pictures ---------------------------------------------------------------------------------------------------------
def draw_routes(one: SolvedInstance, name: str, depot: bool) -> Any:
    """A figure of an instance's nodes and its route: one closed line or, with a depot (node 0), a colour a trip."""
    assert one.points is not None
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(5.6, 5.6), layout="constrained")
    axes = figure.subplots()
    closed = [[0, *trip] for trip in trips(one.actions)] if depot else [one.actions.tolist()]
    colours = require("matplotlib", extra=_EXTRA).colormaps["tab20"]
    for number, trip in enumerate(closed):
        x, y = one.points[[*trip, trip[0]]].T.tolist()
        axes.plot(x, y, linewidth=1.2, color=colours(number * 2 % 20 + number // 10 % 2))  # ten strong ones first
    x, y = one.points.T.tolist()
    axes.scatter(x, y, s=10, color="black", zorder=2)
    if depot:
        axes.scatter(x[:1], y[:1], s=60, marker="s", color="tab:red", zorder=3)
    gap = "" if math.isnan(one.gap) else f", gap {one.gap:.2f} %"
    axes.set_title(f"{_printable(name)}: cost {_short(one.cost)}{gap}", fontsize=10, parse_math=False)
    axes.set_aspect("equal", adjustable="datalim")
    return figure
