"""Batched generation: of lists, with stop strings, and of tensors, for training loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modules.language.decoding import DecodingOptions, GeneratedBatch
from modules.language.decoding import decode as run_decoding
from modules.language.sampling import sequence_seed
from modules.networks.causal_lm import CausalLM, context_limit
from modules.networks.fused import compute_dtype

__all__ = ["GeneratedBatch", "GenerationOutput", "cut_at_stop", "generate", "generate_batch"]

FinishReason = Literal["stop", "length"]
# A common beginning of all prompts (few-shot examples) at least this long is computed once.
_SHARED_PREFIX = 16
# Texts are searched for stop strings every so many tokens; what was generated beyond the stop is cut off.
_TEXT_CHECK = 8


@dataclass(frozen=True)
class GenerationOutput:
    """Responses, prompts in the order given and a prompt's samples together: index = prompt * samples_per_prompt +
    sample.

    Attributes:
        tokens: response token ids, the stop token included.
        logprobs: log-probability of each, under the model itself (temperature 1, all tokens).
        finish_reasons: "stop" (stop token or string), or "length" (max_new_tokens or the model's context is used up).
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[FinishReason]


@dataclass(frozen=True)
class _StopStrings:
    """Finds the token that completes a stop string."""

    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def __call__(self, _: Tensor, tokens: Tensor) -> Tensor:
        """bool [B]: whose tokens [B, t] hold a stop string, as text."""
        return torch.tensor([self._stops(self.decode(row)) for row in tokens.tolist()], device=tokens.device)

    def stop_length(self, tokens: list[int]) -> int | None:
        """The smallest number of tokens, among those not searched while generating, whose text holds a stop string."""
        if not self._stops(self.decode(tokens)):
            return None
        first = max(1, (len(tokens) - 1) // _TEXT_CHECK * _TEXT_CHECK)
        return next(
            n for n in range(first, len(tokens) + 1) if n == len(tokens) or self._stops(self.decode(tokens[:n]))
        )

    def _stops(self, text: str) -> bool:
        return any(string in text for string in self.strings)


def cut_at_stop(text: str, stop_strings: Iterable[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for string in stop_strings if (at := text.find(string)) >= 0), default=len(text))]


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token_ids: Iterable[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    samples_per_prompt: int = 1,
    seeds: int | Sequence[int] = 0,
    batch_size: int = 64,
) -> GenerationOutput:
    """Continue each prompt.

    A response is a function of its prompt, its seed and the options: batch neighbours and batch_size change it only as
    far as floating-point rounding can (matrix products of other shapes). Prompts are padded on the right and never
    attended to beyond their end.

    Args:
        model: put in evaluation mode for the time of the call. Runs in its weights' dtype, or under the caller's
            autocast.
        prompts: token ids, at least one each.
        temperature: 0 = most likely token; else samples from softmax(logits / temperature). top_p: nucleus, in (0, 1].
        stop_token_ids: end a response with one of these (kept in the response).
        stop_strings: end a response with the token that completes one of these; needs decode, token ids -> text.
        samples_per_prompt: responses per prompt; the prompt is computed once.
        seeds: one number, from which each response gets its own by its index; or one number per response.
        batch_size: responses computed at once.

    Raises:
        ValueError: an empty prompt, one as long as the model's context, or an option out of range.
    """
    budgets = _budgets(model, prompts, max_new_tokens, samples_per_prompt)
    options = DecodingOptions(
        max_new_tokens, temperature=temperature, top_p=top_p, stop_ids=tuple(dict.fromkeys(stop_token_ids))
    )
    options.check("generate")
    if batch_size < 1:
        raise ValueError(f"generate: batch_size must be >= 1, got {batch_size}")
    if stop_strings and decode is None:
        raise ValueError("generate: stop_strings need decode, the tokenizer's function from token ids to text")
    if any(not string for string in stop_strings):
        raise ValueError("generate: a stop string is empty")
    responses = len(prompts) * samples_per_prompt
    if isinstance(seeds, int):
        seeds = [sequence_seed(seeds, index) for index in range(responses)]
    if len(seeds) != responses:
        raise ValueError(f"generate: {responses} responses need as many seeds, got {len(seeds)}")
    if not prompts:
        return GenerationOutput([], [], [])
    first_of: dict[tuple[int, ...], int] = {}  # equal prompts are computed once
    owner = [first_of.setdefault(tuple(prompt), len(first_of)) for prompt in prompts]
    longest = max(map(len, first_of))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in first_of])
    stopping = _StopStrings(tuple(stop_strings), decode) if stop_strings and decode is not None else None
    training = model.training
    model.eval()
    try:
        made = run_decoding(
            model,
            ids,
            torch.tensor([len(prompt) for prompt in first_of]),
            torch.tensor(owner).repeat_interleave(samples_per_prompt),
            list(seeds),
            options,
            budget=torch.tensor(budgets).repeat_interleave(samples_per_prompt),
            batch_size=batch_size,
            prefix=_shared_prefix(model, prompts) if len(prompts) > 1 else None,
            watch=stopping,
            watch_every=_TEXT_CHECK,
        )
    finally:
        model.train(training)
    lengths = made.length.tolist()
    tokens = [row[:length] for row, length in zip(made.tokens.tolist(), lengths, strict=True)]
    reasons: list[FinishReason] = ["stop" if ended else "length" for ended in made.ended.tolist()]
    for i, row in enumerate(tokens):
        length = None if stopping is None else stopping.stop_length(row)
        if length is not None:
            tokens[i], lengths[i], reasons[i] = row[:length], length, "stop"
    logprobs = [row[:length] for row, length in zip(made.logprobs.tolist(), lengths, strict=True)]
    return GenerationOutput(tokens, logprobs, reasons)


