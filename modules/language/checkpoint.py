"""Hugging Face checkpoint directories in and out: safetensors only, no code from the directory is ever run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modules.files import atomic_directory, read_json_object, tokenizer_digest
from modules.language.adapters import has_adapters, merged_state_dict
from modules.networks.causal_lm import CausalLM
from modules.networks.gpt2 import GPT2, GPT2Config
from modules.networks.llama import Llama, LlamaConfig
from modules.optional import require

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# model_type of config.json -> (configuration, model)
_KINDS: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2),
    **dict.fromkeys(("llama", "mistral", "qwen2"), (LlamaConfig, Llama)),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TokenizerMismatchError(ValueError):
    """Token data and checkpoint were made with different tokenizers."""


@dataclass(frozen=True)
class LoadedLlama:
    """A model from a checkpoint, and the RoPE base before and after loading."""

    model: Llama
    theta_from: float
    theta_to: float
    path: Path


def _config_values(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: {file} does not exist; give a Hugging Face model directory")
    return read_json_object(file, "checkpoint")


def read_config(path: str | Path) -> LlamaConfig:
    """The configuration of a Llama-family checkpoint directory.

    Raises:
        FileNotFoundError: no config.json. ValueError: not JSON, or not a supported model.
    """
    return LlamaConfig.from_hf(_config_values(path))


def _kind(values: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    kind = values.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(sorted(_KINDS))}")
    return _KINDS[kind]


def build_causal_lm(
    config: Mapping[str, Any], vocab_size: int | None = None, *, activation_checkpointing: bool = False
) -> CausalLM:
    """A model with fresh weights, drawn from torch's generator.

    Args:
        config: keys of a Hugging Face config.json; `model_type` decides the kind (default: llama).
        vocab_size: used if the config has none; it must not be smaller than this.

    Raises:
        ValueError: unknown model_type or key, missing or impossible sizes, a vocabulary smaller than `vocab_size`.
    """
    values = {"model_type": "llama", **config}
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    if "vocab_size" not in values:
        raise ValueError("build_causal_lm: the model's config has no vocab_size")
    if vocab_size is not None and values["vocab_size"] < vocab_size:
        raise ValueError(
            f"build_causal_lm: the tokenizer has {vocab_size} entries, vocab_size is only {values['vocab_size']}"
        )
    config_class, model_class = _kind(values, "build_causal_lm")
    return model_class(config_class.from_hf(values, strict=True), activation_checkpointing=activation_checkpointing)


def hash_tokenizer(directory: str | Path) -> str:
    """Identity of the directory's tokenizer (`modules.files.tokenizer_digest`).

    Raises: FileNotFoundError without a tokenizer.json, ValueError if it isn't JSON.
    """
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: {file} does not exist; the tokenizer must lie beside the weights")
    return tokenizer_digest(read_json_object(file, "checkpoint"))


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        names = read_json_object(path / _INDEX, "checkpoint").get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"checkpoint: {path / _INDEX} has no weight_map")
        files = [path / str(name) for name in dict.fromkeys(names.values())]
        outside = [file for file in files if file.parent != path]
        if outside:
            raise ValueError(f"checkpoint: {path / _INDEX} names a file outside its folder: {outside[0]}")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"checkpoint: {path} lacks {', '.join(missing)}, which its index lists; copy it again"
            )
        return files
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickled:
        raise ValueError(
            f"checkpoint: {path} holds pickled weights only ({pickled[0]}), and loading a pickle can run code; where "
            "you trust it, convert: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise FileNotFoundError(f"checkpoint: {path} has neither {_SINGLE} nor {_INDEX}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    safetensors = require("safetensors", extra="llemma")
    load_file = require("safetensors.torch", extra="llemma").load_file
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            weights.update(load_file(file))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            reason = str(error)[:120]
            raise ValueError(
                f"checkpoint: {file} can't be read ({reason}); it is cut short or damaged: copy it again"
            ) from None
    return weights


def load_llama(
    path: str | Path,
    *,
    rope_theta: float | Literal["keep"] = "keep",
    dtype: torch.dtype = torch.float32,
    tokenizer_hash: str | None = None,
    activation_checkpointing: bool = False,
) -> LoadedLlama:
    """Load a Llama-family checkpoint directory (config.json, safetensors, one file or sharded).

    Args:
        path: the directory.
        rope_theta: new RoPE base; the change is in the configuration only, no weight moves (Llemma contracts Code
            Llama's 1e6 to 1e4 this way). "keep" leaves the checkpoint's.
        dtype: of the parameters. Train with fp32 ones: bf16 parameters lose updates below 2^-8 of their size.
        tokenizer_hash: hash of the tokenizer the data was prepared with; checked against the directory's.
        activation_checkpointing: see `Llama`.

    Returns: the model (training mode, CPU), and the RoPE base before and after.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: unsupported model, pickled or damaged weights, keys or shapes that do not fit.
        TokenizerMismatchError: another tokenizer.
    """
    path = _checked_directory(path, tokenizer_hash)
    config = read_config(path)
    theta_from = config.rope_theta
    if rope_theta != "keep":
        config = dataclasses.replace(config, rope_theta=float(rope_theta))
    model = _load(Llama, config, path, dtype, activation_checkpointing)
    return LoadedLlama(model, theta_from, config.rope_theta, path)


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_hash: str | None = None,
    activation_checkpointing: bool = False,
) -> CausalLM:
    """Load a checkpoint directory of any model we have (`model_type` in its config.json: gpt2, llama, mistral, qwen2).

    Args, Raises: as `load_llama`.

    Returns: the model (training mode, CPU).
    """
    path = _checked_directory(path, tokenizer_hash)
    values = _config_values(path)
    config_class, model_class = _kind(values, f"checkpoint: {path / 'config.json'}")
    return _load(model_class, config_class.from_hf(values), path, dtype, activation_checkpointing)


def _checked_directory(path: str | Path, tokenizer_hash: str | None) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: {path} is not a directory; give a Hugging Face model directory")
    if tokenizer_hash is not None:
        have = hash_tokenizer(path)
        if have != tokenizer_hash:
            raise TokenizerMismatchError(
                f"data prepared with {tokenizer_hash[:12]}, model expects {have[:12]}: prepare the corpus again "
                f"with the tokenizer in {path}, or load the model that belongs to this corpus"
            )
    return path


def _load(model_class: Any, config: Any, path: Path, dtype: torch.dtype, activation_checkpointing: bool) -> Any:
    with torch.device("meta"):
        model = model_class(config, activation_checkpointing=activation_checkpointing)
    assign_weights(model, _read_weights(path), dtype, path)
    return model


def assign_weights(model: CausalLM, weights: dict[str, Tensor], dtype: torch.dtype, source: str | Path) -> None:
    """Give a model (on the meta device, or not) a checkpoint's weights; keys and shapes must fit exactly.

    Raises: ValueError listing what is missing, unexpected, or of the wrong shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = model.from_hf_weights(weights)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
        expected.pop("lm_head.weight")
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrong shape": [
            f"{name} {tuple(weights[name].shape)} for {shape}"
            for name, shape in expected.items() if name in weights and tuple(weights[name].shape) != shape
        ],
    }  # fmt: skip
    found = [
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"checkpoint: {source}: weights do not fit config.json; {'; '.join(found)}")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights[f"{model.embedding_name}.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()


def export_hf(
    model: CausalLM,
    tokenizer_dir: str | Path | None,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` and `load_causal_lm` read, with identical logits.

    Adapters are merged and quantised weights dequantised in the copy; the model stays as it is. The directory appears
    whole or not at all, replacing an older one. In a distributed run all ranks call this and rank 0 writes.

    Args:
        tokenizer_dir: directory whose tokenizer files go along; None: no tokenizer.
        dtype: of the written weights; None: as they are.
        max_shard_bytes: above this, weights are split over several files with an index.

    Raises:
        FileNotFoundError: tokenizer_dir has no tokenizer.json. OSError: the write failed; nothing is left behind.
    """
    weights = model.to_hf_weights(merged_state_dict(model))
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    weights = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}
    if tokenizer_dir is not None and not (Path(tokenizer_dir) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"export_hf: {tokenizer_dir} has no tokenizer.json")
    kind = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), "dtype": kind, "torch_dtype": kind}
    special = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config[name] is not None
    }
    with atomic_directory(out_dir) as folder:
        for name, content in (("config.json", config), ("generation_config.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_weights(weights, folder, max_shard_bytes)
        for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if (Path(tokenizer_dir) / name).is_file():  # type: ignore[arg-type]
                shutil.copyfile(Path(tokenizer_dir) / name, folder / name)  # type: ignore[arg-type]


def _write_weights(weights: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    save_file = require("safetensors.torch", extra="llemma").save_file
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    if len(shards) == 1:
        save_file(shards[0], folder / _SINGLE, metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def resize_vocabulary(model: CausalLM, vocab_size: int) -> None:
    """Grow (or cut) the vocabulary in place, embedding and output head together; tied matrices stay tied.

    New rows are the mean of the old ones: a new token then starts with an average logit and does not disturb the
    softmax (Hewitt 2021).

    Raises: ValueError if vocab_size < 1, or the model carries adapters.
    """
    if vocab_size < 1:
        raise ValueError(f"resize_vocabulary: vocab_size must be >= 1, got {vocab_size}")
    if has_adapters(model):
        raise ValueError("resize_vocabulary: resize before adding adapters, or merge them first")

    def resized(old: Tensor) -> nn.Parameter:
        new = old.new_empty(vocab_size, old.shape[1])
        kept = min(vocab_size, old.shape[0])
        new[:kept] = old[:kept]
        new[kept:] = old.mean(dim=0)
        return nn.Parameter(new, requires_grad=old.requires_grad)

    embedding, head = model.embedding, model.lm_head
    embedding.weight = resized(embedding.weight)
    embedding.num_embeddings = head.out_features = vocab_size
    if not model.config.tie_word_embeddings:
        head.weight = resized(head.weight)
    config: Any = model.config
    model.config = dataclasses.replace(config, vocab_size=vocab_size)
    model.tie_weights()
