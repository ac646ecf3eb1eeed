"""Rank correlation and entropies against scipy, calibration against torchmetrics, integrals against quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from modules.assurance.measures.attribution import integrated_gradients, saliency_concentration
from modules.assurance.measures.calibration import average_ranks, expected_calibration_error, spearman
from modules.assurance.measures.lens import attention_entropy_rows


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.floats(-1e6, 1e6)), min_size=2, max_size=40))
def test_spearman_equals_scipy(pairs):
    x, y = np.array(pairs, dtype=np.float64).T
    np.testing.assert_array_equal(average_ranks(x), scipy.stats.rankdata(x))
    for other in (y, np.round(y, -5)):  # the second has many ties
        if np.ptp(x) and np.ptp(other):
            assert spearman(x, other) == pytest.approx(scipy.stats.spearmanr(x, other).statistic, abs=1e-12)
        else:
            assert np.isnan(spearman(x, other))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_torchmetrics(bins):
    generator = torch.Generator().manual_seed(bins)
    confidence = torch.rand(2000, generator=generator) ** 0.5 / 2 + 0.5  # of the answer given: at least 1/2
    target = (torch.rand(2000, generator=generator) < confidence**2).long()
    theirs = binary_calibration_error(confidence, target, n_bins=bins, norm="l1")
    ours = expected_calibration_error(confidence.numpy(), target.numpy(), bins=bins)
    assert ours == pytest.approx(float(theirs), abs=1e-5)
    assert ours > 0.05


def test_entropies_equal_scipy():
    p = np.random.default_rng(0).dirichlet(np.full(9, 0.4), size=20)
    theirs = scipy.stats.entropy(p, axis=1) / np.log(9)
    np.testing.assert_allclose(attention_entropy_rows(torch.tensor(p)).numpy(), theirs, atol=1e-12)
    found = saliency_concentration(-3.0 * torch.tensor(p), k=2)  # neither scale nor sign matters
    np.testing.assert_allclose(found.entropy.numpy(), theirs, atol=1e-12)
    np.testing.assert_allclose(found.top_share.numpy(), np.sort(p, axis=1)[:, -2:].sum(1), atol=1e-12)


def test_integrated_gradients_equal_quadrature():
    weight = torch.tensor([0.7, -1.3, 0.4], dtype=torch.float64)
    x, start = torch.tensor([1.0, 2.0, -0.5]).double(), torch.tensor([0.2, -0.1, 0.3]).double()
    found = integrated_gradients(lambda rows: torch.sin(rows @ weight) + rows[:, 0] * rows[:, 1], x[None], start)

    def slope(a: float, feature: int) -> float:
        at = (start + a * (x - start)).numpy()
        product = {0: at[1], 1: at[0], 2: 0.0}[feature]
        return float(np.cos(at @ weight.numpy()) * weight[feature] + product)

    theirs = [float((x - start)[i]) * scipy.integrate.quad(slope, 0, 1, args=(i,))[0] for i in range(3)]
    np.testing.assert_allclose(found.values[0].numpy(), theirs, atol=1e-10)
    assert found.residual.abs().max() < 1e-12
