"""What the routing loops share: arguments, instances, the clock, and the probe that holds both networks equal.

Imported inside each peer's own environment, hence torch and the standard library only. Both loops solve the travelling
salesman problem with the same instances. A training *step* samples routes of a batch, takes REINFORCE's gradient and
updates the network; a greedy *step* decodes a batch without gradients. Steps are timed one by one after ``warmup``
others; imports, building and making instances are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from marl_common import cpu_seconds
from torch import Tensor

METHODS = ("pomo", "am")
Output = TypeVar("Output")


@dataclass(frozen=True)
class RoutingArgs:
    """One run of one loop on the travelling salesman problem."""

    method: str = "pomo"
    """``pomo``: a rollout from every node, their mean as baseline (Kwon et al. 2020). ``am``: one rollout, with graph
    context and batch norm (Kool et al. 2019), and no baseline."""
    nodes: int = 20
    batch: int = 64
    """Instances a step."""
    layers: int = 6
    dim: int = 128
    heads: int = 8
    hidden: int = 512
    lr: float = 1e-4
    weight_decay: float = 1e-6
    warmup: int = 2
    steps: int = 8
    """Timed training steps; as many times two greedy ones, which are cheaper."""
    threads: int = 1
    seed: int = 0
    profile: bool = False
    """Record the timed steps with torch's profiler; the times are no result then."""
    probe: Path | None = None
    """File with start weights and greedy routes: written by the peer, read by our loop."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"RoutingArgs: method: one of {', '.join(METHODS)}, got '{self.method}'")
        for name in ("batch", "layers", "dim", "heads", "hidden", "warmup", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"RoutingArgs: {name}: must be >= 1, got {getattr(self, name)}")
        if self.nodes < 3:
            raise ValueError(f"RoutingArgs: nodes: must be >= 3, got {self.nodes}")

    @property
    def pomo(self) -> bool:
        return self.method == "pomo"

    @property
    def rollouts(self) -> int:
        """Routes of each instance."""
        return self.nodes if self.pomo else 1

    @property
    def probe_instances(self) -> int:
        """Instances that both networks are compared on."""
        return min(64, max(2, 320 // self.rollouts))

    @property
    def network(self) -> dict[str, Any]:
        """Norm and graph context of the method."""
        return {"norm": "instance" if self.pomo else "batch", "graph_context": not self.pomo}

    def extra_parameters(self) -> int:
        """What the peer's network has beyond ours: biases of the encoder's attention, a placeholder for the first
        query that is twice as wide, and for POMO the projection of the graph context, which is not used."""
        return self.layers * 4 * self.dim + self.dim + (self.dim**2 if self.pomo else 0)


def parse_routing_args(argv: list[str] | None = None) -> RoutingArgs:
    """Command line of a loop script, an option per field; sets the thread count before any work starts."""
    parser = argparse.ArgumentParser(description="One timed routing run; prints one JSON line.")
    for one in fields(RoutingArgs):
        option = f"--{one.name.replace('_', '-')}"
        if one.name == "profile":
            parser.add_argument(option, action="store_true")
        elif one.name == "probe":
            parser.add_argument(option, type=Path)
        else:
            parser.add_argument(option, type=type(one.default), default=one.default)
    args = RoutingArgs(**vars(parser.parse_args(argv)))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def make_instances(args: RoutingArgs, count: int, number: int) -> Tensor:
    """Uniform coordinates ``[count, nodes, 2]`` float32, the same in both environments; ``number`` picks the stream."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    return torch.rand(count, args.nodes, 2, generator=generator)


def tour_lengths(locs: Tensor, routes: Tensor) -> Tensor:
    """Lengths ``[B, P]`` float64 of the closed tours ``routes`` ``[B, P, N]`` through ``locs`` ``[B, N, 2]``.

    Raises:
        RuntimeError: a route is no permutation of the nodes.
    """
    batch, rollouts, nodes = routes.shape
    if nodes != locs.shape[1] or not bool((routes.sort(-1).values == torch.arange(nodes)).all()):
        raise RuntimeError("tour_lengths: a route does not visit every node once")
    places = locs.double().gather(1, routes.reshape(batch, -1, 1).expand(-1, -1, 2)).view(batch, rollouts, nodes, 2)
    return (places - places.roll(-1, 2)).norm(dim=-1).sum(-1)


def checked_cost(locs: Tensor, routes: Tensor, cost: Tensor) -> float:
    """Mean of a loop's ``cost`` ``[B, P]`` of ``routes``.

    Raises:
        RuntimeError: a route is no tour, or costs are not the tours' lengths.
    """
    lengths = tour_lengths(locs, routes)
    worst = float((lengths - cost.double()).abs().max())
    if worst > 1e-4 * float(lengths.max()):
        raise RuntimeError(f"checked_cost: a loop's costs are off the tours' lengths by {worst:.2g}")
    return float(lengths.mean())


