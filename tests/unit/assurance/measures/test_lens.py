"""Logit lens and attention entropy: masks, chunks, layouts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from modules.assurance.measures.lens import attention_entropy, attention_entropy_rows, logit_lens


def _same(h: torch.Tensor) -> torch.Tensor:
    return h


def _words(*tops: int) -> torch.Tensor:
    """Hidden states ``[layers, 1, 1, 3]`` whose top-1 under the identity are these."""
    return torch.nn.functional.one_hot(torch.tensor(tops), 3).float()[:, None, None]


def test_depth_is_the_first_hit_and_settled_the_last_change():
    found = logit_lens(
        torch.cat([_words(1, 0, 2, 1, 1), _words(0, 0, 0, 0, 0), _words(0, 0, 0, 0, 2)], 2), _same, _same
    )
    assert found.depth.tolist() == [[0, 0, 4]]
    assert found.settled.tolist() == [[3, 0, 4]]
    assert found.agreement.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3, 1])


def test_a_mask_drops_tokens_and_nothing_else():
    torch.manual_seed(0)
    hidden, mask = torch.randn(4, 2, 5, 8), torch.rand(2, 5) < 0.6
    head = torch.nn.Linear(8, 11)
    masked = logit_lens(hidden, _same, head, mask=mask)
    alone = logit_lens(hidden[:, mask][:, None], _same, head)
    torch.testing.assert_close(masked.kl, alone.kl)
    assert masked.agreement.tolist() == alone.agreement.tolist()
    assert masked.depth[mask].tolist() == alone.depth[0].tolist()
    assert (masked.depth[~mask] == -1).all()
    assert (masked.settled[~mask] == -1).all()
    poisoned = torch.where(mask[..., None], hidden, torch.nan)
    assert logit_lens(poisoned, _same, head, mask=mask).kl.tolist() == pytest.approx(masked.kl.tolist())


def test_chunks_and_lists_change_nothing_and_bound_the_rows_held():
    torch.manual_seed(0)
    hidden, seen = torch.randn(3, 2, 5, 8), []

    def head(h: torch.Tensor) -> torch.Tensor:
        seen.append(len(h))
        return h * 2

    whole = logit_lens(hidden, _same, head)
    assert seen == [10] * 3
    parts = logit_lens(list(hidden), _same, head, chunk=3)
    assert max(seen[3:]) == 3
    torch.testing.assert_close(whole.kl, parts.kl)
    assert whole.depth.tolist() == parts.depth.tolist()


def test_a_last_state_that_is_normed_is_not_normed_twice():
    torch.manual_seed(0)
    hidden = torch.randn(3, 2, 5, 8)
    norm = torch.nn.RMSNorm(8)
    torch.nn.init.uniform_(norm.weight, 0.2, 3.0)  # so that norming twice differs from norming once
    plain = logit_lens(hidden, norm, _same)
    normed = torch.cat([hidden[:-1], norm(hidden[-1:]).detach()])
    torch.testing.assert_close(logit_lens(normed, norm, _same, last_is_normed=True).kl, plain.kl)
    assert not torch.allclose(logit_lens(normed, norm, _same).kl, plain.kl)


def test_excluded_words_leave_the_divergence_finite():
    never = torch.tensor([0.0, 0.0, -math.inf])
    found = logit_lens(torch.randn(3, 1, 4, 3), _same, lambda h: h + never)
    assert found.kl.isfinite().all()
    assert found.kl[0] > 0


def test_lens_needs_no_gradient_and_leaves_none():
    head = torch.nn.Linear(3, 4)
    assert not logit_lens(torch.randn(2, 1, 2, 3), _same, head).kl.requires_grad


@pytest.mark.parametrize(
    ("hidden", "options", "message"),
    [
        ([], {}, "two layers or more"),
        (torch.zeros(1, 1, 2, 3), {}, "two layers or more"),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)], {}, "of one shape"),
        (torch.zeros(2, 1, 2, 3), {"mask": torch.zeros(1, 2, dtype=torch.bool)}, "drops every token"),
        (torch.zeros(2, 1, 2, 3), {"mask": torch.ones(1, 2)}, "mask: must be bool"),
        (torch.zeros(2, 1, 2, 3), {"chunk": 0}, "chunk: must be at least 1"),
        (torch.full((2, 1, 2, 3), math.nan), {}, "logits hold NaN"),
    ],
)
def test_lens_refuses(hidden, options, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(hidden, _same, _same, **options)


def test_rows_with_one_key_are_dropped_from_the_mean():
    causal = torch.ones(3, 3).tril().bool()
    weights = torch.tensor(
        [[0.9999, 0, 0], [0.5, 0.5, 0], [1.0, 0, 0]]
    )  # the first rounded: not a finite share of log 1
    rows = attention_entropy_rows(weights, causal)
    assert rows[0].isnan()
    assert rows[1:].tolist() == [1.0, 0.0]
    assert attention_entropy(weights[None, None, None], causal).tolist() == [[0.5]]


def test_padded_keys_and_padded_rows_do_not_count():
    mask = torch.tensor([True, True, False, False])  # two real tokens of four
    weights = torch.tensor([0.25, 0.75, 0.0, 0.0]).expand(1, 2, 3, 4, 4)
    rows = mask[:, None] & mask  # padded queries look at no key at all
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    torch.testing.assert_close(attention_entropy(weights, rows), torch.full((1, 3), entropy, dtype=torch.float64))
    per_sample = torch.stack([mask, torch.zeros(4, dtype=torch.bool)])[:, None, None]  # [B, 1, 1, K]
    torch.testing.assert_close(attention_entropy(weights, per_sample), torch.full((1, 3), entropy).double())


def test_a_head_without_rows_is_nan():
    assert attention_entropy(torch.ones(1, 1, 2, 1, 1)).isnan().all()


@pytest.mark.parametrize(
    ("weights", "mask", "message"),
    [
        (torch.zeros(2, 3), None, "sum to 1"),
        (torch.tensor([[2.0, -1.0]]), None, "sum to 1"),
        (torch.full((1, 2), math.nan), None, "sum to 1"),
        (torch.full((1, 3), 1 / 3), torch.tensor([True, True, False]), "sum to 1"),  # another mask than the model's
        (torch.tensor([[0.5, 0.5, 0.4]]), torch.tensor([True, True, False]), "sum to 1"),
        (torch.full((1, 3), 1 / 3), torch.ones(2, dtype=torch.bool), "does not broadcast"),
        (torch.full((1, 3), 1 / 3), torch.ones(3), "mask: must be bool"),
        (torch.zeros(3), None, r"must be \[..., Q, K\]"),
    ],
)
def test_attention_entropy_refuses(weights, mask, message):
    with pytest.raises(ValueError, match=message):
        attention_entropy_rows(weights, mask)


def test_attention_entropy_wants_batched_heads():
    with pytest.raises(ValueError, match=r"must be \[B, heads, Q, K\] a layer"):
        attention_entropy(torch.full((2, 3, 3), 1 / 3))
