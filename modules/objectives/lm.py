"""Language-model losses: next-token cross-entropy that never holds all logits, and the units it is reported in."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.networks.products import add_product, product

# Logits handled at once when no chunk_size is given: 4 Mi entries, 16 MiB of fp32, near a core's share of cache.
CHUNK_ELEMENTS = 1 << 22


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward takes the gradient too, chunk by chunk, while a chunk's logits are at hand; backward only scales it."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        ignore_index: int,
        mean: bool,
        dtype: torch.dtype,
    ):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        states = hidden.to(dtype)
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        losses = torch.empty(len(labels), dtype=wide, device=hidden.device)
        count = (labels != ignore_index).sum()
        share = (1.0 / count if mean else torch.ones_like(count)).to(wide)
        for start in range(0, len(labels), chunk):
            stop = min(start + chunk, len(labels))
            rows, target = states[start:stop], labels[start:stop]
            valid = target != ignore_index
            index = torch.where(valid, target, 0).unsqueeze(1)
            logits = product(rows, matrix).to(wide)
            picked = logits.gather(1, index)
            # Softmax in place: these logits are not needed again.
            top = logits.amax(dim=1, keepdim=True)
            logits.sub_(top).exp_()
            total = logits.sum(dim=1, keepdim=True)
            losses[start:stop] = torch.where(valid, (total.log() + top - picked).squeeze(1), 0.0)
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = (softmax - onehot) / count, zero in ignored rows.
            row_share = (valid * share).unsqueeze(1)
            logits.mul_(row_share / total).scatter_add_(1, index, -row_share)
            grad = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start:stop] = product(grad, matrix.t())
            if grad_weight is not None:
                add_product(grad_weight, grad.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses, count)
        return losses.sum() * share, losses, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _losses: Tensor, _count: Tensor):
        # On CPU, reading the scalar is free and the usual factor 1 saves a pass over a [V, D] matrix.
        unit = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        grads = (
            None if grad is None else (grad if unit else grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def lm_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token cross-entropy, mean over counted tokens: -1/n sum log p(labels[b,t] | input[b,<=t]) (Llemma, section
    2).

    Labels are already shifted: labels[b, t] is the token after input t. Products run in autocast's dtype where it is
    on, softmax statistics in fp32. Logits exist for `chunk_size` tokens at a time, and their gradient is taken at once,
    in the forward pass.

    Args:
        hidden: [B, T, D] (or [N, D]); lm_head_weight: [V, D]; labels: int64 [B, T] (or [N]), `ignore_index` = not
            counted.
        chunk_size: tokens per chunk; None = as many as make about 4 Mi logits.
        reduction: "mean" over counted tokens (NaN if there are none) or "sum".

    Returns: loss (fp32 scalar, differentiable once), per-token loss (fp32, labels' shape, detached, 0 where ignored),
        counted tokens (int64 scalar).

    Raises:
        ValueError: shapes that do not fit, chunk_size < 1, unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"lm_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    chunk_size, dtype = _prepare("lm_cross_entropy", hidden, lm_head_weight, labels, chunk_size)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, losses, count = _ChunkedCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            lm_head_weight,
            labels.reshape(-1),
            chunk_size,
            ignore_index,
            reduction == "mean",
            dtype,
        )
    return loss, losses.view(labels.shape), count


class _TokenLogProbs(torch.autograd.Function):
    """log p(label) per token with a gradient per token; the backward pass recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, inverse_temperature: float, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        matrix = weight.to(dtype)
        log_probs = torch.empty(len(labels), dtype=wide, device=hidden.device)
        normaliser = torch.empty_like(log_probs)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = product(hidden[rows].to(dtype), matrix).to(wide).mul_(inverse_temperature)
            normaliser[rows] = logits.logsumexp(dim=1)
            log_probs[rows] = logits.gather(1, labels[rows].unsqueeze(1)).squeeze(1) - normaliser[rows]
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.options = chunk, inverse_temperature, dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs: Tensor):
        hidden, weight, labels, normaliser = ctx.saved_tensors
        chunk, inverse_temperature, dtype = ctx.options
        matrix = weight.to(dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        needs_weight = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=weight.device) if needs_weight else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            states = hidden[rows].to(dtype)
            logits = product(states, matrix).to(normaliser.dtype).mul_(inverse_temperature)
            share = (grad_log_probs[rows] * inverse_temperature).unsqueeze(1)
            # d log p(label) / d logits = onehot - softmax
            grad = logits.sub_(normaliser[rows].unsqueeze(1)).exp_().mul_(-share)
            grad = grad.scatter_add_(1, labels[rows].unsqueeze(1), share).to(dtype)
            grad_hidden[rows] = product(grad, matrix.t())
            if grad_weight is not None:
                add_product(grad_weight, grad.t(), states)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def token_log_probs(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, chunk_size: int | None = None, temperature: float = 1.0
) -> Tensor:
    """log p(labels[b, t] | input[b, <=t]) of each token, differentiable once; no more than `chunk_size` rows of logits
    at a time.

    Args: hidden [B, T, D]; lm_head_weight [V, D]; labels int64 [B, T], every one a token id; temperature divides the
        logits.
    Returns: fp32 [B, T]. Raises: ValueError for shapes that do not fit, chunk_size < 1, temperature <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"token_log_probs: temperature must be > 0, got {temperature}")
    chunk_size, dtype = _prepare("token_log_probs", hidden, lm_head_weight, labels, chunk_size)
    with torch.autocast(hidden.device.type, enabled=False):
        flat = _TokenLogProbs.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            lm_head_weight,
            labels.reshape(-1),
            chunk_size,
            1.0 / temperature,
            dtype,
        )
    return flat.view(labels.shape)


class _LogProbsAndEntropy(torch.autograd.Function):
    """As `_TokenLogProbs`, with the entropy of each token's softmax."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype):
        matrix, wide = weight.to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
        logprobs, entropy = (torch.empty(len(labels), dtype=wide, device=hidden.device) for _ in range(2))
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logs = torch.log_softmax(product(hidden[rows].to(dtype), matrix).to(wide), dim=1)
            logprobs[rows] = logs.gather(1, labels[rows, None]).squeeze(1)
            entropy[rows] = -(logs.exp() * logs).sum(dim=1)
        ctx.save_for_backward(hidden, weight, labels, entropy)
        ctx.options = chunk, dtype
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor):
        hidden, weight, labels, entropy = ctx.saved_tensors
        chunk, dtype = ctx.options
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            states = hidden[rows].to(dtype)
            logs = torch.log_softmax(product(states, matrix).to(entropy.dtype), dim=1)
            # d log p(label) / d logits = onehot - p;  d H / d logits = -p (log p + H)
            share = grad_logprobs[rows, None]
            factor = (logs + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(share)
            grad = logs.exp_().mul_(factor).neg_().scatter_add_(1, labels[rows, None], share).to(dtype)
            grad_hidden[rows] = product(grad, matrix.t()).to(hidden.dtype)
            if grad_weight is not None:
                add_product(grad_weight, grad.t(), states)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def token_log_probs_and_entropy(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy -sum p log p of each token's softmax, differentiable once; no more than `chunk_size`
    rows of logits at a time.

    Args: hidden [N, D]; lm_head_weight [V, D]; labels int64 [N]. Returns: fp32 [N], fp32 [N].
    Raises: ValueError for shapes that do not fit, chunk_size < 1.
    """
    chunk_size, dtype = _prepare("token_log_probs_and_entropy", hidden, lm_head_weight, labels, chunk_size)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LogProbsAndEntropy.apply(hidden, lm_head_weight, labels, chunk_size, dtype)


def _prepare(
    caller: str, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None
) -> tuple[int, torch.dtype]:
    """Check shapes; the chunk size, and the dtype of matrix products."""
    if hidden.shape[:-1] != labels.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{caller}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} "
            "do not fit; want [B, T, D], [V, D], [B, T]"
        )
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if chunk_size < 1:
        raise ValueError(f"{caller}: chunk_size must be >= 1, got {chunk_size}")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    # Gradients are taken before a loss scaler acts: fp16 would flush them to zero.
    return chunk_size, torch.float32 if dtype == torch.float16 else dtype


def perplexity(mean_loss: float) -> float:
    """exp of the mean token loss in nats; infinity where that overflows."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def bits_per_byte(total_loss: float, total_bytes: int) -> float:
    """Total loss in nats over the text's UTF-8 length, in bits: comparable between tokenizers.

    Raises: ValueError if total_bytes < 1.
    """
    if total_bytes < 1:
        raise ValueError(f"bits_per_byte: total_bytes must be >= 1, got {total_bytes}")
    return total_loss / (math.log(2) * total_bytes)
