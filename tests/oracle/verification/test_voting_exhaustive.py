"""pass@k against exhaustive subsets; the laws of majority voting."""

from __future__ import annotations

import itertools
import random
from math import comb

import pytest

from modules.verification.voting import maj_at_k, majority_vote, pass_at_k


def equal(a: str, b: str) -> bool:
    return float(a) == float(b)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_equals_exhaustive_subsets(n: int) -> None:
    for correct in range(n + 1):
        right = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_equals_the_closed_form_of_large_counts() -> None:
    for n, c, k in ((200, 3, 100), (256, 128, 16), (1000, 1, 999)):
        assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k))


def test_k_1_equals_maj_at_1_and_copies_equal_the_sample() -> None:
    for answer, gold in (("3", "3"), ("3", "4"), (None, "3")):
        single = answer is not None and equal(gold, answer)
        assert maj_at_k([answer, "9"], gold, equal, k=1) is single
        assert maj_at_k([answer] * 7, gold, equal) is single


def test_permutations_change_nothing_when_the_winner_is_unique() -> None:
    generator = random.Random(0)
    answers = ["1", "1.0", "1.00", "2", "2.0", None, "3"]
    for _ in range(50):
        shuffled = answers.copy()
        generator.shuffle(shuffled)
        vote = majority_vote(shuffled, equal)
        assert vote.answer is not None
        assert float(vote.answer) == 1.0
        assert vote.votes == 3


def test_ties_are_broken_by_first_occurrence() -> None:
    for answers in itertools.permutations(["1", "2", "1.0", "2.0"]):
        assert majority_vote(answers, equal).answer == answers[0]
