"""REINFORCE (Williams 1992) for costs of sampled solutions, and what it needs of statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reinforce_loss(cost: Tensor, log_likelihood: Tensor, baseline: Tensor) -> Tensor:
    """``mean (cost - baseline) * log_likelihood``; its gradient is that of the expected cost (Kool et al. 2019, eq. 9).

    Args:
        cost, log_likelihood: ``[B, P]``; gradients flow through the likelihood only.
        baseline: broadcasts with cost.

    Raises:
        ValueError: shapes differ.
    """
    if cost.shape != log_likelihood.shape:
        raise ValueError(
            f"reinforce_loss: cost and log_likelihood must have one shape, got {tuple(cost.shape)} and "
            f"{tuple(log_likelihood.shape)}"
        )
    return ((cost - baseline).detach() * log_likelihood).mean()


def shared_baseline(cost: Tensor) -> Tensor:
    """``[B, P] -> [B, 1]``: mean cost of an instance's rollouts (Kwon et al. 2020, eq. 5).

    Raises:
        ValueError: one rollout only: its advantage would always be 0 and nothing would be learnt.
    """
    if cost.ndim != 2 or cost.shape[1] < 2:
        raise ValueError(
            f"shared_baseline: cost must be [B, P] with P >= 2 rollouts, got {tuple(cost.shape)}: use more "
            "customers or another baseline"
        )
    return cost.mean(1, keepdim=True)


def exponential_baseline(mean: Tensor, batch_mean: Tensor, beta: float) -> Tensor:
    """The moving mean after another batch: ``beta * mean + (1 - beta) * batch_mean`` (Kool et al. 2019, section 4)."""
    return beta * mean + (1.0 - beta) * batch_mean


def warmup_mix(epoch: int, warmup_epochs: int) -> float:
    """Share of the rollout baseline in epoch ``epoch`` (from 0); the moving mean has the rest.

    As in the authors' code: 0 in the first epoch, 1 after ``warmup_epochs``.
    """
    return 1.0 if warmup_epochs <= 0 else min(1.0, epoch / warmup_epochs)


def paired_t_test(total: float, squares: float, count: int) -> float:
    """One-sided p-value of "the candidate's mean is not lower" from paired differences candidate - baseline.

    Args:
        total, squares: sum of the differences and of their squares.
        count: of pairs.

    Raises:
        ValueError: fewer than 2 pairs, or a sum that is not finite.
    """
    if not (math.isfinite(total) and math.isfinite(squares)):
        raise ValueError(f"paired_t_test: sums of differences must be finite, got {total} and {squares}")
    if count < 2:
        raise ValueError(f"paired_t_test: count must be >= 2, got {count}")
    mean = total / count
    variance = max(0.0, (squares - count * mean * mean) / (count - 1))
    if variance == 0.0:
        return 0.0 if mean < 0 else 1.0 if mean > 0 else 0.5
    statistic = mean / math.sqrt(variance / count)
    freedom = count - 1
    # P(T <= t) = 1 - I_{v / (v + t^2)}(v / 2, 1 / 2) / 2 for t > 0, and the mirror image below
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + statistic**2))
    return tail if statistic < 0 else 1.0 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function ``I_x(a, b)`` by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * fraction / a


def standardised(reward: Tensor, mean: Tensor, std: Tensor, floor: float = 1e-8) -> Tensor:
    """``(reward - mean) / std`` with ``std`` at least ``floor``; scalars are of all ranks' rewards."""
    return (reward - mean) / torch.clamp(std, min=floor)
