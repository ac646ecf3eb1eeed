"""Bargaining over a pool of items with private valuations: a small general-sum game that can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from datamodules.games.rules import CHANCE, TERMINAL, Rules, checked_int, flat_features, one_hot, own_and_other, put

OPEN, ACCEPTED, REFUSED = -1, 0, 1


class Negotiation(Rules):
    """Two players divide a pool of items by alternating offers; each knows only its own valuation of the items.

    Rules:
        1. Chance draws player 0's, then player 1's valuation, each uniformly from all vectors ``v`` of non-negative
           integers with ``sum(v * pool) = total_value`` (lexicographic order), so that the whole pool is worth
           ``total_value`` to both.
        2. Player 0 makes the first offer. An offer says how many of each item the *proposer keeps*; all
           ``prod(pool + 1)`` divisions are legal, numbered lexicographically.
        3. The other accepts (action ``offers``), or makes the next offer. After ``max_offers`` offers it can only
           accept or refuse (action ``offers + 1``).
        4. Accepting offer number k (from 1) pays each its valuation of its items times ``discount ** (k - 1)``;
           refusing pays both 0.

    With one valuation a player this is the alternating-offers bargaining of Rubinstein (1982) cut at a horizon; the
    division of valued items is that of Lewis et al. (2017), OpenSpiel's ``bargaining``, whose last turn (any action
    but accepting ends the game without a deal) is the refusal here.
    State: the two valuations, offers ``[max_offers]``, -1 where not yet set, and the outcome (-1 open, 0 accepted,
    1 refused).

    Observation: seat, own valuation, each offer, all one-hot.

    Args:
        pool: number of each item.
        total_value: worth of the whole pool to each player.
        max_offers: offers before the last answer.
        discount: in (0, 1].

    Raises:
        ValueError: if a number is out of range, or no valuation gives the pool that worth.
    """

    def __init__(
        self, pool: Sequence[int] = (2, 1), total_value: int = 4, max_offers: int = 3, discount: float = 1.0
    ) -> None:
        self.pool = tuple(checked_int("Negotiation", "pool", count, 1) for count in pool)
        if not self.pool:
            raise ValueError(f"Negotiation: pool: must name at least one item, got {pool!r}")
        self.total_value = checked_int("Negotiation", "total_value", total_value, 1)
        self.max_offers = checked_int("Negotiation", "max_offers", max_offers, 1)
        if isinstance(discount, bool) or not isinstance(discount, int | float) or not 0 < discount <= 1:
            raise ValueError(f"Negotiation: discount: must be in (0, 1], got {discount!r}")
        self.discount = float(discount)
        self.valuations = torch.tensor(list(_valuations(self.pool, total_value)), dtype=torch.int64)
        if len(self.valuations) == 0:
            raise ValueError(
                f"Negotiation: total_value: must be a sum of whole item values for pool {self.pool}, got {total_value}"
            )
        self.kept = torch.tensor(list(product(*(range(count + 1) for count in self.pool))), dtype=torch.int64)
        self.offers = prod(count + 1 for count in self.pool)
        self.accept, self.refuse = self.offers, self.offers + 1
        self.name = (
            f"negotiation(pool={list(self.pool)}, total_value={total_value}, max_offers={max_offers}, "
            f"discount={self.discount})"
        )
        self.num_players = 2
        self.num_actions = self.offers + 2
        self.max_chance_outcomes = len(self.valuations)
        self.max_moves = 2 + max_offers + 1
        self.zero_sum = False
        self.observation_size = 2 + len(self.valuations) + max_offers * self.offers
        # worth[v, o]: what the proposer's share of offer o is worth to a player with valuation v
        self.worth = (self.valuations @ self.kept.T).to(torch.float64)

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch, 3 + self.max_offers), -1, dtype=torch.int64, device=device)

    def _made(self, state: Tensor) -> Tensor:
        return (state[:, 2:-1] >= 0).sum(1)

    def mover(self, state: Tensor) -> Tensor:
        player = torch.where(state[:, -1] != OPEN, TERMINAL, self._made(state) % 2)
        return torch.where(state[:, 1] < 0, CHANCE, player)

    def legal(self, state: Tensor) -> Tensor:
        made = self._made(state).unsqueeze(1)
        actions = torch.arange(self.num_actions, device=state.device)
        legal = torch.where(actions < self.offers, made < self.max_offers, made == self.max_offers)
        legal = torch.where(actions == self.accept, made > 0, legal)
        return legal & (self.mover(state) >= 0).unsqueeze(1)

    def chance_probabilities(self, state: Tensor) -> Tensor:
        draws = (self.mover(state) == CHANCE).to(torch.float64).unsqueeze(1)
        return (draws / self.max_chance_outcomes).expand(-1, self.max_chance_outcomes).clone()

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        mover, last = self.mover(state), state.shape[1] - 1
        answer = (mover >= 0) & (action >= self.offers)
        next_field = (state[:, :-1] >= 0).sum(1)  # valuations and offers are filled from left to right
        value = torch.where(answer, action - self.offers, action)
        return put(state, torch.where(answer, last, next_field), value, mover != TERMINAL)

    def returns(self, state: Tensor) -> Tensor:
        made, worth = self._made(state), self.worth.to(state.device)
        offer = state[:, 2:-1].gather(1, (made - 1).clamp(min=0).unsqueeze(1)).clamp(min=0)
        kept = worth[state[:, :2].clamp(min=0), offer.expand(-1, 2)]
        proposer = one_hot((made - 1) % 2, 2)
        share = torch.where(proposer, kept, self.total_value - kept)
        factor = self.discount ** (made - 1).clamp(min=0).to(torch.float64)
        return share * (factor * (state[:, -1] == ACCEPTED)).unsqueeze(1)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        own, _ = own_and_other(state[:, :2], player)
        offers = one_hot(state[:, 2:-1], self.offers)
        return flat_features(player, one_hot(player, 2), one_hot(own, self.max_chance_outcomes), offers)


def _valuations(pool: tuple[int, ...], total: int) -> list[tuple[int, ...]]:
    """All non-negative integer vectors ``v`` with ``sum(v * pool) = total``, in lexicographic order."""
    if len(pool) == 1:
        return [(total // pool[0],)] if total % pool[0] == 0 else []
    return [
        (value, *rest)
        for value in range(total // pool[0] + 1)
        for rest in _valuations(pool[1:], total - value * pool[0])
    ]
