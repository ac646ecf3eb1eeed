"""The games' rules as pure batched functions: sizes, perfect recall, independence of rows, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from datamodules.games.expand import expand
from datamodules.games.goofspiel import Goofspiel
from datamodules.games.kuhn import BET, PASS, KuhnPoker
from datamodules.games.leduc import CALL, FOLD, RAISE, LeducPoker
from datamodules.games.liars_dice import LiarsDice
from datamodules.games.negotiation import Negotiation
from datamodules.games.rules import CHANCE, TERMINAL, Rules, resolve_chance, sample_rows
from datamodules.games.tree import GameTree

GAMES: dict[str, Callable[[], Rules]] = {
    "kuhn": KuhnPoker,
    "kuhn-3": lambda: KuhnPoker(3),
    "leduc": LeducPoker,
    "liars": lambda: LiarsDice(1, 3),
    "liars-two-dice": lambda: LiarsDice(2, 2),
    "goofspiel-hidden": lambda: Goofspiel(4),
    "goofspiel-open": lambda: Goofspiel(4, imp_info=False, returns_type="total_points"),
    "goofspiel-random": lambda: Goofspiel(3, points_order="random", returns_type="point_difference"),
    "negotiation": lambda: Negotiation(discount=0.9),
}


def walk(rules: Rules, *moves: int) -> torch.Tensor:
    """One game's state after these moves, chance's and players' alike, each checked to be possible."""
    state = rules.initial(1)
    for move in moves:
        chance = int(rules.mover(state)) == CHANCE
        assert (rules.chance_probabilities(state)[0, move] > 0) if chance else rules.legal(state)[0, move]
        state = rules.step(state, torch.tensor([move]))
    return state


def depths(tree: GameTree) -> list[int]:
    depth = [0] * len(tree)
    for node, parent in enumerate(tree.parent.tolist()):
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    return depth


@pytest.mark.parametrize("game", GAMES)
def test_information_states_have_perfect_recall(game: str) -> None:
    """All nodes of an information state follow the same own information states and actions."""
    tree = expand(GAMES[game]())
    memory: list[list[tuple[int, ...]]] = [[()] * tree.num_players]
    recalled: dict[tuple[int, int], tuple[int, ...]] = {}
    for node in range(len(tree)):
        if node:
            parent = int(tree.parent[node])
            own = list(memory[parent])
            mover = int(tree.player[parent])
            if mover >= 0:
                own[mover] = (*own[mover], int(tree.info_state[parent]), int(tree.action[node]))
            memory.append(own)
        mover = int(tree.player[node])
        if mover >= 0:
            state = (mover, int(tree.info_state[node]))
            assert recalled.setdefault(state, memory[node][mover]) == memory[node][mover]
    assert len(recalled) == sum(len(table) for table in tree.legal)


@pytest.mark.parametrize("game", GAMES)
def test_declared_bounds_are_met_by_the_tree(game: str) -> None:
    rules = GAMES[game]()
    tree = expand(rules)
    assert max(depths(tree)) == rules.max_moves
    assert max(int(table.sum(1).max()) for table in tree.legal) <= rules.num_actions == tree.num_actions
    assert all(table.shape[1] == rules.observation_size for table in tree.observations)
    assert bool((tree.player == CHANCE).any()) == (rules.max_chance_outcomes > 0)
    into_chance = tree.probability.new_zeros(len(tree)).index_add_(0, tree.parent[1:], tree.probability[1:])
    torch.testing.assert_close(
        into_chance[tree.player == CHANCE], torch.ones(int((tree.player == CHANCE).sum())).double()
    )


