"""What a config says about a language model: where the weights come from, and what of them is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from modules.language.adapters import add_lora, quantize
from modules.language.checkpoint import build_causal_lm, load_causal_lm, load_llama
from modules.networks.causal_lm import CausalLM

Tuning = Literal["full", "lora", "qlora", "int8"]
TUNINGS = ("full", "lora", "qlora", "int8")


@dataclass
class ModelSpec:
    """Where the weights come from: exactly one of ``path`` and ``config``.

    Args:
        path: Hugging Face checkpoint directory (``config.json``, safetensors, tokenizer).
        config: shape of a fresh model, as in a Hugging Face ``config.json``; ``vocab_size`` may be left out and is then
            the data's.
    """

    path: str | None = None
    config: dict[str, Any] | None = None

    def check(self, owner: str) -> None:
        """Raise ValueError unless exactly one of the two is given."""
        if (self.path is None) == (self.config is None):
            raise ValueError(f"{owner}: model needs exactly one of path and config")


@dataclass
class LoraSpec:
    """Low-rank adapters (Hu et al. 2022), for every ``tuning`` but ``full``.

    Args:
        r: rank.
        alpha: scale; adapters add ``alpha / r * B A x``.
        dropout: on the adapter's input.
        targets: names of the linear layers that get one; ``null``: all of the decoder layers.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None


def build_network(
    model: ModelSpec,
    tuning: Tuning,
    lora: LoraSpec,
    tokenizer: Any,
    *,
    owner: str,
    rope_theta: float | None = None,
    activation_checkpointing: bool = False,
) -> CausalLM:
    """Load or make a causal language model and prepare it for training; on the CPU, in training mode.

    A fresh model's weights depend on the run's seed alone, whatever drew from the generator before.

    Args:
        tuning: all weights, LoRA adapters, or adapters on a frozen 4-bit NF4 (QLoRA) or 8-bit base.
        tokenizer: the data's (``hash``, ``vocab_size``), or None: nothing to check.
        owner: who asks, for messages.
        rope_theta: RoPE base to go on with (Llama family); None keeps the checkpoint's or the config's.
        activation_checkpointing: recompute each layer in the backward pass.

    Raises:
        FileNotFoundError, ValueError, TokenizerMismatchError: see :mod:`modules.language.checkpoint`; a vocabulary that
            is missing or too small; an unknown tuning.
    """
    if tuning not in TUNINGS:
        raise ValueError(f"{owner}: tuning must be one of {', '.join(TUNINGS)}, got {tuning!r}")
    model.check(owner)
    if model.path is not None:
        expected = None if tokenizer is None else tokenizer.hash
        common: dict[str, Any] = {"tokenizer_hash": expected, "activation_checkpointing": activation_checkpointing}
        if rope_theta is None:
            network = load_causal_lm(model.path, **common)
        else:
            network = load_llama(model.path, rope_theta=rope_theta, **common).model
    else:
        values = dict(model.config or {})
        if "vocab_size" not in values:
            if tokenizer is None:
                raise ValueError(f"{owner}: model.config has no vocab_size and the data brings no tokenizer")
            values["vocab_size"] = tokenizer.vocab_size
        if rope_theta is not None:
            values["rope_theta"] = rope_theta
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            network = build_causal_lm(values, activation_checkpointing=activation_checkpointing)
    vocabulary = network.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"{owner}: the tokenizer has {tokenizer.vocab_size} entries, the model's vocabulary only {vocabulary}"
        )
    if tuning != "full":
        if tuning in ("qlora", "int8"):
            quantize(network, bits=4 if tuning == "qlora" else 8)
        add_lora(network, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    return network
