"""Probes of solvers that construct routes: gaps over kinds of instances, symmetries, feasibility, budgets, decisions.

A unit is one instance of every kind that a probe looks at. Gaps are in percent above a reference's cost. A solution
that breaks the problem's rules has no cost: it counts with a gap of :data:`INFEASIBLE` percent, so that doing nothing,
which would be short, is never good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.assurance.figures import Measure, largest_mean, ratio_of_means
from modules.assurance.measures.calibration import average_ranks
from modules.assurance.measures.welfare import gini
from modules.assurance.probe import Block, Probe, Values
from modules.assurance.subject import Subject

CAPABILITIES: dict[str, str] = {
    "instance_kinds": "Sequence[str]: kinds of instances to measure on, '<distribution>/<size>'",
    "uniform_kind": "str: uniform instances of the size trained on",
    "reference_name": "str: what makes reference costs",
    "draw_instances": "(kinds, seed, count, keep: bool, references: bool) -> kind -> batch of count independent "
    "instances, a function of the seed; keep: the seed will come again; references: also reference costs and routes",
    "reference_costs": "(batch) -> Tensor [B]",
    "reference_edges": "(batch) -> bool [B, N, N], symmetric: between which nodes the reference's routes go",
    "solve_instances": "(batch, seed) -> routes int64 [B, T], decoded as in use",
    "sampled_solutions": "(batch, seed, count) -> routes [B, count, T] drawn from the policy",
    "solution_costs": "(batch, routes [B, T]) -> Tensor [B], float64",
    "solutions_feasible": "(batch, routes [B, P, T]) -> bool [B]: all P pass the problem's own check",
    "solve_within": "(batch, budget) -> (routes [B, T], routes decoded [B], counted by the problem): at most budget",
    "solution_prefix": "(batch, share, seed) -> int64 [B, S]: the begin of random routes within the rules",
    "complete_solution": "(batch, prefix [B, S]) -> routes [B, T] that begin with it",
    "solution_decisions": "(batch) -> (distributions [B, P, T, N], nodes allowed bool [B, P, T, N], node decided at "
    "int64 [B, P, T], -1: none) of P routes; the last step leads back to the start",
    "symmetric_copies": "(batch, seed) -> name -> batch with the same solutions and costs",
    "simple_solutions": "(batch) -> routes [B, T] of a simple heuristic",
    "simple_gaps": "() -> kind -> the simple heuristic's mean gap in percent",
    "vehicle_lengths": "(batch, routes [B, T]) -> of each instance the lengths of its vehicles' trips",
}
INFEASIBLE = 1000.0
WORST_SHARE = 0.05
SAMPLED = 4
"""Routes drawn per instance whose feasibility is checked, beside the one decoded."""
BUDGETS = (1, 4, 16)
PREFIXES = {"a quarter fixed": 0.25, "half fixed": 0.5, "three quarters fixed": 0.75}
_BLOCK = 25
_RUNS = {"quick": 25}


def worst_excess(values: np.ndarray) -> np.ndarray:
    """Mean of the worst 5 % of all values minus the mean, of ``[..., units, conditions]``."""
    flat = values.reshape(*values.shape[:-2], -1)
    count = max(1, round(WORST_SHARE * flat.shape[-1]))
    worst = np.partition(flat, flat.shape[-1] - count, axis=-1)[..., flat.shape[-1] - count :]
    return worst.mean(-1) - flat.mean(-1)


def _checked_costs(subject: Subject, batch: Any, routes: Tensor, reference: Tensor) -> Tensor:
    """``[B]``; infeasible ones cost :data:`INFEASIBLE` percent more than the reference."""
    feasible = subject["solutions_feasible"](batch, routes.unsqueeze(1))
    cost = subject["solution_costs"](batch, routes).double().cpu()
    return torch.where(feasible.cpu(), cost, reference + INFEASIBLE / 100 * reference.abs())


def _gaps(cost: Tensor, reference: Tensor) -> Tensor:
    return 100 * (cost - reference) / reference.abs()


def _draw(subject: Subject, block: Block, kinds: tuple[str, ...], references: bool) -> Mapping[str, Any]:
    return subject["draw_instances"](kinds, block.seed, block.count, block.split == "anchor", references)


# -- over kinds of instances --
def _kinds(subject: Subject, block: Block) -> Values:
    kinds = tuple(subject["instance_kinds"])
    gaps: dict[str, np.ndarray] = {}
    feasible = torch.ones(block.count, dtype=torch.bool)
    free = ""
    for name, batch in _draw(subject, block, kinds, True).items():
        reference = subject["reference_costs"](batch).double().cpu()
        if bool((reference == 0).any()):
            free = f"an instance of {name} has reference cost 0: it has no gap"
        routes = subject["solve_instances"](batch, block.seed)
        gaps[name] = _gaps(_checked_costs(subject, batch, routes, reference), reference).numpy()
        drawn = subject["sampled_solutions"](batch, block.seed, SAMPLED)
        for found in (routes.unsqueeze(1), drawn):
            feasible &= subject["solutions_feasible"](batch, found).cpu()
    return {
        "r.gap_ood": free or gaps,
        "r.gap_slope": free or _slopes(gaps),
        "e.spread": free or gaps,
        "c.feasible": feasible.double().numpy(),
    }


def _slopes(gaps: Mapping[str, np.ndarray]) -> np.ndarray | str:
    """``[units]``: least-squares slope of an instance's gap against its size, distributions pooled, per 10 nodes."""
    sizes = np.array([float(name.rpartition("/")[2]) for name in gaps if name.rpartition("/")[2].isdigit()])
    if len(sizes) < len(gaps) or len(set(sizes.tolist())) < 2:
        return "the kinds of instances have one size: name several in data.eval_sets"
    weights = sizes - sizes.mean()
    return 10 * (np.stack(list(gaps.values()), 1) @ weights) / (weights @ weights)