def generate_batch(
    model: Any,
    prompt_ids: Tensor,
    prompt_length: Tensor,
    *,
    seeds: Tensor,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eod_id: int = -1,
    samples_per_prompt: int = 1,
    batch_size: int | None = None,
) -> GeneratedBatch:
    """Continue each prompt, tensors in and out: `generate` for training loops.

    A response is a function of its prompt, its seed and the options, up to floating-point rounding; neither padding nor
    neighbours matter. Prompts are padded on the right with any token, which may be the token that ends a response.

    Args:
        model: a `CausalLM` or what has its `lm_head`, `logits`, `new_cache`, `config` and call; put in evaluation mode
            for the time of the call.
        prompt_ids: int64 [P, L]; prompt_length: int64 [P].
        seeds: int64 [P * samples_per_prompt], one per response.
        max_new_tokens, min_new_tokens: limits of a response's length, its last token included.
        temperature: 0 = most likely token; else samples from softmax(logits / temperature), restricted to the top_k
            most likely tokens (0: all), of these to the nucleus top_p, in (0, 1].
        eod_id: the token that ends a response (-1: none does).
        samples_per_prompt: responses to each prompt, which is computed once.
        batch_size: responses computed at once; None: all.

    Raises:
        ValueError: an option out of range, shapes that do not fit, a prompt that is empty or leaves no room for
            max_new_tokens.
    """
    stop_ids = () if eod_id < 0 else (eod_id,)
    options = DecodingOptions(max_new_tokens, min_new_tokens, temperature, top_k, top_p, stop_ids)
    options.check("generate_batch")
    prompts, width = prompt_ids.shape
    if samples_per_prompt < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"generate_batch: samples_per_prompt and batch_size must be >= 1, got {samples_per_prompt} and {batch_size}"
        )
    if prompt_length.shape != (prompts,) or seeds.shape != (prompts * samples_per_prompt,):
        raise ValueError(
            f"generate_batch: want prompt_length [{prompts}] and seeds [{prompts * samples_per_prompt}], got "
            f"{list(prompt_length.shape)} and {list(seeds.shape)}"
        )
    shortest, longest = (int(bound) for bound in prompt_length.aminmax())
    room = context_limit(model) - max_new_tokens
    if shortest < 1 or longest > min(width, room):
        raise ValueError(
            f"generate_batch: prompts of {shortest} to {longest} tokens; want 1 to {min(width, room)} "
            f"(prompt_ids has {width} columns, the model {context_limit(model)} positions)"
        )
    owner = torch.arange(prompts).repeat_interleave(samples_per_prompt)
    return run_decoding(model, prompt_ids, prompt_length, owner, seeds, options, batch_size=batch_size)


def _budgets(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int) -> list[int]:
    """Tokens that each prompt's responses may have."""
    if max_new_tokens < 1 or samples < 1:
        raise ValueError(
            f"generate: max_new_tokens and samples_per_prompt must be >= 1, got {max_new_tokens} and {samples}"
        )
    context = context_limit(model)
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; the model takes 1 to {context - 1}")
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _shared_prefix(model: CausalLM, prompts: Sequence[Sequence[int]]) -> Any:
    """The cache of the prompts' longest common beginning, all of no prompt; None if it is short."""
    ordered = sorted(list(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # in dictionary order: what these two share, all share
    limit = min(len(prompt) for prompt in prompts) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    length = min(length, limit)
    if length < _SHARED_PREFIX:
        return None
    cache = model.new_cache(1, length, compute_dtype(model.lm_head.weight))
    model(torch.tensor([list(first[:length])], device=model.lm_head.weight.device), cache=cache)
    return cache
