"""Replies for assurance: to held-out prompts as they stand and reworded, by the trained and by the start model.

What each capability means stands in ``modules/assurance/probes/feedback.py``. Nothing of the module is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.figures import Split
from modules.assurance.subject import AssuranceError
from modules.contracts import EncodesPrompts, PromptSample, ProvidesPairs, ReplyPair
from modules.language.responses import response_logprobs, response_states
from modules.rlhf.rewards.base import Responses
from modules.rlhf.rewards.composite import score_all
from modules.rlhf.rollout import reference_log_probabilities, respond, response_batch, response_seeds, rollout_mask
from modules.rlhf.streams import response_mask
from modules.seeds import stream, stream_seed, text_seed

if TYPE_CHECKING:
    from modules.rlhf.module import ConstrainedRLHF

Reword = Callable[[str, int], Mapping[str, str]]
SEED = 20231006  # of what is the same in every suite: the start model's mean rewards
START_REPLIES = 512
STATES = 2000  # that one linear probe is fitted on
ROWS = 256  # of one forward pass
ANCHOR = 5  # one prompt in so many


def rows_of(samples: Sequence[PromptSample], split: Split) -> list[int]:
    """Rows of a finite set of prompts that belong to ``split`` (a fifth to the anchor), in an order of their own.

    Both follow from the prompts' texts: equal prompts stay together, and neighbours of one dialogue are scattered.
    """
    keys = [text_seed(sample.prompt) for sample in samples]
    rows = [row for row, key in enumerate(keys) if (key % ANCHOR == 0) == (split == "anchor")]
    return sorted(rows, key=lambda row: (keys[row], row))


def prompt_lists(data: EncodesPrompts, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts."""
    made = data.prompt_batch(prompts)
    return [row[:n] for row, n in zip(made["prompt_ids"].tolist(), made["prompt_length"].tolist(), strict=True)]


def wordings(data: EncodesPrompts, prompts: Sequence[str], seed: int, reword: Reword | None) -> dict[str, list[str]]:
    """``none``: the prompts; and for each way of ``reword`` the prompts with their last text reworded."""
    found = {"none": list(prompts)}
    for number, prompt in enumerate(prompts if reword is not None else ()):
        before, last = data.last_said(prompt)
        for name, text in cast(Reword, reword)(last, stream_seed(seed, number)).items():
            found.setdefault(name, []).append(before + data.as_prompt(text))
    return found


