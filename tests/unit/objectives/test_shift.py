"""Objectives over groups: what they reduce to, their derivatives, and group weights that stay weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from modules.objectives.shift import ShiftObjective, cvar, dro, erm, exp_weights, irm, irm_slopes, rex

LOSSES = torch.tensor([0.7, 0.2, 1.5, 0.9])
numbers = st.lists(st.floats(0.0, 5.0, width=32), min_size=1, max_size=6)


def weights(seed: int, groups: int) -> Tensor:
    return torch.rand(groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


@pytest.mark.parametrize("loss", [0.0, 0.3, 7.0])
def test_with_one_group_everything_is_the_mean(loss):
    one, q = torch.tensor([loss]), torch.ones(1)
    for value in (dro(one, q), cvar(one, 0.4), rex(one, 3.0), irm(one, torch.zeros(1), 2.0)):
        assert value == erm(one) == one[0]


def test_limits_equal_the_mean_and_the_maximum():
    assert torch.equal(rex(LOSSES, 0.0), erm(LOSSES))
    assert cvar(LOSSES, 1.0) == pytest.approx(float(erm(LOSSES)), rel=1e-6)
    assert irm(LOSSES, torch.ones(4), 0.0) == erm(LOSSES)
    assert dro(LOSSES, torch.full((4,), 0.25)) == pytest.approx(float(LOSSES.mean()))
    assert cvar(LOSSES, 0.25) == cvar(LOSSES, 0.01) == LOSSES.max()
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert cvar(LOSSES, 1.0, shares) == pytest.approx(float(erm(LOSSES, shares)), rel=1e-6)


def test_cvar_takes_a_part_of_the_group_on_the_border():
    """The worst 60 % of four equal groups: 1.5 and 0.9 whole, and 10 of 25 % of 0.7."""
    assert cvar(LOSSES, 0.6) == pytest.approx((0.25 * 1.5 + 0.25 * 0.9 + 0.1 * 0.7) / 0.6)
    losses = LOSSES.clone().requires_grad_()
    cvar(losses, 0.6).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([0.1 / 0.6, 0.0, 0.25 / 0.6, 0.25 / 0.6])


@settings(deadline=None)
@given(losses=numbers, alpha=st.floats(0.05, 1.0))
def test_cvar_is_the_minimum_over_thresholds(losses, alpha):
    """Rockafellar and Uryasev: ``min_t t + E max(loss - t, 0) / alpha``, reached at one of the losses."""
    values = torch.tensor(losses, dtype=torch.float64)
    least = min(float(t + (values - t).clamp_min(0).mean() / alpha) for t in values)
    assert float(cvar(values, alpha)) == pytest.approx(least, abs=1e-9)


def test_rex_adds_the_population_variance():
    assert rex(LOSSES, 2.0) == pytest.approx(float(LOSSES.mean() + 2.0 * ((LOSSES - LOSSES.mean()) ** 2).mean()))


def test_irm_penalty_vanishes_where_every_group_has_its_optimum_scale_at_one():
    """Squared loss of outputs that are each group's least-squares fit by scale; off it the slope is 2 (w a - b) a."""
    output, target = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[2.0, 1.5], [3.0, -1.0]])
    assert torch.equal((output * output).sum(1), (output * target).sum(1))  # so that the best scale is 1

    def losses(scale: Tensor, gain: Tensor) -> Tensor:
        return (scale.unsqueeze(1) * gain * output - target).square().mean(1)

    gain = torch.tensor(1.0, requires_grad=True)
    slopes = irm_slopes(lambda scale: losses(scale, gain), 2, output)
    assert slopes.tolist() == [0.0, 0.0]
    assert irm(losses(torch.ones(2), gain), slopes, 9.0) == erm(losses(torch.ones(2), gain))
    gain = torch.tensor(2.0, requires_grad=True)
    slopes = irm_slopes(lambda scale: losses(scale, gain), 2, output)
    squares = output.square().mean(1)
    assert slopes.tolist() == pytest.approx((2 * 2.0 * (2.0 - 1.0) * squares).tolist())  # d/ds (2 s - 1)^2 square
    slopes.square().mean().backward()
    # the slope is 2 g (g - 1) square, so that the mean of squares has the derivative 8 g (g - 1) (2 g - 1) square^2
    assert gain.grad is not None
    assert float(gain.grad) == pytest.approx(float((8 * 2 * 1 * 3 * squares.square()).mean()))


@settings(deadline=None)
@given(losses=numbers, eta=st.floats(0.0, 50.0), seed=st.integers(0, 99), share=st.floats(0.0, 1.0))
def test_exp_weights_stay_weights_above_the_floor(losses, eta, seed, share):
    worth = torch.tensor(losses)
    groups = len(losses)
    floor = share / groups
    old = weights(seed, groups)
    new = exp_weights(old, worth, eta, floor)
    assert new.dtype == old.dtype
    assert float(new.sum()) == pytest.approx(1.0, abs=1e-9)
    if bool((worth != worth[0]).any()):
        assert (new >= floor).all()
    off = new > floor * (1 + 1e-9)  # off the floor the odds are those of the exponentials
    odds = old.log() + eta * worth.double() - new.log()
    assert off.sum() < 2 or float(odds[off].max() - odds[off].min()) < 1e-6
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(exp_weights(old[order], worth[order], eta, floor), new[order], atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 99), groups=st.integers(1, 6), loss=st.floats(-1e3, 1e3), eta=st.floats(0.0, 10.0))
def test_equal_losses_move_no_bit(seed, groups, loss, eta):
    q = weights(seed, groups)
    for floor in (0.0, float(q.min())):
        assert torch.equal(exp_weights(q, torch.full((groups,), loss), eta, floor), q)


