"""Payoffs of all profiles of members, estimated from games or exact, with their standard errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a float64 tensor over ranks and returns the same on all."""

TOLERANCE = 1e-6
"""By how much, relative to the larger of 1 and the payoff, sampled or exact payoffs may fail to be zero-sum."""


class PayoffTable:
    """Sums, squares and counts of sampled returns per profile (one member of each player), or exact payoffs.

    All is float64 ``[players, members_0, members_1, ...]`` (counts and the exact flags lack the leading axis).

    Args:
        num_players: players, >= 1.
        symmetric_zero_sum: two players who share one population: the table is square and antisymmetric, a profile of a
            member with itself is worth exactly 0, and only cells ``a < b`` are estimated.

    Raises:
        ValueError: num_players < 1, or symmetric with other than 2 players.
    """

    def __init__(self, num_players: int, symmetric_zero_sum: bool = False) -> None:
        if num_players < 1:
            raise ValueError(f"PayoffTable: num_players: must be >= 1, got {num_players}")
        if symmetric_zero_sum and num_players != 2:
            raise ValueError(f"PayoffTable: symmetric_zero_sum: needs 2 players, got {num_players}")
        self.num_players = num_players
        self.symmetric_zero_sum = symmetric_zero_sum
        empty = (0,) * num_players
        self._sums = torch.zeros((num_players, *empty), dtype=torch.float64)
        self._squares = torch.zeros((num_players, *empty), dtype=torch.float64)
        self._counts = torch.zeros(empty, dtype=torch.float64)
        self._exact = torch.zeros(empty, dtype=torch.bool)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Members of each player."""
        return tuple(self._counts.shape)

    @property
    def counts(self) -> Tensor:
        """``[members_0, ...]`` float64: games played per profile (1 where the payoff is exact)."""
        return self._counts.clone()

    def grow(self, player: int, n: int = 1) -> None:
        """Make room for ``n`` new members of ``player``, their cells missing; symmetric: of the shared population.

        Raises:
            ValueError: no such player, or n < 1.
        """
        self._check_player(player)
        if n < 1:
            raise ValueError(f"PayoffTable: n: must be >= 1, got {n}")
        for axis in (0, 1) if self.symmetric_zero_sum else (player,):
            for name in ("_sums", "_squares", "_counts", "_exact"):
                old: Tensor = getattr(self, name)
                dim = axis + old.ndim - self.num_players
                shape = list(old.shape)
                shape[dim] = n
                setattr(self, name, torch.cat([old, old.new_zeros(shape)], dim=dim))
        self._settle_diagonal()

    def reset(self, player: int, member: int) -> None:
        """Forget all cells of ``member``, which has changed.

        Raises:
            ValueError: no such player.
            IndexError: no such member.
        """
        self._check_player(player)
        if not 0 <= member < self.sizes[player]:
            raise IndexError(f"PayoffTable: member: must be in [0, {self.sizes[player]}), got {member}")
        for axis in (0, 1) if self.symmetric_zero_sum else (player,):
            for value in (self._sums, self._squares, self._counts, self._exact):
                value.select(axis + value.ndim - self.num_players, member).zero_()
        self._settle_diagonal()

    def missing(self, min_count: int = 1) -> Tensor:
        """``[cells, players]`` int64: profiles of fewer than ``min_count`` games and not exact, in row order."""
        wanted = (self._counts < min_count) & ~self._exact
        if self.symmetric_zero_sum:
            wanted = wanted.triu(diagonal=1)
        return wanted.nonzero()

    def add(self, cells: Tensor, returns: Tensor, reduce: Reduce | None = None) -> None:
        """Add sampled games.

        Args:
            cells: ``[games, players]`` int64, the members that played.
            returns: ``[games, players]``, what each player got.
            reduce: sums over ranks; it is called exactly once, so every rank must call ``add`` equally often, with no
                games of its own if need be. Only differences of sums and counts travel.

        Raises:
            ValueError: shapes, members that are not there, NaN or infinite returns, games of an exact cell, or returns
                that are not zero-sum in a symmetric table; the first such cell is named.
        """
        cells, returns = self._check_games(cells, returns)
        size = self._counts.numel()
        if self.symmetric_zero_sum:  # into the upper triangle; the lower one mirrors it bit for bit
            flipped = cells[:, 0] > cells[:, 1]
            gain = torch.where(flipped, -returns[:, 0], returns[:, 0])[:, None]
            cells = torch.where(flipped[:, None], cells.flip(1), cells)
        else:
            gain = returns
        index = torch.zeros_like(cells[:, 0])
        for axis, length in enumerate(self.sizes):
            index = index * length + cells[:, axis]
        rows = torch.cat([gain, gain.square(), torch.ones_like(gain[:, :1])], dim=1)
        delta = torch.zeros((size, rows.shape[1]), dtype=torch.float64).index_add_(0, index, rows)
        if reduce is not None:
            delta = reduce(delta.flatten()).reshape(delta.shape)
        delta = delta.T.reshape(-1, *self.sizes)
        if self.symmetric_zero_sum:
            sums, squares, counts = delta
            sums, squares, counts = sums - sums.T, squares + squares.T, counts + counts.T
            self._sums += torch.stack([sums, -sums])
            self._squares += squares
            self._counts += counts
        else:
            self._sums += delta[: self.num_players]
            self._squares += delta[self.num_players : -1]
            self._counts += delta[-1]

    def set_exact(self, payoffs: Tensor, cells: Tensor | None = None) -> None:
        """Put exact payoffs: standard error 0, never missing, sampled games of these cells forgotten.

        Args:
            payoffs: ``[players, members_0, ...]`` for the whole table, or ``[cells, players]`` with ``cells``.
            cells: ``[cells, players]`` int64; symmetric: the mirrored cells are set as well.

        Raises:
            ValueError: shapes, cells that are not there, payoffs that are not finite, or (symmetric) not antisymmetric.
        """
        payoffs = payoffs.detach().to("cpu", torch.float64)
        if cells is None:
            if payoffs.shape != self._sums.shape:
                raise ValueError(f"PayoffTable: payoffs: must be {tuple(self._sums.shape)}, got {tuple(payoffs.shape)}")
            if self.symmetric_zero_sum:
                payoffs = self._antisymmetric(payoffs)
                cells = torch.ones_like(self._exact).triu(diagonal=1).nonzero()
            else:
                cells = torch.ones_like(self._exact).nonzero()
            payoffs = payoffs[(slice(None), *cells.T)].T
        cells, payoffs = self._check_games(cells, payoffs, exact=True)
        if self.symmetric_zero_sum:
            _refuse((cells[:, 0] == cells[:, 1]) & (payoffs[:, 0] != 0), cells, "a member against itself is worth 0")
            flipped = cells[:, 0] > cells[:, 1]
            gain = torch.where(flipped, -payoffs[:, 0], payoffs[:, 0])
            cells = torch.where(flipped[:, None], cells.flip(1), cells)
            self._put(cells, torch.stack([gain, -gain], dim=1))
            self._put(cells.flip(1), torch.stack([-gain, gain], dim=1))
        else:
            self._put(cells, payoffs)

    def mean(self) -> Tensor:
        """``[players, members_0, ...]`` float64 payoffs, NaN where no game has been played."""
        return self._sums / self._counts.where(self._counts > 0, torch.nan)

    def standard_error(self) -> Tensor:
        """``[players, members_0, ...]`` standard error of :meth:`mean`: 0 if exact, inf with fewer than 2 games."""
        count = self._counts.clamp(min=2)
        variance = (self._squares - self._sums.square() / count).clamp(min=0) / (count - 1)
        error = (variance / count).sqrt().masked_fill(self._counts < 2, torch.inf)
        return error.masked_fill(self._exact, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, ints and bools, loadable with ``torch.load(weights_only=True)``."""
        return {
            "num_players": self.num_players,
            "symmetric_zero_sum": self.symmetric_zero_sum,
            "sums": self._sums.clone(),
            "squares": self._squares.clone(),
            "counts": self._counts.clone(),
            "exact": self._exact.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`, of any size.

        Raises:
            ValueError: the state is of another number of players or symmetry, or its tensors' shapes disagree.
        """
        for field in ("num_players", "symmetric_zero_sum"):
            if state[field] != getattr(self, field):
                raise ValueError(f"PayoffTable: {field}: must be {getattr(self, field)}, the state has {state[field]}")
        sizes = tuple(state["counts"].shape)
        shapes = {name: tuple(state[name].shape) for name in ("sums", "squares", "exact")}
        both = (self.num_players, *sizes)
        if len(sizes) != self.num_players or shapes != {"sums": both, "squares": both, "exact": sizes}:
            raise ValueError(f"PayoffTable: state_dict: shapes must fit counts {sizes}, got {shapes}")
        for name in ("sums", "squares", "counts"):
            setattr(self, f"_{name}", state[name].detach().to("cpu", torch.float64).clone())
        self._exact = state["exact"].detach().to("cpu", torch.bool).clone()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PayoffTable:
        """A table with the content of :meth:`state_dict`."""
        table = cls(int(state["num_players"]), bool(state["symmetric_zero_sum"]))
        table.load_state_dict(state)
        return table

    def digest(self) -> str:
        """sha256 of sizes and means: ranks that agree on it solve the same meta-game."""
        mean = self.mean() + 0.0  # -0.0 becomes 0.0
        mean = mean.nan_to_num(nan=torch.finfo(torch.float64).max)  # NaN has many bit patterns
        sha = hashlib.sha256(repr(tuple(mean.shape)).encode())
        sha.update(mean.contiguous().numpy().tobytes())
        return sha.hexdigest()

    # -- parts --------------------------------------------------------------------------------------------------------
    def _check_player(self, player: int) -> None:
        if not 0 <= player < self.num_players:
            raise ValueError(f"PayoffTable: player: must be in [0, {self.num_players}), got {player}")

    def _check_games(self, cells: Tensor, returns: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Both on the CPU, int64 and float64, found fit to enter the table."""
        cells = cells.detach().to("cpu", torch.int64)
        returns = returns.detach().to("cpu", torch.float64)
        if cells.ndim != 2 or cells.shape[1] != self.num_players or returns.shape != cells.shape:
            raise ValueError(
                f"PayoffTable: cells and payoffs: must both be [cells, {self.num_players}], "
                f"got {tuple(cells.shape)} and {tuple(returns.shape)}"
            )
        outside = ((cells < 0) | (cells >= torch.tensor(self.sizes))).any(dim=1)
        _refuse(outside, cells, f"members must be in the table of sizes {self.sizes}")
        _refuse(~torch.isfinite(returns).all(dim=1), cells, "payoffs must be finite, got NaN or inf")
        if not exact:
            _refuse(self._exact[tuple(cells.T)], cells, "its payoff is exact already: reset it before sampling games")
        if self.symmetric_zero_sum:
            apart = returns.sum(dim=1).abs() > TOLERANCE * returns.abs().amax(dim=1).clamp(min=1)
            _refuse(apart, cells, "payoffs must add up to 0 in a symmetric zero-sum game")
        return cells, returns

    def _put(self, cells: Tensor, payoffs: Tensor) -> None:
        where = tuple(cells.T)
        self._sums[(slice(None), *where)] = payoffs.T
        self._squares[(slice(None), *where)] = payoffs.T.square()
        self._counts[where] = 1.0
        self._exact[where] = True

    @staticmethod
    def _antisymmetric(payoffs: Tensor) -> Tensor:
        """``[2, members, members]`` with rounding errors of antisymmetry taken out."""
        if payoffs.numel():
            apart = float(torch.stack([payoffs[0] + payoffs[0].T, payoffs[0] + payoffs[1]]).abs().amax())
            if apart > TOLERANCE * max(1.0, float(payoffs.abs().amax())):  # NaN passes here; its cell is named later
                raise ValueError(
                    "PayoffTable: payoffs: must be square, antisymmetric and zero-sum in a symmetric game, "
                    f"got max |M + M^T| = {apart:.3g}"
                )
        gain = (payoffs[0] - payoffs[0].T) / 2
        return torch.stack([gain, -gain])

    def _settle_diagonal(self) -> None:
        if self.symmetric_zero_sum:
            for value in (self._sums, self._squares):
                value.diagonal(dim1=1, dim2=2).zero_()
            self._counts.diagonal().fill_(1.0)
            self._exact.diagonal().fill_(True)


def _refuse(wrong: Tensor, cells: Tensor, rule: str) -> None:
    """Raise a ValueError that names the first cell marked in ``wrong`` ``[cells]``."""
    if bool(wrong.any()):
        cell = tuple(cells[wrong.nonzero()[0, 0]].tolist())
        raise ValueError(f"PayoffTable: cell {cell}: {rule}")
