"""The non-transitive mixture model: points of the plane against seven Gaussians that beat each other in a cycle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CENTRES = (
    (2.8722, -0.025255),
    (1.8105, 2.2298),
    (1.8105, -2.2298),
    (-0.6145, 2.8058),
    (-0.6145, -2.8058),
    (-2.5768, 1.269),
    (-2.5768, -1.269),
)
"""Centres of the Gaussians, in the order of the rows of the cycle."""

PRECISION = 0.54
"""The official code multiplies the squared distance by it (it does not invert it)."""

_NEWTON_STEPS, _LONGEST_STEP, _CONVERGED = 60, 0.5, 1e-12


class MixtureModelGame:
    """Perez-Nieves et al. 2021 and PSD-PSRO (NeurIPS 2023, section 4); a continuous ``PlanGame``.

    A strategy is a point ``x`` ``[2]``, its features are ``phi_m(x) = exp(-0.5 * 0.54 * |x - mu_m|^2)`` ``[7]``, its
    plan ``[phi(x), 1]`` ``[8]``. The payoff ``phi(x)^T G phi(y) + (sum phi(x) - sum phi(y)) / 2`` with the cyclic,
    antisymmetric ``G`` is bilinear in the plans, so a mixture of points is the mixture of their plans. Two players,
    symmetric, zero-sum.

    Args:
        init_scale: standard deviation of the points that a population starts from.
        grid: the best response starts from the seven centres and from ``grid`` x ``grid`` points.
        half_width: of the square that the grid covers.
    """

    num_players = 2
    zero_sum = True
    symmetric = True

    def __init__(self, init_scale: float = 0.01, grid: int = 16, half_width: float = 4.5) -> None:
        for field, value in (("init_scale", init_scale), ("half_width", half_width)):
            if not (value > 0 and value < float("inf")):
                raise ValueError(f"MixtureModelGame: {field}: must be positive and finite, got {value}")
        if grid < 0:
            raise ValueError(f"MixtureModelGame: grid: must be >= 0, got {grid}")
        self.name = "mixture_model"
        self.init_scale = init_scale
        self.centres = torch.tensor(CENTRES, dtype=torch.float64)
        self.table = _payoff_table()
        axis = torch.linspace(-half_width, half_width, grid, dtype=torch.float64)
        self._starts = torch.cat((self.centres, torch.cartesian_prod(axis, axis).reshape(-1, 2)))

    def strategy_shape(self, player: int) -> tuple[int, ...]:
        return (2,)

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 2]`` points about the origin, normal with standard deviation ``init_scale``."""
        return self.init_scale * torch.randn(count, 2, dtype=torch.float64, generator=generator)

    def features(self, points: Tensor) -> Tensor:
        """``[..., 2] -> [..., 7]``: ``phi``, each in (0, 1]."""
        squared = (points.unsqueeze(-2) - self.centres).square().sum(-1)
        return (-0.5 * PRECISION * squared).exp()

    def plans(self, player: int, strategies: Tensor) -> Tensor:
        """``[..., 2] -> [..., 8]``; differentiable."""
        features = self.features(strategies)
        return torch.cat((features, torch.ones_like(features[..., :1])), -1)

    def strategy_of(self, player: int, plan: Tensor) -> Tensor:
        """Not to be had.

        Raises:
            ValueError: always: a mixture of points is no point of the plane.
        """
        raise ValueError(
            "MixtureModelGame: plan: a mixture of points is no point, so a plan has no strategy: "
            "keep members and the meta-strategy apart"
        )

    def payoffs(self, plans: Sequence[Tensor]) -> Tensor:
        """``plans[i]`` ``[members_i, 8]`` -> ``[2, members_0, members_1]``."""
        first = plans[0] @ self.table @ plans[1].mT
        return torch.stack((first, -first))

    def payoff_vector(self, player: int, plans: Sequence[Tensor]) -> Tensor:
        """``[8]``; the same for both seats, since the game is symmetric."""
        return self.table @ plans[1 - player]

    def reach(self, player: int, plans: Sequence[Tensor] | None = None) -> Tensor:
        """``[8]``: ones on the features, 0 on the constant.

        Features are no probabilities, so ``sum(reach * plan) = 1`` does not hold here: the method's divergence is
        between features that are smoothed by 1e-3 and normalised, and that is the caller's part.
        """
        reach = torch.ones(8, dtype=torch.float64)
        reach[-1] = 0.0
        return reach

    def best_response(self, player: int, payoff_vector: Tensor) -> tuple[Tensor, Tensor]:
        """The best point ``[2]`` and its payoff, from a batched damped Newton ascent of all starts at once.

        The official evaluation follows one gradient path and so reports a lower bound. Against any mixture some weight
        is positive (columns of ``G`` add up to 0), so that the maximum is attained; for other vectors it may lie at
        infinity, and then the best point found is given.
        """
        with torch.no_grad():
            points = _ascend(self._starts, payoff_vector[:-1].detach(), self.centres)
            values = self.plans(player, points) @ payoff_vector.detach()
            best = values.argmax()
        return points[best], values[best]

    def digest(self) -> Mapping[str, str]:
        content = hashlib.sha256(self._starts.numpy().astype("<f8", copy=False).tobytes())
        return {"game": f"{self.name}(init_scale={self.init_scale})", "game_starts": content.hexdigest()}


