"""Interval bounds of stacked perceptrons: what outputs are possible for inputs in a box."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modules.networks.stacked_mlp import ACTIVATIONS, StackedMLP

MONOTONE = ("relu", "tanh")
"""Activations that never decrease, so that an interval's ends are mapped to the ends of its image."""


def interval_bounds(
    mlp: StackedMLP, params: Mapping[str, Tensor], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Interval bound propagation (Gowal et al. 2018): least and greatest outputs over a box of inputs, or beyond.

    Exact for a linear map; for more layers an outer bound, up to rounding of the order of 1e-6. Differentiable in
    parameters and box.

    Args:
        mlp: the networks' shape.
        params: as :meth:`StackedMLP.init` makes them, ``[L, ...]`` each; others are ignored.
        lower, upper: ``[L, rows, inputs]``, or ``[rows, inputs]`` for all networks alike; ``lower <= upper``.

    Returns:
        ``(lower, upper)``, ``[L, rows, outputs]`` each.

    Raises:
        ValueError: hidden layers whose activation is not monotone, or ends of different shapes.
    """
    if mlp.layers > 1 and mlp.activation not in MONOTONE:
        raise ValueError(
            f"interval_bounds: mlp: its activation must be monotone ({', '.join(MONOTONE)}), got '{mlp.activation}'"
        )
    if lower.shape != upper.shape or lower.shape[-1] != mlp.widths[0]:
        raise ValueError(
            f"interval_bounds: lower, upper: must be [L, rows, {mlp.widths[0]}] both, got {tuple(lower.shape)} and "
            f"{tuple(upper.shape)}"
        )
    function = ACTIVATIONS[mlp.activation][0]
    count = params["weight_0"].shape[0]
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    if centre.ndim == 2:
        centre, radius = centre.expand(count, *centre.shape), radius.expand(count, *radius.shape)
    for layer in range(mlp.layers):
        weight = params[f"weight_{layer}"]
        centre = torch.baddbmm(params[f"bias_{layer}"].unsqueeze(1), centre, weight)
        radius = torch.bmm(radius, weight.abs())
        if layer < mlp.layers - 1:
            low, high = function(centre - radius), function(centre + radius)
            centre, radius = (low + high) / 2, (high - low) / 2
    return centre - radius, centre + radius
