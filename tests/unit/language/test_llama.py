"""The decoder under the ways it is run: precisions, checkpointing, compile, DDP-like use, caches, bad input."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from modules.networks import causal_lm
from modules.networks import llama as llama_module
from modules.networks.llama import Llama, LlamaConfig, document_positions
from modules.objectives.lm import bits_per_byte, lm_cross_entropy, perplexity

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def build(seed: int = 0, **options: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(CONFIG, **options)


def loss_and_gradients(model: Llama, ids: torch.Tensor, **forward: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = lm_cross_entropy(model(ids[:, :-1], **forward), model.lm_head.weight, ids[:, 1:])[0]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_plain_operations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs and torch.compile, forced on CPU."""
    model, ids = build(), torch.randint(0, 61, (2, 161))
    documents = torch.tensor([[0] * 73 + [1] * 87, [5] * 160])
    for forward in ({}, {"document_ids": documents}):
        loss, gradients = loss_and_gradients(model, ids, **forward)
        with monkeypatch.context() as patch:
            for module in (llama_module, causal_lm):
                patch.setattr(module, "use_fused", lambda x: False)
            plain_loss, plain_gradients = loss_and_gradients(model, ids, **forward)
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_several_threads_take_another_kernel_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(), torch.randint(0, 61, (2, 161))
    loss, gradients = loss_and_gradients(model, ids)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(llama_module.fused, "causal_attention", None)
    again, other = loss_and_gradients(model, ids)
    assert loss == pytest.approx(again, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_activation_checkpointing_changes_nothing() -> None:
    ids = torch.randint(0, 61, (2, 33))
    documents = torch.zeros(2, 32).long()
    for forward in ({}, {"document_ids": documents}):
        loss, gradients = loss_and_gradients(build(), ids, **forward)
        again, recomputed = loss_and_gradients(build(activation_checkpointing=True), ids, **forward)
        assert loss == again
        assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_autocast_bf16_stays_near_fp32(activation_checkpointing: bool) -> None:
    model, ids = build(activation_checkpointing=activation_checkpointing), torch.randint(0, 61, (2, 33))
    loss, gradients = loss_and_gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids[:, :-1])
        assert hidden.dtype == torch.bfloat16
        low = lm_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:])[0]
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss, rel=5e-3)
    model.zero_grad()
    low.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradients[name]).norm() < 0.05 * gradients[name].norm(), name


def test_bf16_and_fp64_parameters() -> None:
    ids = torch.randint(0, 61, (2, 33))
    loss, gradients = loss_and_gradients(build(), ids)
    wide_loss, wide = loss_and_gradients(build().double(), ids)
    low_loss, low = loss_and_gradients(build().bfloat16(), ids)
    assert loss == pytest.approx(wide_loss, rel=1e-5)
    assert low_loss == pytest.approx(loss, rel=2e-2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wide[name].float(), rtol=1e-3, atol=1e-6, msg=name)
        assert low[name].dtype == torch.bfloat16
        assert (low[name].float() - gradient).norm() < 0.1 * gradient.norm(), name


