"""A game tree flattened into tensors: what rules engines and OpenSpiel games are expanded into."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

CHANCE, TERMINAL = -1, -2
"""Values of :attr:`GameTree.player` for chance nodes and terminal nodes."""


@dataclass(frozen=True)
class GameTree:
    """Nodes in breadth-first order, so that a parent comes before its children; node 0 is the root.

    Args:
        name: the game, with its parameters.
        num_players: players, counted from 0.
        num_actions: largest number of actions in a decision node.
        parent: ``[nodes]`` int64, -1 for the root.
        action: ``[nodes]`` int64, action (or chance outcome) that led here from the parent, -1 for the root.
        player: ``[nodes]`` int64, who moves; ``CHANCE`` and ``TERMINAL`` otherwise.
        probability: ``[nodes]`` float64, probability of the edge into the node if its parent is a chance node, else 1.
        info_state: ``[nodes]`` int64, the mover's information state, counted per player from 0; -1 elsewhere.
        utility: ``[nodes, players]`` float64, payoffs at terminal nodes, 0 elsewhere.
        legal: per player ``[states, actions]`` bool.
        observations: per player ``[states, features]`` float32.
        zero_sum: payoffs add up to 0 at every terminal node.
        labels: per player the information states' strings, where the source has them (for parity with others).
    """

    name: str
    num_players: int
    num_actions: int
    parent: Tensor
    action: Tensor
    player: Tensor
    probability: Tensor
    info_state: Tensor
    utility: Tensor
    legal: tuple[Tensor, ...]
    observations: tuple[Tensor, ...]
    zero_sum: bool
    labels: tuple[tuple[str, ...], ...] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return self.parent.shape[0]
