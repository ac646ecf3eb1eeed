"""The paper's evaluation score for dialogue: likeness to human replies, and variety, over a whole set of responses."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

from modules.optional import require
from modules.rlhf.rewards.base import Evaluation, Responses
from modules.rlhf.rewards.overlap import ngrams

LEXICAL = ("sacrebleu", "rouge2", "bleu")
DIVERSITY = ("unique_3", "vocab_3", "max_length")
# Least and greatest values that the paper's authors saw over their runs, on their whole split (official code).
PAPER_CONSTANTS: dict[str, tuple[float, float]] = {
    "bleu": (0.0, 0.004677),
    "sacrebleu": (5.33e-6, 0.110634),
    "rouge2": (0.0, 0.014569),
    "max_length": (9.0, 183.0),
    "vocab_3": (41.0, 32227.0),
    "unique_3": (314.0, 36880.0),
}
_COUNTS = ("unique_3", "vocab_3")


def corpus_bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]], max_order: int = 4) -> float:
    """BLEU over a corpus with one reference each, no smoothing (Papineni et al. 2002, section 2.3).

    Args:
        hypotheses, references: words.
        max_order: longest n-gram.

    Returns:
        A number in [0, 1]; 0 where some order has no match.
    """
    matched, possible = [0] * max_order, [0] * max_order
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for order in range(1, max_order + 1):
            found = Counter(ngrams(hypothesis, order))
            matched[order - 1] += (found & Counter(ngrams(reference, order))).total()
            possible[order - 1] += found.total()
    if min(matched) == 0:
        return 0.0
    length, wanted = sum(map(len, hypotheses)), sum(map(len, references))
    brevity = 1.0 if length >= wanted else math.exp(1 - wanted / length)
    return brevity * math.exp(sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / max_order)


def words_without_punctuation(text: str) -> list[str]:
    """Lowercased words between whitespace, those left out that are nothing but ASCII punctuation."""
    return [word for word in text.lower().split() if word.strip(string.punctuation)]


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """Variety of a set of texts, punctuation left out.

    Returns:
        ``vocab_3`` distinct trigrams, ``unique_3`` trigrams that occur once, ``distinct_3`` distinct trigrams by
        trigrams, ``max_length`` and ``mean_length`` in words.
    """
    words = [words_without_punctuation(text) for text in texts]
    counts = Counter(trigram for text in words for trigram in ngrams(text, 3))
    lengths = [len(text) for text in words]
    return {
        "unique_3": float(sum(count == 1 for count in counts.values())),
        "vocab_3": float(len(counts)),
        "distinct_3": len(counts) / max(counts.total(), 1),
        "max_length": float(max(lengths, default=0)),
        "mean_length": sum(lengths) / max(len(lengths), 1),
    }


class DialogueEvaluation(Evaluation):
    """Half likeness to the human replies, half variety; the "ground truth" that rewards are overoptimised against.

    ``score = 1/2 [(sacreBLEU' + ROUGE-2' + BLEU')/3 + (unique-3' + vocab-3' + max_length')/3]``, where
    ``x' = (x - min) / (max - min)`` with constants, not clipped: the score may leave [0, 1].

    The paper's constants belong to its models and its whole split. Trigram counts grow with the number of responses,
    not in proportion: with another number give constants of your own, seen over runs with that number.

    Args:
        constants: ``{figure: [min, max]}`` for any of ``bleu``, ``sacrebleu``, ``rouge2`` (all in [0, 1]),
            ``unique_3``, ``vocab_3``, ``max_length``; the paper's for the rest.
        per: ``split``: trigrams are counted over all responses; ``response``: these counts are divided by the number of
            responses, which makes sets of similar size comparable, and needs constants of their own.
        clip: hold each ``x'`` in [0, 1].

    Raises:
        ValueError: unknown figure, constants that do not rise, or none for the counts per response.
    """

    def __init__(
        self,
        constants: dict[str, list[float]] | None = None,
        per: Literal["split", "response"] = "split",
        clip: bool = False,
    ) -> None:
        given = constants or {}
        for name, pair in given.items():
            if name not in PAPER_CONSTANTS:
                known = ", ".join(PAPER_CONSTANTS)
                raise ValueError(f"DialogueEvaluation: constants.{name}: no such figure; there are {known}")
            if len(pair) != 2 or not all(map(math.isfinite, pair)) or not pair[0] < pair[1]:
                raise ValueError(f"DialogueEvaluation: constants.{name} must be [min, max] with min < max, got {pair}")
        if per == "response" and (missing := [name for name in _COUNTS if name not in given]):
            raise ValueError(
                f"DialogueEvaluation: per: response needs constants.{missing[0]}; the paper's are per split"
            )
        self.constants = PAPER_CONSTANTS | {name: (float(low), float(high)) for name, (low, high) in given.items()}
        self.per, self.clip = per, clip
        self._sacrebleu: Any = None
        self._rouge: Any = None

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Make the metrics.

        Raises:
            ImportError: sacrebleu or rouge-score is missing.
        """
        if self._rouge is None:
            # `force` only silences its advice on text that is tokenised already, as DailyDialog is.
            self._sacrebleu = require("sacrebleu.metrics", extra="rlhf").BLEU(force=True)
            self._rouge = require("rouge_score.rouge_scorer", extra="rlhf").RougeScorer(["rouge2"], use_stemmer=False)

    def compute(self, batch: Responses) -> dict[str, float]:
        """``score``, its halves ``lexical`` and ``diversity``, and every figure before scaling.

        Raises:
            ValueError: no responses.
        """
        if len(batch) == 0:
            raise ValueError("DialogueEvaluation: no responses to evaluate")
        self.setup()
        texts, references = list(batch.texts), [sample.reference for sample in batch.samples]
        figures = {
            "bleu": corpus_bleu([text.split() for text in texts], [text.split() for text in references]),
            "sacrebleu": self._sacrebleu.corpus_score(texts, [references]).score / 100,
            "rouge2": sum(
                self._rouge.score(reference, text)["rouge2"].fmeasure
                for text, reference in zip(texts, references, strict=True)
            )
            / len(texts),
            **diversity(texts),
        }
        if self.per == "response":
            figures |= {name: figures[name] / len(texts) for name in _COUNTS}
        lexical, varied = self._half(figures, LEXICAL), self._half(figures, DIVERSITY)
        return {"score": (lexical + varied) / 2, "lexical": lexical, "diversity": varied, **figures}

    def _half(self, figures: dict[str, float], names: Sequence[str]) -> float:
        total = 0.0
        for name in names:
            low, high = self.constants[name]
            scaled = (figures[name] - low) / (high - low)
            total += min(max(scaled, 0.0), 1.0) if self.clip else scaled
        return total / len(names)
