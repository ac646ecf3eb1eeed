"""Looking into a Llama: against its own forward pass and transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.language.inspection import attention_maps, labelled_nats, padded, residual_stream, token_nats
from modules.networks.llama import Llama, LlamaConfig


@pytest.fixture(scope="module")
def network() -> Llama:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return Llama(config).eval()


@pytest.fixture
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in (12, 5, 20, 2)]


def test_nats_are_those_of_each_sequence_alone(network: Llama, sequences: list[Tensor]) -> None:
    found = token_nats(network, sequences)
    for ids, nats in zip(sequences, found, strict=True):
        with torch.no_grad():
            logs = network.logits(network(ids[None]))[0].log_softmax(-1)
        assert nats.tolist() == pytest.approx((-logs[:-1].gather(1, ids[1:, None])[:, 0]).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        token_nats(network, [torch.tensor([3])])
    assert token_nats(network, []) == []


def test_labelled_nats_are_zero_where_masked(network: Llama, sequences: list[Tensor]) -> None:
    ids, kept = padded(sequences[:2])
    labels = torch.where(kept, ids, -100)
    labels[0, 3] = -100
    found = labelled_nats(network, ids, labels)
    assert (found[labels == -100] == 0).all()
    assert (found[labels != -100] > 0).all()


def test_residual_stream_ends_in_the_hidden_states(network: Llama, sequences: list[Tensor]) -> None:
    ids, _ = padded(sequences[:1])
    stream = residual_stream(network, ids)
    with torch.no_grad():
        assert torch.equal(stream[0], network.embedding(ids))
        assert torch.equal(network.model.norm(stream[-1]), network(ids))  # type: ignore[arg-type]
    assert len(stream) == 4
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in network.blocks)


def test_attention_maps_equal_transformers(network: Llama, sequences: list[Tensor], tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**network.config.to_hf(), attn_implementation="eager")
    other = transformers.LlamaForCausalLM(config).eval()
    other.load_state_dict(network.state_dict())
    ids = sequences[0][None]
    with torch.no_grad():
        wanted = other(ids, output_attentions=True).attentions
    found = attention_maps(network, ids)
    assert len(found) == len(wanted) == 3
    for one, its in zip(found, wanted, strict=True):
        assert torch.allclose(one, its, atol=1e-5)
        assert (one.triu(1) == 0).all()
