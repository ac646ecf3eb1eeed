"""Nelder-Mead search as a state machine that asks for one point at a time and can stop anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from modules.seeds import stream

_SEED_KEY = 0x4E4D  # "NM"


def random_simplex(init: Sequence[float], maximum: Sequence[float], seed: int) -> Tensor:
    """``[N + 1, N]`` float64: vertices drawn uniformly between ``init`` and ``maximum``, each coordinate by itself.

    Moskovitz et al. 2024, appendix: the range of thresholds that a start model and training on one reward span.

    Args:
        init, maximum: one number per coordinate, in either order.
        seed: of the draw, which depends on nothing else.

    Raises:
        ValueError: no coordinate, different lengths, or a coordinate without a range.
    """
    low = torch.tensor([float(one) for one in init], dtype=torch.float64)
    high = torch.tensor([float(one) for one in maximum], dtype=torch.float64)
    if low.shape != high.shape or low.numel() == 0:
        raise ValueError(f"nelder_mead: init and max need one number per constraint, got {len(low)} and {len(high)}")
    if not (low.isfinite() & high.isfinite() & (low != high)).all():
        raise ValueError(f"nelder_mead: init {low.tolist()} and max {high.tolist()} must be finite and differ")
    count = len(low)
    uniform = torch.rand(count + 1, count, dtype=torch.float64, generator=stream(seed, _SEED_KEY))
    return low + uniform * (high - low)


class NelderMead:
    """Minimise a function by the simplex method (Nelder and Mead 1965), one evaluation at a time.

    ``ask()`` gives the point to evaluate (the same until its value is told), ``tell(value)`` moves on. Where the value
    of a point is remembered, it is not asked for again. Everything that changes is in :meth:`state_dict`.

    Args:
        simplex: first vertices ``[N + 1, N]``, evaluated in this order.
        alpha, gamma, rho, sigma: reflection, expansion, contraction and shrinkage, in the paper's letters.
        tolerance: the search has converged when the standard deviation of the vertices' values is at most this.
        contraction: ``scipy``: outside contraction where the reflected point beats the worst vertex, inside elsewhere.
            ``inside`` (the authors' code): always inside, accepted where it beats the worst vertex.
        bounds: per coordinate ``(low, high)`` that points are clipped into; ``None``: none.
        cache_tolerance: greatest difference per coordinate at which a remembered value counts for a point; negative:
            remember nothing.
        cache_ttl: evaluations after which a value is forgotten; ``None``: never (the authors' code).

    Raises:
        ValueError: options that do not fit; the message names the config key.
    """

    def __init__(
        self,
        simplex: Tensor | Sequence[Sequence[float]],
        alpha: float = 1.0,
        gamma: float = 2.0,
        rho: float = 0.5,
        sigma: float = 0.5,
        tolerance: float = 0.01,
        contraction: Literal["scipy", "inside"] = "scipy",
        bounds: Sequence[tuple[float, float]] | None = None,
        cache_tolerance: float = 5e-3,
        cache_ttl: int | None = None,
    ) -> None:
        vertices = torch.as_tensor(simplex, dtype=torch.float64).clone()
        if vertices.ndim != 2 or vertices.shape[1] == 0 or vertices.shape[0] != vertices.shape[1] + 1:
            raise ValueError(f"nelder_mead.simplex: must be [N + 1, N], got {tuple(vertices.shape)}")
        if not vertices.isfinite().all():
            raise ValueError("nelder_mead.simplex: must be finite")
        for key, value, low, high in (
            ("alpha", alpha, 0.0, math.inf),
            ("gamma", gamma, 1.0, math.inf),
            ("rho", rho, 0.0, 1.0),
            ("sigma", sigma, 0.0, 1.0),
        ):
            if not low < value < high:
                raise ValueError(f"nelder_mead.{key}: must be in ({low:g}, {high:g}), got {value}")
        if contraction not in ("scipy", "inside"):
            raise ValueError(f"nelder_mead.contraction: must be scipy or inside, got {contraction!r}")
        if not tolerance >= 0:
            raise ValueError(f"nelder_mead.tolerance: must be at least 0, got {tolerance}")
        if cache_ttl is not None and cache_ttl < 1:
            raise ValueError(f"nelder_mead.cache_ttl: must be at least 1 evaluation, got {cache_ttl}")
        dimensions = vertices.shape[1]
        self._bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2)
        if self._bounds is not None and (
            len(self._bounds) != dimensions or not (self._bounds[:, 0] < self._bounds[:, 1]).all()
        ):
            raise ValueError(f"nelder_mead.bounds: want (low, high) for each of {dimensions} coordinates, got {bounds}")
        self.alpha, self.gamma, self.rho, self.sigma = alpha, gamma, rho, sigma
        self.tolerance, self.contraction = tolerance, contraction
        self.cache_tolerance, self.cache_ttl = cache_tolerance, cache_ttl

        self.simplex = self._clip(vertices)
        """Vertices ``[N + 1, N]``; once all are evaluated, by rising value."""
        self.values = torch.full((dimensions + 1,), math.inf, dtype=torch.float64)
        """Their values ``[N + 1]``; infinite where not evaluated yet."""
        self.evaluations = 0
        """Values told, remembered ones left out."""
        self.iterations = 0
        """Simplices accepted after the first."""
        self._phase = "initial"  # what the pending point is: initial, reflect, expand, outside, inside or shrink
        self._vertex = 0  # which vertex, in initial and shrink
        self._pending = self.simplex[0].clone()
        self._reflected = self._pending.clone()
        self._reflected_value = math.inf
        self._cache_points = torch.zeros(0, dimensions, dtype=torch.float64)
        self._cache_values = torch.zeros(0, dtype=torch.float64)
        self._cache_times = torch.zeros(0, dtype=torch.int64)
        self._best_point, self._best_value = self._pending.clone(), math.inf

    def ask(self) -> Tensor:
        """The point ``[N]`` float64 whose value :meth:`tell` wants."""
        return self._pending.clone()

    def tell(self, value: float) -> None:
        """Take the value of the pending point and move on to the next point without a remembered value.

        Raises:
            ValueError: a value that is NaN.
        """
        if math.isnan(value):
            raise ValueError(f"nelder_mead: the value of {self._pending.tolist()} is NaN")
        self.evaluations += 1
        self._remember(self._pending, value)
        if value < self._best_value:
            self._best_point, self._best_value = self._pending.clone(), float(value)
        self._advance(float(value))
        # A degenerate simplex could be answered from memory for ever; it has converged then, and is asked about anew.
        answers = 0
        while not self.converged and answers <= 4 * len(self.simplex):
            remembered = self._recall(self._pending)
            if remembered is None:
                return
            answers += 1
            self._advance(remembered)

    @property
    def phase(self) -> str:
        """What the pending point is: ``initial``, ``reflect``, ``expand``, ``outside``, ``inside`` or ``shrink``."""
        return self._phase

    @property
    def best(self) -> tuple[Tensor, float]:
        """The best point told so far ``[N]``, and its value; infinite before the first."""
        return self._best_point.clone(), self._best_value

    @property
    def converged(self) -> bool:
        """Whether the vertices' values, all known and finite, differ by no more than the tolerance (s.d.)."""
        if self._phase in ("initial", "shrink") or not bool(self.values.isfinite().all()):
            return False
        return float(self.values.std(correction=0)) <= self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings: all that changes."""
        return {
            "simplex": self.simplex.clone(),
            "values": self.values.clone(),
            "evaluations": self.evaluations,
            "iterations": self.iterations,
            "phase": self._phase,
            "vertex": self._vertex,
            "pending": self._pending.clone(),
            "reflected": self._reflected.clone(),
            "reflected_value": self._reflected_value,
            "cache_points": self._cache_points.clone(),
            "cache_values": self._cache_values.clone(),
            "cache_times": self._cache_times.clone(),
            "best_point": self._best_point.clone(),
            "best_value": self._best_value,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: a state of another number of coordinates.
        """
        if state["simplex"].shape != self.simplex.shape:
            raise ValueError(
                f"nelder_mead: the checkpoint's simplex is {tuple(state['simplex'].shape)}, the config's "
                f"{tuple(self.simplex.shape)}: keep the constraints of the first run"
            )
        self.simplex, self.values = state["simplex"].clone(), state["values"].clone()
        self.evaluations, self.iterations = int(state["evaluations"]), int(state["iterations"])
        self._phase, self._vertex = str(state["phase"]), int(state["vertex"])
        self._pending, self._reflected = state["pending"].clone(), state["reflected"].clone()
        self._reflected_value = float(state["reflected_value"])
        self._cache_points, self._cache_values = state["cache_points"].clone(), state["cache_values"].clone()
        self._cache_times = state["cache_times"].clone()
        self._best_point, self._best_value = state["best_point"].clone(), float(state["best_value"])

    # -- memory --
    def _remember(self, point: Tensor, value: float) -> None:
        if self.cache_tolerance < 0:
            return
        self._cache_points = torch.cat([self._cache_points, point[None]])
        self._cache_values = torch.cat([self._cache_values, self._cache_values.new_tensor([value])])
        self._cache_times = torch.cat([self._cache_times, self._cache_times.new_tensor([self.evaluations])])

    def _recall(self, point: Tensor) -> float | None:
        """The newest value within the tolerance that has not expired."""
        near = (self._cache_points - point).abs().amax(-1) <= self.cache_tolerance
        if self.cache_ttl is not None:
            near &= self.evaluations - self._cache_times < self.cache_ttl
        hits = near.nonzero().flatten()
        return float(self._cache_values[hits[-1]]) if len(hits) else None

    # -- moves --
    def _advance(self, value: float) -> None:
        """One value further: the pending point's is ``value``."""
        if self._phase in ("initial", "shrink"):
            self.values[self._vertex] = value
            if self._vertex + 1 < len(self.simplex):
                self._vertex += 1
                self._pending = self.simplex[self._vertex].clone()
            else:
                self._begin(accepted=self._phase == "shrink")
        elif self._phase == "reflect":
            self._after_reflection(value)
        elif self._phase == "expand":
            if value < self._reflected_value:
                self._accept(self._pending, value)
            else:
                self._accept(self._reflected, self._reflected_value)
        else:
            outside = self._phase == "outside"
            if value <= self._reflected_value if outside else value < self.values[-1]:
                self._accept(self._pending, value)
            else:
                self._shrink()

    def _after_reflection(self, value: float) -> None:
        self._reflected, self._reflected_value = self._pending.clone(), value
        if value < self.values[0]:
            self._propose("expand", self.alpha * self.gamma)
        elif value < self.values[-2]:
            self._accept(self._reflected, value)
        elif value < self.values[-1] and self.contraction == "scipy":
            self._propose("outside", self.rho * self.alpha)
        else:
            self._propose("inside", -self.rho)

    def _begin(self, accepted: bool) -> None:
        """Sort the vertices and reflect the worst."""
        order = torch.argsort(self.values, stable=True)
        self.simplex, self.values = self.simplex[order], self.values[order]
        self.iterations += accepted
        self._propose("reflect", self.alpha)

    def _propose(self, phase: str, step: float) -> None:
        """Ask about the point ``step`` times as far beyond the others' centroid as the worst vertex is before it."""
        centroid = self.simplex[:-1].sum(0) / (len(self.simplex) - 1)
        self._phase = phase
        self._pending = self._clip((1.0 + step) * centroid - step * self.simplex[-1])

    def _accept(self, point: Tensor, value: float) -> None:
        self.simplex[-1], self.values[-1] = point, value
        self._begin(accepted=True)

    def _shrink(self) -> None:
        best = self.simplex[0]
        self.simplex[1:] = self._clip(best + self.sigma * (self.simplex[1:] - best))
        self.values[1:] = math.inf
        self._phase, self._vertex = "shrink", 1
        self._pending = self.simplex[1].clone()

    def _clip(self, points: Tensor) -> Tensor:
        if self._bounds is None:
            return points
        return torch.maximum(torch.minimum(points, self._bounds[:, 1]), self._bounds[:, 0])
