"""Plumbline's routing solver: a step as ``POMO`` and ``AttentionModel`` make it, without Lightning's trainer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from marl_common import print_line
from routing_common import RoutingArgs, compare_probe, parse_routing_args, run_line
from tensordict import TensorDict
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datamodules.routing.tsp import TSP  # noqa: E402
from modules.contracts import RoutingProblem  # noqa: E402
from modules.routing.baselines import AllSum, Baseline, SharedBaseline, policy_gradient  # noqa: E402
from modules.routing.solver import RoutingSolver, SolverSettings  # noqa: E402


class NoBaseline(Baseline):
    """Subtracts nothing, as the peer's baseline ``no``."""

    def value(self, problem: RoutingProblem, instances: TensorDict, cost: Tensor, all_sum: AllSum) -> Tensor:
        return cost.new_zeros(())


def from_rl4co(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """State of our ``RoutingSolver`` that computes what rl4co's ``AttentionModelPolicy`` does with ``weights``.

    Raises:
        ValueError: biases of the encoder's attention that are not zero.
    """
    found: dict[str, Tensor] = {}

    def take(ours: str, theirs: str, *names: str) -> None:
        for name in names:
            if f"{theirs}.{name}" in weights:
                found[f"network.{ours}.{name}"] = weights[f"{theirs}.{name}"]

    take("embed", "encoder.init_embedding.init_embed", "weight", "bias")
    for number in range(layers):
        theirs, ours = f"encoder.net.layers.{number}", f"layers.{number}"
        for part, name in (("Wqkv", "qkv"), ("out_proj", "out")):
            if bool(weights[f"{theirs}.0.module.{part}.bias"].any()):
                raise ValueError(f"from_rl4co: {theirs}.0.module.{part}.bias must be zero: our attention has no biases")
            take(f"{ours}.{name}", f"{theirs}.0.module.{part}", "weight")
        for place, name in ((1, "norm_attention"), (3, "norm_feed_forward")):
            norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            take(f"{ours}.{name}", f"{theirs}.{place}.normalizer", *norm)
        take(f"{ours}.up", f"{theirs}.2.module.lins.0", "weight", "bias")
        take(f"{ours}.down", f"{theirs}.2.module.lins.1", "weight", "bias")
    parts = weights["decoder.project_node_embeddings.weight"].chunk(3)
    for name, part in zip(("keys", "values", "logit_keys"), parts, strict=True):
        found[f"network.{name}.weight"] = part
    take("out", "decoder.pointer.project_out", "weight")
    query = weights["decoder.context_embedding.project_context.weight"]
    found["network.query_first.weight"], found["network.query_last.weight"] = query.chunk(2, -1)
    found["network.query_start"] = query @ weights["decoder.context_embedding.W_placeholder"]
    take("query_graph", "decoder.project_fixed_context", "weight")
    return found


def start_state(weights: Mapping[str, Tensor], args: RoutingArgs) -> dict[str, Tensor]:
    """:func:`from_rl4co`, without the graph context that the peer's POMO has and does not use."""
    state = from_rl4co(weights, args.layers)
    if args.pomo:
        del state["network.query_graph.weight"]
    return state


def build(args: RoutingArgs) -> tuple[TSP, RoutingSolver]:
    """The problem and a network with random weights."""
    problem = TSP()
    settings = SolverSettings(args.dim, args.heads, args.layers, args.hidden, **args.network)
    return problem, RoutingSolver(problem.spec, settings)


def main(args: RoutingArgs) -> None:
    """Time the steps and print the result line.

    Raises:
        RuntimeError: a step did not do its work.
    """
    problem, solver = build(args)
    baseline = SharedBaseline() if args.pomo else NoBaseline()
    optimizer = torch.optim.Adam(solver.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = 0

    def instances(locs: Tensor) -> TensorDict:
        return TensorDict({"locs": locs, "index": torch.arange(locs.shape[0])}, [locs.shape[0]])

    def train(locs: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        loss, _ = policy_gradient(problem, solver, baseline, instances(locs), args.seed + steps, lambda value: value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def greedy(locs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        solver.eval()
        batch = instances(locs)
        routes, log_likelihood = solver.rollout(problem, batch, args.pomo, None)
        cost = problem.cost(batch, routes)
        solver.train()
        return routes, cost, log_likelihood

    compared = None
    if args.probe is not None and args.probe.exists():
        probe: dict[str, Any] = torch.load(args.probe, weights_only=True)
        solver.load_state_dict(start_state(probe["weights"], args))
        compared = compare_probe(probe, args, greedy)
    print_line(run_line("plumbline", args, solver, optimizer, train, greedy, compared))


if __name__ == "__main__":
    main(parse_routing_args())
