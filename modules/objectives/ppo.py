"""Proximal policy optimisation (Schulman et al. 2017) as pure functions of log-probabilities and values.

Rows are the last dimension; every leading dimension (learners, agents) keeps a loss of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

ILLEGAL_LOG_PROBABILITY = -1e9
"""Stands for -inf: its exponential is exactly 0, yet ``p * log p`` and its gradient stay finite."""


def masked_log_softmax(logits: Tensor, legal: Tensor | None = None) -> Tensor:
    """Log-probabilities ``[..., actions]`` of the softmax over legal actions.

    Args:
        logits: ``[..., actions]``.
        legal: bool, broadcastable to ``logits``; at least one action of a row, or the row is all illegal.

    Returns:
        :data:`ILLEGAL_LOG_PROBABILITY` at illegal actions, where no gradient passes.
    """
    if legal is None:
        return torch.log_softmax(logits, dim=-1)
    # The same huge finite number in both places: a row without legal actions gives no NaN that would spread.
    masked = torch.where(legal, logits, ILLEGAL_LOG_PROBABILITY)
    return torch.where(legal, torch.log_softmax(masked, dim=-1), ILLEGAL_LOG_PROBABILITY)


def weighted_mean(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean ``[...]`` over the last dimension of ``rows`` ``[..., rows]``; 0 where the weights add up to 0.

    Rows of weight 0 may hold anything, infinities and NaN included.
    """
    if weights is None:
        return rows.mean(-1)
    weights = weights.to(rows.dtype)
    total = weights.sum(-1)
    kept = torch.where(weights > 0, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    return (kept * weights).sum(-1) / torch.where(total > 0, total, 1.0)


def entropy(log_policy: Tensor) -> Tensor:
    """Entropy ``[...]`` in nats of ``log_policy`` ``[..., actions]``, as :func:`masked_log_softmax` gives it."""
    return -(log_policy.exp() * log_policy).sum(-1)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``-min(r A, clamp(r, 1 - clip, 1 + clip) A)`` per row (Schulman et al. 2017, eq. 7, as a loss).

    Args:
        log_ratio: ``log r``, new minus old log-probability of the action taken, ``[..., rows]``.
        advantage: ``[..., rows]``, held fixed.
        clip: half-width of the interval in which the ratio counts, > 0.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_loss(value: Tensor, target: Tensor, old_value: Tensor | None = None, clip: float | None = None) -> Tensor:
    """Half the squared error per row; with ``clip``, the worse of it and the error of the clipped change.

    Args:
        value, target: ``[..., rows]``; the target is held fixed.
        old_value: values when the rows were collected; needed with ``clip``.
        clip: largest change of a value that still lowers the loss, in units of return; ``None`` for no clipping.
    """
    error = (value - target).square()
    if clip is not None:
        if old_value is None:
            raise ValueError("value_loss: old_value: needed when clip is given, got None")
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - target).square())
    return 0.5 * error


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Estimate per row of KL(old || new) in nats, ``r - 1 - log r``: unbiased, never negative (Schulman 2020, k3)."""
    return log_ratio.exp() - 1.0 - log_ratio


def minibatch_of(rows: Tensor, seed: int, epoch: int, minibatches: int) -> Tensor:
    """Which of ``minibatches`` each row goes to in an epoch: a hash, so that any number of ranks agree without talk.

    Args:
        rows: int64 ``[N]``, numbers of the rows, from 0 to 2^31 - 1.
        seed, epoch: another pair gives another division.
        minibatches: parts, of nearly equal sizes.

    Returns:
        int64 ``[N]`` in ``[0, minibatches)``.
    """
    mixed = (rows * 0x9E3779B1 + (seed * 1_000_003 + epoch * 7_919) % (1 << 31)) & 0xFFFFFFFF
    for _ in range(3):  # 32-bit finaliser; products stay below 2^63
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) * minibatches) >> 32


def ppo_loss(
    log_probability: Tensor,
    old_log_probability: Tensor,
    advantage: Tensor,
    value: Tensor | None = None,
    target: Tensor | None = None,
    policy_entropy: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.0,
    old_value: Tensor | None = None,
    value_clip: float | None = None,
) -> dict[str, Tensor]:
    """The whole loss (Schulman et al. 2017, eq. 9, as a loss) and its parts, means over the last dimension.

    Args:
        log_probability: of the actions taken, under the policy that learns, ``[..., rows]``.
        old_log_probability: under the policy that acted, ``[..., rows]``.
        advantage: ``[..., rows]``.
        value, target: the critic's values and their targets, ``[..., rows]``; both ``None`` for no critic.
        policy_entropy: of the policy in each row, ``[..., rows]``; ``None`` for no entropy bonus.
        weights: ``[..., rows]``, 0 for padding.
        clip: half-width of the ratio's interval.
        value_weight, entropy_weight: coefficients c1 and c2.
        old_value, value_clip: see :func:`value_loss`.

    Returns:
        ``[...]`` each: ``loss`` (differentiable), and ``policy_loss``, ``approximate_kl``, ``clip_fraction``,
        with a critic ``value_loss``, with entropies ``entropy``.
    """
    log_ratio = log_probability - old_log_probability
    policy = weighted_mean(clipped_surrogate(log_ratio, advantage, clip), weights)
    loss = policy
    parts: dict[str, Tensor] = {"policy_loss": policy.detach()}
    if value is not None and target is not None:
        error = weighted_mean(value_loss(value, target, old_value, value_clip), weights)
        loss = loss + value_weight * error
        parts["value_loss"] = error.detach()
    if policy_entropy is not None:
        spread = weighted_mean(policy_entropy, weights)
        loss = loss - entropy_weight * spread
        parts["entropy"] = spread.detach()
    with torch.no_grad():
        parts["approximate_kl"] = weighted_mean(approximate_kl(log_ratio), weights)
        outside = ((log_ratio.exp() - 1.0).abs() > clip).to(log_ratio.dtype)
        parts["clip_fraction"] = weighted_mean(outside, weights)
    return {"loss": loss, **parts}
