"""A zero-sum or general-sum matrix game as a PlanGame, for tests that need no real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MatrixGame:
    """Payoffs ``[players, actions_0, actions_1, ...]``; a strategy is a row ``[1, actions]``, its plan the row itself.

    Counts calls of :meth:`best_response` in :attr:`responses`.
    """

    def __init__(self, payoffs: Tensor, symmetric: bool = False) -> None:
        self.table = payoffs.to(torch.float64)
        self.name = "matrix"
        self.num_players = payoffs.shape[0]
        self.zero_sum = bool(self.table.sum(dim=0).abs().max() < 1e-9)
        self.symmetric = symmetric
        self.responses = 0

    def strategy_shape(self, player: int) -> tuple[int, ...]:
        return (1, self.table.shape[1 + player])

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> Tensor:
        weights = torch.rand(count, *self.strategy_shape(player), generator=generator, dtype=torch.float64) ** 4
        return weights / weights.sum(dim=-1, keepdim=True)

    def plans(self, player: int, strategies: Tensor) -> Tensor:
        return strategies[..., 0, :]

    def strategy_of(self, player: int, plan: Tensor) -> Tensor:
        return plan[..., None, :]

    def payoffs(self, plans: Sequence[Tensor]) -> Tensor:
        values = self.table
        for player, own in enumerate(plans):
            values = torch.movedim(values.movedim(1 + player, -1) @ own.T, -1, 1 + player)
        return values

    def payoff_vector(self, player: int, plans: Sequence[Tensor]) -> Tensor:
        values = self.table[player]
        for other in range(self.num_players - 1, -1, -1):
            if other != player:
                values = values.movedim(other, -1) @ plans[other]
        return values

    def reach(self, player: int, plans: Sequence[Tensor] | None = None) -> Tensor:
        return torch.ones(self.table.shape[1 + player], dtype=torch.float64)

    def best_response(self, player: int, payoff_vector: Tensor) -> tuple[Tensor, Tensor]:
        self.responses += 1
        action = int(payoff_vector.argmax())
        strategy = torch.zeros(self.strategy_shape(player), dtype=torch.float64)
        strategy[0, action] = 1.0
        return strategy, payoff_vector[action]

    def digest(self) -> Mapping[str, str]:
        return {"game": self.name}
