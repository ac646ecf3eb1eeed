"""Random streams that are pure functions of the run's seed and of where in the run they are used.

A generator made from ``(seed, iteration, step, stream)`` needs no state in a checkpoint, and the same episodes are
drawn on any number of ranks, since ranks share out streams and not draws.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch

SEED_VARIABLE = "PL_GLOBAL_SEED"  # set by seed_everything, on every rank


def global_seed() -> int:
    """The run's seed (``seed_everything``); 0 where none was set."""
    return int(os.environ.get(SEED_VARIABLE, "0"))


def stream_seed(*keys: int) -> int:
    """A 63-bit seed, the same for the same ``keys`` (non-negative integers)."""
    words = np.random.SeedSequence(keys).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def stream(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator, seeded by :func:`stream_seed`."""
    return torch.Generator(device=device).manual_seed(stream_seed(*keys))


def text_seed(text: str, size: int = 7) -> int:
    """A seed of ``size`` bytes from what identifies a sample: independent of batch, rank and order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")
