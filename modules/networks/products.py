"""Matrix products on a CPU by the library that is fastest there, and linear maps on top of them.

torch gives fp32 products to MKL, which on AMD's processors runs at half of oneDNN's speed (measured on one core of an
EPYC with AVX-512: 1.5 to 2.5 times, from 64 rows or 128 columns on). Which library is taken depends on the processor
alone, so that a run that is resumed on the same machine computes the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SMALLEST = 1 << 16
"""Multiplications below which calling oneDNN costs more than it saves."""


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether fp32 products go to oneDNN: an AMD processor, and a torch that has the operation."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return False


def _onednn_serves(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[0] * left.shape[1] * right.shape[0] >= _SMALLEST
        and not torch.compiler.is_compiling()
        and prefers_onednn()
    )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias`` ``[N, M]`` of ``left`` ``[N, K]``, ``right`` ``[M, K]``, ``bias`` ``[M]``.

    No gradient is recorded: for use inside autograd functions, or where none is wanted.
    """
    if _onednn_serves(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return F.linear(left, right, bias)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place; ``total`` may have a wider dtype than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, differentiable once. x ``[..., K]``, weight ``[M, K]``, bias ``[M]``."""
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type) or not _onednn_serves(flat, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(flat, weight, bias).view(*x.shape[:-1], -1)
    return product(flat, weight, bias).view(*x.shape[:-1], -1)


_LARGE_OUTPUT = {False: 8192, True: 32768}
"""Elements from which a fused tanh saves time, without gradients and with: torch's own tanh takes 2 ns an element on a
CPU, more than the product, but a call of oneDNN and one of a Python function are dear."""


class _LinearTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "tanh", [], "")
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, out = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad * (1.0 - out * out)
        return (
            product(grad, weight) if needs_x else None,
            product(x.t(), grad.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def fuses_tanh(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear_tanh` serves ``x`` ``[rows, in]`` and ``weight`` ``[in, out]``, and is faster."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] * weight.shape[1] >= _LARGE_OUTPUT[torch.is_grad_enabled()]
        and not torch.compiler.is_compiling()
        and prefers_onednn()
    )


def linear_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``tanh(x @ weight + bias)`` in one pass, differentiable once; only where :func:`fuses_tanh` holds."""
    if torch.is_grad_enabled():
        return _LinearTanh.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "tanh", [], "")


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose product is :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """True if this is an ordinary linear map whose weight may be used directly: no adapter, no hook."""
    return type(module) in (nn.Linear, Linear) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