def test_exp_weights_in_numbers_and_at_extremes():
    q = torch.tensor([0.5, 0.5])
    raised = exp_weights(q, torch.tensor([1.0, 0.0]), 2.0)
    assert raised[0] / raised[1] == pytest.approx(torch.tensor(2.0).exp().item())
    assert exp_weights(q, torch.tensor([1e6, 0.0]), 1.0).tolist() == [1.0, 0.0]  # no overflow
    assert exp_weights(q, torch.tensor([1e6, 0.0]), 1.0, floor=0.1).tolist() == pytest.approx([0.9, 0.1])
    assert exp_weights(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0]), 1.0).tolist() == [1.0, 0.0]
    for options in ({"eta": -1.0}, {"eta": 1.0, "floor": 0.6}, {"eta": float("nan")}):
        with pytest.raises(ValueError, match="want eta >= 0 and floor in"):
            exp_weights(q, torch.ones(2), **options)


def test_identical_groups_keep_uniform_weights():
    objective = ShiftObjective("dro", groups=4, eta=0.5)
    for step in range(20):
        assert objective(torch.full((4,), 1.0 / (step + 1))) == pytest.approx(1.0 / (step + 1))
    assert objective.q.tolist() == [0.25] * 4


def test_dro_moves_to_the_worst_group_and_only_in_training():
    objective = ShiftObjective("dro", groups=4, eta=1.0, floor=0.05)
    q = objective.q.clone()
    assert objective(LOSSES) == pytest.approx(float(exp_weights(q, LOSSES, 1.0, 0.05).float() @ LOSSES))
    for _ in range(40):
        value = objective(LOSSES)
    assert objective.q.tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])
    objective.eval()
    assert objective(torch.tensor([9.0, 0.0, 0.0, 0.0])) == pytest.approx(0.45)
    assert objective.q.argmax() == 2
    assert float(value) > float(LOSSES.mean())
    other = ShiftObjective("dro", groups=4)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.q, objective.q)


@pytest.mark.parametrize("kind", ["erm", "dro", "cvar", "rex", "irm"])
def test_the_objective_equals_its_function_and_passes_gradients(kind):
    shares = [0.4, 0.3, 0.2, 0.1]
    settings = {"groups": 4, "eta": 0.3, "floor": 0.01, "alpha": 0.3, "beta": 2.0, "penalty": 3.0, "shares": shares}
    objective = ShiftObjective(kind, **settings)
    assert objective.settings() == {"kind": kind, **settings}
    mass, slopes = torch.tensor(shares), torch.tensor([0.1, -0.2, 0.0, 0.4])
    assert objective.needs_slopes == (kind == "irm")
    losses = LOSSES.clone().requires_grad_()
    found = objective(losses, slopes)
    want = {
        "erm": lambda: erm(LOSSES, mass),
        "dro": lambda: dro(LOSSES, exp_weights(torch.full((4,), 0.25), LOSSES, 0.3, 0.01)),
        "cvar": lambda: cvar(LOSSES, 0.3, mass),
        "rex": lambda: rex(LOSSES, 2.0, mass),
        "irm": lambda: irm(LOSSES, slopes, 3.0, mass),
    }[kind]()
    assert float(found.detach()) == pytest.approx(float(want))
    found.backward()
    assert losses.grad is not None
    assert int(losses.grad.argmax()) == (0 if kind in ("erm", "irm") else 2)


def test_dro_learns_for_the_rare_group_where_the_mean_does_not():
    """Two groups that want opposite signs of one weight: ERM serves the large one, DRO makes their losses equal."""
    want = torch.tensor([1.0, -1.0])

    def trained(objective: ShiftObjective) -> Tensor:
        weight = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            objective(softplus(-want * weight)).backward()
            optimizer.step()
        return softplus(-want * weight).detach()

    mean = trained(ShiftObjective("erm", groups=2, shares=[0.9, 0.1]))
    robust = trained(ShiftObjective("dro", groups=2, eta=0.5))
    assert mean[1] > 1.5
    assert robust.max() < 0.75
    assert float(robust.max() - robust.min()) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mean"}, "kind must be one of erm, dro"),
        ({"groups": 0}, "groups must be >= 1"),
        ({"eta": -1.0}, "eta must be >= 0"),
        ({"groups": 2, "floor": 0.6}, "floor must be at most"),
        ({"alpha": 0.0}, "alpha must be in"),
        ({"groups": 2, "shares": [0.5, 0.6]}, "shares must be 2 numbers"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ShiftObjective(**settings)


def test_losses_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"losses must be \[3\]"):
        ShiftObjective(groups=3)(LOSSES)
    with pytest.raises(ValueError, match="irm needs slopes"):
        ShiftObjective("irm", groups=4)(LOSSES)
    with pytest.raises(ValueError, match=r"losses must be \[G\]"):
        erm(LOSSES.reshape(2, 2))
    with pytest.raises(ValueError, match=r"q must be \[4\]"):
        exp_weights(torch.ones(3), LOSSES, 1.0)
    with pytest.raises(ValueError, match="alpha, the worst share"):
        cvar(LOSSES, 1.5)
