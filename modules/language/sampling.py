"""Choice of the next token: greedy, temperature, top-k, nucleus; a sequence's randomness depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# Most nuclei are small: look among this many top tokens first, and double until the nucleus is inside.
_FIRST_NUCLEUS = 64


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection of 64-bit integers with good avalanche."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sequence_seed(seed: int, index: int) -> int:
    """A seed for the index-th sequence of a run."""
    return _mix(_mix(seed & _MASK) ^ index)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`_mix` of each entry of a uint64 array; numpy's unsigned arithmetic wraps around as it should."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seeds: Sequence[int] | Tensor, count: int) -> Tensor:
    """Counter-based uniform numbers in [0, 1), float64 [len(seeds), count]; entry (i, t) depends on seeds[i], t.

    Args: seeds: 64-bit numbers, signed or not, modulo 2^64.
    """
    if isinstance(seeds, Tensor):
        bits = seeds.cpu().numpy().astype(np.int64).view(np.uint64)
    else:
        bits = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
    mixed = _mix_array(_mix_array(bits)[:, None] ^ np.arange(count, dtype=np.uint64))
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def next_tokens(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the model itself (temperature 1, all tokens).

    Args:
        logits: [B, V]; uniform: float64 [B] in [0, 1), None for greedy choice.
        temperature: > 0; divides the logits. top_p: in (0, 1]; the smallest set of most likely tokens whose probability
            reaches it, at least one (Holtzman et al. 2020). top_k: only so many most likely tokens (0: all), before
            top_p.
        forbidden: int64 [F], tokens that are not chosen; the log-probability still counts them.

    Returns: tokens int64 [B], log-probabilities fp32 [B].

    Sampling inverts the distribution function at one uniform number a row. It needs no noise of size V, and a row's
    choice does not depend on the other rows.
    """
    logits = logits.float()
    allowed = logits if forbidden is None else logits.index_fill(1, forbidden, -torch.inf)
    if uniform is None:
        tokens = allowed.argmax(dim=-1)
    elif 0 < top_k < logits.shape[1]:
        tokens = _top_k(allowed, uniform, temperature, top_k, top_p)
    elif top_p < 1.0:
        tokens = _nucleus(allowed / temperature, uniform, top_p)
    else:
        tokens = _invert(torch.softmax(allowed / temperature, dim=-1).double(), uniform)
    # log_softmax is one pass of a vectorised kernel: half the time of logsumexp
    return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn in proportion to weights float64 [B, K], which need not sum to 1."""
    cumulative = weights.cumsum(dim=-1)
    point = (uniform.to(weights.device) * cumulative[:, -1]).unsqueeze(1)
    # right=True: a weight of zero is never drawn, not even by uniform = 0
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def _top_k(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    top, indices = logits.topk(top_k, dim=-1)
    weights = torch.softmax(top.double() / temperature, dim=-1)
    if top_p < 1.0:
        weights = weights * (weights.cumsum(dim=-1) - weights < top_p)
    return indices.gather(1, _invert(weights, uniform).unsqueeze(1)).squeeze(1)


def _nucleus(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    normaliser = logits.double().logsumexp(dim=-1, keepdim=True)
    count = min(_FIRST_NUCLEUS, logits.shape[1])
    while True:
        top, indices = logits.topk(count, dim=-1)
        weights = (top.double() - normaliser).exp()
        cumulative = weights.cumsum(dim=-1)
        if count == logits.shape[1] or bool((cumulative[:, -1] >= top_p).all()):
            break
        count = min(count * 4, logits.shape[1])
    # A token is in the nucleus if the more likely ones do not reach top_p yet.
    inside = (cumulative - weights) < top_p
    return indices.gather(1, _invert(weights * inside, uniform).unsqueeze(1)).squeeze(1)
