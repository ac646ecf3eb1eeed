"""Policy, reference, critic and multipliers from a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from modules.language.specs import LoraSpec, ModelSpec, Tuning, build_network
from modules.networks.markov_lm import MarkovConfig, MarkovLM
from modules.rlhf.critic import Critic
from modules.rlhf.gold_proxy import gold_proxy_table
from modules.rlhf.multipliers import Multipliers
from modules.rlhf.settings import CriticSpec, MultiplierSpec, Problem
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


def build_multipliers(spec: MultiplierSpec, problem: Problem) -> Multipliers | None:
    """The problem's multipliers; ``None`` where rewards have fixed weights and no constraint."""
    if problem.objective == "fixed":
        return None
    return Multipliers(
        [problem.names[i] for i in problem.constrained],
        problem.kinds,
        problem.thresholds,
        parameterisation=spec.parameterisation,
        lr=spec.lr,
        momentum=spec.momentum,
        clip=spec.clip,
        init=spec.init,
        init_std=spec.init_std,
        lambda_max=spec.lambda_max,
        lambda_clip=spec.lambda_clip,
        relative=spec.relative,
        window=spec.window,
        frozen_weights=problem.weights if problem.frozen else None,
    )


def start_from(checkpoint: Mapping[str, Any], module: Any) -> None:
    """Give a module policy, reference and critic of another run, and its multipliers if that had the same variant.

    Thresholds, coefficients, searches and records are the module's own: they belong to a run.

    Raises:
        ValueError: the checkpoint has no policy, or policy or critic of another form.
    """
    parts = ("network", "reference", "critic")
    state = {name: value for name, value in checkpoint["state_dict"].items() if name.split(".")[0] in parts}
    if not any(name.startswith("network.") for name in state):
        raise ValueError("the checkpoint holds no policy: it is another kind of module's")
    for name, value in module.state_dict().items():
        if name.split(".")[0] in parts:
            if name not in state:
                raise ValueError(f"the checkpoint holds no {name}: give policy and critic the settings of that run")
            if getattr(state[name], "shape", None) != getattr(value, "shape", None):
                raise ValueError(f"{name} is {tuple(state[name].shape)}, the module's {tuple(value.shape)}")
    module.load_state_dict(state, strict=False)
    if module.multipliers is not None:
        same = checkpoint.get("hyper_parameters", {}).get("variant") == module.variant
        module.multipliers.start_anew(checkpoint["state_dict"].get("multipliers.raw") if same else None)
