"""Batched generation on our Llama: shared prompt prefixes, static cache, rows dropped when they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.language.sampling import next_tokens, sequence_seed, uniforms
from modules.networks.fused import compute_dtype
from modules.networks.llama import KVCache, Llama

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


@dataclass
class _Row:
    """One response in the making."""

    index: int
    prompt: list[int]
    budget: int
    tokens: list[int]
    logprobs: list[float]
    reason: FinishReason | None = None


@dataclass(frozen=True)
class _Stopping:
    token_ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str] | None

    def update(self, row: _Row) -> None:
        """Set the row's reason if it is finished, and cut off what lies beyond a stop string."""
        full = len(row.tokens) >= row.budget
        by_token = row.tokens[-1] in self.token_ids
        if self.strings and (full or by_token or len(row.tokens) % _TEXT_CHECK == 0):
            length = self._stop_length(row.tokens)
            if length is not None:
                del row.tokens[length:], row.logprobs[length:]
                row.reason = "stop"
                return
        if by_token:
            row.reason = "stop"
        elif full:
            row.reason = "length"

    def _stop_length(self, tokens: list[int]) -> int | None:
        """The smallest number of tokens, among those not searched before, whose text holds a stop string."""
        if self.decode is None or not self._stops(self.decode(tokens)):
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
    model: Llama,
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
    rows = _rows(model, prompts, max_new_tokens, samples_per_prompt)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: want temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if batch_size < 1:
        raise ValueError(f"generate: batch_size must be >= 1, got {batch_size}")
    if stop_strings and decode is None:
        raise ValueError("generate: stop_strings need decode, the tokenizer's function from token ids to text")
    if any(not string for string in stop_strings):
        raise ValueError("generate: a stop string is empty")
    if isinstance(seeds, int):
        seeds = [sequence_seed(seeds, row.index) for row in rows]
    if len(seeds) != len(rows):
        raise ValueError(f"generate: {len(rows)} responses need as many seeds, got {len(seeds)}")
    stopping = _Stopping(frozenset(stop_token_ids), tuple(stop_strings), decode)
    training = model.training
    model.eval()
    try:
        prefix = _shared_prefix(model, prompts) if len(prompts) > 1 else None
        # Neighbours of similar length waste the least padding; samples of one prompt stay together.
        order = sorted(
            rows, key=lambda row: (len(row.prompt), row.index // samples_per_prompt, row.index), reverse=True
        )
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            noise = uniforms([seeds[row.index] for row in batch], max_new_tokens) if temperature > 0 else None
            _run(model, batch, prefix, noise, temperature, top_p, stopping)
    finally:
        model.train(training)
    return GenerationOutput(
        [row.tokens for row in rows], [row.logprobs for row in rows], [row.reason or "length" for row in rows]
    )


def _rows(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int) -> list[_Row]:
    if max_new_tokens < 1 or samples < 1:
        raise ValueError(
            f"generate: max_new_tokens and samples_per_prompt must be >= 1, got {max_new_tokens} and {samples}"
        )
    context = model.config.max_position_embeddings
    if model.config.sliding_window is not None:
        context = min(context, model.config.sliding_window)
    rows: list[_Row] = []
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; the model takes 1 to {context - 1}")
        budget = min(max_new_tokens, context - len(prompt))
        rows.extend(_Row(i * samples + sample, list(prompt), budget, [], []) for sample in range(samples))
    return rows


def _shared_prefix(model: Llama, prompts: Sequence[Sequence[int]]) -> KVCache | None:
    """The cache of the prompts' longest common beginning, all of no prompt; None if it is short."""
    ordered = sorted(list(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # in dictionary order: what these two share, all share
    limit = min(len(prompt) for prompt in prompts) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    length = min(length, limit)
    if length < _SHARED_PREFIX:
        return None
    cache = _new_cache(model, 1, length)
    model(torch.tensor([list(first[:length])], device=cache.keys.device), cache=cache)
    return cache


def _new_cache(model: Llama, rows: int, capacity: int) -> KVCache:
    return model.new_cache(rows, capacity, compute_dtype(model.model.norm.weight))


def _prefill(model: Llama, prompts: list[list[int]], prefix: KVCache | None, capacity: int) -> tuple[KVCache, Tensor]:
    """The prompts' cache, and the logits after each prompt [B, V]."""
    shared = 0 if prefix is None else prefix.extent
    device = model.model.norm.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([prompt[shared:] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    if prefix is None:
        cache = _new_cache(model, len(prompts), capacity)
    else:
        cache = prefix.select(torch.zeros(len(prompts), dtype=torch.int64, device=device), capacity)
    hidden = model(ids, cache=cache)
    cache.set_lengths(lengths)
    return cache, model.logits(hidden[torch.arange(len(prompts), device=device), lengths - 1 - shared])


def _run(
    model: Llama,
    batch: list[_Row],
    prefix: KVCache | None,
    noise: Tensor | None,
    temperature: float,
    top_p: float,
    stopping: _Stopping,
) -> None:
    """Generate the batch's responses into its rows."""
    first_of: dict[tuple[int, ...], int] = {}
    copies = [first_of.setdefault(tuple(row.prompt), len(first_of)) for row in batch]
    capacity = max(len(row.prompt) for row in batch) + max(row.budget for row in batch)
    cache, logits = _prefill(model, [list(prompt) for prompt in first_of], prefix, capacity)
    device = logits.device
    if len(first_of) < len(batch):
        rows = torch.tensor(copies, device=device)
        cache, logits = cache.select(rows), logits[rows]
    if noise is not None:
        noise = noise.to(device)
    active = batch
    step = 0
    while True:
        tokens, logprobs = next_tokens(logits, None if noise is None else noise[:, step], temperature, top_p)
        for row, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.reason is None:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                stopping.update(row)
        step += 1
        alive = [i for i, row in enumerate(active) if row.reason is None]
        if not alive:
            return
        # Dropping rows copies the cache: do it when half of them have finished, at most log2(batch) times.
        if 2 * len(alive) <= len(active):
            keep = torch.tensor(alive, device=device)
            active = [active[i] for i in alive]
            cache, tokens = cache.select(keep), tokens[keep]
            noise = None if noise is None else noise[keep]
        logits = model.logits(model(tokens.unsqueeze(1), cache=cache)[:, 0])