@pytest.mark.parametrize("game", GAMES)
def test_rows_do_not_see_each_other_and_arguments_stay_as_they_were(game: str) -> None:
    """A mixed batch of states at all depths gives, row for row, what each state gives alone."""
    rules, generator = GAMES[game](), torch.Generator().manual_seed(1)
    state, pool = rules.initial(20), []
    for _ in range(rules.max_moves + 1):
        pool.append(state)
        mover = rules.mover(state)
        chances = torch.cat([rules.chance_probabilities(state), torch.zeros(20, rules.num_actions)], dim=1)
        legal = rules.legal(state).double()
        weights = torch.where((mover == CHANCE).unsqueeze(1), chances[:, : rules.num_actions], legal)
        if rules.max_chance_outcomes > rules.num_actions:
            weights = torch.cat([weights, chances[:, rules.num_actions : rules.max_chance_outcomes]], dim=1)
        action = sample_rows(weights + (mover == TERMINAL).unsqueeze(1), generator)
        before = state.clone()
        after = rules.step(state, action)
        assert torch.equal(state, before)
        assert torch.equal(after[mover == TERMINAL], before[mover == TERMINAL])
        alone = torch.cat([rules.step(state[i : i + 1], action[i : i + 1]) for i in range(20)])
        assert torch.equal(after, alone)
        state = after
    assert (rules.mover(state) == TERMINAL).all()
    mixed = torch.cat(pool)[torch.randperm(20 * len(pool), generator=generator)]
    for player in range(rules.num_players):
        players = torch.full((len(mixed),), player)
        together = rules.observation(mixed, players)
        assert torch.equal(together, torch.cat([rules.observation(row[None], players[:1]) for row in mixed]))
    for function in (rules.mover, rules.legal, rules.chance_probabilities, rules.returns):
        assert torch.equal(function(mixed), torch.cat([function(row[None]) for row in mixed]))
    assert not rules.observation(mixed, torch.full((len(mixed),), TERMINAL)).any()


@pytest.mark.parametrize("game", GAMES)
def test_a_player_does_not_observe_what_others_hold_back(game: str) -> None:
    """The waiting player's view does not change with the other's private cards, dice, bids or valuation."""
    rules = GAMES[game]()
    generator = torch.Generator().manual_seed(0)
    state, mover = resolve_chance(rules, rules.initial(200), generator)
    views = rules.observation(state, torch.full((200,), rules.num_players - 1))
    bid = sample_rows(rules.legal(state), generator)
    if game == "goofspiel-hidden" or game == "goofspiel-open":
        after = rules.step(state, bid)
        assert torch.equal(rules.observation(after, torch.ones_like(bid)), views)
        assert bid.unique().numel() > 1
    else:
        own = {"kuhn": 3, "kuhn-3": 4, "leduc": 6, "liars": 3, "liars-two-dice": 3, "negotiation": 3}
        assert len(views.unique(dim=0)) == own.get(game, 3)  # goofspiel-random: the first prize


def test_kuhn_three_players_pay_by_hand() -> None:
    rules = KuhnPoker(3)
    deal = (2, 0, 1)
    assert rules.returns(walk(rules, *deal, PASS, PASS, PASS)).tolist() == [[2.0, -1.0, -1.0]]
    assert rules.returns(walk(rules, *deal, PASS, BET, PASS, BET)).tolist() == [[3.0, -2.0, -1.0]]
    assert rules.returns(walk(rules, *deal, PASS, PASS, BET, PASS, PASS)).tolist() == [[-1.0, -1.0, 2.0]]


def test_leduc_pays_by_hand() -> None:
    rules = LeducPoker()
    fold = walk(rules, 0, 2, RAISE, RAISE, FOLD)
    assert rules.returns(fold).tolist() == [[-3.0, 3.0]]
    pair_beats_king = walk(rules, 0, 4, CALL, RAISE, CALL, 1, RAISE, RAISE, CALL)
    assert rules.returns(pair_beats_king).tolist() == [[11.0, -11.0]]
    tie = walk(rules, 2, 3, CALL, CALL, 5, CALL, CALL)
    assert rules.returns(tie).tolist() == [[0.0, 0.0]]
    assert rules.legal(walk(rules, 0, 2, RAISE, RAISE)).tolist() == [[True, True, False]]


