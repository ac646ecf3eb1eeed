"""CFR+ against OpenSpiel's NashConv and the known value; restricted games against scipy's linear programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.games.open_spiel_games import open_spiel_tree
from datamodules.games.sequence_form import SequenceFormGame
from modules.psd_psro.restricted import anytime_meta_strategy, cfr_plus


@pytest.fixture(scope="module")
def kuhn() -> SequenceFormGame:
    pytest.importorskip("pyspiel")
    return SequenceFormGame(open_spiel_tree("kuhn_poker"))


def _pure_tables(mask: Tensor) -> Tensor:
    """All deterministic tables ``[pure, states, actions]`` within a mask."""
    choices = [row.nonzero().flatten().tolist() for row in mask]
    picks = torch.tensor(list(itertools.product(*choices)))
    return torch.nn.functional.one_hot(picks, mask.shape[1]).double()


def _matrix_value(table: np.ndarray) -> float:
    """Value to the row player, by scipy's linear program."""
    optimize = pytest.importorskip("scipy.optimize")
    rows, columns = table.shape
    found = optimize.linprog(
        np.r_[np.zeros(rows), -1.0],
        A_ub=np.c_[-table.T, np.ones(columns)],
        b_ub=np.zeros(columns),
        A_eq=np.r_[np.ones(rows), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * rows + [(None, None)],
        method="highs",
    )
    assert found.status == 0
    return -float(found.fun)


def test_cfr_plus_on_kuhn_equals_open_spiels_nash_conv_and_the_known_value(kuhn):
    pyspiel = pytest.importorskip("pyspiel")
    plans, gap = cfr_plus(kuhn, [kuhn.legal(0), kuhn.legal(1)], iterations=2000, tolerance=5e-4)
    tables = [kuhn.strategy_of(player, plans[player]) for player in range(2)]
    policy = {}
    for player in range(2):
        for label, row, legal in zip(kuhn.tree.labels[player], tables[player], kuhn.legal(player), strict=True):
            policy[label] = [(a, float(row[a])) for a in legal.nonzero().flatten().tolist()]
    nash_conv = pyspiel.nash_conv(pyspiel.load_game("kuhn_poker"), pyspiel.TabularPolicy(policy))
    assert nash_conv < 1e-3
    assert float(gap) == pytest.approx(nash_conv, abs=1e-12)
    value = float(kuhn.payoffs([plan[None] for plan in plans])[0, 0, 0])
    assert value == pytest.approx(-1 / 18, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_cfr_plus_on_a_restricted_game_equals_the_linear_program_over_its_pure_strategies(kuhn, seed):
    draws = torch.Generator().manual_seed(seed)
    masks = []
    for player in range(2):
        members = _pure_tables(kuhn.legal(player))
        chosen = members[torch.randint(len(members), (2,), generator=draws)]
        masks.append((chosen > 0).any(0))
    plans, gap = cfr_plus(kuhn, masks, iterations=5000, tolerance=1e-4)
    assert gap <= 1e-4
    pure = [kuhn.plans(player, _pure_tables(masks[player])) for player in range(2)]
    wanted = _matrix_value(kuhn.payoffs(pure)[0].numpy())
    assert float(kuhn.payoffs([plan[None] for plan in plans])[0, 0, 0]) == pytest.approx(wanted, abs=2e-4)


def test_anytime_meta_strategy_equals_the_linear_program_and_never_grows_more_exploitable(kuhn):
    """Population exploitability of Kuhn populations: each against all 64 pure strategies of the other."""
    draws = torch.Generator().manual_seed(1)
    members = [kuhn.plans(player, kuhn.random_strategies(player, 6, draws)) for player in range(2)]
    pure = [kuhn.plans(player, _pure_tables(kuhn.legal(player))) for player in range(2)]
    previous = np.inf
    for count in (1, 2, 4, 6):
        population = [m[:count] for m in members]
        first = _matrix_value(kuhn.payoffs([population[0], pure[1]])[0].numpy())
        second = _matrix_value(kuhn.payoffs([pure[0], population[1]])[1].T.numpy())
        found = anytime_meta_strategy(kuhn, population, rounds=1500, tolerance=1e-4)
        assert float(found.nashconv) == pytest.approx(-first - second, abs=2e-3)
        assert float(found.nashconv) >= -first - second - 1e-9  # the program's is the least
        assert float(found.nashconv) + first + second <= float(torch.stack(found.gaps).sum()) + 1e-9
        assert float(torch.stack(found.gaps).max()) < 2e-3
        for player in range(2):  # the averaged best responses hold every mixture to guarantee + gap
            held = population[player] @ kuhn.payoff_vector(player, [found.opponents[player]] * 2)
            torch.testing.assert_close(held.amax(), found.guarantees[player] + found.gaps[player], rtol=0, atol=1e-12)
        assert float(found.nashconv) <= previous + 2e-3
        previous = float(found.nashconv)
