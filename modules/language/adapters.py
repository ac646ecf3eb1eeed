"""Low-rank adapters (Hu et al. 2022) by peft; quantised base weights (Dettmers et al. 2023) by bitsandbytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from modules.networks.causal_lm import CausalLM
from modules.networks.products import Linear, is_plain
from modules.optional import require

_Model = TypeVar("_Model", bound=CausalLM)
_ADAPTER = "default"


def quantize(model: _Model, bits: Literal[4, 8] = 4) -> _Model:
    """Replace the linear maps of all decoder layers by frozen 4-bit (NF4, double quantisation) or 8-bit ones, in place.

    Embedding, norms and output head stay as they are, but frozen. Train adapters on top (`add_lora`).

    Raises:
        ValueError: bits is neither 4 nor 8. ImportError: bitsandbytes is absent.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits must be 4 or 8, got {bits}")
    bnb = _bitsandbytes()
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and is_plain(linear):
                setattr(parent, name, _quantized_linear(bnb, linear, bits))
    # peft asks the model which kind of linear layer it has to wrap
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def _bitsandbytes() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # bitsandbytes' own use of torch.jit
        found = require("bitsandbytes", extra="llemma")
    # one line at every product of every 8-bit layer otherwise
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found


def _quantized_linear(bnb: Any, linear: nn.Linear, bits: int) -> nn.Module:
    out_features, in_features = linear.weight.shape
    bias = linear.bias is not None
    with torch.device("meta"):
        if bits == 4:
            new = _linear4bit(bnb)(in_features, out_features, bias=bias, compress_statistics=True, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=6.0)
    data = linear.weight.data
    if bits == 4:
        weight = bnb.nn.Params4bit(data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new)
    else:
        weight = bnb.nn.Int8Params(data.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    new.weight = weight.to(data.device)  # moving is what quantises
    if bias:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return new


def _linear4bit(bnb: Any) -> type[nn.Module]:
    """bitsandbytes' Linear4bit with a state dict that loads again (the original saves what it refuses to read), and one
    form of its weights in training and evaluation."""

    class Linear4bit(bnb.nn.Linear4bit):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # In evaluation mode on some CPUs it would repack its weights, a form without gradient that loses bits.
            self.support_avx512bf16_for_cpu = False

        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
            statistics = {key[len(prefix) :]: state[key] for key in list(state) if key.startswith(f"{prefix}weight.")}
            if statistics:
                for key in statistics:
                    del state[prefix + key]
                self.weight = bnb.nn.Params4bit.from_prequantized(
                    state[f"{prefix}weight"], statistics, requires_grad=False, device=self.weight.device, module=self
                )
            super()._load_from_state_dict(state, prefix, *args)

    return Linear4bit


def add_lora(
    model: _Model,
    *,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> _Model:
    """Freeze the model and give the named linear maps (None: all in the decoder layers) trainable low-rank adapters, in
    place: W x + alpha / r * B A x, B = 0.

    Raises:
        ValueError: r < 1, alpha <= 0, dropout outside [0, 1), an unknown target. ImportError: peft is absent.
    """
    if r < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"add_lora: want r >= 1, alpha > 0, 0 <= dropout < 1, got {r}, {alpha}, {dropout}")
    targets = model.linear_names if targets is None else targets
    unknown = [name for name in targets if name not in model.linear_names]
    if unknown or not targets:
        raise ValueError(f"add_lora: targets {unknown or 'empty'}: choose among {', '.join(model.linear_names)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        peft = require("peft", extra="llemma")
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    """True if `add_lora` has been applied and not merged."""
    return next(_adapted(model), None) is not None


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes exactly what it did before `add_lora`; outside, nothing has changed. Nests.

    Gradient flags stay as they are (peft's own switch changes them). A model without adapters stays as it is.
    """
    layers = [module for _, module in _adapted(model)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors: what a LoRA run has learnt."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@torch.no_grad()
def _dense_weight(linear: Any) -> Tensor:
    """The weight of a plain or quantised linear map as an ordinary tensor."""
    weight: Any = linear.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else linear.state.SCB
        return weight.data.float() * (scales.float() / 127.0)[:, None]
    return weight.data


@torch.no_grad()
def merged_state_dict(model: CausalLM) -> dict[str, Tensor]:
    """All weights under the plain model's names, adapters merged, quantised weights dequantised; the model is left as
    it is.

    Sharded (DTensor) weights are gathered: then every rank must call this.
    """
    wrapped: dict[str, Any] = dict(_adapted(model))
    merged: dict[str, Any] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if name in wrapped or (hasattr(module, "weight") and isinstance(module, nn.Linear)):
            base: Any = wrapped[name].get_base_layer() if name in wrapped else module
            weight = _dense_weight(base)
            if name in wrapped and not wrapped[name].merged:
                weight = weight + wrapped[name].get_delta_weight(_ADAPTER).to(weight.dtype)
            merged[f"{name}.weight"] = weight
            if base.bias is not None:
                merged[f"{name}.bias"] = base.bias.data
        else:
            merged.update({f"{name}.{key}": value.data for key, value in module.named_parameters(recurse=False)})
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in merged.items()}


@torch.no_grad()
def merge_lora(model: _Model) -> _Model:
    """Fold the adapters into the weights, in place: afterwards the model is an ordinary one of the same function."""
    weights = merged_state_dict(model)
    for name, module in list(_adapted(model)):
        base = module.get_base_layer()
        linear = Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        linear.weight = nn.Parameter(weights[f"{name}.weight"])
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.data)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model.requires_grad_(True)