class HeldOutPairs:
    """Pairs of the held-out split with a better and a worse reply.

    Args:
        data: encodes prompts, and provides pairs.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.pairs: Sequence[ReplyPair] = data.pairs(data.held_out)
        self.rows = cache(lambda split: rows_of([pair.sample for pair in self.pairs], split))

    def judged(
        self,
        judge: Callable[[Responses], Tensor],
        split: Split,
        start: int,
        count: int,
        seed: int,
        reword: Reword | None,
    ) -> dict[str, Tensor]:
        """Condition -> ``[n]``: by how much ``judge`` (responses to ``[n]``) prefers the better reply."""
        pairs = [self.pairs[row] for row in self.rows(split)[start : start + count]]
        if not pairs:
            return {"none": torch.zeros(0)}
        found = {}
        for name, prompts in wordings(self.data, [pair.sample.prompt for pair in pairs], seed, reword).items():
            samples = [dataclasses.replace(p.sample, prompt=text) for p, text in zip(pairs, prompts, strict=True)]
            ids = prompt_lists(self.data, prompts)
            better, worse = (
                judge(self._responses(samples, ids, texts))
                for texts in ([pair.sample.reference for pair in pairs], [pair.rejected for pair in pairs])
            )
            found[name] = better - worse
        return found

    def _responses(self, samples: Sequence[PromptSample], ids: list[list[int]], texts: Sequence[str]) -> Responses:
        tokens = self.data.reply_tokens(texts)
        return Responses(samples, texts, ids, tokens, [row[-1:] == [self.data.tokenizer.eod_id] for row in tokens])


class ReplyTrials:
    """Replies of a module that was trained on rewards, and what it makes of given texts.

    Args:
        module: set up, with its datamodule and networks.
        coefficients: ``[components]`` float64, what each counts in the one reward.

    Raises:
        AssuranceError: data that make no batches of new prompts.
    """

    def __init__(self, module: ConstrainedRLHF, coefficients: Tensor) -> None:
        data: Any = module.data
        if not isinstance(data, EncodesPrompts):
            raise AssuranceError(
                f"ConstrainedRLHF: {type(data).__name__} makes no batches of new prompts: give it what the contract "
                "EncodesPrompts asks for"
            )
        self.module, self.data, self.tokenizer = module, data, data.tokenizer
        self.names, self.coefficients = list(module.problem.names), coefficients
        self.samples = data.samples(data.held_out)
        self.rows = cache(lambda split: rows_of(self.samples, split))

    # -- prompts and replies ------------------------------------------------------------------------------------------
    def prompts(self, split: Split, start: int, count: int, seed: int) -> list[PromptSample]:
        """``count`` held-out prompts from number ``start`` on; fewer where they end."""
        if self.data.endless:
            drawn = torch.randint(len(self.samples), (count,), generator=stream(seed, 1))
            return [self.samples[row] for row in drawn.tolist()]
        return [self.samples[row] for row in self.rows(split)[start : start + count]]

    @contextmanager
    def policy(self, trained: bool = True) -> Iterator[Any]:
        if trained:
            yield self.module.network
            return
        with self.module._reference_policy() as network:
            yield network

    def batch(self, texts: Sequence[str]) -> TensorDict:
        """Prompts as the loaders give them, numbered in their order."""
        made = self.data.prompt_batch(texts)
        made["index"] = torch.arange(len(texts))
        return cast(TensorDict, made.to(self.module.device))

    def reply(
        self, samples: Sequence[PromptSample], seeds: Tensor, texts: Sequence[str] | None = None, trained: bool = True
    ) -> tuple[TensorDict, Responses]:
        """Replies as rollout and as rewards take them.

        ``texts``: read in place of the samples' prompts; rewards judge what was really asked.
        """
        read = [sample.prompt for sample in samples] if texts is None else texts
        with self.policy(trained) as network:
            rollout = respond(network, self.batch(read), seeds, self.module.generation, self.tokenizer.eod_id, 1)
        made = response_batch(rollout, samples, self.tokenizer)
        if texts is not None:
            made = dataclasses.replace(made, prompt_tokens=prompt_lists(self.data, [one.prompt for one in samples]))
        return rollout, made

    def rewards(self, responses: Responses) -> Tensor:
        """``[n, components]`` float64."""
        return score_all(self.module.reward_functions, responses).double()

    def reward(self, responses: Responses) -> Tensor:
        """All components as one, ``[n]``."""
        return self.rewards(responses) @ self.coefficients

    @staticmethod
    def seeds(seed: int, start: int, count: int) -> Tensor:
        return response_seeds(seed, torch.arange(start, start + count), 1)

    def log_probabilities(self, rollout: TensorDict, trained: bool) -> Tensor:
        """``[P, 1, R]`` of replies, by one way of computing for both models: equal models are exactly 0 apart."""
        with self.policy(trained) as network:
            copied = rollout.copy()
            reference_log_probabilities(copied, network, ROWS)
        return cast(Tensor, copied["reference_log_probability"])

    @cached_property
    def start_means(self) -> Tensor:
        """``[components]``: mean rewards of the start model, on prompts that are always the same."""
        samples = self.prompts("fresh", 0, START_REPLIES, SEED)
        if not samples:
            raise AssuranceError("ConstrainedRLHF: the data hold no held-out prompts: check their splits")
        seeds, parts = self.seeds(SEED, 0, len(samples)), []
        for first in range(0, len(samples), ROWS):
            rows = slice(first, first + ROWS)
            parts.append(self.rewards(self.reply(samples[rows], seeds[rows], trained=False)[1]))
        return torch.cat(parts).mean(0)

    def replies(self, split: Split, start: int, count: int, seed: int) -> dict[str, Any]:
        samples = self.prompts(split, start, count, seed)
        if not samples:
            nothing = torch.zeros(0, dtype=torch.float64)
            each = dict.fromkeys(self.names, nothing)
            return {"rewards": each, "parts": each, "divergence": nothing, "length": nothing, "texts": []}
        rollout, responses = self.reply(samples, self.seeds(seed, start, len(samples)))
        scores = self.rewards(responses)
        log_ratio = self.log_probabilities(rollout, True) - self.log_probabilities(rollout, False)
        parts = self.coefficients * (scores - self.start_means)
        return {
            "rewards": dict(zip(self.names, scores.unbind(1), strict=True)),
            "parts": dict(zip(self.names, parts.unbind(1), strict=True)),
            "divergence": torch.where(rollout_mask(rollout), log_ratio, 0.0).double().sum((1, 2)),
            "length": rollout["length"].squeeze(1),
            "texts": list(responses.texts) if self.data.natural_language else None,
        }

    def score_of_sets(self, split: Split, start: int, count: int, size: int, seed: int) -> dict[str, Tensor]:
        samples = self.prompts(split, start * size, count * size, seed)
        samples = samples[: len(samples) // size * size]
        found: dict[str, list[float]] = {"trained": [], "start": []}
        for which, scores in found.items():
            if samples:
                seeds = self.seeds(seed, start * size, len(samples))
                _, responses = self.reply(samples, seeds, trained=which == "trained")
                for first in range(0, len(samples), size):
                    whole = _part(responses, slice(first, first + size))
                    scores.append(self.module.evaluation.compute(whole)["score"])  # type: ignore[union-attr]
        return {which: torch.tensor(scores, dtype=torch.float64) for which, scores in found.items()}

    def reworded_rewards(self, split: Split, start: int, count: int, seed: int, reword: Reword) -> dict[str, Tensor]:
        samples = self.prompts(split, start, count, seed)
        if not samples:
            return {"none": torch.zeros(0)}
        seeds = self.seeds(seed, start, len(samples))  # the same for all wordings
        texts = wordings(self.data, [one.prompt for one in samples], seed, reword)
        return {name: self.reward(self.reply(samples, seeds, read)[1]) for name, read in texts.items()}

    # -- what the rewards are worth -----------------------------------------------------------------------------------
    def judged_pairs(self, split: Split, start: int, count: int, seed: int, reword: Reword | None) -> dict[str, Tensor]:
        """Pairs of the data, by the learnt rewards alone, where there are such; else see :meth:`_by_score`."""
        learnt = torch.tensor([one.learnt for one in self.module.reward_functions.values()], dtype=torch.float64)
        if not learnt.any():
            return self._by_score(split, start, count, seed)

        def judge(responses: Responses) -> Tensor:
            return self.rewards(responses) @ (self.coefficients * learnt)

        return self._pairs.judged(judge, split, start, count, seed, reword)

    @cached_property
    def _pairs(self) -> HeldOutPairs:
        return HeldOutPairs(cast(ProvidesPairs, self.data))

    def _by_score(self, split: Split, start: int, count: int, seed: int) -> dict[str, Tensor]:
        """Pairs of replies to one prompt, ordered by the held-out score. The shift is the policy's own: from the start
        model's replies to the trained one's."""
        samples = [one for one in self.prompts(split, start, count, seed) for _ in range(2)]
        found: dict[str, Tensor] = {name: torch.zeros(0) for name in ("start", "trained")}
        seeds = response_seeds(seed, torch.arange(start, start + len(samples) // 2), 2)
        for which in found if samples else ():
            _, responses = self.reply(samples, seeds, trained=which == "trained")
            score = cast(Tensor, self.module.evaluation.each(responses))  # type: ignore[union-attr]
            one, other = (_steps(values.view(-1, 2)) for values in (self.reward(responses), score))
            found[which] = one * other
        return found

    # -- states and given texts ---------------------------------------------------------------------------------------
    def labelled_states(self, split: Split, start: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor] | str:
        """Hidden states along the human replies (along its own where there are none); concept: the label ``act``, or
        the first one there is; type: the token that was read last."""
        samples = self.prompts(split, start, count, seed)
        labels = {key for one in samples for key in one.labels}
        if not labels:
            return "the prompts have no labels"
        key = "act" if "act" in labels else min(labels)
        batch = self.batch([one.prompt for one in samples])
        if all(one.reference for one in samples):
            lists = self.data.reply_tokens([one.reference for one in samples])
            length = torch.tensor([len(row) for row in lists])
            tokens = torch.tensor([row + [0] * (int(length.max()) - len(row)) for row in lists])
        else:
            rollout, _ = self.reply(samples, self.seeds(seed, start, len(samples)))
            tokens, length = rollout["tokens"].squeeze(1), rollout["length"].squeeze(1)
        tokens, length = tokens.to(self.module.device), length.to(self.module.device)
        hidden = response_states(
            self.module.network, batch["prompt_ids"], batch["prompt_length"], tokens, length
        ).hidden
        last = batch["prompt_ids"].gather(1, batch["prompt_length"][:, None] - 1)
        types = torch.cat([last, tokens[:, :-1]], 1)
        concept = torch.tensor([int(one.labels[key]) for one in samples]).to(types)[:, None].expand_as(types)
        mask = response_mask(length, tokens.shape[1])
        kept = torch.randperm(int(mask.sum()), generator=stream(seed, 2))[:STATES].to(types.device)
        return hidden[mask][kept].float(), concept[mask][kept], types[mask][kept]

    def replies_to(self, texts: Sequence[str], seed: int) -> list[str]:
        samples = [PromptSample(self.data.as_prompt(text)) for text in texts]
        return list(self.reply(samples, self.seeds(seed, 0, len(samples)))[1].texts)

    def continuations_after(self, pairs: Sequence[tuple[str, str]], continuations: Sequence[str]) -> Tensor:
        columns = [
            prompt_lists(self.data, [self.data.as_prompt(pair[side], False) for pair in pairs]) for side in (0, 1)
        ]
        alike = torch.tensor([one == other for one, other in zip(*columns, strict=True)])
        ends = [self.data.tokenizer.encode(f" {self.data.as_prompt(text, False)}") for text in continuations]
        found = []
        for prompts in columns:
            parts = []
            for first in range(0, len(prompts), ROWS):
                rows = slice(first, first + ROWS)
                values = [_padded(lists[rows], self.module.device) for lists in (prompts, ends)]
                parts.append(response_logprobs(self.module.network, *values[0], *values[1]).double().sum(1).cpu())
            found.append(torch.cat(parts))
        return torch.where(alike[:, None], torch.nan, torch.stack(found, 1))


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 ``[n, longest]``, padded on the right, and lengths ``[n]``."""
    length = torch.tensor([len(row) for row in lists])
    longest = int(length.max())
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in lists], device=device), length.to(device)


def _part(responses: Responses, rows: slice) -> Responses:
    """Some of the responses."""
    return Responses(*(list(getattr(responses, one.name))[rows] for one in dataclasses.fields(responses)))


def _steps(pairs: Tensor) -> Tensor:
    """Of ``[n, 2]``: the sign of the first less the second, equal up to rounding counting as equal."""
    apart = pairs[:, 0] - pairs[:, 1]
    return torch.where(apart.abs() > 1e-6, apart.sign(), 0.0).double()
