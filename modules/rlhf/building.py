"""Policy, reference and critic from a config."""

from __future__ import annotations

import copy
from typing import Any

import torch

from modules.language.specs import LoraSpec, ModelSpec, Tuning, build_network
from modules.networks.markov_lm import MarkovConfig, MarkovLM
from modules.rlhf.critic import Critic
from modules.rlhf.gold_proxy import gold_proxy_table
from modules.rlhf.settings import CriticSpec
from modules.seeds import global_seed, stream_seed

_INIT = 53  # keeps start weights apart from other uses of the run's seed


def build_networks(
    spec: ModelSpec, tuning: Tuning, lora: LoraSpec, critic: CriticSpec, streams: int, tokenizer: Any
) -> tuple[Any, Any, Critic | None]:
    """Policy, frozen reference (``None`` with adapters: the policy without them), and critic (``None``: none).

    Args:
        spec: start weights; ``config: {model_type: markov}`` is the tabular policy of GoldProxy.
        streams: number of value heads. tokenizer: the data's.

    Raises:
        ValueError: the tokenizer has more tokens than the policy's vocabulary.
    """
    # the run's seed alone decides fresh weights, whatever drew from the generator before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(global_seed(), _INIT))
        if spec.config is not None and spec.config.get("model_type") == "markov":
            config = MarkovConfig(**{key: value for key, value in spec.config.items() if key != "model_type"})
            network: Any = MarkovLM(config, gold_proxy_table(config))
        else:
            network = build_network(spec, tuning, lora, tokenizer, owner="ConstrainedRLHF")
        heads: Critic | None = None
        if critic.kind == "separate":
            heads = Critic.separate(streams, network)
        elif critic.kind == "shared":
            heads = Critic(streams, network.config.hidden_size, detach=critic.detach)
    if tokenizer.vocab_size > network.config.vocab_size:
        raise ValueError(
            f"ConstrainedRLHF: the data's tokenizer has {tokenizer.vocab_size} tokens, the policy's vocabulary "
            f"{network.config.vocab_size}; use the tokenizer of the policy's folder"
        )
    reference = copy.deepcopy(network).requires_grad_(False) if tuning == "full" else None
    return network, reference, heads
