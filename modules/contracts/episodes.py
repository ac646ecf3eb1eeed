"""What modules that act in episodes and the callback that reports them meet in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class EpisodeSample:
    """One episode to look at.

    Args:
        title: one line.
        transcript: what was said and done, as plain text. Untrusted: it holds what pages and models wrote.
        frames: PNG images in order, the first before any action; empty bytes where an image is missing.
    """

    title: str
    transcript: str
    frames: tuple[bytes, ...] = ()


@runtime_checkable
class ReportsEpisodes(Protocol):
    """A module that tells how the episodes of its last evaluation went. Both are asked on all ranks."""

    def episode_rates(self) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """Group (a task) -> series (a strategy) -> (successes, episodes), over all ranks and equal on all."""
        ...

    def episode_samples(self) -> Sequence[EpisodeSample]:
        """Some of this rank's episodes, the most telling first."""
        ...
