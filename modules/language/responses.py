"""Hidden states and log-probabilities of responses, each prompt computed once however many responses it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.networks.causal_lm import context_limit
from modules.objectives.lm import token_log_probs, token_log_probs_and_entropy

# Responses of a prompt share a row as long as it stays this short: attention costs the square of a row's length.
_TREE_LENGTH = 1024


@dataclass(frozen=True)
class ResponseStates:
    """What a model says about given responses; N = prompts * samples per prompt, R = longest response stored.

    Attributes:
        hidden: [N, R, D], the state that predicts token t at index t; finite, but without meaning, in padding.
        logprobs: fp32 [N, R], log-probability of each token under the full softmax; 0 in padding.
        entropy: fp32 [N, R], entropy in nats of the full softmax that token t was drawn from; 0 in padding; or None.
    """

    hidden: Tensor
    logprobs: Tensor
    entropy: Tensor | None = None


def response_hidden(
    model: Any, prompt_ids: Tensor, prompt_length: Tensor, response_tokens: Tensor, response_length: Tensor
) -> Tensor:
    """Hidden states before each response token, differentiable: index t holds the state that predicts token t.

    With one response to a prompt, rows are [prompt | response]. With several, all share one row: the prompt is computed
    once and each response attends to it and to itself only ("tree" packing). Padding costs time but changes nothing.

    Args:
        model: a `CausalLM`, or what is called like one and has `config`.
        prompt_ids: int64 [P, L], right-padded; prompt_length: int64 [P], at least 1 each.
        response_tokens: int64 [P * S, R], right-padded, the S responses to a prompt together; response_length: int64
            [P * S].

    Returns: [P * S, R, D], in padding finite but without meaning.

    Raises:
        ValueError: shapes that do not fit, an empty prompt, or prompt and response longer than the model's context.
    """
    samples = _samples(prompt_ids, prompt_length, response_tokens, response_length)
    width = response_tokens.shape[1]
    if not response_tokens.numel():
        size = (*response_tokens.shape, model.config.hidden_size)
        return torch.zeros(size, device=response_tokens.device)
    whole = prompt_length.repeat_interleave(samples) + response_length
    # read together: one wait for the device
    prompt, response, longest, shortest = torch.stack(
        (prompt_length.max(), response_length.max(), whole.max(), prompt_length.min())
    ).tolist()
    if shortest < 1 or prompt > prompt_ids.shape[1] or response > width:
        raise ValueError(
            f"response_hidden: prompts of {shortest} to {prompt} tokens and responses of up to {response}; want at "
            f"least 1, at most {prompt_ids.shape[1]} and {width}"
        )
    limit = context_limit(model)
    if longest - 1 > limit:
        raise ValueError(
            f"response_hidden: prompt and response of {longest} tokens exceed the model's {limit} positions"
        )
    response = max(response, 1)
    prompt_ids, tokens = prompt_ids[:, :prompt], response_tokens[:, :response]
    if samples == 1:
        hidden = _rows(model, prompt_ids, prompt_length, tokens, max(longest - 1, prompt))
    else:
        together = _together(samples, prompt, response)
        if together < samples:
            prompt_ids = prompt_ids.repeat_interleave(samples // together, dim=0)
            prompt_length = prompt_length.repeat_interleave(samples // together)
        hidden = _tree(model, prompt_ids, prompt_length, tokens, together, limit)
    if response < width:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, width - response))
    return hidden


def response_states(
    model: Any,
    prompt_ids: Tensor,
    prompt_length: Tensor,
    response_tokens: Tensor,
    response_length: Tensor,
    *,
    with_entropy: bool = False,
    chunk_size: int | None = None,
) -> ResponseStates:
    """Hidden states, log-probabilities and, if asked for, entropies of responses, all differentiable once.

    The output head works on real response tokens only, `chunk_size` of them at a time (None: as many as make about 4 Mi
    logits). Args and Raises: see `response_hidden`.
    """
    hidden = response_hidden(model, prompt_ids, prompt_length, response_tokens, response_length)
    count, width = response_tokens.shape
    steps = torch.arange(width, device=hidden.device)
    where = (steps < response_length[:, None]).flatten().nonzero().squeeze(1)
    states = hidden.flatten(0, 1).index_select(0, where)
    labels = response_tokens.flatten()[where]
    weight = model.lm_head.weight
    entropies = None
    if with_entropy:
        logprobs, entropies = token_log_probs_and_entropy(states, weight, labels, chunk_size)
    else:
        logprobs = token_log_probs(states, weight, labels, chunk_size)

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(count * width).index_copy(0, where, values).view(count, width)

    return ResponseStates(hidden, padded(logprobs), None if entropies is None else padded(entropies))


def response_logprobs(
    model: Any,
    prompt_ids: Tensor,
    prompt_length: Tensor,
    response_tokens: Tensor,
    response_length: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities fp32 [P * S, R] of response tokens under the full softmax; see `response_states`."""
    return response_states(
        model, prompt_ids, prompt_length, response_tokens, response_length, chunk_size=chunk_size
    ).logprobs


