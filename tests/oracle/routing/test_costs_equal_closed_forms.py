"""Costs of routes against closed forms, plain sums, and the symmetries of the square."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from datamodules.routing.problems import PROBLEMS, make_problem
from modules.routing.augmentation import dihedral

SQUARE = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)


def test_square_has_length_four():
    problem = make_problem("tsp")
    tours = torch.tensor([[[0, 1, 2, 3], [2, 1, 0, 3], [0, 2, 1, 3]]])
    cost = problem.cost(TensorDict({"locs": SQUARE}, [1]), tours)
    assert cost.tolist() == [[4.0, 4.0, 2.0 + 2.0 * math.sqrt(2.0)]]


@pytest.mark.parametrize("nodes", [3, 10, 100])
def test_circle_has_the_regular_polygons_length(nodes):
    angle = torch.arange(nodes, dtype=torch.float64) * (2 * math.pi / nodes)
    locs = 0.5 + 0.5 * torch.stack([angle.cos(), angle.sin()], -1)
    tour = torch.arange(nodes).view(1, 1, -1)
    cost = make_problem("tsp").cost(TensorDict({"locs": locs.unsqueeze(0)}, [1]), torch.cat([tour, tour.flip(-1)], 1))
    torch.testing.assert_close(cost, torch.full((1, 2), nodes * math.sin(math.pi / nodes), dtype=torch.float64))


def test_trips_are_there_and_back():
    one = TensorDict(
        {"locs": SQUARE, "demand": torch.full((1, 3), 0.5), "penalty": torch.tensor([[1.0, 2.0, 4.0]])}, [1]
    )
    route = torch.tensor([[[1, 2, 0, 3]]])
    expected = torch.tensor([[1 + 1 + math.sqrt(2) + 2]], dtype=torch.float64)
    torch.testing.assert_close(make_problem("cvrp").cost(one, route), expected)
    torch.testing.assert_close(make_problem("sdvrp").cost(one, route), expected)
    # left out are nodes 1 and 2
    assert float(make_problem("pctsp").cost(one, torch.tensor([[[3, 0, 0]]]))) == 2.0 + 1.0 + 2.0


def test_rounding_is_that_of_each_leg_and_of_the_original():
    locs = torch.tensor([[[0.0, 0.0], [1.4, 0.0], [2.9, 0.0]]] * 2, dtype=torch.float64)
    pair = TensorDict({"locs": locs.float() / 10, "original": locs, "rounded": torch.tensor([True, False])}, [2])
    cost = make_problem("tsp").cost(pair, torch.tensor([[[0, 1, 2]]] * 2))
    torch.testing.assert_close(cost, torch.tensor([[1.0 + 2.0 + 3.0], [5.8]], dtype=torch.float64))


def test_limits_hold_for_rounded_legs():
    """0-1-2-0 is 1.4 + 1.5 + 2.9 = 5.8 long, or 1 + 2 + 3 = 6 with rounded legs."""
    problem = make_problem("op")
    locs = torch.tensor([[[0.0, 0.0], [1.4, 0.0], [2.9, 0.0]]] * 2, dtype=torch.float64)
    fields = {"locs": locs.float() / 10, "original": locs, "rounded": torch.tensor([True, False])}
    pair = TensorDict({**fields, "prize": torch.ones(2, 2), "limit": torch.tensor([5.9, 5.9])}, [2])
    state = problem.begin(pair, 1)
    problem.step(state, torch.ones(2, 1, dtype=torch.int64))
    assert state["allowed"][:, 0, 2].tolist() == [False, True]
    problem.check(pair[1:], torch.tensor([[[1, 2]]]))
    with pytest.raises(ValueError, match="exceed the limit"):
        problem.check(pair[:1], torch.tensor([[[1, 2]]]))


def random_routes(problem, instances, rollouts, seed):
    generator = torch.Generator().manual_seed(seed)
    state, actions = problem.begin(instances, rollouts), []
    while not actions or not problem.finished(state).all():
        mask = state["allowed"]
        actions.append(torch.multinomial(mask.flatten(0, 1).float(), 1, generator=generator).view(mask.shape[:2]))
        problem.step(state, actions[-1])
    return torch.stack(actions, -1)


def draw(name, dtype=torch.float64, count=4, size=20):
    problem = make_problem(name)
    generator = torch.Generator().manual_seed(5)
    locs = torch.rand(count, problem.nodes(size), 2, generator=generator, dtype=dtype)
    return problem, problem.generate(locs, generator)


@pytest.mark.parametrize("name", PROBLEMS)
def test_symmetries_of_the_square_change_no_cost(name):
    problem, instances = draw(name)
    routes = random_routes(problem, instances, 5, 6)
    cost = problem.cost(instances, routes)
    for locs in dihedral(instances["locs"]):
        seen = instances.copy()
        seen["locs"] = locs
        problem.check(seen, routes)
        torch.testing.assert_close(problem.cost(seen, routes), cost, rtol=0, atol=1e-12)


def test_tours_may_start_anywhere_and_run_backwards():
    problem, instances = draw("tsp")
    tours = random_routes(problem, instances, 3, 7)
    cost = problem.cost(instances, tours)
    for other in (tours.flip(-1), tours.roll(7, -1)):
        torch.testing.assert_close(problem.cost(instances, other), cost, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_costs_equal_plain_sums(name, dtype):
    problem, instances = draw(name, dtype)
    routes = random_routes(problem, instances, 3, 8)
    cost = problem.cost(instances, routes)
    assert cost.dtype == dtype
    for b in range(4):
        points = instances["locs"][b].double().tolist()
        for p in range(3):
            route = routes[b, p].tolist()
            path = [*route, route[0]] if name == "tsp" else [0, *route, 0]
            expected = sum(math.dist(points[i], points[j]) for i, j in zip(path, path[1:], strict=False))
            if name.endswith("pctsp"):
                expected += sum(float(w) for i, w in enumerate(instances["penalty"][b], 1) if i not in route)
            if name == "op":
                expected = -sum(float(instances["prize"][b, i - 1]) for i in route if i)
            assert float(cost[b, p]) == pytest.approx(expected, abs=1e-10 if dtype == torch.float64 else 2e-5)
