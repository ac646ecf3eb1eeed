from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modules.objectives.lagrangian import (
    check_constraints,
    effective_multipliers,
    fixed_coefficients,
    mix_advantages,
    multiplier_loss,
    multiplier_weights,
    objective_weight,
    project_raw,
    raw_multipliers,
    reward_unit_multipliers,
    stream_coefficients,
    weights_of_fixed,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


FORMS = [
    ("bounded", ["ge", "le", "eq"]),
    ("softplus", ["ge", "le"]),
    ("exp", ["ge", "le"]),
    ("projected", ["ge", "le"]),
    ("free", ["ge", "le", "eq"]),
]


def test_weights_by_hand():
    raw = vector(0.4, 0.4, 0.4)
    sigmoid = 1 / (1 + math.exp(-0.4))
    kinds = ["ge", "le", "eq"]
    assert multiplier_weights(raw, kinds).tolist() == pytest.approx([sigmoid, -sigmoid, math.tanh(0.4)])
    assert multiplier_weights(raw, kinds, "free").tolist() == pytest.approx([0.4, -0.4, 0.4])
    assert multiplier_weights(-raw, kinds, "free").tolist() == pytest.approx([0.0, 0.0, -0.4])
    two = ["ge", "le"]
    softplus = math.log(1 + math.exp(0.4))
    assert multiplier_weights(raw[:2], two, "softplus").tolist() == pytest.approx([softplus, -softplus])
    assert multiplier_weights(raw[:2], two, "exp").tolist() == pytest.approx([math.exp(0.4), -math.exp(0.4)])
    assert multiplier_weights(10 * raw[:2], two, "exp", lambda_max=5.0).tolist() == [5.0, -5.0]
    assert multiplier_weights(vector(-9.0, 0.0, 9.0), ["eq"] * 3, "free", lambda_max=2.0).tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize(("form", "kinds"), FORMS)
def test_raw_multipliers_are_the_inverse(form, kinds):
    raw = vector(0.7, 0.2, -0.6)[: len(kinds)]
    weights = multiplier_weights(raw, kinds, form)
    torch.testing.assert_close(raw_multipliers(weights, kinds, form), raw)
    with pytest.raises(ValueError, match="no .* multiplier of"):
        raw_multipliers(-vector(0.5, -0.5, 1.5)[: len(kinds)], kinds, form)


@pytest.mark.parametrize(("form", "kinds"), FORMS)
def test_a_descent_step_moves_each_weight_towards_its_constraint(form, kinds):
    """The sign that smoke tests miss: too little reward pushes it up, too much of an upper-bounded one down."""
    raw = vector(0.3, 0.3, 0.3)[: len(kinds)].requires_grad_()
    theta = torch.full_like(raw, 0.5).detach()
    for distance in (-0.2, 0.2):
        weights = multiplier_weights(raw, kinds, form)
        (gradient,) = torch.autograd.grad(multiplier_loss(weights, theta + distance, theta), raw)
        change = multiplier_weights(raw - 0.01 * gradient, kinds, form) - weights
        # Every weight is the coefficient of its reward: whatever the kind, it rises when there is too little.
        assert (change * -distance > 0).all()


@pytest.mark.parametrize(("form", "kinds"), FORMS)
def test_multiplier_gradients(form, kinds):
    raw = vector(0.3, 0.8, -0.4)[: len(kinds)].requires_grad_()
    returns, theta = vector(0.1, 0.9, 0.4)[: len(kinds)], vector(0.5, 0.2, 0.3)[: len(kinds)]

    def loss(value: Tensor) -> Tensor:
        return multiplier_loss(multiplier_weights(value, kinds, form), returns, theta)

    assert torch.autograd.gradcheck(loss, (raw,))
    if form == "bounded":
        (gradient,) = torch.autograd.grad(loss(raw), raw)
        sigmoid = torch.sigmoid(raw)
        slope = torch.stack([sigmoid[0] * (1 - sigmoid[0]), -sigmoid[1] * (1 - sigmoid[1]), 1 - raw[2].tanh() ** 2])
        torch.testing.assert_close(gradient, slope * (returns - theta))


def test_no_gradient_crosses_between_policy_and_multipliers():
    raw, streams = vector(0.1, 0.2).requires_grad_(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = multiplier_weights(raw, ["ge", "eq"])
    mixed = mix_advantages(streams, stream_coefficients(weights, ["ge", "eq"]))
    mixed.sum().backward()
    assert raw.grad is None
    assert streams.grad is not None
    returns = streams[:, :2].mean(0)
    streams.grad = None
    multiplier_loss(weights, returns, vector(0.5, 0.5)).backward()
    assert streams.grad is None
    assert raw.grad is not None


def test_mixtures_by_hand():
    weights = vector(0.25, 0.5)
    assert stream_coefficients(weights, ["ge", "ge"]).tolist() == [0.25, 0.5, 1.25]  # mu-PPO: N - sum w = 2 - 3/4
    assert stream_coefficients(vector(-0.25, 0.5), ["eq", "eq"]).tolist() == [-0.25, 0.5, 1.75]
    assert stream_coefficients(weights, ["ge", "ge"], bounded=False).tolist() == [0.25, 0.5, 1.0]
    # All-PPO: (N - sum w) (A_0 + A_1 + A_2) - w_1 A_1 - w_2 A_2, both le
    assert stream_coefficients(-weights, ["le", "le"], "all").tolist() == [1.0, 0.75, 1.25]
    # (1 - w) A_1 + w A_2, and no KL
    assert stream_coefficients(vector(0.25), ["ge"], "single").tolist() == [0.75, 0.25, 0.0]
    assert stream_coefficients(weights, ["ge", "ge"], "single", maximise=1).tolist() == [0.25, 1.25, 0.5, 0.0]
    # (A_R - lambda A_C) / (1 + lambda), and KL
    lagrangian = stream_coefficients(vector(-3.0), ["le"], "ppo_lag", bounded=False)
    assert lagrangian.tolist() == [0.25, -0.75, 1.0]
    # a reward without a constraint
    assert stream_coefficients(vector(0.5), ["ge"], rewards=3, constrained=[1]).tolist() == [0.0, 0.5, 0.0, 0.5]
    assert fixed_coefficients(vector(0.75, 0.25)).tolist() == [0.75, 0.25, 1.0]


def test_all_ppo_with_the_kl_reward_inside_every_stream_is_the_same_mixture_with_more_kl():
    weights = vector(0.3, 0.6)
    streams = torch.randn(7, 3, dtype=torch.float64)
    inside = streams[:, :2] + streams[:, 2:]
    code = (2 - weights.sum()) * inside.sum(-1) - inside @ weights
    ours = stream_coefficients(-weights, ["le", "le"], "all")
    more_kl = torch.cat([ours[:2], ours[:2].sum(0, keepdim=True)])
    torch.testing.assert_close(mix_advantages(streams, more_kl), code)


@pytest.mark.parametrize("objective", ["kl", "single", "ppo_lag"])
def test_an_upper_bound_is_a_lower_bound_on_the_negated_reward(objective):
    raw = vector(0.6, -0.9)
    streams = torch.randn(6, 3 + (objective != "kl"), dtype=torch.float64)
    place = 0 if objective == "kl" else 1
    flipped = streams.clone()
    flipped[:, place] *= -1
    lower = stream_coefficients(multiplier_weights(raw, ["ge", "ge"]), ["ge", "ge"], objective)
    upper = stream_coefficients(multiplier_weights(raw, ["le", "ge"]), ["le", "ge"], objective)
    torch.testing.assert_close(mix_advantages(flipped, lower), mix_advantages(streams, upper))
    returns, theta = vector(0.3, 0.2), vector(0.7, 0.9)
    torch.testing.assert_close(
        multiplier_loss(multiplier_weights(raw, ["le", "ge"]), returns, theta),
        multiplier_loss(multiplier_weights(raw, ["ge", "ge"]), returns * vector(-1, 1), theta * vector(-1, 1)),
    )


def test_effective_multipliers_and_their_limits():
    kinds = ["ge", "ge"]
    start = multiplier_weights(torch.zeros(2, dtype=torch.float64), kinds)
    assert effective_multipliers(start, kinds).tolist() == [0.5, 0.5]  # 1 / N
    four = multiplier_weights(torch.zeros(4, dtype=torch.float64), ["ge"] * 4)
    assert effective_multipliers(four, ["ge"] * 4).tolist() == [0.25] * 4
    assert float(effective_multipliers(vector(1 - 1e-9), ["ge"])) > 1e8
    assert float(effective_multipliers(vector(1.0, 0.0), kinds)[0]) == 1.0
    equal = ["eq", "eq"]
    assert effective_multipliers(vector(-1.0, 0.0), equal).tolist() == pytest.approx([-1 / 3, 0.0])
    assert float(effective_multipliers(vector(-1.0, 1.0), equal)[0]) == pytest.approx(-0.5)
    assert effective_multipliers(vector(0.3, -7.0), equal, bounded=False).tolist() == [0.3, -7.0]
    # flipping the reward flips the multiplier, near the limit as well
    torch.testing.assert_close(effective_multipliers(vector(-0.9), ["le"]), -effective_multipliers(vector(0.9), ["ge"]))
    assert float(objective_weight(vector(-0.9, 0.5), ["le", "ge"])) == pytest.approx(0.6)
    mu = reward_unit_multipliers(vector(0.5, 0.5), vector(2.0)[0], vector(4.0, 0.5), epsilon=0.0)
    assert mu.tolist() == [0.25, 2.0]


def test_fixed_weights_are_bounded_multipliers():
    alpha = vector(0.75, 0.25, 0.5)
    weights = weights_of_fixed(alpha)
    torch.testing.assert_close(effective_multipliers(weights, ["ge"] * 3), alpha)
    mixture = stream_coefficients(weights, ["ge"] * 3)
    torch.testing.assert_close(mixture, 3 / (1 + alpha.sum()) * fixed_coefficients(alpha))


def test_leading_dimensions_are_independent():
    raw = torch.randn(4, 2, dtype=torch.float64)
    kinds = ["ge", "eq"]
    weights = multiplier_weights(raw, kinds)
    for objective in ("kl", "all", "single", "ppo_lag"):
        rows = torch.stack([stream_coefficients(row, kinds, objective) for row in weights])
        torch.testing.assert_close(stream_coefficients(weights, kinds, objective), rows)
    torch.testing.assert_close(effective_multipliers(weights, kinds)[1], effective_multipliers(weights[1], kinds))


def test_mixing_keeps_the_streams_precision():
    mixed = mix_advantages(torch.ones(2, 5, 3), vector(0.1, 0.2, 0.3))
    assert mixed.dtype == torch.float32
    assert mixed.shape == (2, 5)


@pytest.mark.parametrize("form", ["projected", "free"])
def test_projection_leaves_the_gradient_alive(form):
    raw = project_raw(vector(-0.5, 0.5), ["ge", "le"], form).requires_grad_()
    assert raw.tolist() == [0.0, 0.5]
    loss = multiplier_loss(multiplier_weights(raw, ["ge", "le"], form), vector(0.0, 0.0), vector(1.0, 1.0))
    (gradient,) = torch.autograd.grad(loss, raw)
    assert gradient.tolist() == [-1.0, 1.0]


def test_projection_of_the_other_forms():
    assert project_raw(vector(9.0, -9.0), ["ge", "eq"], "bounded", lambda_clip=5.0).tolist() == [5.0, -5.0]
    assert project_raw(vector(9.0), ["eq"], "bounded").tolist() == [9.0]
    for form in ("softplus", "exp", "projected"):
        raw = project_raw(vector(50.0), ["ge"], form, lambda_max=5.0)
        assert multiplier_weights(raw, ["ge"], form).tolist() == pytest.approx([5.0])
    assert project_raw(vector(-9.0), ["eq"], "free", lambda_max=5.0).tolist() == [-5.0]


@pytest.mark.parametrize(
    ("kinds", "form", "message"),
    [
        ([], "bounded", "at least one constraint"),
        (["ge"], "sigmoid", "multiplier.parameterisation"),
        (["gt"], "bounded", "kind must be ge, le or eq"),
        (["ge", "eq"], "projected", "use bounded or free"),
        (["eq"], "exp", "cannot turn negative"),
        (["eq"], "softplus", "cannot turn negative"),
    ],
)
def test_bad_constraints_are_named(kinds, form, message):
    with pytest.raises(ValueError, match=message):
        check_constraints(kinds, form)
    if kinds:
        with pytest.raises(ValueError, match=message):
            multiplier_weights(torch.zeros(len(kinds)), kinds, form)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("max", {}, "objective"),
        ("kl", {"rewards": 1}, "one weight and one reward"),
        ("kl", {"rewards": 3}, "one weight and one reward"),
        ("kl", {"rewards": 2, "constrained": [0, 2]}, "indices below 2"),
        ("kl", {"rewards": 2, "constrained": [1, 1]}, "one weight and one reward"),
        ("single", {"maximise": 3}, "one weight and one reward"),
        ("single", {"maximise": 0, "constrained": [0, 1]}, "no constraint on the maximised reward"),
    ],
)
def test_bad_mixtures_are_named(objective, options, message):
    with pytest.raises(ValueError, match=message):
        stream_coefficients(vector(0.1, 0.2), ["ge", "ge"], objective, **options)
