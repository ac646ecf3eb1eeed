"""The state machine asks for scipy's points and accepts scipy's simplices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch

from modules.rlhf.nelder_mead import NelderMead

Function = Callable[[np.ndarray], float]

SIMPLICES = {
    2: np.array([[0.2, 0.1], [0.9, 0.3], [0.4, 0.8]]),
    3: np.array([[0.2, 0.1, 0.5], [0.9, 0.3, 0.1], [0.4, 0.8, 0.3], [0.6, 0.2, 0.9]]),
}


def quadratic(point: np.ndarray) -> float:
    scale = np.arange(1, len(point) + 1) ** 2
    return float(scale @ (point - 0.3) ** 2 + 0.5 * point[0] * point[1])


def rosenbrock(point: np.ndarray) -> float:
    return float(scipy.optimize.rosen(point))


def ridge(point: np.ndarray) -> float:
    """A crease that makes simplices shrink."""
    return float(np.abs(point).max() + 10 * np.abs(point - point.mean()).sum() ** 0.5)


def theirs(
    function: Function, simplex: np.ndarray, iterations: int, bounds: list[tuple[float, float]] | None
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Points in the order evaluated, the last simplex and its values."""
    asked: list[np.ndarray] = []

    def recorded(point: np.ndarray) -> float:
        asked.append(point.copy())
        return function(point)

    # one more than the simplices accepted after the first: scipy counts the first too
    found = scipy.optimize.minimize(
        recorded,
        simplex[0],
        method="Nelder-Mead",
        bounds=bounds,
        options={"initial_simplex": simplex, "maxiter": iterations + 1, "xatol": -1.0, "fatol": -1.0},
    )
    vertices, values = found.final_simplex
    return asked, vertices, values


def ours(function: Function, search: NelderMead, iterations: int) -> tuple[list[np.ndarray], dict[int, list], set[str]]:
    """Points in the order asked, simplices by iteration, and the phases gone through."""
    asked, simplices, phases = [], {}, set()
    while True:
        if search.phase == "reflect":
            simplices[search.iterations] = [search.simplex.numpy().copy(), search.values.numpy().copy()]
            if search.iterations == iterations:
                return asked, simplices, phases
        phases.add(search.phase)
        point = search.ask().numpy()
        asked.append(point)
        search.tell(function(point))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("function", [quadratic, rosenbrock, ridge], ids=lambda one: one.__name__)
@pytest.mark.parametrize("bounded", [False, True], ids=["free", "bounded"])
def test_points_and_simplices_equal_scipys(function, dimensions, bounded):
    simplex, iterations = SIMPLICES[dimensions], 50
    bounds = [(0.15, 0.95)] * dimensions if bounded else None
    first = np.clip(simplex, 0.15, 0.95) if bounded else simplex
    search = NelderMead(first, tolerance=0.0, bounds=bounds, cache_tolerance=-1.0)
    asked, simplices, _ = ours(function, search, iterations)
    for count in (0, 1, 2, 5, 10, 20, iterations):
        points, vertices, values = theirs(function, first, count, bounds)
        np.testing.assert_allclose(np.array(asked[: len(points)]), np.array(points), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(simplices[count][0], vertices, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(simplices[count][1], values, rtol=1e-10, atol=1e-12)
    assert len(points) == len(asked)


def test_the_functions_above_go_through_every_phase():
    phases = set()
    for function in (quadratic, rosenbrock, ridge):
        search = NelderMead(SIMPLICES[2], tolerance=0.0, cache_tolerance=-1.0)
        phases |= ours(function, search, 50)[2]
    assert phases == {"initial", "reflect", "expand", "outside", "inside", "shrink"}


def test_the_minimum_equals_scipys():
    search = NelderMead(SIMPLICES[2], tolerance=1e-14, cache_tolerance=-1.0)
    while not search.converged:
        search.tell(rosenbrock(search.ask().numpy()))
    point, value = search.best
    found = scipy.optimize.minimize(rosenbrock, [0.2, 0.1], method="Nelder-Mead", options={"xatol": 1e-8})
    assert value < 1e-12
    torch.testing.assert_close(point, torch.from_numpy(found.x), rtol=0, atol=1e-4)