def _samples(prompt_ids: Tensor, prompt_length: Tensor, tokens: Tensor, length: Tensor) -> int:
    """Responses per prompt."""
    prompts = len(prompt_ids)
    fits = prompt_ids.ndim == tokens.ndim == 2 and prompt_length.shape == (prompts,) and length.shape == (len(tokens),)
    if not fits or not prompts or len(tokens) % prompts:
        raise ValueError(
            "response_hidden: want prompt_ids [P, L], prompt_length [P], response_tokens [P * S, R], response_length "
            f"[P * S], got {[list(one.shape) for one in (prompt_ids, prompt_length, tokens, length)]}"
        )
    return len(tokens) // prompts


def _rows(model: Any, prompt_ids: Tensor, prompt_length: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Prompt and response side by side without a gap: plain causal attention."""
    prompt, response = prompt_ids.shape[1], tokens.shape[1]
    steps = torch.arange(length, device=tokens.device)
    start = prompt_length[:, None]
    source = torch.where(steps < start, steps, steps - start + prompt).clamp(max=prompt + response - 1)
    hidden = model(torch.cat((prompt_ids, tokens), dim=1).gather(1, source))
    at = (start - 1 + torch.arange(response, device=tokens.device)).clamp(max=length - 1)
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))


def _together(samples: int, prompt: int, response: int) -> int:
    """How many of a prompt's responses share a row: the largest divisor of `samples` that keeps the row short."""
    fitting = max(1, (_TREE_LENGTH - prompt) // max(1, response - 1))
    return max(d for d in range(1, samples + 1) if samples % d == 0 and d <= fitting)


def _tree(model: Any, prompt_ids: Tensor, prompt_length: Tensor, tokens: Tensor, samples: int, limit: int) -> Tensor:
    """One row a prompt: [prompt | response 0 | response 1 | ...], each response's last token left out."""
    prompts, width = prompt_ids.shape
    own = tokens.shape[1] - 1
    device = tokens.device
    ids = torch.cat((prompt_ids, tokens[:, :own].reshape(prompts, samples * own)), dim=1)
    step = torch.arange(own, device=device).repeat(samples)
    positions = torch.cat(
        (torch.arange(width, device=device).expand(prompts, -1), prompt_length[:, None] + step), dim=1
    )
    column = torch.arange(width, device=device)
    branch = torch.cat((torch.full_like(column, -1), torch.arange(samples, device=device).repeat_interleave(own)))
    order = torch.cat((column, step))
    same = (branch[:, None] == branch) & (order <= order[:, None])  # earlier tokens of the same part
    to_prompt = (branch[:, None] >= 0) & (branch < 0)
    real = (branch >= 0) | (order < prompt_length[:, None])  # [P, T]: prompt padding is never attended to
    # what is padding may lie beyond the last position; it is only computed, never used
    hidden = model(
        ids, position_ids=positions.clamp(max=limit - 1), attention_pattern=(same | to_prompt) & real[:, None]
    )
    size = hidden.shape[-1]
    last = hidden.gather(1, (prompt_length - 1)[:, None, None].expand(-1, -1, size))
    first = last[:, None].expand(-1, samples, -1, -1)
    return torch.cat((first, hidden[:, width:].view(prompts, samples, own, size)), dim=2).flatten(0, 1)
