"""Generation: independence of batch neighbours, stopping, options; scoring of given text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from modules.language.generation import cut_at_stop, generate
from modules.language.sampling import next_tokens, sequence_seed, uniforms
from modules.language.scoring import continuation_logprobs, sequence_logprobs, stream_loss
from modules.networks.llama import Llama, LlamaConfig
from modules.objectives.lm import lm_cross_entropy


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96))  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def text(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


PROMPTS = [[1, 2, 3], [4] * 17, [5, 6], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3]]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_response_does_not_depend_on_its_neighbours(model: Llama, options: dict[str, Any]) -> None:
    seeds = [11, 12, 13, 14, 15]
    whole = generate(model, PROMPTS, max_new_tokens=20, seeds=seeds, stop_token_ids=[7], **options)
    for size in (1, 2):
        parts = generate(model, PROMPTS, max_new_tokens=20, seeds=seeds, stop_token_ids=[7], batch_size=size, **options)
        assert parts.tokens == whole.tokens
        assert parts.finish_reasons == whole.finish_reasons
    order = [3, 0, 4, 2, 1]
    mixed = generate(
        model,
        [PROMPTS[i] for i in order],
        max_new_tokens=20,
        seeds=[seeds[i] for i in order],
        stop_token_ids=[7],
        **options,
    )
    assert mixed.tokens == [whole.tokens[i] for i in order]
    assert (whole.tokens[0] == whole.tokens[4]) == (not options)  # one prompt, two seeds


def test_shared_prefix_changes_nothing(model: Llama) -> None:
    prefix = torch.randint(0, 50, (30,)).tolist()
    prompts = [[*prefix, 1, 2], [*prefix, 3], [*prefix, 4, 5, 6, 7]]
    together = generate(model, prompts, max_new_tokens=15)
    alone = [generate(model, [prompt], max_new_tokens=15).tokens[0] for prompt in prompts]
    assert together.tokens == alone
    identical = generate(model, [prefix, prefix], max_new_tokens=15)
    assert identical.tokens == [generate(model, [prefix], max_new_tokens=15).tokens[0]] * 2


def test_samples_of_a_prompt_differ_and_repeat(model: Llama) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "samples_per_prompt": 4}
    first = generate(model, PROMPTS[:2], seeds=3, **arguments)
    assert len(first.tokens) == 8
    assert len({tuple(tokens) for tokens in first.tokens}) == 8
    assert generate(model, PROMPTS[:2], seeds=3, **arguments).tokens == first.tokens
    assert generate(model, PROMPTS[:2], seeds=4, **arguments).tokens != first.tokens
    third = generate(model, PROMPTS[:1], max_new_tokens=12, temperature=1.0, seeds=[sequence_seed(3, 2)])
    assert third.tokens[0] == first.tokens[2]


def test_stop_token_ends_and_is_kept(model: Llama) -> None:
    free = generate(model, PROMPTS, max_new_tokens=30)
    stop = free.tokens[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=30, stop_token_ids={stop})
    for whole, cut, reason in zip(free.tokens, stopped.tokens, stopped.finish_reasons, strict=True):
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert cut == expected
        assert reason == ("stop" if stop in whole else "length")
    assert stopped.finish_reasons[1] == "stop"
    assert all(len(t) == len(p) for t, p in zip(stopped.tokens, stopped.logprobs, strict=True))


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 9, 20, 28])
def test_stop_string_ends_at_the_first_token_that_completes_it(model: Llama, at: int) -> None:
    free = generate(model, PROMPTS[:3], max_new_tokens=30, temperature=1.5, seeds=5)
    string = text(free.tokens[1][at : at + 2])
    stopped = generate(
        model,
        PROMPTS[:3],
        max_new_tokens=30,
        temperature=1.5,
        seeds=5,
        stop_strings=["no such text", string],
        decode=text,
    )
    for whole, cut, reason in zip(free.tokens, stopped.tokens, stopped.finish_reasons, strict=True):
        found = text(whole).find(string)
        assert cut == (whole[: found + 2] if found >= 0 else whole)
        assert reason == ("stop" if found >= 0 else "length")
    assert stopped.finish_reasons[1] == "stop"


def test_context_limits_the_response(model: Llama) -> None:
    out = generate(model, [[3] * 90, [3] * 4], max_new_tokens=50)
    assert [len(tokens) for tokens in out.tokens] == [6, 50]
    assert out.finish_reasons == ["length", "length"]


def test_mode_is_restored(model: Llama) -> None:
    model.train()
    generate(model, [[1]], max_new_tokens=1)
    assert model.training


def test_autocast_generates(model: Llama) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, PROMPTS, max_new_tokens=5)
    assert [len(tokens) for tokens in out.tokens] == [5] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has 0 tokens; the model takes 1 to 95"),
        ({"prompts": [[1] * 96]}, "prompt 0 has 96 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens and samples_per_prompt must be >= 1, got 0 and 1"),
        ({"temperature": -1.0}, "want temperature >= 0 and 0 < top_p <= 1, got -1.0 and 1.0"),
        ({"top_p": 0.0}, "want temperature >= 0 and 0 < top_p <= 1"),
        ({"stop_strings": ["a"]}, "stop_strings need decode"),
        ({"stop_strings": [""], "decode": text}, "a stop string is empty"),
        ({"seeds": [1, 2]}, "1 responses need as many seeds, got 2"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_options_are_named(model: Llama, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 3, **change})


def test_cut_at_stop() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one", ["two"]) == "one"


def test_zero_uniform_never_draws_what_has_no_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    for value, expected in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)):
        tokens, _ = next_tokens(logits, torch.tensor([value], dtype=torch.float64), 1.0, 1.0)
        assert tokens.item() == expected


def test_uniforms_are_uniform_and_keyed() -> None:
    numbers = uniforms([5, 6], 2000)
    assert torch.equal(uniforms([6], 2000)[0], numbers[1])
    assert abs(numbers.mean() - 0.5) < 0.03
    assert abs(torch.corrcoef(numbers)[0, 1]) < 0.08
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_sequence_logprobs_are_padding_invariant(model: Llama) -> None:
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    plain = sequence_logprobs(model, torch.tensor(rows[1:]))[0]
    left = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
    right = torch.tensor([rows[0], [*rows[1], 0, 0, 0]])
    for ids, mask, where in (
        (left, torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]]), slice(3, 5)),
        (right, torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), slice(0, 2)),
    ):
        values = sequence_logprobs(model, ids, attention_mask=mask)
        torch.testing.assert_close(values[1, where], plain, rtol=1e-4, atol=1e-5)
        assert values[1].count_nonzero() == 2
    values.sum().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_continuation_logprobs_equal_one_by_one(model: Llama) -> None:
    prompts = [[1, 2], [3], [4, 5, 6, 7], [8]]
    continuations = [[9, 9, 9], [10], [], [11, 12, 13, 14, 15]]
    scores = continuation_logprobs(model, prompts, continuations, batch_size=2)
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        assert len(score) == len(continuation)
        if continuation:
            alone = sequence_logprobs(model, torch.tensor([prompt + continuation]))[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(score), alone.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="4 prompts but 1 continuations"):
        continuation_logprobs(model, prompts, [[1]])
    with pytest.raises(ValueError, match="pair 0 has a prompt of 0"):
        continuation_logprobs(model, [[]], [[1]])


def test_generated_logprobs_equal_scoring(model: Llama) -> None:
    out = generate(model, PROMPTS, max_new_tokens=10, temperature=1.0)
    for generated, scored in zip(out.logprobs, continuation_logprobs(model, PROMPTS, out.tokens), strict=True):
        torch.testing.assert_close(torch.tensor(generated), torch.tensor(scored), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (90, 90), (7, 3)])
def test_stream_loss_counts_every_target_once(model: Llama, window: int, stride: int | None) -> None:
    tokens = torch.randint(0, 50, (61,))
    total, count = stream_loss(model, tokens, window=window, stride=stride, batch_size=3)
    assert count == 60
    expected, step, done = 0.0, stride or window, 0
    while done < 60:  # each target from the first window that holds it, by plain slicing
        start = 0 if done == 0 else done - (window - step)
        stop = min(start + window, 60)
        losses = lm_cross_entropy(
            model(tokens[None, start:stop]), model.lm_head.weight, tokens[None, start + 1 : stop + 1]
        )[1]
        expected += losses[0, done - start :].sum().item()
        done = stop
    assert total == pytest.approx(expected, rel=1e-5)


def test_stream_loss_checks_its_input(model: Llama) -> None:
    with pytest.raises(ValueError, match="want 1 <= stride <= window, got stride 9 and window 8"):
        stream_loss(model, torch.arange(9), window=8, stride=9)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        stream_loss(model, torch.arange(1), window=8)
