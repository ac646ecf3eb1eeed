"""Normal-form games: multilinear payoffs, validation, identity."""

from __future__ import annotations

import pytest
import torch

from datamodules.games.generated import battle_of_sexes, chicken, prisoners_dilemma, rock_paper_scissors
from datamodules.games.normal_form import NormalFormGame, from_antisymmetric, from_bimatrix
from modules.contracts import TabularGame


def _random_game(sizes: tuple[int, ...], seed: int = 0) -> NormalFormGame:
    generator = torch.Generator().manual_seed(seed)
    return NormalFormGame(torch.randn(len(sizes), *sizes, dtype=torch.float64, generator=generator), "random")


def _members(game: NormalFormGame, counts: tuple[int, ...], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [game.plans(i, game.random_strategies(i, count, generator)) for i, count in enumerate(counts)]


def test_it_is_a_tabular_game():
    game = rock_paper_scissors()
    assert isinstance(game, TabularGame)
    assert game.strategy_shape(0) == (1, 3)
    assert game.legal(1).tolist() == [[True, True, True]]
    assert game.observations(0).dtype == torch.float32
    assert game.observations(0).tolist() == [[1.0]]


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4), (2, 2, 3, 2)])
def test_payoffs_of_all_profiles_are_the_multilinear_sums(sizes):
    game = _random_game(sizes)
    plans = _members(game, tuple(range(2, 2 + len(sizes))))
    table = game.payoffs(plans)
    assert table.shape == (len(sizes), *range(2, 2 + len(sizes)))
    profile = tuple(count - 1 for count in table.shape[1:])
    expected = torch.zeros(len(sizes), dtype=torch.float64)
    for pure in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
        weight = torch.stack([plans[i][profile[i], pure[i]] for i in range(len(sizes))]).prod()
        expected += weight * game.table[(slice(None), *pure)]
    torch.testing.assert_close(table[(slice(None), *profile)], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4)])
def test_payoff_vectors_agree_with_the_payoffs_whatever_the_own_plan(sizes):
    game = _random_game(sizes)
    plans = _members(game, (1,) * len(sizes))
    for player in range(len(sizes)):
        others: list[torch.Tensor] = [plan[0] for plan in plans]
        others[player] = torch.full_like(others[player], float("nan"))
        vector = game.payoff_vector(player, others)
        assert vector.shape == (sizes[player],)
        torch.testing.assert_close(plans[player][0] @ vector, game.payoffs(plans)[player].squeeze(), rtol=0, atol=1e-13)


def test_the_zero_sum_shortcut_equals_the_general_sums():
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    game = from_bimatrix(first, -first)
    assert game.zero_sum
    plans = _members(game, (3, 2))
    general = torch.einsum("pab,ka,lb->pkl", game.table, plans[0], plans[1])
    torch.testing.assert_close(game.payoffs(plans), general, rtol=0, atol=1e-13)


def test_best_response_takes_the_first_of_equals():
    game = rock_paper_scissors()
    strategy, value = game.best_response(0, torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64))
    assert strategy.tolist() == [[0.0, 1.0, 0.0]]
    assert value.item() == 2.0


def test_strategies_plans_and_reach():
    game = _random_game((4, 3))
    strategies = game.random_strategies(0, 6, torch.Generator().manual_seed(0))
    assert strategies.shape == (6, 1, 4)
    assert (strategies > 0).all()
    plans = game.plans(0, strategies)
    torch.testing.assert_close(plans.sum(-1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(game.strategy_of(0, plans), strategies, rtol=0, atol=0)
    nothing = game.strategy_of(0, torch.zeros_like(plans[:1]))
    torch.testing.assert_close(nothing, torch.full_like(nothing, 1 / plans.shape[-1]), rtol=0, atol=0)
    torch.testing.assert_close(plans @ game.reach(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-15)
    repeated = game.random_strategies(0, 6, torch.Generator().manual_seed(0))
    assert torch.equal(strategies, repeated)


def test_gradients_pass_through_plans_and_payoffs():
    game = _random_game((3, 3))
    strategies = game.random_strategies(0, 1, torch.Generator().manual_seed(0)).requires_grad_()
    other = _members(game, (1, 1))[1]
    game.payoffs([game.plans(0, strategies), other])[0].sum().backward()
    gradient = strategies.grad
    assert gradient is not None
    own = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(gradient[0, 0], game.payoff_vector(0, [own, other[0]]), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("game", "zero_sum", "symmetric"),
    [
        (rock_paper_scissors(), True, True),
        (prisoners_dilemma(), False, True),
        (chicken(), False, True),
        (battle_of_sexes(), False, False),
        (_random_game((3, 3)), False, False),
        (_random_game((2, 2, 2)), False, False),
        (from_bimatrix(torch.eye(2), -torch.eye(2)), True, False),  # matching pennies, shifted
    ],
)
def test_zero_sum_and_symmetry_are_found_out(game, zero_sum, symmetric):
    assert (game.zero_sum, game.symmetric) == (zero_sum, symmetric)


def test_a_symmetric_game_may_be_played_by_two_populations():
    game = rock_paper_scissors()
    assert not NormalFormGame(game.table, "rps", symmetric=False).symmetric


@pytest.mark.parametrize(
    ("payoffs", "message"),
    [
        (torch.zeros(3, 3), r"must be \[players, n_1, ..., n_players\], 2 or more, got \[3, 3\]"),
        (torch.zeros(3, 2, 2), r"got \[3, 2, 2\]"),
        (torch.zeros(2, 0, 2), "at least one strategy"),
        (torch.tensor([[[0.0, 1.0]], [[0.0, float("nan")]]]), r"must be finite, got nan at \[1, 0, 1\]"),
    ],
)
def test_wrong_payoffs_are_refused(payoffs, message):
    with pytest.raises(ValueError, match=message):
        NormalFormGame(payoffs)


def test_claimed_symmetry_is_checked():
    with pytest.raises(ValueError, match=r"symmetric: needs two players.*= 1"):
        NormalFormGame(battle_of_sexes().table, symmetric=True)
    with pytest.raises(ValueError, match=r"got shape \[2, 2, 3\]"):
        NormalFormGame(torch.zeros(2, 2, 3), symmetric=True)
    with pytest.raises(ValueError, match="needs two players"):
        from_antisymmetric(torch.eye(3), "identity")


def test_wrong_plans_are_refused():
    game = _random_game((3, 4))
    good = _members(game, (1, 1))
    with pytest.raises(ValueError, match=r"one per player \(2\), got 1"):
        game.payoffs(good[:1])
    with pytest.raises(ValueError, match=r"player 1's must end in \[4\]"):
        game.payoffs([good[0], good[0]])
    with pytest.raises(ValueError, match=r"must be \[members, 3\]"):
        game.payoffs([good[0][0], good[1]])
    with pytest.raises(ValueError, match="player: must be 0 to 1, got 2"):
        game.legal(2)
    with pytest.raises(ValueError, match=r"must end in \[1, 3\]"):
        game.plans(0, good[1])


def test_the_digest_tells_payoffs_and_shapes_apart_and_the_table_is_a_copy():
    table = torch.arange(12.0).reshape(2, 2, 3)
    game = NormalFormGame(table, "g")
    before = game.digest()
    table += 1
    assert game.digest() == before
    assert NormalFormGame(table, "g").digest() != before
    assert NormalFormGame(torch.arange(12.0).reshape(2, 3, 2), "g").digest() != before
    assert NormalFormGame(torch.arange(12.0).reshape(2, 2, 3), "g").digest() == before
