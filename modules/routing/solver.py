"""Routing solvers: the attention network on a problem's instances, and the ways to decode it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from modules.contracts import RoutingProblem, RoutingSpec
from modules.networks.attention_solver import AttentionSolver, DecoderTables
from modules.routing.augmentation import SYMMETRIES, dihedral, unit_box, with_locs
from modules.routing.decoding import Choice, beam_search, decode, rollout_seeds

_NODES_AT_ONCE = 1 << 14
"""Nodes that evaluation encodes in one batch: what an encoder layer holds of them stays below 64 MiB."""


@dataclass(frozen=True)
class SolverSettings:
    """The network.

    Args:
        dim: embedding width.
        heads: attention heads, a divisor of ``dim``.
        layers: of the encoder.
        hidden: width of its feed-forward maps.
        norm: ``instance`` normalises over an instance's nodes (POMO), ``batch`` over the batch (AM).
        graph_context: whether the mean embedding is part of every query (AM).
    """

    dim: int = 128
    heads: int = 8
    layers: int = 6
    hidden: int = 512
    norm: Literal["instance", "batch"] = "instance"
    graph_context: bool = False


@dataclass(frozen=True)
class Decoding:
    """How solutions are decoded in evaluation; the best route found is kept.

    Args:
        starts: one rollout from every customer, else one in all (POMO: true, AM: false).
        augment: decode the 8 symmetric copies of every instance.
        samples: this many sampled routes instead of greedy ones (per start and copy); 0: greedy.
        beam: beam width; 0: none. Not with ``starts`` or ``samples``.
        normalize: ``unit_box``: the solver sees every instance scaled to the unit square; costs stay those of the
            instance. ``none``: as it is.
        budget: most routes that are decoded of an instance, over starts, samples and copies; a larger budget decodes
            those of a smaller one and more. 0: no bound.

    Raises:
        ValueError: a negative number, or a beam with starts or samples.
    """

    starts: bool = True
    augment: bool = False
    samples: int = 0
    beam: int = 0
    normalize: Literal["none", "unit_box"] = "none"
    budget: int = 0

    def __post_init__(self) -> None:
        for key in ("samples", "beam", "budget"):
            if getattr(self, key) < 0:
                raise ValueError(f"Decoding: {key} must be >= 0, got {getattr(self, key)}")
        if self.beam and (self.starts or self.samples):
            raise ValueError("Decoding: beam goes neither with starts nor with samples: set starts: false, samples: 0")
        if self.normalize not in ("none", "unit_box"):
            raise ValueError(f"Decoding: normalize must be none or unit_box, got {self.normalize!r}")


def exact_cost(problem: RoutingProblem, instances: TensorDict, actions: Tensor) -> Tensor:
    """``[B, P]`` float64 costs of ``actions`` ``[B, P, T]``, measured in float64."""
    exact = instances.copy()
    for key, value in instances.items():
        if value.is_floating_point():
            exact[key] = value.double()
    return problem.cost(exact, actions).double()


class RoutingSolver(nn.Module):
    """An attention network for the problem of ``spec``."""

    def __init__(self, spec: RoutingSpec, settings: SolverSettings) -> None:
        super().__init__()
        self.spec, self.settings = spec, settings
        self.network = AttentionSolver(
            spec.depot, spec.customer_features, spec.context_features, spec.closed, **asdict(settings)
        )

    def tables(self, problem: RoutingProblem, instances: TensorDict) -> DecoderTables:
        """Decoding tables of instances ``[B]``."""
        locs = instances["locs"]
        features = problem.customer_features(instances).to(locs.dtype)
        dtype = self.network.embed.weight.dtype
        return self.network.tables(self.network.encode(locs.to(dtype), features.to(dtype)))

    def rollout(
        self, problem: RoutingProblem, instances: TensorDict, starts: bool, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Routes ``[B, P, T]`` and log-likelihoods ``[B, P]``: P rollouts forced apart with ``starts``, else one.

        Sampled with numbers that depend on ``seed`` and the instance's ``index`` only; ``None``: greedy.
        """
        forced = problem.starts(instances).unsqueeze(-1) if starts else None
        rollouts = 1 if forced is None else forced.shape[1]
        seeds = None if seed is None else rollout_seeds(seed, instances["index"], rollouts)
        return decode(problem, instances, self.tables(problem, instances), rollouts, Choice(forced, seeds))

    def log_likelihood(self, problem: RoutingProblem, instances: TensorDict, actions: Tensor) -> Tensor:
        """``[B, P]`` log-likelihoods of whole routes ``actions`` ``[B, P, T]``."""
        return decode(problem, instances, self.tables(problem, instances), actions.shape[1], Choice(actions))[1]

    @torch.no_grad()
    def solve(
        self, problem: RoutingProblem, instances: TensorDict, decoding: Decoding, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The best routes ``[B, T]`` that ``decoding`` finds, and their costs ``[B]`` float64."""
        training = self.training
        self.eval()
        try:
            batch, nodes = instances["locs"].shape[:2]
            copies = SYMMETRIES if decoding.augment else 1
            size = max(1, _NODES_AT_ONCE // (nodes * copies))
            parts = [
                self._solve(problem, instances[first : first + size], decoding, seed) for first in range(0, batch, size)
            ]
        finally:
            self.train(training)
        longest = max(routes.shape[1] for routes, _ in parts)
        routes = torch.cat([nn.functional.pad(routes, (0, longest - routes.shape[1])) for routes, _ in parts])
        return routes, torch.cat([cost for _, cost in parts])

    @torch.no_grad()
    def complete(
        self, problem: RoutingProblem, instances: TensorDict, prefix: Tensor, samples: int = 0, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The best routes ``[B, T]`` that begin with ``prefix`` ``[B, S]`` int64, S >= 1, and their costs ``[B]``.

        The rest is decoded greedily, or the best of ``samples`` sampled ends.

        Raises:
            ValueError: a prefix that is empty or breaks the problem's rules, naming instance and step.
        """
        check_prefix(problem, instances, prefix)
        training = self.training
        self.eval()
        try:
            each = max(1, samples)
            seeds = rollout_seeds(seed, instances["index"], each) if samples else None
            choice = Choice(prefix.unsqueeze(1).expand(-1, each, -1), seeds)
            routes = decode(problem, instances, self.tables(problem, instances), each, choice)[0]
        finally:
            self.train(training)
        cost, best = exact_cost(problem, instances, routes).min(1)
        return routes[torch.arange(len(best), device=best.device), best], cost

    def _solve(
        self, problem: RoutingProblem, instances: TensorDict, decoding: Decoding, seed: int
    ) -> tuple[Tensor, Tensor]:
        seen = instances
        if decoding.normalize == "unit_box":
            seen = with_locs(instances, unit_box(instances["locs"]))
        copies = [seen]
        if decoding.augment:
            copies = [with_locs(seen, locs) for locs in dihedral(seen["locs"])]
        best_cost: Tensor | None = None
        best_route = torch.zeros(instances["locs"].shape[0], 0, dtype=torch.int64, device=instances.device)
        decoded = 0
        for number, copy in enumerate(copies):
            left = decoding.budget - decoded if decoding.budget else None
            if left == 0:
                break
            routes = self._routes(problem, copy, decoding, seed, number, left)
            decoded += routes.shape[1]
            costs, rollout = exact_cost(problem, copy, routes).min(1)
            route = routes[torch.arange(routes.shape[0], device=routes.device), rollout]
            if best_cost is None:
                best_cost, best_route = costs, route
                continue
            longest = max(route.shape[1], best_route.shape[1])
            route, best_route = (
                nn.functional.pad(value, (0, longest - value.shape[1])) for value in (route, best_route)
            )
            better = costs < best_cost
            best_route = torch.where(better.unsqueeze(-1), route, best_route)
            best_cost = torch.where(better, costs, best_cost)
        assert best_cost is not None
        return best_route, best_cost

    def _routes(
        self, problem: RoutingProblem, instances: TensorDict, decoding: Decoding, seed: int, copy: int, most: int | None
    ) -> Tensor:
        """``[B, P, T]``, of the copy number ``copy`` of every instance; P at most ``most``."""
        tables = self.tables(problem, instances)
        if decoding.beam:
            return beam_search(problem, instances, tables, min(decoding.beam, most or decoding.beam))[0]
        each = max(1, decoding.samples)
        rollouts, forced = each, None
        if decoding.starts:
            forced = problem.starts(instances).repeat(1, each).unsqueeze(-1)
            rollouts = forced.shape[1]
        rollouts = min(rollouts, most or rollouts)
        if forced is not None:
            forced = forced[:, :rollouts]
        seeds = None
        if decoding.samples:
            seeds = rollout_seeds(seed, instances["index"] * SYMMETRIES + copy, rollouts)
        return decode(problem, instances, tables, rollouts, Choice(forced, seeds))[0]


def check_prefix(problem: RoutingProblem, instances: TensorDict, prefix: Tensor) -> None:
    """Whether routes may begin with ``prefix`` ``[B, S]`` int64.

    Raises:
        ValueError: an empty prefix, another shape, or a node that is not allowed, naming instance and step.
    """
    batch, nodes = instances["locs"].shape[:2]
    if prefix.ndim != 2 or prefix.shape[0] != batch or prefix.shape[1] < 1 or prefix.dtype != torch.int64:
        raise ValueError(
            f"prefix: must be int64 [{batch}, steps] with a step at least, got {prefix.dtype} {[*prefix.shape]}"
        )
    if bool(((prefix < 0) | (prefix >= nodes)).any()) or prefix.shape[1] > problem.max_steps(nodes):
        raise ValueError(f"prefix: must be at most {problem.max_steps(nodes)} nodes in [0, {nodes})")
    state = problem.begin(instances, 1)
    for step in range(prefix.shape[1]):
        action = prefix[:, step : step + 1]
        refused = ~state["allowed"].gather(-1, action.unsqueeze(-1)).view(batch)
        if bool(refused.any()):
            number = int(refused.nonzero()[0])
            raise ValueError(f"prefix: instance {number}, step {step}: node {int(action[number])} is not allowed there")
        problem.step(state, action)
