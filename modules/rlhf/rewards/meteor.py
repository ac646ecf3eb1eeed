"""METEOR: harmonic mean of unigram precision and recall, less a penalty for broken word order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.optional import require
from modules.rlhf.rewards.base import Responses, Reward
from modules.rlhf.rewards.wordnet import WordNetSynonyms

_STAGES = ("exact", "stem", "synonym")
_CACHED_STEMS = 200_000


def _take_last(hypothesis: list[tuple[int, str]], reference: list[tuple[int, str]], matches: list) -> None:
    """Match equal words from the end: a hypothesis word takes the last free reference word of its form."""
    free: dict[str, list[int]] = {}
    for place, word in reference:
        free.setdefault(word, []).append(place)
    found = [(place, places.pop()) for place, word in reversed(hypothesis) if (places := free.get(word))]
    if found:
        matches += found
        left, right = {place for place, _ in found}, {place for _, place in found}
        hypothesis[:] = [entry for entry in hypothesis if entry[0] not in left]
        reference[:] = [entry for entry in reference if entry[0] not in right]


def _take_last_synonym(
    hypothesis: list[tuple[int, str]],
    reference: list[tuple[int, str]],
    matches: list,
    synonyms: Callable[[str], Collection[str]],
) -> None:
    """As :func:`_take_last`, but the reference word need only be a synonym of the hypothesis word."""
    for entry in reversed(hypothesis.copy()):
        known = synonyms(entry[1])
        for candidate in reversed(reference):
            if candidate[1] == entry[1] or candidate[1] in known:
                matches.append((entry[0], candidate[0]))
                reference.remove(candidate)
                hypothesis.remove(entry)
                break


def align(
    hypothesis: Sequence[str],
    reference: Sequence[str],
    stem: Callable[[str], str] | None = None,
    synonyms: Callable[[str], Collection[str]] | None = None,
) -> list[tuple[int, int]]:
    """One-to-one word alignment, stage after stage: exact, stem, synonym.

    Within a stage the words are taken from the end, and later stages see what earlier ones left. As in nltk, the
    synonym stage looks the *stems* up where there is a stem stage.

    Args:
        hypothesis, reference: words, already lowercased where wanted.
        stem: ``None`` leaves the stage out.
        synonyms: ``None`` leaves the stage out.

    Returns:
        ``(place in hypothesis, place in reference)``, by place in the hypothesis.
    """
    left, right = list(enumerate(hypothesis)), list(enumerate(reference))
    matches: list[tuple[int, int]] = []
    _take_last(left, right, matches)
    if stem is not None and left and right:
        left, right = [(i, stem(word)) for i, word in left], [(i, stem(word)) for i, word in right]
        _take_last(left, right, matches)
    if synonyms is not None and left and right:
        _take_last_synonym(left, right, matches, synonyms)
    return sorted(matches)


def meteor(
    hypothesis: Sequence[str],
    reference: Sequence[str],
    stem: Callable[[str], str] | None = None,
    synonyms: Callable[[str], Collection[str]] | None = None,
    *,
    alpha: float = 0.9,
    beta: float = 3.0,
    gamma: float = 0.5,
) -> float:
    """METEOR of one hypothesis (Lavie and Agarwal 2007, section 2).

    ``F = P R / (alpha P + (1 - alpha) R)``, ``score = F (1 - gamma (chunks / matches)^beta)``, where a chunk is a run
    of matches adjacent in both texts.

    Args:
        hypothesis, reference, stem, synonyms: as for :func:`align`.
        alpha: weight of precision in the mean.
        beta: shape of the penalty.
        gamma: weight of the penalty.

    Returns:
        A number in [0, 1]; 0 where nothing matches or a text is empty.
    """
    matches = align(hypothesis, reference, stem, synonyms)
    if not matches:
        return 0.0
    precision, recall = len(matches) / len(hypothesis), len(matches) / len(reference)
    fmean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    runs = zip(matches, matches[1:], strict=False)
    chunks = 1 + sum((i + 1, j + 1) != following for (i, j), following in runs)
    return (1 - gamma * (chunks / len(matches)) ** beta) * fmean


class Meteor(Reward):
    """METEOR of the response against the human reply, in [0, 1]; the paper's first reward.

    Words are what whitespace separates. The alignment is nltk's (``single_meteor_score``), to the last digit.

    Args:
        stages: of ``exact`` (always there), ``stem`` (Porter's, as nltk extends it) and ``synonym`` (needs
            ``wordnet``), in this order.
        wordnet: folder of the WordNet 3 database files.
        alpha, beta, gamma: see :func:`meteor`.
        lowercase: compare in lower case.

    Raises:
        ValueError: unknown or repeated stage, no ``exact``, ``synonym`` without ``wordnet`` or the reverse, a constant
            out of range.
    """

    bounds = (0.0, 1.0)

    def __init__(
        self,
        stages: list[str] | None = None,
        wordnet: str | None = None,
        alpha: float = 0.9,
        beta: float = 3.0,
        gamma: float = 0.5,
        lowercase: bool = True,
    ) -> None:
        chosen = ["exact", "stem"] if stages is None else list(stages)
        if unknown := [stage for stage in chosen if stage not in _STAGES]:
            raise ValueError(f"Meteor: stages: unknown stage '{unknown[0]}', want some of {', '.join(_STAGES)}")
        if chosen != [stage for stage in _STAGES if stage in chosen] or "exact" not in chosen:
            raise ValueError(f"Meteor: stages must hold exact, and be in the order {', '.join(_STAGES)}; got {chosen}")
        if ("synonym" in chosen) != (wordnet is not None):
            raise ValueError(
                "Meteor: the stage synonym and wordnet (folder of the WordNet database files) come together: give both "
                "or neither"
            )
        if not 0 <= alpha <= 1 or not 0 <= gamma <= 1 or beta < 0:
            raise ValueError(f"Meteor: want alpha and gamma in [0, 1] and beta >= 0, got {alpha}, {gamma} and {beta}")
        self.stages, self.wordnet, self.lowercase = chosen, wordnet, lowercase
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self._stemmer: Any = None
        self._stems: dict[str, str] = {}
        self._synonyms: WordNetSynonyms | None = None
        self._ready = False

    def setup(self, tokenizer: Any = None, device: torch.device | None = None) -> None:
        """Make the stemmer and read the WordNet index.

        Raises:
            ImportError: nltk is missing.
            FileNotFoundError, ValueError: ``wordnet`` is not such a folder, or damaged.
        """
        if self._ready:
            return
        if "stem" in self.stages:
            self._stemmer = require("nltk.stem.porter", extra="rlhf").PorterStemmer()
        if self.wordnet is not None:
            self._synonyms = WordNetSynonyms(self.wordnet)
        self._ready = True

    def _stem(self, word: str) -> str:
        found = self._stems.get(word)
        if found is None:
            found = self._stemmer.stem(word)
            if len(self._stems) < _CACHED_STEMS:
                self._stems[word] = found
        return found

    def score_pair(self, response: str, reference: str) -> float:
        """Score of one response text against one reference text."""
        self.setup()
        if self.lowercase:
            response, reference = response.lower(), reference.lower()
        hypothesis, wanted = response.split(), reference.split()
        stem = self._stem if self._stemmer is not None else None
        return meteor(hypothesis, wanted, stem, self._synonyms, alpha=self.alpha, beta=self.beta, gamma=self.gamma)

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        pairs = zip(batch.texts, batch.samples, strict=True)
        return torch.tensor([self.score_pair(text, sample.reference) for text, sample in pairs], dtype=torch.float32)

    def digest(self) -> str:
        """Hash of the WordNet files, where they are used."""
        self.setup()
        return "" if self._synonyms is None else self._synonyms.digest()
