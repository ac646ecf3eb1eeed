"""Games given as payoff tensors: one information state per player, plans are probability vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-9
"""How far, as a share of the largest payoff, a tensor may be from zero-sum or symmetric and still count as it."""


class NormalFormGame:
    """A finite game in normal form; a ``TabularGame`` with one information state per player.

    Strategies are behaviour tables ``[1, n_i]``, plans are probability vectors ``[n_i]``: the one-state case of the
    sequence form, in which every own sequence is one action and comes to a terminal history with probability 1.

    Args:
        payoffs: ``[players, n_1, ..., n_players]``, what each player gets in each profile of pure strategies; kept in
            float64.
        name: the game, with its parameters.
        symmetric: ``None``: two players with ``u_1(x, y) = u_0(y, x)`` are found out; ``True``: checked; ``False``:
            players keep populations of their own in any case.

    Raises:
        ValueError: wrong shape, an entry that is not finite, or ``symmetric=True`` for a game that is not.
    """

    def __init__(self, payoffs: Tensor, name: str = "normal_form", symmetric: bool | None = None) -> None:
        payoffs = _checked(payoffs)
        scale = max(float(payoffs.abs().max()), 1e-300)
        mirror = _asymmetry(payoffs)
        mirrored = mirror is not None and mirror <= RELATIVE_TOLERANCE * scale
        if symmetric and not mirrored:
            why = f"max |u_1(x, y) - u_0(y, x)| = {mirror:.3g}" if mirror is not None else f"shape {[*payoffs.shape]}"
            raise ValueError(f"NormalFormGame: symmetric: needs two players with u_1(x, y) = u_0(y, x), got {why}")
        self.name = name
        self.num_players = payoffs.shape[0]
        self.zero_sum = bool(float(payoffs.sum(0).abs().max()) <= RELATIVE_TOLERANCE * scale)
        self.symmetric = mirrored if symmetric is None else symmetric
        self.table = payoffs

    @property
    def num_strategies(self) -> tuple[int, ...]:
        """Pure strategies of each player."""
        return tuple(self.table.shape[1:])

    def strategy_shape(self, player: int) -> tuple[int, ...]:
        return (1, self._size(player))

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 1, n]``: uniform(0, 1) draws, normalised (PSD-PSRO's official initial rows)."""
        draws = torch.rand(count, 1, self._size(player), dtype=torch.float64, generator=generator)
        return draws / draws.sum(-1, keepdim=True)

    def plans(self, player: int, strategies: Tensor) -> Tensor:
        """``[..., 1, n] -> [..., n]``."""
        if strategies.shape[-2:] != self.strategy_shape(player):
            raise ValueError(
                f"NormalFormGame: strategies: player {player}'s must end in {[*self.strategy_shape(player)]}, "
                f"got {[*strategies.shape]}"
            )
        return strategies.squeeze(-2)

    def strategy_of(self, player: int, plan: Tensor) -> Tensor:
        """``[..., n] -> [..., 1, n]``; a plan of zeros, which says nothing, becomes the uniform strategy."""
        self._check_plan(player, plan)
        silent = plan.sum(-1, keepdim=True) <= 0
        return torch.where(silent, torch.full_like(plan, 1.0 / plan.shape[-1]), plan).unsqueeze(-2)

    def payoffs(self, plans: Sequence[Tensor]) -> Tensor:
        """``plans[i]`` ``[members_i, n_i]`` -> ``[players, members_0, members_1, ...]``."""
        self._check_profile(plans)
        if self.num_players == 2 and self.zero_sum:
            first = plans[0] @ self.table[0] @ plans[1].mT
            return torch.stack((first, -first))
        values = self.table
        for plan in plans:  # the front axis is summed out, members come last: the order is kept
            values = values.movedim(1, -1) @ plan.mT
        return values

    def payoff_vector(self, player: int, plans: Sequence[Tensor]) -> Tensor:
        """``[n]``: ``player``'s payoff for each own pure strategy against the others' ``plans[j]`` ``[n_j]``."""
        self._size(player)
        if len(plans) != self.num_players:
            raise ValueError(f"NormalFormGame: plans: must be one per player ({self.num_players}), got {len(plans)}")
        values = self.table[player]
        for other in reversed(range(self.num_players)):  # from the last axis on, so that the axes before keep theirs
            if other == player:
                continue
            self._check_plan(other, plans[other])
            values = values.movedim(other, -1) @ plans[other]
        return values

    def reach(self, player: int, plans: Sequence[Tensor] | None = None) -> Tensor:
        """Ones ``[n]``: no chance, and every own action ends the game."""
        return torch.ones(self._size(player), dtype=torch.float64)

    def best_response(self, player: int, payoff_vector: Tensor) -> tuple[Tensor, Tensor]:
        """The first pure strategy ``[1, n]`` with the largest entry of ``payoff_vector`` ``[n]``, and that entry."""
        self._check_plan(player, payoff_vector)
        best = payoff_vector.argmax()
        strategy = torch.zeros(1, payoff_vector.shape[0], dtype=torch.float64)
        strategy[0, best] = 1.0
        return strategy, payoff_vector[best]

    def legal(self, player: int) -> Tensor:
        """``[1, n]``, all true."""
        return torch.ones(1, self._size(player), dtype=torch.bool)

    def observations(self, player: int) -> Tensor:
        """``[1, 1]`` float32, the constant 1: there is nothing to see."""
        self._size(player)
        return torch.ones(1, 1, dtype=torch.float32)

    def digest(self) -> Mapping[str, str]:
        """The name and the SHA-256 of the payoffs' float64 bytes with their shape."""
        content = hashlib.sha256(str([*self.table.shape]).encode())
        content.update(self.table.numpy().astype("<f8", copy=False).tobytes())
        return {"game": self.name, "game_payoffs": content.hexdigest()}

    def _size(self, player: int) -> int:
        if not 0 <= player < self.num_players:
            raise ValueError(f"NormalFormGame: player: must be 0 to {self.num_players - 1}, got {player}")
        return self.table.shape[1 + player]

    def _check_plan(self, player: int, plan: Tensor) -> None:
        if plan.shape[-1:] != (self._size(player),):
            raise ValueError(
                f"NormalFormGame: plans: player {player}'s must end in [{self._size(player)}], got {[*plan.shape]}"
            )

    def _check_profile(self, plans: Sequence[Tensor]) -> None:
        if len(plans) != self.num_players:
            raise ValueError(f"NormalFormGame: plans: must be one per player ({self.num_players}), got {len(plans)}")
        for player, plan in enumerate(plans):
            self._check_plan(player, plan)
            if plan.ndim != 2:
                raise ValueError(
                    f"NormalFormGame: plans: player {player}'s must be [members, {self._size(player)}], "
                    f"got {[*plan.shape]}"
                )


