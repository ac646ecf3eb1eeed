"""The decoding loop: prompts computed once, one token a row and step, finished rows dropped, no Python per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.language.sampling import next_tokens, uniforms
from modules.networks.fused import compute_dtype

# Given the rows still in the batch (indices of responses [B]) and their tokens so far [B, t]: bool [B], which to end.
Watch = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GeneratedBatch:
    """Responses as tensors; response p * samples_per_prompt + s is sample s of prompt p.

    Attributes:
        tokens: int64 [N, max_new_tokens], the token that ended a response included, 0 behind it.
        length: int64 [N], tokens of each response.
        ended: bool [N], whether it ended by a stop token, not by the limit.
        logprobs: fp32 [N, max_new_tokens], log-probability of each token under the model itself (temperature 1, all
            tokens); 0 behind the response.
    """

    tokens: Tensor
    length: Tensor
    ended: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are chosen and when a response ends; see `generation.generate_batch`. temperature 0: most likely."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()

    def check(self, caller: str) -> None:
        """Raise ValueError naming an option that is out of range."""
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"{caller}: want 0 <= min_new_tokens <= max_new_tokens >= 1, got {self.min_new_tokens} and "
                f"{self.max_new_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{caller}: want temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}"
            )
        if self.top_k < 0:
            raise ValueError(f"{caller}: top_k must be >= 0 (0: all tokens), got {self.top_k}")


@torch.no_grad()
def decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_length: Tensor,
    owner: Tensor,
    seeds: Tensor | list[int],
    options: DecodingOptions,
    *,
    budget: Tensor | None = None,
    batch_size: int | None = None,
    prefix: Any = None,
    watch: Watch | None = None,
    watch_every: int = 8,
) -> GeneratedBatch:
    """Responses to prompts; the model is put in evaluation mode for the time of the call.

    Args:
        model: a `CausalLM`, or anything with its `lm_head`, `logits`, `new_cache` and call.
        prompt_ids: int64 [P, L], right-padded; prompt_length: int64 [P], at least 1 each.
        owner: int64 [N], the prompt that each response answers.
        seeds: one 64-bit number per response.
        budget: int64 [N], tokens each response may have, at most max_new_tokens (default).
        batch_size: responses computed at once (default: all).
        prefix: a cache of one row with the beginning that all prompts share.
        watch: asked every `watch_every` tokens which responses to end; these count as ended by the limit.
    """
    device = model.lm_head.weight.device
    prompt_ids, prompt_length, owner = (tensor.to(device) for tensor in (prompt_ids, prompt_length, owner))
    responses = len(owner)
    noise = uniforms(seeds, options.max_new_tokens).to(device) if options.temperature > 0 else None
    shape = (responses, options.max_new_tokens)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs = torch.zeros(shape, device=device)
    limit = torch.full((responses,), options.max_new_tokens, device=device) if budget is None else budget.to(device)
    limit = limit.clone()
    size = responses if batch_size is None else batch_size
    rows = torch.arange(responses, device=device)
    if size < responses:  # neighbours of similar length waste the least padding; samples of one prompt stay together
        key = prompt_length[owner] * len(prompt_length) + owner
        rows = key.argsort(descending=True, stable=True)
    training = model.training
    model.eval()
    try:
        for part in rows.split(size):
            _decode_rows(
                model, prompt_ids, prompt_length, owner, part, noise, options, limit, budget is not None, prefix,
                (watch, watch_every), tokens, logprobs,
            )  # fmt: skip
    finally:
        model.train(training)
    return _finish(tokens, logprobs, limit, options)


def _stops(tokens: Tensor, stop_ids: Tensor | None) -> Tensor | None:
    """bool like tokens: which of them end a response; None: none can."""
    if stop_ids is None:
        return None
    return tokens == stop_ids if len(stop_ids) == 1 else torch.isin(tokens, stop_ids)


def _stop_tensor(options: DecodingOptions, device: torch.device) -> Tensor | None:
    return torch.tensor(options.stop_ids, device=device) if options.stop_ids else None


def _finish(tokens: Tensor, logprobs: Tensor, limit: Tensor, options: DecodingOptions) -> GeneratedBatch:
    """Cut what rows generated after their end, because others of their batch had not ended."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    length, ended = limit, torch.zeros_like(limit, dtype=torch.bool)
    stops = _stops(tokens, _stop_tensor(options, tokens.device))
    if stops is not None:
        first = torch.where(stops, steps, tokens.shape[1]).amin(dim=1)
        ended = first < limit
        length = torch.where(ended, first + 1, limit)
    real = steps < length[:, None]
    return GeneratedBatch(tokens * real, length, ended, logprobs.masked_fill(~real, 0.0))


