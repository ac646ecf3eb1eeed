"""Log-probabilities of given text: continuations of prompts, and whole token streams by windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.networks.causal_lm import CausalLM
from modules.objectives.lm import lm_cross_entropy, token_log_probs


def sequence_logprobs(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log p(input_ids[b, t+1] | input_ids[b, <=t]), differentiable.

    Args:
        input_ids: int64 [B, T]; attention_mask: [B, T], 1 for tokens, 0 for padding on either side.
        chunk_size: rows of logits at a time. temperature: divides the logits.

    Returns: fp32 [B, T-1]; 0 where the target is padding. Left and right padding give the same values.
    """
    mask = attention_mask
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # right padding: causality hides it
    hidden = model(input_ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1])
    values = token_log_probs(hidden, model.lm_head.weight, input_ids[:, 1:], chunk_size, temperature)
    if attention_mask is None:
        return values
    real = (attention_mask[:, 1:] > 0) & (attention_mask[:, :-1] > 0)
    return torch.where(real, values, 0.0)


@torch.no_grad()
def continuation_logprobs(
    model: CausalLM, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 16
) -> list[list[float]]:
    """log p of every token of each continuation, given its prompt; batches of similar length, padded on the right.

    Raises: ValueError for an empty prompt, a count mismatch, or a pair longer than the model's context.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"continuation_logprobs: {len(prompts)} prompts but {len(continuations)} continuations")
    context = model.config.max_position_embeddings
    pairs = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    for i, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        if not prompt or len(pair) > context + 1:
            raise ValueError(
                f"continuation_logprobs: pair {i} has a prompt of {len(prompt)} and {len(pair)} tokens in all; want a "
                f"prompt of at least 1, and at most {context + 1} in all"
            )
    device = model.lm_head.weight.device
    results: list[list[float]] = [[] for _ in pairs]
    scored = sorted((i for i, continuation in enumerate(continuations) if continuation), key=lambda i: len(pairs[i]))
    for start in range(0, len(scored), batch_size):
        indices = scored[start : start + batch_size]
        longest = len(pairs[indices[-1]])
        ids = torch.tensor([pairs[i] + [0] * (longest - len(pairs[i])) for i in indices], device=device)
        values = sequence_logprobs(model, ids).tolist()
        for i, row in zip(indices, values, strict=True):
            results[i] = row[len(prompts[i]) - 1 : len(pairs[i]) - 1]
    return results


@torch.no_grad()
def stream_loss(
    model: CausalLM,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    chunk_size: int | None = None,
) -> tuple[float, int]:
    """Total next-token loss (nats) of a token stream, and the number of targets; perplexity = exp(total / count).

    Windows of `window` inputs start every `stride` tokens (default: window, no overlap); a target that several windows
    see counts once, in the first of them, so with stride < window all but the first window's targets have at least
    window - stride tokens of context. Every token but the stream's first is a target exactly once.

    Args: tokens int64 [N].
    Raises: ValueError for fewer than 2 tokens, or not 1 <= stride <= window.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stream_loss: want 1 <= stride <= window, got stride {stride} and window {window}")
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"stream_loss: want a stream of at least 2 tokens, got shape {tuple(tokens.shape)}")
    device = model.lm_head.weight.device
    tokens = tokens.to(device=device, dtype=torch.int64)
    targets = len(tokens) - 1
    starts = list(range(0, max(1, targets - window + stride), stride))
    total = 0.0
    for first in range(0, len(starts), batch_size):
        inputs = torch.zeros(len(starts[first : first + batch_size]), window, dtype=torch.int64, device=device)
        labels = torch.full_like(inputs, -100)
        for row, start in enumerate(starts[first : first + batch_size]):
            stop = min(start + window, targets)
            seen = 0 if start == 0 else window - stride
            inputs[row, : stop - start] = tokens[start:stop]
            labels[row, seen : stop - start] = tokens[start + seen + 1 : stop + 1]
        hidden = model(inputs)
        total += float(lm_cross_entropy(hidden, model.lm_head.weight, labels, chunk_size, reduction="sum")[0])
    return total, targets
