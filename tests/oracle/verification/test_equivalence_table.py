"""Equivalence against pairs of known verdict: a table of hard cases and ``equivalence_pairs.tsv``, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.verification.equivalence import SymbolicEquivalence

PAIRS = [
    (line.split("\t")[0] == "=", *line.rstrip("\n").split("\t")[1:])
    for line in (Path(__file__).parent / "equivalence_pairs.tsv").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture(scope="module")
def checker() -> Iterator[SymbolicEquivalence]:
    with SymbolicEquivalence(wall_seconds=20.0) as equivalence:
        yield equivalence


def test_table_is_large_and_balanced() -> None:
    equal = sum(pair[0] for pair in PAIRS)
    assert len(PAIRS) >= 300
    assert min(equal, len(PAIRS) - equal) >= 150


def test_verdicts_equal_the_hand_written_ones(checker: SymbolicEquivalence) -> None:
    wrong = []
    for equal, gold, answer in PAIRS:
        for a, b in ((gold, answer), (answer, gold)):
            verdict = checker.compare(a, b)
            if verdict.ok is not equal:
                wrong.append((a, b, verdict.reason))
    assert not wrong


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"\frac12", "0.5", True),
        ("1{,}000", "1000", True),
        ("0", "0.0", True),
        ("0", "0", True),
        ("0", "1-1", True),
        ("(2,4)", "(2,4)", True),
        ("[2,5)", "[2,5)", True),
        ("x^2-1", "(x-1)(x+1)", True),
        (r"\sqrt{8}", r"2\sqrt2", True),
        ("3/2", "1", False),
        ("2.7", "2", False),
        ("", "", False),
        ("5", "", False),
        (r"\unparsable{\thing}", r"\unparsable{\thing}", True),
        (r"\unparsable{\thing}", r"\unparsable{\other}", False),
    ],
)
def test_table_of_hard_cases(checker: SymbolicEquivalence, gold: str, answer: str, equal: bool) -> None:
    assert checker.equal(gold, answer) is equal
