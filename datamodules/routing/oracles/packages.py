"""Oracles from packages: LKH (elkai), PyVRP and OR-Tools."""

from __future__ import annotations

import warnings

import numpy as np

from datamodules.routing.oracles.base import Instance, Oracle, Route
from datamodules.routing.oracles.exact import smallest
from datamodules.routing.oracles.heuristics import RuinRecreate, collects_enough
from modules.optional import require

_LONGEST = 1_000_000
"""What the largest distance becomes as a whole number, where distances are not whole already."""

_PYVRP_LONGEST = 20_000
"""The same for PyVRP, whose penalties of loads are bounded: against larger distances they would not count."""


def whole(instance: Instance, longest: int = _LONGEST) -> tuple[np.ndarray, float]:
    """Distances as int64, and the factor between, so that the largest is ``longest``.

    Whole distances are kept (factor 1) where nothing else is measured in them, as penalties and limits are, and where
    they are not much longer: LKH ends the whole process when its integers overflow.
    """
    distance, largest = instance.distance, float(instance.distance.max())
    alone = instance.problem in ("tsp", "cvrp", "sdvrp") and largest <= 10 * longest
    if largest == 0.0 or (alone and np.array_equal(distance, np.rint(distance))):
        return distance.astype(np.int64), 1.0
    factor = longest / largest
    return np.rint(distance * factor).astype(np.int64), factor


def whole_limit(instance: Instance, factor: float) -> int:
    """The limit of the OP in :func:`whole` distances, less what rounding may hide: half of one for each leg."""
    enough = min(instance.limit, instance.nodes * float(instance.distance.max()))
    return max(0, int(enough * factor - instance.nodes / 2))


def whole_penalty(instance: Instance, node: int, factor: float) -> int:
    """The penalty of ``node`` in :func:`whole` distances; at most three of the longest, since a detour costs two."""
    assert instance.penalty is not None
    return int(round(min(float(instance.penalty[node]), 3 * float(instance.distance.max())) * factor))


class Elkai(Oracle):
    """LKH (Helsgaun 2000) for the TSP, through elkai; free for academic and non-commercial use only.

    Args:
        runs: restarts.

    Raises:
        ValueError: runs < 1.
        ImportError: elkai is not installed.
    """

    def __init__(self, runs: int = 1) -> None:
        if runs < 1:
            raise ValueError(f"Elkai: runs must be >= 1, got {runs}")
        require("elkai", extra="lkh")
        self.runs = runs
        self.name = f"elkai(runs={runs})"

    def route(self, instance: Instance) -> Route:
        if instance.problem != "tsp":
            raise ValueError(f"Elkai: solves the TSP only, got {instance.problem}")
        if instance.nodes <= 3 or not instance.distance.any():  # LKH needs four nodes
            return list(range(instance.nodes))
        matrix = whole(instance)[0].tolist()
        return [int(node) for node in require("elkai", extra="lkh").DistanceMatrix(matrix).solve_tsp(self.runs)[:-1]]


class PyVRP(Oracle):
    """PyVRP (Wouda, Lan & Kool 2024): CVRP, SDVRP (without splitting), OP, and PCTSP where its least prize is no bar.

    Args:
        iterations: of its search; seed: of it.

    Raises:
        ValueError: iterations < 1.
        ImportError: pyvrp is not installed.
    """

    version = 2

    def __init__(self, iterations: int = 2000, seed: int = 0) -> None:
        if iterations < 1:
            raise ValueError(f"PyVRP: iterations must be >= 1, got {iterations}")
        require("pyvrp", extra="routing")
        self.iterations, self.seed = iterations, seed
        self.name = f"pyvrp({iterations})" if seed == 0 else f"pyvrp({iterations}, seed {seed})"

    def route(self, instance: Instance) -> Route:
        pyvrp = require("pyvrp", extra="routing")
        if instance.nodes <= 2 or (instance.demand is None and not instance.distance.any()):
            return smallest(instance)
        distance, factor = whole(instance, _PYVRP_LONGEST)
        model = pyvrp.Model()
        nodes = [model.add_location(x=0, y=0) for _ in range(instance.nodes)]
        model.add_depot(nodes[0])
        customers = range(1, instance.nodes)
        if instance.problem in ("cvrp", "sdvrp"):
            assert instance.demand is not None
            model.add_vehicle_type(num_available=len(customers), capacity=instance.capacity)
            for node in customers:
                model.add_client(nodes[node], delivery=int(instance.demand[node]))
        elif instance.problem == "op":
            assert instance.prize is not None
            model.add_vehicle_type(num_available=1, max_distance=whole_limit(instance, factor))
            worth = 100 * _PYVRP_LONGEST  # a prize of 1 outweighs any distance
            for node in customers:
                model.add_client(nodes[node], prize=int(instance.prize[node] * worth), required=False)
        else:
            assert instance.penalty is not None
            model.add_vehicle_type(num_available=1)
            for node in customers:
                model.add_client(nodes[node], prize=whole_penalty(instance, node, factor), required=False)
        rows = distance.tolist()
        for i, origin in enumerate(nodes):
            for j, goal in enumerate(nodes):
                if i != j:
                    model.add_edge(origin, goal, distance=rows[i][j])
        stop = require("pyvrp.stop", extra="routing").MaxIterations(self.iterations)
        with warnings.catch_warnings():  # of penalties at their bound; an infeasible end is seen below
            warnings.simplefilter("ignore")
            best = model.solve(stop, seed=self.seed, display=False, collect_stats=False).best
        if not best.is_feasible():
            return RuinRecreate().route(instance)
        route: Route = []
        for trip in best.routes():
            route += [*([0] if route else []), *visits(trip)]
        return route


