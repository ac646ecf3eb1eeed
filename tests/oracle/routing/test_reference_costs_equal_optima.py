"""Oracles against enumeration, each other, and published optima."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from datamodules.routing.lib_files import read_instance, read_optima
from datamodules.routing.oracles import (
    Elkai,
    Instance,
    ORTools,
    PrizeCollecting,
    PyVRP,
    References,
    RuinRecreate,
    default_oracle,
    instances_of,
    make_oracle,
)
from datamodules.routing.problems import make_problem
from modules.routing.evaluation import optimality_gap

OPTIONS = {
    "cvrp": {"capacity": 15},
    "sdvrp": {"capacity": 15},
    "pctsp": {"tour_length": 2.0},
    "spctsp": {"tour_length": 2.0},
    "op": {"limit": 1.8},
}


def batch_of(name, size, count=4, seed=0):
    problem = make_problem(name, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(seed)
    locs = torch.rand(count, problem.nodes(size), 2, generator=generator)
    return problem, problem.generate(locs, generator)


def enumerated(instance: Instance) -> float:
    """The optimum by trying everything."""
    customers = range(instance.problem != "tsp", instance.nodes)
    if instance.problem == "tsp":
        return min(instance.cost([0, *rest]) for rest in itertools.permutations(range(1, instance.nodes)))
    best = math.inf
    if instance.problem == "cvrp":
        for order in itertools.permutations(customers):
            for cuts in itertools.product([False, True], repeat=len(order) - 1):
                route = [order[0]]
                for node, cut in zip(order[1:], cuts, strict=True):
                    route += [0, node] if cut else [node]
                if all(instance.demand[trip].sum() <= instance.capacity for trip in instance.trips(route)):
                    best = min(best, instance.cost(route))
        return best
    for count in range(instance.nodes):
        for order in itertools.permutations(customers, count):
            route = list(order)
            if instance.problem == "op":
                if instance.length([0, *route, 0]) <= instance.limit:
                    best = min(best, instance.cost(route))
            elif instance.prize[route].sum() >= 1.0 - 1e-7 or count == instance.nodes - 1:
                best = min(best, instance.cost(route))
    return best


@pytest.mark.parametrize(("name", "size"), [("tsp", 7), ("cvrp", 5), ("pctsp", 6), ("spctsp", 6), ("op", 6)])
def test_exact_equals_enumeration_and_the_problems_own_cost(name, size):
    problem, batch = batch_of(name, size)
    costs = References("exact").costs(problem, batch)
    expected = [enumerated(instance) for instance in instances_of(name, batch)]
    torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "oracle"),
    [
        ("tsp", 10, Elkai()),
        ("tsp", 10, RuinRecreate(300)),
        ("cvrp", 7, PyVRP(500)),
        ("op", 8, PyVRP(500)),
        ("pctsp", 8, ORTools()),
        ("spctsp", 8, ORTools()),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_packages_and_heuristics_reach_the_optima_of_small_instances(name, size, oracle):
    problem, batch = batch_of(name, size, count=5, seed=3)
    optimum, found = References("exact").costs(problem, batch), References(oracle).costs(problem, batch)
    torch.testing.assert_close(found, optimum, rtol=0, atol=2e-3 if isinstance(oracle, PyVRP) else 1e-6)
    assert (found >= optimum - 1e-9).all()


@pytest.mark.parametrize(
    ("name", "oracle", "bound"),
    [
        ("tsp", "two_opt", 6.0),
        ("tsp", "farthest_insertion", 12.0),
        ("tsp", "random_insertion", 20.0),
        ("tsp", "nearest_insertion", 30.0),
        ("pctsp", "ruin_recreate(200)", 0.5),
        ("pctsp", "prize_collecting(300)", 0.5),
        ("op", "ruin_recreate(200)", 3.0),
        ("cvrp", "ruin_recreate(200)", 1.0),
        ("cvrp", "ortools(50)", 8.0),
    ],
)
def test_heuristics_are_never_below_the_optimum_and_not_far_above(name, oracle, bound):
    problem, batch = batch_of(name, 8, count=6, seed=5)
    gaps = optimality_gap(References(oracle).costs(problem, batch), References("exact").costs(problem, batch))
    assert float(gaps.min()) > -1e-6
    assert float(gaps.mean()) < bound


def test_pyvrp_prizes_equal_the_exact_pctsp_where_the_least_prize_is_no_bar():
    problem, batch = batch_of("pctsp", 8, count=6, seed=7)
    batch["real_prize"] = torch.full_like(batch["real_prize"], 1.0)  # one customer is enough
    batch["prize"] = batch["real_prize"]
    batch["penalty"] = batch["penalty"] + 0.2  # so that somebody is worth a visit
    relaxed = References(PrizeCollecting(500)).costs(problem, batch)
    torch.testing.assert_close(relaxed, References("exact").costs(problem, batch), rtol=0, atol=2e-3)


def test_splitting_is_never_dearer_than_the_oracle_without():
    problem, batch = batch_of("sdvrp", 7)
    costs = References(default_oracle("sdvrp", 7)).costs(problem, batch)
    whole = References("exact").costs(make_problem("cvrp", capacity=15), batch)
    torch.testing.assert_close(costs, whole, rtol=0, atol=2e-3)


def test_no_oracle_beats_a_published_optimum_and_lkh_reaches_it(data_dir):
    problem, optima = make_problem("tsp"), read_optima(data_dir / "tsplib" / "optima.csv")
    from tensordict import TensorDict

    for name in ("eil51", "berlin52", "st70", "pr76"):
        instance = read_instance(data_dir / "tsplib" / f"{name}.tsp")
        points = instance.coordinates.double().unsqueeze(0)
        batch = TensorDict({"locs": points, "original": points, "rounded": torch.ones(1, dtype=torch.bool)}, [1])
        assert float(References(Elkai(10)).costs(problem, batch)) == optima[name]
        assert float(References("two_opt").costs(problem, batch)) >= optima[name]


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_the_smallest_tours(nodes):
    from tensordict import TensorDict

    problem = make_problem("tsp")
    locs = torch.rand(2, nodes, 2, generator=torch.Generator().manual_seed(1))
    batch = TensorDict({"locs": locs}, [2])
    expected = [min(i.cost(list(p)) for p in itertools.permutations(range(nodes))) for i in instances_of("tsp", batch)]
    for oracle in ("elkai", "exact", "two_opt", "ruin_recreate(20)"):
        costs = References(make_oracle(oracle)).costs(problem, batch)
        torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_equal_nodes_cost_nothing():
    from tensordict import TensorDict

    batch = TensorDict({"locs": torch.full((1, 6, 2), 0.5)}, [1])
    for oracle in ("elkai", "exact", "two_opt", "ruin_recreate(20)", "nearest_insertion"):
        assert float(References(oracle).costs(make_problem("tsp"), batch)) == 0.0


@pytest.mark.parametrize("side", [1e-20, 1e-4, 1e7, 1e9])
@pytest.mark.parametrize("rounded", [False, True])
def test_tours_of_any_scale(side, rounded):
    """LKH counts in 32 bits: what overflows would end the process, what is too small would be all zeros."""
    from tensordict import TensorDict

    problem = make_problem("tsp")
    points = torch.rand(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * side
    batch = TensorDict({"locs": points.float(), "original": points, "rounded": torch.full((3,), rounded)}, [3])
    optimum = References("exact").costs(problem, batch)
    for oracle in ("elkai", "ortools"):
        torch.testing.assert_close(References(oracle).costs(problem, batch), optimum, rtol=1e-5, atol=0)


@pytest.mark.parametrize("oracle", ["pyvrp(300)", "ortools", "ruin_recreate(100)"])
@pytest.mark.parametrize("limit", [0.01, 0.6, 1e30])
def test_orienteering_under_any_limit(oracle, limit):
    problem, batch = batch_of("op", 7, count=2)
    batch["limit"] = torch.full_like(batch["limit"], limit)
    costs = References(oracle).costs(problem, batch)
    torch.testing.assert_close(costs, References("exact").costs(problem, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("oracle", ["pyvrp(300)", "ortools", "ruin_recreate(100)"])
def test_limits_between_whole_distances(oracle):
    """The customers lie on a line at whole distances; the limit is not whole and leaves room for one of them."""
    problem, batch = batch_of("op", 3, count=1)
    batch["locs"] = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [-9.0, 0.0]]])
    batch["limit"] = torch.tensor([2.5])
    batch["prize"] = torch.ones(1, 3)
    assert References(oracle).costs(problem, batch).tolist() == [-1.0]


@pytest.mark.parametrize("oracle", ["ortools", "prize_collecting(300)", "ruin_recreate(100)"])
@pytest.mark.parametrize(("count", "penalty", "cost"), [(5, 0.45, 2.0), (3, 0.6, 1.8), (2, 1e6, 2.0)])
def test_penalties_between_whole_distances(oracle, count, penalty, cost):
    """One customer at the depot is enough; the others lie together, a trip of 2 away, and pay together or not."""
    problem, batch = batch_of("pctsp", count + 1, count=1)
    batch["locs"] = torch.tensor([[[0.0, 0.0], [0.0, 0.0], *[[1.0, 0.0]] * count]])
    batch["prize"] = batch["real_prize"] = torch.tensor([[1.0, *[0.01] * count]])
    batch["penalty"] = torch.full((1, count + 1), penalty)
    assert float(References(oracle).costs(problem, batch)) == pytest.approx(cost)


def test_ruin_and_recreate_reaches_the_optimum_where_only_the_prize_binds():
    problem, batch = batch_of("pctsp", 8, count=8, seed=1)
    batch["penalty"] = torch.zeros_like(batch["penalty"])
    costs = References("ruin_recreate(300)").costs(problem, batch)
    torch.testing.assert_close(costs, References("exact").costs(problem, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["cvrp", "sdvrp", "pctsp", "spctsp", "op"])
def test_one_or_two_customers_and_all_in_one_place(name, size):
    problem, batch = batch_of(name, size)
    together = problem.generate(torch.full((2, size + 1, 2), 0.5), torch.Generator().manual_seed(0))
    for given in (batch, together):
        oracles = {"pctsp": ["prize_collecting"], "spctsp": ["prize_collecting"]}.get(name, ["pyvrp"])
        costs = [References(oracle).costs(problem, given) for oracle in (*oracles, "ortools", "ruin_recreate(20)")]
        for found in costs[1:]:
            torch.testing.assert_close(found, costs[0], rtol=0, atol=1e-6)
        if name != "sdvrp":
            torch.testing.assert_close(References("exact").costs(problem, given), costs[0], rtol=0, atol=1e-6)
