"""Start policy of the GoldProxy problem: a fixed random Markov chain in which rewarded tokens are rare."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.networks.markov_lm import MarkovConfig

CONTENT = slice(0, 12)
MARKERS = slice(12, 18)


def gold_proxy_table(config: MarkovConfig, seed: int = 3) -> Tensor:
    """Logits ``[conditions, positions, symbols, symbols]``: one chain for all conditions and positions.

    Normal with deviation 1.2; content and marker tokens are lower.
    """
    chain = 1.2 * torch.randn(config.symbols, config.symbols, generator=torch.Generator().manual_seed(seed))
    chain[:, CONTENT] -= 0.9
    chain[:, MARKERS] -= 1.2
    return chain.expand(config.conditions, config.positions, -1, -1).contiguous()