def from_bimatrix(row: Tensor, column: Tensor, name: str = "bimatrix") -> NormalFormGame:
    """The two-player game that pays ``row`` ``[n, m]`` to the row player and ``column`` ``[n, m]`` to the other."""
    if row.ndim != 2 or row.shape != column.shape:
        raise ValueError(
            f"NormalFormGame: payoffs: row and column must be two equal [n, m] matrices, "
            f"got {[*row.shape]} and {[*column.shape]}"
        )
    return NormalFormGame(torch.stack((row, column)), name)


def from_antisymmetric(matrix: Tensor, name: str) -> NormalFormGame:
    """The symmetric zero-sum game of ``matrix`` ``[n, n]``: entry ``[a, b]`` is what ``a`` wins from ``b``."""
    return NormalFormGame(torch.stack((matrix, -matrix)), name, symmetric=True)


def _checked(payoffs: Tensor) -> Tensor:
    shape = [*payoffs.shape]
    if payoffs.ndim < 3 or shape[0] != payoffs.ndim - 1:
        raise ValueError(f"NormalFormGame: payoffs: must be [players, n_1, ..., n_players], 2 or more, got {shape}")
    if payoffs.numel() == 0:
        raise ValueError(f"NormalFormGame: payoffs: every player needs at least one strategy, got {shape}")
    payoffs = payoffs.detach().to(device="cpu", dtype=torch.float64, copy=True).contiguous()
    finite = payoffs.isfinite()
    if not finite.all():
        place = [int(index) for index in (~finite).nonzero()[0]]
        raise ValueError(f"NormalFormGame: payoffs: must be finite, got {float(payoffs[tuple(place)])} at {place}")
    return payoffs


def _asymmetry(payoffs: Tensor) -> float | None:
    """max ``|u_1(x, y) - u_0(y, x)|``, or ``None`` if the players' strategies differ in number."""
    if payoffs.shape[0] != 2 or payoffs.shape[1] != payoffs.shape[2]:
        return None
    return float((payoffs[1] - payoffs[0].mT).abs().max())
