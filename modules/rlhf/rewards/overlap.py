"""Rewards counted on words: overlap with the human reply, length, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from modules.optional import require
from modules.rlhf.rewards.base import Responses, Reward

Smoothing = Literal["none", "exp", "floor", "add-k"]


def ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    """Runs of ``order`` neighbouring words, in order; empty for a text that is too short."""
    return list(zip(*(words[start:] for start in range(order)), strict=False))


class _WordReward(Reward):
    """A reward of (response text, reference text), in [0, 1]."""

    bounds = (0.0, 1.0)

    def score_pair(self, response: str, reference: str) -> float:
        """Score of one response against one reference."""
        raise NotImplementedError

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        pairs = zip(batch.texts, batch.samples, strict=True)
        return torch.tensor([self.score_pair(text, sample.reference) for text, sample in pairs], dtype=torch.float32)


class _SacrebleuReward(_WordReward):
    def __init__(
        self, tokenize: str, smoothing: Smoothing, max_order: int, lowercase: bool, effective_order: bool
    ) -> None:
        if max_order < 1:
            raise ValueError(f"{type(self).__name__}: max_order must be at least 1, got {max_order}")
        self._settings: dict[str, Any] = {
            "tokenize": tokenize, "smooth_method": smoothing, "max_ngram_order": max_order, "lowercase": lowercase,
            "effective_order": effective_order, "force": True,
        }  # fmt: skip
        self._metric: Any = None

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Make the metric.

        Raises:
            ImportError: sacrebleu is missing.
        """
        if self._metric is None:
            self._metric = require("sacrebleu.metrics", extra="rlhf").BLEU(**self._settings)

    def score_pair(self, response: str, reference: str) -> float:
        self.setup()
        # Not `sentence_score`: it logs advice on every call where orders without a match count.
        return min(self._metric.corpus_score([response], [[reference]]).score / 100, 1.0)


class Bleu(_SacrebleuReward):
    """BLEU of each response by itself, words split at whitespace (Papineni et al. 2002); the paper code's third reward.

    Without smoothing it is 0 for most short responses: one without a common 4-gram.

    Args:
        max_order: longest n-gram.
        smoothing: of sacrebleu, for orders without a match.
        lowercase: compare in lower case.

    Raises:
        ValueError: max_order below 1.
    """

    def __init__(self, max_order: int = 4, smoothing: Smoothing = "none", lowercase: bool = False) -> None:
        super().__init__("none", smoothing, max_order, lowercase, effective_order=False)


class SacreBleu(_SacrebleuReward):
    """sacreBLEU of each response by itself, divided by 100 (Post 2018).

    Args:
        tokenize: a tokenizer of sacrebleu.
        smoothing: of sacrebleu, for orders without a match.
        effective_order: leave out orders that the response is too short for, as sacrebleu advises for sentences.
        lowercase: compare in lower case.
    """

    def __init__(
        self,
        tokenize: Literal["13a", "none", "intl", "char", "zh"] = "13a",
        smoothing: Smoothing = "exp",
        effective_order: bool = True,
        lowercase: bool = False,
    ) -> None:
        super().__init__(tokenize, smoothing, 4, lowercase, effective_order)


class Rouge(_WordReward):
    """ROUGE of the response against the human reply, by ``rouge_score`` (Lin 2004).

    Args:
        rouge_type: n-grams of one or two words, or the longest common subsequence.
        measure: of precision, recall and their harmonic mean.
        stemmer: compare Porter stems (of words longer than three letters).
    """

    def __init__(
        self,
        rouge_type: Literal["rouge1", "rouge2", "rougeL"] = "rouge2",
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
        stemmer: bool = False,
    ) -> None:
        self.rouge_type, self.measure, self.stemmer = rouge_type, measure, stemmer
        self._scorer: Any = None

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Make the scorer.

        Raises:
            ImportError: rouge-score is missing.
        """
        if self._scorer is None:
            scorers = require("rouge_score.rouge_scorer", extra="rlhf")
            self._scorer = scorers.RougeScorer([self.rouge_type], use_stemmer=self.stemmer)

    def score_pair(self, response: str, reference: str) -> float:
        self.setup()
        return float(getattr(self._scorer.score(reference, response)[self.rouge_type], self.measure))


class ResponseLength(Reward):
    """1 for a length within the wanted range, falling linearly to 0 outside it.

    A length ``n`` below ``minimum`` scores ``n / minimum``, above ``maximum`` ``max(0, 2 - n / maximum)``.

    Args:
        target: the one wanted length; or
        minimum, maximum: the range, either end open.
        unit: words between whitespace, or tokens without the one that ends the response.

    Raises:
        ValueError: target together with a range, neither, a length below 1, or minimum above maximum.
    """

    bounds = (0.0, 1.0)

    def __init__(
        self,
        target: int | None = None,
        minimum: int | None = None,
        maximum: int | None = None,
        unit: Literal["words", "tokens"] = "words",
    ) -> None:
        if (target is None) == (minimum is None and maximum is None):
            raise ValueError("ResponseLength: give target, or minimum and/or maximum")
        low, high = (minimum, maximum) if target is None else (target, target)
        if any(value is not None and value < 1 for value in (low, high)):
            raise ValueError(f"ResponseLength: lengths must be at least 1, got {low} and {high}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"ResponseLength: minimum {low} is above maximum {high}")
        self.minimum, self.maximum, self.unit = low, high, unit

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        if self.unit == "words":
            lengths = [len(text.split()) for text in batch.texts]
        else:
            lengths = [len(ids) - bool(end) for ids, end in zip(batch.response_tokens, batch.ended, strict=True)]
        length = torch.tensor(lengths, dtype=torch.float32)
        score = torch.ones_like(length)
        if self.minimum is not None:
            score = torch.minimum(score, length / self.minimum)
        if self.maximum is not None:
            score = torch.minimum(score, (2 - length / self.maximum).clamp(min=0))
        return score


def _distinct(text: str, order: int) -> tuple[int, int]:
    found = ngrams(text.split(), order)
    return len(set(found)), len(found)


class Repetition(Reward):
    """Minus the share of n-grams that the response already held; 0 for a response shorter than one.

    Args:
        order: words in an n-gram, at least 1.
    """

    bounds = (-1.0, 0.0)

    def __init__(self, order: int = 3) -> None:
        if order < 1:
            raise ValueError(f"Repetition: order must be at least 1, got {order}")
        self.order = order

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        counts = [_distinct(text, self.order) for text in batch.texts]
        return torch.tensor([(distinct - total) / max(total, 1) for distinct, total in counts], dtype=torch.float32)


class DistinctNgrams(Reward):
    """Distinct n-grams of the response by all its n-grams (Li et al. 2016); 0 for a response shorter than one.

    Args:
        order: words in an n-gram, at least 1.
    """

    bounds = (0.0, 1.0)

    def __init__(self, order: int = 2) -> None:
        if order < 1:
            raise ValueError(f"DistinctNgrams: order must be at least 1, got {order}")
        self.order = order

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        counts = [_distinct(text, self.order) for text in batch.texts]
        return torch.tensor([distinct / max(total, 1) for distinct, total in counts], dtype=torch.float32)