def test_gradient_accumulates_over_micro_batches() -> None:
    model, ids = build(), torch.randint(0, 61, (4, 21))
    _, whole = loss_and_gradients(model, ids)
    model.zero_grad()
    for part in ids.chunk(2):
        (lm_cross_entropy(model(part[:, :-1]), model.lm_head.weight, part[:, 1:])[0] / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_parameters_get_no_gradient() -> None:
    model, ids = build(), torch.randint(0, 61, (1, 17))
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    _, gradients = loss_and_gradients(model, ids)
    assert list(gradients) == ["model.layers.0.self_attn.q_proj.weight"]


def test_cache_continues_exactly() -> None:
    model, ids = build().eval(), torch.randint(0, 61, (3, 30))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(3, 40)
        parts = [model(ids[:, :11], cache=cache), model(ids[:, 11:19], cache=cache)]
        parts += [model(ids[:, t : t + 1], cache=cache) for t in range(19, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.extent == 30


def test_cache_rows_of_different_length() -> None:
    model, ids = build().eval(), torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        cache = model.new_cache(2, 30)
        model(ids[:, :12], cache=cache)
        cache.set_lengths(torch.tensor([12, 5]))  # row 1's prompt has 5 tokens, the rest is padding
        token = torch.tensor([[7], [9]])
        step = model(token, cache=cache)
        alone = model(torch.cat((ids[1:, :5], token[1:]), 1))[:, -1]
    torch.testing.assert_close(step[1], alone, rtol=1e-4, atol=1e-5)


def test_document_positions_restart() -> None:
    ids = torch.tensor([[4, 4, 4, 9, 9, 1], [0, 0, 0, 0, 0, 0]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_tied_weights_are_one_parameter() -> None:
    model = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight


@pytest.mark.slow
def test_compiled_model_equals_eager() -> None:
    model, ids = build(), torch.randint(0, 61, (2, 33))
    loss, gradients = loss_and_gradients(model, ids)
    compiled = torch.compile(model)
    model.zero_grad()
    again = lm_cross_entropy(compiled(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])[0]
    again.backward()
    assert again.item() == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1, got 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads unless head_dim is given"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: model_type llama, mistral or qwen2"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' lacks factor"),
        ({"rope_theta": 0.0}, "rope_theta must be a finite number > 0, got 0.0"),
    ],
)
def test_configuration_names_the_culprit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"model_type": "llama", "vocab_size": 5}, "config.json lacks hidden_size, intermediate_size"),
        ({**CONFIG.to_hf(), "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {**CONFIG.to_hf(), "rope_theta": 5.0},
            "rope_theta is 5.0 but rope_parameters.rope_theta is 10000.0; keep one",
        ),
    ],
)
def test_config_json_names_the_culprit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(values)


def test_strict_configuration_names_the_nearest_key() -> None:
    values = {**CONFIG.to_hf(), "num_key_values_heads": 2}
    assert LlamaConfig.from_hf(values) == LlamaConfig.from_hf(CONFIG.to_hf(), strict=True)
    with pytest.raises(ValueError, match="unknown key 'num_key_values_heads'; did you mean 'num_key_value_heads'"):
        LlamaConfig.from_hf(values, strict=True)


def test_config_json_round_trip_and_old_style() -> None:
    config = dataclasses.replace(
        CONFIG, rope_theta=5e5, eos_token_id=[1, 2], bos_token_id=0,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 32})  # fmt: skip
    read = LlamaConfig.from_hf(config.to_hf())
    assert read == dataclasses.replace(config, head_dim=8)  # written out
    old = {**CONFIG.to_hf(), "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    del old["rope_parameters"]
    assert LlamaConfig.from_hf(old).rope_theta == 1e6
    assert LlamaConfig.from_hf(old).rope_type == "linear"


def test_forward_refuses_what_it_cannot_do() -> None:
    ids = torch.zeros(1, 9).long()
    windowed = Llama(dataclasses.replace(CONFIG, model_type="mistral", sliding_window=8))
    with pytest.raises(ValueError, match="9 tokens exceed sliding_window 8"):
        windowed(ids)
    model = build()
    with pytest.raises(ValueError, match="exceed the cache's capacity 4"):
        model(ids, cache=model.new_cache(1, 4))
    with pytest.raises(ValueError, match="document_ids or attention_mask, not both"):
        model(ids, attention_mask=ids, document_ids=ids)
    with pytest.raises(ValueError, match="a cache needs plain right-padded prompts"):
        model(ids, attention_mask=ids, cache=model.new_cache(1, 40))
    with pytest.raises(ValueError, match="rows and capacity must be >= 1, got 0 and 4"):
        model.new_cache(0, 4)


def test_units_of_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e9) == float("inf")
    assert bits_per_byte(8 * 0.6931471805599453, 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="total_bytes must be >= 1, got 0"):
        bits_per_byte(1.0, 0)
