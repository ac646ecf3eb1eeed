"""What loops of the computer agent yield to whoever drives them, beside requests to the model."""

from __future__ import annotations

from dataclasses import dataclass

from modules.contracts.browsing import EpisodeSpec


@dataclass(frozen=True)
class Reset:
    """Effect: start this episode on the loop's page; gives a :class:`PageView`."""

    spec: EpisodeSpec


@dataclass(frozen=True)
class Act:
    """Effect: carry out an instruction; gives a :class:`PageView`."""

    instruction: str


@dataclass(frozen=True)
class Probe:
    """Effect: what would become of an instruction; gives an ``ActionStatus``."""

    instruction: str


@dataclass(frozen=True)
class Film:
    """Effect: a screenshot of the page; gives PNG bytes."""


@dataclass(frozen=True)
class Confirm:
    """Effect: may this be done, which can't be undone? Gives a bool.

    Args:
        instruction: that the agent wants carried out.
        touched: what is to be read on the elements that it selects; untrusted.
    """

    instruction: str
    touched: str


class Halted(Exception):
    """An overseer ended the episode; the message says why."""
