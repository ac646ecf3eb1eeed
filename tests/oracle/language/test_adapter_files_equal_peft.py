"""LoRA adapters written by peft: our networks compute with them what peft's models compute."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra 'rci'")
pytest.importorskip("transformers", reason="needs the extra 'rci'")

import transformers  # noqa: E402
from tiny_language import write_model  # noqa: E402

from modules.language.adapter_files import load_adapter  # noqa: E402
from modules.language.adapters import adapter_state_dict, merge_lora, merged_state_dict, quantize  # noqa: E402
from modules.language.backends import LocalBackend, Request, Turn  # noqa: E402
from modules.language.checkpoint import load_causal_lm  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import peft

# peft's own use of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")
IDS = torch.arange(62).view(2, 31) * 7 % 300
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear maps, rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "ranks and scales by layer": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "one layer": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapter"))


def write_adapter(model_directory: Path, directory: Path, **settings: Any) -> Any:
    """peft's model with an adapter of random weights, saved into ``directory``."""
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_peft(llama: Path, tmp_path: Path, kind: str) -> None:
    theirs = write_adapter(llama, tmp_path / "adapter", **KINDS[kind])
    model = load_causal_lm(llama)
    base = model.logits(model(IDS))
    load_adapter(model, tmp_path / "adapter")
    expected = theirs(IDS).logits
    assert (expected - base).abs().max() > 0.5  # the adapter does something
    torch.testing.assert_close(model.logits(model(IDS)), expected, rtol=1e-4, atol=1e-3)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(
        adapter_state_dict(model)
    )
    merged = merge_lora(model)
    torch.testing.assert_close(merged.logits(merged(IDS)), expected, rtol=1e-4, atol=1e-3)


def test_gpt2_whose_matrices_lie_transposed_equals_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    theirs = write_adapter(
        tmp_path / "model", tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    model = load_adapter(load_causal_lm(tmp_path / "model"), tmp_path / "adapter").eval()
    torch.testing.assert_close(model.logits(model(IDS)), theirs(IDS).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_backend_answers_with_its_adapter(llama: Path, tmp_path: Path, quantization: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra 'rci'")
    theirs = write_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    backend = LocalBackend(llama, quantization=quantization, adapter=tmp_path / "adapter")
    request = Request((Turn("user", "click the button"),), max_new_tokens=12)
    reply = backend.generate([request])[0]
    core = backend.load()
    if quantization == "none":
        ids = core.tokenizer.encode(request.text)
        made = theirs.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=1)
        assert reply.text == core.tokenizer.decode(made[0, len(ids) :].tolist())
    else:
        base = quantize(load_causal_lm(llama), 8 if quantization == "int8" else 4)
        dense = load_causal_lm(llama)
        dense.load_state_dict(merged_state_dict(base))  # what the quantised weights stand for
        load_adapter(dense, tmp_path / "adapter")
        ours = core.network.logits(core.network(IDS))
        torch.testing.assert_close(ours, dense.logits(dense(IDS)).detach(), rtol=1e-3, atol=1e-2)
        assert (ours - theirs(IDS).logits).abs().max() > 0.02
    assert reply.completion_tokens > 0
    assert reply != LocalBackend(llama).generate([request])[0]
