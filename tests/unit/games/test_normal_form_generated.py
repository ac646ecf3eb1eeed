"""Generated games: formulas, seeds, sizes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.games import generated


@pytest.mark.parametrize(
    "game",
    [
        generated.rock_paper_scissors(),
        generated.disc(9, 1),
        generated.elo(9, 1),
        generated.elo_plus_noise(9, 1),
        generated.transitive(9, 1),
        generated.triangular(9),
        generated.random_game_of_skill(9, 1),
        generated.blotto(5, 3),
    ],
    ids=lambda game: game.name,
)
def test_they_are_symmetric_zero_sum_and_exactly_antisymmetric(game):
    assert game.zero_sum
    assert game.symmetric
    assert torch.equal(game.table[0], -game.table[0].T)
    assert 0 < game.table.abs().max() <= 4


@pytest.mark.parametrize(
    "make",
    [
        generated.disc,
        generated.elo,
        generated.elo_plus_noise,
        generated.transitive,
        generated.random_game_of_skill,
    ],
)
def test_the_seed_decides_the_game(make):
    assert make(12, 3).digest() == make(12, 3).digest()
    assert not torch.equal(make(12, 3).table, make(12, 4).table)


def test_random_game_of_skill_draws_w_then_s_and_divides_by_the_largest():
    draws = np.random.default_rng(7).standard_normal(20 * 20 + 20)
    w, s = draws[:400].reshape(20, 20), draws[400:]
    expected = np.empty((20, 20))
    for a in range(20):
        for b in range(20):
            expected[a, b] = 0.5 * (w[a, b] - w[b, a]) + s[a] - s[b]
    table = generated.random_game_of_skill(20, 7).table[0].numpy()
    np.testing.assert_allclose(table, expected / np.abs(expected).max(), rtol=0, atol=1e-15)
    assert np.abs(table).max() == 1.0


def test_elo_is_transitive_and_noise_is_added_to_the_same_ratings():
    table = generated.elo(30, 2).table[0]
    order = table.sum(1).argsort()
    ranked = table[order][:, order]
    assert (ranked.tril(-1) >= 0).all()
    logits = torch.atanh(table) * 2  # rating differences add up along any path
    torch.testing.assert_close(logits[0, 1] + logits[1, 2], logits[0, 2], rtol=0, atol=1e-12)
    assert torch.equal(generated.elo_plus_noise(30, 2, noise=0.0).table, generated.elo(30, 2).table)
    small, large = (generated.elo_plus_noise(30, 2, noise=e).table[0] - table for e in (0.5, 1.0))
    torch.testing.assert_close(2 * small, large, rtol=0, atol=1e-14)


def test_disc_is_cyclic_and_of_rank_two():
    table = generated.disc(40, 0).table[0]
    assert torch.linalg.matrix_rank(table) == 2
    assert (table > 0).any(1).all()
    assert (table < 0).any(1).all()
    assert table.abs().max() <= 1


def test_transitive_and_triangular_orders():
    table = generated.transitive(15, 0).table[0]
    torch.testing.assert_close(table[3, 5] + table[5, 7], table[3, 7], rtol=0, atol=1e-15)
    assert table.max() == 1
    assert generated.triangular(3).table[0].tolist() == [[0, -1, -1], [1, 0, -1], [1, 1, 0]]


@pytest.mark.parametrize(("coins", "fields", "count"), [(5, 4, 56), (10, 3, 66), (10, 4, 286), (3, 2, 4)])
def test_blotto_sizes_and_order(coins, fields, count):
    splits = generated.blotto_splits(coins, fields)
    assert splits.shape == (count, fields)
    assert (splits.sum(1) == coins).all()
    assert (splits >= 0).all()
    assert splits.tolist() == sorted(splits.tolist())
    assert len({tuple(row) for row in splits.tolist()}) == count


def test_blotto_payoffs_by_hand():
    table = generated.blotto(10, 4).table[0]
    splits = generated.blotto_splits(10, 4).tolist()
    a, b = splits.index([10, 0, 0, 0]), splits.index([0, 4, 3, 3])
    assert table[a, b] == -1.0  # wins one, loses three: -2 of at most 2
    a, b = splits.index([1, 2, 3, 4]), splits.index([1, 3, 2, 4])
    assert table[a, b] == 0.0
    assert table.shape == (286, 286)


def test_best_responses_in_the_dilemmas():
    game = generated.prisoners_dilemma()
    for other in torch.eye(2, dtype=torch.float64):
        assert game.best_response(0, game.payoff_vector(0, [other, other]))[0].tolist() == [[0.0, 1.0]]
    mixed = torch.tensor([0.6, 0.4], dtype=torch.float64)
    game = generated.battle_of_sexes()
    vector = game.payoff_vector(1, [mixed, mixed])
    torch.testing.assert_close(vector[0], vector[1], rtol=0, atol=1e-15)
    game, half = generated.chicken(), torch.full((2,), 0.5, dtype=torch.float64)
    assert game.payoff_vector(0, [half, half]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: generated.random_game_of_skill(1), "random_game_of_skill: n: must be >= 2, got 1"),
        (lambda: generated.disc(5, -1), "disc: seed: must be >= 0, got -1"),
        (lambda: generated.triangular(0), "triangular: n: must be >= 2, got 0"),
        (lambda: generated.elo_plus_noise(5, 0, float("nan")), "elo_plus_noise: noise: must be finite"),
        (lambda: generated.blotto(0, 3), "blotto: coins: must be >= 1, got 0"),
        (lambda: generated.blotto(3, 1), "blotto: fields: must be >= 2, got 1"),
        (lambda: generated.blotto(100, 10), "100, 10 make more than max_strategies=5000"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
