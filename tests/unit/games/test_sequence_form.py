"""The sequence form against plain recursion over the nodes, on random trees and on Kuhn poker."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

from datamodules.games import sequence_form
from datamodules.games.expand import expand
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.tree import CHANCE, TERMINAL, GameTree
from modules.contracts import TabularGame

ACTIONS = 3


def random_tree(seed: int, players: int, depth: int = 5, zero_sum: bool = False) -> GameTree:
    """Information states are own history plus a signal, so that recall is perfect and states hold several nodes."""
    draw = random.Random(seed)
    parent, action, mover, probability, info, utility = [-1], [-1], [], [1.0], [], []
    ids: list[dict[tuple, int]] = [{} for _ in range(players)]
    legal: list[list[list[bool]]] = [[] for _ in range(players)]
    queue: list[tuple[int, tuple[tuple, ...]]] = [(0, ((),) * players)]
    while queue:
        level, histories = queue.pop(0)
        node = len(mover)
        kind = draw.choice([CHANCE, *range(players), *range(players)]) if level else CHANCE
        if level == depth or (level > 2 and draw.random() < 0.2):
            kind = TERMINAL
        mover.append(kind)
        info.append(-1)
        pay = [draw.gauss(0, 1) for _ in range(players)] if kind == TERMINAL else [0.0] * players
        utility.append([pay[0], -pay[0]] if zero_sum else pay)
        if kind == TERMINAL:
            continue
        if kind == CHANCE:
            weights = [draw.random() + 0.1 for _ in range(2)]
            edges = [(outcome, weight / sum(weights), histories) for outcome, weight in enumerate(weights)]
        else:
            key = (*histories[kind], ("saw", draw.randrange(2)))
            info[node] = ids[kind].setdefault(key, len(ids[kind]))
            if info[node] == len(legal[kind]):
                mask = [draw.random() < 0.7 for _ in range(ACTIONS)]
                mask[draw.randrange(ACTIONS)] = True
                legal[kind].append(mask)
            edges = []
            for move in (move for move, allowed in enumerate(legal[kind][info[node]]) if allowed):
                own = (*key, ("did", move))
                edges.append((move, 1.0, tuple(own if p == kind else old for p, old in enumerate(histories))))
        for move, chance, after in edges:
            parent.append(node)
            action.append(move)
            probability.append(chance)
            queue.append((level + 1, after))
    return GameTree(
        name=f"random_{seed}",
        num_players=players,
        num_actions=ACTIONS,
        parent=torch.tensor(parent),
        action=torch.tensor(action),
        player=torch.tensor(mover),
        probability=torch.tensor(probability, dtype=torch.float64),
        info_state=torch.tensor(info),
        utility=torch.tensor(utility, dtype=torch.float64),
        legal=tuple(torch.tensor(rows).view(-1, ACTIONS).bool() for rows in legal),
        observations=tuple(torch.eye(len(rows)) for rows in legal),
        zero_sum=zero_sum,
    )


def node_reach(tree: GameTree, tables: list[Tensor], without: int | None = None) -> list[float]:
    """Probability of each node, one node after another; ``without`` a player: its choices count 1."""
    reach = [1.0] * len(tree)
    for node in range(1, len(tree)):
        above = int(tree.parent[node])
        mover = int(tree.player[above])
        edge = float(tree.probability[node])
        if mover >= 0 and mover != without:
            edge = float(tables[mover][tree.info_state[above], tree.action[node]])
        reach[node] = reach[above] * edge
    return reach


def expected(tree: GameTree, tables: list[Tensor]) -> Tensor:
    return torch.tensor(node_reach(tree, tables), dtype=torch.float64) @ tree.utility


def last_sequence(game: SequenceFormGame, player: int) -> list[int]:
    """Own sequence of every node, from :meth:`sequence_moves` alone."""
    state, action = (part.tolist() for part in game.sequence_moves(player))
    number = {move: index for index, move in enumerate(zip(state, action, strict=True))}
    tree, last = game.tree, [0] * len(game.tree)
    for node in range(1, len(tree)):
        above = int(tree.parent[node])
        mine = int(tree.player[above]) == player
        last[node] = number[int(tree.info_state[above]), int(tree.action[node])] if mine else last[above]
    return last


GAMES = [(seed, 2, False) for seed in range(4)] + [(seed, 2, True) for seed in range(4, 7)]
GAMES += [(seed, 3, False) for seed in range(7, 10)] + [(10, 1, False), (11, 4, False)]


@pytest.fixture(params=GAMES, ids=lambda p: f"seed{p[0]}-{p[1]}players{'-zero_sum' * p[2]}")
def game(request: pytest.FixtureRequest) -> SequenceFormGame:
    seed, players, zero_sum = request.param
    return SequenceFormGame(random_tree(seed, players, zero_sum=zero_sum))


def members(game: SequenceFormGame, counts: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [game.random_strategies(player, count, generator) for player, count in enumerate(counts)]


def test_plan_is_the_product_of_own_probabilities(game: SequenceFormGame) -> None:
    for player, (table,) in enumerate(members(game, [1] * game.num_players)):
        plan = game.plans(player, table)
        certain = [torch.ones_like(legal) for legal in game.tree.legal]
        certain[player] = table
        ours = torch.ones(len(game.tree), dtype=torch.float64)
        last = last_sequence(game, player)
        for node in range(1, len(game.tree)):
            above = int(game.tree.parent[node])
            mine = int(game.tree.player[above]) == player
            step = table[game.tree.info_state[above], game.tree.action[node]] if mine else 1.0
            ours[node] = ours[above] * step
        assert plan.shape == (game.num_sequences(player),)
        torch.testing.assert_close(plan[last], ours, rtol=0, atol=1e-14)


def test_payoffs_of_all_profiles_equal_recursion_over_nodes(game: SequenceFormGame) -> None:
    counts = [2, 3, 1, 2][: game.num_players]
    tables = members(game, counts)
    result = game.payoffs([game.plans(player, table) for player, table in enumerate(tables)])
    assert result.shape == (game.num_players, *counts)
    for profile in itertools.product(*map(range, counts)):
        wanted = expected(game.tree, [table[k] for table, k in zip(tables, profile, strict=True)])
        torch.testing.assert_close(result[(slice(None), *profile)], wanted, rtol=0, atol=1e-13)


def test_payoff_vector_and_reach_equal_recursion_over_nodes(game: SequenceFormGame) -> None:
    tables = [table[0] for table in members(game, [1] * game.num_players, seed=1)]
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    ends = (game.tree.player == TERMINAL).tolist()
    for player in range(game.num_players):
        others = node_reach(game.tree, tables, without=player)
        reach = torch.zeros(game.num_sequences(player), dtype=torch.float64)
        vector = torch.zeros_like(reach)
        for node, sequence in enumerate(last_sequence(game, player)):
            if ends[node]:
                reach[sequence] += others[node]
                vector[sequence] += others[node] * game.tree.utility[node, player]
        torch.testing.assert_close(game.payoff_vector(player, plans), vector, rtol=0, atol=1e-13)
        torch.testing.assert_close(game.reach(player, plans), reach, rtol=0, atol=1e-13)
        assert float(game.reach(player) @ plans[player]) == pytest.approx(1, abs=1e-13)
        assert float(vector @ plans[player]) == pytest.approx(float(expected(game.tree, tables)[player]), abs=1e-13)


def test_leading_dimensions_equal_one_at_a_time(game: SequenceFormGame) -> None:
    tables = [table.unflatten(0, (2, 2)) for table in members(game, [4] * game.num_players)]
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    vectors = [game.payoff_vector(player, plans) for player in range(game.num_players)]
    reaches = [game.reach(player, plans) for player in range(game.num_players)]
    back = [game.strategy_of(player, plan) for player, plan in enumerate(plans)]
    for cell in itertools.product(range(2), range(2)):
        alone = [game.plans(player, table[cell]) for player, table in enumerate(tables)]
        for player in range(game.num_players):
            lone = cell if game.num_players > 1 else ()  # nobody else's plans: no leading dimensions
            vector = game.payoff_vector(player, alone)
            torch.testing.assert_close(plans[player][cell], alone[player], rtol=0, atol=0)
            torch.testing.assert_close(vectors[player][lone], vector, rtol=0, atol=1e-14)
            torch.testing.assert_close(reaches[player][lone], game.reach(player, alone), rtol=0, atol=1e-14)
            torch.testing.assert_close(back[player][cell], tables[player][cell], rtol=0, atol=1e-12)
            if game.num_players > 1:
                many = game.counterfactual_values(player, tables[player], vectors[player])
                one = game.counterfactual_values(player, tables[player][cell], vector)
                torch.testing.assert_close(many[cell], one, rtol=0, atol=1e-13)


def test_best_response_equals_enumeration_of_deterministic_tables() -> None:
    checked = 0
    for seed in range(20):
        game = SequenceFormGame(random_tree(seed, 2, depth=4))
        plans = [game.plans(p, table[0]) for p, table in enumerate(members(game, [1, 1], seed))]
        for player in range(2):
            choices = [row.nonzero().flatten().tolist() for row in game.legal(player)]
            if not 1 < len(choices) <= 7:
                continue
            vector = game.payoff_vector(player, plans)
            pure = torch.tensor(list(itertools.product(*choices)))
            tables = torch.nn.functional.one_hot(pure, ACTIONS).double()
            table, value = game.best_response(player, vector)
            assert float(value) == pytest.approx(float((game.plans(player, tables) @ vector).max()), abs=1e-13)
            assert float(game.plans(player, table) @ vector) == pytest.approx(float(value), abs=1e-13)
            assert bool(((table == 0) | (table == 1)).all())
            assert torch.equal(table.sum(1), torch.ones(len(choices), dtype=torch.float64))
            assert not bool(table[~game.legal(player)].any())
            checked += 1
    assert checked > 10


def test_ties_go_to_the_first_legal_action(game: SequenceFormGame) -> None:
    for player in range(game.num_players):
        nothing = torch.zeros(game.num_sequences(player), dtype=torch.float64)
        table, value = game.best_response(player, nothing)
        assert float(value) == 0
        assert torch.equal(table.argmax(1), game.legal(player).byte().argmax(1))


def test_mixture_of_plans_is_realised_by_one_strategy(game: SequenceFormGame) -> None:
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for player, tables in enumerate(members(game, [3] * game.num_players)):
        tables[0] = game.best_response(player, torch.linspace(-1, 1, game.num_sequences(player)).double())[0]
        mixture = weights @ game.plans(player, tables)
        realised = game.plans(player, game.strategy_of(player, mixture))
        torch.testing.assert_close(realised, mixture, rtol=0, atol=1e-14)
        pure = game.strategy_of(player, game.plans(player, tables[0]))
        torch.testing.assert_close(game.plans(player, pure), game.plans(player, tables[0]), rtol=0, atol=0)
        torch.testing.assert_close(pure.sum(1), torch.ones(pure.shape[0], dtype=torch.float64))


def test_averaging_action_probabilities_does_not_realise_a_mixture() -> None:
    game = SequenceFormGame(expand(KuhnPoker()))
    tables = members(game, [2, 2])
    plans = game.plans(0, tables[0])
    naive = game.plans(0, tables[0].mean(0))
    assert float((plans.mean(0) - naive).abs().max()) > 0.01


def test_strategy_is_uniform_where_a_plan_never_comes() -> None:
    game = SequenceFormGame(expand(KuhnPoker()))
    always_bet = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(6, 2)
    state, _ = game.sequence_moves(0)
    after_own_pass = [s for s in range(6) if float(game.plans(0, always_bet)[state == s].sum()) == 0]
    assert len(after_own_pass) == 3
    assert torch.equal(game.strategy_of(0, game.plans(0, always_bet))[after_own_pass], torch.full((3, 2), 0.5).double())


def test_counterfactual_values_are_the_gradient_over_own_reach(game: SequenceFormGame) -> None:
    generator = torch.Generator().manual_seed(3)
    for player, (table,) in enumerate(members(game, [1] * game.num_players)):
        vector = torch.randn(game.num_sequences(player), dtype=torch.float64, generator=generator)
        table.requires_grad_()
        plan = game.plans(player, table)
        (gradient,) = torch.autograd.grad(plan @ vector, table)
        values = game.counterfactual_values(player, table.detach(), vector)
        state, action = (part[1:] for part in game.sequence_moves(player))
        own = torch.zeros_like(values).index_put((state, action), plan.detach()[1:]) / table.detach().clamp_min(1e-300)
        torch.testing.assert_close(values * own, gradient, rtol=0, atol=1e-12)
        assert not bool(values[~game.legal(player)].any())


def test_value_and_derivatives_equal_finite_differences(game: SequenceFormGame) -> None:
    tables = [table[0].requires_grad_() for table in members(game, [1] * game.num_players)]

    def value(*tables: Tensor) -> Tensor:
        plans = [game.plans(player, table) for player, table in enumerate(tables)]
        by_vector = torch.stack([plans[p] @ game.payoff_vector(p, plans) for p in range(game.num_players)])
        return torch.cat([by_vector, game.payoffs([plan.unsqueeze(0) for plan in plans]).flatten()])

    assert torch.autograd.gradcheck(value, tables, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, tables, fast_mode=True)


def test_divergence_terms_are_differentiable() -> None:
    game = SequenceFormGame(expand(KuhnPoker()))
    one, other = (table[0].requires_grad_() for table in members(game, [1, 1]))

    def reach_and_strategy(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plans = [game.plans(0, first), game.plans(1, second)]
        vector = game.payoff_vector(0, plans)
        return game.reach(0, plans), game.strategy_of(0, plans[0]), game.counterfactual_values(0, first, vector)

    assert torch.autograd.gradcheck(reach_and_strategy, (one, other))


@pytest.mark.parametrize("players", [2, 3])
def test_pieces_of_payoffs_equal_the_whole(monkeypatch: pytest.MonkeyPatch, players: int) -> None:
    game = SequenceFormGame(random_tree(1, players))
    plans = [game.plans(p, table) for p, table in enumerate(members(game, [3, 4, 2][:players]))]
    whole = game.payoffs(plans)
    monkeypatch.setattr(sequence_form, "_MAX_ELEMENTS", 5)
    torch.testing.assert_close(game.payoffs(plans), whole, rtol=0, atol=1e-14)


def test_random_strategies_are_uniform_on_each_simplex() -> None:
    game = SequenceFormGame(random_tree(0, 2))
    draws = game.random_strategies(0, 4000, torch.Generator().manual_seed(0))
    legal = game.legal(0)
    count = legal.sum(1, keepdim=True).double()
    again = game.random_strategies(0, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert not bool(draws[:, ~legal].any())
    torch.testing.assert_close(draws.sum(-1), torch.ones(4000, legal.shape[0], dtype=torch.float64))
    variance = (count - 1) / (count**2 * (count + 1))  # of Dirichlet(1)
    assert float(((draws.mean(0) - 1 / count) * legal).abs().max()) < 4 * float((variance / 4000).sqrt().max())
    torch.testing.assert_close(draws.var(0) * legal, variance * legal, rtol=0.1, atol=0)


def test_game_takes_part_in_the_contract() -> None:
    game = SequenceFormGame(expand(KuhnPoker()))
    assert isinstance(game, TabularGame)
    assert (game.zero_sum, game.symmetric, game.num_players) == (True, False, 2)
    assert game.strategy_shape(0) == (6, 2)
    assert game.num_sequences(0) == game.num_sequences(1) == 13
    assert game.num_entries == 30
    assert game.observations(1).shape[0] == 6
    torch.testing.assert_close(game.uniform_strategy(0), torch.full((6, 2), 0.5, dtype=torch.float64))


def test_digest_tells_games_apart() -> None:
    tree = random_tree(0, 2)
    changed = tree.utility.clone()
    changed[tree.player == TERMINAL] += 1e-9
    other = SequenceFormGame(dataclasses.replace(tree, utility=changed))
    assert SequenceFormGame(tree).digest() == SequenceFormGame(random_tree(0, 2)).digest()
    assert SequenceFormGame(tree).digest() != other.digest()


def test_moved_game_plays_the_same() -> None:
    game = SequenceFormGame(random_tree(2, 2))
    plans = [game.plans(p, game.uniform_strategy(p)).unsqueeze(0) for p in range(2)]
    moved = game.to("cpu")
    assert moved is not game
    assert torch.equal(moved.payoffs(plans), game.payoffs(plans))


def test_imperfect_recall_is_refused_by_game_and_state() -> None:
    tree = expand(KuhnPoker())
    info, legal = tree.info_state.clone(), list(tree.legal)
    mine = tree.player == 0
    deep = mine & (tree.parent >= 0) & (tree.player[tree.parent.clamp_min(0)] == 1)  # after an own pass and a bet
    assert bool(deep.any())
    first = int(info[mine & ~deep][0])
    last = int(info[deep].max())
    info[mine & (info == last)] = first  # the player forgets that it passed
    keep = [state for state in range(6) if state != last]
    renumber = torch.full((6,), -1)
    renumber[keep] = torch.arange(5)
    info[mine] = renumber[info[mine]]
    legal[0] = legal[0][keep]
    with pytest.raises(ValueError, match=r"kuhn_poker.*information state 0 .*of player 0 .*perfect recall"):
        SequenceFormGame(dataclasses.replace(tree, info_state=info, legal=tuple(legal)))


def _set(values: Tensor, index: int, value: float) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"parent": _set(t.parent, 1, 5)}, "parents must come before children"),
        (lambda t: {"parent": _set(t.parent, 3, -1)}, "only node 0"),
        (lambda t: {"parent": _set(t.parent, 57, int((t.player == TERMINAL).nonzero()[0]))}, "must have no children"),
        (lambda t: {"probability": _set(t.probability, 1, 0.5)}, "chance node 0 must add up to 1, got 1.16"),
        (lambda t: {"probability": _set(t.probability, 57, 0.5)}, "does not leave a chance node must be 1"),
        (lambda t: {"action": _set(t.action, 57, int(1 - t.action[57]))}, "must not be reached by the same action"),
        (lambda t: {"action": _set(t.action, 57, 7)}, "must be the legal actions"),
        (lambda t: {"legal": (torch.zeros_like(t.legal[0]), t.legal[1])}, "of player 0 has no legal action"),
        (lambda t: {"legal": (t.legal[0][:5], t.legal[1])}, "information states from 0 to 4"),
        (lambda t: {"utility": t.utility + 1}, "must add up to 0"),
    ],
)
def test_trees_that_contradict_themselves_are_refused(change, message: str) -> None:
    tree = expand(KuhnPoker())
    with pytest.raises(ValueError, match=f"tree: kuhn_poker.*{message}"):
        SequenceFormGame(dataclasses.replace(tree, **change(tree)))


def test_wrong_shapes_and_values_are_named() -> None:
    game = SequenceFormGame(expand(KuhnPoker()))
    plans = [game.plans(p, game.uniform_strategy(p)) for p in range(2)]
    with pytest.raises(ValueError, match=r"strategies: shape \[\.\.\., 6, 2\], got \[6, 3\]"):
        game.plans(0, torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"plan: shape \[\.\.\., 13\], got \[12\]"):
        game.strategy_of(0, torch.zeros(12))
    with pytest.raises(ValueError, match="one for each of 2 players, got 1"):
        game.payoffs(plans[:1])
    with pytest.raises(ValueError, match=r"plans\[1\]: shape \[members, 13\], got \[13\]"):
        game.payoffs([plans[0].unsqueeze(0), plans[1]])
    with pytest.raises(ValueError, match=r"plans\[1\]: shape \[\.\.\., 13\]"):
        game.payoff_vector(0, [plans[0], plans[1][1:]])
    with pytest.raises(ValueError, match=r"payoff_vector: shape \[13\] for player 0, got \[1, 13\]"):
        game.best_response(0, torch.zeros(1, 13))
    with pytest.raises(ValueError, match="payoff_vector: must be finite"):
        game.best_response(0, torch.full((13,), torch.nan, dtype=torch.float64))
    three = SequenceFormGame(random_tree(8, 3))
    odd = [three.plans(p, table) for p, table in enumerate(members(three, [2, 2, 3]))]
    with pytest.raises(ValueError, match="leading dimensions"):
        three.payoff_vector(0, odd)
