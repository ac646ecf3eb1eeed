"""What a damaged or foreign checkpoint directory is answered with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from modules.language import checkpoint
from modules.language.checkpoint import TokenizerMismatchError, export_hf, hash_tokenizer, load_llama, resize_vocabulary
from modules.networks.llama import Llama, LlamaConfig

save_file = pytest.importorskip("safetensors.torch", reason="needs the extra 'llemma'").save_file
CONFIG = LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(
        '{"b": "\\u00e9", "a": 1, "truncation": {"max_length": 5}, "padding": null}'
    )
    (tokenizer / "tokenizer_config.json").write_text("{}")
    torch.manual_seed(0)
    export_hf(Llama(CONFIG), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_directory_is_complete(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    model = load_llama(folder, dtype=torch.bfloat16, activation_checkpointing=True).model
    assert model.activation_checkpointing
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())


def test_tokenizer_hash_ignores_order_and_run_time_settings(folder: Path) -> None:
    expected = hashlib.sha256(b'{"a":1,"b":"\\u00e9"}').hexdigest()
    assert hash_tokenizer(folder) == expected
    load_llama(folder, tokenizer_hash=expected)
    with pytest.raises(TokenizerMismatchError, match=f"data prepared with {'0' * 12}, model expects {expected[:12]}"):
        load_llama(folder, tokenizer_hash="0" * 64)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_llama(folder, tokenizer_hash=expected)


def _weights() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in Llama(CONFIG).state_dict().items()}


def test_missing_unexpected_and_misshapen_weights(folder: Path) -> None:
    weights = _weights()
    del weights["lm_head.weight"]
    weights["model.extra.weight"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(3)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints have it; harmless
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"do not fit config\.json; missing: lm_head\.weight; unexpected: model\.extra\.weight; "
        r"wrong shape: model\.norm\.weight \(3,\) for \(16,\)$",
    ):
        load_llama(folder)


def test_damaged_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 100, content[:4]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors can't be read .* cut short or damaged"):
            load_llama(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_llama(folder)
    torch.save(_weights(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model\.bin\).*save_pretrained"):
        load_llama(folder)


def test_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks one\.safetensors, two\.safetensors"):
        load_llama(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        load_llama(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_llama(folder)


def test_bad_directories(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load_llama(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_llama(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_llama(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        load_llama(folder)


def test_failed_export_leaves_the_old_directory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_weights", disk_full)
    with pytest.raises(OSError, match="(?i)no space left|disk full"):
        export_hf(Llama(CONFIG), None, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [file.name for file in folder.parent.iterdir() if file.name.startswith(".")] == []
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        export_hf(Llama(CONFIG), tmp_path, folder)


def test_resize_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="vocab_size must be >= 1, got 0"):
        resize_vocabulary(Llama(CONFIG), 0)
