"""The tabular language model: logits from its table, cached decoding, prompts, sampling without forbidden tokens."""

from __future__ import annotations

import pytest
import torch

from modules.language.generation import generate_batch
from modules.language.responses import response_logprobs
from modules.networks.markov_lm import MarkovConfig, MarkovLM

CONFIG = MarkovConfig(conditions=2, positions=4, symbols=5)
A, B = 5, 6  # the tokens of the two conditions


@pytest.fixture
def model() -> MarkovLM:
    table = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    return MarkovLM(CONFIG, table)


def test_sizes():
    assert (CONFIG.vocab_size, CONFIG.hidden_size, CONFIG.max_position_embeddings) == (7, 6, 6)


def test_logits_are_the_tables_row_of_condition_position_and_previous_token(model):
    tokens = torch.tensor([[A, 3, 0, 1, 4], [B, 2, 2, 4, 0]])
    logits = model.logits(model(tokens))
    for row, condition in enumerate((0, 1)):
        for at in range(1, 5):
            expected = model.table[condition, at - 1, tokens[row, at]]
            torch.testing.assert_close(logits[row, at, :5], expected, rtol=0, atol=0)
    assert bool((logits[..., 5:].softmax(-1).isfinite()).all())
    assert bool((logits.softmax(-1)[..., 5:] == 0.0).all())  # conditions are never said


def test_a_fresh_table_is_uniform():
    logs = MarkovLM(CONFIG).logits(MarkovLM(CONFIG)(torch.tensor([[A, 3]]))).log_softmax(-1)
    torch.testing.assert_close(logs[0, 1, :5], torch.full((5,), 0.2).log())


def test_cached_steps_equal_one_forward_pass(model):
    tokens = torch.tensor([[A, 3, 0, 1, 4], [B, 2, 2, 4, 0]])
    whole = model(tokens)
    cache = model.new_cache(2, 6)
    parts = [model(tokens[:, :2], cache=cache)]
    parts += [model(tokens[:, at : at + 1], cache=cache) for at in (2, 3, 4)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert (cache.extent, cache.lengths.tolist()) == (5, [5, 5])


def test_selected_rows_of_a_cache_go_on_as_they_were(model):
    tokens = torch.tensor([[A, 3, 0], [B, 2, 2]])
    cache = model.new_cache(2, 6)
    model(tokens[:, :2], cache=cache)
    chosen = cache.select(torch.tensor([1, 0, 1]))
    assert chosen.rows == 3
    after = model(tokens[[1, 0, 1], 2:], cache=chosen)
    assert torch.equal(after, model(tokens)[[1, 0, 1], 2:])


def test_generation_gives_its_own_log_probabilities_and_no_condition_tokens(model):
    prompts = torch.tensor([[A, 3], [B, 0], [A, 4]])
    lengths = torch.full((3,), 2)
    made = generate_batch(
        model, prompts, lengths, seeds=torch.arange(60), max_new_tokens=4, min_new_tokens=4, eod_id=-1,
        samples_per_prompt=20, top_k=0,
    )  # fmt: skip
    assert made.length.tolist() == [4] * 60
    assert not bool(made.ended.any())
    assert int(made.tokens.max()) < 5
    scored = response_logprobs(model, prompts, lengths, made.tokens, made.length)
    torch.testing.assert_close(made.logprobs, scored, rtol=1e-5, atol=1e-6)
    by_hand = torch.zeros(60, 4)
    for row in range(60):
        condition, before = int(prompts[row // 20, 0]) - 5, int(prompts[row // 20, 1])
        for at in range(4):
            token = int(made.tokens[row, at])
            by_hand[row, at] = model.table[condition, at, before].detach().log_softmax(0)[token]
            before = token
    torch.testing.assert_close(scored.detach(), by_hand, rtol=1e-5, atol=1e-5)


def test_gradients_reach_only_the_rows_that_were_read(model):
    tokens = torch.tensor([[A, 3, 0]])
    model.logits(model(tokens[:, :2]))[0, 1].log_softmax(-1)[0].backward()
    grad = model.table.grad
    assert bool((grad[0, 0, 3] != 0).all())
    grad[0, 0, 3] = 0.0
    assert float(grad.abs().max()) == 0.0
    assert not model.lm_head.weight.requires_grad


def test_what_a_table_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match=r"table must be \(2, 4, 5, 5\), got \(2, 2\)"):
        MarkovLM(CONFIG, torch.zeros(2, 2))
    for option in ("document_ids", "attention_mask"):
        with pytest.raises(ValueError, match="padded on the right only"):
            model(torch.tensor([[A, 3]]), **{option: torch.ones(1, 2, dtype=torch.int64)})
