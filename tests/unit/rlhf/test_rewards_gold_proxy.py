"""GoldProxy's proxies and gold score, by hand and at the start policy."""

from __future__ import annotations

import math

import pytest
import torch

from modules.contracts import PromptSample
from modules.rlhf.rewards import ContentShare, GoldScore, MarkerSaturation, Responses


def _batch(acts: list[int], tokens: list[list[int]]) -> Responses:
    size = len(acts)
    samples = [PromptSample("p", labels={"act": act}) for act in acts]
    return Responses(samples, [""] * size, [[0]] * size, tokens, [False] * size)


def test_by_hand() -> None:
    batch = _batch(
        [0, 1, 1], [[0, 11, 12, 15, 30, 30, 30, 13, 14, 39], [20] * 10, [15, 17, 0, 1, 2, 3, 25, 26, 27, 28]]
    )
    assert ContentShare().score(batch).tolist() == pytest.approx([0.2, 0, 0.4])
    assert MarkerSaturation().score(batch).tolist() == pytest.approx([1 - math.exp(-3), 0, 1 - math.exp(-2)])
    found = GoldScore().compute(batch)
    # distinct trigrams: 8 + 1 + 8, none shared, of 24; equal neighbours 2 + 9 + 0, of 9 each
    assert found["distinct_3"] == pytest.approx(17 / 24)
    quality = [0.5 + 0 + 7 / 9, 0 + 0 + 0, 1 + 0 + 1]
    assert found["quality"] == pytest.approx(sum(quality) / 9)
    assert found["score"] == pytest.approx((sum(quality) / 9 + 17 / 24) / 2)
    one = _batch([0, 1], [[12, 15, 16, 17], [12, 13, 14, 15]])
    assert GoldScore().compute(one)["one_marker"] == 1  # markers of the other act do not count


def test_responses_of_different_length() -> None:
    batch = _batch([0, 0, 0], [[0, 20], [0, 1, 2, 2], []])
    assert ContentShare().score(batch).tolist() == [0.5, 1, 0]
    found = GoldScore().compute(batch)
    assert found["distinct_3"] == 1  # the two of the second response
    assert found["repetition"] == pytest.approx(1 / 9)


def test_start_values_of_the_published_problem() -> None:
    """A fixed random chain with rare content and markers starts at r = (.183, .204) and gold .588 (1024 responses)."""
    chain = 1.2 * torch.randn(40, 40, generator=torch.Generator().manual_seed(3))
    chain[:, :12] -= 0.9
    chain[:, 12:18] -= 1.2
    generator = torch.Generator().manual_seed(0)
    symbols = [torch.randint(40, (1024,), generator=generator)]
    for _ in range(10):
        symbols.append(torch.multinomial(chain.softmax(-1)[symbols[-1]], 1, generator=generator)[:, 0])
    batch = _batch([i % 2 for i in range(1024)], torch.stack(symbols[1:], 1).tolist())
    assert ContentShare().score(batch).mean() == pytest.approx(0.183, abs=0.015)
    assert MarkerSaturation().score(batch).mean() == pytest.approx(0.204, abs=0.03)
    assert GoldScore().compute(batch)["score"] == pytest.approx(0.588, abs=0.015)


def test_missing_act_and_no_responses() -> None:
    batch = Responses([PromptSample("hello")], [""], [[0]], [[1, 2]], [False])
    with pytest.raises(ValueError, match="sample 0 has no label 'act' .*'hello'"):
        MarkerSaturation().score(batch)
    with pytest.raises(ValueError, match="no responses"):
        GoldScore().compute(_batch([], []))
    with pytest.raises(ValueError, match="enough"):
        GoldScore(enough=0)
