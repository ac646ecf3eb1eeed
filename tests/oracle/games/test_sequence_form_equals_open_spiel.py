"""Exact values against OpenSpiel's C++ NashConv and expected returns, and its Python policy aggregator."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.games.open_spiel_games import open_spiel_tree
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.symmetrized import SymmetrizedGame

pyspiel = pytest.importorskip("pyspiel")

GOOFSPIEL = "goofspiel(num_cards={},imp_info=True,points_order=descending,returns_type={})"
ZERO_SUM = [
    "kuhn_poker",
    "leduc_poker",
    "liars_dice(dice_sides=4)",
    pytest.param("liars_dice(dice_sides=5)", marks=pytest.mark.slow),
    GOOFSPIEL.format(4, "win_loss"),
    GOOFSPIEL.format(5, "win_loss"),
]
# Three players; general sum with both kinds of chance; common payoffs.
OTHERS = ["kuhn_poker(players=3)", "first_sealed_auction(max_value=3)", "tiny_hanabi", "matrix_bos"]


def load(name: str) -> tuple[SequenceFormGame, Any]:
    game = pyspiel.load_game(name)
    if game.get_type().dynamics == pyspiel.GameType.Dynamics.SIMULTANEOUS:
        game = pyspiel.convert_to_turn_based(game)
    return SequenceFormGame(open_spiel_tree(name)), game


def policy(game: SequenceFormGame, tables: list[Tensor]) -> Any:
    assert game.tree.labels is not None
    rows = {
        label: [(int(action), float(table[state, action])) for action in game.legal(player)[state].nonzero()]
        for player, table in enumerate(tables)
        for state, label in enumerate(game.tree.labels[player])
    }
    return pyspiel.TabularPolicy(rows)


def draw(game: SequenceFormGame, count: int, seed: int = 0) -> list[Tensor]:
    """Some of the members are deterministic, so that parts of the tree are never reached."""
    generator = torch.Generator().manual_seed(seed)
    tables = [game.random_strategies(player, count, generator) for player in range(game.num_players)]
    for player, table in enumerate(tables):
        table[-1] = torch.nn.functional.one_hot(table[-1].argmax(-1), game.num_actions).double()
        table[: count // 2] = table[: count // 2] ** 4 / (table[: count // 2] ** 4).sum(-1, keepdim=True)
        assert not bool(table[:, ~game.legal(player)].any())
    return tables


def nash_conv(game: SequenceFormGame, tables: list[Tensor]) -> float:
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    vectors = [game.payoff_vector(player, plans) for player in range(game.num_players)]
    return sum(float(game.best_response(p, vector)[1] - plans[p] @ vector) for p, vector in enumerate(vectors))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kuhn_poker", 11 / 12),
        ("leduc_poker", 4.747222222222222),
        ("liars_dice(dice_sides=4)", 1.3101190476),
        ("liars_dice(dice_sides=5)", 1.4417417989),
        pytest.param("liars_dice(dice_sides=6)", 1.5614886464, marks=pytest.mark.slow),
        (GOOFSPIEL.format(4, "win_loss"), 1.4166666667),
        (GOOFSPIEL.format(4, "total_points"), 2.5),
        (GOOFSPIEL.format(5, "win_loss"), 1.55),
    ],
)
def test_uniform_nash_conv_equals_open_spiel_constants(name: str, value: float) -> None:
    game = SequenceFormGame(open_spiel_tree(name))
    tables = [game.uniform_strategy(player) for player in range(2)]
    assert game.zero_sum == ("total_points" not in name)
    assert nash_conv(game, tables) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("name", [*ZERO_SUM, *OTHERS])
def test_nash_conv_and_values_equal_open_spiel(name: str) -> None:
    game, theirs = load(name)
    tables = draw(game, 5)
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    payoffs = game.payoffs(plans)
    for member in range(5):
        own = [table[member] for table in tables]
        joint = policy(game, own)
        wanted = pyspiel.expected_returns(theirs.new_initial_state(), joint, -1, True)
        ours = payoffs[(slice(None), *[member] * game.num_players)]
        assert ours.tolist() == pytest.approx(wanted, abs=1e-9)
        # The C++ NashConv wants information states keyed by string; it takes general-sum games, too.
        assert nash_conv(game, own) == pytest.approx(pyspiel.nash_conv(theirs, joint, True), abs=1e-9)


@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker"])
def test_mixture_of_plans_equals_open_spiel_policy_aggregator(name: str) -> None:
    aggregator = pytest.importorskip("open_spiel.python.algorithms.policy_aggregator")
    tabular = pytest.importorskip("open_spiel.python.policy")
    game, theirs = load(name)
    assert game.tree.labels is not None
    weights = [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]
    tables = draw(game, 3)
    policies = []
    for player in range(2):
        policies.append([])
        for member in range(3):
            theirs_policy = tabular.TabularPolicy(theirs)
            for state, label in enumerate(game.tree.labels[player]):
                row = theirs_policy.policy_for_key(label)
                row[:] = tables[player][member, state].numpy()[: len(row)]
            policies[player].append(theirs_policy)
    merged = aggregator.PolicyAggregator(theirs).aggregate([0, 1], policies, weights)
    compared = 0
    for player in range(2):
        plan = torch.tensor(weights[player], dtype=torch.float64) @ game.plans(player, tables[player])
        table = game.strategy_of(player, plan)
        sequence_state, _ = game.sequence_moves(player)
        for state, label in enumerate(game.tree.labels[player]):
            if float(plan[sequence_state == state].sum()) > 1e-12:
                theirs_row = merged.policy[player][label]
                wanted = [theirs_row.get(action, 0.0) for action in range(game.num_actions)]
                assert table[state].tolist() == pytest.approx(wanted, abs=1e-10)
                compared += 1
    assert compared > 10


def test_symmetric_extension_nash_conv_equals_open_spiel() -> None:
    game, theirs = load("leduc_poker")
    extension = SymmetrizedGame(game)
    for table in extension.random_strategies(0, 2, torch.Generator().manual_seed(1)):
        plan = extension.plans(0, table)
        best = extension.best_response(0, extension.payoff_vector(0, [plan, plan]))[1]
        joint = policy(game, list(extension.seat_strategies(table)))
        assert 2 * float(best) == pytest.approx(pyspiel.nash_conv(theirs, joint, True), abs=1e-9)


def test_cfr_in_sequence_form_finds_the_kuhn_value() -> None:
    """CFR+ (Tammelin 2014) on our counterfactual values: value -1/18 (Kuhn 1950), also OpenSpiel's."""
    game, theirs = load("kuhn_poker")
    regret = [torch.zeros(game.strategy_shape(player), dtype=torch.float64) for player in range(2)]
    total = [torch.zeros(game.num_sequences(player), dtype=torch.float64) for player in range(2)]
    tables = [game.uniform_strategy(player) for player in range(2)]
    for step in range(1, 301):
        for player in range(2):
            plans = [game.plans(p, table) for p, table in enumerate(tables)]
            total[player] += step * plans[player]
            values = game.counterfactual_values(player, tables[player], game.payoff_vector(player, plans))
            gain = (values - (values * tables[player]).sum(1, keepdim=True)) * game.legal(player)
            regret[player] = (regret[player] + gain).clamp_min(0)
            row = regret[player].sum(1, keepdim=True)
            tables[player] = torch.where(row > 0, regret[player] / row.clamp_min(1e-300), game.uniform_strategy(player))
    plans = [part / part[0] for part in total]
    average = [game.strategy_of(player, plan) for player, plan in enumerate(plans)]
    assert pyspiel.nash_conv(theirs, policy(game, average), True) < 2e-3
    assert float(plans[0] @ game.payoff_vector(0, plans)) == pytest.approx(-1 / 18, abs=1e-3)


@pytest.mark.slow
def test_nash_conv_is_far_faster_than_open_spiel() -> None:
    game, theirs = load("leduc_poker")
    tables = [game.uniform_strategy(player) for player in range(2)]
    uniform = pyspiel.UniformRandomPolicy(theirs)
    nash_conv(game, tables)
    ours, reference = [], []
    for _ in range(5):
        start = time.perf_counter()
        nash_conv(game, tables)
        middle = time.perf_counter()
        pyspiel.nash_conv(theirs, uniform)
        ours.append(middle - start)
        reference.append(time.perf_counter() - middle)
    assert min(ours) * 10 < min(reference)
