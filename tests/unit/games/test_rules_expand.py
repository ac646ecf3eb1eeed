"""Breadth-first expansion: published sizes, order, the cap, and errors in rules that it must find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules.games.expand import _classes, expand
from datamodules.games.goofspiel import Goofspiel
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.leduc import LeducPoker
from datamodules.games.liars_dice import LiarsDice
from datamodules.games.negotiation import Negotiation
from datamodules.games.rules import TERMINAL, Rules


@pytest.mark.parametrize(
    ("rules", "nodes", "states"),
    [
        (KuhnPoker(), 58, (6, 6)),
        (LeducPoker(), 9_457, (468, 468)),
        (LiarsDice(1, 5), 51_181, (2_560, 2_560)),
        (LiarsDice(1, 6), 294_883, (12_288, 12_288)),
        (Goofspiel(4), 1_077, (81, 81)),
        (Goofspiel(5), 26_931, (1_062, 1_062)),
        # 1 + 3 draws + 9 openings, then 6 offers each time, an acceptance with each answer, a refusal with the last
        (Negotiation(), 1 + 3 + 9 * (1 + 6 + 6 * 7 + 36 * 7 + 216 * 2), (3 * (1 + 36), 3 * (6 + 216))),
    ],
    ids=lambda value: value.name if isinstance(value, Rules) else None,
)
def test_sizes_are_the_published_ones(rules: Rules, nodes: int, states: tuple[int, int]) -> None:
    tree = expand(rules)
    assert len(tree) == nodes
    assert tuple(len(table) for table in tree.legal) == states == tuple(len(table) for table in tree.observations)


@pytest.mark.parametrize("rules", [LeducPoker(), Goofspiel(3, points_order="random")], ids=["leduc", "goofspiel"])
def test_nodes_are_breadth_first_and_states_numbered_by_first_node(rules: Rules) -> None:
    tree = expand(rules)
    assert tree.parent[0] == tree.action[0] == -1
    width = max(rules.num_actions, rules.max_chance_outcomes)
    assert ((tree.parent[1:] * width + tree.action[1:]).diff() > 0).all()
    for player in range(2):
        mine = tree.info_state[tree.player == player]
        first_seen = torch.stack([(mine == state).int().argmax() for state in range(len(tree.legal[player]))])
        assert (first_seen.diff() > 0).all()
    assert ((tree.info_state >= 0) == (tree.player >= 0)).all()
    assert not tree.utility[tree.player != TERMINAL].any()
    again = expand(rules)
    assert torch.equal(tree.info_state, again.info_state)
    assert torch.equal(tree.utility, again.utility)


def test_cap_is_named_before_the_level_is_built() -> None:
    assert len(expand(KuhnPoker(), max_nodes=58)) == 58
    with pytest.raises(
        ValueError, match=r"max_nodes: kuhn_poker\(players=2\) has 58 nodes down to depth 5 alone.*got 57"
    ):
        expand(KuhnPoker(), max_nodes=57)
    with pytest.raises(ValueError, match=r"goofspiel\(num_cards=13.*has 2211 nodes down to depth 3.*got 200"):
        expand(_StopsAtLevel(Goofspiel(13), 200), max_nodes=200)


def test_classes_of_rows_do_not_depend_on_how_they_are_found() -> None:
    """Packed bits (also above one 62-bit word) and general rows against Python's dictionary."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 2, (40, 150), generator=generator).float()
    base[1], base[2] = base[0], base[0]
    base[1, 149], base[2, 62] = 1 - base[0, 149], 1 - base[0, 62]
    rows = base[torch.randint(0, 40, (300,), generator=generator)]
    numbers: dict[tuple[float, ...], int] = {}
    expected = [numbers.setdefault(tuple(row), len(numbers)) for row in rows.tolist()]
    for table in (rows, rows * 0.5):
        classes, example = _classes(table)
        assert classes.tolist() == expected
        assert torch.equal(table[example][classes], table)


class _Wrapped(Rules):
    def __init__(self, inner: Rules) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return self.inner.initial(batch, device)

    def mover(self, state: Tensor) -> Tensor:
        return self.inner.mover(state)

    def legal(self, state: Tensor) -> Tensor:
        return self.inner.legal(state)

    def chance_probabilities(self, state: Tensor) -> Tensor:
        return self.inner.chance_probabilities(state)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        return self.inner.step(state, action)

    def returns(self, state: Tensor) -> Tensor:
        return self.inner.returns(state)

    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        return self.inner.observation(state, player)


class _StopsAtLevel(_Wrapped):
    """Fails the test if more than ``limit`` states are ever materialised at once."""

    def __init__(self, inner: Rules, limit: int) -> None:
        super().__init__(inner)
        self.limit = limit

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        assert len(state) <= self.limit
        return super().step(state, action)


class _Blind(_Wrapped):
    def observation(self, state: Tensor, player: Tensor) -> Tensor:
        return torch.zeros_like(super().observation(state, player))


class _Generous(_Wrapped):
    def returns(self, state: Tensor) -> Tensor:
        return super().returns(state) + (self.mover(state) == TERMINAL).unsqueeze(1)


class _Stuck(_Wrapped):
    def legal(self, state: Tensor) -> Tensor:
        return torch.zeros_like(super().legal(state))


def test_faulty_rules_are_found() -> None:
    with pytest.raises(ValueError, match="_Blind: observation: nodes of player 0 with equal observations"):
        expand(_Blind(LeducPoker()))
    with pytest.raises(ValueError, match="_Generous: zero_sum: payoffs must add up to 0"):
        expand(_Generous(KuhnPoker()))
    with pytest.raises(ValueError, match="_Stuck: legal: a node that is not terminal must have a move"):
        expand(_Stuck(KuhnPoker()))