def test_liars_dice_counts_the_wild_face() -> None:
    rules = LiarsDice(dice=1, sides=3)
    two_of_face_0, call = 3, rules.bids
    assert rules.returns(walk(rules, 0, 2, two_of_face_0, call)).tolist() == [[1.0, -1.0]]
    assert rules.returns(walk(rules, 0, 1, two_of_face_0, call)).tolist() == [[-1.0, 1.0]]
    assert rules.returns(walk(rules, 1, 1, 1, two_of_face_0, call)).tolist() == [[1.0, -1.0]]


def test_negotiation_pays_by_hand() -> None:
    rules = Negotiation(pool=(2, 1), total_value=4, max_offers=2, discount=0.5)
    assert rules.valuations.tolist() == [[0, 4], [1, 2], [2, 0]]
    keep_one_of_each = rules.kept.tolist().index([1, 1])
    accepted = walk(rules, 1, 0, keep_one_of_each, rules.accept)
    assert rules.returns(accepted).tolist() == [[3.0, 0.0]]
    late = walk(rules, 1, 0, 0, keep_one_of_each, rules.accept)
    assert rules.returns(late).tolist() == [[0.5, 2.0]]
    assert rules.returns(walk(rules, 1, 0, 0, 0, rules.refuse)).tolist() == [[0.0, 0.0]]
    assert not rules.legal(walk(rules, 1, 0))[0, rules.offers :].any()


def test_sampling_by_inversion_follows_the_weights_and_skips_zeros() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0]).expand(40_000, -1)
    drawn = sample_rows(weights, torch.Generator().manual_seed(0)).bincount(minlength=5) / 40_000
    assert drawn[[0, 2, 4]].tolist() == [0, 0, 0]
    assert abs(drawn[3].item() - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_sampling_stays_in_the_support_at_the_ends_of_the_unit_interval(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 5.0]])
    assert sample_rows(weights, None).tolist() == ([1, 1, 0] if uniform == 0 else [2, 1, 3])


def test_goofspiel_tells_results_of_finished_rounds_only() -> None:
    """The block of results: won, lost, tied; empty while the other has yet to bid, for either player's view."""
    rules = Goofspiel(3)
    results = slice(2 + 2 * 3, None)
    first, second = torch.tensor([0]), torch.tensor([1])
    waiting, finished = walk(rules, 1), walk(rules, 1, 2)
    assert not rules.observation(waiting, first)[0, results].any()
    assert not rules.observation(waiting, second)[0, results].any()
    assert rules.observation(finished, first)[0, results].tolist() == [0, 1, 0, 0, 0, 0]
    assert rules.observation(finished, second)[0, results].tolist() == [1, 0, 0, 0, 0, 0]
    assert rules.observation(walk(rules, 1, 1), second)[0, results].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KuhnPoker(1), "KuhnPoker: players: must be an integer from 2 to 10, got 1"),
        (lambda: LiarsDice(dice=0), "LiarsDice: dice: must be an integer >= 1, got 0"),
        (lambda: LiarsDice(sides=True), "LiarsDice: sides: must be an integer >= 2, got True"),
        (lambda: Goofspiel(1), "Goofspiel: num_cards: must be an integer >= 2, got 1"),
        (lambda: Goofspiel(points_order="up"), "Goofspiel: points_order: must be one of descending.*got 'up'"),
        (lambda: Goofspiel(returns_type="money"), "Goofspiel: returns_type: must be one of win_loss.*got 'money'"),
        (lambda: Goofspiel(imp_info=1), "Goofspiel: imp_info: must be true or false, got 1"),  # type: ignore[arg-type]
        (lambda: Negotiation(pool=()), "Negotiation: pool: must name at least one item"),
        (lambda: Negotiation(pool=(2, 0)), "Negotiation: pool: must be an integer >= 1, got 0"),
        (lambda: Negotiation(pool=(2, 2), total_value=3), "Negotiation: total_value: must be a sum of.*got 3"),
        (lambda: Negotiation(max_offers=0), "Negotiation: max_offers: must be an integer >= 1, got 0"),
        (lambda: Negotiation(discount=1.5), "Negotiation: discount: must be in \\(0, 1\\], got 1.5"),
    ],
)
def test_bad_parameters_are_refused_by_name(build: Callable[[], Rules], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
