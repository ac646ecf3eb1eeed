"""Learning-rate schedule of Llemma (GPT-NeoX): linear warm-up, cosine to a floor, the floor for ever after."""

from __future__ import annotations

import math
from collections.abc import Callable


def lr_ratio(step: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of optimiser step `step` (1-based) over the peak.

    s <= W: s / W; then min + (1 - min) / 2 * (1 + cos(pi (s - W) / (N - W))), and min for s > N, where an unclamped
    cosine would rise again (W = warmup_steps, N = decay_steps, counted from
    step 0).
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if step >= decay_steps:
        return min_lr_ratio
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) / 2 * (1 + math.cos(math.pi * progress))


def lr_lambda(warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
    """`lr_ratio` as torch's LambdaLR wants it: the argument counts finished steps, so step s is asked for as s - 1.

    Raises:
        ValueError: not 0 <= warmup_steps <= decay_steps, decay_steps < 1, or min_lr_ratio outside [0, 1].
    """
    if not 0 <= warmup_steps <= decay_steps or decay_steps < 1:
        raise ValueError(f"lr_lambda: want 0 <= warmup_steps <= decay_steps >= 1, got {warmup_steps} and {decay_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"lr_lambda: min_lr_ratio must be in [0, 1], got {min_lr_ratio}")
    return lambda finished: lr_ratio(finished + 1, warmup_steps, decay_steps, min_lr_ratio)
