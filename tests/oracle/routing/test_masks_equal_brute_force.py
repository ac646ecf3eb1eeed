"""The best route that masks allow, over every sequence of allowed actions, against plain enumeration of solutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from datamodules.routing.problems import make_problem


def best_by_masks(problem, instance):
    """Least cost over all action sequences that begin/step allow, breadth first: all partial routes step as one."""
    state = problem.begin(instance, 1)
    routes = torch.zeros(1, 1, 0, dtype=torch.int64)
    best = math.inf
    while routes.shape[1]:
        parent, action = state["allowed"][0].nonzero().unbind(-1)
        state = {key: value[:, parent].clone() for key, value in state.items()}
        problem.step(state, action.unsqueeze(0))
        routes = torch.cat([routes[:, parent], action.view(1, -1, 1)], -1)
        ends = problem.finished(state)[0]
        if bool(ends.any()):
            whole = routes[:, ends]
            problem.check(instance, whole)
            best = min(best, float(problem.cost(instance, whole).min()))
        state = {key: value[:, ~ends] for key, value in state.items()}
        routes = routes[:, ~ends]
    return best


def draw(name, size, seed, **options):
    problem = make_problem(name, **options)
    generator = torch.Generator().manual_seed(seed)
    locs = torch.rand(1, problem.nodes(size), 2, generator=generator, dtype=torch.float64)
    return problem, problem.generate(locs, generator)


def tour_length(points, order):
    path = [0, *order, 0]
    return sum(math.dist(points[i], points[j]) for i, j in zip(path, path[1:], strict=False))


def shortest(points, members):
    return min(tour_length(points, order) for order in itertools.permutations(members))


def partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for part in partitions(rest):
        yield [[first], *part]
        for i, block in enumerate(part):
            yield [*part[:i], [first, *block], *part[i + 1 :]]


@pytest.mark.parametrize("seed", range(3))
def test_tsp(seed):
    problem, instance = draw("tsp", 6, seed)
    assert best_by_masks(problem, instance) == pytest.approx(
        shortest(instance["locs"][0].tolist(), range(1, 6)), abs=1e-12
    )


@pytest.mark.parametrize(("size", "capacity", "seed"), [(3, 9, 0), (4, 12, 1), (5, 12, 2), (5, 20, 3)])
@pytest.mark.parametrize("whole", [True, False])
def test_cvrp(size, capacity, seed, whole):
    problem, instance = draw("cvrp", size, seed, capacity=capacity)
    demand = [0, *(instance["demand"][0] * capacity).round().long().tolist()]
    points = instance["locs"][0].tolist()
    if not whole:
        del instance["capacity"]
    expected = min(
        sum(shortest(points, block) for block in part)
        for part in partitions(list(range(1, size + 1)))
        if all(sum(demand[i] for i in block) <= capacity for block in part)
    )
    assert best_by_masks(problem, instance) == pytest.approx(expected, abs=1e-12)


def test_cvrp_of_six():
    """All masked sequences are too many; the partition's best must pass check, and no random route may beat it."""
    problem, instance = draw("cvrp", 6, 4, capacity=15)
    demand = [0, *(instance["demand"][0] * 15).round().long().tolist()]
    points = instance["locs"][0].tolist()
    feasible = [
        part for part in partitions(list(range(1, 7))) if all(sum(demand[i] for i in block) <= 15 for block in part)
    ]
    best = min(feasible, key=lambda part: sum(shortest(points, block) for block in part))
    expected = sum(shortest(points, block) for block in best)
    trips = [min(itertools.permutations(block), key=lambda order: tour_length(points, order)) for block in best]
    route = [node for trip in trips for node in (*trip, 0)]
    problem.check(instance, torch.tensor([[route]]))
    assert float(problem.cost(instance, torch.tensor([[route]]))) == pytest.approx(expected, abs=1e-12)
    state, actions = problem.begin(instance, 20_000), []
    generator = torch.Generator().manual_seed(0)
    while not actions or not problem.finished(state).all():
        actions.append(torch.multinomial(state["allowed"][0].float(), 1, generator=generator).view(1, -1))
        problem.step(state, actions[-1])
    found = float(problem.cost(instance, torch.stack(actions, -1)).min())
    assert found >= expected - 1e-12
    assert found == pytest.approx(expected, rel=0.1)


def split_best(points, demand, capacity):
    """Every sequence of visits by recursion on remaining whole demands; delivers greedily, as the rules say."""
    best = math.inf

    def go(at, left, load, length):
        nonlocal best
        if length >= best:
            return
        if not any(left):
            best = min(best, length + math.dist(points[at], points[0]))
            return
        if at:
            go(0, left, capacity, length + math.dist(points[at], points[0]))
        for i, asked in enumerate(left):
            given = min(asked, load)
            if given:
                after = (*left[:i], asked - given, *left[i + 1 :])
                go(i + 1, after, load - given, length + math.dist(points[at], points[i + 1]))

    go(0, tuple(demand), capacity, 0.0)
    return best


@pytest.mark.parametrize(("size", "capacity", "seed"), [(2, 9, 0), (3, 9, 1), (3, 10, 2), (4, 11, 3)])
@pytest.mark.parametrize("whole", [True, False])
def test_sdvrp(size, capacity, seed, whole):
    problem, instance = draw("sdvrp", size, seed, capacity=capacity)
    demand = (instance["demand"][0] * capacity).round().long().tolist()
    if not whole:
        del instance["capacity"]
    expected = split_best(instance["locs"][0].tolist(), demand, capacity)
    assert best_by_masks(problem, instance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "scale"), [(3, 1.0), (5, 2.0), (6, 1.0), (7, 3.0)])
@pytest.mark.parametrize("name", ["pctsp", "spctsp"])
def test_pctsp(name, size, scale):
    problem, instance = draw(name, size, size, tour_length=scale)
    points = instance["locs"][0].tolist()
    prize, penalty = [0.0, *instance["real_prize"][0].tolist()], [0.0, *instance["penalty"][0].tolist()]
    customers = range(1, size + 1)
    expected = min(
        shortest(points, members) + sum(penalty[i] for i in customers if i not in members)
        for count in range(1, size + 1)
        for members in itertools.combinations(customers, count)
        if sum(prize[i] for i in members) >= 1 or count == size
    )
    assert best_by_masks(problem, instance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "limit"), [(3, 0.3), (5, 1.2), (6, 1.6), (7, 2.0)])
def test_op(size, limit):
    problem, instance = draw("op", size, size, limit=limit)
    points, prize = instance["locs"][0].tolist(), [0.0, *instance["prize"][0].tolist()]
    customers = range(1, size + 1)
    expected = max(
        sum(prize[i] for i in members)
        for count in range(size + 1)
        for members in itertools.combinations(customers, count)
        if not members or shortest(points, members) <= limit
    )
    assert -best_by_masks(problem, instance) == pytest.approx(expected, abs=1e-12)
