"""Interpretability measures where the answer is known beforehand: oracle group 6 of the alignment cycle."""

from __future__ import annotations

import pytest
import torch

from modules.assurance.measures.attribution import integrated_gradients
from modules.assurance.measures.concept_probe import probe_selectivity
from modules.assurance.measures.lens import attention_entropy, logit_lens


def test_lens_equals_divergence_of_planted_logits():
    """An identity norm and unembedding: the hidden states are logits, of Bernoulli distributions here."""
    p = torch.tensor([0.5, 0.2, 0.9, 0.7], dtype=torch.float64)  # of word 1, layer by layer
    logs = torch.stack([1 - p, p], -1).log()
    found = logit_lens(logs[:, None, None], lambda h: h, lambda h: h)
    final = p[-1]
    expected = final * (final / p).log() + (1 - final) * ((1 - final) / (1 - p)).log()
    torch.testing.assert_close(found.kl, expected, atol=1e-6, rtol=1e-6)
    assert found.kl[-1] == 0.0
    assert found.agreement.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert found.depth.item() == found.settled.item() == 2


def test_lens_at_the_last_layer_is_exact_on_a_network():
    torch.manual_seed(0)
    norm, unembed = torch.nn.RMSNorm(16), torch.nn.Linear(16, 300, bias=False)
    found = logit_lens(torch.randn(5, 3, 7, 16).bfloat16().float(), norm, unembed, chunk=4)
    assert found.kl[-1] == 0.0
    assert found.agreement[-1] == 1.0
    assert (found.kl[:-1] > 0).all()
    assert found.depth.max() == 4  # unrelated layers: top-1 of 300 words agree by chance only


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_entropy_is_1_where_uniform_and_0_where_one_hot(dtype):
    causal = torch.ones(6, 6).tril().bool()
    uniform = (causal / causal.sum(-1, keepdim=True)).to(dtype)
    one_hot = torch.eye(6, dtype=dtype)
    weights = torch.stack([uniform, one_hot]).expand(2, 4, 2, 6, 6)  # [layers, B, heads, Q, K]
    found = attention_entropy(weights, causal)
    expected = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=5e-3 if dtype == torch.bfloat16 else 1e-6, rtol=0)


def test_linear_model_has_integrated_gradients_in_closed_form():
    torch.manual_seed(0)
    w, x, x0 = torch.randn(6).double(), torch.randn(9, 6).double(), torch.randn(6).double()
    for rule, steps in (("gauss_legendre", 1), ("trapezoid", 2)):  # the fewest steps are exact already
        found = integrated_gradients(lambda rows: rows @ w + 3, x, x0, steps=steps, rule=rule)
        torch.testing.assert_close(found.values, w * (x - x0), atol=1e-12, rtol=0)
        assert found.residual.abs().max() < 1e-12


def test_integrated_gradients_of_a_network_are_complete():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    x = torch.randn(20, 5).double()
    few, many = (integrated_gradients(lambda r: net(r)[:, 0], x, steps=n).residual.abs().max() for n in (2, 32))
    assert many < 1e-9 < few
    coarse, fine = (
        integrated_gradients(lambda r: net(r)[:, 0], x, steps=n, rule="trapezoid").residual.abs().max().item()
        for n in (17, 33)
    )
    assert fine == pytest.approx(coarse / 4, rel=0.1)  # second order: half the step, a quarter of the error


def test_planted_linear_concept_is_found_and_its_control_is_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 20, generator=generator)
    labels = (x[:, 3] - x[:, 7] > 0).long()
    types = torch.randint(400, (1500,), generator=generator)  # says nothing about the features
    found = probe_selectivity(x, labels, types)
    assert found.task.min() > 0.98
    assert found.control.mean().item() == pytest.approx(0.5, abs=0.04)
    assert found.selectivity.mean() > 0.44


def test_memory_of_types_has_no_selectivity():
    """Features that name the type and nothing else: the probe learns either task by heart."""
    generator = torch.Generator().manual_seed(0)
    types = torch.randint(40, (2000,), generator=generator)
    labels = torch.randint(2, (40,), generator=generator)[types]
    found = probe_selectivity(torch.nn.functional.one_hot(types, 40).float(), labels, types)
    assert found.task.min() > 0.99
    assert found.control.min() > 0.99
    assert found.selectivity.abs().max() < 0.01
