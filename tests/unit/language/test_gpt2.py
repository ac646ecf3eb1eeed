"""GPT-2: cache, masks, patterns, adapters and quantised weights, configuration."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.language.adapters import adapters_disabled, add_lora, merge_lora, quantize
from modules.language.checkpoint import build_causal_lm, export_hf, load_causal_lm, load_llama, resize_vocabulary
from modules.networks.causal_lm import CausalLM, context_limit
from modules.networks.gpt2 import GPT2, GPT2Config
from modules.networks.llama import Llama, LlamaConfig
from modules.networks.products import is_plain
from modules.objectives.lm import lm_cross_entropy

CONFIG = GPT2Config(vocab_size=61, n_positions=160, n_embd=64, n_layer=2, n_head=4)
IDS = torch.arange(2 * 30).view(2, 30) * 7 % 61


def build(kind: str = "gpt2") -> CausalLM:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2(CONFIG)
    return Llama(LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160))  # fmt: skip


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return build(request.param)


def backward(model: CausalLM) -> None:
    lm_cross_entropy(model(IDS[:, :-1]), model.lm_head.weight, IDS[:, 1:])[0].backward()


def test_start_weights_are_hugging_faces() -> None:
    model = GPT2(GPT2Config(vocab_size=900, n_positions=200, n_embd=128, n_layer=8, n_head=4))
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all()
        else:
            expected = 0.02 / (4 if name.endswith("c_proj.weight") else 1)  # 1 / sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05)
    loss = lm_cross_entropy(model(torch.arange(50)[None]), model.lm_head.weight, torch.arange(1, 51)[None])[0]
    assert abs(loss.item() - math.log(900)) < 0.3


def test_cached_steps_equal_one_pass(model: CausalLM) -> None:
    with torch.no_grad():
        cache = model.new_cache(2, 30)
        parts = [model(IDS[:, :7], cache=cache), model(IDS[:, 7:12], cache=cache)]
        parts += [model(IDS[:, t : t + 1], cache=cache) for t in range(12, 30)]
        torch.testing.assert_close(torch.cat(parts, 1), model(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="31 tokens exceed the cache's capacity 30"):
        model(IDS[:, :1], cache=cache)


def test_rows_of_different_length_share_a_cache(model: CausalLM) -> None:
    """A padded prompt, steps, rows picked and repeated, a longer padded turn, steps again."""
    first, second = torch.tensor([9, 4]), torch.tensor([3, 6])
    with torch.no_grad():
        cache = model.new_cache(2, 14)
        model(IDS[:, :9], cache=cache)
        cache.set_lengths(first)
        steps = [model(IDS[:, 20 + t : 21 + t], cache=cache) for t in range(3)]
        cache = cache.select(torch.tensor([1, 0, 1]), 30)
        assert cache.lengths.tolist() == [7, 12, 7]
        turn = model(IDS[[1, 0, 1], 10:16], cache=cache)
        cache.set_lengths(torch.tensor([7, 12, 7]) + second[[1, 0, 1]])
        last = model(IDS[[1, 0, 1], 29:], cache=cache)
        for row, source in enumerate((1, 0, 1)):
            whole = torch.cat(
                (IDS[source, : first[source]], IDS[source, 20:23], IDS[source, 10 : 10 + second[source]],
                 IDS[source, 29:])
            )  # fmt: skip
            expected = model(whole[None])[0]
            start = int(first[source])
            torch.testing.assert_close(torch.cat(steps, 1)[source], expected[start : start + 3], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(turn[row, : second[source]], expected[start + 3 : -1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(last[row, 0], expected[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [30, 150])  # below and above one block of the blockwise kernel
def test_documents_are_independent_and_padding_is_ignored(model: CausalLM, length: int) -> None:
    ids = torch.randint(0, 61, (1, length))
    cut = length // 3
    documents = (torch.arange(length) >= cut).int()[None]
    with torch.no_grad():
        packed = model(ids, document_ids=documents)
        apart = torch.cat((model(ids[:, :cut]), model(ids[:, cut:])), 1)
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
        padded = model(ids, attention_mask=documents)
        torch.testing.assert_close(padded[:, cut:], apart[:, cut:], rtol=1e-4, atol=1e-5)


def test_a_causal_pattern_is_the_causal_mask(model: CausalLM) -> None:
    positions = torch.arange(30).expand(2, -1)
    pattern = torch.ones(2, 30, 30, dtype=torch.bool).tril()
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS, position_ids=positions, attention_pattern=pattern), model(IDS), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="attention_pattern needs position_ids and excludes cache, document_ids"):
        model(IDS, attention_pattern=pattern)
    with pytest.raises(ValueError, match="attention_pattern needs position_ids and excludes cache"):
        model(IDS, attention_pattern=pattern, position_ids=positions, cache=model.new_cache(2, 30))
    with pytest.raises(ValueError, match=r"attention_pattern \(2, 29, 30\) does not fit input_ids \(2, 30\)"):
        model(IDS, attention_pattern=pattern[:, 1:], position_ids=positions)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, recomputing = build(), build()
    recomputing.activation_checkpointing = True
    for model in (plain, recomputing):
        backward(model)
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="161 tokens exceed n_positions 160"):
        build()(torch.zeros(1, 161).long())
    assert context_limit(build()) == 160


def test_disabled_adapters_are_the_base_model_exactly(model: CausalLM) -> None:
    pytest.importorskip("peft", reason="needs the extra 'rlhf'")
    with torch.no_grad():
        base = model(IDS)
        adapted = add_lora(model, r=3, alpha=9.0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
        changed = adapted(IDS)
        assert (changed - base).abs().max() > 1e-3
        with adapters_disabled(adapted):
            assert torch.equal(adapted(IDS), base)
            with adapters_disabled(adapted):
                assert torch.equal(adapted(IDS), base)
            assert torch.equal(adapted(IDS), base)
        assert torch.equal(adapted(IDS), changed)
        with pytest.raises(RuntimeError, match="inside"), adapters_disabled(adapted):
            raise RuntimeError("inside")
        assert torch.equal(adapted(IDS), changed)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    backward(adapted)
    assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == trainable
    merged = merge_lora(copy.deepcopy(adapted))
    assert is_plain(merged.get_submodule(next(iter(trainable)).split(".lora_")[0]))
    torch.testing.assert_close(merged(IDS), changed, rtol=1e-4, atol=1e-5)


def test_adapters_disabled_on_a_plain_model(model: CausalLM) -> None:
    with adapters_disabled(model):
        assert model(IDS).shape == (2, 30, 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_gpt2_runs_and_trains_adapters(bits: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra 'rlhf'")
    pytest.importorskip("peft", reason="needs the extra 'rlhf'")
    model = build()
    with torch.no_grad():
        exact = model.logits(model(IDS))
        quantised = quantize(model, bits)
        assert sum(is_plain(module) for module in quantised.modules()) == 1  # the output head
        error = (quantised.logits(quantised(IDS)) - exact).norm() / exact.norm()
        assert 0 < error < {4: 0.2, 8: 0.02}[bits]
    adapted = add_lora(quantised, r=2)
    backward(adapted)
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2 * 4
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_targets_are_the_models_own_names() -> None:
    pytest.importorskip("peft", reason="needs the extra 'rlhf'")
    with pytest.raises(ValueError, match=r"targets \['q_proj'\]: choose among c_attn, c_proj, c_fc"):
        add_lora(build(), targets=["q_proj"])
    adapted = add_lora(build(), targets=["c_attn"])
    assert all(".c_attn." in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_resized_vocabulary() -> None:
    model = build()
    resize_vocabulary(model, 70)
    assert model.lm_head.weight is model.embedding.weight
    assert model.lm_head.weight.shape == (70, 64)
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model.lm_head.weight[65], model.lm_head.weight[:61].mean(0))


def test_build_from_a_dictionary() -> None:
    gpt2 = build_causal_lm({"model_type": "gpt2", "n_layer": 1, "hidden_size": 32, "n_head": 2}, 17)
    assert isinstance(gpt2, GPT2)
    assert gpt2.config == GPT2Config(vocab_size=17, n_layer=1, n_embd=32, n_head=2)
    llama = build_causal_lm(
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
        8, activation_checkpointing=True,
    )  # fmt: skip
    assert isinstance(llama, Llama)
    assert llama.activation_checkpointing
    assert llama.config.vocab_size == 9


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"model_type": "bloom"}, 9, "model_type 'bloom' is not supported; supported: gpt2, llama, mistral, qwen2"),
        ({"model_type": "gpt2", "n_layers": 2}, 9, "unknown key 'n_layers'; did you mean 'n_layer'"),
        ({"model_type": "gpt2"}, None, "the model's config has no vocab_size"),
        ({"model_type": "gpt2", "vocab_size": 8}, 9, "the tokenizer has 9 entries, vocab_size is only 8"),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, 9, "n_embd must be a multiple of n_head, got 30 and 4"),
        ({"model_type": "gpt2", "n_inner": 0}, 9, "n_inner must be >= 1, got 0"),
        ({"model_type": "gpt2", "n_layer": 0}, 9, "n_layer must be an integer >= 1, got 0"),
        ({"model_type": "gpt2", "activation_function": "relu"}, 9, "'relu' is not supported; supported: gelu_new"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, 9, "scale_attn_by_inverse_layer_idx True"),
        ({"model_type": "llama", "n_layer": 2}, 9, "unknown key 'n_layer'"),
    ],
)
def test_bad_dictionaries_are_named(config: dict[str, Any], size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_causal_lm(config, size)


def test_configuration_round_trip() -> None:
    config = dataclasses.replace(CONFIG, n_inner=96, eos_token_id=[3, 4], extra={"attn_pdrop": 0.3})
    read = GPT2Config.from_hf(config.to_hf(), strict=True)
    assert (read, read.extra) == (config, config.extra)
    with pytest.raises(ValueError, match="model_type 'llama' is not gpt2"):
        GPT2Config.from_hf({"model_type": "llama"})


def test_unknown_and_damaged_directories(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs the extra 'rlhf'")
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load_causal_lm(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_causal_lm(tmp_path)
    export_hf(build(), None, tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported; supported: model_type llama"):
        load_llama(tmp_path / "gpt2")
    config = tmp_path / "gpt2" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"n_embd": 64', '"n_embd": 32'))
    with pytest.raises(ValueError, match=r"weights do not fit config\.json; wrong shape: transformer\.wte\.weight"):
        load_causal_lm(tmp_path / "gpt2")
    config.write_text(text.replace('"model_type": "gpt2"', '"model_type": "mamba"'))
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported; supported: gpt2, llama, mistral, qwen2"):
        load_causal_lm(tmp_path / "gpt2")
