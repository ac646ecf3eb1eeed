"""Kuhn poker: one card each, one bet (Kuhn 1950; for more players Abou Risk and Szafron 2010)."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.games.rules import CHANCE, TERMINAL, Rules, checked_int, flat_features, one_hot, put

PASS, BET = 0, 1


class KuhnPoker(Rules):
    """One card each of ``players + 1``, an ante of 1, then pass (0) or bet (1), as OpenSpiel's ``kuhn_poker``.

    Before a bet, betting adds 1 to the pot. After it the others, in turn, call (1) or fold (0) once. The highest card
    among those who put in most takes the pot. State: cards ``[players]``, then moves ``[2 * players - 1]``, -1 where
    not yet set.

    Observation: seat, own card, each move, all one-hot (OpenSpiel's information-state tensor).

    Args:
        players: 2 to 10.

    Raises:
        ValueError: if ``players`` is out of range.
    """

    def __init__(self, players: int = 2) -> None:
        self.num_players = checked_int("KuhnPoker", "players", players, 2, 10)
        self.name = f"kuhn_poker(players={players})"
        self.num_actions = 2
        self.max_chance_outcomes = players + 1
        self.history = 2 * players - 1
        self.max_moves = players + self.history
        self.zero_sum = True
        self.observation_size = players + players + 1 + 2 * self.history

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch, self.num_players + self.history), -1, dtype=torch.int64, device=device)

    def mover(self, state: Tensor) -> Tensor:
        cards, moves = state[:, : self.num_players], state[:, self.num_players :]
        made, bets = (moves >= 0).sum(1), moves == BET
        last = self.num_players + torch.where(bets.any(1), bets.to(torch.int8).argmax(1), 0)
        player = torch.where(made >= last, TERMINAL, made % self.num_players)
        return torch.where((cards < 0).any(1), CHANCE, player)

    def legal(self, state: Tensor) -> Tensor:
        return (self.mover(state) >= 0).unsqueeze(1).expand(-1, 2).clone()

    def chance_probabilities(self, state: Tensor) -> Tensor:
        free = ~one_hot(state[:, : self.num_players], self.num_players + 1).any(1)
        free &= (self.mover(state) == CHANCE).unsqueeze(1)
        return free / free.sum(1, keepdim=True, dtype=torch.float64).clamp(min=1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        # cards and moves are filled from left to right, so the next slot is the number of fields set
        return put(state, (state >= 0).sum(1), action, self.mover(state) != TERMINAL)

    def returns(self, state: Tensor) -> Tensor:
        cards, moves = state[:, : self.num_players], state[:, self.num_players :]
        padded = torch.cat([moves, moves.new_full((len(moves), 1), -1)], dim=1)
        paid_more = (padded.view(-1, 2, self.num_players) == BET).any(1)
        in_showdown = paid_more | ~paid_more.any(1, keepdim=True)
        winner = torch.where(in_showdown, cards, -1).argmax(1)
        paid = 1.0 + paid_more.to(torch.float64)
        payoff = one_hot(winner, self.num_players) * paid.sum(1, keepdim=True) - paid
        return payoff * (self.mover(state) == TERMINAL).unsqueeze(1)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        own = state[:, : self.num_players].gather(1, player.clamp(min=0).unsqueeze(1))
        return flat_features(
            player,
            one_hot(player, self.num_players),
            one_hot(own, self.num_players + 1),
            one_hot(state[:, self.num_players :], 2),
        )
