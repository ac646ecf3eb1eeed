"""Matrix games against OpenSpiel: payoffs, strategy order, NashConv, three players."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.games import generated
from datamodules.games.normal_form import NormalFormGame

pyspiel = pytest.importorskip("pyspiel")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (generated.prisoners_dilemma, "matrix_pd"),
        (generated.battle_of_sexes, "matrix_bos"),
        (generated.chicken, "matrix_cd"),
        (generated.rock_paper_scissors, "matrix_rps"),
    ],
)
def test_bimatrix_payoffs_equal_open_spiel(make, name):
    theirs = pyspiel.load_matrix_game(name)
    ours = make().table
    np.testing.assert_array_equal(ours[0].numpy(), theirs.row_utilities())
    np.testing.assert_array_equal(ours[1].numpy(), theirs.col_utilities())


@pytest.mark.parametrize(("coins", "fields"), [(5, 3), (4, 4)])
def test_blotto_order_and_winner_equal_open_spiel(coins, fields):
    game = pyspiel.load_game(f"blotto(coins={coins},fields={fields},players=2)")
    state = game.new_initial_state()
    labels = [state.action_to_string(0, action) for action in state.legal_actions(0)]
    splits = generated.blotto_splits(coins, fields)
    assert ["[" + ",".join(map(str, row)) + "]" for row in splits.tolist()] == labels
    theirs = pyspiel.extensive_to_matrix_game(game)
    ours = generated.blotto(coins, fields).table
    np.testing.assert_array_equal(np.sign(ours[0].numpy()), theirs.row_utilities())  # theirs counts the winner only
    np.testing.assert_array_equal(np.sign(ours[1].numpy()), theirs.col_utilities())


def test_nash_conv_equals_open_spiel():
    from open_spiel.python import policy as policy_lib
    from open_spiel.python.algorithms import exploitability

    generator = torch.Generator().manual_seed(0)
    payoffs = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator)
    ours = NormalFormGame(payoffs)
    plans = [ours.plans(i, ours.random_strategies(i, 1, generator))[0] for i in (0, 1)]
    values = ours.payoffs([plan[None] for plan in plans]).flatten()
    nash_conv = sum(ours.best_response(i, ours.payoff_vector(i, plans))[1] - values[i] for i in (0, 1))
    matrix_game = pyspiel.create_matrix_game("m", "m", list("abcd"), list("efgh"), *payoffs.numpy())
    theirs = pyspiel.convert_to_turn_based(matrix_game)
    table = policy_lib.TabularPolicy(theirs)
    for row, state in enumerate(table.states):
        table.action_probability_array[row] = plans[state.current_player()].numpy()
    assert float(nash_conv) == pytest.approx(exploitability.nash_conv(theirs, table), abs=1e-12)


def test_three_player_payoffs_equal_open_spiel():
    from open_spiel.python import policy as policy_lib
    from open_spiel.python.algorithms import expected_game_score

    game = pyspiel.load_game("blotto(coins=3,fields=2,players=3)")
    tensor = pyspiel.extensive_to_tensor_game(game)
    payoffs = np.stack([np.asarray(tensor.player_utilities(i)).reshape(tensor.shape()) for i in range(3)])
    ours = NormalFormGame(torch.from_numpy(payoffs))
    generator = torch.Generator().manual_seed(1)
    plans = [ours.plans(i, ours.random_strategies(i, 2, generator)) for i in range(3)]
    table = ours.payoffs(plans)
    theirs = pyspiel.convert_to_turn_based(game)
    policy = policy_lib.TabularPolicy(theirs)
    for member in (0, 1):
        for row, state in enumerate(policy.states):
            policy.action_probability_array[row] = plans[state.current_player()][member].numpy()
        values = expected_game_score.policy_value(theirs.new_initial_state(), [policy] * 3)
        np.testing.assert_allclose(table[:, member, member, member].numpy(), values, rtol=0, atol=1e-12)
