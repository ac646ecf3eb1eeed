"""Proxy points: the rewards up to which more reward still means a better evaluation, fitted from finished runs.

Moskovitz et al. 2024, section 3: a polynomial surface of the evaluation score over all rewards, points weighted by a
kernel density estimate, and its greatest value where there are points. It is a joint maximum: rewards correlate, so
that it differs from the maxima of the rewards by themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

GRID = {1: 2001, 2: 151, 3: 41}
"""Grid points per reward, by the number of rewards."""
MAX_DEGREE = 10
_CHUNK = 4_000_000  # distances held at once: 32 MB
_POINTS_PER_COEFFICIENT = 2  # fewer, and a surface only joins the points
_TRUST = 2.0  # leave-one-out errors by which a surface may exceed the best score seen
_RESAMPLE_GRID = {1: 401, 2: 51, 3: 17}


@dataclass(frozen=True)
class ProxyFit:
    """A fitted surface and its greatest value; arrays are float64.

    Args:
        theta: ``[N]``, the proxy point.
        score: the surface there.
        degree: of the polynomial, all powers of a term together.
        error: root mean square of the leave-one-out residuals, in units of the score.
        density: ``[n]``, kernel density estimate at the points, in units of the rewards.
        alone: ``[N]``, where a curve over each reward by itself is greatest.
        low, high: ``[N]``, 95 % bootstrap interval of ``theta``; NaN without a bootstrap.
        surface: ``[m, N] -> [m]``, the fitted score.
        eligible: ``[m, N] -> [m]`` bool, where the data reach.
    """

    theta: np.ndarray
    score: float
    degree: int
    error: float
    density: np.ndarray
    alone: np.ndarray
    low: np.ndarray
    high: np.ndarray
    surface: Callable[[np.ndarray], np.ndarray]
    eligible: Callable[[np.ndarray], np.ndarray]

    def plain(self, names: list[str]) -> dict[str, Any]:
        """What a file of thresholds holds, for JSON."""

        def named(values: np.ndarray) -> dict[str, float]:
            return dict(zip(names, values.tolist(), strict=True))

        found: dict[str, Any] = {
            "thresholds": named(self.theta),
            "score": self.score,
            "points": len(self.density),
            "degree": self.degree,
            "error": self.error,
            "alone": named(self.alone),
        }
        if np.isfinite(self.low).all():
            found["interval"] = {"low": named(self.low), "high": named(self.high)}
        return found


def gaussian_kde(points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Density of ``points`` ``[n, N]``: Gaussian kernels of the points' covariance, by Scott's rule (1992).

    Returns:
        ``[m, N] -> [m]``.

    Raises:
        ValueError: points that lie on a line (or plane), whose covariance cannot be inverted.
    """
    count, dimensions = points.shape
    covariance = np.atleast_2d(np.cov(points.T)) * count ** (-2.0 / (dimensions + 4))
    scale = np.sqrt(np.diag(covariance))
    if not (scale > 0).all() or np.linalg.eigvalsh(covariance / np.outer(scale, scale))[0] < 1e-12:
        raise ValueError(
            "fit_proxy_points: points: the rewards rise and fall exactly together, so that no joint density exists; "
            "add runs with other weightings, or set weights: uniform"
        )
    factor = np.linalg.cholesky(covariance)
    white = np.linalg.solve(factor, points.T).T
    constant = count * (2 * math.pi) ** (dimensions / 2) * np.prod(np.diag(factor))

    def density(where: np.ndarray) -> np.ndarray:
        whitened = np.linalg.solve(factor, where.T).T
        return _by_chunks(whitened, white, lambda squares: np.exp(-0.5 * squares).sum(-1)) / constant

    return density


