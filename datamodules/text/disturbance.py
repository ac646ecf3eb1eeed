"""Training windows whose text is disturbed: typing slips, other case, a sentence in front, and the like.

Which windows are disturbed, and how, is a pure function of the shuffle seed, the source and the item's number: the same
on every rank, for every split of a batch, and after every resume. A larger share disturbs the same windows and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.text.mixture import check_weights
from modules.contracts.corpora import Disturbance
from modules.seeds import text_seed

_UNIT = float(1 << 56)  # of `text_seed`
_BROKEN = "\ufffd"  # what half a character at a window's edge decodes to


class Disturber:
    """Disturbs a share of the windows of a training stream.

    Args:
        share: of the windows, in (0, 1].
        ways: name -> what is done to a text; a window gets one of them.
        tokenizer: ``encode``, ``decode``, ``eod_id``.
        seed: the stream's.
        weights: name -> weight among the disturbed windows, any scale; empty: all ways alike. A way that it leaves out
            is not used.

    Raises:
        ValueError: a share outside (0, 1], no ways, an unknown way, a weight that is not a finite number > 0.
    """

    def __init__(
        self,
        share: float,
        ways: Mapping[str, Disturbance],
        tokenizer: Any,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not 0 < share <= 1 or not ways:
            raise ValueError(
                f"Disturber: want a share in (0, 1] and at least one way, got {share} and {len(ways)} ways"
            )
        self.share, self.ways, self.seed = share, dict(sorted(ways.items())), seed
        weights = dict(weights or dict.fromkeys(ways, 1.0))
        if unknown := sorted(set(weights) - set(ways)):
            raise ValueError(f"perturbations: unknown way {unknown[0]!r}; known: {', '.join(self.ways)}")
        check_weights(weights, "perturbations: weight of")
        self._names, self._tokenizer = sorted(weights), tokenizer
        self._ends = np.cumsum([weights[name] for name in self._names]) / math.fsum(weights.values())

    def way_of(self, source: str, item: int) -> str | None:
        """What is done to an item; None: nothing."""
        if text_seed(f"disturbed {self.seed} {source} {item}") / _UNIT >= self.share:
            return None
        place = text_seed(f"way {self.seed} {source} {item}") / _UNIT
        return self._names[min(int(np.searchsorted(self._ends, place, side="right")), len(self._names) - 1)]

    def __call__(self, tokens: np.ndarray, ids: np.ndarray | None, sources: Sequence[str], items: np.ndarray) -> None:
        """Disturb rows in place.

        Args:
            tokens: int64 ``[n, T + 1]``.
            ids: int32 ``[n, T + 1]``, documents of each row counted from 0, or None.
            sources: name of each row's source.
            items: int64 ``[n]``, each row's item.
        """
        for row, (source, item) in enumerate(zip(sources, items.tolist(), strict=True)):
            name = self.way_of(source, item)
            if name is None:
                continue
            tokens[row] = self._disturbed(tokens[row], name, f"text {self.seed} {source} {item}")
            if ids is not None:
                ends = tokens[row] == self._tokenizer.eod_id
                ids[row] = np.cumsum(ends) - ends  # an end belongs to the document that it ends

    def _disturbed(self, window: np.ndarray, name: str, key: str) -> np.ndarray:
        """Its documents disturbed one by one; cut at its length, or filled up to it with its own beginning."""
        eod, way = self._tokenizer.eod_id, self.ways[name]
        edges = [-1, *np.flatnonzero(window == eod).tolist(), window.size]
        new: list[int] = []
        for number, (before, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            text = self._tokenizer.decode(window[before + 1 : end]).strip(_BROKEN)
            if text:
                new += self._tokenizer.encode(way(text, text_seed(f"{key} {number}")))
            if end < window.size:
                new.append(eod)
            if len(new) >= window.size:
                break
        return np.concatenate([np.array([*new, eod], dtype=np.int64), window])[: window.size]
