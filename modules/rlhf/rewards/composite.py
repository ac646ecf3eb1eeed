"""All component rewards of a batch, checked as they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modules.rlhf.rewards.base import Responses, Reward

# Scores are float32: a score of exactly the bound may come out a rounding beyond it.
_SLACK = 1e-5


class RewardError(ValueError):
    """A reward failed or gave something that is no score; the message names it by its config key."""


def _at(batch: Responses, index: int) -> str:
    return f"sample {index} (prompt {batch.samples[index].prompt[:60]!r}, response {batch.texts[index][:60]!r})"


def checked_score(name: str, reward: Reward, batch: Responses) -> Tensor:
    """The reward's scores, float32 ``[B]`` on the CPU.

    Args:
        name: config key of the reward, for messages (``rewards.<name>``).
        reward: the reward.
        batch: responses.

    Raises:
        RewardError: it raised an error (chained), returned no tensor ``[B]``, or a score that is not finite.
    """
    try:
        scores = reward.score(batch)
    except Exception as error:
        if len(batch) == 0 or isinstance(error, RewardError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RewardError(f"rewards.{name}: {type(error).__name__}: {reason}") from error
    if not isinstance(scores, Tensor) or scores.shape != (len(batch),):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"rewards.{name}: want one score a response, a tensor of shape ({len(batch)},), got {got}")
    scores = scores.detach().to("cpu", torch.float32)
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise RewardError(f"rewards.{name}: score {float(scores[index])} at {_at(batch, index)}; scores must be finite")
    return scores


def score_all(rewards: Mapping[str, Reward], batch: Responses) -> Tensor:
    """Scores of all components.

    Args:
        rewards: by config key; their order is that of thresholds, multipliers and value heads everywhere.
        batch: B responses.

    Returns:
        float32 ``[B, N]`` on the CPU.

    Raises:
        RewardError: see :func:`checked_score`; or there is no reward.
    """
    if not rewards:
        raise RewardError("rewards: want at least one")
    return torch.stack([checked_score(name, reward, batch) for name, reward in rewards.items()], dim=-1)


def check_bounds(rewards: Mapping[str, Reward], scores: Tensor, batch: Responses) -> None:
    """Check that scores lie in the range that their reward declares.

    Args:
        rewards: by config key.
        scores: ``[B, N]`` from :func:`score_all`.
        batch: the responses scored.

    Raises:
        RewardError: names the reward, its range and the first response outside it.
    """
    for column, (name, reward) in enumerate(rewards.items()):
        low, high = reward.bounds
        slack = _SLACK * max([1.0, *(abs(bound) for bound in (low, high) if math.isfinite(bound))])
        outside = ((scores[:, column] < low - slack) | (scores[:, column] > high + slack)).nonzero()
        if len(outside):
            index = int(outside[0])
            raise RewardError(
                f"rewards.{name}: score {float(scores[index, column]):g} outside its declared range "
                f"[{low:g}, {high:g}] at {_at(batch, index)}"
            )
