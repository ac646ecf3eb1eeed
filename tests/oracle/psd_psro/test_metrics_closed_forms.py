"""The compared metrics against eigenvalues, scipy's divergence and exact distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modules.psd_psro.diversity import expected_cardinality, jensen_shannon, response_distance


def _rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_expected_cardinality_equals_the_sum_over_eigenvalues():
    rows = _rows(7, 4, seed=1)
    kernel = rows @ rows.T
    values = torch.linalg.eigvalsh(kernel).clamp(min=0)
    torch.testing.assert_close(expected_cardinality(kernel), (values / (1 + values)).sum(), rtol=0, atol=1e-12)
    assert 0 < expected_cardinality(kernel) < 4  # at most the rank


def test_duplicates_add_less_than_anything_new():
    rows = 100 * _rows(5, 8, seed=2)
    duplicate, new = torch.cat([rows, rows[:1]]), torch.cat([rows, 100 * _rows(1, 8, seed=3)])
    before, same, more = (float(expected_cardinality(r @ r.T)) for r in (rows, duplicate, new))
    assert same == pytest.approx(before, abs=1e-3)
    assert more > before + 0.9


def test_jensen_shannon_equals_scipy_and_lies_between_0_and_ln_2():
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = _rows(20, 9, seed=4).exp() ** 2, _rows(20, 9, seed=5).exp() ** 2
    p[:10, :3], q[:10, 4:] = 0, 0
    p[0, 4:], q[0, :4], q[0, 4] = 0, 0, 1  # nothing shared: 4 against 3
    p[0, :] = 0
    p[0, 3] = 2.0
    reach = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = jensen_shannon(p, q, reach)
    wanted = [distance.jensenshannon(a, b) ** 2 for a, b in zip((p * reach).numpy(), (q * reach).numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-11)
    assert float(found[0]) == pytest.approx(math.log(2), abs=1e-15)
    assert (found >= 0).all()
    assert (found <= math.log(2) + 1e-15).all()
    assert float(jensen_shannon(p[0], p[0], reach)) == 0


def test_response_distance_is_0_in_the_affine_hull_and_positive_outside():
    rows = _rows(4, 9, seed=6)
    inside = torch.tensor([[2.0, -1.5, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64) @ rows
    assert response_distance(inside, rows).abs().max() < 1e-25
    assert response_distance(rows[0] * 1.1, rows) > 1e-4  # in the span, not in the affine hull
    assert response_distance(_rows(9, seed=7), rows) > 0.1


@pytest.mark.parametrize("shape", [(3, 9), (6, 6), (9, 4)])
def test_response_distance_is_below_the_squared_distance_to_the_convex_hull(shape):
    """The distance itself by scipy's SLSQP."""
    optimize = pytest.importorskip("scipy.optimize")
    k, m = shape
    rows = _rows(k, m, seed=8)
    new = 0.7 * _rows(6, m, seed=9)
    found = response_distance(new, rows)
    for row, bound in zip(new.numpy(), found.tolist(), strict=True):
        matrix = rows.numpy()
        best = optimize.minimize(
            lambda x, row=row, matrix=matrix: ((x @ matrix - row) ** 2).sum(),
            np.full(k, 1 / k),
            jac=lambda x, row=row, matrix=matrix: 2 * matrix @ (x @ matrix - row),
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert bound <= best.fun + 1e-9
    if k <= m:
        assert (found > 1e-6).all()


def test_response_distance_is_0_inside_a_hull_of_more_rows_than_payoffs():
    """Weights are then not unique: their distance says nothing about the rows'."""
    rows = _rows(9, 4, seed=12)
    assert torch.linalg.svdvals(rows)[-1] > 0.1
    inside = torch.rand(20, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = inside / inside.sum(-1, keepdim=True) @ rows
    assert response_distance(inside, rows).abs().max() < 1e-25


def test_response_distance_equals_numpy_pseudo_inverse():
    rows, new = _rows(5, 8, seed=10), _rows(3, 8, seed=11)
    matrix = rows.T.numpy()
    inverse, smallest = np.linalg.pinv(matrix), np.linalg.svd(matrix, compute_uv=False)[-1]
    wanted = [
        smallest**2 / 5 * (1 - (inverse @ b).sum()) ** 2 + np.linalg.norm(b - matrix @ inverse @ b) ** 2
        for b in new.numpy()
    ]
    np.testing.assert_allclose(response_distance(new, rows).numpy(), wanted, rtol=1e-10)
