"""Compilation of a game tree into the sequence form: own sequences, entries, sparse coefficients."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from datamodules.games.tree import CHANCE, TERMINAL, GameTree

_Held = TypeVar("_Held")


@dataclass(frozen=True)
class Level:
    """One own depth: which states (by rank) and which moves (sequences less the empty one) belong to it."""

    states: slice
    sequences: slice


@dataclass(frozen=True)
class OwnSequences:
    """A player's tree of sequences. States are *ranked* by own depth, then by number; moves follow the ranks.

    ``parent`` ``[states]``: sequence before each ranked state. Of every move ``[sequences - 1]``: ``flat`` its place
    in a flattened table, ``owner`` its state's number, ``rank`` its state's rank, ``local`` that rank within its
    level, ``above`` the parent's place in the previous level. ``counts`` ``[states]``: legal actions, by number.
    """

    legal: Tensor
    counts: Tensor
    parent: Tensor
    flat: Tensor
    owner: Tensor
    rank: Tensor
    local: Tensor
    above: Tensor
    levels: tuple[Level, ...]

    def of_move(self, moves: Tensor) -> Tensor:
        """Sequence numbers for ``state * actions + action`` of the last own move, -1 (none yet) being sequence 0."""
        numbers = torch.zeros(self.legal.numel() + 1, dtype=torch.int64, device=moves.device)  # -1 reads the last, a 0
        numbers[self.flat] = torch.arange(1, self.flat.shape[0] + 1, device=moves.device)
        return numbers[moves]


@dataclass(frozen=True)
class Entries:
    """What ends the game: all players' sequences and, summed over its terminal histories, chance and payoffs.

    ``sequences``: per player ``[entries]``. ``weight`` ``[entries]``: chance's probability. ``utility``
    ``[entries, players]``: payoffs times chance's probability.
    """

    sequences: tuple[Tensor, ...]
    weight: Tensor
    utility: Tensor


@dataclass(frozen=True)
class Bilinear:
    """A sparse matrix ``[sequences_0, sequences_1]`` and its transpose, both by rows."""

    rows: Tensor
    columns: Tensor

    def times(self, right: Tensor, transposed: bool) -> Tensor:
        """``form @ right`` or ``form.T @ right``, ``right`` ``[sequences]`` or ``[sequences, members]``."""
        forward, backward = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        product: Tensor = _SparseProduct.apply(forward, backward, right)  # pyright: ignore[reportAssignmentType]
        return product

    def flipped(self) -> Bilinear:
        return Bilinear(self.columns, self.rows)


class _SparseProduct(torch.autograd.Function):
    """``matrix @ right`` with the transpose at hand for the gradient, which torch would build anew each time."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transpose: Tensor, right: Tensor) -> Tensor:
        ctx.matrices = matrix, transpose
        return matrix @ right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        matrix, transpose = ctx.matrices
        gradient: Tensor = _SparseProduct.apply(transpose, matrix, grads[0])  # pyright: ignore[reportAssignmentType]
        return None, None, gradient


def moved_to(value: _Held, device: torch.device | str) -> _Held:
    """A copy of a dataclass, with its tensors (and tuples of tensors) on ``device``."""

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        return tuple(map(move, part)) if isinstance(part, tuple) else part

    fields = {field.name: move(getattr(value, field.name)) for field in dataclasses.fields(value)}  # pyright: ignore
    return dataclasses.replace(value, **fields)  # pyright: ignore


def nodes_by_depth(tree: GameTree) -> list[Tensor]:
    """The nodes of every depth; errors where the tree contradicts itself."""

    def fail(rule: str) -> ValueError:
        return ValueError(f"SequenceFormGame: tree: {tree.name}: {rule}")

    nodes = torch.arange(len(tree), device=tree.parent.device)
    if len(tree) == 0 or int(tree.parent[0]) != -1 or bool((tree.parent[1:] >= nodes[1:]).any()):
        raise fail("node 0 must be the root and parents must come before children")
    if bool((tree.parent[1:] < 0).any()):
        raise fail("only node 0 may be without a parent")
    mover = tree.player[tree.parent[1:]]
    if bool((mover == TERMINAL).any()):
        raise fail(f"terminal node {int(tree.parent[1:][mover == TERMINAL][0])} must have no children")
    children = torch.bincount(tree.parent[1:], minlength=len(tree))
    total = torch.zeros(len(tree), dtype=torch.float64, device=nodes.device).index_add(
        0, tree.parent[1:], tree.probability[1:].double()
    )
    wrong = (tree.player == CHANCE) & ((total - 1).abs() > 1e-9)
    if bool(wrong.any()):
        node = int(nodes[wrong][0])
        raise fail(f"the probabilities at chance node {node} must add up to 1, got {float(total[node])}")
    if bool((tree.probability[1:][mover != CHANCE] != 1).any()):
        raise fail("the probability of an edge that does not leave a chance node must be 1")
    if bool((tree.action[1:] < 0).any()):
        raise fail("actions must not be negative below the root")
    edges = tree.parent[1:] * (int(tree.action.max()) + 1) + tree.action[1:]
    if torch.unique(edges).shape[0] != len(tree) - 1:
        raise fail("two children of a node must not be reached by the same action")
    for player, legal in enumerate(tree.legal):
        if not bool(legal.any(1).all()):
            raise fail(
                f"information state {int((~legal.any(1)).nonzero()[0, 0])} of player {player} has no legal action"
            )
        mine = nodes[tree.player == player]
        states = tree.info_state[mine]
        if bool(((states < 0) | (states >= legal.shape[0])).any()):
            raise fail(f"player {player}'s nodes must have information states from 0 to {legal.shape[0] - 1}")
        if torch.unique(states).shape[0] != legal.shape[0]:
            raise fail(f"every information state of player {player} must occur at a node")
        moved = nodes[1:][mover == player]
        taken = tree.info_state[tree.parent[moved]], tree.action[moved].clamp_max(tree.num_actions - 1)
        inside = bool((tree.action[moved] < tree.num_actions).all() and legal[taken].all())
        if not inside or not torch.equal(children[mine], legal[states].sum(1)):
            raise fail(f"the children of player {player}'s nodes must be the legal actions of their information states")
    if tree.zero_sum and bool((tree.utility.sum(1).abs() > 1e-9).any()):
        raise fail("a zero-sum game's payoffs must add up to 0")
    frontier = [nodes[:1]]
    while frontier[-1].numel():
        inside = torch.zeros(len(tree), dtype=torch.bool, device=nodes.device)
        inside[frontier[-1]] = True
        frontier.append(nodes[1:][inside[tree.parent[1:]]])
    return frontier[:-1]


