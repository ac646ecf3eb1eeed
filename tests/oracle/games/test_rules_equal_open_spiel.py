"""Our rules against OpenSpiel's: the same moves, chances, payoffs and information states, game by game."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
import torch

from datamodules.games.expand import expand
from datamodules.games.goofspiel import Goofspiel
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.leduc import LeducPoker
from datamodules.games.liars_dice import LiarsDice
from datamodules.games.negotiation import Negotiation
from datamodules.games.rules import CHANCE, TERMINAL, Rules

pyspiel = pytest.importorskip("pyspiel")


def goofspiel(num_cards: int, imp_info: bool, points_order: str, returns_type: str) -> tuple[Rules, str]:
    rules = Goofspiel(num_cards, imp_info=imp_info, points_order=points_order, returns_type=returns_type)
    inner = f"imp_info={imp_info},num_cards={num_cards},points_order={points_order},returns_type={returns_type}"
    return rules, f"turn_based_simultaneous_game(game=goofspiel({inner}))"


SMALL = {
    "kuhn": (KuhnPoker(), "kuhn_poker"),
    "kuhn-3": (KuhnPoker(3), "kuhn_poker(players=3)"),
    "leduc": (LeducPoker(), "leduc_poker"),
    "liars-1x4": (LiarsDice(1, 4), "liars_dice(numdice=1,dice_sides=4)"),
    "liars-2x2": (LiarsDice(2, 2), "liars_dice(numdice=2,dice_sides=2)"),
    "goofspiel-4-hidden": goofspiel(4, True, "descending", "win_loss"),
    "goofspiel-4-points": goofspiel(4, True, "descending", "total_points"),
    "goofspiel-4-ascending": goofspiel(4, True, "ascending", "point_difference"),
    "goofspiel-3-random": goofspiel(3, True, "random", "point_difference"),
}
OPEN_GOOFSPIEL = {
    "goofspiel-4-open": goofspiel(4, False, "descending", "total_points"),
    "goofspiel-5-open": goofspiel(5, False, "descending", "win_loss"),
    "goofspiel-5-open-difference": goofspiel(5, False, "descending", "point_difference"),
}
LARGE = {
    "liars-1x6": (LiarsDice(1, 6), "liars_dice(numdice=1,dice_sides=6)"),
    "liars-2x3": (LiarsDice(2, 3), "liars_dice(numdice=2,dice_sides=3)"),
    "goofspiel-5-hidden": goofspiel(5, True, "descending", "win_loss"),
    "goofspiel-5-points": goofspiel(5, True, "descending", "total_points"),
    "goofspiel-5-difference": goofspiel(5, True, "descending", "point_difference"),
    "goofspiel-5-random": goofspiel(5, True, "random", "win_loss"),
}
ALL = {**SMALL, **OPEN_GOOFSPIEL, **LARGE}


def key(observation: torch.Tensor) -> bytes:
    return observation.to(torch.uint8).numpy().tobytes()


def legal_of(row: torch.Tensor) -> list[int]:
    return row.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("game", ALL)
def test_random_playthroughs_equal_open_spiel(game: str) -> None:
    """300 games side by side, ours in one batch: mover, legal actions, chances, payoffs, information states."""
    rules, name = ALL[game]
    spiel = pyspiel.load_game(name)
    theirs = [spiel.new_initial_state() for _ in range(300)]
    ours, chooser = rules.initial(300), random.Random(7)
    ours_to_theirs: dict[tuple[int, bytes], str] = {}
    theirs_to_ours: dict[tuple[int, str], bytes] = {}
    moves = 0
    while not all(state.is_terminal() for state in theirs):
        mover, legal, chances = rules.mover(ours), rules.legal(ours), rules.chance_probabilities(ours)
        observation, action = rules.observation(ours, mover), torch.zeros(300, dtype=torch.int64)
        for row, state in enumerate(theirs):
            if state.is_terminal():
                assert mover[row] == TERMINAL
                assert not legal[row].any()
                continue
            if state.is_chance_node():
                assert mover[row] == CHANCE
                expected = dict(state.chance_outcomes())
                assert legal_of(chances[row]) == sorted(expected)
                assert chances[row][sorted(expected)].tolist() == pytest.approx([expected[a] for a in sorted(expected)])
            else:
                assert mover[row] == state.current_player()
                assert legal_of(legal[row]) == state.legal_actions()
                assert not chances[row].any()
                player, label, mine = state.current_player(), state.information_state_string(), key(observation[row])
                assert ours_to_theirs.setdefault((player, mine), label) == label
                if game not in OPEN_GOOFSPIEL:
                    assert theirs_to_ours.setdefault((player, label), mine) == mine
            move = chooser.choice(state.legal_actions())
            state.apply_action(move)
            action[row] = move
        assert not rules.returns(ours)[mover != TERMINAL].any()
        ours, moves = rules.step(ours, action), moves + 1
    assert (rules.mover(ours) == TERMINAL).all()
    assert rules.returns(ours).tolist() == [state.returns() for state in theirs]
    assert moves <= rules.max_moves
    assert len(ours_to_theirs) > 5


@pytest.mark.parametrize("game", [*SMALL, "goofspiel-4-open"])
def test_whole_tree_equals_open_spiel(game: str) -> None:
    """Every node of the expanded tree against OpenSpiel's node of the same history."""
    rules, name = {**SMALL, **OPEN_GOOFSPIEL}[game]
    tree, spiel = expand(rules), pyspiel.load_game(name)
    parent, action, probability = tree.parent.tolist(), tree.action.tolist(), tree.probability.tolist()
    player, info_state, utility = tree.player.tolist(), tree.info_state.tolist(), tree.utility.tolist()
    legal = [[legal_of(row) for row in table] for table in tree.legal]
    children = torch.zeros(len(tree), dtype=torch.int64).index_add_(
        0, tree.parent[1:], torch.ones_like(tree.parent[1:])
    )
    states, labels = [spiel.new_initial_state()], [{} for _ in range(tree.num_players)]
    for node in range(len(tree)):
        if node:
            above = states[parent[node]]
            chance = dict(above.chance_outcomes())[action[node]] if above.is_chance_node() else 1.0
            assert probability[node] == pytest.approx(chance, abs=1e-15)
            states.append(above.child(action[node]))
        state = states[node]
        assert children[node] == len(state.legal_actions())
        if state.is_terminal():
            assert player[node] == TERMINAL
            assert utility[node] == state.returns()
        elif state.is_chance_node():
            assert player[node] == CHANCE
        else:
            mover = player[node]
            assert mover == state.current_player()
            assert legal[mover][info_state[node]] == state.legal_actions()
            label = state.information_state_string()
            assert labels[mover].setdefault(info_state[node], label) == label
    for store, table in zip(labels, legal, strict=True):
        assert sorted(store) == list(range(len(table)))
        if game not in OPEN_GOOFSPIEL:  # OpenSpiel's string forgets the order of play there
            assert len(set(store.values())) == len(table)


