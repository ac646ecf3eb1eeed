"""Goofspiel, the game of pure strategy, for two players."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.games.rules import CHANCE, TERMINAL, Rules, checked_int, flat_features, one_hot, own_and_other, put

ORDERS = ("descending", "ascending", "random")
RETURNS = ("win_loss", "point_difference", "total_points")


class Goofspiel(Rules):
    """Bid hidden cards 1..K for prize cards 1..K, the higher bid takes the prize, a tie discards it.

    As OpenSpiel's ``turn_based_simultaneous_game(game=goofspiel(...))`` with two players: player 0 bids first, and
    player 1 does not see that bid; the last round is forced and plays itself. Action ``a`` bids card ``a + 1``.
    State: prize cards of rounds ``[K - 1]``, player 0's bids ``[K - 1]``, player 1's bids ``[K - 1]``, numbered from 0,
    -1 where not yet set.

    Observation: seat, own bids of all rounds one-hot, result of each finished round (won, lost, tied) one-hot; with
    ``imp_info=False`` also the opponent's bids of finished rounds; with random prizes also the prizes shown. Unlike
    OpenSpiel's information-state string for ``imp_info=False``, which holds hands and not bids, this is perfect recall.

    Args:
        num_cards: K, at least 2.
        imp_info: the opponent's bids stay hidden (only who won a round is told).
        points_order: ``descending`` (K first), ``ascending``, or ``random`` (chance draws each prize).
        returns_type: ``win_loss`` (+-1, 0 for equal points), ``point_difference`` (own points minus the mean of
            both, which is half the difference: OpenSpiel's scale), or ``total_points`` (own points: general-sum).

    Raises:
        ValueError: if an argument is not one of those.
    """

    def __init__(
        self,
        num_cards: int = 5,
        imp_info: bool = True,
        points_order: str = "descending",
        returns_type: str = "win_loss",
    ) -> None:
        self.num_cards = checked_int("Goofspiel", "num_cards", num_cards, 2)
        if not isinstance(imp_info, bool):
            raise ValueError(f"Goofspiel: imp_info: must be true or false, got {imp_info!r}")
        for field, value, allowed in (("points_order", points_order, ORDERS), ("returns_type", returns_type, RETURNS)):
            if value not in allowed:
                raise ValueError(f"Goofspiel: {field}: must be one of {', '.join(allowed)}, got {value!r}")
        self.imp_info, self.points_order, self.returns_type = imp_info, points_order, returns_type
        self.rounds = num_cards - 1  # the last round has one card on each side
        self.name = (
            f"goofspiel(num_cards={num_cards}, imp_info={imp_info}, points_order={points_order}, "
            f"returns_type={returns_type})"
        )
        self.num_players = 2
        self.num_actions = num_cards
        shuffled = points_order == "random"
        self.max_chance_outcomes = num_cards if shuffled else 0
        self.max_moves = (3 if shuffled else 2) * self.rounds
        self.zero_sum = returns_type != "total_points"
        bid_blocks = 1 + (not imp_info) + shuffled
        self.observation_size = 2 + self.rounds * (bid_blocks * num_cards + 3)

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        state = torch.full((batch, 3 * self.rounds), -1, dtype=torch.int64, device=device)
        order = torch.arange(self.num_cards, device=device)
        if self.points_order == "ascending":
            state[:, : self.rounds] = order[:-1]
        elif self.points_order == "descending":
            state[:, : self.rounds] = order.flip(0)[:-1]
        return state

    def _made(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prizes shown (all, if their order is fixed), bids of player 0, bids of player 1, ``[envs]`` each."""
        return tuple((state.view(-1, 3, self.rounds) >= 0).sum(2).unbind(1))  # type: ignore[return-value]

    def mover(self, state: Tensor) -> Tensor:
        prizes, first, second = self._made(state)
        player = torch.where(prizes == second, CHANCE, first - second)
        return torch.where(second == self.rounds, TERMINAL, player)

    def legal(self, state: Tensor) -> Tensor:
        mover = self.mover(state)
        own, _ = own_and_other(state[:, self.rounds :].view(-1, 2, self.rounds), mover)
        return ~one_hot(own, self.num_cards).any(1) & (mover >= 0).unsqueeze(1)

    def chance_probabilities(self, state: Tensor) -> Tensor:
        left = ~one_hot(state[:, : self.rounds], self.num_cards).any(1)
        left &= (self.mover(state) == CHANCE).unsqueeze(1)
        probabilities = left / left.sum(1, keepdim=True, dtype=torch.float64).clamp(min=1)
        return probabilities[:, : self.max_chance_outcomes]

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        mover = self.mover(state)
        made = torch.stack(self._made(state), dim=1)
        block = mover.clamp(min=CHANCE) + 1  # chance fills the prizes, players their bids
        column = block * self.rounds + made.gather(1, block.clamp(max=2).unsqueeze(1)).squeeze(1)
        return put(state, column, action, mover != TERMINAL)

    def returns(self, state: Tensor) -> Tensor:
        cards = state.view(-1, 3, self.rounds)
        last = self.num_cards * (self.num_cards - 1) // 2 - cards.sum(2, keepdim=True)
        prizes, first, second = torch.cat([cards, last], dim=2).unbind(1)
        worth = (prizes + 1).to(torch.float64)
        points = torch.stack([(worth * (first > second)).sum(1), (worth * (second > first)).sum(1)], dim=1)
        lead = points - points.flip(1)
        payoff = {"win_loss": lead.sign(), "point_difference": lead / 2, "total_points": points}[self.returns_type]
        return payoff * (self.mover(state) == TERMINAL).unsqueeze(1)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        own, other = own_and_other(state[:, self.rounds :].view(-1, 2, self.rounds), player)
        finished = (own >= 0) & (other >= 0)
        results = torch.stack([own > other, own < other, own == other], dim=2) & finished.unsqueeze(2)
        blocks = [one_hot(player, 2), one_hot(own, self.num_cards), results]
        if not self.imp_info:
            blocks.append(one_hot(torch.where(finished, other, -1), self.num_cards))
        if self.points_order == "random":
            blocks.append(one_hot(state[:, : self.rounds], self.num_cards))
        return flat_features(player, *blocks)
