"""Vectorised rules of games: pure functions on batches of integer states, one tensor operation for a whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from datamodules.games.tree import CHANCE, TERMINAL

__all__ = [
    "CHANCE",
    "TERMINAL",
    "Rules",
    "checked_int",
    "flat_features",
    "one_hot",
    "own_and_other",
    "put",
    "resolve_chance",
    "sample_rows",
]


class Rules(ABC):
    """Rules of a finite game on states ``[envs, fields]`` int64, on any device.

    The methods are pure: they never write to their arguments and draw no random numbers. Which rows are decision,
    chance or terminal nodes is said by :meth:`mover`; an engine passes mixed batches, and each method defines what it
    gives for rows that are not its business. Actions are not checked here: callers take them from :meth:`legal`.

    Attributes:
        name: the game, with its parameters.
        num_players: players, counted from 0.
        num_actions: largest number of actions in a decision node.
        max_chance_outcomes: largest number of outcomes of a chance node, 0 for a game without chance.
        max_moves: bound on the decision and chance moves of one game.
        zero_sum: payoffs add up to 0 at every terminal node.
        observation_size: features of an observation.
    """

    name: str
    num_players: int
    num_actions: int
    max_chance_outcomes: int
    max_moves: int
    zero_sum: bool
    observation_size: int

    @abstractmethod
    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """``[batch, fields]`` int64 states at the start of a game."""

    @abstractmethod
    def mover(self, state: Tensor) -> Tensor:
        """``[envs]`` int64: the player to move, ``CHANCE`` or ``TERMINAL``."""

    @abstractmethod
    def legal(self, state: Tensor) -> Tensor:
        """``[envs, actions]`` bool: the mover's legal actions; all False where no player moves."""

    @abstractmethod
    def chance_probabilities(self, state: Tensor) -> Tensor:
        """``[envs, outcomes]`` float64: rows of chance nodes add up to 1, other rows are 0."""

    @abstractmethod
    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """New states ``[envs, fields]`` after ``action`` ``[envs]`` int64: a chance outcome where chance moves.

        Terminal rows come back unchanged. The result of an illegal action is undefined.
        """

    @abstractmethod
    def returns(self, state: Tensor) -> Tensor:
        """``[envs, players]`` float64 payoffs; 0 where the game is not over."""

    @abstractmethod
    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        """``[envs, features]`` float32: all that ``player`` ``[envs]`` int64 has seen and done (perfect recall).

        Two states with the same mover have the same observation of that mover if and only if they are in the same
        information state. Rows with a negative player are 0.
        """


def checked_int(owner: str, field: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer from ``low`` to ``high`` (no upper bound if None).

    Raises:
        ValueError: one line naming owner, field, rule and the value got.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        rule = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
        raise ValueError(f"{owner}: {field}: must be {rule}, got {value!r}")
    return value


def one_hot(values: Tensor, size: int) -> Tensor:
    """``[...]`` int64 -> ``[..., size]`` bool; values outside ``0..size-1`` (-1: not yet set) give all False."""
    return values.unsqueeze(-1) == torch.arange(size, device=values.device)


def put(state: Tensor, column: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """Copy of ``state`` ``[envs, fields]`` with ``value`` at ``column`` in rows ``where``, all ``[envs]``."""
    column = column.clamp(0, state.shape[1] - 1).unsqueeze(1)
    return state.scatter(1, column, torch.where(where, value, state.gather(1, column).squeeze(1)).unsqueeze(1))


def flat_features(player: Tensor, *blocks: Tensor) -> Tensor:
    """Concatenate ``[envs, ...]`` blocks to ``[envs, features]`` float32, rows of negative players set to 0."""
    features = torch.cat([block.flatten(1) for block in blocks], dim=1) & (player >= 0).unsqueeze(1)
    return features.to(torch.float32)


def own_and_other(fields: Tensor, player: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``[envs, 2, ...]`` into the rows of ``player`` ``[envs]`` and of the opponent, ``[envs, ...]`` each."""
    rows, own = torch.arange(fields.shape[0], device=fields.device), player.clamp(min=0)
    return fields[rows, own], fields[rows, 1 - own]


def sample_rows(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw per row of ``[rows, outcomes]`` by inversion, ``[rows]`` int64; rows are normalised by their sums.

    Sums must be finite and positive. An outcome of probability 0 is
    never drawn. One uniform number per row is taken from ``generator``, which lives on the rows' device.
    """
    cumulative = probabilities.to(torch.float64).cumsum(dim=1)
    uniform = torch.rand(
        (probabilities.shape[0], 1), dtype=torch.float64, device=probabilities.device, generator=generator
    )
    return (cumulative <= uniform * cumulative[:, -1:]).sum(dim=1)


def resolve_chance(
    rules: Rules, state: Tensor, generator: torch.Generator | None, mover: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw chance moves until no row of ``state`` ``[envs, fields]`` is at a chance node.

    Args:
        rules: the game.
        state: states, not written to.
        generator: source of the draws; one uniform number per row at a chance node, in row order.
        mover: ``rules.mover(state)`` if at hand.

    Returns:
        The states and their movers ``[envs]``.
    """
    mover = rules.mover(state) if mover is None else mover
    if rules.max_chance_outcomes == 0:
        return state, mover
    state, mover = state.clone(), mover.clone()
    rows = (mover == CHANCE).nonzero().squeeze(1)
    while rows.numel():
        here = state[rows]
        here = rules.step(here, sample_rows(rules.chance_probabilities(here), generator))
        now = rules.mover(here)
        state[rows], mover[rows] = here, now
        rows = rows[now == CHANCE]
    return state, mover
