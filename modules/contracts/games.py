"""What modules that play games and their data meet in when play is examined: whole games on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from tensordict import TensorDict
from torch import Tensor

SeatPolicy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(observation [rows, features], legal [rows, actions], player [rows], seat [rows])`` to probabilities
``[rows, actions]``, where ``seat`` is who sits there for the mover."""


@runtime_checkable
class PlaysGames(Protocol):
    """A datamodule of one game that plays it by its rules on demand, apart from its training."""

    def play_games(self, policy: SeatPolicy, seats: Tensor, seed: int) -> TensorDict:
        """One game in each row of ``seats`` ``[games, players]`` int64, on this rank alone; a function of the seed.

        TensorDict ``[games]``: ``returns`` ``[games, players]`` float64 and, ``[games, moves]`` each, ``observation``,
        ``legal``, ``action``, ``player`` (-1: past the end) and ``probability``.

        Raises:
            ValueError: data without rules to play by, or a policy that gives no distributions over legal actions.
        """
        ...
