"""Choosing actions from an ensemble's utilities: explorers for training, evaluators for everything else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from modules.objectives.td import masked_max

NEVER = float("-inf")


def ensemble_moments(utilities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over members (Schaefer et al. 2025, sec. 4.1).

    Args:
        utilities: ``[members, ..., actions]``.

    Returns:
        Two ``[..., actions]``; with one member the deviation is exactly 0.
    """
    if utilities.shape[0] == 1:
        return utilities[0], torch.zeros_like(utilities[0])
    mean = utilities.mean(0)
    return mean, (utilities - mean).square().mean(0).sqrt()


def _available(values: Tensor, legal: Tensor | None) -> Tensor:
    """``values`` with -inf on what is not available, and the first action available where nothing is."""
    if legal is None:
        return values
    dead = ~legal.any(-1, keepdim=True)
    first = torch.zeros_like(legal)
    first[..., 0] = True
    return torch.where(legal | (dead & first), values, NEVER)


def best_action(scores: Tensor, legal: Tensor | None, ties: Tensor) -> Tensor:
    """Index ``[...]`` of the greatest available score; ties go to the largest of ``ties``.

    Args:
        scores, ties: ``[..., actions]``; ``ties`` in [0, 1).
        legal: bool, broadcastable to ``scores``; rows with nothing available give action 0.
    """
    scores = _available(scores, legal)
    return torch.where(scores == scores.amax(-1, keepdim=True), ties, -1.0).argmax(-1)


def with_random(action: Tensor, legal: Tensor | None, epsilon: float, coin: Tensor, ties: Tensor) -> Tensor:
    """``action`` ``[...]``, replaced by a uniformly random available one where ``coin`` ``[...]`` < ``epsilon``."""
    if epsilon <= 0.0:
        return action
    drawn = _available(ties, legal).argmax(-1)
    return torch.where(coin < epsilon, drawn, action)


def boltzmann_action(scores: Tensor, legal: Tensor | None, temperature: float, uniform: Tensor) -> Tensor:
    """An action ``[...]`` drawn from the softmax of ``scores / temperature`` over available ones (Gumbel's trick)."""
    gumbel = -torch.log((-torch.log(uniform.clamp(1e-12, 1.0 - 1e-7))).clamp_min(1e-12))
    return _available(scores / temperature + gumbel, legal).argmax(-1)


def member_utilities(utilities: Tensor, member: Tensor) -> Tensor:
    """``utilities`` ``[members, rows, agents, actions]`` of each row's ``member`` ``[rows]``."""
    rows = torch.arange(utilities.shape[1], device=utilities.device)
    return utilities[member, rows]


def majority_vote(utilities: Tensor, legal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The action that most members would choose (Schaefer et al. 2025, sec. 4.3).

    Equal votes go to the larger mean utility, then to the lower index.

    Args:
        utilities: ``[members, ..., actions]``.
        legal: bool ``[..., actions]``; what is not available gets no vote.

    Returns:
        Actions ``[...]`` int64, and the share of members that voted for them.
    """
    masked = _available(utilities, legal)
    members, actions = utilities.shape[0], utilities.shape[-1]
    votes = functional.one_hot(masked.argmax(-1), actions).sum(0)
    most = votes.amax(-1, keepdim=True)
    # a tied action has votes, so it is available and its mean is finite
    mean = utilities.mean(0)
    action = torch.where(votes == most, mean, NEVER).argmax(-1)
    return action, most.squeeze(-1) / members


def greedy_value(values: Tensor, chooser: Tensor | None, legal: Tensor | None) -> Tensor:
    """The greatest available of ``values`` ``[..., actions]``, or the one at which ``chooser`` is greatest; 0 where
    nothing is available."""
    if chooser is None:
        return masked_max(values, None if legal is None else legal.expand_as(values))
    if legal is None:
        return values.gather(-1, chooser.argmax(-1, keepdim=True)).squeeze(-1)
    chosen = values.gather(-1, torch.where(legal, chooser, NEVER).argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(legal.any(-1), chosen, 0.0)
