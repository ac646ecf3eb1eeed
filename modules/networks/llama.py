"""Llama decoder (Touvron et al. 2023) whose parameters carry Hugging Face's names, so that checkpoints load without
conversion.

The forward pass returns hidden states; logits are a separate call, because the loss (`modules.objectives.lm`) never
needs them all at once. On CPU the operations of `modules.networks.fused` are used; elsewhere and under `torch.compile`,
plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.networks import fused
from modules.networks.causal_lm import AttentionPlan, CausalLM, attend, document_positions, use_fused
from modules.networks.kv_cache import KVCache
from modules.networks.llama_config import LlamaConfig, rope_frequencies
from modules.networks.products import Linear, is_plain

__all__ = ["KVCache", "Llama", "LlamaConfig", "document_positions"]


def _project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    if use_fused(x) and all(is_plain(linear) and linear.bias is None for linear in linears):
        return fused.parallel_linear(x, *(linear.weight for linear in linears))  # type: ignore[arg-type]
    return tuple(linear(x) for linear in linears)


class LlamaRMSNorm(nn.Module):
    """RMSNorm; calling it normalises, `add` normalises a sum and returns the sum as well."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if use_fused(x):
            if branch is None:
                return fused.rms_norm(x, self.weight, self.eps)
            return fused.add_rms_norm(x, branch, self.weight, self.eps)
        if branch is not None:
            x = x + branch
        y = F.rms_norm(x.float() if x.dtype != torch.float64 else x, self.weight.shape, None, self.eps).to(x.dtype)
        y = self.weight * y
        return y if branch is None else (x, y)


class LlamaAttention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads, config.head_size
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(hidden, self.heads * self.width, bias=bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.o_proj = Linear(self.heads * self.width, hidden, bias=config.attention_output_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None, layer: int
    ) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = _project(x, self.q_proj, self.k_proj, self.v_proj)
        query = query.view(batch, length, self.heads, self.width)
        key = key.view(batch, length, self.kv_heads, self.width)
        value = value.view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        dtype = value.dtype
        if use_fused(x):
            query, key = fused.rotary(query, *rope), fused.rotary(key, *rope)
        else:
            query, key = (rotated(states.transpose(1, 2), *rope).to(dtype) for states in (query, key))
        if cache is not None:
            key, value = cache.write(layer, key, value)
        out = attend(query, key, value, plan)
        return self.o_proj(out.reshape(batch, length, -1).to(dtype))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied: x [B, heads, T, D], cos and sin [T, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class LlamaMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = _project(x, self.gate_proj, self.up_proj)
        return self.down_proj(fused.swiglu(gate, up) if use_fused(x) else F.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None = None
    ) -> Tensor:
        branch = self.self_attn(self.input_layernorm(x), rope, plan, cache, self.index)
        x, normed = self.post_attention_layernorm(x, branch)
        return x + self.mlp(normed)


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm (the part Hugging Face keeps under `model.`)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(CausalLM):
    """Causal language model. `state_dict()` has the keys and shapes of transformers' LlamaForCausalLM.

    Args:
        config: shapes and rotary settings.
        activation_checkpointing: keep each layer's input only and recompute the layer in the backward pass.

    Initialisation is GPT-NeoX's, as Llemma's code base: N(0, 2/(5d)) ("small init", Nguyen & Salazar 2019) for matrices
    that read the residual stream, N(0, (2/(L sqrt d))^2) (Wang & Komatsuzaki's) for those that write it. The output
    head (the shared matrix, if tied) has half the small-init deviation, so that the initial loss is ln V + 0.05
    whatever the width.
    """

    config: LlamaConfig
    linear_names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    embedding_name = "model.embed_tokens"

    def __init__(self, config: LlamaConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def from_hf_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width, layers = self.config.hidden_size, self.config.num_hidden_layers
        small, output = math.sqrt(2 / (5 * width)), 2 / (layers * math.sqrt(width))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, output if name.endswith(("o_proj.weight", "down_proj.weight")) else small)
        self.lm_head.weight.normal_(0.0, small / 2)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_pattern: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See `CausalLM.forward`."""
        length, window = input_ids.shape[1], self.config.sliding_window
        # slots are no positions once rows differ in length: who decodes watches the limit (`context_limit`)
        total = length if cache is None or not cache.extent else 1
        if window is not None and total > window and attention_pattern is None:
            raise ValueError(f"Llama: {total} tokens exceed sliding_window {window}; shorten the sequence")
        plan = self._plan(input_ids, position_ids, document_ids, attention_mask, attention_pattern, cache)
        x = self.model.embed_tokens(input_ids)
        rope = self._rope(length, plan.positions, x) if cache is None else self._cached_rope(length, plan, x, cache)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for layer in self.model.layers:
            x = checkpoint(layer, x, rope, plan, use_reentrant=False) if recompute else layer(x, rope, plan, cache)
        if cache is not None:
            cache.advance(length)
        return self.model.norm(x)

    def _rope(self, length: int, positions: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: [T, d/2], or [B, 1, T, d/2] where positions differ by row."""
        frequencies, factor = rope_frequencies(self.config, length)
        frequencies = frequencies.to(x.device)
        if positions is None:
            angles = torch.arange(length, device=x.device).float()[:, None] * frequencies
        else:
            angles = positions.float()[:, None, :, None] * frequencies
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _cached_rope(self, length: int, plan: AttentionPlan, x: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """As `_rope`, from a table that the cache keeps: a step looks two rows up."""
        if cache.rotary is None:
            cache.rotary = self._rope(cache.capacity, None, x)
        cos, sin = cache.rotary
        if plan.positions is None:
            return cos[:length], sin[:length]
        return cos[plan.positions].unsqueeze(1), sin[plan.positions].unsqueeze(1)
