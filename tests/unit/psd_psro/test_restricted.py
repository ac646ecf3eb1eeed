"""CFR+ on restricted games and the anytime meta-strategy."""

from __future__ import annotations

import pytest
import torch

from datamodules.games.expand import expand
from datamodules.games.generated import prisoners_dilemma, random_game_of_skill, rock_paper_scissors
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.sequence_form import SequenceFormGame
from modules.psd_psro.restricted import (
    CounterfactualGame,
    HasCounterfactuals,
    anytime_meta_strategy,
    cfr_plus,
    restricted_best_response,
)


@pytest.fixture(scope="module")
def kuhn() -> SequenceFormGame:
    return SequenceFormGame(expand(KuhnPoker()))


def test_the_protocols_tell_trees_from_matrices(kuhn):
    assert isinstance(kuhn, CounterfactualGame)
    assert not isinstance(rock_paper_scissors(), HasCounterfactuals)


def test_best_response_within_all_actions_is_the_best_response(kuhn):
    draws = torch.Generator().manual_seed(0)
    for player in range(2):
        for strategy in kuhn.random_strategies(1 - player, 10, draws):
            other = kuhn.plans(1 - player, strategy)
            vector = kuhn.payoff_vector(player, [other, other])
            table, value = restricted_best_response(kuhn, player, vector, kuhn.legal(player))
            torch.testing.assert_close(value, kuhn.best_response(player, vector)[1], rtol=0, atol=1e-12)
            assert (table.sum(-1) == 1).all()


def test_cfr_plus_keeps_to_the_allowed_actions(kuhn):
    """Only one action a state: the restricted game has nothing to choose and no gap."""
    masks = [torch.zeros_like(kuhn.legal(p)) for p in range(2)]
    for mask in masks:
        mask[:, 1] = True  # always bet or call
    plans, gap = cfr_plus(kuhn, masks, iterations=10)
    assert gap == 0
    for player in range(2):
        torch.testing.assert_close(kuhn.plans(player, masks[player].double()), plans[player])
    masks[0][:3] = True
    plans, gap = cfr_plus(kuhn, masks, iterations=200, tolerance=1e-3)
    assert gap <= 1e-3
    tables = [kuhn.strategy_of(p, plans[p]) for p in range(2)]
    came = kuhn.plans(1, tables[1]) > 0
    assert torch.equal(came, kuhn.plans(1, masks[1].double()) > 0)


def test_anytime_strategy_of_rock_paper_scissors_is_uniform_and_unexploitable():
    game = rock_paper_scissors()
    pure = torch.eye(3, dtype=torch.float64)
    for populations in ([pure], [pure, pure]):
        found = anytime_meta_strategy(game, populations, rounds=2000, tolerance=1e-4)
        assert len(found.mixtures) == len(populations)
        assert found.nashconv < 5e-3
        for mixture in found.mixtures:
            torch.testing.assert_close(mixture, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=5e-3)


def test_one_member_is_what_it_is():
    """Rock alone: its opponent gains 1 a seat, population exploitability 2."""
    found = anytime_meta_strategy(rock_paper_scissors(), [torch.tensor([[1.0, 0, 0]], dtype=torch.float64)])
    assert found.nashconv == 2
    assert found.gaps[0] == 0


def test_nashconv_is_that_of_the_mixtures_and_the_gap_bounds_what_is_left():
    game, draws = random_game_of_skill(20, 1), torch.Generator().manual_seed(0)
    members = [game.plans(p, game.random_strategies(p, 6, draws)) for p in range(2)]
    short = anytime_meta_strategy(game, members, rounds=30, check_every=10)
    long = anytime_meta_strategy(game, members, rounds=3000, tolerance=1e-5)
    plans = [sigma @ m for sigma, m in zip(short.mixtures, members, strict=True)]
    gains = [game.best_response(p, game.payoff_vector(p, plans))[1] for p in range(2)]
    torch.testing.assert_close(short.nashconv, torch.stack(gains).sum())
    assert long.nashconv <= short.nashconv
    assert short.nashconv - long.nashconv <= torch.stack(short.gaps).sum()
    assert torch.stack(long.gaps).sum() < 5e-3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda k: cfr_plus(k, [k.legal(0)[:2], k.legal(1)]), r"allowed\[0\]"),
        (
            lambda k: cfr_plus(k, [k.legal(0), torch.zeros_like(k.legal(1))]),
            r"allowed\[1\]: must allow a legal action in every state",
        ),
        (lambda k: cfr_plus(k, [k.legal(0), k.legal(1)], iterations=0), "iterations"),
        (lambda k: anytime_meta_strategy(prisoners_dilemma(), [torch.eye(2)] * 2), "zero-sum"),
        (lambda k: anytime_meta_strategy(k, [torch.ones(1, 13)]), "a population per player"),
        (lambda k: anytime_meta_strategy(k, [torch.ones(0, 13)] * 2), "k > 0"),
        (lambda k: anytime_meta_strategy(k, [torch.ones(1, 13)] * 2, rounds=0), "rounds"),
    ],
)
def test_errors_name_the_field(kuhn, call, words):
    with pytest.raises(ValueError, match=words):
        call(kuhn)
