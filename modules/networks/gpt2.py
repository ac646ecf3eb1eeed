"""GPT-2 decoder (Radford et al. 2019): learned positions, LayerNorm before each branch, tanh-approximated GELU.

Parameters carry Hugging Face's names, but linear maps are `nn.Linear`s (weight [out, in]), so that adapters
and quantisation act on them as on any other model; Hugging Face stores the transposed matrix (`Conv1D`), and
`to_hf_weights`, `from_hf_weights` turn one into the other. There is no dropout.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.networks.causal_lm import AttentionPlan, CausalLM, attend
from modules.networks.kv_cache import KVCache
from modules.networks.products import Linear

_ALIASES = {  # transformers takes either name
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
_KEPT_KEYS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "task_specific_params")
_OTHER_KEYS = (
    *("architectures", "model_type", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_cache", "dtype"),
    *("reorder_and_upcast_attn", "add_cross_attention", "torch_dtype", "transformers_version", "summary_type"),
    *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)
_MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2's sizes, under the names of its `config.json`. `n_inner=None` means 4 n_embd.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, an unknown activation.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPT2Config: {name} must be an integer >= 1, got {value!r}")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"GPT2Config: n_inner must be >= 1, got {self.n_inner}")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPT2Config: n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.activation_function not in _ACTIVATIONS:
            raise ValueError(
                f"GPT2Config: activation_function {self.activation_function!r} is not supported; supported: "
                f"{', '.join(_ACTIVATIONS)}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.n_embd

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner or 4 * self.n_embd

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, in tokens."""
        return self.n_positions

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """Number of heads."""
        return self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_head

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @classmethod
    def from_hf(cls, values: dict[str, Any], *, strict: bool = False) -> GPT2Config:
        """Read a `config.json` dictionary; `n_embd` or `hidden_size` and so on, as transformers.

        Other keys of a checkpoint's file are ignored; `strict`, for a dictionary that a person wrote, refuses them.

        Raises:
            ValueError: another architecture, a variant of attention we do not have, or (strict) an unknown key.
        """
        if values.get("model_type") != "gpt2":
            raise ValueError(f"GPT2Config: model_type {values.get('model_type')!r} is not gpt2")
        known_keys = [name for name in cls.__dataclass_fields__ if name != "extra"] + list(_ALIASES)
        unknown = [key for key in values if key not in (*known_keys, *_KEPT_KEYS, *_OTHER_KEYS)]
        if strict and unknown:
            near = difflib.get_close_matches(unknown[0], known_keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"GPT2Config: unknown key {unknown[0]!r}{hint}")
        for key, plain in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True),
                           ("add_cross_attention", False)):  # fmt: skip
            if values.get(key, plain) is not plain:
                raise ValueError(f"GPT2Config: {key} {values[key]} is not supported; only {plain} is")
        known = {_ALIASES.get(key, key): values[key] for key in known_keys if values.get(key) is not None}
        return cls(**known, extra={key: values[key] for key in _KEPT_KEYS if key in values})

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` dictionary."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **own, **self.extra}


class GPT2Attention(nn.Module):
    """Causal self-attention; query, key and value come from one matrix."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads, self.width = config.n_head, config.head_size
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, _ = x.shape
        states = self.c_attn(x).view(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        if cache is None:
            query, key, value = states.unbind(0)
        else:
            query = states[0]
            key, value = cache.write_pair(layer, states[1:])
        return self.c_proj(attend(query, key, value, plan).reshape(batch, length, -1).to(states.dtype))


class GPT2MLP(nn.Module):
    """Feed-forward layer."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.intermediate_size)
        self.c_proj = Linear(config.intermediate_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, plan: AttentionPlan, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), plan, cache, self.index)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Embeddings, decoder layers, final norm (the part Hugging Face keeps under `transformer.`)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT2(CausalLM):
    """Causal language model with the function of transformers' GPT2LMHeadModel in evaluation mode.

    Args:
        config: sizes.
        activation_checkpointing: keep each layer's input only and recompute the layer in the backward pass.

    Initialisation is Hugging Face's: N(0, initializer_range^2), the projections that write to the residual stream with
    1/sqrt(2 n_layer) of that deviation (Radford et al. 2019, section 2.3), biases 0.
    """

    config: GPT2Config
    linear_names = ("c_attn", "c_proj", "c_fc")
    embedding_name = "transformer.wte"

    def __init__(self, config: GPT2Config, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @torch.no_grad()
    def reset_parameters(self) -> None:
        deviation = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter.normal_(0.0, deviation * scale)

    def to_hf_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.t() if name.endswith(_MATRICES) else tensor for name, tensor in weights.items()}

    def from_hf_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {}
        for name, tensor in weights.items():
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # old files hold the causal mask
                continue
            if not name.startswith(("transformer.", "lm_head.")):  # files of the bare GPT2Model
                name = f"transformer.{name}"
            own[name] = tensor.t().contiguous() if name.endswith(_MATRICES) and tensor.ndim == 2 else tensor
        return own

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
        """See `CausalLM.forward`. Raises also: ValueError for more tokens than n_positions."""
        length, limit = input_ids.shape[1], self.config.n_positions
        plan = self._plan(input_ids, position_ids, document_ids, attention_mask, attention_pattern, cache)
        model, positions = self.transformer, plan.positions
        if positions is None:
            if length > limit:
                raise ValueError(f"GPT2: {length} tokens exceed n_positions {limit}; shorten the sequence")
            place = model.wpe.weight[:length]
        else:
            if cache is not None and cache.extent + length > limit:
                # rows that have used up their positions may still be in a batch whose others have not
                positions = positions.clamp(max=limit - 1)
            place = model.wpe(positions)
        x = model.wte(input_ids) + place
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block in model.h:
            x = checkpoint(block, x, plan, use_reentrant=False) if recompute else block(x, plan, cache)
        if cache is not None:
            cache.advance(length)
        return model.ln_f(x)
