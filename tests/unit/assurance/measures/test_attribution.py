"""Integrated gradients and concentration: layouts, gradients' modes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from modules.assurance.measures.attribution import integrated_gradients, path_rule, saliency_concentration


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))


def test_chunks_change_nothing_and_bound_the_rows_of_a_call():
    net, x = _network().double(), torch.randn(5, 2, 3).double()
    seen: list[int] = []

    def function(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return net(rows)[:, 0]

    whole = integrated_gradients(function, x, steps=8)
    assert max(seen) == 40
    for chunk in (16, 3, 1):
        seen.clear()
        part = integrated_gradients(function, x, steps=8, chunk=chunk)
        assert max(seen) == chunk
        torch.testing.assert_close(part.values, whole.values)
        torch.testing.assert_close(part.residual, whole.residual, atol=1e-12, rtol=0)


def test_a_baseline_per_row_is_the_same_as_rows_alone():
    net, x, start = _network().double(), torch.randn(4, 6).double(), torch.randn(4, 6).double()
    together = integrated_gradients(lambda r: net(r)[:, 0], x, start).values
    for row in range(4):
        alone = integrated_gradients(lambda r: net(r)[:, 0], x[row : row + 1], start[row])
        torch.testing.assert_close(together[row], alone.values[0])


def test_a_feature_at_its_baseline_gets_nothing():
    net, x = _network(), torch.randn(3, 6)
    x[:, 2] = 0.5
    start = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    assert (integrated_gradients(lambda r: net(r)[:, 0], x, start).values[:, 2] == 0).all()


def test_it_works_without_gradients_around_it_and_leaves_none_behind():
    net, x = _network(), torch.randn(3, 6)
    free = integrated_gradients(lambda r: net(r)[:, 0], x)
    with torch.no_grad():
        torch.testing.assert_close(integrated_gradients(lambda r: net(r)[:, 0], x).values, free.values)
    with torch.inference_mode():
        made = x * 1.0
        torch.testing.assert_close(integrated_gradients(lambda r: net(r)[:, 0], made).values, free.values)
    assert all(p.grad is None for p in net.parameters())
    assert not free.values.requires_grad
    assert not free.residual.requires_grad
    assert not x.requires_grad


def test_scalars_are_features_too():
    found = integrated_gradients(lambda r: r**2, torch.tensor([1.0, 3.0]), 1.0)
    torch.testing.assert_close(found.values, torch.tensor([0.0, 8.0]))
    assert found.residual.abs().max() < 1e-5


@pytest.mark.parametrize(("rule", "least", "degree"), [("gauss_legendre", 1, 7), ("trapezoid", 2, 1)])
def test_rules_integrate_polynomials_of_their_degree(rule, least, degree):
    points, weights = path_rule(4, rule)
    for power in range(degree + 1):
        assert (weights * points**power).sum() == pytest.approx(1 / (power + 1))
    assert (weights * points ** (degree + 1)).sum() != pytest.approx(1 / (degree + 2), abs=1e-7)
    with pytest.raises(ValueError, match="needs rule"):
        path_rule(least - 1, rule)


@pytest.mark.parametrize(
    ("function", "inputs", "options", "message"),
    [
        (lambda r: r.sum(1), torch.ones(2, 3, dtype=torch.long), {}, "floating point"),
        (lambda r: r.sum(1), torch.zeros(0, 3), {}, "with values"),
        (lambda r: r.sum(1), torch.full((2, 3), math.nan), {}, "must be finite"),
        (lambda r: r.sum(1), torch.ones(2, 3), {"baseline": torch.zeros(2)}, "does not broadcast"),
        (lambda r: r.sum(1), torch.ones(2, 3), {"rule": "simpson"}, "needs rule"),
        (lambda r: r.sum(1), torch.ones(2, 3), {"chunk": 0}, "chunk: must be at least 1"),
        (lambda r: r, torch.ones(2, 3), {}, "one number a row"),
        (lambda r: r.sum(1).detach(), torch.ones(2, 3), {}, "carries no gradient"),
        (lambda r: torch.ones(len(r), requires_grad=True) * 2, torch.ones(2, 3), {}, "carries no gradient"),
        (lambda r: r.sum(1).log(), -torch.ones(2, 3), {}, "NaN or infinity between"),
    ],
)
def test_integrated_gradients_refuse(function, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        integrated_gradients(function, inputs, **options)


def test_concentration_by_hand():
    found = saliency_concentration(
        torch.tensor([[3.0, -1.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0], [0.0, 0.0, -2.0, 0.0]]), 1
    )
    assert found.top_share.tolist() == pytest.approx([0.75, 0.25, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found.entropy.tolist() == pytest.approx([entropy, 1.0, 0.0])


def test_concentration_is_nan_where_nothing_is_attributed():
    found = saliency_concentration(torch.tensor([[0.0, 0.0], [1e-300, 0.0], [1e300, 1e300]], dtype=torch.float64), 1)
    assert found.top_share.isnan().tolist() == found.entropy.isnan().tolist() == [True, False, False]
    assert found.top_share[1:].tolist() == [1.0, 0.5]
    assert saliency_concentration(torch.ones(1, 1), 1).entropy.isnan().all()


@pytest.mark.parametrize(
    ("attribution", "k", "message"),
    [
        (torch.ones(2, 3), 0, "k: must be in 1..3"),
        (torch.ones(2, 3), 4, "k: must be in 1..3"),
        (torch.ones(3), 1, r"must be \[N, features\]"),
        (torch.ones(0, 3), 1, r"must be \[N, features\]"),
        (torch.full((1, 2), math.inf), 1, "must be finite"),
    ],
)
def test_concentration_refuses(attribution, k, message):
    with pytest.raises(ValueError, match=message):
        saliency_concentration(attribution, k)
