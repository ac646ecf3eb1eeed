"""Heuristics that need no package: insertion for the TSP, and ruin and recreate for all problems."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from datamodules.routing.oracles.base import Instance, Oracle, Route

_TOLERANCE = 1e-7
_HEAT = 0.02
"""By what share of the cost a worse state is accepted at first, on average."""


class Insertion(Oracle):
    """Insertion heuristics of the TSP (Rosenkrantz et al. 1977): cheapest place for the next node.

    Args:
        order: the next node is the one ``nearest`` to the tour, the ``farthest``, or a ``random`` one.
    """

    def __init__(self, order: Literal["nearest", "farthest", "random"] = "farthest") -> None:
        if order not in ("nearest", "farthest", "random"):
            raise ValueError(f"Insertion: order must be nearest, farthest or random, got {order!r}")
        self.order = order
        self.name = f"{order}_insertion"

    def route(self, instance: Instance) -> Route:
        if instance.problem != "tsp":
            raise ValueError(f"Insertion: solves the TSP only, got {instance.problem}")
        distance, count = instance.distance, instance.nodes
        rng = _random(instance)
        start = int(distance.max(1).argmax()) if self.order == "farthest" else 0
        tour = [start]
        to_tour = distance[start].copy()
        left = np.ones(count, dtype=bool)
        left[start] = False
        while left.any():
            if self.order == "random":
                node = int(rng.choice(np.flatnonzero(left)))
            else:
                masked = np.where(left, to_tour, np.inf if self.order == "nearest" else -np.inf)
                node = int(masked.argmin() if self.order == "nearest" else masked.argmax())
            place, _ = _cheapest(distance, tour, node, closed=True)
            tour.insert(place, node)
            left[node] = False
            to_tour = np.minimum(to_tour, distance[node])
        return tour


class TwoOpt(Oracle):
    """Farthest insertion, then 2-opt and Or-opt moves until none shortens the tour (Croes 1958; Or 1976)."""

    name = "two_opt"

    def route(self, instance: Instance) -> Route:
        return improve(instance.distance, Insertion("farthest").route(instance))


class RuinRecreate(Oracle):
    """Ruin and recreate (Schrimpf et al. 2000): customers that lie together are taken out and put back one by one.

    For all problems; each goes where it costs least. A worse state is accepted with falling probability; 2-opt per trip
    comes last.

    Args:
        iterations: rounds of ruin and recreate.

    Raises:
        ValueError: iterations < 1.
    """

    version = 2

    def __init__(self, iterations: int = 1000) -> None:
        if iterations < 1:
            raise ValueError(f"RuinRecreate: iterations must be >= 1, got {iterations}")
        self.iterations = iterations
        self.name = f"ruin_recreate({iterations})"

    def route(self, instance: Instance) -> Route:
        if instance.problem == "tsp":
            if instance.nodes <= 3:
                return list(range(instance.nodes))
            return self._tour(instance)
        rng = _random(instance)
        trips = _recreate(instance, [], list(range(1, instance.nodes)), rng)
        best = current = _route(trips)
        best_cost = current_cost = instance.cost(best)
        heat = _HEAT * max(abs(best_cost), 1e-9)
        near = instance.distance.argsort(1)
        customers = instance.nodes - 1
        most = max(2, min(15, customers // 2))
        for step in range(self.iterations):
            count = 2 + int(rng.integers(most))
            if rng.random() < 0.8:
                chosen = near[int(rng.integers(1, instance.nodes))][:count].tolist()
            else:  # from all over: what only together fits elsewhere
                chosen = (1 + rng.choice(customers, min(count, customers), replace=False)).tolist()
            gone = {node for node in chosen if node}
            gone |= {node for node in range(1, instance.nodes) if node not in current}
            kept = [[node for node in trip if node not in gone] for trip in instance.trips(current)]
            route = _route(_recreate(instance, [trip for trip in kept if trip], list(gone), rng))
            cost = instance.cost(route)
            bar = heat * (1 - step / self.iterations) * -np.log(max(rng.random(), 1e-12))
            if cost < current_cost + bar:
                current, current_cost = route, cost
                if cost < best_cost - 1e-12:
                    best, best_cost = route, cost
        polished = _route([improve(instance.distance, [0, *trip])[1:] for trip in instance.trips(best)])
        return polished if instance.cost(polished) <= best_cost else best

    def _tour(self, instance: Instance) -> Route:
        rng = _random(instance)
        best = current = TwoOpt().route(instance)
        best_cost = current_cost = instance.cost(best)
        near = instance.distance.argsort(1)
        most = max(2, min(12, instance.nodes // 3))
        for step in range(self.iterations):
            centre = int(rng.integers(instance.nodes))
            gone = near[centre][: 2 + int(rng.integers(most))].tolist()
            tour = [node for node in current if node not in set(gone)]
            rng.shuffle(gone)
            for node in gone:
                place, _ = _cheapest(instance.distance, tour, node, closed=True)
                tour.insert(place, node)
            cost = instance.cost(tour)
            bar = 0.01 * best_cost * (1 - step / self.iterations) * -np.log(max(rng.random(), 1e-12)) / 5
            if cost < current_cost + bar:
                current, current_cost = tour, cost
                if cost < best_cost - 1e-12:
                    best, best_cost = tour, cost
        return min((improve(instance.distance, best), best), key=instance.cost)


def _random(instance: Instance) -> np.random.Generator:
    """A stream that is a function of the instance."""
    digest = hashlib.sha256(np.ascontiguousarray(instance.distance).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _route(trips: list[list[int]]) -> Route:
    route: Route = []
    for trip in trips:
        route += [*([0] if route else []), *trip]
    return route


def collects_enough(instance: Instance, route: Route) -> bool:
    """Whether the prize is, or all are visited."""
    assert instance.prize is not None
    return float(instance.prize[route].sum()) >= 1.0 - _TOLERANCE or len(set(route) - {0}) == instance.nodes - 1


def _cheapest(distance: np.ndarray, path: list[int], node: int, closed: bool) -> tuple[int, float]:
    """Where in ``path`` (open: from depot to depot) ``node`` costs least, and what."""
    if closed:
        before, after = np.array(path), np.array([*path[1:], path[0]])
        added = distance[before, node] + distance[node, after] - distance[before, after]
        place = int(added.argmin())
        return place + 1, float(added[place])
    before, after = np.array([0, *path]), np.array([*path, 0])
    added = distance[before, node] + distance[node, after] - distance[before, after]
    place = int(added.argmin())
    return place, float(added[place])


def _recreate(instance: Instance, trips: list[list[int]], gone: list[int], rng: np.random.Generator) -> list[list[int]]:
    """``trips`` with the nodes ``gone`` put back where each costs least, if it pays or must be."""
    rng.shuffle(gone)
    distance = instance.distance
    if instance.demand is not None and rng.random() < 0.5:
        # the heaviest or the farthest first: what is hard to place
        by = instance.demand if rng.random() < 0.5 else distance[0]
        gone.sort(key=lambda node: -by[node])
    if instance.problem in ("cvrp", "sdvrp"):
        assert instance.demand is not None
        loads = [int(instance.demand[trip].sum()) for trip in trips]
        for node in gone:
            best, where, at = 2 * distance[0, node], len(trips), 0
            for number, trip in enumerate(trips):
                if loads[number] + instance.demand[node] <= instance.capacity:
                    place, added = _cheapest(distance, trip, node, closed=False)
                    if added < best:
                        best, where, at = added, number, place
            if where == len(trips):
                trips.append([])
                loads.append(0)
            trips[where].insert(at, node)
            loads[where] += int(instance.demand[node])
        return trips
    tour = trips[0] if trips else []
    assert instance.prize is not None
    if instance.problem == "op":
        length = instance.length([0, *tour, 0])
        for node in gone:
            place, added = _cheapest(distance, tour, node, closed=False)
            if length + added <= instance.limit + _TOLERANCE and instance.prize[node] > 0:
                tour.insert(place, node)
                length += added
        return [tour] if tour else []
    assert instance.penalty is not None
    skipped = []
    # at random nodes that pay only together come in, and others stay out; _drop takes out what does not pay
    patience = rng.choice([0.5, 1.0, 1.0, 1.5, 2.0, 1e9])
    for node in gone:
        place, added = _cheapest(distance, tour, node, closed=False)
        if added < patience * instance.penalty[node]:
            tour.insert(place, node)
        else:
            skipped.append(node)
    noise = rng.choice([0.0, 0.5])
    while skipped and not collects_enough(instance, tour):  # the node that costs least for its prize
        offers = [_cheapest(distance, tour, node, closed=False) for node in skipped]
        factors = np.exp(noise * rng.standard_normal(len(skipped)))
        worth = [
            (added - instance.penalty[node]) / max(float(instance.prize[node]), 1e-9) * factor
            for node, (_, added), factor in zip(skipped, offers, factors, strict=True)
        ]
        chosen = int(np.argmin(worth))
        tour.insert(offers[chosen][0], skipped.pop(chosen))
    _drop(instance, tour)
    return [tour] if tour else []


def _drop(instance: Instance, tour: list[int]) -> None:
    """Leave out, one by one, the nodes of a prize-collecting ``tour`` that save most, while it collects enough."""
    assert instance.penalty is not None
    assert instance.prize is not None
    while tour:
        path = np.array([0, *tour, 0])
        legs = instance.distance[path[:-1], path[1:]]
        saved = legs[:-1] + legs[1:] - instance.distance[path[:-2], path[2:]] - instance.penalty[path[1:-1]]
        spare = float(instance.prize[tour].sum()) - 1.0
        saved[instance.prize[tour] > spare + _TOLERANCE] = 0.0
        worst = int(saved.argmax())
        if saved[worst] <= 1e-12:
            return
        del tour[worst]


def improve(distance: np.ndarray, tour: Route) -> Route:
    """2-opt and Or-opt on a closed tour until no move shortens it; the first node stays first."""
    path = np.array(tour)
    count = len(path)
    if count < 4:
        return tour
    while True:
        before = path
        path = _two_opt_pass(distance, path)
        path = _or_opt_pass(distance, path)
        if path is before or np.array_equal(path, before):
            start = int(np.flatnonzero(path == tour[0])[0])
            return np.roll(path, -start).tolist()


def _least_gain(distance: np.ndarray) -> float:
    """What a move must gain: more than rounding errors at any scale, or moves could go round in circles."""
    return 1e-10 * float(distance.max())


def _two_opt_pass(distance: np.ndarray, path: np.ndarray) -> np.ndarray:
    """The best 2-opt moves, one after the other."""
    count = len(path)
    upper = np.triu(np.ones((count, count), dtype=bool), 2)
    least = _least_gain(distance)
    while True:
        after = np.roll(path, -1)
        legs = distance[path, after]
        # edges (i, i+1) and (j, j+1) become (i, j) and (i+1, j+1)
        change = distance[np.ix_(path, path)] + distance[np.ix_(after, after)] - legs[:, None] - legs[None, :]
        change = np.where(upper, change, 0.0)
        flat = int(change.argmin())
        i, j = divmod(flat, count)
        if change[i, j] >= -least:
            return path
        path = np.concatenate([path[: i + 1], path[i + 1 : j + 1][::-1], path[j + 1 :]])


def _or_opt_pass(distance: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Segments of one to three nodes moved to where they are cheapest, either way round."""
    tour = path.tolist()
    count, least = len(tour), _least_gain(distance)
    for size in (1, 2, 3):
        if count <= size + 2:
            break
        for start in range(count):
            segment = [tour[(start + offset) % count] for offset in range(size)]
            rest = [tour[(start + size + offset) % count] for offset in range(count - size)]
            removed = distance[rest[-1], segment[0]] + distance[segment[-1], rest[0]] - distance[rest[-1], rest[0]]
            before, after = np.array(rest), np.array([*rest[1:], rest[0]])
            legs = distance[before, after]
            straight = distance[before, segment[0]] + distance[segment[-1], after] - legs
            turned = distance[before, segment[-1]] + distance[segment[0], after] - legs
            place = int(np.minimum(straight, turned).argmin())
            if min(straight[place], turned[place]) < removed - least:
                chosen = segment if straight[place] <= turned[place] else segment[::-1]
                tour = [*rest[: place + 1], *chosen, *rest[place + 1 :]]
    return np.array(tour)
