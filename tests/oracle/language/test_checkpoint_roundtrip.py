"""Checkpoints exchanged with transformers, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.language.adapters import add_lora, quantize
from modules.language.checkpoint import export_hf, load_llama, resize_vocabulary
from modules.networks.llama import Llama, LlamaConfig

transformers = pytest.importorskip("transformers", reason="needs the extra 'llemma'")

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_export_loads_in_transformers_with_identical_loss(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE, tie_word_embeddings=tied, rope_theta=5e4, eos_token_id=3))
    export_hf(model, None, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (shard_bytes == 20_000)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.generation_config.eos_token_id == 3
    ids = torch.randint(0, 64, (2, 30))
    logits = model.logits(model(ids))
    assert (hf(input_ids=ids).logits - logits).abs().max() < 1e-5
    loaded = load_llama(tmp_path / "out")
    assert torch.equal(loaded.model.logits(loaded.model(ids)), logits)
    assert loaded.model.config.tie_word_embeddings == tied
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_transformers_checkpoint_loads_and_returns_bit_identical(tmp_path: Path, kind: str, shard: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE, tie_word_embeddings=False)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    hf.save_pretrained(tmp_path / "in", max_shard_size=shard)
    loaded = load_llama(tmp_path / "in")
    export_hf(loaded.model, None, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is type(hf)
    for (name, a), (other, b) in zip(hf.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    ids = torch.randint(0, 64, (2, 30))
    assert torch.equal(back(input_ids=ids).logits, hf(input_ids=ids).logits)


def test_rope_change_is_reported_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_hf(Llama(LlamaConfig(**SHAPE, rope_theta=1e6)), None, tmp_path / "base")
    kept = load_llama(tmp_path / "base")
    changed = load_llama(tmp_path / "base", rope_theta=1e4)
    assert (kept.theta_from, kept.theta_to) == (1e6, 1e6)
    assert (changed.theta_from, changed.theta_to) == (1e6, 1e4)
    assert all(torch.equal(a, b) for a, b in zip(kept.model.parameters(), changed.model.parameters(), strict=True))
    export_hf(changed.model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e4
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 64, (1, 30))
    assert (hf(input_ids=ids).logits - changed.model.logits(changed.model(ids))).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabulary_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    ids = torch.randint(0, 64, (1, 20))
    before = model.logits(model(ids))
    resize_vocabulary(model, 70)
    after = model.logits(model(torch.cat((ids, torch.tensor([[69]])), 1)))
    torch.testing.assert_close(after[:, :20, :64], before)
    torch.testing.assert_close(after[:, :20, 69], before.mean(-1), rtol=1e-4, atol=1e-5)
    export_hf(model, None, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.config.vocab_size == 70
    assert (hf(input_ids=ids).logits - after[:, :20]).abs().max() < 1e-5


def test_export_merges_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = add_lora(Llama(LlamaConfig(**SHAPE)), r=4, alpha=8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    export_hf(model, None, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 64, (1, 30))
    assert (hf(input_ids=ids).logits - model.logits(model(ids))).abs().max() < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_export_dequantises(tmp_path: Path, bits: Any) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE))
    ids = torch.randint(0, 64, (1, 30))
    exact = model.logits(model(ids))
    model = add_lora(quantize(model, bits=bits), r=4)
    export_hf(model, None, tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = model.logits(model(ids))
    spread = exact.std()
    assert (hf(input_ids=ids).logits - ours).abs().max() < (1e-4 if bits == 4 else 0.05) * spread
    assert 0 < (ours - exact).abs().mean() < (0.5 if bits == 4 else 0.05) * spread
