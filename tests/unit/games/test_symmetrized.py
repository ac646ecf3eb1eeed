from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from datamodules.games.expand import expand
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.sequence_form import SequenceFormGame
from datamodules.games.symmetrized import SymmetrizedGame
from modules.contracts import TabularGame


@pytest.fixture(scope="module")
def kuhn() -> SequenceFormGame:
    return SequenceFormGame(expand(KuhnPoker()))


@pytest.fixture(scope="module")
def game(kuhn: SequenceFormGame) -> SymmetrizedGame:
    return SymmetrizedGame(kuhn)


def draws(game: TabularGame, count: int, player: int = 0, seed: int = 0) -> Tensor:
    return game.random_strategies(player, count, torch.Generator().manual_seed(seed))


def nash_conv(game: TabularGame, tables: list[Tensor]) -> float:
    plans = [game.plans(player, table) for player, table in enumerate(tables)]
    vectors = [game.payoff_vector(player, plans) for player in range(2)]
    return sum(float(game.best_response(p, v)[1] - plans[p] @ v) for p, v in enumerate(vectors))


def test_payoff_is_the_mean_of_both_seatings(kuhn: SequenceFormGame, game: SymmetrizedGame) -> None:
    mine, theirs = draws(game, 3), draws(game, 4, seed=1)
    payoffs = game.payoffs([game.plans(0, mine), game.plans(1, theirs)])
    assert payoffs.shape == (2, 3, 4)
    for k, m in itertools.product(range(3), range(4)):
        first = kuhn.payoffs([kuhn.plans(0, mine[k, :6])[None], kuhn.plans(1, theirs[m, 6:])[None]])[0, 0, 0]
        second = kuhn.payoffs([kuhn.plans(0, theirs[m, :6])[None], kuhn.plans(1, mine[k, 6:])[None]])[1, 0, 0]
        assert float(payoffs[0, k, m]) == pytest.approx(float(first + second) / 2, abs=1e-15)
    assert torch.equal(payoffs[1], -payoffs[0])


def test_payoffs_are_antisymmetric(game: SymmetrizedGame) -> None:
    plans = game.plans(0, draws(game, 5))
    payoffs = game.payoffs([plans, plans])[0]
    assert float(payoffs.abs().max()) > 0.01
    torch.testing.assert_close(payoffs, -payoffs.mT, rtol=0, atol=1e-15)


@pytest.mark.parametrize("player", [0, 1])
def test_vector_and_reach_belong_to_the_payoff(game: SymmetrizedGame, player: int) -> None:
    plans = [game.plans(p, draws(game, 2, seed=p)) for p in range(2)]
    vectors, reach = game.payoff_vector(player, plans), game.reach(player, plans)
    assert vectors.shape == reach.shape == plans[0].shape
    payoffs = game.payoffs(plans)[player]
    wanted = payoffs if player == 0 else payoffs.mT
    torch.testing.assert_close(plans[player] @ vectors.mT, wanted, rtol=0, atol=1e-15)
    torch.testing.assert_close(plans[player] @ reach.mT, torch.ones(2, 2).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(plans[player] @ game.reach(player), torch.ones(2).double(), rtol=0, atol=1e-14)


def test_best_response_beats_every_deterministic_strategy(kuhn: SequenceFormGame, game: SymmetrizedGame) -> None:
    plan = game.plans(1, draws(game, 1)[0])
    vector = game.payoff_vector(0, [plan, plan])
    table, value = game.best_response(0, vector)
    pure = torch.nn.functional.one_hot(torch.tensor(list(itertools.product(range(2), repeat=12))), 2).double()
    assert float(value) == pytest.approx(float((game.plans(0, pure) @ vector).max()), abs=1e-15)
    assert float(game.plans(0, table) @ vector) == pytest.approx(float(value), abs=1e-15)
    assert float(value) > 0


def test_nash_conv_is_that_of_the_game(kuhn: SequenceFormGame, game: SymmetrizedGame) -> None:
    for table in draws(game, 5):
        first, second = game.seat_strategies(table)
        assert nash_conv(game, [table, table]) == pytest.approx(nash_conv(kuhn, [first, second]), abs=1e-14)
    uniform = game.uniform_strategy(0)
    assert nash_conv(game, [uniform, uniform]) == pytest.approx(11 / 12, abs=1e-14)


def test_mixture_is_realised_seat_by_seat(game: SymmetrizedGame) -> None:
    plans = game.plans(0, draws(game, 3))
    mixture = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64) @ plans
    torch.testing.assert_close(game.plans(0, game.strategy_of(0, mixture)), mixture, rtol=0, atol=1e-15)
    opponents = [game.plans(1, draws(game, 2, seed=7))] * 2
    by_members = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64) @ game.payoffs([plans, opponents[1]])[0]
    realised = game.plans(0, game.strategy_of(0, mixture)).unsqueeze(0)
    torch.testing.assert_close(game.payoffs([realised, opponents[1]])[0, 0], by_members, rtol=0, atol=1e-15)


def test_counterfactual_values_belong_to_each_seat(kuhn: SequenceFormGame, game: SymmetrizedGame) -> None:
    table = draws(game, 1)[0]
    vector = game.payoff_vector(0, [game.plans(0, table)] * 2)
    values = game.counterfactual_values(0, table, vector)
    parts = zip(game.seat_strategies(table), game.seat_plans(vector), strict=True)
    wanted = torch.cat([kuhn.counterfactual_values(seat, *part) for seat, part in enumerate(parts)])
    assert float(values.abs().max()) > 0
    assert torch.equal(values, wanted)


def test_observations_tell_every_state_of_both_seats_apart(game: SymmetrizedGame) -> None:
    seen = game.observations(0)
    assert seen.shape[0] == game.strategy_shape(0)[0] == 12
    assert torch.unique(seen, dim=0).shape[0] == 12
    assert seen[:, -2:].tolist() == [[1, 0]] * 6 + [[0, 1]] * 6


def test_game_takes_part_in_the_contract(kuhn: SequenceFormGame, game: SymmetrizedGame) -> None:
    assert isinstance(game, TabularGame)
    assert (game.zero_sum, game.symmetric, game.num_players) == (True, True, 2)
    assert game.legal(0).shape == game.strategy_shape(1) == (12, 2)
    assert game.plans(0, game.uniform_strategy(0)).shape == (26,)
    assert game.digest() != kuhn.digest()


def test_gradient_reaches_both_seats(game: SymmetrizedGame) -> None:
    mine, theirs = draws(game, 1)[0].requires_grad_(), draws(game, 1, seed=1)[0].requires_grad_()

    def value(mine: Tensor, theirs: Tensor) -> Tensor:
        return game.payoffs([game.plans(0, mine).unsqueeze(0), game.plans(1, theirs).unsqueeze(0)])

    assert torch.autograd.gradcheck(value, (mine, theirs))
    (gradient,) = torch.autograd.grad(value(mine, theirs)[0].sum(), mine)
    assert bool((gradient.abs().sum(1) > 0).all())


def test_games_of_another_kind_are_refused(kuhn: SequenceFormGame) -> None:
    with pytest.raises(ValueError, match=r"SymmetrizedGame: game: must have two players and be zero-sum.*3 players"):
        SymmetrizedGame(SequenceFormGame(expand(KuhnPoker(players=3))))
    with pytest.raises(ValueError, match=r"strategies: 12 in dimension -2 \(both seats\), got shape \[6, 2\]"):
        SymmetrizedGame(kuhn).plans(0, kuhn.uniform_strategy(0))