def timed(
    step: Callable[[Tensor], Output], args: RoutingArgs, steps: int, first: int
) -> tuple[dict[str, Any], Output, Tensor]:
    """CPU and wall time of ``steps`` calls after ``args.warmup`` others, on instances of the streams from ``first`` on.

    Returns:
        (rates, what the last call returned, the instances of the last call).
    """
    batches = [make_instances(args, args.batch, first + number) for number in range(args.warmup + steps)]
    for locs in batches[: args.warmup]:
        step(locs)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if args.profile else None
    if profiler is not None:
        profiler.start()
    wall, marks = time.perf_counter(), [cpu_seconds()]
    output = None
    for locs in batches[args.warmup :]:
        output = step(locs)
        marks.append(cpu_seconds())
    wall = time.perf_counter() - wall
    assert output is not None
    cpu = marks[-1] - marks[0]
    costs = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    rates: dict[str, Any] = {
        "steps": steps,
        "instances": steps * args.batch,
        "cpu_s": round(cpu, 4),
        "wall_s": round(wall, 4),
        "instances_per_cpu_s": round(steps * args.batch / cpu, 3),
        "instances_per_wall_s": round(steps * args.batch / wall, 3),
        "median_step_cpu_s": round(statistics.median(costs), 4),
        "step_cpu_s": [round(cost, 4) for cost in costs],
    }
    if profiler is not None:
        from rlhf_common import op_table

        profiler.stop()
        rates["profile_s_per_step"] = op_table(profiler, steps)
    return rates, output, batches[-1]


Greedy = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Instances ``[B, N, 2]`` -> routes ``[B, P, N]``, costs and log-likelihoods ``[B, P]`` of greedy decoding."""


def write_probe(path: Path, args: RoutingArgs, weights: dict[str, Tensor], greedy: Greedy) -> None:
    """Save ``weights`` and what they decode greedily, for :func:`read_probe`."""
    locs = make_instances(args, args.probe_instances, 0)
    routes, cost, log_likelihood = greedy(locs)
    found = {"weights": weights, "routes": routes, "cost": cost, "log_likelihood": log_likelihood}
    temporary = path.with_suffix(".tmp")
    torch.save(
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}, temporary
    )
    os.replace(temporary, path)


def compare_probe(probe: dict[str, Any], args: RoutingArgs, greedy: Greedy) -> dict[str, float]:
    """How far ``greedy`` with the probe's weights is from what the peer decoded with them.

    Returns:
        ``same_routes``: share of equal routes; ``cost_difference``: of mean costs, relative;
        ``log_likelihood_difference``: the greatest, on equal routes.
    """
    routes, cost, log_likelihood = greedy(make_instances(args, args.probe_instances, 0))
    same = (routes == probe["routes"]).all(-1)
    apart = (log_likelihood - probe["log_likelihood"]).abs()[same]
    return {
        "same_routes": round(float(same.double().mean()), 4),
        "cost_difference": round(abs(float(cost.mean() / probe["cost"].mean()) - 1.0), 7),
        "log_likelihood_difference": round(float(apart.max()), 7) if apart.numel() else float("inf"),
    }


def run_line(
    loop: str,
    args: RoutingArgs,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Callable[[Tensor], Tensor],
    greedy: Greedy,
    probe: dict[str, float] | None,
) -> dict[str, Any]:
    """Time both kinds of step and check that they did their work.

    Args:
        loop: its name. module: the network. optimizer: of its parameters.
        train: makes a training step on instances and returns the loss.
        greedy: decodes greedily.
        probe: what is said of the comparison with the peer, or ``None``.

    Returns:
        The run's result.

    Raises:
        RuntimeError: routes that are no tours, costs that are not their lengths, a loss that is not finite, or updates
            that are too few or change nothing.
    """
    before = [value.detach().clone() for value in module.parameters()]
    decoded, (routes, cost, _), locs = timed(greedy, args, 2 * args.steps, first=1)
    start_cost = checked_cost(locs, routes, cost)
    trained, loss, _ = timed(train, args, args.steps, first=10_000)
    updates = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    moved = max(float((new.detach() - old).abs().max()) for new, old in zip(module.parameters(), before, strict=True))
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"{loop}: the loss of the last training step is {float(loss)}")
    if updates != args.warmup + args.steps or not moved > 0.0:
        raise RuntimeError(f"{loop}: {updates} updates moved the weights by {moved}, {args.warmup + args.steps} wanted")
    return {
        "loop": loop,
        "method": args.method,
        "nodes": args.nodes,
        "batch": args.batch,
        "rollouts": args.rollouts,
        "parameters": sum(value.numel() for value in before),
        "train": trained,
        "greedy": decoded,
        "greedy_cost": round(start_cost, 5),
        "updates": updates,
        "moved": moved,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        **({} if probe is None else {"probe": probe}),
    }
