"""A model of ours, in this process: a network at hand, or a checkpoint directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.files import read_json_object
from modules.language.adapter_files import load_adapter
from modules.language.adapters import merge_lora, quantize
from modules.language.backends.base import BackendError, PromptTooLongError, Reply, Request, Turn
from modules.language.backends.directory_tokenizer import TEMPLATES, DirectoryTokenizer, Template
from modules.language.backends.prefix_reuse import reusing
from modules.language.backends.texts import stopped
from modules.language.checkpoint import load_causal_lm
from modules.language.generation import generate
from modules.networks.causal_lm import CausalLM, context_limit

Quantization = Literal["none", "int8", "nf4"]
_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "nf4": 4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Tokenizer(Protocol):
    """What a backend needs of a tokenizer; ``eod_id`` is the token that ends a reply."""

    @property
    def eod_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class NetworkBackend:
    """Asks a network that is at hand, on the device where it is.

    Requests of equal length limit, temperature, nucleus and stop strings are answered together. A reply depends on its
    request alone, its seed included, not on the batch (see :func:`modules.language.generation.generate`).

    Args:
        network: put in evaluation mode for the time of a call.
        tokenizer: encodes the request's text.
        batch_size: sequences generated at once.
        stop_ids: tokens that end a reply; None: the tokenizer's ``eod_id`` and the configuration's ``eos_token_id``.
        encode_turns: token ids of a conversation, where the turns' joined text is not what the model reads.
        prefix_megabytes: memory for the keys and values of recent prompts, so that growing conversations are computed
            by their new tokens only (:mod:`modules.language.backends.prefix_reuse`). 0: off, and so it must be while
            the network is trained.
        identity: see :class:`~modules.language.backends.base.Backend`.

    Raises:
        ValueError: batch_size < 1, prefix_megabytes < 0.
    """

    def __init__(
        self,
        network: CausalLM,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        stop_ids: Iterable[int] | None = None,
        encode_turns: Callable[[Sequence[Turn]], list[int]] | None = None,
        prefix_megabytes: int = 0,
        identity: str = "network",
    ) -> None:
        _check_sizes("NetworkBackend", batch_size, prefix_megabytes)
        self.network, self.tokenizer, self.batch_size, self.identity = network, tokenizer, batch_size, identity
        self._encode_turns = encode_turns
        self._model = reusing(network, prefix_megabytes << 20)
        if stop_ids is None:
            stop_ids = [*_ids(tokenizer.eod_id), *_ids(getattr(network.config, "eos_token_id", None))]
        self._stop_ids = sorted(set(stop_ids))

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`.

        Raises also: ValueError for a request without text, or with an option out of range.
        """
        prompts = [self._encode(request) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            options = (request.max_new_tokens, request.temperature, request.top_p, request.stop)
            groups.setdefault(options, []).append(index)
        replies: dict[int, Reply] = {}
        for (max_new_tokens, temperature, top_p, stop), members in groups.items():
            output = generate(
                self._model,
                [prompts[index] for index in members],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop_token_ids=self._stop_ids,
                stop_strings=stop,
                decode=self.tokenizer.decode,
                seeds=[requests[index].seed for index in members],
                batch_size=self.batch_size,
            )
            for index, tokens, finish in zip(members, output.tokens, output.finish_reasons, strict=True):
                text, _ = stopped(self.tokenizer.decode(tokens), stop)
                replies[index] = Reply(text, finish, len(prompts[index]), len(tokens))
        return [replies[index] for index in range(len(requests))]

    def close(self) -> None:
        """The network is its owner's."""

    def _encode(self, request: Request) -> list[int]:
        encode = self._encode_turns
        ids = self.tokenizer.encode(request.text) if encode is None else encode(request.turns)
        limit = context_limit(self.network)
        if len(ids) >= limit:
            raise PromptTooLongError(
                f"{self.identity}: a prompt of {len(ids)} tokens, and the context of {limit} tokens must hold the "
                "prompt and at least 1 new token; shorten the prompt, or take a model with a longer context"
            )
        if not ids:
            raise ValueError(
                f"{self.identity}: a request without text; give the model at least one token to go on from"
            )
        return ids


class LocalBackend:
    """Asks a model from a Hugging Face directory: safetensors only, no code from the directory is run, nothing fetched.

    Nothing is loaded before the first request, or :meth:`load`.

    Args:
        path: directory with config.json, safetensors and tokenizer.json (gpt2, llama, mistral, qwen2).
        quantization: ``int8`` (scaled by row) or ``nf4`` weights in the decoder layers (Dettmers et al. 2022, 2023);
            activations keep their precision.
        adapter: directory of a LoRA adapter in peft's format; merged into unquantised weights.
        template: ``none``: the model goes on with the turns' joined text; ``chat``: the directory's chat template,
            neighbouring turns of one role being one message.
        batch_size: sequences generated at once.
        prefix_megabytes: memory for recent prompts, whose common beginnings with new ones are not computed again; it
            changes replies as far as floating-point rounding can. 0: off.
        device: ``auto``: the current CUDA device, where there is one, else the CPU; or a torch device.
        dtype: of the weights; ``auto``: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        FileNotFoundError: path or adapter is no directory. ValueError: an option out of range.
    """

    def __init__(
        self,
        path: str | Path,
        quantization: Quantization = "none",
        adapter: str | Path | None = None,
        template: Template = "none",
        batch_size: int = 16,
        prefix_megabytes: int = 256,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    ) -> None:
        for name, value, choices in (
            ("quantization", quantization, ("none", *_BITS)),
            ("template", template, TEMPLATES),
            ("dtype", dtype, ("auto", *_DTYPES)),
        ):
            if value not in choices:
                raise ValueError(f"LocalBackend: {name} must be one of {', '.join(choices)}, got {value!r}")
        _check_sizes("LocalBackend", batch_size, prefix_megabytes)
        for name, folder in (("path", path), ("adapter", adapter)):
            if folder is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"LocalBackend: {name} {folder} is not a directory; nothing is downloaded")
        self.path, self.adapter = Path(path), None if adapter is None else Path(adapter)
        self.quantization: Quantization = quantization
        self.template: Template = template
        self.batch_size, self.prefix_megabytes = batch_size, prefix_megabytes
        self.device, self.dtype = device, dtype
        self._core: NetworkBackend | None = None

    @property
    def identity(self) -> str:
        details = [self.quantization] * (self.quantization != "none") + [self.template] * (self.template != "none")
        if self.adapter is not None:
            details.append(f"adapter {self.adapter}")
        return f"{self.path} ({', '.join(details)})" if details else str(self.path)

    def load(self) -> NetworkBackend:
        """Load the model, unless it is loaded.

        Raises:
            FileNotFoundError, ValueError: see :func:`modules.language.checkpoint.load_causal_lm` and
                :func:`modules.language.adapter_files.load_adapter`; a tokenizer larger than the vocabulary; nf4 on a
                CPU with layers whose input width is no multiple of 64.
            BackendError: no chat template, or a device that is not there.
        """
        if self._core is None:
            tokenizer = DirectoryTokenizer(self.path, self.template)
            device = _device(self.device)
            kind = ("bfloat16" if device.type == "cuda" else "float32") if self.dtype == "auto" else self.dtype
            network = load_causal_lm(self.path, dtype=_DTYPES[kind])
            if tokenizer.vocab_size > network.config.vocab_size:
                raise ValueError(
                    f"LocalBackend: {self.path}: the tokenizer has {tokenizer.vocab_size} entries, the model's "
                    f"vocabulary only {network.config.vocab_size}; they do not belong together"
                )
            if self.quantization == "nf4" and device.type == "cpu":
                self._check_widths(network)
            if self.quantization != "none":
                quantize(network, bits=_BITS[self.quantization])
                _keep_activations(network)
            if self.adapter is not None:
                load_adapter(network, self.adapter)
                if self.quantization == "none":
                    merge_lora(network)
            network.requires_grad_(False).eval().to(device)
            stop_ids = {*_ids(tokenizer.eod_id), *_ids(getattr(network.config, "eos_token_id", None))}
            if (self.path / "generation_config.json").is_file():  # chat models end turns with tokens of their own
                values = read_json_object(self.path / "generation_config.json", "LocalBackend")
                stop_ids.update(_ids(values.get("eos_token_id")))
            self._core = NetworkBackend(
                network,
                tokenizer,
                self.batch_size,
                stop_ids,
                tokenizer.encode_turns,
                self.prefix_megabytes,
                self.identity,
            )
        return self._core

    def _check_widths(self, network: CausalLM) -> None:
        # bitsandbytes 0.50 on a CPU: a block of 64 that reaches into the next row gets the wrong scale back
        for name, module in network.blocks.named_modules():
            if isinstance(module, torch.nn.Linear) and module.in_features % 64:
                raise ValueError(
                    f"LocalBackend: {self.path}: nf4 on a CPU wants input widths that are multiples of 64, and layer "
                    f"{name} has {module.in_features}; set quantization to int8 or none, or device to cuda"
                )

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`NetworkBackend`. Raises also: what :meth:`load` does."""
        return self.load().generate(requests)

    def close(self) -> None:
        """Let go of the model; the next request loads it again."""
        self._core = None


def _keep_activations(network: CausalLM) -> None:
    """Have 8-bit linear maps dequantise their weights, and not quantise their inputs.

    LLM.int8() keeps in full precision the input columns that hold an outlier in any row, so that there a reply would
    depend on its batch neighbours, by far more than rounding.
    """
    eight_bit = [module for module in network.modules() if type(module).__name__ == "Linear8bitLt"]
    if not eight_bit:
        return

    class Linear8bitLt(type(eight_bit[0])):  # peft knows it by its base
        def forward(self: Any, x: Tensor) -> Tensor:
            if self.weight.CB is not None:
                self.init_8bit_state()
            weight = self.state.CB.to(x.dtype) * (self.state.SCB / 127.0).to(x.dtype)[:, None]
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    for module in eight_bit:
        module.__class__ = Linear8bitLt


def _check_sizes(owner: str, batch_size: int, prefix_megabytes: int) -> None:
    if batch_size < 1 or prefix_megabytes < 0:
        raise ValueError(
            f"{owner}: want batch_size >= 1 and prefix_megabytes >= 0, got {batch_size} and {prefix_megabytes}"
        )


def _ids(value: int | Iterable[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"LocalBackend: device {name!r} is none that torch knows; want auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"LocalBackend: device {name} is not there; set device: auto or cpu")
    return device
