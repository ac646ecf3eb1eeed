"""Routing instances as data: drawn step by step, made to a module's order, or held out with an oracle's costs."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch import Tensor

from datamodules.routing.distributions import Distribution, Mixed, make_distribution, uniform_noise
from datamodules.routing.kinds import HeldOutKind, InstanceKind, add_references
from datamodules.text.loader import align_batch_progress, check_epoch_length, training_steps
from datamodules.text.specs import as_spec
from modules.contracts import InstanceRequest, RequestsInstances, RoutingProblem
from modules.files import canonical_digest
from modules.seeds import global_seed, stream

if TYPE_CHECKING:
    from datamodules.routing.oracles import References

TRAIN_STREAM, HELD_OUT_STREAM = 0x5254524E, 0x5254484F
"""First keys of our own random streams; far from the small numbers that modules use."""


@dataclass
class EvalSet:
    """Fixed instances of one distribution, a set per size.

    Args:
        sizes: customers per instance.
        count: instances per set, before those without a gap (cost 0) are dropped.
        distribution: as in :func:`datamodules.routing.distributions.make_distribution`; ``null``: the set's key.
        normalize: ``unit_box`` shows solvers each instance stretched to the unit square; costs stay those of the
            coordinates as drawn.
    """

    sizes: list[int] = field(default_factory=lambda: [20])
    count: int = 100
    distribution: str | dict[str, float] | None = None
    normalize: Literal["none", "unit_box"] = "none"


@dataclass(frozen=True)
class _HeldOut:
    """A held-out set: instances ``[K]`` with ``reference`` and ``index``."""

    instances: TensorDict
    dropped: int


def _rows(instances: TensorDict, rows: Any) -> TensorDict:
    return instances[rows]  # pyright: ignore[reportReturnType]


class RoutingDataModule(LightningDataModule):
    """Instances of one routing problem; batches are as :class:`modules.contracts.ProvidesRoutingInstances` says.

    Training instances are never stored: those of a step are a function of the run's seed and the step, drawn for all
    ranks on every rank, which then takes its share. So any number of ranks sees the same instances, and a resumed run
    those that it would have seen. A module with ``instance_request`` names the instances of each step itself
    (:class:`modules.contracts.RequestsInstances`). Held-out sets are functions of ``seed``, distribution, size and
    count, never of the run's seed; validation and testing have one dataloader per set.

    Args:
        problem: name of the problem, e.g. ``tsp``.
        size: customers of training instances; of several, step t (from 0) takes number ``t % len(size)``.
        distribution: of training coordinates: a name, perhaps with parameters (``"gaussian_mixture(clusters=5)"``), a
            mapping from such names to weights (drawn per instance), or an object.
        batch_size: instances per optimiser step, over all ranks and accumulated micro-batches.
        steps_per_epoch: training steps of an epoch; ``null``: ``trainer.max_steps``, the whole run.
        eval_sets: name to :class:`EvalSet`; the sets are called ``<name>/<size>``.
        eval_batch_size: held-out instances per batch over all ranks; ``null``: ``batch_size``.
        oracle: what computes reference costs; ``auto``: the best one at hand for problem and size; ``null``: none
            (references are NaN).
        oracle_workers: processes that it runs in; 0: this one.
        cache_dir: folder for the references of held-out sets, shared by runs; ``null``: computed in each run.
        problem_options: constructor arguments of the problem, e.g. ``{capacity: 50}``.
        seed: of the held-out sets.

    Raises:
        ValueError: a number out of range, an unknown problem, distribution or oracle, a size that the problem has no
            rule for, or counts that ranks and micro-batches cannot share equally.
    """

    def __init__(
        self,
        problem: str,
        size: int | list[int] = 20,
        distribution: str | dict[str, float] | Distribution = "uniform",
        batch_size: int = 64,
        steps_per_epoch: int | None = None,
        eval_sets: dict[str, EvalSet] | None = None,
        eval_batch_size: int | None = None,
        oracle: str | None = "auto",
        oracle_workers: int = 0,
        cache_dir: str | None = None,
        problem_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        from datamodules.routing.problems import make_problem

        self.problem: RoutingProblem = make_problem(problem, **(problem_options or {}))
        self.sizes = [size] if isinstance(size, int) else list(size)
        self.distribution = make_distribution(distribution)
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.oracle, self.oracle_workers, self.cache_dir = oracle, oracle_workers, cache_dir
        self.problem_options, self.seed = dict(problem_options or {}), seed
        sets = {name: as_spec(EvalSet, given) for name, given in (eval_sets or {}).items()}
        least = {"batch_size": 1, "eval_batch_size": 1, "oracle_workers": 0, "seed": 0}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise ValueError(f"RoutingDataModule: {key} must be >= {value}, got {getattr(self, key)}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"RoutingDataModule: steps_per_epoch must be >= 1 or null, got {steps_per_epoch}")
        self._check_sizes("size", self.sizes)
        self._plans = [plan for name, given in sets.items() for plan in self._planned(name, given)]
        self.evaluation_sets: Sequence[str] = [plan.name for plan in self._plans]
        self._held_out: dict[str, _HeldOut] = {}
        self._accumulated: int | None = None
        # plain values: a checkpoint with objects in it could not be loaded with weights_only=True
        plain: dict[str, Any] = {"eval_sets": {name: asdict(given) for name, given in sets.items()}}
        if isinstance(distribution, Distribution):
            plain["distribution"] = str(distribution)
        self.save_hyperparameters(logger=False)
        self.hparams.update(plain)

    # -- settings -----------------------------------------------------------------------------------------------------
    def _check_sizes(self, key: str, sizes: Sequence[int]) -> None:
        """Refuse sizes out of range, repeated, or without a rule, before anything is drawn."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"RoutingDataModule: {key} must be numbers >= 1, got {list(sizes)}")
        for size in set(sizes):
            self._draw_one(size)

    def _draw_one(self, size: int) -> TensorDict:
        generator = stream(0)
        return self.problem.generate(uniform_noise(1, self.problem.nodes(size), generator), generator)

    def _planned(self, name: str, given: EvalSet) -> list[HeldOutKind]:
        where = f"eval_sets.{name}"
        sizes = [given.sizes] if isinstance(given.sizes, int) else list(given.sizes)
        self._check_sizes(f"{where}.sizes", sizes)
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"RoutingDataModule: {where}.sizes: each size once, got {sizes}")
        if given.count < 1:
            raise ValueError(f"RoutingDataModule: {where}.count must be >= 1, got {given.count}")
        if given.normalize not in ("none", "unit_box"):
            raise ValueError(f"RoutingDataModule: {where}.normalize must be none or unit_box, got {given.normalize!r}")
        distribution = make_distribution(name if given.distribution is None else given.distribution)
        return [HeldOutKind(f"{name}/{size}", distribution, size, given.normalize, given.count) for size in sizes]

    def _identity(self) -> dict[str, Any]:
        """What decides the instances and references of a run, in plain values."""
        return {
            "problem": self.problem.spec.name,
            "problem_options": self.problem_options,
            "size": self.sizes,
            "distribution": str(self.distribution),
            "batch_size": self.batch_size,
            "eval_sets": [[p.name, str(p.distribution), p.size, p.count, p.normalize] for p in self._plans],
            "oracle": self.oracle,
            "seed": self.seed,
            "seed_everything": global_seed(),
        }

    def digest(self) -> dict[str, str]:
        """What every rank must agree on before training."""
        return {key: str(value) for key, value in self._identity().items()}

    def describe(self) -> dict[str, str]:
        """Keys, dtypes and shapes of a training batch on this rank; B and N where they change from step to step."""
        trainer, rows, size = self.trainer, "B", "N"
        if trainer is not None and not isinstance(trainer.lightning_module, RequestsInstances):
            rows = str(self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
            size = str(self.sizes[0]) if len(self.sizes) == 1 else "N"
        described = {"index": f"int64 [{rows}], number within the step"}
        for key, value in self._draw_one(self.sizes[0]).items():
            shape = [rows, *("N" if size == "N" and side > 2 else str(side) for side in value.shape[1:])]
            described[str(key)] = f"{str(value.dtype).removeprefix('torch.')} [{', '.join(shape)}]"
        return described

    # -- set-up -------------------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        # alone (the verb `prepare`) it fills the cache; in a run, setup does, spread over the ranks
        if self.trainer is None and self.cache_dir is not None:
            self._make_sets()

    def setup(self, stage: str) -> None:
        """Make the held-out sets where the stage evaluates on them; a module's own requests make them when they come.

        Raises: ValueError where ranks cannot share a batch equally or there is nothing to validate or test on,
        ImportError where the oracle is not installed.
        """
        trainer = self.trainer
        if not self._plans:
            if stage in ("validate", "test", "predict"):
                raise ValueError("RoutingDataModule: eval_sets is empty, there is nothing to evaluate on: name a set")
            if trainer is not None:
                trainer.limit_val_batches = 0  # Lightning takes an empty list of loaders for a loader
        if stage == "fit" and trainer is not None and not isinstance(trainer.lightning_module, RequestsInstances):
            parts = trainer.world_size * trainer.accumulate_grad_batches
            if self.batch_size % parts:
                raise ValueError(
                    f"RoutingDataModule: batch_size must be a multiple of ranks x accumulate_grad_batches = {parts}, "
                    f"got {self.batch_size}"
                )
        skipped = stage == "fit" and trainer is not None and trainer.limit_val_batches == 0
        if not skipped:
            self._make_sets()

    def _make_sets(self) -> None:
        for name in self.evaluation_sets:
            self.held_out(name)

    @property
    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    # -- references ---------------------------------------------------------------------------------------------------
    def _costs(self, instances: TensorDict, size: int, cache_dir: str | None) -> Tensor:
        """``[B]`` float64: the oracle's costs, NaN without one."""
        if self.oracle is None:
            return torch.full((len(instances),), float("nan"), dtype=torch.float64)
        return self._references(size, cache_dir).costs(self.problem, instances)

    def _references(self, size: int, cache_dir: str | None) -> References:
        from datamodules.routing.oracles import References, default_oracle

        oracle = default_oracle(self.problem.spec.name, size) if self.oracle in (None, "auto") else self.oracle
        return References(oracle, cache_dir, self.oracle_workers)

    def _shared_costs(self, instances: TensorDict, size: int) -> Tensor:
        """As ``_costs``, each rank doing its part: all ranks end up with equal numbers."""
        rank, world = self._place
        if world == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._costs(instances, size, self.cache_dir)
        mine = None
        if rank < len(instances):
            mine = self._costs(_rows(instances, slice(rank, None, world)), size, self.cache_dir)
        parts: list[Tensor | None] = [None] * world
        torch.distributed.all_gather_object(parts, mine)
        costs = torch.empty(len(instances), dtype=torch.float64)
        for number, part in enumerate(parts):
            if part is not None:
                costs[number::world] = part
        return costs

    def held_out(self, name: str) -> TensorDict:
        """A held-out set, ``[K]``: the problem's fields, ``index`` and ``reference`` (made at the first call).

        Raises:
            ValueError: no such set, or one whose instances all cost 0.
        """
        if name not in self._held_out:
            self._held_out[name] = self._make_set(self._plan(name))
        return self._held_out[name].instances

    @property
    def dropped(self) -> dict[str, int]:
        """Instances dropped of each set made so far, because an optimal solution costs nothing: they have no gap."""
        return {name: made.dropped for name, made in self._held_out.items()}

    def _plan(self, name: str) -> HeldOutKind:
        for plan in self._plans:
            if plan.name == name:
                return plan
        known = difflib.get_close_matches(name, self.evaluation_sets, 3) or self.evaluation_sets
        raise ValueError(f"RoutingDataModule: eval_sets has no {name!r}; nearest: {', '.join(known) or 'it is empty'}")

    def _make_set(self, plan: HeldOutKind) -> _HeldOut:
        identity = int(canonical_digest(str(plan.distribution))[:16], 16)
        generator = stream(self.seed, HELD_OUT_STREAM, identity, plan.size)
        locs = plan.distribution.sample(plan.count, self.problem.nodes(plan.size), generator)
        instances = plan.make(self.problem, locs, generator)
        reference = self._shared_costs(instances, plan.size)
        kept = (reference != 0).nonzero().flatten()
        dropped = len(reference) - len(kept)
        if len(kept) == 0:
            raise ValueError(f"RoutingDataModule: {plan.name}: every instance has cost 0, a gap is undefined")
        if dropped:
            warnings.warn(
                f"RoutingDataModule: {plan.name}: {dropped} of {len(reference)} instances dropped: their reference "
                "cost is 0, a gap is undefined",
                stacklevel=2,
            )
        instances = _rows(instances, kept)
        instances["reference"] = reference[kept]
        instances["index"] = torch.arange(len(kept))
        return _HeldOut(instances, dropped)

    # -- fresh instances, for assurance ------------------------------------------------------------------------------
    def fresh_instances(
        self, kinds: Sequence[str], count: int, seed: int, keep: bool = False, references: bool = True
    ) -> dict[str, TensorDict]:
        """As :class:`modules.contracts.DrawsRoutingInstances` says; with ``oracle: null`` by the best one at hand."""
        known = {name: self._kind(name) for name in kinds}
        drawn = {name: kind.fresh(self.problem, count, seed) for name, kind in known.items()}
        if references:
            folder = self.cache_dir if keep else None
            add_references(drawn, known, lambda batch, size: self._references(size, folder).solve(self.problem, batch))
        return drawn

    def _kind(self, name: str) -> InstanceKind:
        distribution, slash, size = name.rpartition("/")
        if name in self.evaluation_sets or not (slash and size.isdigit()):
            return self._plan(name)
        return InstanceKind(name, make_distribution(distribution), int(size))

    def reference_name(self, size: int) -> str:
        return self._references(size, None).oracle.name

    def training_shares(self) -> dict[str, float]:
        """Distribution -> its share of training instances, where the module does not ask for others."""
        return self.distribution.shares() if isinstance(self.distribution, Mixed) else {str(self.distribution): 1.0}

    # -- batches ------------------------------------------------------------------------------------------------------
    def _draw(self, request: InstanceRequest) -> TensorDict:
        """The instances of all ranks, with ``index`` and perhaps ``noise``."""
        generator = stream(global_seed(), *request.key)
        noise = uniform_noise(request.count, self.problem.nodes(request.size), generator)
        make = self.distribution if request.coordinates is None else request.coordinates
        with torch.no_grad():
            locs = make(noise, generator)
        if locs.shape != noise.shape:
            raise ValueError(
                f"RoutingDataModule: coordinates must be {list(noise.shape)} like the noise, got {list(locs.shape)}"
            )
        locs = locs.to(noise)
        if request.coordinates is not None and not bool(((locs >= -1e-5) & (locs <= 1 + 1e-5)).all()):  # NaN fails too
            raise ValueError(
                "RoutingDataModule: coordinates must be finite and in [0, 1], got "
                f"{float(locs.amin())} to {float(locs.amax())}"
            )
        instances = self.problem.generate(locs, generator)
        instances["index"] = torch.arange(request.count)
        if request.coordinates is not None:
            instances["noise"] = noise
        return instances

    def batch(self, request: InstanceRequest | None) -> TensorDict:
        """This rank's share of the instances asked for; empty for ``None``.

        Raises:
            ValueError: a count that ranks cannot share equally, more instances than the held-out set has, another size
                than its, an unknown set, or coordinates that are not finite numbers in [0, 1].
        """
        if request is None:
            return TensorDict({}, [0])
        rank, world = self._place
        if request.count < 1 or request.count % world:
            raise ValueError(
                f"RoutingDataModule: a request's count must be a positive multiple of the {world} ranks, "
                f"got {request.count}"
            )
        share = request.count // world
        rows = slice(rank * share, (rank + 1) * share)
        if request.held_out is not None:
            plan, instances = self._plan(request.held_out), self.held_out(request.held_out)
            if plan.size != request.size or len(instances) < request.count:
                raise ValueError(
                    f"RoutingDataModule: {plan.name} has {len(instances)} instances of size {plan.size}, asked for "
                    f"were {request.count} of size {request.size}"
                )
            mine = _rows(instances, rows).clone()
            return mine if request.references else mine.exclude("reference")
        mine = _rows(self._draw(request), rows).clone()
        if request.references:
            mine["reference"] = self._costs(mine.exclude("noise", "index"), request.size, None)  # never comes again
        return mine

    def step_instances(self, step: int) -> TensorDict:
        """The instances of training step ``step`` (from 0), of all ranks and micro-batches."""
        size = self.sizes[step % len(self.sizes)]
        return self._draw(InstanceRequest(size, self.batch_size, (TRAIN_STREAM, step)))

    # -- loaders ------------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> _TrainBatches:
        """This rank's batches, from where the trainer stands."""
        trainer = self.trainer
        steps = self.steps_per_epoch or training_steps(trainer, "RoutingDataModule")
        assert trainer is not None
        loader = _TrainBatches(self, steps)
        check_epoch_length(len(loader), trainer, "RoutingDataModule")
        if self._accumulated is not None:
            align_batch_progress(trainer, self._accumulated)
        return loader

    def val_dataloader(self) -> list[_SetBatches]:
        """One loader per name in ``evaluation_sets``; every rank has as many rows."""
        rank, world = self._place
        sets = [self.held_out(name) for name in self.evaluation_sets]
        return [_SetBatches(made, self.eval_batch_size, rank, world) for made in sets]

    test_dataloader = predict_dataloader = val_dataloader

    def instance_name(self, dataloader: int, index: int) -> str:
        """``<set>/<index>``."""
        return f"{self.evaluation_sets[dataloader]}/{index}"

    # -- exact position: the trainer's count of batches is all there is -----------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return {**self._identity(), "accumulate_grad_batches": accumulate}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises: ValueError naming the first setting that is not the checkpoint's, when training goes on from it."""
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        for key, now in self._identity().items():
            if state_dict.get(key) != now:
                raise ValueError(
                    f"RoutingDataModule: the checkpoint was trained on other data: {key} was {state_dict.get(key)}, is "
                    f"{now}; restore it, or start anew from the checkpoint's weights"
                )
        self._accumulated = state_dict["accumulate_grad_batches"]


class _TrainBatches:
    """Batches made when they are asked for: sized, so that Lightning fetches none ahead of the step that needs it.

    A plain iterable, whose ``__len__`` counts an epoch from its start, while iteration goes on from the trainer's
    count of finished batches: that count is in every checkpoint, so the position is exact.
    """

    def __init__(self, data: RoutingDataModule, steps: int) -> None:
        self._data, self._steps = data, steps

    @property
    def _trainer(self) -> Any:
        return self._data.trainer

    def __len__(self) -> int:
        return self._steps * self._trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[TensorDict]:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        first, left = progress.total.completed, len(self) - progress.current.completed
        module = self._trainer.lightning_module
        if isinstance(module, RequestsInstances):
            for _ in range(left):
                yield self._data.batch(module.instance_request())
        else:
            yield from self._own(first, left)

    def _own(self, first: int, count: int) -> Iterator[TensorDict]:
        accumulate = self._trainer.accumulate_grad_batches
        rank, world = self._data._place
        rows = self._data.batch_size // (accumulate * world)
        step, instances = -1, TensorDict({}, [0])
        for number in range(first, first + count):
            if number // accumulate != step:
                step = number // accumulate
                instances = self._data.step_instances(step)
            start = (number % accumulate * world + rank) * rows
            yield _rows(instances, slice(start, start + rows)).clone()

    # Having these two tells Lightning that a resume inside an epoch is safe.
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        pass


class _SetBatches:
    """A held-out set in order: every rank takes its contiguous share of each global batch, of equal size.

    Rows that only fill up repeat the set's first instance with ``index`` -1.
    """

    def __init__(self, instances: TensorDict, batch_size: int, rank: int, world: int) -> None:
        self._instances, self._batch_size, self._rank, self._world = instances, batch_size, rank, world

    def __len__(self) -> int:
        return -(-len(self._instances) // self._batch_size)

    def __iter__(self) -> Iterator[TensorDict]:
        total = len(self._instances)
        for first in range(0, total, self._batch_size):
            end = min(first + self._batch_size, total)
            share = -(-(end - first) // self._world)
            rows = first + self._rank * share + torch.arange(share)
            filled = rows < end
            batch = _rows(self._instances, torch.where(filled, rows, 0))
            batch["index"] = torch.where(filled, rows, -1)
            yield batch
