"""Leduc hold'em for two players (Southey et al. 2005)."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.games.rules import CHANCE, TERMINAL, Rules, flat_features, one_hot, put

FOLD, CALL, RAISE = 0, 1, 2
CARDS, ROUND = 6, 4
"""Cards 2r and 2r + 1 have rank r; at most four moves a round: call, raise, raise, call."""


class LeducPoker(Rules):
    """Two rounds of betting, one private card each, one public card before the second, as OpenSpiel's ``leduc_poker``.

    Everyone antes 1. Fold (0, only against a raise), call or check (1), raise (2, at most two a round, by 2 in the
    first and 4 in the second round). Player 0 opens both rounds. A pair with the public card wins, then the higher
    rank; equal ranks share. Suits are kept apart, as in OpenSpiel: 468 information states a player.
    State: the two private cards, the public card, four moves of each round; -1 where not yet set.

    Observation (30 features): seat, own card, public card, and for each of the eight move slots call or raise, all
    one-hot: OpenSpiel's information-state tensor.
    """

    def __init__(self) -> None:
        self.name = "leduc_poker(players=2)"
        self.num_players = 2
        self.num_actions = 3
        self.max_chance_outcomes = CARDS
        self.max_moves = 3 + 2 * ROUND
        self.zero_sum = True
        self.observation_size = 2 + 2 * CARDS + 2 * 2 * ROUND

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch, 3 + 2 * ROUND), -1, dtype=torch.int64, device=device)

    def _position(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mover; and of the round being played: its number, moves made, moves ``[envs, 4]``."""
        rounds = state[:, 3:].view(-1, 2, ROUND)
        made = (rounds >= 0).sum(2)
        last = rounds.gather(2, (made - 1).clamp(min=0).unsqueeze(2)).squeeze(2)
        closed = (made >= 2) & (last == CALL)  # everyone has answered the last raise, or both checked
        second = closed[:, 0].to(torch.int64)
        made_here = made.gather(1, second.unsqueeze(1)).squeeze(1)
        over = (rounds == FOLD).flatten(1).any(1) | closed[:, 1]
        deal = (state[:, :2] < 0).any(1) | (closed[:, 0] & (state[:, 2] < 0))
        mover = torch.where(deal, CHANCE, torch.where(over, TERMINAL, made_here % 2))
        here = rounds.gather(1, second.view(-1, 1, 1).expand(-1, 1, ROUND)).squeeze(1)
        return mover, second, made_here, here

    def mover(self, state: Tensor) -> Tensor:
        return self._position(state)[0]

    def legal(self, state: Tensor) -> Tensor:
        mover, _, made, here = self._position(state)
        last = here.gather(1, (made - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        facing_raise, may_raise = last == RAISE, (here == RAISE).sum(1) < 2
        legal = torch.stack([facing_raise, torch.ones_like(may_raise), may_raise], dim=1)
        return legal & (mover >= 0).unsqueeze(1)

    def chance_probabilities(self, state: Tensor) -> Tensor:
        free = ~one_hot(state[:, :3], CARDS).any(1)
        free &= (self.mover(state) == CHANCE).unsqueeze(1)
        return free / free.sum(1, keepdim=True, dtype=torch.float64).clamp(min=1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        mover, second, made, _ = self._position(state)
        dealt = (state[:, :3] >= 0).sum(1)
        return put(state, torch.where(mover == CHANCE, dealt, 3 + second * ROUND + made), action, mover != TERMINAL)

    def returns(self, state: Tensor) -> Tensor:
        rounds = state[:, 3:].view(-1, 2, ROUND)
        stakes = torch.tensor([2.0, 4.0], dtype=torch.float64, device=state.device)
        level = (rounds == RAISE).cumsum(2) * (rounds > FOLD)  # raises that the maker of each move has paid for
        paid = 1.0 + torch.stack([level[:, :, seat::2].amax(2).to(torch.float64) @ stakes for seat in (0, 1)], dim=1)
        folds = (rounds == FOLD).flatten(1)
        folder = folds.to(torch.int8).argmax(1) % 2  # rounds have an even number of slots: parity is the seat
        ranks = torch.div(state[:, :3], 2, rounding_mode="floor")
        strength = ranks[:, :2] + CARDS * (ranks[:, :2] == ranks[:, 2:])
        share = (1.0 + torch.sign(strength - strength.flip(1)).to(torch.float64)) / 2
        share = torch.where(folds.any(1, keepdim=True), (~one_hot(folder, 2)).to(torch.float64), share)
        payoff = share * paid.sum(1, keepdim=True) - paid
        return payoff * (self.mover(state) == TERMINAL).unsqueeze(1)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        own = state[:, :2].gather(1, player.clamp(min=0).unsqueeze(1))
        return flat_features(
            player,
            one_hot(player, 2),
            one_hot(own, CARDS),
            one_hot(state[:, 2], CARDS),
            one_hot(state[:, 3:] - CALL, 2),
        )