@pytest.mark.parametrize("game", ["kuhn", "kuhn-3", "leduc"])
def test_poker_observation_equals_open_spiel_tensor(game: str) -> None:
    rules, name = SMALL[game]
    tree, spiel = expand(rules), pyspiel.load_game(name)
    states = [spiel.new_initial_state()]
    for node in range(len(tree)):
        if node:
            states.append(states[tree.parent[node]].child(int(tree.action[node])))
        mover = int(tree.player[node])
        if mover >= 0:
            ours = tree.observations[mover][tree.info_state[node]].tolist()
            assert ours == states[node].information_state_tensor(mover)


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_negotiation_equals_open_spiel_bargaining(discount: float, tmp_path: Path) -> None:
    """OpenSpiel's ``bargaining`` on all pairs of our valuations: its last turn's offers are our refusal."""
    rules = Negotiation(pool=(2, 1, 1), total_value=3, max_offers=2, discount=discount)
    words = [",".join(map(str, row)) for row in rules.valuations.tolist()]
    instances = tmp_path / "instances.txt"
    instances.write_text("".join(f"2,1,1 {mine} {other}\n" for mine, other in product(words, words)))
    spiel = pyspiel.load_game(
        "bargaining",
        {"instances_file": str(instances), "max_turns": 3, "discount": discount, "max_num_instances": 1000},
    )
    # OpenSpiel numbers the divisions with the first item running fastest, ours with the last
    order = sorted(range(rules.offers), key=lambda offer: rules.kept[offer].tolist()[::-1])
    chooser, agreements = random.Random(3), 0
    labels: dict[tuple[int, bytes], str] = {}
    for _ in range(300):
        first, second = chooser.randrange(len(words)), chooser.randrange(len(words))
        state, ours = spiel.new_initial_state(), rules.initial(1)
        state.apply_action(first * len(words) + second)
        for draw in (first, second):
            assert rules.chance_probabilities(ours)[0].tolist() == pytest.approx([1 / len(words)] * len(words))
            ours = rules.step(ours, torch.tensor([draw]))
        offers = dict(zip(order, state.legal_actions(), strict=True))
        while not state.is_terminal():
            mover = rules.mover(ours)
            assert int(mover) == state.current_player()
            mine = key(rules.observation(ours, mover)[0])
            label = state.information_state_string()
            assert labels.setdefault((int(mover), mine), label) == label
            legal = legal_of(rules.legal(ours)[0])
            accepts = state.legal_actions()[-1] not in offers.values()
            assert (rules.accept in legal) == accepts
            move = rules.accept if accepts and chooser.random() < 0.4 else chooser.choice(legal)
            ours = rules.step(ours, torch.tensor([move]))
            state.apply_action(
                state.legal_actions()[-1] if move == rules.accept else offers[min(move, rules.offers - 1)]
            )
            agreements += move == rules.accept
        assert int(rules.mover(ours)) == TERMINAL
        assert rules.returns(ours)[0].tolist() == pytest.approx(state.returns())
    assert 50 < agreements < 300
    assert len(set(labels.values())) == len(labels)
