"""Advantage streams: one per component reward, and one for the KL reward (the last)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from modules.objectives.advantage import discounted_returns, gae
from modules.rlhf.settings import Problem

Reduce = Callable[[Tensor], Tensor]
Baseline = Literal["gae", "group", "batch"]


def response_mask(length: Tensor, steps: int) -> Tensor:
    """bool ``[..., steps]``: the tokens of responses of ``length`` ``[...]``, the one that ends them included."""
    return torch.arange(steps, device=length.device) < length.unsqueeze(-1)


def token_rewards(scores: Tensor, log_ratio: Tensor, length: Tensor, beta: float | Tensor) -> Tensor:
    """Rewards of every token: components on the last one, KL on all (paper, section 2).

    Args:
        scores: ``[..., N]``, of whole responses. log_ratio: ``[..., R]``, ``log pi - log pi_0`` of the tokens.
        length: ``[...]`` tokens of each response, at least 1. beta: coefficient of the KL reward.

    Returns:
        ``[..., R, N + 1]``: components in their order, then ``-beta * log_ratio``; 0 in padding.
    """
    steps = log_ratio.shape[-1]
    last = torch.arange(steps, device=length.device) == (length - 1).unsqueeze(-1)
    paid = scores.unsqueeze(-2) * last.unsqueeze(-1)
    penalty = torch.where(response_mask(length, steps), -beta * log_ratio, 0.0)
    return torch.cat([paid.to(penalty.dtype), penalty.unsqueeze(-1)], -1)


def combined_scores(problem: Problem, scores: Tensor) -> Tensor:
    """The one score ``[...]`` of fixed-weight PPO from components ``[..., N]``.

    ``sum_i alpha_i r_i``; for ``ppo_sat`` ``-sum_i (alpha_i r_i - theta_i)^2``, each episode's distance from it.
    """
    weights = torch.tensor(problem.weights, dtype=scores.dtype, device=scores.device)
    if problem.saturating:
        targets = torch.tensor(problem.targets, dtype=scores.dtype, device=scores.device)
        return -(weights * scores - targets).square().sum(-1)
    return scores @ weights


def reward_streams(problem: Problem, scores: Tensor, log_ratio: Tensor, length: Tensor, beta: float | Tensor) -> Tensor:
    """Rewards ``[..., R, S]`` of the problem's streams: those of :func:`token_rewards`, or their one weighted sum."""
    if not problem.single_stream:
        return token_rewards(scores, log_ratio, length, beta)
    one = token_rewards(combined_scores(problem, scores).unsqueeze(-1), log_ratio, length, beta)
    return one.sum(-1, keepdim=True)


def advantage_streams(
    rewards: Tensor,
    values: Tensor | None,
    length: Tensor,
    baseline: Baseline,
    *,
    gamma: float,
    lambda_: float,
    leave_one_out: bool = True,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of every token and stream.

    The end of a response is terminal, also at the limit on new tokens: nothing is bootstrapped beyond it.

    Args:
        rewards: ``[P, S, R, streams]`` of ``S`` responses to each of ``P`` prompts.
        values: the same shape, of the states before each token; read with ``gae`` only.
        length: ``[P, S]``.
        baseline: ``gae`` (Schulman et al. 2016); ``group``: the response's undiscounted return minus the mean of its
            prompt's other responses (RLOO, Ahmadian et al. 2024), or of all of them (GRPO, Shao et al. 2024) without
            ``leave_one_out``; ``batch``: discounted return to go minus its mean over all responses at that position.
        reduce: sums a flat float64 tensor over ranks, for ``batch``.

    Returns:
        ``(advantage, target)`` shaped like ``rewards``; 0 in padding.

    Raises:
        ValueError: ``gae`` without values, or ``group`` with one response per prompt.
    """
    steps = rewards.shape[2]
    mask = response_mask(length, steps).unsqueeze(-1)
    last = (torch.arange(steps, device=length.device) == (length - 1).unsqueeze(-1)).unsqueeze(-1).expand_as(rewards)
    rewards = torch.where(mask, rewards, 0.0)
    if baseline == "gae":
        if values is None:
            raise ValueError("advantage_streams: gae needs values; give critic.kind shared or separate")
        values = torch.where(mask, values, 0.0)
        after = torch.cat([values[:, :, 1:], torch.zeros_like(values[:, :, :1])], 2)
        advantage, target = gae(rewards, values, after, last, last, gamma, lambda_, dim=2)
    elif baseline == "group":
        group = rewards.shape[1]
        if group < 2:
            raise ValueError("advantage_streams: group needs at least 2 responses per prompt (group_size)")
        total = rewards.sum(2)
        mean = total.mean(1, keepdim=True)
        centred = (total - mean) * (group / (group - 1) if leave_one_out else 1.0)
        advantage = target = centred.unsqueeze(2).expand_as(rewards)
    else:
        target = discounted_returns(rewards, last, gamma, dim=2)
        weights = mask.double()
        sums = torch.cat([(target * weights).sum((0, 1)), weights.sum((0, 1))], -1)
        if reduce is not None:
            sums = reduce(sums.reshape(-1)).view_as(sums)
        mean = sums[:, :-1] / sums[:, -1:].clamp_min(1.0)
        advantage = target - mean.to(target.dtype)
    return torch.where(mask, advantage, 0.0), torch.where(mask, target, 0.0)
