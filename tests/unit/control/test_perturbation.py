"""Perturbation sets: feasible sequences with resets, limits of the budgets, settings that are refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.control.perturbation import PerturbationSet, PerturbationSettings

NORMS = st.sampled_from(["inf", "2"])
FIRST = st.sampled_from(["free", "zero"])
BUDGETS = st.floats(0.0, 4.0, allow_nan=False)
SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None)


def make(size: int, eps, eps_bar, norm: str = "inf", first: str = "free", coupled: bool = True) -> PerturbationSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PerturbationSet(PerturbationSettings("state", norm, eps, eps_bar, coupled, first), size)


def wishes(seed: int, steps: int, rows: int, size: int, reach: float) -> tuple[Tensor, Tensor]:
    """What an attacker would like ``[steps, rows, size]``, and where episodes begin ``[steps, rows]``."""
    generator = torch.Generator().manual_seed(seed)
    wish = torch.randn(steps, rows, size, generator=generator) * reach
    fresh = torch.rand(steps, rows, generator=generator) < 0.2
    fresh[0] = True
    return wish, fresh


def length(p: Tensor, norm: str) -> Tensor:
    return p.abs().amax(-1) if norm == "inf" else p.norm(dim=-1)


@quick
@given(seed=SEEDS, size=st.integers(1, 6), norm=NORMS, first=FIRST, eps=BUDGETS, eps_bar=BUDGETS)
def test_a_projected_sequence_keeps_both_budgets_across_resets(
    seed: int, size: int, norm: str, first: str, eps: float, eps_bar: float
) -> None:
    budget = make(size, eps, eps_bar, norm, first)
    wish, fresh = wishes(seed, 25, 4, size, 3 * eps + eps_bar)
    p = torch.full((4, size), 7.0)  # what an episode before left must not matter
    for step in range(25):
        before, p = p, budget.project(wish[step], p, fresh[step])
        assert (length(p, norm) <= eps + 1e-6 * (1 + eps)).all()
        held = length(p - before, norm) <= eps_bar + 1e-6 * (1 + eps)
        start = length(p, norm) <= eps_bar + 1e-6 * (1 + eps) if first == "zero" else torch.ones(4, dtype=torch.bool)
        assert torch.where(fresh[step], start, held).all()
        over, leap = budget.excess(p, before, fresh[step])
        assert over.max() <= budget.tolerance
        assert leap.max() <= budget.tolerance
        again = budget.project(p, before, fresh[step])
        torch.testing.assert_close(again, p, rtol=0, atol=0 if norm == "inf" else 1e-6 * (1 + eps))


@quick
@given(seed=SEEDS, size=st.integers(1, 6), norm=NORMS, first=FIRST, eps=BUDGETS, eps_bar=BUDGETS)
def test_no_feasible_point_is_nearer_than_the_projection(
    seed: int, size: int, norm: str, first: str, eps: float, eps_bar: float
) -> None:
    """The variational inequality of projections on convex sets: ``(wish - p) . (other - p) <= 0``."""
    budget = make(size, eps, eps_bar, norm, first)
    wish, fresh = wishes(seed, 2, 64, size, 2 * eps + eps_bar)
    previous = budget.project(wish[0], torch.zeros(64, size), torch.zeros(64, dtype=torch.bool)).double()
    wish, fresh = wish[1].double(), fresh[1]
    p = budget.project(wish, previous, fresh)
    generator = torch.Generator().manual_seed(seed + 1)
    tried = 0
    for reach in (0.01, 0.3, 1.0):
        others = previous + torch.randn(40, 64, size, generator=generator).double() * reach * (eps + eps_bar)
        over, leap = budget.excess(others, previous, fresh)
        feasible = (over == 0) & (leap == 0)
        tried += int(feasible.sum())
        gain = ((wish - p) * (others - p)).sum(-1)
        assert (gain[feasible] <= 1e-6 * (1 + eps + eps_bar) ** 2).all()
    if eps > 0.1 and eps_bar > 0.1 and size <= 3:
        assert tried > 0


@quick
@given(seed=SEEDS, size=st.integers(1, 6), first=FIRST, eps=st.floats(1e-3, 4.0), times=st.floats(2.0, 5.0))
def test_a_change_of_twice_eps_is_the_uncoupled_set_bitwise(
    seed: int, size: int, first: str, eps: float, times: float
) -> None:
    bounds = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) * eps).tolist()
    coupled = make(size, bounds, [times * bound for bound in bounds], first=first)
    free = make(size, bounds, [0.0] * size, coupled=False)
    wish, fresh = wishes(seed, 30, 4, size, 2 * eps)
    p = torch.zeros(4, size)
    for step in range(30):
        p = coupled.project(wish[step], p, fresh[step])
        clamped = torch.minimum(torch.maximum(wish[step], -free.eps), free.eps)
        assert torch.equal(p, clamped)
        assert torch.equal(p, free.project(wish[step], p, fresh[step]))


@quick
@given(seed=SEEDS, size=st.integers(2, 6), eps=st.floats(0.01, 4.0), times=st.floats(2.0, 5.0))
def test_a_change_of_twice_eps_is_the_uncoupled_ball(seed: int, size: int, eps: float, times: float) -> None:
    coupled, free = make(size, eps, times * eps, "2"), make(size, eps, 0.0, "2", coupled=False)
    wish, fresh = wishes(seed, 20, 4, size, 2 * eps)
    p = torch.zeros(4, size)
    for step in range(20):
        p = coupled.project(wish[step], p, fresh[step])
        torch.testing.assert_close(p, free.project(wish[step], p), rtol=0, atol=2e-6 * eps)


@quick
@given(seed=SEEDS, size=st.integers(1, 6), norm=NORMS, first=FIRST, eps=st.floats(0.01, 4.0))
def test_without_a_temporal_budget_an_episode_has_one_bias(
    seed: int, size: int, norm: str, first: str, eps: float
) -> None:
    budget = make(size, eps, 0.0, norm, first)
    wish, fresh = wishes(seed, 40, 4, size, 2 * eps)
    p, bias = torch.zeros(4, size), torch.zeros(4, size)
    for step in range(40):
        p = budget.project(wish[step], p, fresh[step])
        bias = torch.where(fresh[step].unsqueeze(-1), p, bias)
        torch.testing.assert_close(p, bias, rtol=0, atol=0 if norm == "inf" else 1e-6 * eps)
        if first == "zero":
            assert (p == 0).all()
    if first == "free":
        assert (p != 0).any()


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("coupled", [False, True])
def test_no_budget_is_no_perturbation(norm: str, coupled: bool) -> None:
    budget = make(3, 0.0, 0.5, norm, coupled=coupled)
    wish, fresh = wishes(0, 10, 5, 3, 1.0)
    p = torch.zeros(5, 3)
    for step in range(10):
        p = budget.project(wish[step], p, fresh[step])
        assert (p == 0).all()
    assert budget.empty
    assert not make(3, 0.1, 0.5, norm).empty


def test_every_coordinate_has_its_own_bounds() -> None:
    budget = make(3, [1.0, 0.5, 0.0], [0.1, 2.0, 1.0])
    previous = torch.tensor([[0.95, -0.5, 0.0], [0.2, 0.1, 0.0]])
    high = budget.project(torch.full((2, 3), 9.0), previous)
    low = budget.project(torch.full((2, 3), -9.0), previous)
    torch.testing.assert_close(high, torch.tensor([[1.0, 0.5, 0.0], [0.3, 0.5, 0.0]]))
    torch.testing.assert_close(low, torch.tensor([[0.85, -0.5, 0.0], [0.1, -0.5, 0.0]]))
    least, greatest = budget.bounds(previous)
    assert torch.equal(least, low)
    assert torch.equal(greatest, high)


@pytest.mark.parametrize(("first", "most"), [("free", 1.0), ("zero", 0.1)])
def test_the_first_step_of_an_episode(first: str, most: float) -> None:
    budget = make(2, 1.0, 0.1, first=first)
    previous = torch.full((2, 2), 0.8)
    p = budget.project(torch.full((2, 2), -9.0), previous, torch.tensor([True, False]))
    torch.testing.assert_close(p, torch.tensor([[-most, -most], [0.7, 0.7]]))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_excess_measures_by_how_much_a_budget_is_broken(norm: str) -> None:
    budget = make(2, 0.5, 0.1, norm)
    previous = torch.tensor([[0.3, 0.0], [0.3, 0.0], [0.3, 0.0]])
    p = torch.tensor([[0.75, 0.0], [0.35, 0.0], [0.1, 0.0]])
    over, leap = budget.excess(p, previous)
    torch.testing.assert_close(over, torch.tensor([0.25, 0.0, 0.0]))
    torch.testing.assert_close(leap, torch.tensor([0.35, 0.0, 0.1]))
    leap = budget.excess(p, previous, torch.tensor([True, True, True]))[1]
    torch.testing.assert_close(leap, torch.tensor([0.25, 0.0, 0.0]))  # a free first step is bounded by eps alone


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_projection_is_differentiable(norm: str) -> None:
    budget = make(3, 0.5, 0.2, norm)
    generator = torch.Generator().manual_seed(3)
    previous = budget.project(torch.randn(40, 3, generator=generator), torch.zeros(40, 3), torch.ones(40) > 0).double()
    p = torch.randn(40, 3, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: budget.project(x, previous), (p,), atol=1e-5)
    inside = (previous * 0.9).requires_grad_()
    (slope,) = torch.autograd.grad(budget.project(inside, previous).sum(), inside)
    torch.testing.assert_close(slope, torch.ones_like(slope))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eps": -0.1}, "eps: budget must be >= 0"),
        ({"eps": math.nan}, "eps: budget must be >= 0"),
        ({"eps": math.inf}, "eps: budget must be >= 0"),
        ({"eps_bar": -0.1}, "eps_bar: temporal budget must be >= 0"),
        ({"eps_bar": math.nan}, "eps_bar: temporal budget must be >= 0"),
        ({"eps": [0.1, -0.2]}, r"eps: budget must be >= 0 and finite, got -0\.2"),
        ({"eps": [0.1, 0.2], "norm": "2"}, "eps: a list needs norm inf"),
        ({"eps_bar": []}, "eps_bar: a list needs norm inf and an entry"),
        ({"norm": "1"}, "norm: one of inf, 2, got '1'"),
        ({"space": "reward"}, "space: one of state, action, params"),
        ({"first_step": "any"}, "first_step: one of free, zero"),
    ],
)
def test_settings_that_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PerturbationSettings(**changes)


@pytest.mark.parametrize("field", ["eps", "eps_bar"])
def test_a_list_of_another_length_names_both(field: str) -> None:
    chosen = PerturbationSettings(**{"eps": 0.1, "eps_bar": 0.01, field: [0.1, 0.1]})
    with pytest.raises(ValueError, match=f"{field}: has 2 entries, a perturbation of state has 3 here"):
        PerturbationSet(chosen, 3)


def test_vacuous_coupling_is_said() -> None:
    with pytest.warns(UserWarning, match="coupling is vacuous"):
        PerturbationSettings(eps=0.1, eps_bar=0.2)
    with pytest.warns(UserWarning, match="coupling is vacuous"):
        PerturbationSettings(eps=[0.1, 0.2], eps_bar=[0.2, 0.5])
    # warnings are errors here: these must be silent
    PerturbationSettings(eps=0.1, eps_bar=0.2, coupled=False)
    PerturbationSettings(eps=0.1, eps_bar=0.19)
    PerturbationSettings(eps=0.0, eps_bar=0.1)
    PerturbationSettings(eps=[0.1, 0.2], eps_bar=[0.05, 0.5])  # binds in the first coordinate


def test_the_fingerprint_tells_budgets_apart() -> None:
    base = PerturbationSettings()
    assert base.fingerprint() == PerturbationSettings().fingerprint()
    for change in ({"eps": 0.2}, {"eps_bar": 0.03}, {"norm": "2"}, {"space": "action"}, {"coupled": False}):
        assert PerturbationSettings(**change).fingerprint() != base.fingerprint()
