"""The projection on two balls against sequential quadratic programming, and on boxes against a clamp in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modules.control.perturbation import PerturbationSet, PerturbationSettings, project_two_balls

optimize = pytest.importorskip("scipy.optimize", reason="needs scipy: pip install 'plumbline[games]'")


def nearest(wish: np.ndarray, centre: np.ndarray, eps: float, reach: float) -> np.ndarray:
    """SLSQP's answer, from several starts: the best feasible one."""
    rules = [
        {"type": "ineq", "fun": lambda x: eps**2 - x @ x, "jac": lambda x: -2 * x},
        {"type": "ineq", "fun": lambda x: reach**2 - (x - centre) @ (x - centre), "jac": lambda x: -2 * (x - centre)},
    ]
    best, least = None, np.inf
    for start in (centre, centre * 0.9, wish):
        found = optimize.minimize(
            lambda x: (x - wish) @ (x - wish),
            start,
            jac=lambda x: 2 * (x - wish),
            constraints=rules,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        x = found.x
        feasible = np.linalg.norm(x) <= eps + 1e-8 and np.linalg.norm(x - centre) <= reach + 1e-8
        if feasible and found.fun < least:
            best, least = x, found.fun
    assert best is not None
    return best


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_two_balls_against_slsqp(size: int) -> None:
    """To 1e-6, in all four cases: inside, one ball binds, the other, both."""
    rng = np.random.default_rng(size)
    kinds = {"inside": 0, "first": 0, "second": 0, "both": 0}
    for _ in range(60):
        eps, reach = rng.uniform(0.2, 2.0), rng.uniform(0.05, 1.5)
        centre = rng.normal(size=size)
        centre *= eps * rng.uniform(0.3, 1.0) / np.linalg.norm(centre)
        wish = centre + rng.normal(size=size) * rng.choice([0.1, 1.0, 3.0])
        expected = nearest(wish, centre, eps, reach)
        answer = project_two_balls(
            torch.tensor(wish), torch.tensor([eps]), torch.tensor(centre), torch.tensor([reach])
        ).numpy()
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-6)
        # float32 rounding of eps and reach moves an end by 1e-7
        on_first = abs(np.linalg.norm(answer) - eps) < 1e-6
        on_second = abs(np.linalg.norm(answer - centre) - reach) < 1e-6
        kind = {(False, False): "inside", (True, False): "first", (False, True): "second", (True, True): "both"}
        kinds[kind[bool(on_first), bool(on_second)]] += 1
    needed = ("first", "second") if size == 1 else ("inside", "first", "second", "both")
    assert all(kinds[name] > 0 for name in needed), kinds


def test_two_balls_on_their_axis() -> None:
    """Points on the line through both centres, where the circle of the corner has no nearest point."""
    eps, reach, centre = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.8, 0.0, 0.0]).double()
    wish = torch.tensor([[5.0, 0, 0], [-5.0, 0, 0], [0.8, 0, 0], [0.0, 0, 0]]).double()
    answer = project_two_balls(wish, eps, centre.expand(4, 3), reach)
    expected = torch.tensor([[1.0, 0, 0], [0.3, 0, 0], [0.8, 0, 0], [0.3, 0, 0]]).double()
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-7)


def test_rounding_stays_inside_the_first_ball() -> None:
    """A perturbation a rounding error too long would forbid the point opposite to it, and points around that."""
    generator = torch.Generator().manual_seed(0)
    for eps in (0.1, 0.7, 3.0):
        radius, reach = torch.tensor([eps]), torch.tensor([2 * eps])
        wish = torch.randn(20_000, 3, generator=generator) * 3 * eps
        p = project_two_balls(wish, radius, torch.zeros(20_000, 3), reach)
        assert (p.double().norm(dim=-1, keepdim=True) <= radius.double()).all()
        tilted = -wish + 1e-3 * torch.randn(20_000, 3, generator=generator) * eps
        opposite = project_two_balls(tilted, radius, p, reach)
        expected = tilted * (eps / tilted.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        torch.testing.assert_close(opposite, expected, rtol=0, atol=1e-6 * eps)


def test_concentric_balls_leave_the_smaller() -> None:
    wish = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    for eps, reach, least in ((1.0, 0.5, 0.5), (0.5, 1.0, 0.5), (0.7, 0.7, 0.7)):
        answer = project_two_balls(wish, torch.tensor([eps]), torch.zeros(2, 2), torch.tensor([reach]))
        torch.testing.assert_close(answer, torch.tensor([[0.6 * least, 0.8 * least], [0.1, 0.0]]))


def test_alternating_projection_is_not_the_projection() -> None:
    """The set needs its closed form: projecting on one ball and then on the other misses the nearest point."""
    settings = PerturbationSettings("state", "2", 1.0, 0.6)
    budget = PerturbationSet(settings, 2)
    previous = torch.tensor([[0.8, 0.5]]).double()
    previous = previous / previous.norm() * 0.9
    wish = torch.tensor([[3.0, -1.0]]).double()
    answer = budget.project(wish, previous)[0].numpy()
    np.testing.assert_allclose(answer, nearest(wish[0].numpy(), previous[0].numpy(), 1.0, 0.6), rtol=0, atol=1e-6)
    onto = wish / wish.norm()
    offset = onto - previous
    onto = (previous + offset / offset.norm().clamp_min(0.6) * 0.6)[0].numpy()
    assert np.linalg.norm(onto - wish[0].numpy()) > np.linalg.norm(answer - wish[0].numpy()) + 1e-3


def test_boxes_against_numpy() -> None:
    rng = np.random.default_rng(0)
    eps, eps_bar = [0.5, 0.1, 1.0], [0.05, 0.15, 0.0]
    budget = PerturbationSet(PerturbationSettings("state", "inf", eps, eps_bar), 3)
    previous = np.zeros((8, 3), np.float32)
    e, b = np.float32(eps), np.float32(eps_bar)
    for step in range(200):
        fresh, wish = rng.random(8) < 0.1, rng.normal(size=(8, 3)).astype(np.float32)
        fresh |= step == 0
        low = np.where(fresh[:, None], -e, np.maximum(-e, previous - b))
        high = np.where(fresh[:, None], e, np.minimum(e, previous + b))
        expected = np.clip(wish, low, high)
        p = budget.project(torch.tensor(wish), torch.tensor(previous), torch.tensor(fresh)).numpy()
        np.testing.assert_array_equal(p, expected)
        previous = p
