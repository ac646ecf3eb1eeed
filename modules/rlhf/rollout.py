"""Rollouts: responses to a batch of prompts, their scores, and their log-probabilities under policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PromptSample
from modules.language.generation import generate_batch
from modules.language.responses import response_states
from modules.language.sampling import sequence_seed
from modules.rlhf.rewards.base import Responses, Reward
from modules.rlhf.rewards.composite import score_all
from modules.rlhf.settings import GenerationSpec
from modules.rlhf.streams import response_mask


class NonFiniteError(RuntimeError):
    """Log-probabilities or a loss stopped being numbers."""


class _Texts(Sequence[str]):
    """Responses decoded when they are read: rewards of token ids alone pay for no text."""

    def __init__(self, tokens: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._tokens, self._decode = tokens, decode
        self._known: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._known:
            self._known[index] = self._decode(self._tokens[index])
        return self._known[index]

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def response_seeds(base: int, rows: Tensor, samples: int) -> Tensor:
    """Seeds int64 ``[P * samples]`` of the responses to prompts whose global rows are ``rows`` ``[P]``.

    They depend on the row and ``base`` alone, so that any number of ranks draws the same responses.
    """
    seeds = [
        sequence_seed(base, int(row) * samples + sample) & ((1 << 63) - 1)
        for row in rows.tolist()
        for sample in range(samples)
    ]
    return torch.from_numpy(np.array(seeds, dtype=np.int64))


def respond(
    network: Any,
    batch: TensorDict,
    seeds: Tensor,
    spec: GenerationSpec,
    eod_id: int,
    samples: int,
) -> TensorDict:
    """Responses to ``batch`` (contract ``ProvidesPrompts``), as a TensorDict ``[P]``.

    Keys: ``prompt_ids`` ``[P, L]``, ``prompt_length`` ``[P]``, ``index`` ``[P]``, ``tokens`` ``[P, S, R]`` (0 in
    padding), ``length`` ``[P, S]``, ``ended`` ``[P, S]``, ``log_probability`` ``[P, S, R]`` under the full softmax.

    Raises:
        ValueError: a prompt without tokens, or too long for the model.
        NonFiniteError: log-probabilities that are no numbers, naming the row.
    """
    lengths: Tensor = batch["prompt_length"]
    if bool((lengths < 1).any()):
        row = int((lengths < 1).nonzero()[0])
        raise ValueError(
            f"ConstrainedRLHF: the prompt at index {int(batch['index'][row])} has no tokens; leave empty prompts out"
        )
    limit = network.config.max_position_embeddings
    longest = int(lengths.max())
    if longest + spec.max_new > limit:
        raise ValueError(
            f"ConstrainedRLHF: a prompt of {longest} tokens and generation.max_new {spec.max_new} exceed the model's "
            f"{limit} positions; shorten one"
        )
    made = generate_batch(
        network,
        batch["prompt_ids"],
        lengths,
        seeds=seeds,
        max_new_tokens=spec.max_new,
        min_new_tokens=spec.min_new,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        eod_id=eod_id,
        samples_per_prompt=samples,
        batch_size=spec.batch_size,
    )
    prompts = len(lengths)
    steps = int(made.length.max())
    shape = (prompts, samples)
    rollout = TensorDict(
        {
            "prompt_ids": batch["prompt_ids"],
            "prompt_length": lengths,
            "index": batch["index"],
            "tokens": made.tokens[:, :steps].unflatten(0, shape),
            "length": made.length.unflatten(0, shape),
            "ended": made.ended.unflatten(0, shape),
            "log_probability": made.logprobs[:, :steps].unflatten(0, shape).float(),
        },
        batch_size=[prompts],
    )
    check_finite(rollout, "log_probability", "the policy's")
    return rollout


def check_finite(rollout: TensorDict, key: str, whose: str) -> None:
    """Refuse log-probabilities ``[P, S, R]`` that are no numbers.

    Raises:
        NonFiniteError: naming the first row.
    """
    finite = torch.isfinite(cast(Tensor, rollout[key]))
    bad = ~finite.flatten(1).all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"ConstrainedRLHF: {whose} log-probabilities of row {row} of the batch (prompt index "
            f"{int(rollout['index'][row])}) are not finite; resume from the last checkpoint with a lower lr"
        )


def response_batch(rollout: TensorDict, samples: Sequence[PromptSample], tokenizer: Any) -> Responses:
    """The responses as rewards take them, ``P * S`` entries, on the host."""
    host: dict[str, Tensor] = {
        key: rollout[key].cpu() for key in ("index", "prompt_ids", "prompt_length", "tokens", "length", "ended")
    }
    group = host["length"].shape[1]
    indices: list[int] = host["index"].tolist()
    prompt_lengths = host["prompt_length"].tolist()
    prompts = [row[:n] for row, n in zip(host["prompt_ids"].tolist(), prompt_lengths, strict=True)]
    lengths = host["length"].flatten().tolist()
    responses = [row[:n] for row, n in zip(host["tokens"].flatten(0, 1).tolist(), lengths, strict=True)]
    ended: list[bool] = host["ended"].flatten().tolist()
    spoken = [row[:-1] if over else row for row, over in zip(responses, ended, strict=True)]
    return Responses(
        [samples[i] for i in indices for _ in range(group)],
        _Texts(spoken, tokenizer.decode),
        [prompt for prompt in prompts for _ in range(group)],
        responses,
        ended,
    )


def score_rollout(rollout: TensorDict, rewards: Mapping[str, Reward], batch: Responses) -> None:
    """Add ``scores`` float32 ``[P, S, N]``, the components in their order."""
    shape = rollout["length"].shape
    scores = score_all(rewards, batch)
    rollout["scores"] = scores.to(rollout["log_probability"]).unflatten(0, tuple(shape))


@torch.no_grad()
def reference_log_probabilities(rollout: TensorDict, reference: Any, micro_batch: int | None) -> None:
    """Add ``reference_log_probability`` ``[P, S, R]``, under ``reference``, ``micro_batch`` responses at a time."""
    parts = [response_states(reference, *response_rows(part)).logprobs for part in groups(rollout, micro_batch)]
    shape = rollout["tokens"].shape
    rollout["reference_log_probability"] = torch.cat(parts).view(shape)
    check_finite(rollout, "reference_log_probability", "the reference's")


def response_rows(rollout: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``response_states`` takes: prompts and their lengths ``[P]``, responses and theirs ``[P * S]``."""
    tokens, length = cast(Tensor, rollout["tokens"]), cast(Tensor, rollout["length"])
    return rollout["prompt_ids"], rollout["prompt_length"], tokens.flatten(0, 1), length.flatten()


def groups(rollout: TensorDict, responses: int | None) -> list[TensorDict]:
    """Parts of ``rollout`` of whole prompts, at most ``responses`` responses each (at least one prompt)."""
    if responses is None:
        return [rollout]
    size = max(1, responses // rollout["length"].shape[1])
    return list(rollout.split(size))


def rollout_mask(rollout: TensorDict) -> Tensor:
    """bool ``[P, S, R]``: tokens that are no padding."""
    return response_mask(rollout["length"], rollout["tokens"].shape[-1])
