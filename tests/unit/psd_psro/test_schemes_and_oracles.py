"""Who learns against whom, and what exact and gradient oracles find, on small matrix games."""

from __future__ import annotations

import pytest
import torch
from matrix_game import MatrixGame

from modules.population.meta_solvers import Last, NashLP, Uniform
from modules.psd_psro.diversity import DiversityContext, NoDiversity, PolicySpaceDiversity, Sigmoid
from modules.psd_psro.oracles import ExactResponse, GradientResponse, Round, Task
from modules.psd_psro.schemes import Learner, MetaGame, Pipeline, Rectified, Sequential

RPS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)
RPS = torch.stack([RPS, -RPS])


def _meta(rows, sigma=None, solver=None):
    """Rock-paper-scissors played by one population with the given mixed strategies."""
    game = MatrixGame(RPS, symmetric=True)
    plans = torch.tensor(rows, dtype=torch.float64)
    payoffs = game.payoffs([plans, plans])
    solver = solver or NashLP()
    sigma = torch.tensor(sigma, dtype=torch.float64) if sigma else torch.full((len(plans),), 1 / len(plans)).double()
    return MetaGame(game, payoffs, [plans], [plans.unsqueeze(1)], [sigma], [sigma], True, solver)


def test_sequential_trains_one_learner_against_the_response_strategy():
    (learner,) = Sequential().learners(_meta([[1.0, 0, 0], [0, 1.0, 0]], [0.25, 0.75]))
    assert learner.member is None
    assert learner.visible == 2
    assert learner.opponents[0].tolist() == [0.25, 0.75]


def test_pipeline_learners_meet_those_below_them_only():
    scheme = Pipeline(learners=2)
    learners = scheme.learners(_meta([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]], solver=Uniform()))
    assert [learner.member for learner in learners] == [2, 3]
    assert [learner.visible for learner in learners] == [2, 3]
    assert learners[0].opponents[0].tolist() == [0.5, 0.5, 0, 0]
    torch.testing.assert_close(learners[1].opponents[0], torch.tensor([1, 1, 1, 0]).double() / 3)


def test_pipeline_fixes_the_lowest_learner_once_its_gain_is_below_the_plateau():
    scheme = Pipeline(learners=2, plateau=0.03, offset=1.0)
    assert not scheme.fresh([0.0, -0.5])  # 0.1 -> 1.0
    assert not scheme.fresh([0.1, 9.0])  # 10 % more; the upper learner does not count
    assert scheme.fresh([0.12, 9.0])  # 1.8 %
    restored = Pipeline(learners=2)
    restored.load_state_dict(scheme.state_dict())
    assert restored.fresh([0.13, 0.0])


def test_rectified_learners_train_against_whom_they_do_not_lose_to():
    meta = _meta([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], [0.5, 0.495, 0.005])
    learners = Rectified(threshold=0.01).learners(meta)
    assert len(learners) == 2  # the third member's mass is below the threshold
    # rock does not lose to rock and scissors; paper not to rock and paper
    torch.testing.assert_close(learners[0].opponents[0], torch.tensor([0.5, 0, 0.005]).double() / 0.505)
    torch.testing.assert_close(learners[1].opponents[0], torch.tensor([0.5, 0.495, 0]).double() / 0.995)
    assert len(Rectified(threshold=0.01, limit=1).learners(meta)) == 1


def test_last_response_solver_is_self_play():
    meta = _meta([[1.0, 0, 0], [0, 1.0, 0]], [0.0, 1.0], Last())
    (learner,) = Sequential().learners(meta)
    assert learner.opponents[0].tolist() == [0.0, 1.0]


def _task(game, opponent, start, members=((1.0, 0.0, 0.0),)):
    plans = torch.tensor(members, dtype=torch.float64)
    opponent = torch.tensor(opponent, dtype=torch.float64)
    vector = game.payoff_vector(0, [opponent, opponent])
    start = torch.tensor([start], dtype=torch.float64)
    sigma = torch.full((len(plans),), 1 / len(plans)).double()
    context = DiversityContext(game, 0, plans, sigma, plans, sigma, game.plans(0, start))
    return Task(Learner(0, [sigma], visible=len(plans)), 0, vector, context, start, 0)


def _respond(oracle, task, diversity):
    oracle.begin([task], Round(task.context.game, 0, 0, []))
    for step in range(oracle.steps):
        oracle.step(None, step, diversity)
    return oracle.responses()[0]["strategy"][0]


