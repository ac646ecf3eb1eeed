"""Exact and near deduplication, and the compact set below them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.text.dedup import Deduplicator, MinHash, text_digest
from datamodules.text.ngrams import SortedSet, ngram_hashes, normalised, word_hashes
from datamodules.text.specs import DedupSpec


def test_exact_ignores_whitespace_only() -> None:
    dedup = Deduplicator(DedupSpec())
    assert dedup.duplicate("a b\n c") == ""
    assert dedup.duplicate("  a\tb c ") == "duplicate"
    assert dedup.duplicate("A b c") == ""
    assert text_digest("a  b") == text_digest("a\nb") != text_digest("ab")


@given(st.lists(st.integers(0, 300), max_size=400))
def test_sorted_set_equals_a_python_set(values: list[int]) -> None:
    compact, plain = SortedSet(np.uint64, buffer=8), set()
    for value in values:
        array = np.array([value], dtype=np.uint64)
        assert bool(compact.contains(array)[0]) is (value in plain)
        if value not in plain:
            compact.add(array)
            plain.add(value)
    assert len(compact) == len(plain)


def test_sorted_set_keeps_digests_that_end_in_zero_bytes() -> None:
    values = [b"a" * 31 + b"\0", b"a" * 30 + b"\0\0", b"\0" * 32, b"b" * 32]
    store = SortedSet("S32", buffer=2)
    for number, value in enumerate(values):
        assert not store.contains(np.array([value], dtype="S32"))[0], number
        store.add(np.array([value], dtype="S32"))
    assert store.contains(np.array(values, dtype="S32")).all()


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def test_minhash_estimates_jaccard() -> None:
    rng = random.Random(1)
    base = words(rng, 600)
    changed = base[:450] + words(rng, 150)
    minhash = MinHash(ngram=5, bands=64, rows=8)
    left, right = minhash.signature(" ".join(base)), minhash.signature(" ".join(changed))
    shingles = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (base, changed)]
    jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    # 512 hashes: standard error sqrt(J(1-J)/512) = 0.022; 4 of them.
    assert (left == right).mean() == pytest.approx(jaccard, abs=0.09)


def test_near_duplicates_go_and_different_texts_stay() -> None:
    rng = random.Random(2)
    dedup = Deduplicator(DedupSpec(near=True))
    base = words(rng, 400)
    assert dedup.duplicate(" ".join(base)) == ""
    edited = [*base]
    edited[7] = "other"
    assert dedup.duplicate(" ".join(edited)) == "near_duplicate"
    assert [dedup.duplicate(" ".join(words(rng, 400))) for _ in range(50)] == [""] * 50
    assert dedup.duplicate("two words") == ""


@given(st.text(alphabet="ab é\n\t", max_size=60), st.integers(1, 5))
def test_ngram_hashes_agree_exactly_where_words_agree(text: str, n: int) -> None:
    flat = normalised(text)
    tokens = flat.split()
    hashes = ngram_hashes(word_hashes(flat), n)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert hashes.size == len(grams)
    assert len(set(hashes.tolist())) == len(set(grams))
