"""The protocols that routing problems, solvers and datamodules meet in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from tensordict import TensorDict


@dataclass(frozen=True)
class RoutingSpec:
    """What a routing solver must know of its problem before it can build networks.

    ``depot``: node 0 is one (else every node is a customer). ``customer_features``: numbers per customer beside its
    coordinates. ``context_features``: numbers of a partial route that a decision sees beside the current node.
    ``closed``: routes return to their first node and a decision sees that node (the travelling salesman).
    """

    name: str
    depot: bool
    customer_features: int
    context_features: int
    closed: bool


@runtime_checkable
class RoutingProblem(Protocol):
    """The rules of a routing problem on raw tensors: B instances, P partial routes of each, N nodes (with the depot).

    Instances are a TensorDict ``[B]`` with ``locs`` ``[B, N, 2]``, the coordinates that solvers see, and what else the
    problem names. Instances read from files also have ``original`` float64 ``[B, N, 2]``, the coordinates that costs
    are measured in, and ``rounded`` bool ``[B]``, whether each distance is rounded to the nearest integer.

    A state is a dictionary of tensors ``[B, P, ...]``; its entries ``current`` int64 ``[B, P]`` (node) and ``allowed``
    bool ``[B, P, N]`` (nodes that may come next, at least one) are read by solvers, the rest is the problem's own. A
    finished route stays at the depot at no cost. All work is batched and on the device of the instances.
    """

    spec: ClassVar[RoutingSpec]

    def generate(self, locs: torch.Tensor, generator: torch.Generator) -> TensorDict:
        """Instances ``[B]`` at coordinates ``locs`` ``[B, N, 2]``, everything else drawn from ``generator``.

        Raises:
            ValueError: a size for which the problem has no rule.
        """
        ...

    def nodes(self, size: int) -> int:
        """N of an instance of ``size`` customers."""
        ...

    def customer_features(self, instances: TensorDict) -> torch.Tensor:
        """``[B, customers, customer_features]``: what a solver may know of customers beside their coordinates."""
        ...

    def starts(self, instances: TensorDict) -> torch.Tensor:
        """``[B, customers]`` int64: first actions that force rollouts apart (POMO), each allowed at the start."""
        ...

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, torch.Tensor]:
        """The state before the first decision of ``rollouts`` routes per instance."""
        ...

    def step(self, state: dict[str, torch.Tensor], action: torch.Tensor) -> None:
        """Move every route on to ``action`` ``[B, P]``, in place (entries may be replaced)."""
        ...

    def context(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """``[B, P, context_features]``; ``None`` where there are none."""
        ...

    def finished(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[B, P]`` bool: no decision is left."""
        ...

    def max_steps(self, nodes: int) -> int:
        """Decisions after which every route is finished."""
        ...

    def cost(self, instances: TensorDict, actions: torch.Tensor) -> torch.Tensor:
        """``[B, P]`` costs of complete routes ``actions`` ``[B, P, T]``, lower is better, in the dtype of coordinates.

        Sums are of ``original`` coordinates (float64) where the instances have them.
        """
        ...

    def check(self, instances: TensorDict, actions: torch.Tensor) -> None:
        """Whether ``actions`` ``[B, P, T]`` solve the instances.

        Raises:
            ValueError: naming the first instance and route that do not, and the rule broken.
        """
        ...


@dataclass(frozen=True)
class InstanceRequest:
    """Routing instances that a module wants before its next step; see :class:`RequestsInstances`.

    Args:
        size: customers of each instance.
        count: instances over all ranks.
        key: identifies the step, for random streams that depend on nothing else.
        coordinates: makes coordinates ``[count, N, 2]`` of uniform noise ``[count, N, 2]`` in (0, 1) and a generator
            for what else it draws; ``None``: the datamodule's own distribution. Called once for the instances of all
            ranks. The noise comes back as ``noise``.
        held_out: name of a fixed set of the datamodule (``"uniform/20"``), in place of drawn instances: its first
            ``count``.
        references: also the oracle's costs, as ``reference``.
    """

    size: int
    count: int
    key: tuple[int, ...]
    coordinates: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None
    held_out: str | None = None
    references: bool = False


@runtime_checkable
class RequestsInstances(Protocol):
    """A module that says which routing instances its next training step needs.

    The batch is this rank's share (equal shares, in order) as a TensorDict ``[count / ranks]``: the problem's fields,
    ``index`` int64 (number within the request), and where asked ``reference`` float64 ``[B]`` and ``noise``. A request
    for nothing (``None``) yields an empty batch.
    """

    def instance_request(self) -> InstanceRequest | None: ...


@runtime_checkable
class ProvidesRoutingInstances(Protocol):
    """A datamodule of routing instances.

    Without :class:`RequestsInstances`, a training batch is as described there, drawn by the datamodule's own settings.
    An evaluation batch holds ``index`` (within its set, -1: a row that only fills the batch up) and ``reference``
    (NaN where none is known); ``evaluation_sets[i]`` names the set of dataloader i, ``"<distribution>/<size>"`` for
    generated ones. ``instance_name(set, index)`` names one instance.
    """

    problem: RoutingProblem
    evaluation_sets: Sequence[str]

    def instance_name(self, dataloader: int, index: int) -> str: ...


@runtime_checkable
class DrawsRoutingInstances(Protocol):
    """A datamodule that draws fresh instances of any kind, for assurance: a function of the seed alone.

    ``sizes``: customers of training instances. Kinds are the names of evaluation sets, or
    ``"<distribution>/<size>"``. Batches hold the problem's fields, ``index`` and, with ``references``, ``reference``
    float64 ``[count]`` and ``reference_route`` int64 ``[count, T]``.
    """

    problem: RoutingProblem
    evaluation_sets: Sequence[str]
    sizes: Sequence[int]

    def fresh_instances(
        self, kinds: Sequence[str], count: int, seed: int, keep: bool = False, references: bool = True
    ) -> Mapping[str, TensorDict]:
        """``count`` independent instances of every kind, on the CPU.

        Args:
            kinds: names; an unknown one raises ValueError.
            count: of each.
            seed: of all that is drawn.
            keep: the same seed will come again: references may be kept on disk.
            references: also the oracle's costs and routes.
        """
        ...

    def held_out(self, name: str) -> TensorDict:
        """An evaluation set, the same on all ranks, with ``reference``; NaN without an oracle."""
        ...

    def reference_name(self, size: int) -> str:
        """What makes references of instances with ``size`` customers."""
        ...

    def training_shares(self) -> Mapping[str, float]:
        """Distribution of training instances -> its share."""
        ...


@runtime_checkable
class ReportsGenerators(Protocol):
    """A module with generators of points in the unit square, for figures."""

    def generator_densities(self, side: int) -> Sequence[tuple[str, torch.Tensor]]:
        """(name, density ``[side, side]``, x along the first axis, mean 1) of every generator."""
        ...
