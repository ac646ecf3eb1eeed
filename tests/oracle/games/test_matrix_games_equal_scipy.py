"""Matrix games and the mixture model against scipy: game values by linear programming, best responses by search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.games import generated
from datamodules.games.mixture_model import MixtureModelGame
from datamodules.games.normal_form import NormalFormGame, from_bimatrix

optimize = pytest.importorskip("scipy.optimize")


def _row_optimum(table: np.ndarray) -> tuple[np.ndarray, float]:
    """max v, x with x^T table >= v, by linear programming."""
    rows, columns = table.shape
    result = optimize.linprog(
        np.r_[np.zeros(rows), -1.0],
        A_ub=np.c_[-table.T, np.ones(columns)],
        b_ub=np.zeros(columns),
        A_eq=np.r_[np.ones(rows), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * rows + [(None, None)],
    )
    assert result.status == 0
    return result.x[:-1], result.x[-1]


@pytest.mark.parametrize(
    "game",
    [
        generated.rock_paper_scissors(),
        generated.random_game_of_skill(30, 0),
        generated.disc(30, 0),
        generated.blotto(5, 3),
        from_bimatrix(torch.arange(12.0).reshape(3, 4).sin(), -torch.arange(12.0).reshape(3, 4).sin(), "asymmetric"),
    ],
    ids=lambda game: game.name,
)
def test_best_responses_to_the_scipy_optimum_pay_the_game_value(game: NormalFormGame):
    x, value = _row_optimum(game.table[0].numpy())
    y, against = _row_optimum(game.table[1].numpy().T)
    assert value == pytest.approx(-against, abs=1e-9)
    if game.symmetric:
        assert value == pytest.approx(0, abs=1e-9)
    plans = [torch.from_numpy(x), torch.from_numpy(y)]
    for player, own in enumerate((value, against)):
        _, best = game.best_response(player, game.payoff_vector(player, plans))
        assert float(best) == pytest.approx(own, abs=1e-9)


def test_triangular_and_elo_are_solved_by_their_strongest_member_as_scipy_says():
    for game in (generated.triangular(12), generated.elo(12, 4), generated.transitive(12, 4)):
        x, _ = _row_optimum(game.table[0].numpy())
        assert x.max() == pytest.approx(1, abs=1e-9)
        assert x.argmax() == int(game.table[0].sum(1).argmax())


def test_mixture_model_best_response_equals_scipy_global_search():
    game = MixtureModelGame()
    generator = torch.Generator().manual_seed(2)
    for seed in range(3):
        members = game.plans(1, 2 * torch.randn(3, 2, dtype=torch.float64, generator=generator))
        sigma = torch.rand(3, dtype=torch.float64, generator=generator)
        vector = game.payoff_vector(0, [members[0], (sigma / sigma.sum()) @ members])

        def loss(point: np.ndarray, vector: torch.Tensor = vector) -> float:
            return -float(game.plans(0, torch.from_numpy(point)) @ vector)

        found = optimize.differential_evolution(loss, [(-6, 6)] * 2, seed=seed, popsize=20, tol=1e-12, maxiter=120)
        point, value = game.best_response(0, vector)
        assert float(value) == pytest.approx(-found.fun, abs=1e-10)
        np.testing.assert_allclose(point.numpy(), found.x, rtol=0, atol=1e-4)
