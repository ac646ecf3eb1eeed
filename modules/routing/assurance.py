"""What a routing solver offers to assurance suites: instances, routes, the rules' own checks, decisions, symmetries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject
from modules.contracts import DrawsRoutingInstances, RoutingProblem
from modules.routing.augmentation import with_locs
from modules.routing.decoding import Choice, decisions, decode, rollout_seeds
from modules.routing.evaluation import RoutingEvaluation, optimality_gap
from modules.routing.solver import Decoding, RoutingSolver, exact_cost
from modules.seeds import stream

MULTI_VEHICLE = ("cvrp", "sdvrp")
TRACED_ROLLOUTS = 16
"""Rollouts of an instance whose decisions are looked at."""
BASELINE_INSTANCES = 32
"""Of every held-out set, for the nearest neighbour's gap."""


def assurance_subject(module: RoutingEvaluation, data: Any, trained_on: Sequence[DataSource]) -> Subject:
    """The subject of a routing module.

    Args:
        module: with its solver built.
        data: its datamodule, set up.
        trained_on: sources of training instances.

    Raises:
        AssuranceError: a datamodule that cannot draw fresh instances, or has no kind of them.
    """
    name = type(module).__name__
    if not isinstance(data, DrawsRoutingInstances):
        raise AssuranceError(
            f"{name}: assurance draws fresh instances, which {type(data).__name__} cannot: assure it with "
            "datamodules.RoutingDataModule"
        )
    if not data.evaluation_sets:
        raise AssuranceError(f"{name}: data.eval_sets is empty: name the kinds of instances to assure the solver on")
    assert module.solver is not None
    offered = _Abilities(module.solver, data.problem, data, module.decoding, module.device)
    spec = data.problem.spec
    sizes = ", ".join(map(str, sorted(set(data.sizes))))
    card = CardFacts(
        title=f"{name} solver for {spec.name}",
        summary=f"Constructs routes of {spec.name} instances in the plane, node by node, with an attention network.",
        intended_use=(
            f"Heuristic routes for planar instances of about the sizes trained on ({sizes} customers) where a gap of "
            "the size measured is acceptable; every route is checked against the problem's rules."
        ),
        out_of_scope="Proven optima, costs that are no Euclidean lengths, sizes far beyond those measured.",
        limitations=(
            "Gaps grow with size and with distance from the training distributions; they are relative to "
            f"{data.reference_name(data.sizes[0])}, which need not be optimal."
        ),
        licence="unknown",
        data=tuple(trained_on),
    )
    return Subject("routing", module.solver, offered.capabilities(), card)


class Metered:
    """A problem that counts what is decoded of each instance, whatever the decoder says of itself.

    Attributes:
        routes: ``[B]`` int64, routes begun of the instance with this ``index``.
        decisions: ``[B]`` int64, decisions taken over all of them.
    """

    def __init__(self, problem: RoutingProblem, count: int, device: torch.device) -> None:
        self._problem = problem
        self.routes = torch.zeros(count, dtype=torch.int64, device=device)
        self.decisions = torch.zeros(count, dtype=torch.int64, device=device)
        self._index = self.routes[:0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._problem, name)

    def begin(self, instances: TensorDict, rollouts: int) -> dict[str, Tensor]:
        self._index = instances["index"]
        self.routes.index_add_(0, self._index, torch.full_like(self._index, rollouts))
        return self._problem.begin(instances, rollouts)

    def step(self, state: dict[str, Tensor], action: Tensor) -> None:
        self.decisions.index_add_(0, self._index, torch.full_like(self._index, action.shape[1]))
        self._problem.step(state, action)


