"""Operations of the Llama decoder whose backward pass is written by hand, because autograd's costs more than the
arithmetic.

On a CPU a training step of a small decoder spends about half its time outside matrix products: temporaries, casts, and
the page faults they cause. Each function here touches its data as few times as it can, keeps one copy for the backward
pass, and returns the activation in the dtype the next matrix product wants, so that autocast casts it once and not once
per consumer.

All are exact (no approximation), differentiable once, and have a plain-PyTorch twin in the tests. Under `torch.compile`
the callers use the plain forms (`modules.networks.llama`), which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.networks.products import linear, prefers_onednn, product

# Query rows handled at once by `causal_attention`: large enough for efficient products, small enough that a block of
# scores [heads, rows, T] stays in cache and that little is computed above the diagonal.
QUERY_BLOCK = 128


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of `x` run in: autocast's where it is on, else the tensor's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    """y = x * rsqrt(mean(x^2) + eps) * weight, optionally of x := residual + branch, which is returned too."""

    @staticmethod
    def forward(ctx, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype):
        x = residual if branch is None else residual + branch
        wide = x.to(_statistics_dtype(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        y = (wide * rstd).mul_(weight).to(out_dtype)
        ctx.save_for_backward(x, rstd, weight)
        ctx.branch_dtype = None if branch is None else branch.dtype
        return x if branch is not None else None, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor | None, grad_y: Tensor):
        x, rstd, weight = ctx.saved_tensors
        width = x.shape[-1]
        wide = x.to(rstd.dtype).view(-1, width)
        grad = grad_y.to(rstd.dtype).view(-1, width)
        weight_wide = weight.to(rstd.dtype)
        inverse = rstd.view(-1, 1)
        product = grad * wide
        # d rstd / dx contributes -x rstd^3 / D * sum_d(g w x); both sums are matrix-vector products of one temporary.
        coefficient = (product @ weight_wide).unsqueeze_(1).mul_(inverse.pow(3)).mul_(-1.0 / width)
        grad_weight = (inverse.t() @ product).squeeze(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_input = torch.mul(grad, weight_wide, out=product).mul_(inverse).addcmul_(wide, coefficient)
        if grad_x is not None:
            grad_input.add_(grad_x.view(-1, width))
        grad_input = grad_input.view(x.shape)
        grad_branch = None if ctx.branch_dtype is None else grad_input.to(ctx.branch_dtype)
        return grad_input.to(x.dtype), grad_branch, grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019). x [..., D], weight [D] -> [..., D] in the matrix-product dtype."""
    if not torch.is_grad_enabled():
        return _norm_only(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps, compute_dtype(x))[1]