def fit_proxy_points(
    points: ArrayLike,
    scores: ArrayLike,
    degree: int | None = None,
    ridge: float = 1e-6,
    weights: Literal["kde", "uniform"] = "kde",
    reach: float = 0.25,
    density_floor: float = 0.01,
    bootstrap: int = 0,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> ProxyFit:
    """Fit the score's surface over the rewards and find its greatest value within the data's reach.

    Rewards are scaled to [-1, 1]; terms are products of Chebyshev polynomials, which span the same surfaces as powers
    do and keep a high degree well conditioned.

    Args:
        points: ``[n, N]``, rewards; N = 1, 2 or 3.
        scores: ``[n]``, evaluation scores.
        degree: of the polynomial; ``None``: the one with the least leave-one-out error, up to 10 (the paper's) and to
            what leaves two points a coefficient, of those whose maximum is not far above the best score seen.
        ridge: penalty on the squared coefficients (but the constant), per unit of mean squared residual.
        weights: of the residuals: ``kde``, the points' density (the paper), or ``uniform``.
        reach: greatest distance of the maximum from the nearest point, where each reward's range is 2.
        density_floor: least density of the maximum, as a share of the greatest at a point; ``uniform`` ignores it.
        bootstrap: resamples for the interval; 0: none.
        groups: ``[n]``, the run that each point comes from; the bootstrap then draws whole runs, since the points of
            a run are alike.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes, counts or values that no surface can be fitted to; one line that says what is missing.
    """
    rewards, values = _checked(points, scores)
    for key, value, low in (("ridge", ridge, 0.0), ("reach", reach, 1e-9), ("density_floor", density_floor, 0.0)):
        if not value >= low:
            raise ValueError(f"fit_proxy_points: {key}: must be at least {low:g}, got {value}")
    if weights not in ("kde", "uniform"):
        raise ValueError(f"fit_proxy_points: weights: must be kde or uniform, got {weights!r}")
    count, dimensions = rewards.shape
    centre = (rewards.max(0) + rewards.min(0)) / 2
    half = (rewards.max(0) - rewards.min(0)) / 2
    scaled = (rewards - centre) / half
    data = _Data(scaled, values, weights, reach, density_floor, ridge)
    chosen = _choose_degree(data, degree)
    coefficients, error = data.fit(chosen)
    theta, best = _greatest(data, coefficients, chosen, GRID[dimensions])
    alone = theta
    if dimensions > 1:
        alone = np.array([_alone(data, column, degree) for column in range(dimensions)])
    low = high = np.full(dimensions, math.nan)
    if bootstrap:
        found = _resampled(data, chosen, bootstrap, np.arange(count) if groups is None else np.asarray(groups), seed)
        low, high = np.percentile(found, [2.5, 97.5], axis=0) * half + centre

    def surface(where: np.ndarray) -> np.ndarray:
        return _terms((np.atleast_2d(where) - centre) / half, chosen) @ coefficients

    def eligible(where: np.ndarray) -> np.ndarray:
        return data.eligible((np.atleast_2d(where) - centre) / half)

    return ProxyFit(
        theta=theta * half + centre,
        score=best,
        degree=chosen,
        error=error,
        density=data.density / np.prod(half),
        alone=alone * half + centre,
        low=low,
        high=high,
        surface=surface,
        eligible=eligible,
    )


class _Data:
    """Points scaled to [-1, 1], their scores and weights."""

    def __init__(
        self, scaled: np.ndarray, values: np.ndarray, weighting: str, reach: float, floor: float, ridge: float
    ) -> None:
        self.scaled, self.values, self.weighting = scaled, values, weighting
        self.reach, self.floor, self.ridge = reach, floor, ridge
        self._kde = None
        self.density = np.full(len(scaled), math.nan)
        self.weights = np.ones(len(scaled))
        if weighting == "kde":
            self._kde = gaussian_kde(scaled)
            self.density = self._kde(scaled)
            self.weights = self.density / self.density.mean()

    def part(self, rows: np.ndarray) -> _Data:
        return _Data(self.scaled[rows], self.values[rows], self.weighting, self.reach, self.floor, self.ridge)

    def column(self, index: int) -> _Data:
        scaled = self.scaled[:, index : index + 1]
        return _Data(scaled, self.values, self.weighting, self.reach, self.floor, self.ridge)

    def fit(self, degree: int) -> tuple[np.ndarray, float]:
        """Coefficients, and the root mean square of the weighted leave-one-out residuals."""
        terms = _terms(self.scaled, degree)
        root = np.sqrt(self.weights)[:, None]
        penalty = np.sqrt(self.ridge * len(terms)) * np.eye(terms.shape[1])[1:]  # the constant goes free
        design = np.concatenate([root * terms, penalty])
        target = np.concatenate([root[:, 0] * self.values, np.zeros(len(penalty))])
        left, singular, right = np.linalg.svd(design, full_matrices=False)
        kept = singular > singular[0] * 1e-12
        coefficients = right.T[:, kept] @ ((left[:, kept].T @ target) / singular[kept])
        leverage = np.square(left[: len(terms), kept]).sum(-1)
        residual = (self.values - terms @ coefficients) / np.maximum(1 - leverage, 1e-9)
        return coefficients, float(np.sqrt(np.average(residual**2, weights=self.weights)))

    def eligible(self, where: np.ndarray) -> np.ndarray:
        """``[m, N] -> [m]``: inside the box of the points, near one of them, and where density is not negligible."""
        near = _by_chunks(where, self.scaled, lambda squares: squares.min(-1)) <= self.reach**2
        near &= (np.abs(where) <= 1 + 1e-9).all(-1)
        if self._kde is not None:
            near[near] = self._kde(where[near]) >= self.floor * self.density.max()
        return near


def _checked(points: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    rewards, values = np.asarray(points, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if rewards.ndim != 2 or values.shape != rewards.shape[:1] or rewards.shape[1] not in GRID:
        raise ValueError(
            f"fit_proxy_points: want points [n, 1 to 3 rewards] and scores [n], got {rewards.shape} and {values.shape}"
        )
    if len(values) < 3 * rewards.shape[1] + 3:
        raise ValueError(
            f"fit_proxy_points: {len(values)} points are too few for {rewards.shape[1]} rewards, want at least "
            f"{3 * rewards.shape[1] + 3}: evaluate more often, or add runs"
        )
    if not (np.isfinite(rewards).all() and np.isfinite(values).all()):
        raise ValueError("fit_proxy_points: points and scores must be finite")
    flat = np.flatnonzero(np.ptp(rewards, axis=0) == 0)
    if len(flat):
        raise ValueError(f"fit_proxy_points: reward {flat[0]} has one value, {rewards[0, flat[0]]:g}, in all points")
    return rewards, values


def _by_chunks(where: np.ndarray, points: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``reduce`` of the squared distances ``[m, n]``, ``[m]``, some rows of ``where`` at a time."""
    rows = max(1, _CHUNK // max(1, len(points)))
    parts = []
    for start in range(0, len(where), rows):
        chunk = where[start : start + rows]
        squares = np.zeros((len(chunk), len(points)))
        for axis in range(points.shape[1]):
            squares += np.square(chunk[:, axis : axis + 1] - points[:, axis])
        parts.append(reduce(squares))
    return np.concatenate(parts) if parts else np.zeros(0)


def _powers(degree: int, dimensions: int) -> list[tuple[int, ...]]:
    """Exponents of all terms up to ``degree``, the constant first."""
    found = (powers for powers in itertools.product(range(degree + 1), repeat=dimensions) if sum(powers) <= degree)
    return sorted(found, key=lambda powers: (sum(powers), powers))


def _terms(scaled: np.ndarray, degree: int) -> np.ndarray:
    """``[n, N] -> [n, terms]``: products of Chebyshev polynomials of the rewards."""
    polynomials = np.polynomial.chebyshev.chebvander(scaled, degree)  # [n, N, degree + 1]
    columns = [
        np.prod([polynomials[:, axis, power] for axis, power in enumerate(powers)], axis=0)
        for powers in _powers(degree, scaled.shape[1])
    ]
    return np.stack(columns, axis=-1)


def _choose_degree(data: _Data, degree: int | None) -> int:
    count, dimensions = data.scaled.shape
    if degree is not None:
        terms = math.comb(degree + dimensions, dimensions) if degree >= 1 else 0
        if not 0 < terms <= count:
            raise ValueError(
                f"fit_proxy_points: degree: {degree} has {terms} coefficients for {count} points, want degree >= 1 "
                "with no more coefficients than points"
            )
        return degree
    allowed = [
        one
        for one in range(2, MAX_DEGREE + 1)
        if math.comb(one + dimensions, dimensions) * _POINTS_PER_COEFFICIENT <= count
    ]
    if not allowed:
        return 1
    fits = {one: data.fit(one) for one in allowed}
    # Between runs a high degree may fly off: no surface is believed that promises more than was ever seen.
    for one in sorted(allowed, key=lambda one: fits[one][1]):
        coefficients, error = fits[one]
        promised = _greatest(data, coefficients, one, _RESAMPLE_GRID[dimensions], finest=0.1)[1]
        if promised <= data.values.max() + _TRUST * error:
            return one
    return allowed[0]


def _greatest(
    data: _Data, coefficients: np.ndarray, degree: int, grid: int, finest: float = 1e-6
) -> tuple[np.ndarray, float]:
    """The eligible point where the surface is greatest, in scaled units, and its value: a grid, then finer ones."""
    dimensions = data.scaled.shape[1]
    step = 2.0 / (grid - 1)
    candidates = np.stack(np.meshgrid(*[np.linspace(-1, 1, grid)] * dimensions, indexing="ij"), -1)
    candidates = np.concatenate([candidates.reshape(-1, dimensions), data.scaled])  # each point is within its own reach
    best, value = _best_of(data, candidates, coefficients, degree)
    offsets = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    while step > finest:
        best, value = _best_of(data, np.clip(best + step * offsets, -1, 1), coefficients, degree)
        step /= 3.0
    return best, value


def _best_of(data: _Data, where: np.ndarray, coefficients: np.ndarray, degree: int) -> tuple[np.ndarray, float]:
    within = where[data.eligible(where)]
    values = _terms(within, degree) @ coefficients
    index = int(values.argmax())
    return within[index], float(values[index])


def _alone(data: _Data, column: int, degree: int | None) -> float:
    one = data.column(column)
    chosen = _choose_degree(one, degree)
    return float(_greatest(one, one.fit(chosen)[0], chosen, GRID[1])[0][0])


def _resampled(data: _Data, degree: int, count: int, groups: np.ndarray, seed: int) -> np.ndarray:
    """``[count, N]``, scaled: proxy points of resampled data."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    found, grid = [], _RESAMPLE_GRID[data.scaled.shape[1]]
    for _ in range(count):
        drawn = np.concatenate([members[index] for index in generator.integers(len(members), size=len(members))])
        try:
            part = data.part(drawn)
        except ValueError:  # too few different points for a density
            continue
        found.append(_greatest(part, part.fit(degree)[0], degree, grid, finest=1e-2)[0])
    if not found:
        raise ValueError("fit_proxy_points: bootstrap: no resample spans the rewards; add runs, or set bootstrap: 0")
    return np.array(found)
