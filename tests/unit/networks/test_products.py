"""Products by either library are the same numbers, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modules.networks import products

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request, monkeypatch):
    if request.param and not HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN linear")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(1, 64, 2048), (3, 40, 50), (64, 96, 288), (200, 64, 130)])
def test_products_equal_float64(library, shape):
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, width, generator=generator), torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator)
    want = left.double() @ right.double().t()
    torch.testing.assert_close(products.product(left, right).double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.product(left, right, bias).double(), want + bias, rtol=1e-5, atol=1e-4)
    turned = products.product(left.t().contiguous().t(), right.t().contiguous().t())  # transposed views, as in backward
    torch.testing.assert_close(turned.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_gradients_of_autograd(library, bias):
    generator = torch.Generator().manual_seed(1)
    module = products.Linear(96, 160, bias=bias)
    x = torch.randn(4, 24, 96, generator=generator, requires_grad=True)
    out = module(x)
    grad = torch.randn(out.shape, generator=generator)
    mine = torch.autograd.grad(out, [x, *module.parameters()], grad)
    want = torch.autograd.grad(nn.functional.linear(x, module.weight, module.bias), [x, *module.parameters()], grad)
    for one, other in zip(mine, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_hooks_and_subclasses_are_not_plain():
    assert products.is_plain(nn.Linear(8, 8))
    assert products.is_plain(products.Linear(8, 8))
    hooked = products.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    assert not products.is_plain(hooked)
    assert not products.is_plain(nn.Bilinear(8, 8, 8))


def test_other_dtypes_and_autocast_stay_with_torch(library):
    left = torch.randn(128, 64, dtype=torch.float64)
    assert products.product(left, left).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(torch.randn(128, 64), torch.randn(64, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_widens(dtype):
    left, right = torch.ones(2, 3, dtype=dtype), torch.full((3, 4), 2.0, dtype=dtype)
    total = torch.ones(2, 4)
    products.add_product(total, left, right)
    assert total.eq(7.0).all()