def _kinds_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    simple = subject["simple_gaps"]() if subject.offers("simple_gaps") else {}
    known = {f"reference: {subject['reference_name']}": 0.0}
    return {"r.gap_ood": known | ({"nearest neighbour": max(simple.values())} if simple else {})}


# -- usefulness --
def _usefulness(subject: Subject, block: Block) -> Values:
    """Where the solver stands between the simple heuristic and the reference, as a ratio of two means."""
    batch = _draw(subject, block, (subject["uniform_kind"],), True)[subject["uniform_kind"]]
    reference = subject["reference_costs"](batch).double().cpu()
    cost = _checked_costs(subject, batch, subject["solve_instances"](batch, block.seed), reference)
    simple = subject["solution_costs"](batch, subject["simple_solutions"](batch)).double().cpu()
    return {"u.gap_closed": {"closed": (simple - cost).numpy(), "to close": (simple - reference).numpy()}}


def _usefulness_baselines(subject: Subject) -> Mapping[str, Mapping[str, float]]:
    return {"u.gap_closed": {"nearest neighbour": 0.0, f"reference: {subject['reference_name']}": 1.0}}


# -- symmetries --
def _symmetries(subject: Subject, block: Block) -> Values:
    kind = subject["uniform_kind"]
    batch = _draw(subject, block, (kind,), False)[kind]
    costs: Callable[[Any, Tensor], Tensor] = subject["solution_costs"]
    cost = costs(batch, subject["solve_instances"](batch, block.seed)).double()
    if bool((cost == 0).any()):
        return {"r.perm": "a solution has cost 0: a relative change is undefined"}
    changes: dict[str, np.ndarray] = {}
    for name, copy in subject["symmetric_copies"](batch, block.seed).items():
        again = costs(copy, subject["solve_instances"](copy, block.seed)).double()
        changes[name] = (100 * (again - cost).abs() / cost.abs()).cpu().numpy()
    return {"r.perm": changes}


# -- decisions --
def _decisions(subject: Subject, block: Block) -> Values:
    kind = subject["uniform_kind"]
    batch = _draw(subject, block, (kind,), True)[kind]
    probability, allowed, here = subject["solution_decisions"](batch)
    found: dict[str, np.ndarray | str] = {"i.attn_entropy": decision_entropy(probability, allowed).cpu().numpy()}
    area = edge_area(edge_heat(probability, here), subject["reference_edges"](batch))
    if np.isnan(found["i.attn_entropy"]).any():
        found["i.attn_entropy"] = "an instance leaves no decision between two nodes"
    found["i.edge"] = "all edges of an instance are the reference's" if np.isnan(area).any() else area
    return found