def _payoff_table() -> Tensor:
    """``[8, 8]``: G beside the halves that weigh the features' sums; antisymmetric."""
    cycle = torch.tensor([0, 1, 1, 1, -1, -1, -1], dtype=torch.float64)
    index = torch.arange(7)
    table = torch.zeros(8, 8, dtype=torch.float64)
    table[:7, :7] = cycle[(index[None, :] - index[:, None]) % 7]  # every next row is turned right by one
    table[:7, 7], table[7, :7] = 0.5, -0.5
    return table


def _ascend(points: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Climb ``f(x) = sum_m weights_m phi_m(x)`` from every row of ``points`` ``[starts, 2]``.

    Newton steps with the absolute values of the Hessian's eigenvalues (so that every step leads uphill), no longer
    than half a unit; a step that does not gain is not taken and the next one is a quarter as long.
    """
    trust = torch.full((points.shape[0], 1), _LONGEST_STEP, dtype=points.dtype)
    value, gradient, hessian = _derivatives(points, weights, centres)
    for _ in range(_NEWTON_STEPS):
        eigenvalues, vectors = _eigen2(hessian)
        along = (vectors * gradient.unsqueeze(-2)).sum(-1) / eigenvalues.abs().clamp_min(1e-12)
        step = (along.unsqueeze(-1) * vectors).sum(-2)
        length = step.norm(dim=-1, keepdim=True)
        step = step * (trust / length.clamp_min(1e-300)).clamp_max(1.0)
        trial = points + step
        trial_value, trial_gradient, trial_hessian = _derivatives(trial, weights, centres)
        gains = (trial_value > value).unsqueeze(-1)
        points = torch.where(gains, trial, points)
        value = torch.where(gains[:, 0], trial_value, value)
        gradient = torch.where(gains, trial_gradient, gradient)
        hessian = torch.where(gains.unsqueeze(-1), trial_hessian, hessian)
        trust = torch.where(gains, (2 * trust).clamp_max(_LONGEST_STEP), 0.25 * torch.minimum(trust, length))
        if bool((trust < _CONVERGED).all()):
            break
    return points


def _derivatives(points: Tensor, weights: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``[n]``, gradient ``[n, 2]`` and Hessian ``[n, 2, 2]`` of the weighted sum of Gaussians."""
    offset = points.unsqueeze(1) - centres
    weighted = weights * (-0.5 * PRECISION * offset.square().sum(-1)).exp()
    value = weighted.sum(-1)
    gradient = -PRECISION * (weighted.unsqueeze(-1) * offset).sum(1)
    outer = (weighted.unsqueeze(-1) * offset).mT @ offset
    hessian = PRECISION**2 * outer - PRECISION * value[:, None, None] * torch.eye(2, dtype=points.dtype)
    return value, gradient, hessian


def _eigen2(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[n, 2]`` and eigenvectors as rows ``[n, 2, 2]`` of symmetric 2 x 2 matrices, in closed form."""
    a, b, c = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 1]
    middle, half = (a + c) / 2, (a - c) / 2
    radius = torch.hypot(half, b)
    angle = torch.atan2(b, half) / 2
    cosine, sine = angle.cos(), angle.sin()
    vectors = torch.stack((torch.stack((cosine, sine), -1), torch.stack((-sine, cosine), -1)), -2)
    return torch.stack((middle + radius, middle - radius), -1), vectors
