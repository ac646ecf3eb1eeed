"""Evaluation of a policy on held-out prompts: the same figures on any number of ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PromptSample
from modules.rlhf.rewards.base import Evaluation, Responses, Reward
from modules.rlhf.rollout import (
    reference_log_probabilities,
    respond,
    response_batch,
    response_seeds,
    rollout_mask,
    score_rollout,
)  # fmt: skip
from modules.rlhf.settings import GenerationSpec

_TEXTS, _TEXT_LENGTH = 8, 400
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class _Row(NamedTuple):
    """One response: what it is to, its tokens, and its scores."""

    index: int
    prompt: list[int]
    response: list[int]
    ended: bool
    scores: list[float]
    divergence: float


class ResponseEvaluator:
    """Collects sampled responses to held-out prompts, then scores them as one set.

    A response depends on its prompt's row and the base seed alone, so figures do not depend on batches or ranks.

    Args:
        rewards, evaluation, generation: as the module's.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], evaluation: Evaluation | None, generation: GenerationSpec
    ) -> None:
        self.rewards, self.evaluation, self.generation = rewards, evaluation, generation
        self.texts: list[dict[str, str]] = []
        self._tokenizer: Any = None
        self._samples: Sequence[PromptSample] = ()
        self._rows: dict[int, _Row] = {}

    def clear(self) -> None:
        """Forget what was collected."""
        self._rows.clear()

    @torch.no_grad()
    def add(
        self,
        network: Any,
        reference: AbstractContextManager[Any],
        batch: TensorDict,
        base_seed: int,
        samples: Sequence[PromptSample],
        tokenizer: Any,
    ) -> None:
        """Respond to a batch and score the responses; rows of index -1 are left out.

        ``reference`` opens the start model.
        """
        self._samples, self._tokenizer = samples, tokenizer
        batch = cast(TensorDict, batch[batch["index"] >= 0])
        if not len(batch):
            return
        numbers: Tensor = batch.get("row", batch["index"])
        seeds = response_seeds(base_seed, numbers, 1)
        rollout = respond(network, batch, seeds, self.generation, tokenizer.eod_id, 1)
        responses = response_batch(rollout, samples, tokenizer)
        score_rollout(rollout, self.rewards, responses)
        with reference as start:
            reference_log_probabilities(rollout, start, None)
        log_ratio = rollout["log_probability"] - rollout["reference_log_probability"]
        divergence = torch.where(rollout_mask(rollout), log_ratio, 0.0).double().sum((1, 2)).tolist()
        scores = rollout["scores"].squeeze(1).tolist()
        for i, (number, index) in enumerate(zip(numbers.tolist(), rollout["index"].tolist(), strict=True)):
            self._rows[number] = _Row(
                index,
                list(responses.prompt_tokens[i]),
                list(responses.response_tokens[i]),
                responses.ended[i],
                scores[i],
                divergence[i],
            )

    def figures(self, stage: str, world_size: int) -> dict[str, float]:
        """``<stage>/reward/<component>``, ``<stage>/kl`` (nats a response), ``<stage>/length`` and the evaluation's.

        Raises:
            ValueError: nothing was collected.
        """
        gathered = self._gathered(world_size)
        if not gathered:
            raise ValueError(f"ConstrainedRLHF: the {stage} data hold no prompts; check its splits")
        rows = [gathered[number] for number in sorted(gathered)]
        samples = [self._samples[row.index] for row in rows]
        responses = Responses(
            samples,
            [self._tokenizer.decode(row.response[:-1] if row.ended else row.response) for row in rows],
            [row.prompt for row in rows],
            [row.response for row in rows],
            [row.ended for row in rows],
        )
        means = torch.tensor([row.scores for row in rows], dtype=torch.float64).mean(0)
        found = {f"reward/{name}": float(value) for name, value in zip(self.rewards, means, strict=True)}
        found["kl"] = sum(row.divergence for row in rows) / len(rows)
        found["length"] = sum(len(row.response) for row in rows) / len(rows)
        if self.evaluation is not None:
            found |= self.evaluation.compute(responses)
        self.texts = [
            {
                "prompt": _clean(sample.prompt),
                "response": _clean(text),
                "reference": _clean(sample.reference),
                "scores": ", ".join(f"{name} {x:.3f}" for name, x in zip(self.rewards, row.scores, strict=True)),
            }
            for sample, text, row in zip(samples[:_TEXTS], responses.texts, rows, strict=False)
        ]
        return {f"{stage}/{key}": value for key, value in found.items()}

    def _gathered(self, world_size: int) -> dict[int, _Row]:
        if world_size == 1:
            return dict(self._rows)
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, self._rows)
        return {number: row for part in parts for number, row in part.items()}


def _clean(text: str) -> str:
    """Generated text for a log: no control characters, no more than a few lines."""
    return _CONTROL.sub(" ", text)[:_TEXT_LENGTH]
