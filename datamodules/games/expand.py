"""From rules to a whole game tree: breadth-first expansion, one batch of states for each depth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.games.rules import CHANCE, TERMINAL, Rules
from datamodules.games.tree import GameTree


def expand(rules: Rules, max_nodes: int = 5_000_000) -> GameTree:
    """Enumerate the game of ``rules``.

    Nodes are numbered breadth-first, children by rising action; information states, per player, by their first node.
    Chance outcomes of probability 0 get no node.

    Args:
        rules: the game.
        max_nodes: largest tree to build. A level is counted before it is built.

    Raises:
        ValueError: if the tree has more than ``max_nodes`` nodes; if two nodes with the same observation differ in
            their legal actions, or a zero-sum game's payoffs do not add up to 0 (errors of the rules).
    """
    state = rules.initial(1)
    parent = action = torch.full((1,), -1, dtype=torch.int64)
    probability = torch.ones(1, dtype=torch.float64)
    levels: list[tuple[Tensor, ...]] = []
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(rules.num_players)]
    first, depth = 0, 0
    while True:
        mover, legal = rules.mover(state), rules.legal(state)
        utility = rules.returns(state)
        levels.append((parent, action, mover, probability, utility))
        for player, store in enumerate(seen):
            rows = (mover == player).nonzero().squeeze(1)
            store.append((rows + first, rules.observation(state[rows], mover[rows]), legal[rows]))
        edges, weights = _edges(rules, state, mover, legal)
        source, move = edges.nonzero(as_tuple=True)
        total, depth = first + len(state), depth + 1
        if total + len(source) > max_nodes:
            raise ValueError(
                f"expand: max_nodes: {rules.name} has {total + len(source)} nodes down to depth {depth} alone: "
                f"choose a smaller game, or raise max_nodes, got {max_nodes}"
            )
        if not len(source):
            break
        probability = weights[source, move]
        state, parent, action, first = rules.step(state[source], move), source + first, move, total
    parent, action, mover, probability, utility = (torch.cat(part) for part in zip(*levels, strict=True))
    if rules.zero_sum and bool((utility.sum(1).abs() > 1e-9).any()):
        raise ValueError(
            f"{type(rules).__name__}: zero_sum: payoffs must add up to 0, got {utility.sum(1).abs().max()}"
        )
    info_state = torch.full_like(parent, -1)
    masks, observations = [], []
    for player, store in enumerate(seen):
        nodes, rows, legal = (torch.cat(part) for part in zip(*store, strict=True))
        state_of, example = _classes(rows)
        if bool((legal != legal[example][state_of]).any()):
            raise ValueError(
                f"{type(rules).__name__}: observation: nodes of player {player} with equal observations must "
                f"have equal legal actions, got a pair that differs"
            )
        info_state[nodes] = state_of
        masks.append(legal[example])
        observations.append(rows[example])
    return GameTree(
        name=rules.name,
        num_players=rules.num_players,
        num_actions=rules.num_actions,
        parent=parent,
        action=action,
        player=mover,
        probability=probability,
        info_state=info_state,
        utility=utility,
        legal=tuple(masks),
        observations=tuple(observations),
        zero_sum=rules.zero_sum,
    )


def _edges(rules: Rules, state: Tensor, mover: Tensor, legal: Tensor) -> tuple[Tensor, Tensor]:
    """Which moves have a child ``[nodes, moves]`` bool, and the edges' probabilities (1 for players' moves)."""
    width = max(rules.num_actions, rules.max_chance_outcomes)
    edges = functional.pad(legal & (mover >= 0).unsqueeze(1), (0, width - rules.num_actions))
    weights = torch.ones(edges.shape, dtype=torch.float64)
    rows = (mover == CHANCE).nonzero().squeeze(1)
    if len(rows):
        chance = rules.chance_probabilities(state[rows])
        weights[rows] = functional.pad(chance, (0, width - rules.max_chance_outcomes))
        edges[rows] = weights[rows] > 0
    dead = ((mover != TERMINAL) & ~edges.any(1)).nonzero()
    if len(dead):
        raise ValueError(f"{type(rules).__name__}: legal: a node that is not terminal must have a move, got none")
    return edges, weights


def _classes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of equal rows of ``[nodes, features]``, by first row: class of each row, first row of each class."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    if bool(((rows == 0) | (rows == 1)).all()):  # one-hot features: a few integers instead of a row to compare
        word = 62
        bits = functional.pad(rows.to(torch.int64), (0, -rows.shape[1] % word)).view(len(rows), -1, word)
        words = (bits << torch.arange(word)).sum(2)
        identity = torch.zeros(len(rows), dtype=torch.int64)
        for column in words.unbind(1):
            part = torch.unique(column, return_inverse=True)[1]
            identity = torch.unique(identity * (part.max() + 1) + part, return_inverse=True)[1]
    else:
        identity = torch.unique(rows, dim=0, return_inverse=True)[1]
    count = int(identity.max()) + 1
    example = torch.full((count,), len(rows)).scatter_reduce(0, identity, torch.arange(len(rows)), "amin")
    example, order = example.sort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    return rank[identity], example
