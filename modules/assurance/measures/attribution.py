"""Which inputs an output rests on: integrated gradients, and how concentrated an attribution is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["gauss_legendre", "trapezoid"]

Scalar = Callable[[Tensor], Tensor]
"""Inputs ``[rows, ...]`` to one number a row ``[rows]``; a row's output must not depend on other rows."""


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients of a batch.

    Attributes:
        values: ``[N, ...]`` of the inputs' shape, in the output's unit.
        residual: ``[N]``, ``values.sum() - (f(x) - f(x0))``: 0 where the path integral is exact (completeness).
    """

    values: Tensor
    residual: Tensor


def path_rule(steps: int, rule: Rule = "gauss_legendre") -> tuple[np.ndarray, np.ndarray]:
    """Points and weights ``[steps]`` that integrate over [0, 1]; the weights sum to 1.

    Gauss-Legendre is exact for polynomials up to degree ``2 steps - 1``; the trapezoid rule, which has both ends among
    its points, up to degree 1.

    Raises:
        ValueError: an unknown rule or too few steps (1 for Gauss-Legendre, 2 for the trapezoid).
    """
    if rule == "gauss_legendre" and steps >= 1:
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid" and steps >= 2:
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0.0, 1.0, steps), weights
    raise ValueError(
        f"integrated_gradients: needs rule 'gauss_legendre' with steps >= 1 or 'trapezoid' with steps >= 2, "
        f"got '{rule}' with {steps}"
    )


def integrated_gradients(
    function: Scalar,
    inputs: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    steps: int = 32,
    rule: Rule = "gauss_legendre",
    chunk: int = 4096,
) -> Attribution:
    """``(x - x0) * integral over a in [0, 1] of grad f(x0 + a (x - x0))`` (Sundararajan et al. 2017, section 3).

    A linear function gives ``w * (x - x0)``. Gradients are enabled inside, so it may be called under ``no_grad`` and
    ``inference_mode``; parameters' ``.grad`` stay as they are.

    Args:
        function: maps ``[rows, ...]`` to ``[rows]``; to explain one of several outputs, select it here.
        inputs: ``[N, ...]`` floating point; for token models give embeddings.
        baseline: ``x0``, broadcasts to ``inputs``.
        steps: points of the path at which gradients are taken.
        rule: how the path is integrated; see :func:`path_rule`.
        chunk: rows per call of ``function``.

    Raises:
        ValueError: inputs that are empty, not floating point or not finite; a baseline that does not fit; an output
            that is not ``[rows]``, not finite, or carries no gradient of the inputs; an unknown rule; a chunk below 1.
    """
    if not inputs.is_floating_point() or inputs.dim() < 1 or not inputs.numel():
        raise ValueError(
            f"integrated_gradients: inputs: must be floating point [N, ...] with values (embeddings, not tokens), "
            f"got {inputs.dtype} {tuple(inputs.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"integrated_gradients: chunk: must be at least 1, got {chunk}")
    points, weights = path_rule(steps, rule)
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs.detach().clone()  # tensors made in inference mode cannot carry gradients
        start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).detach().clone()
        try:
            start = start.broadcast_to(x.shape)
        except RuntimeError as error:
            raise ValueError(
                f"integrated_gradients: baseline: {tuple(start.shape)} does not broadcast to inputs {tuple(x.shape)}"
            ) from error
        if not (x.isfinite().all() and start.isfinite().all()):
            raise ValueError("integrated_gradients: inputs and baseline must be finite, got NaN or infinity")
        way = x - start
        total = torch.zeros_like(x)
        per_call = max(1, chunk // len(points))  # rows whose whole path goes through in one call
        share = min(len(points), chunk)
        for low in range(0, len(x), per_call):
            rows = slice(low, low + per_call)
            for first in range(0, len(points), share):
                some = slice(first, first + share)
                at = _column(points[some], x)
                weight = _column(weights[some], x)
                path = start[rows] + at * way[rows]  # [points, rows, ...]
                total[rows] += (weight * _gradient(function, path.flatten(0, 1)).view_as(path)).sum(0)
        values = way * total
        with torch.no_grad():
            change = torch.cat([_output(function, x[i : i + chunk]) for i in range(0, len(x), chunk)]) - torch.cat(
                [_output(function, start[i : i + chunk]) for i in range(0, len(x), chunk)]
            )
    return Attribution(values, values.flatten(1).sum(1) - change if values.dim() > 1 else values - change)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """``[points, 1, ...]`` that multiplies ``[points, *like.shape]``."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, *(1,) * like.dim())


def _output(function: Scalar, rows: Tensor) -> Tensor:
    out = function(rows)
    if out.shape != rows.shape[:1]:
        raise ValueError(
            f"integrated_gradients: function: must return one number a row [{len(rows)}], got {tuple(out.shape)}"
        )
    if not out.isfinite().all():
        raise ValueError("integrated_gradients: function: returned NaN or infinity between baseline and inputs")
    return out


def _gradient(function: Scalar, rows: Tensor) -> Tensor:
    rows = rows.detach().requires_grad_()
    out = _output(function, rows)
    slope = torch.autograd.grad(out.sum(), rows, allow_unused=True)[0] if out.requires_grad else None
    if slope is None:
        raise ValueError(
            "integrated_gradients: function: its output carries no gradient of the inputs (detached or constant?)"
        )
    return slope


@dataclass(frozen=True)
class Concentration:
    """How few features hold an attribution. Both ``[N]`` float64 in [0, 1], NaN for rows without any attribution.

    Attributes:
        top_share: share of the absolute attribution in the ``k`` largest features; 1 is most concentrated.
        entropy: of the absolute shares, over ``log(features)``: 0 one feature, 1 all alike; NaN with one feature.
    """

    top_share: Tensor
    entropy: Tensor


def saliency_concentration(attribution: Tensor, k: int) -> Concentration:
    """Share of attribution in the ``k`` largest features, and normalised entropy over features.

    Args:
        attribution: ``[N, ...]``; features are all dimensions but the first.
        k: how many features to count.

    Raises:
        ValueError: no rows or features, NaN or infinity, ``k`` outside 1 to the number of features.
    """
    if attribution.dim() < 2 or not attribution.numel():
        raise ValueError(f"saliency_concentration: attribution: must be [N, features], got {tuple(attribution.shape)}")
    size = attribution.detach().flatten(1).abs().double()
    features = size.shape[1]
    if not size.isfinite().all():
        raise ValueError("saliency_concentration: attribution: must be finite, got NaN or infinity")
    if not 1 <= k <= features:
        raise ValueError(f"saliency_concentration: k: must be in 1..{features} (features), got {k}")
    share = size / size.amax(1, keepdim=True)  # first by the largest: sums of tiny or huge values stay representable
    share = share / share.sum(1, keepdim=True)  # 0/0 = NaN marks rows without attribution
    entropy = torch.special.entr(share).sum(1) / (math.log(features) if features > 1 else math.nan)
    return Concentration(share.topk(k, dim=1).values.sum(1).clamp_max(1.0), entropy.clamp(0.0, 1.0))
