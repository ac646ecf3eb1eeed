"""A distribution of points in the unit square: Real-NVP over single nodes (Dinh et al. 2017), for instance generators.

Every node of an instance is drawn from the same flow, so an instance's log-density is the sum over its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EDGE = 1e-6
"""Points are kept this far from the square's sides, where the logit is infinite."""


class _Coupling(nn.Module):
    """One affine coupling: coordinate ``fixed`` sets scale and shift of the other."""

    def __init__(self, hidden: int, fixed: int, limit: float) -> None:
        super().__init__()
        self.fixed, self.limit = fixed, limit
        self.scale = _mlp(hidden)
        self.shift = _mlp(hidden)

    def terms(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and the shift, of ``given`` ``[..., 1]``."""
        return self.limit * torch.tanh(self.scale(given) / self.limit), self.shift(given)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., 2] -> [..., 2]`` and the log-determinant ``[...]``."""
        given, other = z[..., self.fixed : self.fixed + 1], z[..., 1 - self.fixed : 2 - self.fixed]
        log_scale, shift = self.terms(given)
        other = (other - shift) * torch.exp(-log_scale)
        return self._join(given, other), -log_scale.squeeze(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The point that :meth:`forward` takes to ``x``, and this map's own log-determinant."""
        given, other = x[..., self.fixed : self.fixed + 1], x[..., 1 - self.fixed : 2 - self.fixed]
        log_scale, shift = self.terms(given)
        return self._join(given, other * torch.exp(log_scale) + shift), log_scale.squeeze(-1)

    def _join(self, given: Tensor, other: Tensor) -> Tensor:
        return torch.cat([given, other] if self.fixed == 0 else [other, given], -1)


def _mlp(hidden: int) -> nn.Sequential:
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)  # the flow starts as the identity
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(1, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), last)


class NodeFlow(nn.Module):
    """Points ``[..., 2]`` of the unit square from uniform ones.

    With ``squash="sigmoid"``, ``x = sigmoid(RealNVP(logit(u)))`` with an exact density on the square; zero-initialised
    last layers make it exactly uniform at first. ``"minmax"`` is the ASP authors' code: couplings of the uniform points
    themselves, after each of which the whole batch is rescaled to [0, 1]; it has no density (:meth:`log_prob` raises).

    Args:
        layers: affine couplings, their fixed coordinate alternating.
        hidden: width of the scale and shift networks, 1-hidden-hidden-1.
        squash: see above.
        limit: greatest absolute logarithm of a scale (sigmoid).

    Raises:
        ValueError: a number out of range, or an unknown squash.
    """

    def __init__(
        self, layers: int = 4, hidden: int = 24, squash: Literal["sigmoid", "minmax"] = "sigmoid", limit: float = 3.0
    ) -> None:
        super().__init__()
        for key, value in (("layers", layers), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"NodeFlow: {key} must be >= 1, got {value}")
        if squash not in ("sigmoid", "minmax"):
            raise ValueError(f"NodeFlow: squash must be sigmoid or minmax, got {squash!r}")
        if not limit > 0:
            raise ValueError(f"NodeFlow: limit must be > 0, got {limit}")
        self.squash = squash
        self.couplings = nn.ModuleList([_Coupling(hidden, index % 2, limit) for index in range(layers)])

    def forward(self, noise: Tensor) -> Tensor:
        """Points of uniform ``noise``, both ``[..., 2]``, strictly inside the square (sigmoid)."""
        return self.transform(noise)[0]

    def transform(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Points, and the log-determinant ``[...]`` of the map (minmax: of the couplings alone).

        Raises:
            ValueError: noise is not of points in the plane.
        """
        _check_plane("noise", noise)
        if self.squash == "minmax":
            z, total = noise, torch.zeros_like(noise[..., 0])
            for coupling in self.couplings:
                z, log_det = coupling(z)
                z = (z - z.min()) / (z.max() - z.min()).clamp_min(1e-12)
                total = total + log_det
            return z, total
        u = noise.clamp(EDGE, 1 - EDGE)
        z = torch.logit(u)
        total = -_log_slope(z)
        for coupling in self.couplings:
            z, log_det = coupling(z)
            total = total + log_det
        # far out, the sigmoid of a float rounds to a side of the square
        return torch.sigmoid(z).clamp(EDGE, 1 - EDGE), total + _log_slope(z)

    def inverse(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The noise ``[..., 2]`` of points, and log-determinant ``[...]`` of that map, which is their log-density.

        Raises:
            ValueError: squash is minmax, whose rescaling of whole batches has no inverse; points are not in the plane.
        """
        _check_plane("points", points)
        if self.squash == "minmax":
            raise ValueError("NodeFlow: squash: minmax has no density: use sigmoid, or the official estimator")
        z = torch.logit(points.clamp(EDGE, 1 - EDGE))
        total = -_log_slope(z)
        for coupling in reversed(self.couplings):
            z, log_det = coupling.inverse(z)  # pyright: ignore[reportCallIssue]
            total = total + log_det
        return torch.sigmoid(z), total + _log_slope(z)

    def log_prob(self, points: Tensor) -> Tensor:
        """Log-density ``[...]`` of ``points`` ``[..., 2]``; differentiable. Raises: ValueError (minmax)."""
        return self.inverse(points)[1]


def _check_plane(name: str, value: Tensor) -> None:
    if value.shape[-1:] != (2,):  # slices of another width would silently drop coordinates
        raise ValueError(f"NodeFlow: {name} must be [..., 2], got {tuple(value.shape)}")


def _log_slope(z: Tensor) -> Tensor:
    """``log |d sigmoid / dz|`` summed over the two coordinates."""
    return (F.logsigmoid(z) + F.logsigmoid(-z)).sum(-1)


def flow_members(flow: NodeFlow, members: Mapping[str, Tensor], numbers: Tensor, noise: Tensor) -> Tensor:
    """Points ``[B, N, 2]`` of ``noise`` ``[B, N, 2]``, instance b by the flow with parameters number ``numbers[b]``.

    ``members``: stacked parameters ``[M, ...]``; ``numbers``: ``[B]`` int64. The loop is over distinct members, not
    over instances.

    Raises:
        ValueError: not one number per instance, or a number of no member.
    """
    if numbers.shape != noise.shape[:1]:
        raise ValueError(
            f"flow_members: numbers must be [{noise.shape[0]}], one per instance, got {tuple(numbers.shape)}"
        )
    count = len(next(iter(members.values())))
    distinct = numbers.unique().tolist()  # sorted
    if distinct and not 0 <= distinct[0] <= distinct[-1] < count:
        raise ValueError(
            f"flow_members: numbers must be in [0, {count}), got {distinct[-1] if distinct[0] >= 0 else distinct[0]}"
        )
    points = torch.empty_like(noise)
    for number in distinct:
        chosen = numbers == number
        parameters = {name: value[number].to(noise.device) for name, value in members.items()}
        with torch.no_grad():
            points[chosen] = torch.func.functional_call(flow, parameters, (noise[chosen],))
    return points
