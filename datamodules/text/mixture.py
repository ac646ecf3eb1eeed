"""Deterministic blending of sources by weight, without a random draw.

For output index i (from 0), normalised weights w and counts c, the next item comes from
``argmax_d w_d * max(i, 1) - c_d``, the lowest d among equals (Azerbayev et al. 2024 via GPT-NeoX's blended dataset).
The stream's whole state is (i, c): resuming costs nothing and holds O(sources) memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


class Blend:
    """The blended stream, from any point on.

    Args:
        weights: one positive finite weight per source, any scale.
        index: output index to start at.
        counts: items taken of each source before ``index``; their sum is ``index``.

    Raises:
        ValueError: no source, a weight that is not a finite number > 0, or counts that do not add up.
    """

    def __init__(self, weights: Sequence[float], index: int = 0, counts: Sequence[int] | None = None) -> None:
        check_weights({str(number): weight for number, weight in enumerate(weights)})
        total = math.fsum(weights)
        self._weights = [float(weight) / total for weight in weights]
        self.index = index
        self.counts = [int(count) for count in counts] if counts is not None else [0] * len(self._weights)
        if len(self.counts) != len(self._weights) or min(self.counts) < 0 or sum(self.counts) != index:
            raise ValueError(f"Blend: counts {self.counts} do not fit {len(self._weights)} sources and index {index}")

    def take(self, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ``amount`` outputs: (source [amount], item within source [amount]), both int64."""
        sources = np.empty(amount, dtype=np.int64)
        items = np.empty(amount, dtype=np.int64)
        weights, counts, index = self._weights, self.counts, self.index
        others = range(1, len(weights))
        # Sequential by nature (each choice moves a count); about a microsecond per output.
        for position in range(amount):
            scale = index if index > 1 else 1
            best, lead = 0, weights[0] * scale - counts[0]
            for number in others:
                deficit = weights[number] * scale - counts[number]
                if deficit > lead:
                    best, lead = number, deficit
            sources[position], items[position] = best, counts[best]
            counts[best] += 1
            index += 1
        self.index = index
        return sources, items


def check_weights(weights: Mapping[str, float], what: str = "mixture: weight of source") -> None:
    """Raise a one-line ValueError for an empty mixture or a weight that is not a finite number > 0."""
    if not weights:
        raise ValueError("mixture: no source")
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{what} {name} must be a finite number > 0, got {weight!r}")


def mixture_weights(
    names: Sequence[str],
    weights: Mapping[str, float | None],
    mixture: str | None = None,
    replay: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Shares of the stream, adding up to 1.

    Args:
        names: all training sources, in order.
        weights: given weights; None = 1.
        mixture: ratios of the sources that are not replayed, in their order, e.g. the paper's ``"2:4:1"``
            (arXiv : web : code); replaces their weights.
        replay: share of the whole stream of each replay source, e.g. ``{"pile": 0.02, "code": 0.03}``; the other
            sources divide the rest by their weights.

    Raises:
        ValueError: unknown source, wrong number of ratios, weights or shares out of range.
    """
    replay = dict(replay or {})
    for name, share in replay.items():
        if name not in names:
            raise ValueError(f"replay: unknown source {name!r}; sources: {', '.join(names)}")
        if not (math.isfinite(share) and 0 < share < 1):
            raise ValueError(f"replay: share of {name!r} must be in (0, 1), got {share}")
        if weights.get(name) is not None:
            raise ValueError(f"replay: source {name!r} has both a replay share and a weight; keep one")
    main = [name for name in names if name not in replay]
    rest = 1.0 - math.fsum(replay.values())
    if not main or rest <= 0:
        raise ValueError("replay: shares leave nothing for the other sources")
    if mixture is not None:
        try:
            ratios = [float(part) for part in mixture.split(":")]
        except ValueError:
            raise ValueError(f"mixture: expected ratios such as '2:4:1', got {mixture!r}") from None
        if len(ratios) != len(main):
            listed = ", ".join(main)
            raise ValueError(f"mixture: {mixture!r} has {len(ratios)} ratios for {len(main)} sources ({listed})")
    else:
        given = [weights.get(name) for name in main]
        ratios = [1.0 if weight is None else float(weight) for weight in given]
    shares = dict(zip(main, ratios, strict=True))
    check_weights(shares)
    total = math.fsum(ratios)
    scaled = {name: rest * ratio / total for name, ratio in shares.items()}
    return {name: scaled[name] if name in scaled else float(replay[name]) for name in names}


def given_shares(names: Sequence[str], shares: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
    """Shares of the stream as they are given, any scale.

    Args:
        names: training sources that are present; known: all of the config.

    Raises:
        ValueError: an unknown source, one without a share, or a share that is not a finite number > 0.
    """
    if unknown := [name for name in shares if name not in known]:
        raise ValueError(f"shares: unknown source {unknown[0]!r}; sources: {', '.join(known)}")
    if missing := [name for name in names if name not in shares]:
        raise ValueError(f"shares: source {missing[0]!r} has none; name every source: {', '.join(known)}")
    check_weights({name: shares[name] for name in names})
    total = math.fsum(shares[name] for name in names)
    return {name: float(shares[name]) / total for name in names}
