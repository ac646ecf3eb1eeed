"""Scoring of responses: tree rows against separate rows, values and gradients; padding; entropies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.language import responses
from modules.language.generation import generate_batch
from modules.language.responses import response_hidden, response_logprobs, response_states, token_log_probs_and_entropy
from modules.language.scoring import continuation_logprobs
from modules.networks.causal_lm import CausalLM
from modules.networks.gpt2 import GPT2, GPT2Config
from modules.networks.llama import Llama, LlamaConfig
from modules.networks.markov_lm import MarkovConfig, MarkovLM

PROMPT_LENGTH = torch.tensor([5, 9, 1])
RESPONSE_LENGTH = torch.tensor([4, 1, 6, 2, 6, 3, 5, 6, 1, 0, 2, 6])


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    torch.manual_seed(0)
    if request.param == "gpt2":
        model: CausalLM = GPT2(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    else:
        model = Llama(
            LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
        )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(0, 40, (3, 11), generator=generator), PROMPT_LENGTH,
        torch.randint(0, 40, (12, 8), generator=generator), RESPONSE_LENGTH,
    )  # fmt: skip


def apart(values: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same responses, each with its own copy of the prompt."""
    ids, length, tokens, own = values
    return ids.repeat_interleave(4, 0), length.repeat_interleave(4), tokens, own


def real() -> Tensor:
    return torch.arange(8) < RESPONSE_LENGTH[:, None]


def test_separate_rows_equal_scoring_of_continuations(model: CausalLM) -> None:
    ids, lengths, tokens, own = apart(data())
    out = response_states(model, ids, lengths, tokens, own)
    expected = continuation_logprobs(
        model,
        [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)],
        [row[:n].tolist() for row, n in zip(tokens, own, strict=True)],
    )
    for row, values, n in zip(out.logprobs, expected, own, strict=True):
        torch.testing.assert_close(row[:n], torch.tensor(values), rtol=1e-4, atol=1e-5)
        assert row[n:].count_nonzero() == 0
    assert out.hidden.shape == (12, 8, 32)
    assert out.hidden.isfinite().all()
    assert out.entropy is None


@pytest.mark.parametrize("tree_length", [1024, 25, 1])  # 4, 2 and 1 responses to a row
def test_tree_rows_equal_separate_rows_with_gradients(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, tree_length: int
) -> None:
    monkeypatch.setattr(responses, "_TREE_LENGTH", tree_length)
    results = []
    for values in (data(), apart(data())):
        model.zero_grad()
        out = response_states(model, *values, with_entropy=True)
        weight = torch.linspace(0.5, 2, out.logprobs.numel()).view_as(out.logprobs)
        assert out.entropy is not None
        loss = (out.logprobs * weight).sum() + 0.3 * (out.entropy * weight).sum()
        (loss + out.hidden[real()].square().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((out.logprobs.detach(), out.entropy.detach(), out.hidden.detach()[real()], gradients))
    tree, rows = results
    for one, other in zip(tree[:3], rows[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert tree[3].keys() == rows[3].keys()
    for name, gradient in tree[3].items():
        torch.testing.assert_close(gradient, rows[3][name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_tree_computes_the_prompt_once(model: CausalLM) -> None:
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    response_hidden(model, *data())
    assert seen == [(3, 9 + 4 * 5)]  # longest prompt, and all but the last token of the longest response, four times


@pytest.mark.parametrize("samples", [1, 4])
def test_padding_and_other_responses_change_nothing(model: CausalLM, samples: int) -> None:
    values = data() if samples == 4 else apart(data())
    before = response_logprobs(model, *values)
    ids, lengths, tokens, own = (one.clone() for one in values)
    ids[torch.arange(11) >= lengths[:, None]] = 39
    tokens[~real()] = 39
    tokens[2] = 7  # another third response
    wide = response_logprobs(
        model, torch.nn.functional.pad(ids, (0, 3)), lengths, torch.nn.functional.pad(tokens, (0, 2)), own
    )
    others = [i for i in range(12) if i != 2]
    torch.testing.assert_close(wide[others, :8], before[others], rtol=1e-4, atol=1e-5)
    assert wide[:, 8:].count_nonzero() == 0


@pytest.mark.parametrize("samples", [1, 3])
def test_generated_logprobs_equal_rescored_full_softmax(model: CausalLM, samples: int) -> None:
    ids, lengths = data()[:2]
    made = generate_batch(
        model, ids, lengths, seeds=torch.arange(3 * samples), max_new_tokens=7, temperature=0.8, top_k=10,
        eod_id=4, samples_per_prompt=samples,
    )  # fmt: skip
    scored = response_logprobs(model, ids, lengths, made.tokens, made.length, chunk_size=3)
    torch.testing.assert_close(scored, made.logprobs, rtol=1e-3, atol=1e-4)


def test_a_tabular_model_is_scored_the_same_both_ways() -> None:
    torch.manual_seed(1)
    model = MarkovLM(MarkovConfig(2, 6, 5), torch.randn(2, 6, 5, 5))
    ids, lengths = torch.tensor([[5, 1], [6, 3]]), torch.tensor([2, 2])
    tokens, own = torch.randint(0, 5, (6, 6)), torch.tensor([6, 2, 3, 6, 1, 4])
    tree = response_logprobs(model, ids, lengths, tokens, own)
    rows = response_logprobs(model, ids.repeat_interleave(3, 0), lengths.repeat_interleave(3), tokens, own)
    torch.testing.assert_close(tree, rows)
    expected = model.table[0, 1, tokens[0, 0]].log_softmax(0)[tokens[0, 1]]
    torch.testing.assert_close(tree[0, 1], expected)


def test_entropy_and_its_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (7,))
    logs = (hidden @ weight.t()).log_softmax(1)
    logprobs, entropy = token_log_probs_and_entropy(hidden, weight, labels, chunk_size=3)
    torch.testing.assert_close(logprobs, logs.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(1))
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs_and_entropy(h, w, labels, 3), (hidden, weight))
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        token_log_probs_and_entropy(hidden, weight, labels, 0)


def test_autocast(model: CausalLM) -> None:
    plain = response_logprobs(model, *data())
    with torch.autocast("cpu", torch.bfloat16):
        out = response_states(model, *data(), with_entropy=True)
    torch.testing.assert_close(out.logprobs, plain, rtol=0.1, atol=0.1)
    out.logprobs.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 11).long()}, r"want prompt_ids \[P, L\]"),
        ({1: torch.tensor([5, 12, 1])}, "prompts of 1 to 12 tokens and responses of up to 6; want at least 1, at most"),
        ({1: torch.tensor([5, 9, 0])}, "prompts of 0 to 9 tokens"),
        ({1: torch.tensor([5, 12, 1]), 0: torch.zeros(3, 12).long()}, "prompt and response of 18 tokens exceed"),
    ],
)
def test_bad_shapes_are_named(model: CausalLM, change: dict[int, Any], message: str) -> None:
    values = [change.get(i, value) for i, value in enumerate(data())]
    with pytest.raises(ValueError, match=message):
        response_hidden(model, *values)