def descend(tree: GameTree, depths: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Per player each node's last own move (``state * actions + action`` or -1), and each node's chance probability."""
    last = torch.full((tree.num_players, len(tree)), -1, dtype=torch.int64, device=tree.parent.device)
    chance = tree.probability.double().clone()
    for nodes in depths[1:]:
        above = tree.parent[nodes]
        chance[nodes] = chance[above] * chance[nodes]
        last[:, nodes] = last[:, above]
        moved = nodes[tree.player[above] >= 0]
        above = tree.parent[moved]
        last[tree.player[above], moved] = tree.info_state[above] * tree.num_actions + tree.action[moved]
    return list(last), chance


def own_sequences(tree: GameTree, last: Tensor, player: int) -> OwnSequences:
    legal = tree.legal[player]
    device, count = legal.device, legal.shape[0]
    mine = tree.player == player
    states, before = tree.info_state[mine], last[mine]
    low = torch.full((count,), 2**62, device=device).scatter_reduce_(0, states, before, "amin")
    high = torch.full((count,), -2, device=device).scatter_reduce_(0, states, before, "amax")
    if not torch.equal(low, high):
        state = int((low != high).nonzero()[0, 0])
        label = f" ({tree.labels[player][state]!r})" if tree.labels is not None else ""
        raise ValueError(
            f"SequenceFormGame: tree: {tree.name}: information state {state}{label} of player {player} is reached "
            "after different own moves: the sequence form needs perfect recall, so tell such histories apart"
        )
    above_state = torch.div(low, tree.num_actions, rounding_mode="floor")  # -1 where no own move came before
    depth = torch.zeros(count, dtype=torch.int64, device=device)
    while True:  # as many rounds as a player has moves
        deeper = torch.where(above_state >= 0, depth[above_state] + 1, 0) if count else depth
        if torch.equal(deeper, depth):
            break
        depth = deeper
    order = torch.argsort(depth, stable=True)
    counts = legal.sum(1)
    place, action = legal[order].nonzero(as_tuple=True)  # by rank, then by action
    flat = order[place] * tree.num_actions + action
    numbers = torch.zeros(count * tree.num_actions + 1, dtype=torch.int64, device=device)
    numbers[flat] = torch.arange(1, flat.shape[0] + 1, device=device)
    parent = numbers[low[order]]
    ends = torch.bincount(depth).cumsum(0).tolist() if count else []
    move_ends = counts[order].cumsum(0)
    levels, above, local = [], (parent[place] if count else place).clone(), place.clone()
    start, moves, previous = 0, 0, 0
    for position, end in enumerate(ends):
        level = Level(slice(start, end), slice(moves, int(move_ends[end - 1])))
        local[level.sequences] -= start
        if position:
            above[level.sequences] -= 1 + previous
        levels.append(level)
        previous, start, moves = moves, end, level.sequences.stop
    return OwnSequences(legal, counts.double(), parent, flat, order[place], place, local, above, tuple(levels))


def collect_entries(tree: GameTree, sequences: list[Tensor], chance: Tensor) -> Entries:
    ends = tree.player == TERMINAL
    rows = [seq[ends] for seq in sequences]
    key = torch.zeros_like(rows[0])
    for row in rows:  # renumbered after each player, so that many players do not overflow the key
        key = torch.unique(key * (int(row.max()) + 1) + row, return_inverse=True)[1]
    count = int(key.max()) + 1
    weight = torch.zeros(count, dtype=torch.float64, device=key.device).index_add(0, key, chance[ends])
    paid = chance[ends].unsqueeze(1) * tree.utility[ends].double()
    utility = torch.zeros(count, tree.num_players, dtype=torch.float64, device=key.device).index_add(0, key, paid)
    return Entries(tuple(torch.zeros_like(key[:count]).scatter(0, key, row) for row in rows), weight, utility)


def bilinear_forms(entries: Entries, own: tuple[OwnSequences, ...], zero_sum: bool) -> dict[str, Bilinear]:
    """The two-player coefficients as sparse matrices."""
    first, second = entries.sequences
    sizes = [1 + player.flat.shape[0] for player in own]
    # Entries come ordered by the first player's sequence, then by the second's.
    turned = torch.argsort(second, stable=True)

    def compressed(row: Tensor, column: Tensor, values: Tensor, shape: list[int]) -> Tensor:
        starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
        starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
        with warnings.catch_warnings():  # torch says once that its CSR support is in beta
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(starts, column, values, shape)

    def form(values: Tensor) -> Bilinear:
        forward = compressed(first, second, values, sizes)
        return Bilinear(forward, compressed(second[turned], first[turned], values[turned], sizes[::-1]))

    forms = {"weight": form(entries.weight), ("utility" if zero_sum else "utility_0"): form(entries.utility[:, 0])}
    return forms if zero_sum else forms | {"utility_1": form(entries.utility[:, 1])}
