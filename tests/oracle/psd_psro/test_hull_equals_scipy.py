"""Hull distances against scipy's SLSQP, OpenSpiel's information states and dense sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.games.generated import random_game_of_skill
from datamodules.games.open_spiel_games import open_spiel_tree
from datamodules.games.sequence_form import SequenceFormGame
from modules.psd_psro.diversity import DiversityContext, PolicySpaceDiversity
from modules.psd_psro.hull import divergence, hull_distance


def _game(name: str) -> SequenceFormGame:
    pytest.importorskip("pyspiel")
    return SequenceFormGame(open_spiel_tree(name))


def _members(game: SequenceFormGame, player: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    tables = game.random_strategies(player, count, draws)
    return tables, game.plans(player, tables)


@pytest.mark.parametrize("player", [0, 1])
@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker"])
def test_plan_space_divergence_equals_the_per_state_sum_over_open_spiel_states(name, player):
    """The chain rule, to 1e-12: the sum over OpenSpiel's histories of reach times KL per state."""
    game = _game(name)
    pyspiel = pytest.importorskip("pyspiel")
    tables, plans = _members(game, player, 4, seed=player)
    sigma = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mixture = game.strategy_of(player, sigma @ plans[:3])
    labels = game.tree.labels
    assert labels is not None
    index = {label: i for i, label in enumerate(labels[player])}
    own, other = tables[3].numpy(), mixture.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(own > 0, own * (np.log(own) - np.log(other)), 0.0).sum(-1)

    def walk(state, reach: float) -> float:
        if state.is_terminal():
            return 0.0
        if state.is_chance_node():
            return sum(walk(state.child(action), reach * p) for action, p in state.chance_outcomes())
        legal = state.legal_actions()
        if state.current_player() != player:
            return sum(walk(state.child(action), reach / len(legal)) for action in legal)
        row = index[state.information_state_string()]
        below = sum(walk(state.child(action), reach * own[row, action]) for action in legal)
        return reach * kl[row] + below

    wanted = walk(pyspiel.load_game(name).new_initial_state(), 1.0)
    found = divergence(plans[3], sigma @ plans[:3], game.reach(player))
    assert float(found) == pytest.approx(wanted, abs=1e-12)
    assert wanted > 0.01


def _slsqp(plan: Tensor, members: Tensor, reach: Tensor) -> float:
    optimize = pytest.importorskip("scipy.optimize")
    weight, rows = (reach * plan).numpy(), members.numpy()
    live = weight > 0
    weight, rows, entropy = weight[live], rows[:, live], float((weight * plan.log().numpy())[live].sum())
    k = len(rows)
    found = optimize.minimize(
        lambda sigma: entropy - float(weight @ np.log(sigma @ rows)),
        np.full(k, 1 / k),
        jac=lambda sigma: -rows @ (weight / (sigma @ rows)),
        bounds=[(1e-15, 1)] * k,
        constraints={"type": "eq", "fun": lambda sigma: sigma.sum() - 1, "jac": lambda sigma: np.ones(k)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert found.success or found.status == 8, found.message  # 8: no further descent at this precision
    return float(found.fun)


@pytest.mark.parametrize("player", [0, 1])
@pytest.mark.parametrize(("name", "count"), [("kuhn_poker", 3), ("leduc_poker", 12), ("goofspiel(num_cards=3)", 6)])
def test_hull_distance_of_trees_equals_scipy(name, count, player):
    game = _game(name)
    _, plans = _members(game, player, count + 1, seed=7 + player)
    reach = game.reach(player)
    found = hull_distance(plans[-1], plans[:-1], reach)
    assert float(found.value) == pytest.approx(_slsqp(plans[-1], plans[:-1], reach), abs=1e-7)
    assert found.gap <= 1e-10
    nearest = hull_distance(plans[-1], plans[:-1], reach, "vertices")
    assert float(nearest.value) == min(float(divergence(plans[-1], q, reach)) for q in plans[:-1])
    assert nearest.value > found.value + 1e-3


def test_hull_distance_of_probability_vectors_equals_scipy():
    draws = torch.Generator().manual_seed(0)
    values = torch.empty(25, 40, dtype=torch.float64).exponential_(generator=draws).pow(3)
    values = values / values.sum(-1, keepdim=True)
    reach = torch.ones(40, dtype=torch.float64)
    found = hull_distance(values[:2], values[5:], reach)
    wanted = [_slsqp(plan, values[5:], reach) for plan in values[:2]]
    torch.testing.assert_close(found.value, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)


def test_closed_form_of_pure_strategies_equals_the_dense_kl():
    """Smoothed pure strategies against smoothed members, every pair summed densely by scipy."""
    special = pytest.importorskip("scipy.special")
    game, draws = random_game_of_skill(30, 0), torch.Generator().manual_seed(0)
    plans = game.plans(0, game.random_strategies(0, 6, draws))
    plans[0] = torch.eye(30, dtype=torch.float64)[3]  # a pure member
    sigma = torch.full((5,), 0.2, dtype=torch.float64)
    context = DiversityContext(game, 0, plans[:5], sigma, plans[:5], sigma, plans[5])

    def smoothed(p: np.ndarray) -> np.ndarray:
        return (p + 1e-3) / (p + 1e-3).sum()

    dense = [
        min(special.rel_entr(smoothed(row), smoothed(member.numpy())).sum() for member in plans[:5])
        for row in np.eye(30)
    ]
    found = PolicySpaceDiversity(1.0, hull_distance="vertices").scan(context)
    np.testing.assert_allclose(found.numpy(), dense, rtol=0, atol=1e-12)
    assert found[3].abs() < 1e-12  # the member itself
