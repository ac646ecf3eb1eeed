"""Copies of an instance whose solutions are the same: the symmetries of the square, and the unit box."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

SYMMETRIES = 8


def dihedral(locs: Tensor) -> Tensor:
    """``[B, N, 2] -> [8, B, N, 2]``: the symmetries of the unit square (Kwon et al. 2020, table 1), none first."""
    x, y = locs[..., :1], locs[..., 1:]
    pairs = [(x, y), (y, x), (x, 1 - y), (y, 1 - x), (1 - x, y), (1 - y, x), (1 - x, 1 - y), (1 - y, 1 - x)]
    return torch.stack([torch.cat(pair, -1) for pair in pairs])


def unit_box(locs: Tensor) -> Tensor:
    """Every instance of ``[..., N, 2]`` moved to the origin and divided by the larger side of its box.

    One point, or several that coincide, go to the origin.
    """
    low = locs.amin(-2, keepdim=True)
    side = (locs.amax(-2, keepdim=True) - low).amax(-1, keepdim=True)
    return (locs - low) / side.where(side > 0, 1)


def with_locs(instances: TensorDict, locs: Tensor) -> TensorDict:
    """The same instances seen by solvers at other coordinates; costs stay those of the old ones."""
    seen = instances.copy()
    if instances.get("original", None) is None:
        seen["original"] = instances["locs"]
    seen["locs"] = locs
    return seen
