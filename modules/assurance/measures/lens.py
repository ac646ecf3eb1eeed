"""What a transformer computes on its way: logit lens and attention entropy.

The logit lens (nostalgebraist 2020) reads every layer's residual stream with the model's own final norm and
unembedding. Attention entropy is ``H(row) / log(#unmasked keys)``: 1 for a row that looks everywhere alike, 0 for one
that looks at one key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
"""``[rows, H]`` to ``[rows, H]`` (a final norm) or ``[rows, vocabulary]`` (an unembedding)."""


@dataclass(frozen=True)
class Lens:
    """Readings of the logit lens. ``L + 1`` layers: the embedding's output is layer 0, the final reading layer ``L``.

    Attributes:
        agreement: ``[L + 1]`` float64, share of tokens whose top-1 equals the final one; 1 at the last layer.
        kl: ``[L + 1]`` float64, mean over tokens of KL(final || layer) in nats; 0 at the last layer.
        depth: ``[B, T]`` int64, first layer whose top-1 equals the final one; -1 where the mask drops the token.
        settled: ``[B, T]`` int64, first layer from which on every top-1 equals the final one (>= ``depth``, which may
            count a chance hit); -1 where the mask drops the token.
    """

    agreement: Tensor
    kl: Tensor
    depth: Tensor
    settled: Tensor


@torch.no_grad()
def logit_lens(
    hidden: Tensor | Sequence[Tensor],
    norm: Map,
    unembed: Map,
    *,
    mask: Tensor | None = None,
    last_is_normed: bool = False,
    chunk: int = 256,
) -> Lens:
    """Reads every layer's hidden states as predictions and compares them with the final ones.

    Logits of ``chunk`` tokens of two layers are held at once, never those of a whole batch.

    Args:
        hidden: ``[L + 1, B, T, H]`` or ``L + 1`` tensors ``[B, T, H]``: the residual stream before the final norm.
        norm: the model's final norm.
        unembed: the model's output layer.
        mask: ``[B, T]`` bool, True for tokens that count; default: all.
        last_is_normed: whether the last hidden state has had the final norm already, as the last of transformers'
            ``output_hidden_states`` has.
        chunk: tokens read at once.

    Raises:
        ValueError: fewer than two layers, unequal shapes, no token that counts, logits with NaN (or all -inf), a chunk
            below 1.
    """
    layers = list(hidden)
    shape = layers[0].shape if layers else torch.Size()
    if len(layers) < 2 or len(shape) != 3 or any(one.shape != shape for one in layers):
        found = [tuple(one.shape) for one in layers]
        raise ValueError(f"logit_lens: hidden: must be two layers or more, each [B, T, H] of one shape, got {found}")
    if chunk < 1:
        raise ValueError(f"logit_lens: chunk: must be at least 1, got {chunk}")
    keep = _tokens(mask, shape[:2], layers[0].device)
    rows = keep.flatten().nonzero().squeeze(1)
    if not len(rows):
        raise ValueError("logit_lens: mask: drops every token, so there is nothing to read")

    def read(layer: int, at: Tensor) -> Tensor:
        states = layers[layer].reshape(-1, shape[2])[at]
        if not (last_is_normed and layer == len(layers) - 1):
            states = norm(states)
        return unembed(states).float().log_softmax(-1)

    match = torch.ones(len(layers), len(rows), dtype=torch.bool, device=rows.device)
    kl = torch.zeros(len(layers), dtype=torch.float64, device=rows.device)
    bad = torch.zeros((), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), chunk):
        at = rows[start : start + chunk]
        final = read(len(layers) - 1, at)
        bad |= final.isnan().any()
        top, weight = final.argmax(-1), final.exp()
        for layer in range(len(layers) - 1):
            logs = read(layer, at)
            bad |= logs.isnan().any()
            match[layer, start : start + chunk] = logs.argmax(-1) == top
            # a word that the final reading excludes adds 0, also where both logs are -inf
            terms = torch.where(weight > 0, weight * (final - logs), 0.0)
            kl[layer] += terms.sum(-1).double().clamp_min(0.0).sum()
    if bad:  # one look at the device for the whole batch
        raise ValueError("logit_lens: logits hold NaN; check the hidden states, the norm and the unembedding")
    depth, settled = (torch.full(shape[:2], -1, device=rows.device) for _ in range(2))
    depth[keep] = match.long().argmax(0)  # the first of equal maxima
    settled[keep] = len(layers) - match.flip(0).long().cumprod(0).sum(0)
    return Lens(match.double().mean(1), kl / len(rows), depth, settled)


def _tokens(mask: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(*shape, dtype=torch.bool, device=device)
    if mask.shape != torch.Size(shape) or mask.dtype != torch.bool:
        raise ValueError(f"logit_lens: mask: must be bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.to(device)


@torch.no_grad()
def attention_entropy_rows(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Normalised entropy of every attention row: ``H(row) / log(#unmasked keys)``, in [0, 1].

    Args:
        weights: ``[..., Q, K]`` after the softmax.
        mask: bool, broadcasts to ``weights``, True for keys that the row may look at (give the causal mask: a weight of
            0 does not say whether a key was masked); default: all keys.

    Returns:
        ``[..., Q]`` float64; NaN for rows with fewer than two unmasked keys, whose entropy says nothing.

    Raises:
        ValueError: a mask that does not fit; rows that are not distributions over their unmasked keys.
    """
    if weights.dim() < 2 or not weights.shape[-1]:
        raise ValueError(f"attention_entropy: weights: must be [..., Q, K] with keys, got {tuple(weights.shape)}")
    allowed = torch.ones((), dtype=torch.bool, device=weights.device) if mask is None else mask.to(weights.device)
    if allowed.dtype != torch.bool:
        raise ValueError(f"attention_entropy: mask: must be bool, True for keys to look at, got {allowed.dtype}")
    try:
        allowed = allowed.broadcast_to(weights.shape)
    except RuntimeError as error:
        raise ValueError(
            f"attention_entropy: mask: {tuple(allowed.shape)} does not broadcast to weights {tuple(weights.shape)}"
        ) from error
    p = weights.double()
    keys = allowed.sum(-1)
    kept = keys > 1
    slack = max(1e-3, 4 * torch.finfo(weights.dtype).eps)  # a softmax in half precision sums to 1 within this
    on_masked = p.masked_fill(allowed, 0.0).abs().sum(-1)
    wrong = ~((p.masked_fill(~allowed, 0.0).sum(-1) - 1).abs() <= slack) | ~(on_masked <= slack) | (p < 0).any(-1)
    if (wrong & kept).any():
        raise ValueError(
            "attention_entropy: weights: rows must be >= 0 and sum to 1 over their unmasked keys; "
            "give weights after the softmax, and the mask they were made with"
        )
    entropy = torch.special.entr(p.masked_fill(~allowed, 0.0)).sum(-1)
    return torch.where(kept, entropy / keys.double().log(), torch.nan).clamp(0.0, 1.0)


def attention_entropy(weights: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean normalised attention entropy per layer and head; rows with fewer than two unmasked keys are dropped.

    Args:
        weights: ``[layers, B, heads, Q, K]`` or a sequence of ``[B, heads, Q, K]``.
        mask: bool, broadcasts to ``[B, heads, Q, K]``; as :func:`attention_entropy_rows`, which names the errors too.

    Returns:
        ``[layers, heads]`` float64; NaN where no row is kept.
    """
    layers = list(weights)
    if not layers or any(one.dim() != 4 for one in layers):
        raise ValueError(
            f"attention_entropy: weights: must be [B, heads, Q, K] a layer, got {[tuple(one.shape) for one in layers]}"
        )
    return torch.stack([attention_entropy_rows(one, mask).nanmean((0, 2)) for one in layers])
