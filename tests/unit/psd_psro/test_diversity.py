"""Diversity terms on normal-form games and on Kuhn poker's tree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from datamodules.games.expand import expand
from datamodules.games.generated import random_game_of_skill
from datamodules.games.kuhn import KuhnPoker
from datamodules.games.mixture_model import MixtureModelGame
from datamodules.games.normal_form import NormalFormGame
from datamodules.games.sequence_form import SequenceFormGame
from modules.psd_psro.diversity import (
    Anneal,
    BehaviourResponseDiversity,
    Constant,
    Diversity,
    DiversityContext,
    ExpectedCardinality,
    NoDiversity,
    PolicySpaceDiversity,
    Sigmoid,
)

TERMS = [
    PolicySpaceDiversity(0.1),
    PolicySpaceDiversity(0.1, hull_distance="vertices"),
    ExpectedCardinality(0.1),
    ExpectedCardinality(0.1, normalise=True),
    BehaviourResponseDiversity(0.1),
]


def _matrix_context(n: int = 12, k: int = 4, seed: int = 0, **changes) -> DiversityContext:
    game, draws = random_game_of_skill(n, seed), torch.Generator().manual_seed(seed)
    plans = game.plans(0, game.random_strategies(0, k + 1, draws))
    sigma = torch.rand(k, generator=draws, dtype=torch.float64)
    fields = {"opponent_plans": plans[:k], "opponent_sigma": sigma / sigma.sum(), "rate": 0.4, **changes}
    return DiversityContext(game, 0, plans[:k], sigma / sigma.sum(), current=plans[k], **fields)


def _kuhn_context(player: int = 0, k: int = 3, **changes) -> DiversityContext:
    game, draws = SequenceFormGame(expand(KuhnPoker())), torch.Generator().manual_seed(player)
    own = game.plans(player, game.random_strategies(player, k + 1, draws))
    others = game.plans(1 - player, game.random_strategies(1 - player, 5, draws))
    uniform = torch.full((k,), 1 / k, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64)
    return DiversityContext(game, player, own[:k], uniform[0], others, uniform[1], own[k], **changes)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_scan_equals_the_measure_of_every_candidate(term):
    context = _matrix_context(coin=None)
    brute = Diversity.scan(term, context)
    if isinstance(term, BehaviourResponseDiversity):  # its parts look at different candidates
        pure = torch.eye(12, dtype=torch.float64)
        behaviour, response = (
            BehaviourResponseDiversity(1.0, response=0.0),
            BehaviourResponseDiversity(1.0, math.inf, [0], []),
        )
        brute = torch.stack([behaviour.measure(e, context) for e in pure]) + torch.stack(
            [response.measure(c, context) for c in term.candidates(pure, context)]
        )
    tolerance = 1e-3 if isinstance(term, PolicySpaceDiversity) and term.kind == "mixture" else 1e-10
    torch.testing.assert_close(term.scan(context), brute, rtol=tolerance if tolerance > 1e-9 else 1e-10, atol=tolerance)
    assert brute.std() > 1e-4  # a constant would prove nothing


def test_square_cardinality_scan_equals_brute_force_with_the_candidate_as_opponent():
    context, term = _matrix_context(), ExpectedCardinality(0.1, square=True)
    wanted = []
    matrix = context.columns.new_tensor(random_game_of_skill(12, 0).table[0].tolist())
    for candidate in term.candidates(torch.eye(12, dtype=torch.float64), context):
        population = torch.cat([context.member_plans, candidate[None]])
        table = population @ matrix @ population.T
        kernel = table @ table.T
        wanted.append((torch.eye(5) - torch.linalg.inv(kernel + torch.eye(5))).trace())
    torch.testing.assert_close(term.scan(context), torch.stack(wanted), rtol=0, atol=1e-12)
    torch.testing.assert_close(Diversity.scan(term, context), torch.stack(wanted), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="square: needs a symmetric zero-sum game"):
        term.scan(_matrix_context(opponent_plans=context.member_plans[:2], opponent_sigma=context.sigma[:2]))


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
@pytest.mark.parametrize("player", [0, 1])
def test_expected_terminal_bonus_is_the_linearised_measure(term, player):
    context = _kuhn_context(player)
    point = context.current.clone().requires_grad_()
    value = term.measure(point, context)
    (gradient,) = torch.autograd.grad(value, point)
    bonus = term.terminal_bonus(context, context.current)
    for other in (context.current, context.member_plans[0], context.base):
        expected = (context.weights * other * bonus).sum()
        wanted = 0.1 * (value.detach() + gradient @ (other - context.current))
        torch.testing.assert_close(expected, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(term.bonus(context) @ context.current, 0.1 * value.detach(), rtol=1e-9, atol=1e-9)
    assert (bonus[context.weights == 0] == 0).all()


def test_tangent_of_the_hull_distance_lies_below_it():
    """The distance to the hull is convex in the plan: each linearised response improves the true objective."""
    context, term = _kuhn_context(), PolicySpaceDiversity(1.0)
    bonus = term.bonus(context)
    draws = torch.Generator().manual_seed(9)
    others = context.game.plans(0, context.game.random_strategies(0, 20, draws))
    values = torch.stack([term.measure(other, context) for other in others])
    assert (values >= others @ bonus - 1e-7).all()
    assert (values > others @ bonus + 1e-3).any()


def test_best_response_with_the_bonus_leaves_the_hull_more_than_without():
    context, term = _kuhn_context(), PolicySpaceDiversity(5.0)
    game = context.game
    opponent = context.opponent_sigma @ context.opponent_plans
    payoff = game.payoff_vector(0, [context.current, opponent])
    plain = game.plans(0, game.best_response(0, payoff)[0])
    bonus = term.bonus(context)
    diverse = game.plans(0, game.best_response(0, payoff + bonus)[0])
    assert plain @ payoff >= diverse @ payoff
    assert diverse @ (payoff + bonus) > plain @ (payoff + bonus) + 1e-6
    assert term.measure(diverse, context) > term.measure(plain, context) + 0.01


@pytest.mark.parametrize("context", [_matrix_context(), _kuhn_context()], ids=["matrix", "kuhn"])
def test_weight_0_adds_exactly_nothing(context):
    for term in (NoDiversity(), PolicySpaceDiversity(0.0), ExpectedCardinality(Anneal(1.0, 1))):
        context.iteration = 1
        assert torch.equal(term.bonus(context), torch.zeros_like(context.current))
        assert torch.equal(term.terminal_bonus(context, context.current), torch.zeros_like(context.current))


@pytest.mark.parametrize("context", [_matrix_context(), _kuhn_context()], ids=["matrix", "kuhn"])
def test_max_bonus_caps_an_episode(context):
    free, capped = PolicySpaceDiversity(2.0), PolicySpaceDiversity(2.0, max_bonus=0.5)
    assert free.bonus(context).abs().max() > 0.5
    if context.one_state:
        assert capped.bonus(context).max() == 0.5
    else:
        assert capped.terminal_bonus(context, context.current).abs().max() == 0.5
        torch.testing.assert_close(
            capped.bonus(context), context.weights * capped.terminal_bonus(context, context.current)
        )


def test_gradcheck_of_every_measure_through_behaviour():
    context = _kuhn_context()
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for term in (
        PolicySpaceDiversity(1.0, tolerance=1e-13),
        PolicySpaceDiversity(1.0, hull_distance="vertices"),
        *TERMS[2:],
    ):

        def measure(x: Tensor, term: Diversity = term) -> Tensor:
            return term.measure(context.game.plans(0, x.softmax(-1)), context)

        assert torch.autograd.gradcheck(measure, (logits,), eps=1e-4, atol=2e-5, rtol=2e-4)


def test_continuous_games_measure_normalised_features():
    """KL(smooth(phi(x)) || smooth(phi(x_k))), smooth: add 1e-3, normalise, the nearest member."""
    game, draws = MixtureModelGame(), torch.Generator().manual_seed(0)
    points = torch.randn(4, 2, generator=draws, dtype=torch.float64)
    plans = game.plans(0, points)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    context = DiversityContext(game, 0, plans[:3], uniform, plans[:3], uniform, plans[3])
    found = PolicySpaceDiversity(1.0, hull_distance="vertices").measure(plans[3], context)
    phi = plans[:, :7] + 1e-3
    phi = phi / phi.sum(-1, keepdim=True)
    wanted = min((phi[3] * (phi[3] / phi[k]).log()).sum() for k in range(3))
    torch.testing.assert_close(found, wanted)
    assert torch.isfinite(PolicySpaceDiversity(1.0).bonus(context)).all()


def test_columns_give_payoffs_for_either_player_of_an_asymmetric_game():
    draws = torch.Generator().manual_seed(4)
    game = NormalFormGame(torch.randn(2, 3, 5, generator=draws, dtype=torch.float64), "random", symmetric=False)
    for player, (own_size, other_size) in enumerate([(3, 5), (5, 3)]):
        own, others = torch.rand(2, own_size, dtype=torch.float64), torch.rand(4, other_size, dtype=torch.float64)
        half, quarter = torch.full((2,), 0.5, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
        context = DiversityContext(game, player, own, half, others, quarter, own[0])
        table = game.table[player] if player == 0 else game.table[player].T
        torch.testing.assert_close(context.member_rows, own @ table @ others.T)
        context = _kuhn_context(player)
        pair = [context.member_plans, context.opponent_plans]
        wanted = context.game.payoffs(pair if player == 0 else pair[::-1])[player]
        torch.testing.assert_close(context.member_rows, wanted if player == 0 else wanted.T)


def test_the_coin_is_tossed_once_a_context_and_chooses_one_part():
    term, outcomes = BehaviourResponseDiversity(1.0), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before = generator.get_state()
        context = _matrix_context(generator=generator)
        assert not torch.equal(generator.get_state(), before)
        state = generator.get_state()
        term.bonus(context)
        term.terminal_bonus(context, context.current)
        assert torch.equal(generator.get_state(), state)
        outcomes.add((context.coin, term.coefficients(context)))
    assert outcomes == {(True, (500.0, 0.0)), (False, (0.0, 1.0))}
    spans = [term.coefficients(_matrix_context(iteration=t))[0] for t in (0, 75, 76, 150, 151)]
    assert spans == [500.0, 500.0, 100.0, 100.0, 50.0]


def test_schedules():
    assert Constant(0.3)(7) == 0.3
    sigmoid = Sigmoid()
    for t in (0, 25, 50):
        assert sigmoid(t) == pytest.approx(0.7 / (1 + math.exp(-0.25 * (t - 25))), rel=1e-12)
    assert Sigmoid(relative=True)(25) == pytest.approx(0.35 / 0.65)
    assert sigmoid(10**6) == pytest.approx(0.7)  # no overflow
    assert [Anneal(2.0, 4)(t) for t in (0, 1, 4, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert PolicySpaceDiversity(Anneal(2.0, 4)).weight_at(2) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PolicySpaceDiversity(-0.1), "PolicySpaceDiversity: weight"),
        (lambda: PolicySpaceDiversity(math.nan), "weight"),
        (lambda: PolicySpaceDiversity(eps=0.0), "eps"),
        (lambda: PolicySpaceDiversity(max_bonus=0.0), "max_bonus"),
        (lambda: PolicySpaceDiversity(hull_distance="edge"), "hull_distance"),  # pyright: ignore
        (lambda: ExpectedCardinality(normalise=True, square=True), "square"),
        (lambda: BehaviourResponseDiversity(spans=(75,)), "spans"),
        (lambda: BehaviourResponseDiversity(response=-1.0), "response"),
        (lambda: Sigmoid(1.0, relative=True), "height"),
        (lambda: Anneal(1.0, 0), "iterations"),
        (lambda: _matrix_context(rate=0.0), "rate"),
        (lambda: _matrix_context(k=0), "member_plans"),
    ],
)
def test_errors_name_the_field(make, words):
    with pytest.raises(ValueError, match=words):
        make()
