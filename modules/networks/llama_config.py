"""Shape and rotary settings of a Llama-family decoder, read from and written as a Hugging Face `config.json`."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUPPORTED = "model_type llama, mistral or qwen2; hidden_act silu; rope type default, linear, dynamic, llama3 or yarn"
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_ARCHITECTURE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_OTHER_KEYS = (
    *("architectures", "hidden_act", "rope_parameters", "use_sliding_window", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "use_cache", "dtype", "torch_dtype", "transformers_version"),
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LlamaConfig:
    """Llama decoder: pre-norm, RMSNorm, SwiGLU, rotary positions, grouped-query attention.

    Field names are Hugging Face's. `head_dim=None` means hidden_size / num_attention_heads; `num_key_value_heads=None`
    means multi-head attention. `rope_scaling` holds the rope type's own keys (`rope_type`, `factor`, ...) or None for
    the default. `sliding_window` is accepted as a limit on the sequence length: longer input is refused, not windowed.
    `attention_bias` puts biases on q, k, v; `attention_output_bias` on o (llama ties the two, qwen2 has the first
    only).

    Raises:
        ValueError: a size below 1, heads that do not divide, an odd head_dim, an unknown model or rope type.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LlamaConfig: {name} must be an integer >= 1, got {value!r}")
        if self.model_type not in _ARCHITECTURE:
            raise ValueError(f"LlamaConfig: model_type {self.model_type!r} is not supported; supported: {SUPPORTED}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"LlamaConfig: hidden_size must be a multiple of num_attention_heads unless head_dim is given, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"LlamaConfig: head_dim must be even for rotary positions, got {self.head_size}")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(f"LlamaConfig: rope_theta must be a finite number > 0, got {self.rope_theta}")
        missing = [key for key in _ROPE_KEYS.get(self.rope_type, ()) if key not in (self.rope_scaling or {})]
        if self.rope_type not in _ROPE_KEYS or missing:
            problem = f"lacks {', '.join(missing)}" if missing else "is not supported"
            raise ValueError(f"LlamaConfig: rope type {self.rope_type!r} {problem}; supported: {SUPPORTED}")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_type(self) -> str:
        """`default`, `linear`, `dynamic`, `llama3` or `yarn`."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @classmethod
    def from_hf(cls, values: dict[str, Any], *, strict: bool = False) -> LlamaConfig:
        """Read a `config.json` dictionary, with `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling` (4).

        A checkpoint's file holds many keys that do not concern the decoder; they are ignored. `strict`, for a
        dictionary that a person wrote, refuses them instead.

        Raises:
            ValueError: an unsupported architecture, a required key is missing, or (strict) a key is unknown.
        """
        unknown = [key for key in values if key not in cls.__dataclass_fields__ and key not in _OTHER_KEYS]
        if strict and unknown:
            near = difflib.get_close_matches(unknown[0], list(cls.__dataclass_fields__), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"LlamaConfig: unknown key {unknown[0]!r}{hint}")
        kind = values.get("model_type")
        if kind not in _ARCHITECTURE:
            raise ValueError(f"LlamaConfig: model_type {kind!r} is not supported; supported: {SUPPORTED}")
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"LlamaConfig: config.json lacks {', '.join(missing)}; is it a causal language model's?")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"LlamaConfig: hidden_act {values['hidden_act']!r} is not supported; supported: {SUPPORTED}"
            )
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta, outer = rope.pop("rope_theta", None), values.get("rope_theta")
        if theta is not None and outer is not None and float(theta) != float(outer):
            raise ValueError(f"LlamaConfig: rope_theta is {outer} but rope_parameters.rope_theta is {theta}; keep one")
        theta = next((float(base) for base in (theta, outer) if base is not None), 1e4)
        kept = {"default": None}.get(str(rope.get("rope_type", rope.get("type", "default"))), rope)
        bias = bool(values.get("attention_bias", False)) or kind == "qwen2"
        windowed = kind == "mistral" or (kind == "qwen2" and values.get("use_sliding_window", False))
        known = {
            name: values[name]
            for name in cls.__dataclass_fields__
            if values.get(name) is not None and name not in ("rope_scaling", "rope_theta", "sliding_window", "extra")
        }
        known.setdefault("rms_norm_eps", 1e-6)  # Hugging Face's default where the file is silent
        known.setdefault("max_position_embeddings", {"llama": 2048, "mistral": 131072, "qwen2": 32768}[kind])
        known.update(
            attention_bias=bias,
            attention_output_bias=bool(values.get("attention_bias", False)) and kind == "llama",
            rope_theta=theta,
            rope_scaling=kept,
            sliding_window=values.get("sliding_window") if windowed else None,
        )
        kept_keys = ("initializer_range", "pretraining_tp", "attention_dropout")
        return cls(**known, extra={key: values[key] for key in kept_keys if key in values})

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` dictionary for transformers 5; `rope_theta` is repeated at the top level for 4."""
        rope = {"rope_theta": self.rope_theta, "rope_type": self.rope_type}
        rope.update({key: value for key, value in (self.rope_scaling or {}).items() if key != "type"})
        values: dict[str, Any] = {
            "architectures": [_ARCHITECTURE[self.model_type]],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _REQUIRED},
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            **self.extra,
        }
        if self.rope_scaling is not None:
            values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if self.model_type == "llama":
            values["attention_bias"], values["mlp_bias"] = self.attention_bias, self.mlp_bias
        elif self.model_type == "mistral":
            values["sliding_window"] = self.sliding_window
        else:
            values["use_sliding_window"] = self.sliding_window is not None
            values["sliding_window"] = self.sliding_window
        return values


def _inverse_frequencies(width: int, theta: float) -> Tensor:
    # fp32 throughout, as Hugging Face: at position 4096 a float64 frequency would differ by 1e-4 rad and show in the
    # logits.
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))


def rope_frequencies(config: LlamaConfig, length: int) -> tuple[Tensor, float]:
    """Angles per position and the factor on cos and sin, for a sequence of `length` positions.

    Types: default theta^(-2i/d) (Su et al. 2021); linear (positions / factor); dynamic NTK (base grows with `length`
    beyond max_position_embeddings); llama3 (Llama 3.1: long wavelengths divided by factor, smooth in between); yarn
    (Peng et al. 2023).

    Returns: inverse frequencies fp32 [head_dim / 2], factor.
    """
    width, theta, kind = config.head_size, config.rope_theta, config.rope_type
    scaling = config.rope_scaling or {}
    if kind == "default":
        return _inverse_frequencies(width, theta), 1.0
    factor = float(scaling["factor"])
    if kind == "linear":
        return _inverse_frequencies(width, theta) / factor, 1.0
    original = int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1)
        return _inverse_frequencies(width, theta * stretch ** (width / (width - 2))), 1.0
    plain = _inverse_frequencies(width, theta)
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = original * plain / (2 * math.pi)  # rotations over the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * plain / factor + blend * plain, 1.0
    return _yarn(config, scaling, plain, factor, original)


def _yarn(
    config: LlamaConfig, scaling: dict[str, Any], plain: Tensor, factor: float, original: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, 3.2-3.4): interpolate low frequencies, keep high ones, ramp between."""
    width, theta = config.head_size, config.rope_theta

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if numerator and denominator:
            attention_factor = temperature(float(numerator)) / temperature(float(denominator))
        else:
            attention_factor = temperature(1.0)
    return plain / factor * ramp + plain * (1 - ramp), float(attention_factor)
