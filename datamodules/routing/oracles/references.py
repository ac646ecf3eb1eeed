"""Reference costs of batches: the oracle's routes, checked and measured by the problem itself, kept on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.routing.oracles.base import Oracle, Route, instances_of
from datamodules.routing.oracles.exact import LARGEST, Exact
from datamodules.routing.oracles.heuristics import Insertion, RuinRecreate, TwoOpt
from datamodules.routing.oracles.packages import Elkai, ORTools, PrizeCollecting, PyVRP
from datamodules.routing.problem import Problem
from modules.contracts import RoutingProblem
from modules.files import atomic_write

log = logging.getLogger(__name__)
_FIELDS = ("locs", "original", "rounded", "demand", "capacity", "prize", "real_prize", "penalty", "limit")
_CHUNK = 16
"""Instances that a worker process solves at a time."""
_SAVED = 32
"""Chunks after which results are kept on disk, so that a run that is killed loses no more."""

NAMED = {
    "exact": Exact,
    "elkai": Elkai,
    "pyvrp": PyVRP,
    "ortools": ORTools,
    "prize_collecting": PrizeCollecting,
    "ruin_recreate": RuinRecreate,
    "two_opt": TwoOpt,
    "nearest_insertion": lambda: Insertion("nearest"),
    "farthest_insertion": lambda: Insertion("farthest"),
    "random_insertion": lambda: Insertion("random"),
}
_told: set[str] = set()


def make_oracle(name: str) -> Oracle:
    """The oracle called ``name``, or ``name(number)`` with its first setting, e.g. ``elkai(10)``.

    Raises:
        ValueError: an unknown name, naming those that are known.
        ImportError: its package is not installed.
    """
    head, bracket, rest = name.partition("(")
    if head not in NAMED or (bracket and not (rest.endswith(")") and rest[:-1].isdigit())):
        raise ValueError(f"oracle: unknown oracle {name!r}; there are auto, {', '.join(NAMED)}, and e.g. elkai(10)")
    if head.endswith("_insertion") or head in ("exact", "two_opt"):
        if rest:
            raise ValueError(f"oracle: {head} has no setting, got {name!r}")
        return NAMED[head]()
    return NAMED[head](int(rest[:-1])) if rest else NAMED[head]()


def default_oracle(problem: str, size: int) -> Oracle:
    """The best oracle at hand for ``problem`` with ``size`` customers; without packages a built-in one.

    Packages that would give better references are named once in the log.
    """
    if problem == "tsp":
        if _installed("elkai", "lkh"):
            return Elkai()
        return Exact() if size <= LARGEST["tsp"] else RuinRecreate()
    if problem in ("cvrp", "sdvrp"):
        if problem == "cvrp" and size <= 7:
            return Exact()
        return PyVRP() if _installed("pyvrp") else RuinRecreate()
    if problem in LARGEST and size <= LARGEST[problem]:
        return Exact()
    # OR-Tools finds worse tours, and what it finds in its seconds depends on the machine
    if problem in ("pctsp", "spctsp") and _installed("pyvrp"):
        return PrizeCollecting()
    if problem == "op" and _installed("pyvrp"):
        return PyVRP()
    return RuinRecreate()


def _installed(package: str, extra: str = "routing") -> bool:
    here = importlib.util.find_spec(package) is not None
    if not here and package not in _told:
        _told.add(package)
        log.info("%s is not installed, another oracle is used: pip install 'plumbline[%s]' brings it", package, extra)
    return here


def _solve_part(oracle: Oracle, problem: str, arrays: dict[str, np.ndarray]) -> list[Route]:
    fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return oracle.solve(instances_of(problem, TensorDict(fields, [len(fields["locs"])])))


def _padded(routes: list[Route]) -> Tensor:
    """``[B, T]`` int64, T >= 1: routes, then the depot."""
    longest = max(1, max(len(route) for route in routes))
    return torch.tensor([[*route, *[0] * (longest - len(route))] for route in routes], dtype=torch.int64)


class References:
    """Costs and routes of an oracle.

    Args:
        oracle: an oracle, or its name.
        cache_dir: folder in which results are kept, some hundred a file, found again by the content of each instance
            and the oracle's name, so that ranks and runs can share it. ``None``: nothing is kept.
        workers: processes to solve in; 0 or 1: this one.

    Damaged files and kept routes that break a rule are left out with a warning.

    Raises:
        ValueError: an unknown oracle, or workers < 0.
        ImportError: the oracle's package is not installed.
    """

    def __init__(self, oracle: Oracle | str, cache_dir: str | Path | None = None, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"References: workers must be >= 0, got {workers}")
        self.oracle = make_oracle(oracle) if isinstance(oracle, str) else oracle
        self.folder = None if cache_dir is None else Path(cache_dir)
        self.workers = workers

    def costs(self, problem: RoutingProblem, instances: TensorDict) -> Tensor:
        """``[B]`` float64 costs of :meth:`routes`, measured by the problem in float64."""
        return self._solved(problem, instances)[1]

    def routes(self, problem: RoutingProblem, instances: TensorDict) -> Tensor:
        """``[B, T]`` int64 routes, waiting at the depot at their ends; they pass the problem's own check.

        Raises:
            ValueError: instances that cannot be solved, or an oracle's route that breaks a rule.
            RuntimeError: a worker process died.
        """
        return self._solved(problem, instances)[0]

    def solve(self, problem: RoutingProblem, instances: TensorDict) -> tuple[Tensor, Tensor]:
        """:meth:`routes` and :meth:`costs` at once."""
        return self._solved(problem, instances)

    def _solved(self, problem: RoutingProblem, instances: TensorDict, use_kept: bool = True) -> tuple[Tensor, Tensor]:
        name = problem.spec.name
        if not len(instances):
            return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        instances = instances.to("cpu")
        exact = TensorDict(
            {k: v.double() if v.is_floating_point() else v for k, v in instances.items()}, instances.shape
        )
        if isinstance(problem, Problem):
            problem.check_instances(exact)  # NaN would keep oracles busy for ever
        self._tell(name)
        keys = self._keys(name, instances)
        known = self._load(set(keys)) if use_kept else {}
        kept = bool(known)
        missing = list({key: number for number, key in enumerate(keys) if key not in known}.values())
        for numbers, routes in self._solve(name, instances, missing):
            problem.check(exact[numbers], _padded(routes).unsqueeze(1))  # wrong ones are not kept
            found = dict(zip((keys[number] for number in numbers), routes, strict=True))
            known.update(found)
            self._keep(found)
        padded = _padded([known[key] for key in keys])
        actions = padded.unsqueeze(1)
        try:
            problem.check(exact, actions)
        except ValueError as error:
            if not kept:
                raise
            log.warning("routes kept in %s break a rule, all are computed anew: %s", self.folder, error)
            return self._solved(problem, instances, use_kept=False)
        return padded, problem.cost(exact, actions).squeeze(1).double()

    def _tell(self, problem: str) -> None:
        line = f"reference costs of {problem} by {self.oracle.name}"
        if line not in _told:
            _told.add(line)
            kind = "proven optima" if self.oracle.exact else "a heuristic: gaps to it can be negative"
            log.info("%s (%s)", line, kind)

    def _solve(
        self, problem: str, instances: TensorDict, numbers: list[int]
    ) -> Iterator[tuple[list[int], list[Route]]]:
        """Routes of the instances ``numbers``, in parts."""
        parts = [numbers[first : first + _CHUNK] for first in range(0, len(numbers), _CHUNK)]
        if self.workers <= 1 or len(parts) <= 1:
            joined = [sum(parts[first : first + _SAVED], []) for first in range(0, len(parts), _SAVED)]
            for part in joined:
                yield part, self.oracle.solve(instances_of(problem, instances[part]))
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(self.workers, len(parts)), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            # as plain arrays: pickled tensors would take a file descriptor each
            arrays = [{k: instances[k][part].numpy() for k in _FIELDS if k in instances} for part in parts]
            done = zip(parts, pool.map(_solve_part, repeat(self.oracle), repeat(problem), arrays), strict=True)
            while some := list(islice(done, _SAVED)):
                yield sum((part for part, _ in some), []), sum((routes for _, routes in some), [])
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"References: a process of {self.oracle.name} died (killed, or out of memory): use fewer workers "
                f"than {self.workers}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what is queued

    # -- on disk ------------------------------------------------------------------------------------------------------
    def _keys(self, problem: str, instances: TensorDict) -> list[str]:
        parts = [(name, instances.get(name, None)) for name in _FIELDS]
        arrays = [(name, value.cpu().contiguous().numpy()) for name, value in parts if value is not None]
        keys = []
        for number in range(len(instances)):
            version = "" if self.oracle.version == 1 else f";{self.oracle.version}"
            sha = hashlib.sha256(f"{problem};{self.oracle.name}{version}".encode())
            for name, array in arrays:
                sha.update(f";{name}:{array.dtype}:{array.shape[1:]};".encode())
                sha.update(np.ascontiguousarray(array[number]).tobytes())
            keys.append(sha.hexdigest())
        return keys

    def _files(self) -> Iterator[Path]:
        if self.folder is None:
            return
        label = hashlib.sha256(self.oracle.name.encode()).hexdigest()[:16]
        yield from sorted((self.folder / label).glob("*.npz")) if (self.folder / label).is_dir() else []

    def _load(self, wanted: set[str]) -> dict[str, Route]:
        known: dict[str, Route] = {}
        for file in self._files():
            try:
                # opened here: numpy leaves the file of a damaged archive open
                with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                    keys, routes, lengths = content["keys"], content["routes"], content["lengths"]
                kinds = (keys.dtype.kind, keys.ndim, routes.dtype.kind, routes.ndim, lengths.dtype.kind, lengths.ndim)
                if kinds != ("U", 1, "i", 2, "i", 1) or not len(keys) == len(routes) == len(lengths):
                    raise ValueError("not the arrays of a cache")
                rows = [row for row, key in enumerate(keys.tolist()) if key in wanted]
                known.update({str(keys[row]): routes[row, : lengths[row]].tolist() for row in rows})
            except Exception as error:  # damage shows as whatever zipfile, zlib or numpy trip over
                log.warning("%s is damaged and left out, its costs are computed anew: %s", file, error)
        return known

    def _keep(self, found: dict[str, Route]) -> None:
        if self.folder is None:
            return
        longest = max(1, max(len(route) for route in found.values()))
        routes = np.array([[*route, *[0] * (longest - len(route))] for route in found.values()], dtype=np.int32)
        keys = np.array(list(found))
        label = hashlib.sha256(self.oracle.name.encode()).hexdigest()[:16]
        digest = hashlib.sha256("".join(found).encode()).hexdigest()[:32]
        file = self.folder / label / f"{digest}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as stream:
            lengths = np.array([len(route) for route in found.values()], dtype=np.int32)
            np.savez_compressed(stream, keys=keys, routes=routes, lengths=lengths)
