"""Instances that people have as files, TSPLIB95 and CVRPLIB, to test routing solvers on and to solve."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict

from datamodules.routing.distribution import unit_box
from datamodules.routing.lib_files import LibInstance, read_instance, read_optima
from datamodules.routing.problems import make_problem
from modules.contracts import RoutingProblem

SUFFIXES = {"tsp": ".tsp", "cvrp": ".vrp"}
"""What files of a problem are called; looked for where a folder is named."""


class RoutingLibDataModule(LightningDataModule):
    """Files of one problem as evaluation data; batches are as :class:`modules.contracts.ProvidesRoutingInstances` says.

    A batch is one instance ``[1]``, since sizes differ: ``locs`` float32 ``[1, N, 2]`` (normalised: what solvers see),
    ``original`` float64 ``[1, N, 2]`` and ``rounded`` bool ``[1]`` (what costs are measured in), ``index`` int64
    ``[1]``, ``reference`` float64 ``[1]`` (NaN where no optimum is known); of cvrp also ``demand`` float32
    ``[1, N - 1]``, shares of ``capacity`` int64 ``[1]``. Each folder is a set with a dataloader of its own, called like
    the folder, the smallest instance first. Rank r of W takes the instances ``r, r + W, ...`` of a set; ranks that
    would have one fewer repeat the smallest with ``index`` -1.

    Args:
        problem: ``tsp`` or ``cvrp``.
        files: files, folders (searched with all folders below them for ``.tsp`` or ``.vrp``) or patterns such as
            ``tsplib/kro*.tsp``.
        optima: CSV file with the columns ``name`` and ``optimum`` or ``best_known_cost``; a name is a file's name
            without suffix, or its NAME. ``null``: gaps are not known.
        max_size: customers of the largest instance to take; larger ones are left out.
        normalize: ``unit_box`` moves each instance to the origin and divides it by its larger side; ``none`` takes
            coordinates as they are, which must then lie in [0, 1].
        rounded: whether each distance is rounded to the nearest whole number, as EUC_2D and published optima have it.
            ``false`` with ``normalize: none``: in the unit square, rounded distances would be 0 or 1.

    Raises:
        ValueError: an unknown problem, ``files`` empty, ``max_size`` below 1, ``normalize: none`` with ``rounded``;
            from :meth:`setup`, a file that can't be read, or is of another problem, a folder without files, coordinates
            outside [0, 1] without normalisation, or optima none of which is of these instances.
        FileNotFoundError: from :meth:`setup`, an entry of ``files`` or ``optima`` that is not there.
    """

    def __init__(
        self,
        problem: Literal["tsp", "cvrp"],
        files: list[str],
        optima: str | None = None,
        max_size: int | None = None,
        normalize: Literal["unit_box", "none"] = "unit_box",
        rounded: bool = True,
    ) -> None:
        super().__init__()
        if problem not in SUFFIXES:
            raise ValueError(f"RoutingLibDataModule: problem must be {' or '.join(SUFFIXES)}, got {problem!r}")
        if isinstance(files, str) or not files:
            raise ValueError(f"RoutingLibDataModule: files must be a list of files, folders or patterns, got {files!r}")
        if max_size is not None and max_size < 1:
            raise ValueError(f"RoutingLibDataModule: max_size must be >= 1 or null, got {max_size}")
        if normalize not in ("unit_box", "none"):
            raise ValueError(f"RoutingLibDataModule: normalize must be unit_box or none, got {normalize!r}")
        if normalize == "none" and rounded:
            raise ValueError(
                "RoutingLibDataModule: rounded must be false with normalize none: distances between nodes in [0, 1] "
                "would be rounded to 0 or 1"
            )
        self.problem: RoutingProblem = make_problem(problem)
        self.files, self.optima, self.max_size = list(files), optima, max_size
        self.normalize, self.rounded = normalize, rounded
        self.evaluation_sets: Sequence[str] = []
        self._sets: list[list[TensorDict]] = []
        self._names: list[list[str]] = []
        self.save_hyperparameters(logger=False)

    # -- reading ------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Read all files, so that a broken one ends the run before anything is solved."""
        if stage == "fit":
            self._refuse_training()
        if self._sets:
            return
        kind = self.problem.spec.name
        optima = {} if self.optima is None else read_optima(Path(self.optima).expanduser())
        sets: dict[Path, list[tuple[Path, LibInstance]]] = {}
        large = 0
        for path in self._paths():
            instance = read_instance(path)
            if instance.kind != kind:
                raise ValueError(
                    f"RoutingLibDataModule: {path} is of TYPE {instance.kind.upper()}: set data.problem to "
                    f"{instance.kind}, or leave the file out"
                )
            if self.max_size is not None and instance.size > self.max_size:
                large += 1
                continue
            sets.setdefault(path.parent, []).append((path, instance))
        if not sets:
            raise ValueError(
                f"RoutingLibDataModule: max_size: all {large} instances have more than {self.max_size} customers"
            )
        labels = _folder_names(list(sets))
        for chosen in sets.values():
            chosen.sort(key=lambda entry: (entry[1].size, entry[0].name))
        stems = Counter(path.stem for chosen in sets.values() for path, _ in chosen)
        self._names = [
            [path.stem if stems[path.stem] == 1 else f"{label}/{path.stem}" for path, _ in chosen]
            for label, chosen in zip(labels, sets.values(), strict=True)
        ]
        twice = [name for name, count in Counter(name for names in self._names for name in names).items() if count > 1]
        if twice:
            raise ValueError(f"RoutingLibDataModule: files: two instances are called {twice[0]}: leave one out")
        read = [[self._row(path, one, i, optima) for i, (path, one) in enumerate(each)] for each in sets.values()]
        rows = [row for each in read for row in each]
        known = sum(not math.isnan(float(row["reference"])) for row in rows)
        if self.optima is not None and not known:
            raise ValueError(f"RoutingLibDataModule: optima: {self.optima} names none of the {len(rows)} instances")
        self._sets, self.evaluation_sets = read, labels
        left_out = f", {large} larger than {self.max_size} customers left out" if large else ""
        rank_zero_info(
            f"RoutingLibDataModule: {len(rows)} {kind} instances in {', '.join(labels)}, {known} with a known optimum"
            f"{left_out}"
        )

    def _paths(self) -> list[Path]:
        """The files named, each once, in order of appearance."""
        suffix = SUFFIXES[self.problem.spec.name]
        found: dict[Path, Path] = {}
        for entry in self.files:
            path = Path(entry).expanduser()
            if path.is_dir():
                paths = sorted(each for each in path.rglob("*") if each.suffix.lower() == suffix and each.is_file())
                if not paths:
                    raise ValueError(f"RoutingLibDataModule: files: no {suffix} file in folder {path}")
            elif path.exists():
                paths = [path]
            else:
                paths = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
                if not paths:
                    what = "no file matches" if glob.has_magic(str(path)) else "no such file or folder:"
                    raise FileNotFoundError(f"RoutingLibDataModule: files: {what} {path}")
            for each in paths:
                found.setdefault(each.resolve(), each.absolute())
        return list(found.values())

    def _row(self, path: Path, instance: LibInstance, index: int, optima: dict[str, float]) -> TensorDict:
        """The batch ``[1]`` of one instance."""
        original = instance.coordinates.unsqueeze(0)
        if self.normalize == "unit_box":
            locs = unit_box(original)
        else:
            locs = original
            if float(locs.amin()) < 0.0 or float(locs.amax()) > 1.0:
                raise ValueError(
                    f"RoutingLibDataModule: {path} has coordinates from {float(locs.amin()):g} to "
                    f"{float(locs.amax()):g}, outside [0, 1]: set normalize to unit_box"
                )
        reference = optima.get(path.stem, optima.get(instance.name, math.nan))
        fields = {
            "locs": locs.float(),
            "original": original,
            "rounded": torch.tensor([self.rounded]),
            "index": torch.tensor([index]),
            "reference": torch.tensor([reference], dtype=torch.float64),
        }
        if instance.demand is not None and instance.capacity is not None:
            fields["demand"] = (instance.demand.double() / instance.capacity).float().unsqueeze(0)
            fields["capacity"] = torch.tensor([instance.capacity])
        return TensorDict(fields, [1])

    def instance_name(self, dataloader: int, index: int) -> str:
        """The file's name without suffix, after its set's name where another set has a file of that name too."""
        return self._names[dataloader][index]

    # -- loaders ------------------------------------------------------------------------------------------------------
    def _refuse_training(self) -> NoReturn:
        raise ValueError(
            "RoutingLibDataModule: files are for validate, test and predict: train on datamodules.RoutingDataModule"
        )

    def train_dataloader(self) -> NoReturn:
        """Raises: ValueError: there is nothing to train on."""
        self._refuse_training()

    def val_dataloader(self) -> list[_FileBatches]:
        """One loader per name in ``evaluation_sets``; every rank has as many batches."""
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return [_FileBatches(rows, rank, world) for rows in self._sets]

    test_dataloader = predict_dataloader = val_dataloader

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a batch: N nodes."""
        described = {
            "locs": "float32 [1, N, 2]",
            "original": "float64 [1, N, 2]",
            "rounded": "bool [1]",
            "index": "int64 [1], number within the set",
            "reference": "float64 [1], NaN where no optimum is known",
        }
        if self.problem.spec.name == "cvrp":
            described |= {"demand": "float32 [1, N - 1], shares of the capacity", "capacity": "int64 [1]"}
        return described


class _FileBatches:
    """A set's instances of one rank; a rank that has none left repeats the first with ``index`` -1."""

    def __init__(self, rows: Sequence[TensorDict], rank: int, world: int) -> None:
        self._rows, self._rank, self._world = rows, rank, world

    def __len__(self) -> int:
        return -(-len(self._rows) // self._world)

    def __iter__(self) -> Iterator[TensorDict]:
        for number in range(self._rank, len(self) * self._world, self._world):
            if number < len(self._rows):
                yield self._rows[number].clone()
            else:
                filler = self._rows[0].clone()
                filler["index"] = torch.tensor([-1])
                yield filler


def _folder_names(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their own names, with as many parents' as it takes."""
    names: list[Any] = []
    for folder in folders:
        parts = [part for part in folder.parts if part != folder.anchor] or ["root"]
        rivals = [other.parts for other in folders if other != folder]
        depth = 1
        while depth < len(parts) and any(other[-depth:] == tuple(parts[-depth:]) for other in rivals):
            depth += 1
        names.append("/".join(parts[-depth:]))
    return names
