"""Running moments of observations and of returns, exact over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks and returns the same on all."""


class RunningMoments:
    """Mean and variance of all rows so far, in float64 (Chan, Golub & LeVeque 1979).

    Args:
        size: features of a row.
        device: where the moments live.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.squares = torch.zeros(size, dtype=torch.float64, device=device)  # summed, about the mean

    def merge(self, rows: Tensor, reduce: Reduce | None = None) -> None:
        """Take in ``rows`` ``[n, size]`` of this rank, and those of the others through ``reduce``."""
        centred = rows.double() - self.mean  # about what all ranks agree on: sums of raw squares would cancel
        count = torch.full_like(self.mean, float(len(rows)))
        packed = torch.stack([count, centred.sum(0), centred.square().sum(0)])
        if reduce is not None:
            packed = reduce(packed.flatten()).view_as(packed)
        added, total, squares = packed
        added = added[0]
        if float(added) == 0:
            return
        shift = total / added
        squares = squares - added * shift.square()
        count = self.count + added
        self.squares = self.squares + squares + shift.square() * (self.count * added / count)
        self.mean = self.mean + shift * (added / count)
        self.count = count

    @property
    def std(self) -> Tensor:
        """``[size]``; 1 before any row, and never below 1e-4."""
        if float(self.count) == 0:
            return torch.ones_like(self.mean)
        return (self.squares / self.count).clamp_min(0.0).sqrt().clamp_min(1e-4)

    def to(self, device: torch.device | str) -> RunningMoments:
        self.count, self.mean, self.squares = (v.to(device) for v in (self.count, self.mean, self.squares))
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count.clone(), "mean": self.mean.clone(), "squares": self.squares.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.mean.device
        self.count, self.mean, self.squares = (
            state[key].to(device, torch.float64, copy=True) for key in ("count", "mean", "squares")
        )
