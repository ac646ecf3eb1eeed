"""The fused linear map and tanh against torch's, values and gradients."""

from __future__ import annotations

import pytest
import torch

from modules.networks.products import fuses_tanh, linear_tanh, prefers_onednn
from modules.networks.stacked_mlp import StackedMLP

pytestmark = pytest.mark.skipif(not prefers_onednn(), reason="this processor's products do not go to oneDNN")


def test_values_and_gradients_equal_torch():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(600, 11), torch.randn(11, 64) / 3, torch.randn(64)
    assert fuses_tanh(x, weight)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    others = [value.clone().requires_grad_() for value in (x, weight, bias)]
    pull = torch.randn(600, 64)
    mine, theirs = linear_tanh(*leaves), torch.tanh(others[0] @ others[1] + others[2])
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    for one, other in zip(
        torch.autograd.grad((mine * pull).sum(), leaves),
        torch.autograd.grad((theirs * pull).sum(), others),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


def test_a_perceptron_is_the_same_by_both_ways():
    """One network takes the fused way, two the plain one; rows of few elements the plain one."""
    net = StackedMLP(5, [64, 64], 3, "tanh")
    params = net.init(2, torch.Generator().manual_seed(0))
    rows = torch.randn(300, 5)
    both = net.apply(params, rows)
    for number in range(2):
        alone = net.apply({name: value[number : number + 1] for name, value in params.items()}, rows)
        torch.testing.assert_close(alone[0], both[number], atol=1e-5, rtol=1e-5)
