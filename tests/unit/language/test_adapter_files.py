"""LoRA directories that can't be loaded are refused in one line that names the file and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra 'rci'")
from safetensors.torch import save_file  # noqa: E402

from modules.language.adapter_files import load_adapter  # noqa: E402
from modules.language.adapters import add_lora, has_adapters  # noqa: E402
from modules.networks.llama import Llama, LlamaConfig  # noqa: E402

CONFIG = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def write(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    if tensors is None:
        tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 32), f"{NAME}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_the_update_is_alpha_over_r_b_a(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    x = torch.randn(3, 32)
    layer: Any = model.model.layers[0]
    before = layer.self_attn.q_proj(x)
    load_adapter(model, write(tmp_path))
    expected = before + 4 / 2 * 2 * x.sum(1, keepdim=True)  # B A = 2 everywhere
    torch.testing.assert_close(layer.self_attn.q_proj(x), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"use_dora": True}, "use_dora True is not supported; merge the adapter into its model"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": 0}, "r must be a number > 0, got 0"),
        ({"lora_alpha": None}, "lora_alpha must be a number > 0, got None"),
        ({"r": 3}, "q_proj.lora_A.default.weight is (2, 32), the model and adapter_config.json want (3, 32)"),
    ],
)
def test_settings_that_mean_another_function_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="adapter: ") as caught:
        load_adapter(Llama(CONFIG), write(tmp_path / "lora", **settings))
    assert words in str(caught.value)
    assert str(tmp_path / "lora") in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 32)}, "lora_B.default.weight is missing"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, "lm_head is no linear map in the decoder"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 40)}, "embed_tokens is no linear map"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}, "model.layers.7.mlp.up_proj is no linear"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match="adapter: ") as caught:
        load_adapter(Llama(CONFIG), write(tmp_path, tensors))
    assert words in str(caught.value)


def test_missing_pickled_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        load_adapter(Llama(CONFIG), tmp_path)
    write(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="can't be read .* cut short or damaged"):
        load_adapter(Llama(CONFIG), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(Llama(CONFIG), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    model = Llama(CONFIG)
    with pytest.raises(ValueError, match="its weights are pickled"):
        load_adapter(model, tmp_path)
    assert not has_adapters(model)


def test_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has adapters already; merge them first"):
        load_adapter(add_lora(Llama(CONFIG), r=2), write(tmp_path))
