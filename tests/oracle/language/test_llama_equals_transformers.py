"""The decoder against transformers' own implementation with copied weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from modules.networks.llama import Llama, LlamaConfig
from modules.objectives.lm import lm_cross_entropy, perplexity

transformers = pytest.importorskip("transformers", reason="needs the extra 'llemma'")

SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def reference(kind: str = "llama", **changes: Any) -> nn.Module:
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, "tie_word_embeddings": False, **changes}, attn_implementation="sdpa")
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start as constants, which would hide mistakes
            nn.init.normal_(parameter, 0.5, 0.2)
        else:
            nn.init.normal_(parameter, 0.0, 0.15)
    return model


def copy_of(hf: nn.Module) -> Llama:
    model = Llama(LlamaConfig.from_hf(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict(), strict=True)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                   "max_position_embeddings": 64}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                       "original_max_position_embeddings": 64}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 2}),
        ("qwen2", {"num_key_value_heads": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [150, 7])
def test_logits_equal_transformers(kind: str, changes: dict[str, Any], length: int) -> None:
    hf = reference(kind, **changes)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, length))
    ours = copy_of(hf)
    expected = hf(input_ids=ids).logits
    assert expected.std() > 0.3  # a comparison of near-constants would prove nothing
    assert (ours.logits(ours(ids)) - expected).abs().max() < 1e-4


def test_loss_and_gradients_equal_transformers() -> None:
    hf = reference(num_key_value_heads=2)
    ours = copy_of(hf)
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 140))
    hf_loss = hf(input_ids=ids, labels=ids).loss  # shifts inside
    loss, token_losses, count = lm_cross_entropy(ours(ids[:, :-1]), ours.lm_head.weight, ids[:, 1:], chunk_size=37)
    hf_loss.backward()
    loss.backward()
    assert abs(loss.item() - hf_loss.item()) < 1e-5
    assert abs(token_losses.mean().item() - hf_loss.item()) < 1e-5
    assert count == 3 * 139
    for (name, ours_p), (hf_name, hf_p) in zip(ours.named_parameters(), hf.named_parameters(), strict=True):
        assert name == hf_name
        torch.testing.assert_close(ours_p.grad, hf_p.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_left_and_right_padding_equal_transformers() -> None:
    hf = reference()
    ours = copy_of(hf)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 40))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    left = ours.logits(ours(ids, attention_mask=mask))
    assert (left - expected)[mask.bool()].abs().max() < 1e-4
    alone = ours.logits(ours(ids[1:, 11:]))
    assert (left[1, 11:] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 192, "num_hidden_layers": 1, "vocab_size": 4096}])
def test_fresh_loss_is_log_of_vocabulary(shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **shape})
    model = Llama(config)
    ids = torch.randint(0, config.vocab_size, (8, 129))
    loss = lm_cross_entropy(model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])[0].item()
    assert loss == pytest.approx(torch.tensor(config.vocab_size).log().item(), rel=0.02)


def test_uniform_logits_have_perplexity_of_the_vocabulary_exactly() -> None:
    hidden = torch.randn(2, 9, 16)
    loss = lm_cross_entropy(hidden, torch.zeros(64, 16), torch.randint(0, 64, (2, 9)))[0]
    assert perplexity(loss.double().item()) == pytest.approx(64, rel=1e-6)


def test_unigram_model_has_the_entropy_of_its_source() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    labels = torch.repeat_interleave(torch.arange(4), (probabilities * 64).long()).view(1, 64)
    loss = lm_cross_entropy(torch.ones(1, 64, 1), probabilities.log()[:, None], labels)[0]
    assert loss.item() == pytest.approx(-(probabilities * probabilities.log()).sum().item(), rel=1e-6)


def test_document_mask_makes_documents_independent() -> None:
    ours = copy_of(reference(num_key_value_heads=2))
    first, second = torch.randint(0, 101, (1, 139)), torch.randint(0, 101, (1, 152))
    window = torch.cat((first, second), 1)
    documents = torch.cat((torch.full_like(first, 3), torch.full_like(second, 9)), 1).int()
    alone = ours.logits(ours(second))
    packed = ours.logits(ours(window, document_ids=documents))
    assert (packed[:, 139:] - alone).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())
    assert (packed[:, :139] - ours.logits(ours(first))).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())
    assert (ours.logits(ours(window))[:, 139:] - alone).abs().max() > 0.1


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_scores_depend_on_position_differences_only(theta: float) -> None:
    hf = reference(rope_parameters={"rope_type": "default", "rope_theta": theta})
    ours = copy_of(hf)
    ids = torch.randint(0, 101, (1, 60))
    positions = torch.arange(60)[None]
    shifted = ours(ids, position_ids=positions + 190)
    assert (shifted - ours(ids)).abs().max() < 1e-4
    stretched = ours(ids, position_ids=positions * 2)
    assert (stretched - ours(ids)).abs().max() > 1e-2


def test_rope_base_is_configuration_only() -> None:
    ours = copy_of(reference())
    other = Llama(dataclasses.replace(ours.config, rope_theta=1e6))
    other.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 101, (1, 60))
    assert (other(ids) - ours(ids)).abs().max() > 1e-2
