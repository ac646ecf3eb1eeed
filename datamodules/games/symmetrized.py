"""One population for both seats of a game: the symmetric extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.contracts import TabularGame


class SymmetrizedGame:
    """A two-player zero-sum game whose players are seated by a fair coin, so that one population serves both.

    This is the *symmetric extension* of the game (Shapley 1958; Gale, Kuhn, Tucker 1950, "On symmetric games"), and
    what a single "symmetric" population on Kuhn or Leduc poker means: those games themselves are not symmetric. A
    strategy says what to do in either seat: its table ``[states_0 + states_1, actions]`` and its plan
    ``[sequences_0 + sequences_1]`` are those of seat 0 followed by those of seat 1. The payoff is the mean over the
    two seatings, so that the value is 0, and NashConv is that of the game for the two seats' halves of one strategy
    against itself.

    Observations are those of the seat's player, padded with zeros to one length, then the seat as two numbers.

    Args:
        game: two players, zero-sum, with the same number of actions for both.

    Raises:
        ValueError: a game of another kind.
    """

    num_players = 2
    zero_sum = True
    symmetric = True

    def __init__(self, game: TabularGame) -> None:
        if game.num_players != 2 or not game.zero_sum:
            kind = f"{game.num_players} players, {'zero-sum' if game.zero_sum else 'general-sum'}"
            raise ValueError(f"SymmetrizedGame: game: must have two players and be zero-sum, got {game.name} ({kind})")
        actions = [game.strategy_shape(seat)[1] for seat in range(2)]
        if actions[0] != actions[1]:
            raise ValueError(f"SymmetrizedGame: game: both seats must have as many actions, got {actions}")
        self.game = game
        self.name = f"symmetrized({game.name})"
        self.num_actions = actions[0]
        self._states = [game.strategy_shape(seat)[0] for seat in range(2)]
        self._sequences = [game.plans(seat, self._uniform(seat)).shape[-1] for seat in range(2)]
        seen = [game.observations(seat) for seat in range(2)]
        width = max(features.shape[1] for features in seen)
        rows = []
        for seat, features in enumerate(seen):
            row = features.new_zeros(features.shape[0], width + 2)
            row[:, : features.shape[1]] = features
            row[:, width + seat] = 1
            rows.append(row)
        self._observations = torch.cat(rows)
        self._legal = torch.cat([game.legal(seat) for seat in range(2)])

    def num_states(self, player: int) -> int:
        """Information states of seat ``player``."""
        return self._states[player]

    def seats(self, population: int) -> list[tuple[int, int]]:
        """The (player, first state) pairs that the population's tables cover: both seats."""
        return [(0, 0), (1, self._states[0])]

    def sequence_of(self, player: int, state: Tensor, action: Tensor) -> Tensor:
        """Number ``[...]`` of the sequence after ``action`` in ``state``, counted as in plans; 0 where ``state`` is -1.

        Raises:
            TypeError: the game has no ``sequence_of``.
        """
        of_seat = getattr(self.game, "sequence_of", None)
        if of_seat is None:
            raise TypeError(f"SymmetrizedGame: game: {self.game.name} offers no sequence_of")
        first = self._states[0]
        second = self._sequences[0] + of_seat(1, torch.where(state < first, -1, state - first), action)
        return torch.where(state < first, of_seat(0, torch.where(state < first, state, -1), action), second)

    def strategy_shape(self, player: int) -> tuple[int, ...]:
        """``(states_0 + states_1, actions)``, the same for both players."""
        return (sum(self._states), self.num_actions)

    def legal(self, player: int) -> Tensor:
        """``[states, actions]`` bool."""
        return self._legal

    def observations(self, player: int) -> Tensor:
        """``[states, features + 2]`` float32; the last two say which seat."""
        return self._observations

    def uniform_strategy(self, player: int) -> Tensor:
        """``[states, actions]``: every legal action alike."""
        return torch.cat([self._uniform(seat) for seat in range(2)])

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> Tensor:
        """``[count, states, actions]``; both seats' parts drawn apart."""
        return torch.cat([self.game.random_strategies(seat, count, generator) for seat in range(2)], dim=1)

    def seat_strategies(self, strategies: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., states, actions]`` -> the tables of seat 0 and of seat 1, e.g. for simulation."""
        self._expect("strategies", strategies, -2, sum(self._states))
        first, second = strategies.split(self._states, dim=-2)
        return first, second

    def seat_plans(self, plans: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., sequences]`` -> the plans of seat 0 and of seat 1."""
        self._expect("plans", plans, -1, sum(self._sequences))
        first, second = plans.split(self._sequences, dim=-1)
        return first, second

    def plans(self, player: int, strategies: Tensor) -> Tensor:
        """``[..., states, actions] -> [..., sequences]``; differentiable."""
        return torch.cat([self.game.plans(s, part) for s, part in enumerate(self.seat_strategies(strategies))], dim=-1)

    def strategy_of(self, player: int, plan: Tensor) -> Tensor:
        """``[..., sequences] -> [..., states, actions]``, seat by seat."""
        return torch.cat([self.game.strategy_of(s, part) for s, part in enumerate(self.seat_plans(plan))], dim=-2)

    def payoffs(self, plans: Sequence[Tensor]) -> Tensor:
        """``plans[i]`` ``[members_i, sequences]`` -> ``[2, members_0, members_1]``, the mean over the seatings."""
        own, other = (self.seat_plans(plan) for plan in plans)
        seated = self.game.payoffs([own[0], other[1]])[0]
        swapped = self.game.payoffs([other[0], own[1]])[1].mT
        mean = (seated + swapped) / 2
        return torch.stack([mean, -mean])

    def payoff_vector(self, player: int, plans: Sequence[Tensor]) -> Tensor:
        """``[..., sequences]`` such that ``plan @ vector`` is ``player``'s payoff; the own plan is ignored."""
        other = self.seat_plans(plans[1 - player])
        seats = [self.game.payoff_vector(seat, other) for seat in range(2)]
        return torch.cat(seats, dim=-1) / 2

    def reach(self, player: int, plans: Sequence[Tensor] | None = None) -> Tensor:
        """``[..., sequences]`` with ``sum(reach * plan) = 1``: half of each seat's; ``None``: uniform legal play."""
        other = None if plans is None else self.seat_plans(plans[1 - player])
        return torch.cat([self.game.reach(seat, other) for seat in range(2)], dim=-1) / 2

    def best_response(self, player: int, payoff_vector: Tensor) -> tuple[Tensor, Tensor]:
        """The best table of each seat ``[states, actions]``, and the sum of their values (halved by the vector)."""
        parts = [self.game.best_response(s, part) for s, part in enumerate(self.seat_plans(payoff_vector))]
        return torch.cat([table for table, _ in parts]), parts[0][1] + parts[1][1]

    def counterfactual_values(self, player: int, table: Tensor, payoff_vector: Tensor) -> Tensor:
        """``[..., states, actions]``, seat by seat; needs a game that offers it.

        Raises:
            TypeError: the game has no ``counterfactual_values``.
        """
        of_seat = getattr(self.game, "counterfactual_values", None)
        if of_seat is None:
            raise TypeError(f"SymmetrizedGame: game: {self.game.name} offers no counterfactual_values")
        parts = zip(self.seat_strategies(table), self.seat_plans(payoff_vector), strict=True)
        return torch.cat([of_seat(seat, *part) for seat, part in enumerate(parts)], dim=-2)

    def digest(self) -> Mapping[str, str]:
        """The game's digest, marked as its symmetric extension."""
        return {**self.game.digest(), "extension": "symmetric"}

    def _uniform(self, seat: int) -> Tensor:
        legal = self.game.legal(seat).double()
        return legal / legal.sum(1, keepdim=True)

    def _expect(self, field: str, value: Tensor, dim: int, size: int) -> None:
        if value.dim() < -dim or value.shape[dim] != size:
            wanted = f"{size} in dimension {dim} (both seats)"
            raise ValueError(f"SymmetrizedGame: {field}: {wanted}, got shape {list(value.shape)}")
