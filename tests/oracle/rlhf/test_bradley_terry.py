"""Preference learning against closed forms: logistic regression without intercept, and the loss's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from modules.objectives.preference import bradley_terry_loss


def test_loss_is_minus_log_sigmoid_and_stable():
    chosen, rejected = torch.tensor([1.0, 0.0, -300.0]), torch.tensor([0.0, 0.0, 300.0])
    want = torch.tensor([math.log1p(math.exp(-1.0)), math.log(2.0), 600.0])
    assert torch.allclose(bradley_terry_loss(chosen, rejected), want)
    margin = torch.full((3,), 0.5)
    assert torch.allclose(bradley_terry_loss(chosen, rejected, margin), bradley_terry_loss(chosen - 0.5, rejected))
    with pytest.raises(ValueError, match="shapes differ"):
        bradley_terry_loss(chosen, rejected[:2])


def test_gradient():
    chosen, rejected, margin = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(bradley_terry_loss, (chosen, rejected, margin))


def test_linear_reward_equals_logistic_regression_by_scipy():
    """Pairs drawn from a known linear reward: the fit by autograd is the maximum of the likelihood that scipy finds."""
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 400, 4))
    truth = np.array([1.5, -1.0, 0.5, 0.0])
    better = generator.random(400) < 1 / (1 + np.exp(-(first - second) @ truth))
    difference = np.where(better, 1, -1)[:, None] * (first - second)

    reference = minimize(lambda w: np.logaddexp(0, -difference @ w).sum(), np.zeros(4), tol=1e-12).x

    chosen = torch.from_numpy(np.where(better[:, None], first, second))
    rejected = torch.from_numpy(np.where(better[:, None], second, first))
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(chosen @ weights, rejected @ weights).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    np.testing.assert_allclose(weights.detach().numpy(), reference, atol=1e-5)
    np.testing.assert_allclose(reference, truth, atol=0.4)
