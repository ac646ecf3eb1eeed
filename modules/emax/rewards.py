"""Running moments of the rewards in replay, for learners that want them on one scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from modules.emax.settings import Reward


class RewardScale(nn.Module):
    """Divides rewards by their running deviation, and subtracts their running mean if told so.

    Moments of all batches so far are merged by count, mean and sum of squares (Chan et al. 1983) before each use;
    padded steps do not count. The prior is mean 0, variance 1 with a count of 1e-4.

    Args:
        settings: ``norm`` of them is read.
    """

    def __init__(self, settings: Reward) -> None:
        super().__init__()
        self.norm = settings.norm

    def build(self, columns: int) -> None:
        """Make the moments of ``columns`` separate rewards."""
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("squares", torch.full((columns,), 1e-4, dtype=torch.float64))

    def forward(self, reward: Tensor, filled: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """``reward`` ``[..., columns]`` on its new scale, after merging the steps that are ``filled`` ``[...]``.

        ``all_sum`` adds a tensor over ranks.
        """
        if self.norm == "none":
            return reward
        count, mean, squares = (cast(Tensor, getattr(self, name)) for name in ("count", "mean", "squares"))
        rows = torch.where(filled.unsqueeze(-1), reward, 0.0).to(torch.float64).flatten(0, -2)
        sums = torch.cat([filled.sum().to(torch.float64).view(1), rows.sum(0), rows.square().sum(0)])
        new, total, raw = all_sum(sums).split([1, rows.shape[1], rows.shape[1]])
        seen = new.clamp_min(1.0)
        batch_mean = total / seen
        batch_squares = (raw - seen * batch_mean.square()).clamp_min(0.0)
        after = count + new[0]
        delta = batch_mean - mean
        squares += batch_squares + delta.square() * count * new[0] / after
        mean += delta * new[0] / after
        count.copy_(after)
        return self.scaled(reward)

    def scaled(self, reward: Tensor) -> Tensor:
        """``reward`` ``[..., columns]`` on the scale of the moments so far, which stay as they are."""
        if self.norm == "none":
            return reward
        count, mean, squares = (cast(Tensor, getattr(self, name)) for name in ("count", "mean", "squares"))
        deviation = (squares / count).sqrt() + 1e-8
        centred = reward - mean if self.norm == "standardise" else reward
        return (centred / deviation).to(reward.dtype)