@dataclass
class _Abilities:
    """The capabilities of ``modules/assurance/probes/routing.py``; batches are TensorDicts ``[B]`` of instances."""

    solver: RoutingSolver
    problem: RoutingProblem
    data: DrawsRoutingInstances
    decoding: Decoding
    device: torch.device

    def __post_init__(self) -> None:
        self._simple_gaps: dict[str, float] | None = None

    def capabilities(self) -> dict[str, Any]:
        offered: dict[str, Any] = {
            "instance_kinds": tuple(self.data.evaluation_sets),
            "uniform_kind": f"uniform/{self.data.sizes[0]}",
            "reference_name": self.data.reference_name(self.data.sizes[0]),
            "draw_instances": self.draw,
            "reference_costs": lambda batch: batch["reference"],
            "reference_edges": self.reference_edges,
            "solve_instances": self.solve,
            "sampled_solutions": self.sampled,
            "solution_costs": self.costs,
            "solutions_feasible": self.feasible,
            "solve_within": self.solve_within,
            "solution_prefix": self.prefix,
            "complete_solution": self.complete,
            "solution_decisions": self.decisions,
            "symmetric_copies": self.copies,
            "simple_solutions": self.simple,
            "simple_gaps": self.simple_gaps,
            "outputs": self.outputs,
        }
        if self.problem.spec.name in MULTI_VEHICLE:
            offered["vehicle_lengths"] = self.vehicle_lengths
        return offered

    # -- instances ----------------------------------------------------------------------------------------------------
    def draw(
        self, kinds: Sequence[str], seed: int, count: int, keep: bool = False, references: bool = True
    ) -> dict[str, TensorDict]:
        drawn = self.data.fresh_instances(kinds, count, seed, keep, references)
        return {name: cast(TensorDict, batch.to(self.device)) for name, batch in drawn.items()}

    def reference_edges(self, batch: TensorDict) -> Tensor:
        """``[B, N, N]`` bool, symmetric: between which nodes the oracle's routes go."""
        route = batch["reference_route"]
        if self.problem.spec.closed:
            path = torch.cat([route, route[:, :1]], 1)
        else:
            path = torch.nn.functional.pad(route, (1, 1))
        nodes = batch["locs"].shape[1]
        edges = torch.zeros(len(batch), nodes, nodes, dtype=torch.bool, device=self.device)
        rows = torch.arange(len(batch), device=self.device).unsqueeze(1)
        edges[rows, path[:, :-1], path[:, 1:]] = True
        return edges | edges.transpose(1, 2)

    def copies(self, batch: TensorDict, seed: int) -> dict[str, TensorDict]:
        """The same instances with customers in another order, turned by 90 degrees, and mirrored."""
        locs = batch["locs"]
        turned = torch.stack([1 - locs[..., 1], locs[..., 0]], -1)
        mirrored = torch.stack([1 - locs[..., 0], locs[..., 1]], -1)
        return {
            "customers permuted": self._permuted(batch, seed),
            "turned by 90 degrees": with_locs(batch, turned),
            "mirrored": with_locs(batch, mirrored),
        }

    def _permuted(self, batch: TensorDict, seed: int) -> TensorDict:
        count, nodes = batch["locs"].shape[:2]
        depot = int(self.problem.spec.depot)
        order = torch.rand(count, nodes - depot, generator=stream(seed)).argsort(-1).to(self.device)
        everyone = torch.nn.functional.pad(order + depot, (depot, 0))
        permuted = batch.copy()
        for key, value in batch.items():
            if value.ndim >= 2 and value.shape[1] in (nodes, nodes - depot):
                index = everyone if value.shape[1] == nodes else order
                index = index.view(*index.shape, *[1] * (value.ndim - 2)).expand_as(value)
                permuted[key] = value.gather(1, index)
        return permuted

    # -- routes -------------------------------------------------------------------------------------------------------
    def solve(self, batch: TensorDict, seed: int) -> Tensor:
        return self.solver.solve(self.problem, batch, self.decoding, seed)[0]

    def sampled(self, batch: TensorDict, seed: int, count: int) -> Tensor:
        """``[B, count, T]``."""
        choice = Choice(seeds=rollout_seeds(seed, batch["index"], count))
        return decode(self.problem, batch, self.solver.tables(self.problem, batch), count, choice)[0]

    def costs(self, batch: TensorDict, routes: Tensor) -> Tensor:
        return exact_cost(self.problem, batch, routes.unsqueeze(1)).squeeze(1)

    def feasible(self, batch: TensorDict, routes: Tensor) -> Tensor:
        """``[B]`` bool: whether all routes ``[B, P, T]`` pass the problem's own check."""
        if self._passes(batch, routes):
            return torch.ones(len(batch), dtype=torch.bool)
        return torch.tensor([self._passes(batch[i : i + 1], routes[i : i + 1]) for i in range(len(batch))])

    def _passes(self, batch: Any, routes: Tensor) -> bool:
        try:
            self.problem.check(batch, routes)
        except ValueError:
            return False
        return True

    def solve_within(self, batch: TensorDict, budget: int) -> tuple[Tensor, Tensor]:
        """Routes ``[B, T]`` of at most ``budget`` decoded ones, and how many were, ``[B]``, as the problem counts."""
        nodes = batch["locs"].shape[1]
        metered = Metered(self.problem, len(batch), self.device)
        decoding = replace(self.decoding, budget=budget)
        routes, _ = self.solver.solve(cast(RoutingProblem, metered), batch, decoding)
        whole = -(-metered.decisions // self.problem.max_steps(nodes))
        return routes, torch.maximum(metered.routes, whole)

    def prefix(self, batch: TensorDict, share: float, seed: int) -> Tensor:
        """The first ``share`` of customers' number of steps of a random walk within the rules, ``[B, S]``."""
        nodes = batch["locs"].shape[1]
        steps = max(1, round(share * (nodes - self.problem.spec.depot)))
        generator = stream(seed)
        state, actions = self.problem.begin(batch, 1), []
        for _ in range(steps):
            noise = torch.rand(len(batch), 1, nodes, generator=generator).to(self.device)
            action = noise.masked_fill(~state["allowed"], -1.0).argmax(-1)
            actions.append(action)
            self.problem.step(state, action)
        return torch.cat(actions, 1)

    def complete(self, batch: TensorDict, prefix: Tensor) -> Tensor:
        return self.solver.complete(self.problem, batch, prefix)[0]

    def simple(self, batch: TensorDict) -> Tensor:
        """Routes ``[B, T]`` to the nearest customer that is allowed, to the depot where none is; the first is node 0's
        nearest or, of closed routes, node 0."""
        locs = self.problem_locs(batch)
        distance = torch.cdist(locs, locs)
        depot = self.problem.spec.depot
        state, actions = self.problem.begin(batch, 1), []
        rows = torch.arange(len(batch), device=self.device).unsqueeze(1)
        for step in range(self.problem.max_steps(locs.shape[1])):
            if step and depot and bool(self.problem.finished(state).all()):
                break
            far = distance[rows, state["current"]]  # [B, 1, N]
            if depot:
                far = torch.cat([far[..., :1] * 0 + 1e9, far[..., 1:]], -1)
            action = far.masked_fill(~state["allowed"], torch.inf).argmin(-1)
            if step == 0 and not depot:
                action = torch.zeros_like(action)
            actions.append(action)
            self.problem.step(state, action)
        return torch.cat(actions, 1)

    def problem_locs(self, batch: TensorDict) -> Tensor:
        return batch["original"] if "original" in batch else batch["locs"].double()

    def simple_gaps(self) -> Mapping[str, float]:
        """Held-out set -> mean gap of the nearest neighbour's routes in percent, where references are known."""
        if self._simple_gaps is None:
            self._simple_gaps = {}
            for name in self.data.evaluation_sets:
                batch = cast(TensorDict, self.data.held_out(name)[:BASELINE_INSTANCES].to(self.device))
                gaps = optimality_gap(self.costs(batch, self.simple(batch)), batch["reference"])
                if bool(gaps.isfinite().all()):
                    self._simple_gaps[name] = float(gaps.mean())
        return self._simple_gaps

    def decisions(self, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decisions, forced apart if decoding is; the last step leads back to the start, with certainty.

        Returns:
            distributions ``[B, P, T, N]``, allowed nodes ``[B, P, T, N]``, nodes decided at ``[B, P, T]`` (-1: none).
        """
        forced = self.problem.starts(batch)[:, :TRACED_ROLLOUTS].unsqueeze(-1) if self.decoding.starts else None
        rollouts = 1 if forced is None else forced.shape[1]
        tables = self.solver.tables(self.problem, batch)
        routes, probability, allowed, here = decisions(self.problem, batch, tables, forced, rollouts)
        end = routes[..., :1] if self.problem.spec.closed else torch.zeros_like(routes[..., :1])
        back = torch.nn.functional.one_hot(end, probability.shape[-1])
        return (
            torch.cat([probability, back.to(probability)], 2),
            torch.cat([allowed, back.bool()], 2),
            torch.cat([here, routes[..., -1:]], 2),
        )

    def vehicle_lengths(self, batch: TensorDict, routes: Tensor) -> list[Tensor]:
        """Of every instance, the length of each vehicle's trip."""
        locs = self.problem_locs(batch)
        path = torch.nn.functional.pad(routes, (1, 1))
        places = locs.gather(1, path.unsqueeze(-1).expand(-1, -1, 2))
        legs = (places[:, 1:] - places[:, :-1]).norm(dim=-1)
        trip = (path[:, :-1] == 0).cumsum(-1) - 1
        lengths = legs.new_zeros(len(batch), int(trip.max()) + 1).scatter_add_(1, trip, legs)
        return [one[one > 0] for one in lengths]

    def outputs(self) -> Tensor:
        """Decoder tables of two fixed instances."""
        batch = self.draw([f"uniform/{self.data.sizes[0]}"], 0, 2, references=False)
        return self.solver.tables(self.problem, next(iter(batch.values()))).last.clone()
