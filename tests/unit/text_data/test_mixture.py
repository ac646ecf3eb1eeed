"""Blending: the greedy rule, its bounds, resumption; mixtures and replay by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.text.mixture import Blend, mixture_weights

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(WEIGHTS, st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_blocks_and_resumption_do_not_matter(weights: list[float], blocks: list[int]) -> None:
    whole, _ = Blend(weights).take(sum(blocks))
    index, counts, parts = 0, [0] * len(weights), []
    for block in blocks:
        blend = Blend(weights, index, counts)
        parts.append(blend.take(block)[0])
        index, counts = blend.index, blend.counts
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(WEIGHTS, st.integers(1, 400))
def test_items_of_a_source_are_consecutive_and_counts_near_target(weights: list[float], amount: int) -> None:
    blend = Blend(weights)
    source, item = blend.take(amount)
    total = math.fsum(weights)
    for number, weight in enumerate(weights):
        mine = item[source == number]
        np.testing.assert_array_equal(mine, np.arange(mine.size))
        # A source is only chosen while behind its target, so it is at most one ahead of it.
        assert mine.size <= weight / total * max(1, amount - 1) + 1 + 1e-9
    assert sum(blend.counts) == blend.index == amount


def test_equal_weights_are_round_robin() -> None:
    assert Blend([1.0, 1.0, 1.0]).take(9)[0].tolist() == [0, 1, 2] * 3


def test_paper_mixture_with_replay_is_the_released_weights() -> None:
    names = ["arxiv", "web", "code", "pile", "github"]
    shares = mixture_weights(names, dict.fromkeys(names), "2:4:1", {"pile": 0.02, "github": 0.03})
    released = np.array([2, 4, 1, 0.147368, 0.221053])
    np.testing.assert_allclose(list(shares.values()), released / released.sum(), rtol=1e-5)
    assert math.fsum(shares.values()) == pytest.approx(1.0)
    assert shares["web"] == pytest.approx(0.543, abs=5e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixture": "2:4"}, "2 ratios for 3 sources"),
        ({"mixture": "2:x:1"}, "expected ratios"),
        ({"mixture": "2:0:1"}, "weight of source b must be a finite number > 0"),
        ({"mixture": "2:nan:1"}, "weight of source b must be a finite number > 0"),
        ({"replay": {"z": 0.1}}, "replay: unknown source 'z'; sources: a, b, c"),
        ({"replay": {"a": 1.5}}, r"share of 'a' must be in \(0, 1\)"),
        ({"replay": {"a": 0.5, "b": 0.3, "c": 0.1}}, "nothing for the other sources"),
    ],
)
def test_wrong_mixtures(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_weights(["a", "b", "c"], {}, **kwargs)


def test_weight_and_replay_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="both a replay share and a weight"):
        mixture_weights(["a", "b"], {"b": 1.0}, None, {"b": 0.1})


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [float("nan")], [1.0, -1.0], [float("inf")]])
def test_blend_refuses_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="mixture"):
        Blend(weights)


def test_blend_refuses_counts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Blend([1.0, 1.0], 3, [1, 1])
