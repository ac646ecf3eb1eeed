"""Sampled play on a flattened game tree: every step of all games is a few gathers, and no network is called.

A policy on a small tree is a table over its information states, so a network is evaluated once on all of them and play
needs tables only. Chance moves are collapsed: where a move (or the root) is followed by chance, one draw over the next
decision and terminal nodes stands for the whole run of chance moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.games.sequences import nodes_by_depth
from datamodules.games.tree import CHANCE, GameTree

_NEVER = 2.0  # above every uniform draw


@dataclass(frozen=True)
class PolicyTables:
    """Members' tables made ready for drawing (:meth:`TreeSimulator.prepare`), flattened into rows of actions.

    A row's number is ``start[player] + member * states[player] + information state``.

    Args:
        ends: ``[rows * actions]`` cumulative probability; above 1 from the row's last possible action on.
        probability: ``[rows * actions]``.
        start: ``[players]`` int64.
        members: per player, number of members.
    """

    ends: Tensor
    probability: Tensor
    start: Tensor
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Chance:
    """Collapsed chance: ``row`` ``[nodes]`` of a chance node that play can stop at, else -1.

    Row ``r`` holds outcomes ``start[r] ... start[r] + last[r]`` of ``ends`` (cumulative, float64) and ``node``.
    """

    row: Tensor
    start: Tensor
    last: Tensor
    ends: Tensor
    node: Tensor


class TreeSimulator:
    """Plays games of one tree in batches, on the tree's device.

    Args:
        tree: the game.

    Raises:
        ValueError: the tree contradicts itself.
    """

    def __init__(self, tree: GameTree) -> None:
        depths = nodes_by_depth(tree)
        device, actions = tree.parent.device, tree.num_actions
        self.tree = tree
        self.device = device
        self.max_moves = _most_moves(tree, depths)
        self._chance = _collapse_chance(tree, depths)
        self._chance_rows = int(self._chance.start.shape[0])
        self._widest = int(self._chance.last.max()) + 1 if self._chance_rows else 1
        self._states = torch.tensor([legal.shape[0] for legal in tree.legal], device=device)
        self._child = torch.full((len(tree) * actions,), -1, dtype=torch.int64, device=device)
        edges = torch.arange(1, len(tree), device=device)[tree.player[tree.parent[1:]] >= 0]
        self._child[tree.parent[edges] * actions + tree.action[edges]] = edges

    def prepare(self, tables: Sequence[Tensor]) -> PolicyTables:
        """Cumulative form of ``tables``, per player ``[members, states, actions]`` probabilities (float32 or float64).

        An action without probability is never drawn; the last one with any takes what rounding leaves.

        Raises:
            ValueError: a wrong number or shape of tables; a row that is not a probability vector over legal actions.
        """
        tree = self.tree
        if len(tables) != tree.num_players:
            raise ValueError(f"TreeSimulator: tables: one for each of {tree.num_players} players, got {len(tables)}")
        for player, table in enumerate(tables):
            legal = tree.legal[player]
            if table.dim() != 3 or table.shape[1:] != legal.shape:
                wanted = f"shape [members, {legal.shape[0]}, {legal.shape[1]}]"
                raise ValueError(f"TreeSimulator: tables[{player}]: {wanted}, got {list(table.shape)}")
            sums = table.sum(-1)
            valid = (table >= 0).all() & ((sums - 1).abs() < 1e-4).all() & (table.masked_fill(legal, 0) == 0).all()
            if not bool(valid):  # so for NaN, too
                raise ValueError(
                    f"TreeSimulator: tables[{player}]: every row must be probabilities of legal actions that add up "
                    f"to 1, got sums from {float(sums.min()):.6g} to {float(sums.max()):.6g}; mask illegal actions"
                )
        probability = torch.cat([table.detach().reshape(-1, tree.num_actions) for table in tables])
        total = probability.cumsum(-1)
        ends = torch.where(total >= total[:, -1:], _NEVER, total / total[:, -1:])
        sizes = [table.shape[0] * table.shape[1] for table in tables]
        start = torch.tensor([0, *sizes[:-1]], device=self.device).cumsum(0)
        return PolicyTables(ends.flatten(), probability.flatten(), start, tuple(len(table) for table in tables))

    @overload
    def play(
        self,
        tables: PolicyTables | Sequence[Tensor],
        seats: Tensor,
        generator: torch.Generator,
        returns_only: Literal[False] = False,
    ) -> TensorDict: ...

    @overload
    def play(
        self,
        tables: PolicyTables | Sequence[Tensor],
        seats: Tensor,
        generator: torch.Generator,
        returns_only: Literal[True],
    ) -> Tensor: ...

    def play(
        self,
        tables: PolicyTables | Sequence[Tensor],
        seats: Tensor,
        generator: torch.Generator,
        returns_only: bool = False,
    ) -> TensorDict | Tensor:
        """Play ``B`` games to their ends; arguments, result and errors as of :func:`simulate`.

        Args:
            tables: as of :meth:`prepare`, or its result, which saves its work when the same tables play again.
            seats: ``[B, players]`` int64, which member sits where.
            generator: of all draws.
            returns_only: give the returns ``[B, players]`` alone, without recording the moves. The same generator
                gives the same games either way.
        """
        ready = tables if isinstance(tables, PolicyTables) else self.prepare(tables)
        self._check_seats(seats, ready)
        tree, games, actions = self.tree, seats.shape[0], self.tree.num_actions
        # base[player * games + game]: the row of the member's information state 0
        base = (ready.start + seats * self._states).mT.flatten()
        player_base = tree.player.clamp_min(0) * games
        record = None if returns_only else _Record(self.max_moves, games, ready.probability.dtype, self.device)
        node = self._after_chance(torch.zeros(games, dtype=torch.int64, device=self.device), generator)
        final, game = node.clone(), torch.arange(games, device=self.device)
        for time in range(self.max_moves):
            live = (tree.player.index_select(0, node) >= 0).nonzero().squeeze(1)
            if live.shape[0] < node.shape[0]:
                final.index_copy_(0, game, node)
                node, game = node.index_select(0, live), game.index_select(0, live)
            if node.shape[0] == 0:
                break
            state = tree.info_state.index_select(0, node)
            row = base.index_select(0, player_base.index_select(0, node) + game) + state
            draw = _uniform(node.shape[0], ready.ends.dtype, generator, self.device)
            row = row * actions
            action = _count_passed(ready.ends, row, actions - 1, actions, draw)
            if record is not None:
                mover, chosen = tree.player.index_select(0, node), ready.probability.index_select(0, row + action)
                record.add(time, game, info_state=state, action=action, player=mover, probability=chosen)
            node = self._after_chance(self._child.index_select(0, node * actions + action), generator)
        final.index_copy_(0, game, node)
        returns = tree.utility.double().index_select(0, final)
        if record is None:
            return returns
        return TensorDict({**record.by_game(), "returns": returns, "seats": seats}, batch_size=[games])

    def _after_chance(self, node: Tensor, generator: torch.Generator) -> Tensor:
        """``node`` with the chance nodes among them replaced by the decision or terminal nodes that chance led to."""
        if self._chance_rows == 0:
            return node
        chance = self._chance
        row = chance.row.index_select(0, node)
        hit = (row >= 0).nonzero().squeeze(1)
        if hit.shape[0] == 0:
            return node
        row = row.index_select(0, hit)
        start, last = chance.start.index_select(0, row), chance.last.index_select(0, row)
        draw = _uniform(hit.shape[0], torch.float64, generator, self.device)
        outcome = start + _count_passed(chance.ends, start, last, self._widest, draw)
        return node.index_copy(0, hit, chance.node.index_select(0, outcome))

    def _check_seats(self, seats: Tensor, tables: PolicyTables) -> None:
        players = self.tree.num_players
        if seats.dim() != 2 or seats.shape[1] != players or seats.shape[0] == 0 or seats.is_floating_point():
            raise ValueError(
                f"TreeSimulator: seats: integers [games, {players}], got {seats.dtype} of shape {list(seats.shape)}"
            )
        low, high = (bound.tolist() for bound in torch.aminmax(seats, dim=0))
        for player, members in enumerate(tables.members):
            if low[player] < 0 or high[player] >= members:
                raise ValueError(
                    f"TreeSimulator: seats[:, {player}]: members are 0 to {members - 1}, "
                    f"got {low[player]} to {high[player]}"
                )


def simulate(
    tree: GameTree,
    tables: PolicyTables | Sequence[Tensor],
    seats: Tensor,
    generator: torch.Generator,
) -> TensorDict:
    """Play games by sampling. Keep a :class:`TreeSimulator` instead to play the same tree more than once.

    Args:
        tree: the game.
        tables: per player ``[members, states, actions]`` probabilities of legal actions, float32 or float64; a draw
            has the resolution of their type (2^-24 or 2^-53).
        seats: ``[B, players]`` int64, which member sits where.
        generator: of all draws; on the tree's device or another.

    Returns:
        TensorDict ``[B]`` with the decisions of every game in order, padded to the tree's longest game (``T``), chance
        moves left out: ``info_state``, ``action``, ``player`` ``[B, T]`` int64 (padding -1), ``probability``
        ``[B, T]`` of the action taken (padding 1, whose logarithm is 0), ``returns`` ``[B, players]`` float64,
        ``seats`` ``[B, players]``.

    Raises:
        ValueError: tables that are not probabilities of legal actions; seats without a member.
    """
    return TreeSimulator(tree).play(tables, seats, generator)


class _Record:
    """The moves, kept as ``[T, B]`` so that a step writes one row."""

    def __init__(self, moves: int, games: int, dtype: torch.dtype, device: torch.device) -> None:
        kept = dict.fromkeys(("info_state", "action", "player"), (-1, torch.int64)) | {"probability": (1, dtype)}
        self.rows = {
            key: torch.full((moves, games), pad, dtype=kind, device=device) for key, (pad, kind) in kept.items()
        }

    def add(self, time: int, game: Tensor, **values: Tensor) -> None:
        for key, value in values.items():
            self.rows[key][time].index_copy_(0, game, value)

    def by_game(self) -> dict[str, Tensor]:
        return {key: rows.mT.contiguous() for key, rows in self.rows.items()}


def _uniform(count: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(count, dtype=dtype, generator=generator, device=generator.device).to(device)


def _count_passed(ends: Tensor, start: Tensor, last: Tensor | int, width: int, draw: Tensor) -> Tensor:
    """How many of the non-decreasing ``ends[start], ..., ends[start + last]`` are at or below ``draw``.

    The last one never is, so the count is an index. A binary search in lockstep: one gather for each doubling of
    ``width``, the most entries that any row has.
    """
    passed = torch.zeros_like(start)
    step = 1 << max(0, (width - 1).bit_length() - 1) if width > 1 else 0
    while step:
        probe = passed + (step - 1)
        probe = probe.clamp_max_(last) if isinstance(last, int) else torch.minimum(probe, last)
        passed += (draw >= ends.index_select(0, start + probe)) * step
        step >>= 1
    return passed


def _most_moves(tree: GameTree, depths: list[Tensor]) -> int:
    """Most decisions on any path."""
    moves = (tree.player >= 0).long()
    for nodes in depths[1:]:
        moves[nodes] += moves[tree.parent[nodes]]
    return int(moves.max())


def _collapse_chance(tree: GameTree, depths: list[Tensor]) -> _Chance:
    """For every chance node that chance does not precede: the next other nodes, with their probabilities."""
    device = tree.parent.device
    is_chance = tree.player == CHANCE
    head = torch.arange(len(tree), device=device)
    probability = torch.ones(len(tree), dtype=torch.float64, device=device)
    for nodes in depths[1:]:
        nodes = nodes[is_chance[tree.parent[nodes]]]
        head[nodes] = head[tree.parent[nodes]]
        probability[nodes] = probability[tree.parent[nodes]] * tree.probability[nodes].double()
    outcomes = ((head != torch.arange(len(tree), device=device)) & ~is_chance & (probability > 0)).nonzero().squeeze(1)
    outcomes = outcomes[torch.argsort(head[outcomes], stable=True)]
    heads, counts = torch.unique_consecutive(head[outcomes], return_counts=True)
    start = counts.cumsum(0) - counts
    row = torch.full((len(tree),), -1, dtype=torch.int64, device=device)
    row[heads] = torch.arange(heads.shape[0], device=device)
    total = probability[outcomes].cumsum(0)
    before = torch.cat([total.new_zeros(1), total])[start]
    owner = row[head[outcomes]]
    ends = total - before[owner]
    ends = ends / ends[start + counts - 1][owner]
    ends[start + counts - 1] = _NEVER
    return _Chance(row, start, counts - 1, ends, outcomes)
