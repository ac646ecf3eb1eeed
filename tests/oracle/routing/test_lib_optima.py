"""TSPLIB and CVRPLIB: files read as vrplib reads them, and known solutions cost exactly what the libraries state."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.routing.cvrp import CVRP
from datamodules.routing.lib_files import LibInstance, read_instance, read_optima, read_solution, read_tour
from datamodules.routing.tsp import TSP

# Lengths of the same tours without rounding, as the data's README has them.
UNROUNDED = {
    "a280": 2586.77, "berlin52": 7544.37, "ch130": 6110.86, "ch150": 6532.28, "eil51": 429.98, "eil76": 545.39,
    "eil101": 642.31, "kroA100": 21285.44, "kroC100": 20750.76, "kroD100": 21294.29, "lin105": 14383.00,
    "pr76": 108159.44, "rd100": 7910.40, "st70": 678.60, "tsp225": 3859.00,
}  # fmt: skip


def batch(instance: LibInstance, rounded: bool = True) -> TensorDict:
    original = instance.coordinates.unsqueeze(0)
    fields = {"locs": original.float(), "original": original, "rounded": torch.tensor([rounded])}
    if instance.demand is not None and instance.capacity is not None:
        fields["demand"] = (instance.demand / instance.capacity).unsqueeze(0)
        fields["capacity"] = torch.tensor([instance.capacity])
    return TensorDict(fields, [1])


def test_the_optimal_tours_cost_the_published_optima(data_dir: Path) -> None:
    optima = read_optima(data_dir / "tsplib" / "optima.csv")
    tours = sorted((data_dir / "tsplib").glob("*.opt.tour"))
    costs, lengths = {}, {}
    for path in tours:
        name = path.name.removesuffix(".opt.tour")
        instance = read_instance(path.with_name(f"{name}.tsp"))
        tour = read_tour(path, instance.size).view(1, 1, -1)
        TSP().check(batch(instance), tour)
        costs[name] = float(TSP().cost(batch(instance), tour))
        lengths[name] = float(TSP().cost(batch(instance, rounded=False), tour))
    assert len(costs) == 15
    assert costs == {name: optima[name] for name in costs}
    assert lengths == pytest.approx(UNROUNDED, abs=0.005)


def test_the_best_known_solutions_cost_what_is_published(data_dir: Path) -> None:
    best = read_optima(data_dir / "cvrplib" / "best_known.csv")
    solutions = sorted((data_dir / "cvrplib" / "X").glob("*.sol"))
    costs, stated = {}, {}
    for path in solutions:
        instance = read_instance(path.with_suffix(".vrp"))
        solution = read_solution(path, instance.size)
        actions = solution.actions().view(1, 1, -1)
        CVRP().check(batch(instance), actions)
        costs[path.stem], stated[path.stem] = float(CVRP().cost(batch(instance), actions)), solution.cost
    assert len(costs) == 33
    assert costs == stated == {name: best[name] for name in costs}


def test_a_solution_that_overloads_a_vehicle_is_seen(data_dir: Path) -> None:
    """The check above is not empty: the same routes, two of them joined, carry too much."""
    path = data_dir / "cvrplib" / "X" / "X-n101-k25.sol"
    instance, routes = read_instance(path.with_suffix(".vrp")), read_solution(path).routes
    joined = [node for route in [routes[0] + routes[1], *routes[2:]] for node in (*route, 0)]
    with pytest.raises(ValueError, match="a trip may not carry more than the capacity"):
        CVRP().check(batch(instance), torch.tensor(joined[:-1]).view(1, 1, -1))


def test_instances_and_solutions_equal_vrplib(data_dir: Path) -> None:
    vrplib = pytest.importorskip("vrplib", reason="the extra 'routing' brings vrplib")
    paths = sorted(data_dir.glob("tsplib/*.tsp")) + sorted(data_dir.glob("cvrplib/*/*.vrp"))
    for path in paths:
        ours = read_instance(path)
        theirs = vrplib.read_instance(path, compute_edge_weights=False)
        assert np.array_equal(ours.coordinates.numpy(), theirs["node_coord"]), path
        assert (ours.name, len(ours.coordinates)) == (str(theirs["name"]), theirs["dimension"])
        if ours.kind == "cvrp":
            assert ours.demand is not None
            assert [0, *ours.demand.tolist()] == theirs["demand"].tolist(), path
            assert ours.capacity == theirs["capacity"]
            assert theirs["depot"].tolist() == [0]  # it counts nodes from 0
    assert len(paths) == 37 + 94
    for path in sorted(data_dir.glob("cvrplib/X/*.sol")):
        with warnings.catch_warnings():
            ours, theirs = read_solution(path), vrplib.read_solution(path)
        assert (ours.routes, ours.cost) == (theirs["routes"], theirs["cost"])


def test_every_instance_has_its_published_optimum(data_dir: Path) -> None:
    for optima, pattern in [("tsplib/optima.csv", "tsplib/*.tsp"), ("cvrplib/best_known.csv", "cvrplib/*/*.vrp")]:
        paths = list(data_dir.glob(pattern))
        assert {path.stem for path in paths} == set(read_optima(data_dir / optima))