def test_exact_response_and_its_step_size():
    game = MatrixGame(RPS, symmetric=True)
    beats_rock = _respond(ExactResponse(), _task(game, [1.0, 0, 0], [0.2, 0.3, 0.5]), NoDiversity())
    assert beats_rock.tolist() == [0, 1, 0]
    halfway = _respond(ExactResponse(rate=0.5), _task(game, [1.0, 0, 0], [0.2, 0.3, 0.5]), NoDiversity())
    torch.testing.assert_close(halfway, torch.tensor([0.1, 0.65, 0.25]).double())


def test_exact_response_takes_the_strategy_that_is_worth_most_with_its_distance():
    """Against (0.4, 0.3, 0.3) paper gains 0.1; a member that plays paper already makes another answer worth more."""
    game, members = MatrixGame(RPS, symmetric=True), ((0.0, 1.0, 0.0),)
    task = _task(game, [0.4, 0.3, 0.3], [1.0, 0, 0], members)
    assert _respond(ExactResponse(), task, NoDiversity()).tolist() == [0, 1, 0]
    term = PolicySpaceDiversity(weight=0.1)
    chosen = _respond(ExactResponse(), _task(game, [0.4, 0.3, 0.3], [1.0, 0, 0], members), term)
    values = [
        float(task.vector[a]) + 0.1 * float(term.measure(torch.eye(3).double()[a], task.context)) for a in range(3)
    ]
    assert chosen.argmax() == max(range(3), key=lambda a: values[a])
    assert chosen.argmax() != 1


def test_gradient_response_climbs_to_the_best_response_of_a_table():
    game = MatrixGame(RPS, symmetric=True)
    strategy = _respond(GradientResponse(200, 0.1), _task(game, [1.0, 0, 0], [0.4, 0.3, 0.3]), NoDiversity())
    assert strategy[1] > 0.98
    assert strategy.sum() == pytest.approx(1)


def test_gradient_response_resumes_bitwise():
    game = MatrixGame(RPS, symmetric=True)
    whole, cut = GradientResponse(6, 0.1), GradientResponse(6, 0.1)
    turn = Round(game, 0, 0, [])
    for oracle in (whole, cut):
        oracle.begin([_task(game, [0.7, 0.1, 0.2], [0.4, 0.3, 0.3])], turn)
        for step in range(3):
            oracle.step(None, step, NoDiversity())
    again = GradientResponse(6, 0.1)
    again.begin([_task(game, [0.7, 0.1, 0.2], [0.4, 0.3, 0.3])], turn, resume=True)
    again.load_state_dict(cut.state_dict())
    for oracle in (whole, again):
        for step in range(3, 6):
            oracle.step(None, step, NoDiversity())
    assert torch.equal(whole.responses()[0]["strategy"], again.responses()[0]["strategy"])


def test_sigmoid_scale_and_relative_weight():
    half = Sigmoid(height=0.5, midpoint=3.0, relative=True, scale=0.3)(3)
    assert half == pytest.approx(0.3 * 0.25 / 0.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline(learners=0), "Pipeline: learners must be >= 1, got 0"),
        (lambda: Rectified(threshold=1.0), "Rectified: threshold must lie in"),
        (lambda: ExactResponse(rate=0.0), "ExactResponse: rate must lie in"),
        (lambda: ExactResponse(starts=[]), "ExactResponse: starts must be shares"),
        (lambda: GradientResponse(updates=0), "GradientResponse: updates must be >= 1"),
        (lambda: PolicySpaceDiversity(weight=-1.0), "weight: must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_share_of_opponents_is_drawn_from_all_members_alike():
    meta = _meta([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0]], [0.25, 0.75, 0.0, 0.0])
    (learner,) = Sequential(uniform_share=0.4).learners(meta)
    torch.testing.assert_close(learner.opponents[0], torch.tensor([0.25, 0.55, 0.1, 0.1]).double())
    (learner,) = Sequential(uniform_share=1.0).learners(meta)  # fictitious self-play
    assert learner.opponents[0].tolist() == [0.25] * 4
    assert meta.response_sigma[0].tolist() == [0.25, 0.75, 0.0, 0.0]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=r"Sequential: uniform_share must lie in \[0, 1\]"):
        Sequential(uniform_share=share)
