"""The attention model of routing solvers (Kool et al. 2019; Kwon et al. 2020): node encoder, decoding tables.

A decision's query is linear in what a partial route has been (its first and current node, a few numbers), so its
attention scores are sums of rows of tables that are made once per instance. A decoding step gathers rows instead of
projecting queries, and one product takes attention weights to logits: the values, the glimpse's projection and the
logit keys are multiplied out beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.networks.products import Linear, linear

Norm = Literal["instance", "batch"]

EPSILON = 1e-5


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normal = x - x.mean(1, keepdim=True)  # var_mean over a middle axis takes five times as long
        scale = (normal.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        normal.mul_(scale)
        ctx.save_for_backward(normal, scale, weight)
        return torch.addcmul(bias, normal, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        normal, scale, weight = ctx.saved_tensors
        product = grad * normal
        along = product.mean(1, keepdim=True)
        level = grad.mean(1, keepdim=True)
        inner = (grad - level).sub_(normal * along).mul_(scale * weight)
        return inner, along.sum((0, 1)) * grad.shape[1], level.sum((0, 1)) * grad.shape[1]


class InstanceNorm(nn.Module):
    """Each channel of an instance normalised over its nodes, then scaled and shifted (Ulyanov et al. 2016).

    ``[B, N, dim] -> [B, N, dim]``; differentiable once.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return _InstanceNorm.apply(x, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class BatchNorm(nn.BatchNorm1d):
    """Each channel normalised over all nodes of the batch; ``[B, N, dim] -> [B, N, dim]``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).view_as(input)


class EncoderLayer(nn.Module):
    """Self-attention of nodes and a feed-forward map, each with skip connection and norm (Kool et al. 2019, A.1)."""

    def __init__(self, dim: int, heads: int, hidden: int, norm: Norm) -> None:
        super().__init__()
        self.heads = heads
        make = InstanceNorm if norm == "instance" else BatchNorm
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.norm_attention = make(dim)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)
        self.norm_feed_forward = make(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, nodes, dim = x.shape
        q, k, v = self.qkv(x).view(batch, nodes, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, nodes, dim)
        x = self.norm_attention(x + self.out(mixed))
        return self.norm_feed_forward(x + self.down(F.relu(self.up(x))))


@dataclass
class DecoderTables:
    """What decoding needs of a batch of instances; H heads, N nodes, C context features.

    Attention scores are stored with heads and nodes in one axis ``[..., H * N]``, the scaling by ``sqrt(dim / H)`` in
    them. The scores of a decision are ``start`` before the first node, later ``last[current] + first[first node]``;
    ``fixed`` and ``context`` times the context features are added to both.

    Attributes:
        last: ``[B, N, H * N]``, of the current node.
        first: ``[B, N, H * N]``, of the route's first node; ``None`` where routes do not return to it.
        start: ``[B, H * N]``, before the first node; ``None`` where routes start at a depot.
        fixed: ``[B, H * N]``, of the whole instance; ``None`` without graph context.
        context: ``[B, C, H * N]``; ``None`` without context features.
        values: ``[B, H, N, dim / H]``.
        keys: ``[B, N, dim]``: logits are ``glimpse @ keys^T``, scaling by ``sqrt(dim)`` included.
    """

    last: Tensor
    first: Tensor | None
    start: Tensor | None
    fixed: Tensor | None
    context: Tensor | None
    values: Tensor
    keys: Tensor


class AttentionSolver(nn.Module):
    """Encoder and decoder parameters of AM and POMO. Decoding itself is :mod:`modules.routing.decoding`.

    Args:
        depot: whether node 0 is a depot, with an embedding of its own.
        customer_features, context_features: numbers beside coordinates and beside the current node.
        closed: whether decisions see the route's first node.
        dim: width d; heads: of attention, a divisor of ``dim``; layers: of the encoder; hidden: feed-forward width.
        norm: over an instance's nodes (POMO) or over the batch (AM).
        graph_context: whether the mean embedding is part of every query (AM).

    Raises:
        ValueError: a size below 1, or heads that do not divide ``dim``.
    """

    def __init__(
        self,
        depot: bool,
        customer_features: int,
        context_features: int,
        closed: bool,
        dim: int = 128,
        heads: int = 8,
        layers: int = 6,
        hidden: int = 512,
        norm: Norm = "instance",
        graph_context: bool = False,
    ) -> None:
        super().__init__()
        for key, value in (("dim", dim), ("heads", heads), ("layers", layers), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"AttentionSolver: {key} must be >= 1, got {value}")
        if dim % heads:
            raise ValueError(f"AttentionSolver: heads must divide dim {dim}, got {heads}")
        if norm not in ("instance", "batch"):
            raise ValueError(f"AttentionSolver: norm must be instance or batch, got {norm!r}")
        self.heads, self.depot, self.closed = heads, depot, closed
        self.embed = Linear(2 + customer_features, dim)
        self.embed_depot = Linear(2, dim) if depot else None
        self.layers = nn.ModuleList([EncoderLayer(dim, heads, hidden, norm) for _ in range(layers)])
        self.keys = Linear(dim, dim, bias=False)
        self.values = Linear(dim, dim, bias=False)
        self.logit_keys = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)  # of the glimpse
        self.query_last = Linear(dim, dim, bias=False)
        self.query_first = Linear(dim, dim, bias=False) if closed else None
        self.query_start = nn.Parameter(torch.empty(dim).uniform_(-1, 1)) if closed else None
        self.query_graph = Linear(dim, dim, bias=False) if graph_context else None
        self.query_context = nn.Parameter(torch.empty(context_features, dim)) if context_features else None
        if self.query_context is not None:
            bound = (dim + context_features) ** -0.5  # of one map that takes node and context together
            nn.init.uniform_(self.query_context, -bound, bound)

    def encode(self, locs: Tensor, features: Tensor) -> Tensor:
        """Embeddings ``[B, N, dim]`` of coordinates ``[B, N, 2]`` and customers' features ``[B, customers, F]``."""
        customers = locs[:, 1:] if self.embed_depot is not None else locs
        x = self.embed(torch.cat([customers, features], -1) if features.shape[-1] else customers)
        if self.embed_depot is not None:
            x = torch.cat([self.embed_depot(locs[:, :1]), x], 1)
        for layer in self.layers:
            x = layer(x)
        return x

    def tables(self, nodes: Tensor) -> DecoderTables:
        """Decoding tables of embeddings ``[B, N, dim]``."""
        batch, count, dim = nodes.shape
        heads, width = self.heads, dim // self.heads

        def split(x: Tensor) -> Tensor:  # [B, M, dim] -> [B, H, M, width]
            return x.view(batch, -1, heads, width).transpose(1, 2)

        keys = split(self.keys(nodes)).transpose(2, 3) * width**-0.5  # [B, H, width, N]

        def scores(query: Tensor) -> Tensor:  # [B, M, dim] -> [B, M, H * N]
            return (split(query) @ keys).transpose(1, 2).reshape(batch, -1, heads * count)

        context = None
        if self.query_context is not None:
            context = scores(self.query_context.expand(batch, -1, -1))
        # logits = (out(glimpse)) . logit_key = glimpse . (logit_key @ out.weight)
        logit_keys = linear(self.logit_keys(nodes), self.out.weight.t()) * dim**-0.5
        return DecoderTables(
            last=scores(self.query_last(nodes)),
            first=None if self.query_first is None else scores(self.query_first(nodes)),
            start=None if self.query_start is None else scores(self.query_start.expand(batch, 1, -1)).squeeze(1),
            fixed=None
            if self.query_graph is None
            else scores(self.query_graph(nodes.mean(1, keepdim=True))).squeeze(1),
            context=context,
            values=split(self.values(nodes)),
            keys=logit_keys,
        )
