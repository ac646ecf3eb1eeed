"""Losses on preferences between two responses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of preferences under Bradley and Terry (1952): ``-log sigmoid(r_c - r_r - m)``, per pair.

    Args:
        chosen, rejected: scores of the better and of the worse response, any one shape.
        margin: by how much the better one is to be ahead (Touvron et al. 2023, equation 2); None: 0.

    Returns:
        Losses, of the scores' shape.

    Raises:
        ValueError: shapes differ.
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        shapes = [tuple(part.shape) for part in (chosen, rejected, margin) if part is not None]
        raise ValueError(f"bradley_terry_loss: shapes differ: {', '.join(map(str, shapes))}")
    ahead = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(ahead)