def _prefill(
    model: Any, prompt_ids: Tensor, prompt_length: Tensor, owner: Tensor, budget: int, prefix: Any
) -> tuple[Any, Tensor]:
    """The responses' cache, and the logits after each one's prompt [N, V]; each prompt is computed once."""
    prompts, copies = torch.unique(owner, return_inverse=True)
    repeated = len(prompts) < len(owner)
    if not repeated:
        prompts = owner
    lengths = prompt_length[prompts]
    longest = int(lengths.max())
    ids = prompt_ids[prompts, :longest]
    capacity = longest + budget
    own = longest if repeated else capacity  # repeating copies the cache anyway, into one with room
    if prefix is None:
        shared = 0
        cache = model.new_cache(len(prompts), own, compute_dtype(model.lm_head.weight))
    else:
        shared = prefix.extent
        cache = prefix.select(torch.zeros_like(prompts), own)
    hidden = model(ids[:, shared:], cache=cache)
    cache.set_lengths(lengths)
    last = hidden[torch.arange(len(prompts), device=ids.device), lengths - 1 - shared]
    logits = model.logits(last)
    return (cache.select(copies, capacity), logits[copies]) if repeated else (cache, logits)


def _decode_rows(
    model: Any,
    prompt_ids: Tensor,
    prompt_length: Tensor,
    owner: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    options: DecodingOptions,
    limit: Tensor,
    ragged: bool,
    prefix: Any,
    watch: tuple[Watch | None, int],
    out_tokens: Tensor,
    out_logprobs: Tensor,
) -> None:
    """Generate the responses `rows` into out_tokens, out_logprobs [N, max_new_tokens]; `watch` may lower `limit`."""
    device = rows.device
    stop_ids = _stop_tensor(options, device)
    last = int(limit[rows].max()) if ragged else options.max_new_tokens
    cache, logits = _prefill(model, prompt_ids, prompt_length, owner[rows], last, prefix)
    columns = None if noise is None else noise[rows].t().contiguous()
    ends = limit[rows]
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    stored = 0  # steps written out
    pieces: list[tuple[Tensor, Tensor]] = []

    def store() -> None:
        nonlocal stored
        if pieces:
            for out, piece in ((out_tokens, [one[0] for one in pieces]), (out_logprobs, [one[1] for one in pieces])):
                out[rows, stored : stored + len(pieces)] = torch.stack(piece, dim=1)
            stored += len(pieces)
            pieces.clear()

    for step in range(last):
        uniform = None if columns is None else columns[step]
        forbidden = stop_ids if step < options.min_new_tokens else None
        chosen, logprobs = next_tokens(logits, uniform, options.temperature, options.top_p, options.top_k, forbidden)
        pieces.append((chosen, logprobs))
        if step + 1 == last:
            break
        checked = False
        if watch[0] is not None and (step + 1) % watch[1] == 0:
            store()
            stopped = alive & watch[0](rows, out_tokens[rows, : step + 1])
            limit[rows[stopped]] = step + 1
            alive = alive & ~stopped
            checked = True
        stops = _stops(chosen, stop_ids)
        if stops is not None:
            alive = alive & ~stops
        if ragged:
            alive = alive & (ends > step + 1)
        if checked or stops is not None or ragged:
            count = int(alive.sum())
            if count == 0:
                break
            # Dropping rows copies the cache: do it when half of them have finished, at most log2(batch) times.
            if 2 * count <= len(rows):
                store()
                keep = alive.nonzero().squeeze(1)
                rows, chosen, ends, alive = rows[keep], chosen[keep], ends[keep], alive[keep]
                cache = cache.select(keep)
                columns = None if columns is None else columns[:, keep]
        logits = model.logits(model(chosen.unsqueeze(1), cache=cache)[:, 0])
    store()
