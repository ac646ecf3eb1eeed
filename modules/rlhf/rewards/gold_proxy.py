"""GoldProxy: two proxy rewards with a known gold score, which each proxy overoptimises.

Tokens ``0 .. content - 1`` are content, the next ``markers * acts`` are markers, ``markers`` of them an act. A prompt
has an act (label ``act``) and a first token; a response is a few tokens long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.rlhf.rewards.base import Evaluation, Responses, Reward


def _tokens(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` with -1 behind the end, and lengths ``[B]``."""
    lengths = [len(row) for row in rows]
    width = max(lengths, default=0)
    if min(lengths, default=0) < width:
        rows = [[*row, *[-1] * (width - len(row))] for row in rows]
    ids = torch.tensor(rows, dtype=torch.int64).reshape(len(lengths), width)
    return ids, torch.tensor(lengths, dtype=torch.int64)


def _content_share(ids: Tensor, lengths: Tensor, content: int) -> Tensor:
    return ((ids >= 0) & (ids < content)).sum(-1) / lengths.clamp(min=1)


def _marker_count(ids: Tensor, batch: Responses, content: int, markers: int) -> Tensor:
    for index, sample in enumerate(batch.samples):
        if "act" not in sample.labels:
            raise ValueError(f"MarkerSaturation: sample {index} has no label 'act' (prompt {sample.prompt[:60]!r})")
    first = content + markers * torch.tensor([int(sample.labels["act"]) for sample in batch.samples])[:, None]
    return ((ids >= first) & (ids < first + markers)).sum(-1)


class ContentShare(Reward):
    """Share of content tokens in the response, in [0, 1].

    Args:
        content: number of content tokens, the first ids.
    """

    bounds = (0.0, 1.0)

    def __init__(self, content: int = 12) -> None:
        self.content = content

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``."""
        ids, lengths = _tokens(batch.response_tokens)
        return _content_share(ids, lengths, self.content)


class MarkerSaturation(Reward):
    """``1 - exp(-m)``, where ``m`` counts the response's markers of the prompt's act; in [0, 1].

    Args:
        content: number of content tokens; markers follow them.
        markers: marker tokens of each act.
    """

    bounds = (0.0, 1.0)

    def __init__(self, content: int = 12, markers: int = 3) -> None:
        self.content, self.markers = content, markers

    def score(self, batch: Responses) -> Tensor:
        """Scores float32 ``[B]``.

        Raises:
            ValueError: a sample without the label ``act``.
        """
        ids, _ = _tokens(batch.response_tokens)
        return 1 - torch.exp(-_marker_count(ids, batch, self.content, self.markers).float())


class GoldScore(Evaluation):
    """The score that the proxies stand for.

    ``1/2 mean[(min(r_1 / enough, 1) + 1[m = 1] + 1 - rep) / 3] + 1/2 distinct-3``: enough content, one marker of the
    act, little repetition (``rep``: share of equal neighbours in the sorted response), and variety over all
    responses (distinct trigrams by trigrams). Distinct-3 falls with the number of responses: compare equal numbers.

    Args:
        content: number of content tokens.
        markers: marker tokens of each act.
        enough: content share beyond which more is no better.
    """

    def __init__(self, content: int = 12, markers: int = 3, enough: float = 0.4) -> None:
        if enough <= 0:
            raise ValueError(f"GoldScore: enough must be above 0, got {enough}")
        self.content, self.markers, self.enough = content, markers, enough

    def compute(self, batch: Responses) -> dict[str, float]:
        """``score`` and its parts: ``quality``, ``distinct_3``, ``content_share``, ``one_marker``, ``repetition``."""
        if len(batch) == 0:
            raise ValueError("GoldScore: no responses to evaluate")
        ids, _ = _tokens(batch.response_tokens)
        content, one, repetition = self._parts(batch)
        quality = float(self._quality(content, one, repetition).mean())
        distinct = 0.0
        if ids.shape[1] >= 3:
            trigrams = ids.unfold(1, 3, 1).reshape(-1, 3)
            trigrams = trigrams[trigrams[:, 2] >= 0]
            distinct = len(trigrams.unique(dim=0)) / max(len(trigrams), 1)
        return {
            "score": (quality + distinct) / 2,
            "quality": quality,
            "distinct_3": distinct,
            "content_share": float(content.mean()),
            "one_marker": float(one.mean()),
            "repetition": float(repetition.mean()),
        }

    def each(self, batch: Responses) -> Tensor:
        """``quality`` of every response, float64 ``[B]``."""
        return self._quality(*self._parts(batch)).double()

    def _parts(self, batch: Responses) -> tuple[Tensor, Tensor, Tensor]:
        """Content share, whether there is one marker, and repetition, each ``[B]``."""
        ids, lengths = _tokens(batch.response_tokens)
        one = (_marker_count(ids, batch, self.content, self.markers) == 1).float()
        ordered = ids.sort(-1).values
        equal = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(-1)
        return _content_share(ids, lengths, self.content), one, equal / (lengths - 1).clamp(min=1)

    def _quality(self, content: Tensor, one: Tensor, repetition: Tensor) -> Tensor:
        return ((content / self.enough).clamp(max=1) + one + 1 - repetition) / 3
