"""What every routing module does alike: meet its problem, solve evaluation sets, report gaps and routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import DataSource, Subject
from modules.contracts import (
    DrawsRoutingInstances,
    ProvidesRoutingInstances,
    RequestsInstances,
    RoutingProblem,
    RoutingSpec,
)
from modules.population.ranks import RankModule
from modules.routing.solver import Decoding, RoutingSolver
from modules.seeds import global_seed, stream_seed

_EVALUATION_STREAM = 61  # keeps sampled evaluation routes apart from other uses of the run's seed


def optimality_gap(cost: Tensor, reference: Tensor) -> Tensor:
    """Percent by which ``cost`` lies above ``reference``; costs may be negative (collected prizes)."""
    return 100.0 * (cost - reference) / reference.abs()


class RoutingEvaluation(RankModule):
    """A LightningModule with a :class:`~modules.routing.solver.RoutingSolver` that is evaluated on sets of instances.

    A subclass implements :meth:`build` and has ``solver``. Metrics: ``<stage>/gap/<set>`` and ``<stage>/cost/<set>``,
    means over the instances of a set (gaps in percent, means of ratios), ``<stage>/gap``, ``<stage>/cost``, means over
    sets, ``<stage>/score``, minus the mean gap (higher is better), and ``instances`` that the solver was trained on.
    Sets without references have costs only. ``test_step`` and ``predict_step`` return a TensorDict ``[B]`` with
    ``index``, ``actions`` ``[B, T]``, ``cost``, ``reference`` and ``gap``.
    """

    solver: RoutingSolver | None

    def __init__(self, decoding: Decoding) -> None:
        super().__init__()
        self.decoding = decoding
        self.spec: RoutingSpec | None = None
        self.instances = 0
        """That the solver was trained on, over all ranks."""
        self._sums: dict[str, Tensor] = {}

    def build(self, spec: RoutingSpec) -> None:
        """Make the networks for the problem of ``spec``."""
        raise NotImplementedError

    @property
    def resuming(self) -> bool:
        """Whether a checkpoint is about to give the weights."""
        return self._trainer is not None and bool(self.trainer.ckpt_path)

    @property
    def data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    @property
    def problem(self) -> RoutingProblem:
        return self.data.problem

    def setup(self, stage: str) -> None:
        data = self.data
        if not isinstance(data, ProvidesRoutingInstances):
            raise ValueError(
                f"{type(self).__name__}: needs a datamodule of routing instances (datamodules.RoutingDataModule, "
                f"datamodules.RoutingLibDataModule), got {type(data).__name__}"
            )
        if self.spec is None:
            self.spec = data.problem.spec
            self.build(self.spec)
        check_spec(type(self).__name__, self.spec, data.problem.spec)

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def validation_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> TensorDict:
        return self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> TensorDict:
        return self._solve(batch)

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _solve(self, batch: TensorDict) -> TensorDict:
        assert self.solver is not None
        seed = stream_seed(global_seed(), _EVALUATION_STREAM)
        routes, cost = self.solver.solve(self.problem, batch, self.decoding, seed)
        reference = batch["reference"].to(cost.dtype)
        fields = {
            "index": batch["index"],
            "actions": routes,
            "cost": cost,
            "reference": reference,
            "gap": optimality_gap(cost, reference),
        }
        return TensorDict(fields, [len(cost)])

    def _evaluate(self, batch: TensorDict, dataloader: int) -> TensorDict:
        solved = self._solve(batch)
        real = solved["index"] >= 0
        cost, gap = solved["cost"][real], solved["gap"][real]
        known = ~gap.isnan()
        sums = torch.stack(
            [cost.sum(), gap[known].sum(), cost.new_tensor(float(len(cost))), known.sum().to(cost.dtype)]
        ).cpu()
        name = self.data.evaluation_sets[dataloader]
        self._sums[name] = self._sums.get(name, torch.zeros(4, dtype=torch.float64)) + sums.double()
        return solved

    def _report(self, stage: str) -> None:
        names = list(self.data.evaluation_sets)
        if not names:
            return
        empty = torch.zeros(4, dtype=torch.float64)
        sums = self.all_sum(torch.stack([self._sums.get(name, empty) for name in names]))
        metrics: dict[str, float] = {}
        for name, (cost, gap, count, known) in zip(names, sums.tolist(), strict=True):
            if count:
                metrics[f"{stage}/cost/{name}"] = cost / count
            if known:
                metrics[f"{stage}/gap/{name}"] = gap / known
        for kind in ("cost", "gap"):
            values = [value for key, value in metrics.items() if key.startswith(f"{stage}/{kind}/")]
            if values:
                metrics[f"{stage}/{kind}"] = sum(values) / len(values)
        if f"{stage}/gap" in metrics:
            metrics[f"{stage}/score"] = -metrics[f"{stage}/gap"]
        if self.instances:
            metrics["instances"] = float(self.instances)
        values = {key: torch.tensor(value, dtype=torch.float32) for key, value in metrics.items()}
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)  # equal on all ranks already

    def work_per_batch(self, batch: Any) -> int:
        """Instances of this rank in ``batch``."""
        return int(batch.shape[0]) if isinstance(batch, TensorDict) else 0

    # -- assurance ----------------------------------------------------------------------------------------------------
    def training_sources(self) -> list[DataSource]:
        """Where training instances come from: none of them is anybody's data."""
        if isinstance(self, RequestsInstances):
            return [DataSource("instances drawn at random, as the module asked for them", "CC0-1.0")]
        shares = self.data.training_shares() if isinstance(self.data, DrawsRoutingInstances) else {}
        return [DataSource(f"instances drawn at random: {name}", "CC0-1.0", share) for name, share in shares.items()]

    def assurance_subject(self) -> Subject:
        """As :class:`modules.contracts.Assurable` says: of the solver that ``test`` would use.

        Raises:
            AssuranceError: a datamodule that draws no instances.
        """
        from modules.routing.assurance import assurance_subject

        if self.trainer.testing:  # during training: of the solver as it stands
            self._use_kept()
        return assurance_subject(self, self.data, self.training_sources())

    def _use_kept(self) -> None:
        """Where a method keeps several solvers: take the one to test."""

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Take over the solver of any routing module's checkpoint; the rest starts anew.

        Raises:
            ValueError: no solver in it, or one of another problem or with other sizes.
        """
        from modules.routing.trained import solver_of, take_weights

        assert self.solver is not None
        owner = f"{type(self).__name__}: the checkpoint"
        take_weights(self.solver, solver_of(checkpoint, owner), owner)
        baseline = getattr(self, "baseline", None)
        if baseline is not None:
            baseline.start_from(self.solver)

    # -- checkpoint ---------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.spec is not None:
            checkpoint["routing_spec"] = vars(self.spec).copy()
            checkpoint["instances"] = self.instances
        if self.solver is not None:
            checkpoint["solver_settings"] = asdict(self.solver.settings)
        parent = cast(Any, super())
        if hasattr(parent, "on_save_checkpoint"):
            parent.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("routing_spec")
        if saved is None:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint holds no routing solver: another kind of module wrote it"
            )
        spec = RoutingSpec(**saved)
        if self.spec is None:
            self.spec = spec
            self.build(spec)
        check_spec(type(self).__name__, spec, self.spec)
        self.instances = int(checkpoint["instances"])
        parent = cast(Any, super())
        if hasattr(parent, "on_load_checkpoint"):
            parent.on_load_checkpoint(checkpoint)

    def digest(self) -> Mapping[str, str]:
        assert self.solver is not None
        total = sum((value.detach().double().sum() for value in self.solver.parameters()), torch.zeros(()))
        return {"weights": f"{float(total):.17g}", "problem": str(self.spec)}


def check_spec(owner: str, trained: RoutingSpec, wanted: RoutingSpec) -> None:
    """Raises: ValueError if a solver trained for one problem does not fit another."""
    shapes = [(s.depot, s.customer_features, s.context_features, s.closed) for s in (trained, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{owner}: the solver is one of problem {trained.name}, the datamodule has {wanted.name}: name a "
            "checkpoint of the same problem"
        )
