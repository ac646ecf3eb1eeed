"""Temporal-difference learning of action values under legal-action masks; illegal actions never enter a maximum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from modules.objectives.ppo import masked_log_softmax


def masked_max(q: Tensor, legal: Tensor | None = None) -> Tensor:
    """Largest value ``[...]`` of a legal action in ``q`` ``[..., actions]``; 0 in rows without legal actions."""
    if legal is None:
        return q.amax(-1)
    best = torch.where(legal, q, float("-inf")).amax(-1)
    return torch.where(legal.any(-1), best, 0.0)


def greedy_actions(q: Tensor, legal: Tensor | None = None) -> Tensor:
    """Index ``[...]`` of the best legal action of ``q`` ``[..., actions]``; ties go to the first."""
    return (q if legal is None else torch.where(legal, q, float("-inf"))).argmax(-1)


def q_learning_target(
    reward: Tensor, next_q: Tensor, terminated: Tensor, gamma: float = 1.0, next_legal: Tensor | None = None
) -> Tensor:
    """``reward + gamma * max over legal a of next_q[a]``, without the second term where terminated (Mnih et al. 2015).

    Args:
        reward: ``[...]``.
        next_q: the target network's values of the next state, ``[..., actions]``.
        terminated: bool ``[...]``; there ``next_q`` may hold anything.
        gamma: discount, in [0, 1].
        next_legal: bool ``[..., actions]``; a state without legal actions counts as terminal.

    Returns:
        ``[...]``, without gradient.
    """
    future = masked_max(next_q, next_legal)
    return (reward + gamma * torch.where(terminated, 0.0, future)).detach()


def double_q_target(
    reward: Tensor,
    next_q: Tensor,
    next_q_online: Tensor,
    terminated: Tensor,
    gamma: float = 1.0,
    next_legal: Tensor | None = None,
) -> Tensor:
    """As :func:`q_learning_target`, the action chosen by ``next_q_online`` and valued by ``next_q``.

    van Hasselt et al. 2016, eq. 4. Shapes as there; ``next_q_online`` ``[..., actions]``.
    """
    choice = greedy_actions(next_q_online, next_legal).unsqueeze(-1)
    future = next_q.gather(-1, choice).squeeze(-1)
    if next_legal is not None:
        future = torch.where(next_legal.any(-1), future, 0.0)
    return (reward + gamma * torch.where(terminated, 0.0, future)).detach()


def td_loss(q: Tensor, action: Tensor, target: Tensor, kind: str = "huber", delta: float = 1.0) -> Tensor:
    """Loss ``[...]`` of the taken actions' values against their targets.

    Args:
        q: ``[..., actions]``.
        action: int64 ``[...]``.
        target: ``[...]``, held fixed.
        kind: ``huber`` (quadratic within ``delta``, linear beyond) or ``mse`` (half the square).
        delta: in units of return.

    Raises:
        ValueError: for another ``kind``.
    """
    taken = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    if kind == "huber":
        return functional.huber_loss(taken, target, reduction="none", delta=delta)
    if kind == "mse":
        return 0.5 * (taken - target).square()
    raise ValueError(f"td_loss: kind: huber or mse, got '{kind}'")


def boltzmann_log_policy(q: Tensor, legal: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``[..., actions]`` of the softmax of ``q / temperature`` over legal actions.

    ``temperature`` > 0 is in units of return. Illegal actions as in
    :func:`~modules.objectives.ppo.masked_log_softmax`.
    """
    return masked_log_softmax(q / temperature, legal)


def epsilon_greedy_policy(q: Tensor, legal: Tensor | None = None, epsilon: float = 0.05) -> Tensor:
    """Probabilities ``[..., actions]``: ``epsilon`` spread evenly over legal actions, the rest on the best of them."""
    mask = torch.ones_like(q, dtype=torch.bool) if legal is None else legal.expand_as(q)
    even = mask.to(q.dtype) / mask.sum(-1, keepdim=True).clamp_min(1)
    best = functional.one_hot(greedy_actions(q, mask), q.shape[-1]).to(q.dtype) * mask
    return (1.0 - epsilon) * best + epsilon * even
