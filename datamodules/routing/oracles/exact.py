"""Proven optima of small instances by dynamic programming over subsets of customers (Held & Karp 1962)."""

from __future__ import annotations

import numpy as np

from datamodules.routing.oracles.base import Instance, Oracle, Route

LARGEST = {"tsp": 12, "cvrp": 9, "pctsp": 11, "spctsp": 11, "op": 11}
"""Customers (TSP: nodes) up to which it takes well below a second."""
_TOLERANCE = 1e-7


class Exact(Oracle):
    """Optima of TSP, CVRP, PCTSP and OP (of SPCTSP with prizes known beforehand), by size up to :data:`LARGEST`."""

    name = "exact"
    exact = True

    def route(self, instance: Instance) -> Route:
        size = instance.nodes - (instance.problem != "tsp")
        largest = LARGEST.get(instance.problem, 0)
        if size > largest:
            raise ValueError(
                f"Exact: {instance.problem} is solved up to size {largest}, got {size}: take another oracle"
            )
        if instance.nodes <= 2:
            return smallest(instance)
        tours = _Tours(instance.distance)
        if instance.problem == "tsp":
            return [0, *tours.path(len(tours.closed) - 1)]
        if instance.problem == "cvrp":
            return _partition(instance, tours)
        members = tours.members()
        assert instance.prize is not None
        prize = members @ instance.prize[1:]
        if instance.problem == "op":
            value = np.where(tours.closed <= instance.limit + _TOLERANCE, -prize, np.inf)
        else:
            assert instance.penalty is not None
            enough = prize >= 1.0 - _TOLERANCE
            enough[-1] = True  # all visited
            value = np.where(enough, tours.closed + (~members.astype(bool)) @ instance.penalty[1:], np.inf)
        return tours.path(int(value.argmin()))


def smallest(instance: Instance) -> Route:
    """The optimum where there is nothing to decide: two nodes at most, or all in one place (not CVRP, SDVRP)."""
    if instance.problem == "tsp":
        return list(range(instance.nodes))
    everyone = list(range(1, instance.nodes))
    if instance.problem == "op" and instance.length([0, *everyone, 0]) > instance.limit + _TOLERANCE:
        return []
    return everyone  # CVRP: served; PCTSP: without its one customer the prize is not enough


class _Tours:
    """Shortest closed tours from node 0 through every subset of the others; bit i of a subset is node i + 1."""

    def __init__(self, distance: np.ndarray) -> None:
        count = len(distance) - 1
        self.count, self.distance = count, distance
        best = np.full((1 << count, count), np.inf)  # shortest path from 0 through the subset that ends at a node
        subsets = np.arange(1 << count)
        for node in range(count):
            best[1 << node, node] = distance[0, node + 1]
        inner = distance[1:, 1:]
        sizes = np.array([bin(s).count("1") for s in subsets])
        for size in range(2, count + 1):
            chosen = subsets[sizes == size]
            for node in range(count):
                has = chosen[(chosen >> node) & 1 == 1]
                best[has, node] = (best[has ^ (1 << node)] + inner[:, node]).min(1)
        self.best = best
        self.closed = (best + distance[1:, 0]).min(1)
        self.closed[0] = 0.0

    def members(self) -> np.ndarray:
        """``[subsets, customers]`` 0 or 1."""
        return ((np.arange(1 << self.count)[:, None] >> np.arange(self.count)) & 1).astype(np.float64)

    def path(self, subset: int) -> Route:
        """The shortest tour's nodes, without 0."""
        route: Route = []
        costs = self.best[subset] + self.distance[1:, 0] if subset else None
        while subset:
            assert costs is not None
            node = int(costs.argmin())
            route.append(node + 1)
            subset ^= 1 << node
            costs = self.best[subset] + self.distance[1:, node + 1]
        return route[::-1]


def _partition(instance: Instance, tours: _Tours) -> Route:
    """The cheapest partition of the customers into trips within capacity."""
    assert instance.demand is not None
    feasible = tours.members() @ instance.demand[1:] <= instance.capacity
    everyone = (1 << tours.count) - 1
    best, first = [0.0] * (everyone + 1), [0] * (everyone + 1)
    for subset in range(1, everyone + 1):
        lowest = subset & -subset
        rest, found = subset ^ lowest, np.inf
        part = rest
        while True:  # all trips that hold the lowest customer
            trip = part | lowest
            if feasible[trip] and tours.closed[trip] + best[subset ^ trip] < found:
                found, first[subset] = tours.closed[trip] + best[subset ^ trip], trip
            if part == 0:
                break
            part = (part - 1) & rest
        best[subset] = found
    route: Route = []
    subset = everyone
    while subset:
        route += [*([0] if route else []), *tours.path(first[subset])]
        subset ^= first[subset]
    return route
