"""Hand-written backward passes against autograd of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.networks import fused
from modules.objectives.lm import lm_cross_entropy, token_log_probs


def _rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_rms_norm_gradients() -> None:
    x, branch, weight = _rand(3, 5, 8), _rand(3, 5, 8), _rand(8)
    assert torch.autograd.gradcheck(lambda *a: fused.rms_norm(*a, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: fused.add_rms_norm(*a, 1e-5), (x, branch, weight))
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    total, normed = fused.add_rms_norm(x, branch, weight, 1e-5)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(normed, F.rms_norm(x + branch, (8,), weight, 1e-5))


def test_swiglu_gradients() -> None:
    gate, up = _rand(4, 7), _rand(4, 7)
    assert torch.autograd.gradcheck(fused.swiglu, (gate, up))
    torch.testing.assert_close(fused.swiglu(gate, up), F.silu(gate) * up)


def test_parallel_linear_gradients() -> None:
    x, first, second = _rand(2, 3, 5), _rand(4, 5), _rand(6, 5)
    assert torch.autograd.gradcheck(fused.parallel_linear, (x, first, second))
    for out, weight in zip(fused.parallel_linear(x, first, second), (first, second), strict=True):
        torch.testing.assert_close(out, F.linear(x, weight))


def test_parallel_linear_with_frozen_weight_and_input() -> None:
    x, first, second = torch.randn(3, 5), torch.randn(4, 5), torch.randn(6, 5, requires_grad=True)
    a, b = fused.parallel_linear(x, first, second)
    (a.sum() + b.sum()).backward()
    torch.testing.assert_close(second.grad, x.sum(0).expand(6, 5))


def test_rotary_gradients() -> None:
    x = _rand(2, 5, 3, 8)
    angles = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fused.rotary(x, angles.cos(), angles.sin()), (x,))
    rows = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fused.rotary(x, rows.cos(), rows.sin()), (x,))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_causal_attention_equals_sdpa(
    kv_heads: int, documents: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "QUERY_BLOCK", 8)  # several blocks, the last one short
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # sequences handled together
    query, key, value = _rand(3, 4, 21, 6), _rand(3, kv_heads, 21, 6), _rand(3, kv_heads, 21, 6)
    ids = torch.tensor([[0] * 5 + [4] * 11 + [1] * 5, [7] * 20 + [2], [3] * 21]) if documents else None
    mask = torch.ones(21, 21, dtype=torch.bool).tril()
    if ids is not None:
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    out = fused.causal_attention(query, key, value, 0.3, ids)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for ours, reference in zip(
        torch.autograd.grad(out, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_equals_torch(reduction: str) -> None:
    hidden, weight = _rand(2, 7, 5), _rand(11, 5)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, 3] = labels[1, 6] = -100
    loss, per_token, count = lm_cross_entropy(hidden, weight, labels, chunk_size=4, reduction=reduction)  # type: ignore[arg-type]
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits.view(-1, 11), labels.view(-1), reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(per_token, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").detach())
    assert count == 12
    assert not per_token.requires_grad
    for scale in (1.0, 0.25):  # 1 takes a shortcut
        ours = torch.autograd.grad(loss * scale, (hidden, weight), retain_graph=True)
        theirs = torch.autograd.grad(expected * scale, (hidden, weight), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_cross_entropy_without_gradient_and_with_frozen_head() -> None:
    hidden, weight, labels = torch.randn(1, 6, 5), torch.randn(9, 5), torch.randint(0, 9, (1, 6))
    expected = F.cross_entropy((hidden @ weight.t()).view(-1, 9), labels.view(-1))
    assert lm_cross_entropy(hidden, weight, labels)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    hidden.requires_grad_()
    lm_cross_entropy(hidden, weight, labels)[0].backward()
    assert hidden.grad is not None


def test_token_log_probs_gradients() -> None:
    hidden, weight, labels = _rand(2, 4, 3), _rand(7, 3), torch.randint(0, 7, (2, 4))
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, labels, 3, 0.7), (hidden, weight))
    expected = torch.log_softmax(hidden @ weight.t() / 0.7, -1).gather(2, labels[..., None])[..., 0]
    torch.testing.assert_close(token_log_probs(hidden, weight, labels, 3, 0.7), expected)


@pytest.mark.parametrize("call", [
    lambda: lm_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 4).long()),
    lambda: lm_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 6), torch.zeros(2, 3).long()),
])  # fmt: skip
def test_cross_entropy_names_shapes_that_do_not_fit(call) -> None:
    with pytest.raises(ValueError, match=r"lm_cross_entropy: hidden \(2, 3, 4\), weight .* do not fit; want"):
        call()


def test_cross_entropy_checks_options() -> None:
    arguments = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        lm_cross_entropy(*arguments, chunk_size=0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        lm_cross_entropy(*arguments, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        token_log_probs(*arguments, temperature=0)
