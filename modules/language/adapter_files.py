"""LoRA adapters from peft's directories: adapter_config.json and adapter_model.safetensors, no pickles."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modules.files import read_json_object
from modules.language.adapters import adapter_state_dict, has_adapters
from modules.networks.causal_lm import CausalLM
from modules.optional import require

_Model = TypeVar("_Model", bound=CausalLM)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's wrapper, around the model that was adapted
# what changes the function beyond W x + scale * B A x; a value that is not one of these is not supported
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base weights too
    **dict.fromkeys(
        ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "modules_to_save", "layer_replication",
         "trainable_token_indices", "target_parameters", "megatron_config", "arrow_config"),
        (False, None, [], {}),
    ),
}  # fmt: skip


def load_adapter(model: _Model, directory: str | Path) -> _Model:
    """Freeze the model and give it the LoRA adapter in ``directory``, in place, as `adapters.add_lora` does.

    The function is W x + s B A x with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2022; Kalajdzievski
    2023). Ranks and scales that differ by layer are kept.

    Args:
        model: plain or quantised, without adapters.
        directory: what peft's ``save_pretrained`` writes for a model of the same kind and shape.

    Raises:
        FileNotFoundError: a file is missing. ValueError: pickled or damaged weights, a kind of adapter other than LoRA
            on linear maps of the decoder layers, tensors that do not fit; a model that has adapters already.
    """
    directory = Path(directory)
    if has_adapters(model):
        raise ValueError(f"adapter: {directory}: the model has adapters already; merge them first")
    config, weights = _read_config(directory), _read_weights(directory)
    targets = _targets(model, weights, directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        peft = require("peft", extra="rci")
    settings = {name: config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(name)}
    lora = peft.LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=targets, **settings)
    peft.inject_adapter_in_model(lora, model, adapter_name="default")
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"adapter: {directory}: {wrong[0]} is {found.get(wrong[0], 'missing')}, the model and {_CONFIG} want "
            f"{expected.get(wrong[0], 'none')}; is it for another model?"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / _CONFIG).is_file():
        raise FileNotFoundError(f"adapter: {directory / _CONFIG} does not exist; give a directory written by peft")
    config = read_json_object(directory / _CONFIG, "adapter")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {directory}: peft_type {config.get('peft_type')!r} is not supported; only LORA is")
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise ValueError(
                f"adapter: {directory / _CONFIG}: {name} {config[name]!r} is not supported; merge the adapter into its "
                "model with peft, save that, and give its directory as the model"
            )
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"adapter: {directory / _CONFIG}: {name} must be a number > 0, got {value!r}")
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The adapter's tensors under the names that they have inside our networks."""
    file = directory / _WEIGHTS
    if not file.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"adapter: {directory}: its weights are pickled, and loading a pickle can run code; where you trust it "
                "load it with peft, and save_pretrained writes safetensors"
            )
        raise FileNotFoundError(f"adapter: {file} does not exist; copy the adapter's directory again")
    safetensors = require("safetensors", extra="rci")
    try:
        weights = require("safetensors.torch", extra="rci").load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"adapter: {file} can't be read ({str(error)[:120]}); it is cut short or damaged: copy it again"
        ) from None
    return {
        name.removeprefix(_PREFIX).replace(".lora_A.weight", ".lora_A.default.weight").replace(
            ".lora_B.weight", ".lora_B.default.weight"
        ): tensor
        for name, tensor in weights.items()
    }  # fmt: skip


def _targets(model: CausalLM, weights: dict[str, Tensor], directory: Path) -> list[str]:
    """Full names of the linear maps that the adapter's tensors are for."""
    blocks = next(name for name, module in model.named_modules() if module is model.blocks)
    own = {
        f"{blocks}.{name}" for name, _ in model.blocks.named_modules() if name.rpartition(".")[2] in model.linear_names
    }
    targets = dict.fromkeys(name.partition(".lora_")[0] for name in weights)
    if not targets:
        raise ValueError(f"adapter: {directory / _WEIGHTS} holds no tensors")
    for target in targets:
        if target not in own:
            raise ValueError(
                f"adapter: {directory}: {target} is no linear map in the decoder layers of this {type(model).__name__} "
                f"({', '.join(model.linear_names)}); is the adapter for another model?"
            )
    return list(targets)