def decision_entropy(probability: Tensor, allowed: Tensor) -> Tensor:
    """``[B]``: mean over decisions of entropy over the logarithm of the number of nodes allowed.

    Decisions between fewer than two nodes are left out; NaN where there are no others. Shapes ``[B, P, T, N]``.
    """
    count = allowed.sum(-1)
    open_ = count > 1
    probability = probability.double()
    entropy = -torch.special.xlogy(probability, probability).sum(-1)
    share = torch.where(open_, entropy / count.clamp(min=2).double().log(), 0.0)
    return share.flatten(1).sum(1) / open_.flatten(1).sum(1)


def edge_heat(probability: Tensor, here: Tensor) -> Tensor:
    """``[B, N, N]``, symmetric: how likely a route goes between two nodes, summed over decisions of all routes.

    ``probability`` ``[B, P, T, N]``, taken at the nodes ``here`` ``[B, P, T]``; -1: at none, left out.
    """
    batch, _, _, nodes = probability.shape
    rows = here.clamp(min=0) + nodes * torch.arange(batch, device=here.device).view(-1, 1, 1)
    share = probability.double() * (here >= 0).unsqueeze(-1)
    heat = torch.zeros(batch * nodes, nodes, dtype=torch.float64, device=here.device)
    heat.index_add_(0, rows.flatten(), share.flatten(0, 2))
    heat = heat.view(batch, nodes, nodes)
    return heat + heat.transpose(1, 2)


def edge_area(heat: Tensor, edges: Tensor) -> np.ndarray:
    """``[B]``: area under the ROC curve of ``heat`` for ``edges``, both ``[B, N, N]``; NaN: all or no edges are there.

    The share of pairs of a used and an unused edge of which the used one is hotter, ties by half (Mann-Whitney).
    """
    nodes = heat.shape[-1]
    first, second = np.triu_indices(nodes, 1)
    scores, used = (value.cpu().numpy()[:, first, second] for value in (heat, edges))
    areas = np.full(len(scores), np.nan)
    for number, (score, mine) in enumerate(zip(scores, used, strict=True)):
        positive = int(mine.sum())
        negative = len(mine) - positive
        if positive and negative:
            ranks = average_ranks(score)[mine].sum()
            areas[number] = (ranks - positive * (positive + 1) / 2) / (positive * negative)
    return areas


# -- control --
def _budget(subject: Subject, block: Block) -> Values:
    kind = subject["uniform_kind"]
    batch = _draw(subject, block, (kind,), False)[kind]
    obeyed: dict[str, np.ndarray] = {}
    for budget in BUDGETS:
        routes, decoded = subject["solve_within"](batch, budget)
        held = (decoded.cpu() <= budget) & subject["solutions_feasible"](batch, routes.unsqueeze(1)).cpu()
        obeyed["1 route" if budget == 1 else f"{budget} routes"] = held.double().numpy()
    return {"c.time": obeyed}


def _prefix(subject: Subject, block: Block) -> Values:
    kind = subject["uniform_kind"]
    batch = _draw(subject, block, (kind,), False)[kind]
    kept: dict[str, np.ndarray] = {}
    for name, share in PREFIXES.items():
        prefix = subject["solution_prefix"](batch, share, block.seed)
        routes = subject["complete_solution"](batch, prefix)
        same = torch.zeros(len(prefix), dtype=torch.bool)
        if routes.shape[1] >= prefix.shape[1]:
            same = (routes[:, : prefix.shape[1]] == prefix).all(1).cpu()
        kept[name] = (same & subject["solutions_feasible"](batch, routes.unsqueeze(1)).cpu()).double().numpy()
    return {"c.warm": kept}


# -- fairness --
def _vehicles(subject: Subject, block: Block) -> Values:
    kind = subject["uniform_kind"]
    batch = _draw(subject, block, (kind,), False)[kind]
    routes = subject["solve_instances"](batch, block.seed)
    if not bool(subject["solutions_feasible"](batch, routes.unsqueeze(1)).all()):
        return {"e.equity": "a solution is not feasible: there are no trips to compare"}
    lengths = subject["vehicle_lengths"](batch, routes)
    return {"e.equity": np.array([float(gini(np.asarray(one.cpu()))) if len(one) else 0.0 for one in lengths])}


