"""Majority voting and intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from modules.verification.voting import (
    bootstrap_interval,
    cluster_answers,
    maj_at_k,
    majority_vote,
    pass_at_k,
    pass_rate,
    wilson_interval,
)


def same_number(a: str, b: str) -> bool:
    return float(a) == float(b)


def test_equivalent_answers_vote_together() -> None:
    vote = majority_vote(["1", "0.5", None, ".50", "2", "1.0", "0.5", " "], same_number)
    assert vote.answer == "0.5"
    assert (vote.votes, vote.valid, vote.samples) == (3, 6, 8)
    assert vote.clusters == ((0, 5), (1, 3, 6), (4,))


def test_ties_go_to_the_first() -> None:
    assert majority_vote(["3", "2", "2", "3"], same_number).answer == "3"
    assert majority_vote(["2", "3", "3", "2"], same_number).answer == "2"


def test_no_valid_answer() -> None:
    assert majority_vote([None, ""], same_number).answer is None
    assert majority_vote([], same_number).samples == 0
    assert not maj_at_k([None, None], "1", same_number)


def test_each_spelling_is_compared_once_per_cluster() -> None:
    calls = []

    def counting(a: str, b: str) -> bool:
        calls.append((a, b))
        return same_number(a, b)

    cluster_answers(["1"] * 100 + ["2"] * 100 + ["1.0"] * 100, counting)
    assert calls == [("1", "2"), ("1", "1.0")]


def test_pass_rate_counts_invalid_answers_in_the_denominator() -> None:
    assert pass_rate(["1", None, "1.0", "2"], "1", same_number) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maj_at_k(["1"], "1", same_number, k=2), r"k must be in \[1, 1\], got 2"),
        (lambda: pass_rate([], "1", same_number), "no samples"),
        (lambda: pass_at_k(5, 6, 1), r"correct must be in \[0, 5\], got 6"),
        (lambda: pass_at_k(5, 1, 6), r"k must be in \[1, 5\], got 6"),
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: wilson_interval(1, 2, 1.0), "confidence must be"),
        (lambda: bootstrap_interval([]), "need values"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wilson_interval_known_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson_interval(64, 244) == pytest.approx((0.2111, 0.3209), abs=1e-3)  # the sheet's miniF2F count


def test_wilson_interval_covers() -> None:
    random.seed(0)
    hits = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(random.random() < 0.3 for _ in range(60)), 60)
        hits += low <= 0.3 <= high
    assert 0.93 < hits / 2000 < 0.97


def test_bootstrap_interval_is_close_to_the_normal_one_and_repeatable() -> None:
    values = [float(i % 4 == 0) for i in range(400)]
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.01)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_pass_at_k_limits() -> None:
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(10, 10, 1) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 3, 2) == 1.0
    assert all(pass_at_k(10_000, c, 100) <= 1.0 for c in (1, 5000, 9999))
