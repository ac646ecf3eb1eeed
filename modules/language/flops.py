"""Floating-point operations of training."""

from __future__ import annotations

from modules.networks.llama_config import LlamaConfig


def matmul_parameters(config: LlamaConfig) -> int:
    """Parameters that take part in matrix products: all matrices with the output head, not the input embedding."""
    width, head = config.hidden_size, config.head_size
    attention = width * head * (2 * config.num_attention_heads + 2 * config.kv_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size) + config.vocab_size * width


def training_flops_per_token(config: LlamaConfig, seq_len: int, *, recompute: bool = False) -> float:
    """Forward + backward: F = 6 N_matmul + 12 L h d_head T, attention counted in full, not its causal half.

    This is the F of model-FLOPs utilisation, MFU = tokens/s * F / peak. With `recompute` the second forward pass of
    activation checkpointing counts as well (8 N_matmul + 16 L h d_head T): the F of hardware utilisation, HFU.
    """
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * seq_len
    passes = 8 if recompute else 6
    return passes * (matmul_parameters(config) + 2.0 * attention)
