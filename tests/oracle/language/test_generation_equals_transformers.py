"""Greedy decoding against transformers' generate, and the sampler against its distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.language.generation import generate
from modules.language.sampling import next_tokens, uniforms
from modules.networks.llama import Llama, LlamaConfig

transformers = pytest.importorskip("transformers", reason="needs the extra 'llemma'")

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Llama]:
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, pad_token_id=0)
    ).eval()
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.25)
    model = Llama(LlamaConfig.from_hf(hf.config.to_dict()))
    model.load_state_dict(hf.state_dict())
    return hf, model


@pytest.mark.parametrize("stop", [None, 41])
def test_greedy_equals_transformers_token_for_token(pair: tuple[Any, Llama], stop: int | None) -> None:
    hf, model = pair
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in (5, 19, 1, 19, 40, 12)]
    ours = generate(model, prompts, max_new_tokens=40, stop_token_ids=[] if stop is None else [stop], batch_size=4)
    stopped = 0
    for prompt, tokens, reason in zip(prompts, ours.tokens, ours.finish_reasons, strict=True):
        expected = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=stop,
        )[0, len(prompt) :].tolist()
        assert tokens == expected
        assert reason == ("stop" if expected[-1] == stop else "length")
        stopped += reason == "stop"
    assert len({tuple(tokens) for tokens in ours.tokens}) > 3  # not one attractor for all
    if stop is not None:
        assert 0 < stopped < len(prompts)


def test_batched_left_padded_transformers_agrees(pair: tuple[Any, Llama]) -> None:
    hf, model = pair
    prompts = [[7, 8, 9, 10, 11], [3, 4], [60]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    expected = hf.generate(ids, attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert generate(model, prompts, max_new_tokens=20).tokens == expected[:, 5:].tolist()


def test_logprobs_equal_transformers_scores(pair: tuple[Any, Llama]) -> None:
    hf, model = pair
    prompt = [5, 6, 7]
    ours = generate(model, [prompt], max_new_tokens=12, temperature=0.8, top_p=0.9, seeds=[11])
    ids = torch.tensor([prompt + ours.tokens[0]])
    expected = torch.log_softmax(hf(input_ids=ids).logits[0, 2:-1], -1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours.logprobs[0]), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
def test_sample_frequencies_equal_the_warped_distribution(top_p: float) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 300) * 2, 40_000
    warped = transformers.TopPLogitsWarper(top_p)(None, logits / 0.8) if top_p < 1 else logits / 0.8
    expected = torch.softmax(warped, -1)[0]
    uniform = uniforms(list(range(draws)), 1)[:, 0]
    tokens, logprobs = next_tokens(logits.expand(draws, -1), uniform, 0.8, top_p)
    counts = torch.bincount(tokens, minlength=300) / draws
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[0, tokens])
