"""The non-transitive mixture model as a plan game."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.games.mixture_model import CENTRES, MixtureModelGame
from modules.contracts import PlanGame, TabularGame


def _payoff(x: list[float], y: list[float]) -> float:
    """Sheet's formula in plain numbers, the cycle as beats-the-next-three."""

    def phi(point: list[float]) -> list[float]:
        return [math.exp(-0.27 * ((point[0] - a) ** 2 + (point[1] - b) ** 2)) for a, b in CENTRES]

    p, q = phi(x), phi(y)
    total = 0.5 * (sum(p) - sum(q))
    for m in range(7):
        for ahead in (1, 2, 3):
            total += p[m] * q[(m + ahead) % 7] - p[(m + ahead) % 7] * q[m]
    return total


def test_it_is_a_plan_game_but_not_tabular():
    game = MixtureModelGame()
    assert isinstance(game, PlanGame)
    assert not isinstance(game, TabularGame)
    assert game.strategy_shape(1) == (2,)


def test_payoffs_are_the_formula():
    game = MixtureModelGame()
    x = [[0.3, -1.2], [2.0, 2.0], [-3.0, 0.5]]
    y = [[1.0, 1.0], [-0.6145, 2.8058]]
    points = [torch.tensor(p, dtype=torch.float64) for p in (x, y)]
    table = game.payoffs([game.plans(i, p) for i, p in enumerate(points)])
    assert table.shape == (2, 3, 2)
    expected = torch.tensor([[_payoff(a, b) for b in y] for a in x], dtype=torch.float64)
    torch.testing.assert_close(table[0], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(table[1], -expected, rtol=0, atol=1e-14)


def test_the_game_is_antisymmetric_and_each_centre_beats_the_next_three():
    game = MixtureModelGame()
    points = 2 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = game.payoffs([game.plans(0, points), game.plans(1, points)])[0]
    torch.testing.assert_close(table, -table.T, rtol=0, atol=1e-14)
    cycle = game.table[:7, :7]
    assert cycle[0].tolist() == [0, 1, 1, 1, -1, -1, -1]
    assert cycle[1].tolist() == [-1, 0, 1, 1, 1, -1, -1]
    assert cycle.sum(0).abs().max() == 0


@pytest.mark.parametrize("player", [0, 1])
def test_payoff_vector_agrees_with_payoffs(player):
    game = MixtureModelGame()
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 1, 2, dtype=torch.float64, generator=generator)
    plans = [game.plans(0, points[0]), game.plans(1, points[1])]
    vector = game.payoff_vector(player, [plan[0] for plan in plans])
    torch.testing.assert_close(plans[player][0] @ vector, game.payoffs(plans)[player, 0, 0], rtol=0, atol=1e-14)


def test_best_response_beats_a_dense_grid_and_is_stationary():
    game = MixtureModelGame()
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    grid = game.plans(0, torch.cartesian_prod(axis, axis))
    for _ in range(5):
        members = game.plans(1, 2 * torch.randn(4, 2, dtype=torch.float64, generator=generator))
        sigma = torch.rand(4, dtype=torch.float64, generator=generator)
        vector = game.payoff_vector(0, [members[0], (sigma / sigma.sum()) @ members])
        point, value = game.best_response(0, vector)
        assert value.shape == ()
        best_on_grid = (grid @ vector).max()
        assert best_on_grid <= value + 1e-12
        assert value < best_on_grid + 2e-4  # half a cell of 0.03 away at most
        point = point.clone().requires_grad_()
        payoff = game.plans(0, point) @ vector
        torch.testing.assert_close(payoff.detach(), value, rtol=0, atol=1e-14)
        payoff.backward()
        assert point.grad is not None
        assert point.grad.norm() < 1e-7


def test_best_response_finds_the_better_of_two_far_peaks():
    game = MixtureModelGame()
    vector = torch.zeros(8, dtype=torch.float64)
    vector[0], vector[5], vector[7] = 1.0, 1.001, -0.25
    point, value = game.best_response(0, vector)
    torch.testing.assert_close(point, game.centres[5], rtol=0, atol=1e-2)
    assert value >= 0.751
    grid_only, _ = MixtureModelGame(grid=0).best_response(0, vector)  # the centres alone find it too
    torch.testing.assert_close(grid_only, point, rtol=0, atol=1e-7)


def test_mixtures_have_no_strategy():
    game = MixtureModelGame()
    with pytest.raises(ValueError, match="a mixture of points is no point"):
        game.strategy_of(0, torch.zeros(8, dtype=torch.float64))
    assert game.reach(0).tolist() == [1.0] * 7 + [0.0]


def test_start_points_and_arguments():
    game = MixtureModelGame(init_scale=0.5)
    points = game.random_strategies(0, 2000, torch.Generator().manual_seed(0))
    assert points.shape == (2000, 2)
    assert points.dtype == torch.float64
    assert abs(points.std() - 0.5) < 0.02
    assert game.digest() == MixtureModelGame(init_scale=0.5).digest() != MixtureModelGame().digest()
    with pytest.raises(ValueError, match="init_scale: must be positive and finite, got 0"):
        MixtureModelGame(init_scale=0)
    with pytest.raises(ValueError, match="grid: must be >= 0, got -1"):
        MixtureModelGame(grid=-1)
