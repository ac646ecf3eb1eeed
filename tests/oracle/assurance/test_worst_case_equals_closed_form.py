"""Attacks on linear models, whose worst case is known, and what every attack promises of any model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import softplus

from modules.objectives.adversarial import eps_curve, fgsm, linear_worst_margin, pgd, random_search

ROWS, SIZE = 64, 12


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, labels and the weights of a linear model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, SIZE, generator=generator)
    y = 2.0 * torch.randint(2, (ROWS,), generator=generator) - 1
    return x, y, torch.randn(SIZE, generator=generator)


def logit_loss(y: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: softplus(-y * (x @ weight + 0.3))


def bumpy(seed: int = 3) -> Callable[[Tensor], Tensor]:
    """A loss with many maxima, ``[B, SIZE] -> [B]``."""
    network = nn.Sequential(nn.Linear(SIZE, 32), nn.Tanh(), nn.Linear(32, 1))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 2.0 * torch.randn(parameter.shape, generator=generator)
    return lambda x: network(x).squeeze(-1).sin()


def size(p: Tensor, norm: str) -> Tensor:
    return p.abs().amax(-1) if norm == "inf" else p.norm(dim=-1)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("eps", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd_random"])
def test_worst_margin_of_a_linear_logit(attack, eps, norm):
    """``y f(x) - eps ||w||_1`` for Linf, ``eps ||w||_2`` for L2; one FGSM step is exact already."""
    x, y, weight = drawn()
    loss = logit_loss(y, weight)
    if attack == "fgsm":
        moved = fgsm(loss, x, eps, norm=norm)
    else:
        # from a random start, the angle to the worst point of a 2-norm ball halves (or better) with steps of eps
        random = {"steps": 40, "step_size": eps, "generator": seeded()} if attack == "pgd_random" else {}
        moved = pgd(loss, x, eps, norm=norm, **random)
    clean = y * (x @ weight + 0.3)
    exact = clean - eps * (weight.abs().sum() if norm == "inf" else weight.norm())
    assert torch.allclose(y * (moved @ weight + 0.3), exact, atol=1e-5 * max(1.0, 10 * eps))
    assert torch.allclose(linear_worst_margin(clean, weight, eps, norm), exact, atol=1e-5)
    assert (size(moved - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_worst_squared_loss_of_a_linear_model(eps):
    """``(|r| + eps ||w||_1)^2``."""
    x, y, weight = drawn(1)
    residual = x @ weight - y
    moved = pgd(lambda x: (x @ weight - y).square(), x, eps)
    exact = (residual.abs() + eps * weight.abs().sum()).square()
    assert torch.allclose((moved @ weight - y).square(), exact, rtol=1e-5)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_random_search_comes_near_the_linear_worst_case(norm):
    x, y, weight = drawn(2)
    moved = random_search(lambda x: -y * (x @ weight), x, 0.3, norm=norm, steps=1500, generator=seeded())
    gain = -y * ((moved - x) @ weight)
    most = 0.3 * (weight.abs().sum() if norm == "inf" else weight.norm())
    assert (gain <= most + 1e-5).all()
    assert gain.min() > 0.9 * most
    assert (size(moved - x, norm) <= 0.3 + 1e-5).all()


@pytest.mark.parametrize("attack", [fgsm, pgd, random_search])
def test_no_budget_leaves_samples_bit_for_bit(attack):
    x = drawn()[0]
    x[0, 0] = -0.0
    options = {} if attack is fgsm else {"generator": seeded()}
    moved = attack(bumpy(), x, 0.0, **options)
    assert torch.equal(moved.view(torch.int32), x.view(torch.int32))
    assert moved.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("attack", [pgd, random_search])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), eps=st.floats(0.01, 1.0))
def test_more_steps_and_restarts_never_find_less(attack, norm, seed, eps):
    """Exact, with shared noise, for every sample; and never less than the clean loss."""
    loss, x = bumpy(seed), drawn(seed)[0]

    def worst(steps: int, restarts: int) -> Tensor:
        moved = attack(
            loss, x, eps, norm=norm, steps=steps, step_size=eps / 3, restarts=restarts, generator=seeded(seed)
        )
        assert (size(moved - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
        return loss(moved).detach()

    found = {(steps, restarts): worst(steps, restarts) for steps in (1, 3, 8) for restarts in (1, 2, 4)}
    assert (found[1, 1] >= loss(x)).all()
    for steps, more in ((1, 3), (3, 8)):
        for restarts in (1, 2, 4):
            assert (found[more, restarts] >= found[steps, restarts]).all()
    for restarts, more in ((1, 2), (2, 4)):
        for steps in (1, 3, 8):
            assert (found[steps, more] >= found[steps, restarts]).all()
    assert (found[8, 4] > found[1, 1]).any()


@pytest.mark.parametrize("attack", [pgd, random_search])
def test_a_curve_over_budgets_never_falls(attack):
    loss, x = bumpy(), drawn()[0]
    budgets = [0.0, 0.05, 0.1, 0.1, 0.4, 1.0]
    losses, samples = eps_curve(loss, x, budgets, attack, steps=4, generator=seeded())
    assert losses.shape == (6, ROWS)
    assert samples.shape == (6, ROWS, SIZE)
    assert torch.equal(losses[0], loss(x).detach())
    assert (losses.diff(dim=0) >= 0).all()
    assert (losses[-1] > losses[1]).any()
    for eps, moved in zip(budgets, samples, strict=True):
        assert ((moved - x).abs() <= eps * (1 + 1e-5) + 1e-6).all()
    with pytest.raises(ValueError, match="must rise"):
        eps_curve(loss, x, [0.2, 0.1])


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("attack", [pgd, random_search])
def test_bounds_hold_exactly_and_leave_the_attack_its_strength(attack, norm):
    generator = seeded()
    x = torch.rand(ROWS, 3, 4, generator=generator)
    high = torch.full((3, 4), 0.8)
    x = torch.minimum(x, high)
    weight = torch.ones(3, 4)
    moved = attack(
        lambda x: (x * weight).sum((1, 2)), x, 0.3, norm=norm, steps=400, generator=generator, bounds=(0.0, high)
    )
    assert moved.shape == x.shape
    assert (moved >= 0).all()
    assert (moved <= high).all()
    assert (size((moved - x).flatten(1), norm) <= 0.3 + 1e-5).all()
    if norm == "inf" and attack is pgd:
        assert torch.allclose(moved, torch.minimum(x + 0.3, high))
    assert (moved.sum((1, 2)) > x.sum((1, 2)) + 0.1).all()


@pytest.mark.parametrize("attack", [pgd, random_search])
def test_gradients_and_the_global_generator_are_left_alone(attack):
    network = nn.Linear(SIZE, 1)
    network.weight.grad = torch.full_like(network.weight, 7.0)
    x = drawn()[0].requires_grad_()
    before = torch.get_rng_state()
    moved = attack(lambda x: network(x).squeeze(-1), x, 0.1, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.weight.grad, torch.full_like(network.weight, 7.0))
    assert network.bias.grad is None
    assert x.grad is None
    assert not moved.requires_grad


def test_attacks_work_inside_inference_mode():
    loss, x = bumpy(), drawn()[0]
    outside = pgd(loss, x, 0.2)
    with torch.inference_mode():
        inside = pgd(loss, x.clone(), 0.2)
    assert torch.equal(inside, outside)


def test_random_search_sees_through_a_masked_gradient():
    """A staircase has no gradient: PGD stays at the clean point, a search does not."""
    x, y, weight = drawn()
    steps = 20.0

    def stairs(x: Tensor) -> Tensor:
        return (-y * (x @ weight) * steps).floor() / steps + 0.0 * x.sum(-1)

    assert torch.equal(pgd(stairs, x, 0.3), x)
    assert (stairs(random_search(stairs, x, 0.3, generator=seeded())) > stairs(x)).all()


def test_a_model_that_breaks_under_attack_is_its_worst_case():
    x = torch.zeros(2, 1)
    moved = pgd(lambda x: torch.where(x > 0.05, torch.nan, x).squeeze(-1), x, 0.1, steps=3)
    assert (moved > 0.05).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0"),
        ({"eps": float("nan")}, "eps must be >= 0"),
        ({"norm": "1"}, "norm must be one of inf, 2"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"restarts": 2}, "2 restarts need a generator"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"bounds": (0.0, 1.0)}, "samples lie outside"),
        ({"start": torch.full((ROWS, SIZE), 9.0)}, "further than eps 0.1"),
        ({"start": torch.zeros(ROWS, 1)}, "start must be"),
        ({"loss": lambda x: x}, "one number a sample"),
        ({"loss": lambda x: x.detach().sum(-1)}, "use random_search"),
        ({"x": torch.zeros(4)}, r"x must be floating-point samples \[B"),
    ],
)
def test_what_cannot_be_attacked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(**{"loss": bumpy(), "x": drawn()[0], "eps": 0.1, **options})


def test_a_random_search_without_a_generator_is_refused():
    with pytest.raises(ValueError, match="random_search: all moves are random"):
        random_search(bumpy(), drawn()[0], 0.1)
