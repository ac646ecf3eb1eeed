"""Generation of tensors: independence of neighbours and padding, distribution, limits, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.language.generation import generate, generate_batch
from modules.language.sampling import next_tokens, sequence_seed, uniforms
from modules.networks.causal_lm import CausalLM
from modules.networks.gpt2 import GPT2, GPT2Config
from modules.networks.llama import Llama, LlamaConfig
from modules.networks.markov_lm import MarkovConfig, MarkovLM

LENGTHS = torch.tensor([3, 17, 2, 8, 3, 1])


def make(kind: str) -> CausalLM:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: CausalLM = GPT2(GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=2, n_head=4))
    else:
        model = Llama(
            LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=40)
        )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return make(request.param)


def prompts(width: int = 17, filler: int = 0) -> Tensor:
    ids = torch.randint(0, 50, (len(LENGTHS), 17), generator=torch.Generator().manual_seed(2))
    ids[4, :3] = ids[0, :3]  # one prompt twice
    ids = torch.nn.functional.pad(ids, (0, width - 17))
    return torch.where(torch.arange(width) < LENGTHS[:, None], ids, filler)


SEEDS = torch.tensor([sequence_seed(9, i) for i in range(6)], dtype=torch.uint64).view(torch.int64)
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8, "min_new_tokens": 4},
    {"top_k": 12, "top_p": 0.9},
]


def some_token(model: CausalLM, options: dict[str, Any]) -> int:
    """A token that a response would hold in the middle, to end responses with."""
    free = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, max_new_tokens=14, **options)
    return int(free.tokens[1, 6])


@pytest.mark.parametrize("options", OPTIONS)
def test_neighbours_batch_size_and_padding_change_nothing(model: CausalLM, options: dict[str, Any]) -> None:
    eod = some_token(model, options)
    arguments: dict[str, Any] = {"max_new_tokens": 14, "eod_id": eod, **options}
    whole = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, **arguments)
    assert whole.ended.sum() > 0
    for size in (1, 2, 4):
        part = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, batch_size=size, **arguments)
        assert torch.equal(part.tokens, whole.tokens)
        assert torch.equal(part.length, whole.length)
        assert torch.equal(part.ended, whole.ended)
        torch.testing.assert_close(part.logprobs, whole.logprobs, rtol=1e-3, atol=1e-4)
    padded = generate_batch(model, prompts(25, filler=eod), LENGTHS, seeds=SEEDS, **arguments)
    assert torch.equal(padded.tokens, whole.tokens)
    order = torch.tensor([3, 0, 5, 4, 2, 1])
    mixed = generate_batch(model, prompts()[order], LENGTHS[order], seeds=SEEDS[order], **arguments)
    assert torch.equal(mixed.tokens, whole.tokens[order])


@pytest.mark.parametrize("options", OPTIONS)
def test_fields_agree_with_each_other(model: CausalLM, options: dict[str, Any]) -> None:
    eod = some_token(model, options)
    out = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, max_new_tokens=14, eod_id=eod, **options)
    for tokens, length, ended, logprobs in zip(out.tokens, out.length, out.ended, out.logprobs, strict=True):
        real = tokens[:length].tolist()
        assert ended == (real[-1] == eod)
        assert eod not in real[:-1]
        assert ended or length == 14
        assert length >= options.get("min_new_tokens", 0)
        assert tokens[length:].count_nonzero() == logprobs[length:].count_nonzero() == 0
        assert (logprobs[:length] < 0).all()


def test_samples_are_the_responses_to_repeated_prompts(model: CausalLM) -> None:
    seeds = torch.arange(18)
    grouped = generate_batch(
        model, prompts(), LENGTHS, seeds=seeds, max_new_tokens=9, top_k=20, eod_id=7, samples_per_prompt=3
    )
    plain = generate_batch(
        model, prompts().repeat_interleave(3, 0), LENGTHS.repeat_interleave(3), seeds=seeds, max_new_tokens=9,
        top_k=20, eod_id=7,
    )  # fmt: skip
    assert torch.equal(grouped.tokens, plain.tokens)
    torch.testing.assert_close(grouped.logprobs, plain.logprobs, rtol=1e-4, atol=1e-5)
    for size in (2, 7):  # parts that cut a prompt's samples in two
        parts = generate_batch(
            model, prompts(), LENGTHS, seeds=seeds, max_new_tokens=9, top_k=20, eod_id=7, samples_per_prompt=3,
            batch_size=size,
        )  # fmt: skip
        assert torch.equal(parts.tokens, grouped.tokens)
    assert len({tuple(row) for row in grouped.tokens.tolist()}) > 12


def test_lists_and_tensors_are_one_generator(model: CausalLM) -> None:
    out = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, max_new_tokens=11, top_p=0.9, eod_id=7)
    lists = [row[:n].tolist() for row, n in zip(prompts(), LENGTHS, strict=True)]
    other = generate(
        model, lists, max_new_tokens=11, temperature=1.0, top_p=0.9, stop_token_ids=[7], seeds=SEEDS.tolist()
    )
    assert [row[:n].tolist() for row, n in zip(out.tokens, out.length, strict=True)] == other.tokens


def test_a_prompt_may_use_the_last_position(model: CausalLM) -> None:
    ids = torch.randint(0, 50, (2, 30))
    lengths = torch.tensor([30, 4])
    out = generate_batch(model, ids, lengths, seeds=torch.arange(2), max_new_tokens=10)
    assert out.length.tolist() == [10, 10]
    # lists limit each response by its own prompt: the short one goes on after the long one has run out of positions
    both = generate(model, [ids[0].tolist(), ids[1, :4].tolist()], max_new_tokens=36, temperature=1.0, seeds=[0, 1])
    alone = generate(model, [ids[1, :4].tolist()], max_new_tokens=36, temperature=1.0, seeds=[1])
    assert [len(tokens) for tokens in both.tokens] == [10, 36]
    assert both.tokens[1] == alone.tokens[0]


def test_a_sliding_window_limits_rows_and_not_the_cache() -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, model_type="mistral",
                         sliding_window=16)  # fmt: skip
    out = generate(Llama(config), [[1] * 12, [2] * 3], max_new_tokens=20)
    assert [len(tokens) for tokens in out.tokens] == [4, 13]


def test_mode_and_gradients_are_left_alone(model: CausalLM) -> None:
    model.train()
    out = generate_batch(model, prompts(), LENGTHS, seeds=SEEDS, max_new_tokens=2)
    assert model.training
    assert not out.logprobs.requires_grad


def test_it_takes_a_tabular_model() -> None:
    torch.manual_seed(0)
    config = MarkovConfig(conditions=2, positions=6, symbols=5)
    table = torch.randn(2, 6, 5, 5)
    model = MarkovLM(config, table)
    ids = torch.tensor([[5, 1], [6, 3]])
    out = generate_batch(model, ids, torch.tensor([2, 2]), seeds=torch.arange(4000), max_new_tokens=3,
                         samples_per_prompt=2000)  # fmt: skip
    for prompt, (condition, symbol) in enumerate(((0, 1), (1, 3))):
        counts = torch.bincount(out.tokens[prompt * 2000 : (prompt + 1) * 2000, 0], minlength=5) / 2000
        expected = table[condition, 0, symbol].softmax(0)
        assert (counts - expected).abs().max() < 5 * (0.25 / 2000) ** 0.5
    second = table[out.tokens.new_tensor([0, 1]).repeat_interleave(2000), 1, out.tokens[:, 0]].log_softmax(1)
    torch.testing.assert_close(out.logprobs[:, 1], second.gather(1, out.tokens[:, 1:2]).squeeze(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "want 0 <= min_new_tokens <= max_new_tokens >= 1, got 0 and 0"),
        ({"min_new_tokens": 4}, "want 0 <= min_new_tokens <= max_new_tokens >= 1, got 4 and 3"),
        ({"temperature": -1.0}, "want temperature >= 0 and 0 < top_p <= 1, got -1.0 and 1.0"),
        ({"top_p": 0.0}, "want temperature >= 0 and 0 < top_p <= 1"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt and batch_size must be >= 1, got 0 and None"),
        ({"batch_size": 0}, "samples_per_prompt and batch_size must be >= 1, got 1 and 0"),
        ({"seeds": torch.arange(5)}, r"want prompt_length \[6\] and seeds \[6\], got \[6\] and \[5\]"),
        ({"max_new_tokens": 24}, r"prompts of 1 to 17 tokens; want 1 to 16 \(prompt_ids has 17 columns, the model 40"),
        ({"prompt_length": LENGTHS - 1}, "prompts of 0 to 16 tokens"),
        ({"prompt_length": LENGTHS + 1}, "prompts of 2 to 18 tokens; want 1 to 17"),
    ],
)
def test_bad_options_are_named(model: CausalLM, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompt_ids": prompts(), "prompt_length": LENGTHS, "seeds": SEEDS, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        generate_batch(model, **{**arguments, **change})


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 1.0), (1, 1.0), (20, 0.6), (300, 1.0), (20, 1e-6)])
def test_sample_frequencies_equal_the_truncated_distribution(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 60) * 2, 40_000
    scaled = logits[0] / 0.8
    probabilities = scaled.softmax(0)
    order = probabilities.argsort(descending=True)
    kept = torch.zeros(60)
    chosen = probabilities[order[: top_k or 60]]
    chosen = chosen / chosen.sum()
    kept[order[: len(chosen)]] = chosen * (chosen.cumsum(0) - chosen < top_p)
    expected = kept / kept.sum()
    tokens, logprobs = next_tokens(logits.expand(draws, -1), uniforms(torch.arange(draws), 1)[:, 0], 0.8, top_p, top_k)
    counts = torch.bincount(tokens, minlength=60) / draws
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    torch.testing.assert_close(logprobs, logits.log_softmax(1)[0, tokens])  # of all tokens, at temperature 1


def test_a_forbidden_token_keeps_its_share_of_the_logprobs() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    for uniform in (None, torch.tensor([0.3], dtype=torch.float64)):
        token, logprob = next_tokens(logits, uniform, 1.0, 1.0, 2, torch.tensor([0]))
        assert token.item() == 1
        torch.testing.assert_close(logprob, logits.log_softmax(1)[:, 1])


def test_seeds_are_numbers_modulo_two_to_the_64() -> None:
    as_list = uniforms([(1 << 64) - 5, 3, (1 << 63) + 1], 7)
    assert torch.equal(uniforms([-5, 3, (1 << 63) + 1 - (1 << 64)], 7), as_list)
    assert torch.equal(uniforms(torch.tensor([-5, 3, (1 << 63) + 1 - (1 << 64)]), 7), as_list)
