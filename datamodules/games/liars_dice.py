"""Liar's dice for two players."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.games.rules import CHANCE, TERMINAL, Rules, checked_int, flat_features, one_hot, own_and_other, put


class LiarsDice(Rules):
    """Bid on how many of all dice show a face, or call the last bid a lie, as OpenSpiel's ``liars_dice``.

    Bid ``b`` claims ``b // sides + 1`` dice of face ``b % sides`` (faces from 0); bids must rise. The last action,
    ``bids``, calls the last bidder a liar. The highest face is wild: it counts for every face. A true bid wins 1 for
    the bidder, a lie 1 for the caller. State: dice ``[2 * dice]`` (player 0's first), -1 until rolled, in rising order
    for each player once all are rolled (the order of rolling is not information); a 0/1 flag for each bid made and for
    the call.

    Observation: seat, own dice one-hot, flags of bids made (bids rise, so the set is the sequence).

    Args:
        dice: dice of each player (OpenSpiel: ``numdice``).
        sides: faces of a die (OpenSpiel: ``dice_sides``).

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, dice: int = 1, sides: int = 6) -> None:
        self.dice = checked_int("LiarsDice", "dice", dice, 1)
        self.sides = checked_int("LiarsDice", "sides", sides, 2)
        self.bids = 2 * dice * sides
        self.name = f"liars_dice(dice={dice}, sides={sides})"
        self.num_players = 2
        self.num_actions = self.bids + 1
        self.max_chance_outcomes = sides
        self.max_moves = 2 * dice + self.bids + 1
        self.zero_sum = True
        self.observation_size = 2 + dice * sides + self.bids

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        state = torch.zeros(batch, 2 * self.dice + self.bids + 1, dtype=torch.int64, device=device)
        state[:, : 2 * self.dice] = -1
        return state

    def mover(self, state: Tensor) -> Tensor:
        made = state[:, 2 * self.dice : -1].sum(1)
        player = torch.where(state[:, -1] == 1, TERMINAL, made % 2)
        return torch.where(state[:, 2 * self.dice - 1] < 0, CHANCE, player)

    def _last_bid(self, state: Tensor) -> Tensor:
        """``[envs]`` int64, -1 before the first bid."""
        ranks = torch.arange(1, self.bids + 1, device=state.device)
        return (state[:, 2 * self.dice : -1] * ranks).amax(1) - 1

    def legal(self, state: Tensor) -> Tensor:
        last = self._last_bid(state).unsqueeze(1)
        actions = torch.arange(self.num_actions, device=state.device)
        legal = torch.where(actions == self.bids, last >= 0, actions > last)
        return legal & (self.mover(state) >= 0).unsqueeze(1)

    def chance_probabilities(self, state: Tensor) -> Tensor:
        rolls = (self.mover(state) == CHANCE).to(torch.float64).unsqueeze(1)
        return (rolls / self.sides).expand(-1, self.sides).clone()

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        mover, dice = self.mover(state), 2 * self.dice
        rolled = (state[:, :dice] >= 0).sum(1)
        rolling = mover == CHANCE
        value = torch.where(rolling, action, 1)
        new = put(state, torch.where(rolling, rolled, dice + action), value, mover != TERMINAL)
        if self.dice > 1:
            hands = new[:, :dice].view(-1, 2, self.dice)
            ordered = torch.where((hands >= 0).all(2, keepdim=True), hands.sort(dim=2).values, hands)
            new = torch.cat([ordered.flatten(1), new[:, dice:]], dim=1)
        return new

    def returns(self, state: Tensor) -> Tensor:
        bid = self._last_bid(state).clamp(min=0)
        faces = state[:, : 2 * self.dice]
        count = ((faces == (bid % self.sides).unsqueeze(1)) | (faces == self.sides - 1)).sum(1)
        honest = count > torch.div(bid, self.sides, rounding_mode="floor")
        bidder = (state[:, 2 * self.dice : -1].sum(1) - 1) % 2
        winner = torch.where(honest, bidder, 1 - bidder)
        payoff = 2.0 * one_hot(winner, 2).to(torch.float64) - 1.0
        return payoff * (self.mover(state) == TERMINAL).unsqueeze(1)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        own, _ = own_and_other(state[:, : 2 * self.dice].view(-1, 2, self.dice), player)
        bids = state[:, 2 * self.dice : -1] == 1
        return flat_features(player, one_hot(player, 2), one_hot(own, self.sides), bids)