def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + branch, rms_norm(residual + branch)): one backward pass for the sum and the norm. Shapes [..., D]."""
    if not torch.is_grad_enabled():
        total = residual + branch
        return total, _norm_only(total, weight, eps)
    return _RMSNorm.apply(residual, branch, weight, eps, compute_dtype(residual))


def _norm_only(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Decoding is a row of tiny operations: an autograd.Function would cost more than its arithmetic.
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(compute_dtype(x))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); keeps its two inputs only and recomputes silu in the backward pass. [..., F]."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return _SwiGLU.apply(gate, up)


class _ParallelLinear(torch.autograd.Function):
    """Several bias-free linear maps of one input; their input gradients accumulate inside the matrix products."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, *weights: Tensor):
        flat = x.to(dtype).view(-1, x.shape[-1])
        cast = [weight.to(dtype) for weight in weights]
        ctx.save_for_backward(flat, *cast)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        return tuple(product(flat, weight).view(*x.shape[:-1], -1) for weight in cast)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        flat, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            apart = rows[0].dtype == torch.float32 and prefers_onednn()  # it cannot add in the same call
            grad_x = product(rows[0], weights[0].t())
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                grad_x = grad_x.add_(product(grad, weight.t())) if apart else grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        grad_weights = [
            product(grad.t(), flat.t()).to(dtype) if needed else None
            for grad, dtype, needed in zip(rows, ctx.weight_dtypes, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad_x, None, *grad_weights


def parallel_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """[x @ w.T for w in weights]; x [..., D], each w [out, D]. Autocast is honoured."""
    if not torch.is_grad_enabled():
        return tuple(linear(x, weight) for weight in weights)
    return _ParallelLinear.apply(x, compute_dtype(x), *weights)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, a new tensor. x [..., D]; cos, sin [..., D/2] broadcastable."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return rotate(x.transpose(1, 2), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin).transpose(1, 2).to(ctx.dtype), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face's Llama.

    Args: x [B, T, H, D]; cos, sin [T, D/2] or [B, 1, T, D/2], which hold no gradient.
    Returns: [B, H, T, D], contiguous, in the wider of both dtypes.
    """
    if not torch.is_grad_enabled():
        return rotate(x.transpose(1, 2), cos, sin)
    return _Rotary.apply(x, cos, sin)


def _blocks(length: int, documents: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first key) of each block of query rows; documents [sequences, T]."""
    for start in range(0, length, QUERY_BLOCK):
        first_key = 0
        if documents is not None:
            # A document is one run, so keys before the run of a block's first query are masked for the whole block.
            first_key = int((documents[:, :start] != documents[:, start : start + 1]).sum(1).min())
        yield start, min(start + QUERY_BLOCK, length), first_key


def _weights(query: Tensor, key: Tensor, rows: int, first_key: int, future: Tensor, documents: Tensor | None) -> Tensor:
    """Attention weights [sequences*KV, group*rows, keys] of one query block.

    query [sequences*KV, group*rows, D], key [sequences*KV, keys, D], documents [sequences, T].
    """
    scores = torch.bmm(query, key.transpose(1, 2))
    batch, _, keys = scores.shape
    # Only the last `rows` keys can lie in a query's future.
    scores.view(batch, -1, rows, keys)[..., keys - rows :].add_(future[:rows, :rows])
    if documents is not None:
        window = documents[:, None, first_key : first_key + keys]
        other = window[:, :, keys - rows :].transpose(1, 2) != window
        scores.view(len(documents), -1, rows, keys).masked_fill_(other[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    """Softmax attention by blocks of query rows; the backward pass recomputes each block, so memory is linear in T.

    As many sequences as there are threads are handled together: one keeps a thread's cache, more would leave it.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        dtype = _statistics_dtype(query.dtype)
        ctx.save_for_backward(query, key, value, documents)
        ctx.scale = scale
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=dtype, device=query.device).triu_(1)
        out = torch.empty(batch, length, heads, width, dtype=value.dtype, device=query.device)
        for part in _parts(batch):
            q, k, v = (states[part].to(dtype).flatten(0, 1) for states in (query, key, value))
            q = q * scale
            runs = None if documents is None else documents[part]
            for start, stop, first in _blocks(length, runs):
                rows = q[:, start:stop].reshape(len(k), -1, width)
                weights = _weights(rows, k[:, first:stop], stop - start, first, future, runs)
                block = torch.bmm(weights, v[:, first:stop])
                out[part, start:stop].copy_(block.view(-1, heads, stop - start, width).transpose(1, 2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        query, key, value, documents = ctx.saved_tensors
        batch, heads, length, width = query.shape
        dtype = _statistics_dtype(query.dtype)
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=dtype, device=query.device).triu_(1)
        grads = [torch.empty(states.shape, dtype=states.dtype, device=states.device) for states in (query, key, value)]
        for part in _parts(batch):
            q, k, v = (states[part].to(dtype).flatten(0, 1) for states in (query, key, value))
            q = q * ctx.scale
            upstream = grad_out[part].transpose(1, 2).to(dtype).reshape(q.shape)
            dk, dv = (torch.zeros(k.shape, dtype=dtype, device=k.device) for _ in range(2))
            runs = None if documents is None else documents[part]
            for start, stop, first in _blocks(length, runs):
                rows, grad = (states[:, start:stop].reshape(len(k), -1, width) for states in (q, upstream))
                keys = k[:, first:stop]
                weights = _weights(rows, keys, stop - start, first, future, runs)
                dv[:, first:stop].baddbmm_(weights.transpose(1, 2), grad)
                grad_weights = torch.bmm(grad, v[:, first:stop].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, dtype)
                dq = torch.bmm(grad_scores, keys).mul_(ctx.scale)
                grads[0][part, :, start:stop].copy_(dq.view(-1, heads, stop - start, width))
                dk[:, first:stop].baddbmm_(grad_scores.transpose(1, 2), rows)
            grads[1][part].copy_(dk.view(-1, *key.shape[1:]))
            grads[2][part].copy_(dv.view(-1, *value.shape[1:]))
        return *grads, None, None


def _parts(batch: int) -> list[slice]:
    size = min(batch, torch.get_num_threads())
    return [slice(start, start + size) for start in range(0, batch, size)]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None = None
) -> Tensor:
    """Exact causal attention for CPUs, grouped-query included; products and softmax in fp32 (fp64 for fp64 input).

    Args: query [B, H, T, D]; key, value [B, KV, T, D], H a multiple of KV; scale multiplies the scores; documents,
        optional, int [B, T]: positions attend only inside their own document, and a document is one contiguous run.
    Returns: [B, T, H, D] contiguous, in value's dtype.
    """
    return _CausalAttention.apply(query, key, value, scale, documents)
