"""Optimisers by name, with weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modules.optional import require

# name -> class in bitsandbytes.optim; the paged ones keep their state in memory that may be swapped out of the GPU
_BITSANDBYTES = {
    "adamw32bit": "AdamW32bit",
    "adamw8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
    "paged_lion8bit": "PagedLion8bit",
}
OPTIMIZERS = ("adamw", *_BITSANDBYTES)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with decay, norms and biases (fewer than two dimensions) without, as in GPT-NeoX.

    Frozen parameters are left out. A tied matrix appears once. An empty group is left out.
    """
    trainable = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) of torch, or a bitsandbytes optimiser (Dettmers et al. 2022).

    Args:
        model: its trainable parameters, in two groups (`decay_groups`).
        name: one of `OPTIMIZERS`. The 8-bit ones keep tensors below 4,096 elements in 32 bits. Lion has no eps, and
            wants a learning rate 3 to 10 times lower.
        fused: torch's one-kernel AdamW; None = where the parameters' device has it.

    Raises:
        ValueError: unknown name, nothing to train, lr, eps or weight_decay out of range.
        ImportError: bitsandbytes is needed and absent.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"build_optimizer: unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    if not lr > 0 or not eps > 0 or weight_decay < 0:
        raise ValueError(f"build_optimizer: want lr > 0, eps > 0, weight_decay >= 0, got {lr}, {eps}, {weight_decay}")
    groups = decay_groups(model.parameters(), weight_decay)
    if not groups:
        raise ValueError("build_optimizer: the model has no trainable parameter")
    if name == "adamw":
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = devices <= {"cpu", "cuda"} if fused is None else fused
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
    optimizers = require("bitsandbytes.optim", extra="llemma")
    options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if "lion" not in name:
        options["eps"] = eps
    return getattr(optimizers, _BITSANDBYTES[name])(groups, **options)