_PERCENT = "%"
PROBES: tuple[Probe, ...] = (
    Probe(
        "instance_kinds",
        (
            Measure(
                "r.gap_ood", "Optimality gap on the worst kind of instances", "down", "bootstrap", _PERCENT,
                statistic=largest_mean,
            ),
            Measure("r.gap_slope", "Growth of the gap with 10 more nodes", "down", "mean", _PERCENT),
            Measure(
                "e.spread", "Gap of the worst-served 5 % of instances above the mean gap", "down", "bootstrap",
                _PERCENT, statistic=worst_excess,
            ),
            Measure(
                "c.feasible", "Instances whose solutions, decoded and sampled, all obey the rules", "up", "proportion",
                "share",
            ),
        ),
        needs=(
            "instance_kinds", "draw_instances", "reference_costs", "reference_name", "solve_instances",
            "sampled_solutions", "solution_costs", "solutions_feasible",
        ),
        run=_kinds,
        block=_BLOCK,
        units=_RUNS,
        limit={"quick": 25, "rice": 1600},
        baselines=_kinds_baselines,
    ),
    Probe(
        "gap_closed",
        (
            Measure(
                "u.gap_closed", "Share of the way from the nearest neighbour's cost to the reference's", "up",
                "bootstrap", statistic=ratio_of_means,
            ),
        ),
        needs=(
            "uniform_kind", "draw_instances", "reference_costs", "reference_name", "solve_instances", "solution_costs",
            "solutions_feasible", "simple_solutions",
        ),
        run=_usefulness,
        block=_BLOCK,
        units=_RUNS,
        baselines=_usefulness_baselines,
    ),
    Probe(
        "symmetries",
        (
            Measure(
                "r.perm", "Change of cost when nodes are permuted, turned or mirrored, the worst of these", "down",
                "bootstrap", _PERCENT, statistic=largest_mean,
            ),
        ),
        needs=("uniform_kind", "draw_instances", "solve_instances", "solution_costs", "symmetric_copies"),
        run=_symmetries,
        block=_BLOCK,
        units=_RUNS,
    ),
    Probe(
        "route_decisions",
        (
            Measure(
                "i.edge", "How well the policy's edge heat map ranks the reference's edges (area under the ROC curve)",
                "up", "mean", span=(0.0, 1.0),
            ),
            Measure(
                "i.attn_entropy", "Entropy of a decision over its largest possible", "down", "mean", span=(0.0, 1.0)
            ),
        ),
        needs=("uniform_kind", "draw_instances", "reference_edges", "solution_decisions"),
        run=_decisions,
        suites=("rice", "deep"),
        block=_BLOCK,
        units=_RUNS,
    ),
    Probe(
        "decoding_budget",
        (
            Measure(
                "c.time", "Decoding stops within its budget of routes, with a feasible one", "up", "worst_proportion",
                "share",
            ),
        ),
        needs=("uniform_kind", "draw_instances", "solve_within", "solutions_feasible"),
        run=_budget,
        block=_BLOCK,
        units={"quick": 50},
    ),
    Probe(
        "fixed_prefix",
        (
            Measure(
                "c.warm", "A fixed beginning of a route is kept, and completed within the rules", "up",
                "worst_proportion", "share",
            ),
        ),
        needs=("uniform_kind", "draw_instances", "solution_prefix", "complete_solution", "solutions_feasible"),
        run=_prefix,
        block=_BLOCK,
        units={"quick": 50},
    ),
    Probe(
        "vehicle_equity",
        (Measure("e.equity", "Gini coefficient of vehicles' route lengths", "down", "mean", span=(0.0, 1.0)),),
        needs=("uniform_kind", "draw_instances", "solve_instances", "solutions_feasible", "vehicle_lengths"),
        run=_vehicles,
        suites=("rice", "deep"),
        block=_BLOCK,
        units=_RUNS,
    ),
)  # fmt: skip
