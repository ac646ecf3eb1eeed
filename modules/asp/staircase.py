"""The adaptive staircase over scales: when to go on, and what to train on till then (Wang et al. 2024, section 4.3)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

Phase = Literal["explore", "adapt"]
HISTORY = 10
"""Gaps per scale that the weights' standard deviations are taken over."""


class Staircase:
    """Scales ``start, start + step, ...`` up to ``end``. A new scale is explored once, then all seen are adapted to.

    The next scale opens when the mean gap over scales seen is below ``threshold``, or when more than ``patience``
    adaptions in a row have not brought it to a new minimum. At ``end`` only the threshold closes the last scale: then
    the staircase is :attr:`finished`, and adapts on if it is asked to.

    Args:
        start, step, end: customers.
        threshold: percent.
        patience: adaptions.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, start: int, step: int, end: int, threshold: float, patience: int) -> None:
        if start < 2:
            raise ValueError(f"Staircase: start must be >= 2, got {start}")
        if step < 1:
            raise ValueError(f"Staircase: step must be >= 1, got {step}")
        if end < start:
            raise ValueError(f"Staircase: end must be >= start ({start}), got {end}")
        if not threshold > 0:
            raise ValueError(f"Staircase: threshold must be > 0, got {threshold}")
        if patience < 0:
            raise ValueError(f"Staircase: patience must be >= 0, got {patience}")
        self.start, self.step, self.end = start, step, end
        self.threshold, self.patience = threshold, patience
        self.scales = [start]
        self.phase: Phase = "explore"
        self.count = 0
        self.best = math.inf
        self.finished = False
        self.phases = 0
        """Phases that have ended."""
        self.history: dict[int, list[float]] = {start: []}

    @property
    def all_scales(self) -> list[int]:
        """Scales from start to end."""
        return list(range(self.start, self.end + 1, self.step))

    def observe(self, gaps: Mapping[int, float]) -> None:
        """Held-out gaps (percent) of all scales seen, at the end of the current phase; decides on the next.

        Raises:
            ValueError: scales missing, or a gap that is not finite.
        """
        if set(gaps) != set(self.scales):
            raise ValueError(f"Staircase: gaps must be of the scales {self.scales}, got {sorted(gaps)}")
        for scale, gap in gaps.items():
            if not math.isfinite(gap):
                raise ValueError(f"Staircase: the gap of scale {scale} must be finite, got {gap}")
            self.history[scale] = [*self.history[scale], float(gap)][-HISTORY:]
        self.phases += 1
        mean = sum(gaps.values()) / len(gaps)
        if self.phase == "explore":
            self.count, self.best = 0, mean
        else:
            self.count += 1
            if mean <= self.best:
                self.best, self.count = mean, 0
        if mean < self.threshold or (self.count > self.patience and self.scales[-1] < self.end):
            if self.scales[-1] + self.step > self.end:
                self.finished = True
                self.phase = "adapt"
                return
            self.scales.append(self.scales[-1] + self.step)
            self.history[self.scales[-1]] = []
            self.phase = "explore"
            return
        self.phase = "adapt"

    def weights(self, use_gap: bool = True, use_std: bool = True) -> dict[int, float]:
        """Shares of the scales seen in an adaption, adding up to 1.

        Half of a weight is how far the last gap lies above the threshold, half how much the last gaps vary; each half
        is normalised over scales. With neither, or where both say nothing, weights are equal.
        """
        count = len(self.scales)
        equal = dict.fromkeys(self.scales, 1.0 / count)
        latest = {scale: (self.history[scale] or [math.nan])[-1] for scale in self.scales}
        above = {
            scale: max(0.0, (gap - self.threshold) / self.threshold) if math.isfinite(gap) else 0.0
            for scale, gap in latest.items()
        }
        spread = {
            scale: statistics.pstdev(self.history[scale]) if self.history[scale] else math.nan for scale in self.scales
        }
        total = math.fsum(above.values())
        distance = {scale: value / total for scale, value in above.items()} if total > 0 else above
        total = math.fsum(spread.values())
        variation = {s: value / total for s, value in spread.items()} if math.isfinite(total) and total > 0 else equal
        if use_gap and use_std:
            both = {scale: distance[scale] + variation[scale] for scale in self.scales}
        elif use_gap:
            both = distance
        elif use_std:
            both = variation
        else:
            return equal
        total = math.fsum(both.values())
        return {scale: value / total for scale, value in both.items()} if total > 0 else equal

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scales": list(self.scales),
            "phase": self.phase,
            "count": self.count,
            "best": self.best,
            "finished": self.finished,
            "phases": self.phases,
            "history": {scale: list(gaps) for scale, gaps in self.history.items()},
            "settings": [self.start, self.step, self.end, self.threshold, self.patience],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`.

        Raises:
            ValueError: the state is of a staircase with other settings.
        """
        mine = [self.start, self.step, self.end, self.threshold, self.patience]
        if list(state["settings"]) != mine:
            raise ValueError(
                "Staircase: the checkpoint was written with start, step, end, threshold, patience "
                f"{state['settings']}, the config has {mine}: keep them equal"
            )
        self.scales = [int(scale) for scale in state["scales"]]
        self.phase = state["phase"]
        self.count, self.best = int(state["count"]), float(state["best"])
        self.finished, self.phases = bool(state["finished"]), int(state["phases"])
        self.history = {int(scale): [float(gap) for gap in gaps] for scale, gaps in state["history"].items()}


def shares(weights: Mapping[int, float], batches: int) -> dict[int, int]:
    """``batches`` shared out by weight: whole numbers that add up to it (largest remainder, ties to earlier keys).

    Raises:
        ValueError: fewer than 0 batches, or weights that are negative, NaN or do not add up to 1.
    """
    if batches < 0:
        raise ValueError(f"shares: batches must be >= 0, got {batches}")
    if not all(weight >= 0 for weight in weights.values()) or abs(math.fsum(weights.values()) - 1.0) > 1e-6:
        raise ValueError(f"shares: weights must be >= 0 and add up to 1, got {dict(weights)}")
    exact = {key: weight * batches for key, weight in weights.items()}
    counts = {key: math.floor(value) for key, value in exact.items()}
    order = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in order[: batches - sum(counts.values())]:
        counts[key] += 1
    return counts