def visits(trip: object) -> list[int]:
    """Customers of one of PyVRP's routes, from 1."""
    return [activity.idx + 1 for activity in trip if activity.is_client()]  # type: ignore[attr-defined]


class ORTools(Oracle):
    """OR-Tools' routing search: TSP, CVRP, PCTSP with its least prize, and OP.

    Args:
        solutions: improvements after which the search ends; seconds: its time at most, which a busy machine reaches
            sooner, so that results can depend on speed.

    Raises:
        ValueError: a number out of range.
        ImportError: ortools is not installed.
    """

    version = 2

    def __init__(self, solutions: int = 200, seconds: int = 1) -> None:
        if solutions < 1 or seconds < 1:
            raise ValueError(f"ORTools: solutions and seconds must be >= 1, got {solutions} and {seconds}")
        require("ortools.constraint_solver.pywrapcp", extra="routing")
        self.solutions, self.seconds = solutions, seconds
        self.name = f"ortools({solutions}, {seconds} s)"

    def route(self, instance: Instance) -> Route:
        routing = require("ortools.constraint_solver.pywrapcp", extra="routing")
        enums = require("ortools.constraint_solver.routing_enums_pb2", extra="routing")
        if instance.nodes <= 2 or (instance.demand is None and not instance.distance.any()):
            return smallest(instance)
        distance, factor = whole(instance)
        vehicles = instance.nodes - 1 if instance.problem in ("cvrp", "sdvrp") else 1
        manager = routing.RoutingIndexManager(instance.nodes, vehicles, 0)
        model = routing.RoutingModel(manager)
        transit = model.RegisterTransitMatrix(distance.tolist())
        model.SetArcCostEvaluatorOfAllVehicles(transit)
        indices = [manager.NodeToIndex(node) for node in range(instance.nodes)]
        if instance.demand is not None:
            load = model.RegisterUnaryTransitVector([int(value) for value in instance.demand])
            model.AddDimension(load, 0, instance.capacity, True, "load")
        elif instance.problem == "op":
            assert instance.prize is not None
            model.AddDimension(transit, 0, whole_limit(instance, factor), True, "length")
            for node in range(1, instance.nodes):
                model.AddDisjunction([indices[node]], int(instance.prize[node] * 100 * _LONGEST))
        elif instance.penalty is not None:
            assert instance.prize is not None
            prizes = [int(value * _LONGEST) for value in instance.prize]
            gathered = model.RegisterUnaryTransitVector(prizes)
            model.AddDimension(gathered, 0, sum(prizes), True, "prize")
            if sum(prizes) >= _LONGEST:  # else all must be visited, those without a prize too
                model.GetDimensionOrDie("prize").CumulVar(model.End(0)).SetMin(_LONGEST)
                for node in range(1, instance.nodes):
                    model.AddDisjunction([indices[node]], whole_penalty(instance, node, factor))
        parameters = routing.DefaultRoutingSearchParameters()
        parameters.first_solution_strategy = enums.FirstSolutionStrategy.PATH_CHEAPEST_ARC
        parameters.local_search_metaheuristic = enums.LocalSearchMetaheuristic.GUIDED_LOCAL_SEARCH
        parameters.solution_limit = self.solutions
        parameters.time_limit.FromSeconds(self.seconds)
        solution = model.SolveWithParameters(parameters)
        if solution is None:
            raise ValueError(f"ORTools: found no solution of a {instance.problem} of {instance.nodes} nodes")
        route: Route = [0] if instance.problem == "tsp" else []
        for vehicle in range(vehicles):
            index = solution.Value(model.NextVar(model.Start(vehicle)))
            trip = []
            while not model.IsEnd(index):
                trip.append(manager.IndexToNode(index))
                index = solution.Value(model.NextVar(index))
            if trip:
                route += [*([0] if route and instance.problem != "tsp" else []), *trip]
        return route


class PrizeCollecting(Oracle):
    """PCTSP: PyVRP's tour where it collects enough, else ruin and recreate; the cheaper of the two.

    Args:
        iterations: of either search.
    """

    version = 2

    def __init__(self, iterations: int = 1000) -> None:
        self.first, self.second = PyVRP(iterations), RuinRecreate(iterations)
        self.name = f"prize_collecting({self.first.name}, {self.second.name})"

    def route(self, instance: Instance) -> Route:
        routes = [self.second.route(instance)]
        relaxed = self.first.route(instance)
        if collects_enough(instance, relaxed):
            routes.append(relaxed)
        return min(routes, key=instance.cost)
