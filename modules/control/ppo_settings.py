"""One player's PPO, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PPOSettings:
    """One player's PPO.

    Args:
        lr, value_lr: Adam's, of policy and critic.
        anneal: lower both linearly to 0 over the player's updates.
        clip: half-width of the probability ratio's interval.
        value_clip: largest change of a value that still lowers the loss; ``null``: no clipping.
        epochs: passes over a rollout.
        minibatches: parts of a pass.
        gamma, gae_lambda: discount and GAE's lambda, in [0, 1].
        entropy: weight of the entropy bonus.
        max_grad_norm: greatest norm of the policy's and of the critic's gradient; ``null``: none.
        target_kl: no further epoch once the mean divergence of an epoch's minibatches exceeds it; ``null``: all epochs.
        normalise_observations: by running mean and standard deviation, clipped at 10.
        normalise_rewards: by the running standard deviation of discounted returns, clipped at 10.

    Raises:
        ValueError: a number out of range.
    """

    lr: float = 3e-4
    value_lr: float = 3e-4
    anneal: bool = True
    clip: float = 0.2
    value_clip: float | None = None
    epochs: int = 10
    minibatches: int = 32
    gamma: float = 0.99
    gae_lambda: float = 0.95
    entropy: float = 0.0
    max_grad_norm: float | None = None
    target_kl: float | None = None
    normalise_observations: bool = True
    normalise_rewards: bool = True

    def __post_init__(self) -> None:
        for field in ("lr", "value_lr", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"PPOSettings: {field} must be > 0 and finite, got {getattr(self, field)}")
        for field in ("value_clip", "max_grad_norm", "target_kl"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"PPOSettings: {field} must be > 0 or null, got {value}")
        for field in ("epochs", "minibatches"):
            if getattr(self, field) < 1:
                raise ValueError(f"PPOSettings: {field} must be >= 1, got {getattr(self, field)}")
        for field in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"PPOSettings: {field} must be in [0, 1], got {getattr(self, field)}")
        if not 0 <= self.entropy < math.inf:
            raise ValueError(f"PPOSettings: entropy must be >= 0 and finite, got {self.entropy}")
