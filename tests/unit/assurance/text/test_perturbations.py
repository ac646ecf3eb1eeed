"""Perturbations change a text and never its answer."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modules.assurance.subject import AssuranceError
from modules.assurance.text.perturbations import (
    HOMOGLYPHS,
    PERTURBATIONS,
    add_typos,
    change_case,
    change_punctuation,
    change_whitespace,
    fold_homoglyphs,
    paraphrase,
    perturbation,
    perturbed,
    protected_spans,
    rewrites,
    swap_homoglyphs,
)

PROBLEM = (
    "Tom buys 3 boxes, and each box holds twelve pencils; some aren't red. How many pencils does he have in total if "
    "$x + y = 5$, \\boxed{12 \\frac{1}{2}} pens cost 1 000.50 euros (3/4 of $7) and AB is the shortest side of the "
    "triangle ABC? Suppose that the thirty-five children walk \\(2^{n}\\) km to the shop with `code here` and ½ litre."
)
NAMES = tuple(PERTURBATIONS)
PIECES = st.sampled_from(
    ["Tom", "pencils", "children", "How many", "three", "don't", "5", "1 000", "3/4", "$a + b$", "\\boxed{7}", "x",
     "ABC", "in total", ",", ".", "?", "\n", "\t", " ", "  ", "½", "²", "Ⅷ", "ß", "ı", "café", "\\frac{1", "$", "{",
     "}", "'", "5."]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=60), st.lists(PIECES, max_size=14).map(" ".join), st.lists(PIECES, max_size=14).map("".join)
)
SEEDS = st.integers(0, 2**62)


def _kept(text: str) -> list[str]:
    return [text[start:end] for start, end in protected_spans(text)]


def _stand_in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS, seed=SEEDS)
@example(text=PROBLEM, seed=0)
@settings(deadline=None, max_examples=60)
def test_numbers_and_formulas_stay_in_order(name, text, seed):
    changed = PERTURBATIONS[name](text, seed)
    assert _stand_in_order(_kept(text), changed)
    assert [c for c in changed if c.isnumeric()] == [c for c in text if c.isnumeric()]
    assert PERTURBATIONS[name](text, seed) == changed  # pure


@pytest.mark.parametrize("name", NAMES)
def test_every_way_changes_a_word_problem_and_keeps_its_formulas(name):
    for seed in range(40):
        changed = PERTURBATIONS[name](PROBLEM, seed)
        assert changed != PROBLEM
        for kept in (
            "$x + y = 5$", "\\boxed{12 \\frac{1}{2}}", "1 000.50", "3/4", "$7", "\\(2^{n}\\)", "`code here`",
            "thirty-five", "twelve", "each", "aren't", "ABC", "½",
        ):  # fmt: skip
            assert changed.count(kept) == PROBLEM.count(kept)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("He paid $5 then left", ["$5"]),
        ("about 1 000 000 people", ["1 000 000"]),
        ("see \\boxed{a {b} c} here", ["\\boxed{a {b} c}"]),
        ("see \\boxed{never closed", ["\\boxed{never closed"]),
        ("an open \\begin{align}p&=q\\end{align} block", ["\\begin{align}p&=q\\end{align}"]),
        ("there isn’t any", ["isn’t any"]),
        ("mail bob.jones@example.org today", ["bob.jones@example.org"]),
        ("Nothing here", []),
    ],
)
def test_what_is_protected(text, kept):
    assert _kept(text) == kept


@given(text=TEXTS)
@settings(deadline=None, max_examples=100)
def test_protected_parts_are_in_order_and_apart(text):
    edges = [edge for span in protected_spans(text) for edge in span]
    assert edges == sorted(set(edges))
    assert all(0 <= edge <= len(text) for edge in edges)


@given(text=TEXTS, seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_case_changes_case_alone(text, seed):
    assert change_case(text, seed).casefold() == text.casefold()


@given(text=TEXTS, seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_whitespace_changes_blanks_alone(text, seed):
    changed = change_whitespace(text, seed)
    assert changed.split() == text.split()
    assert changed.strip(" \t\n").count("\n") == text.strip(" \t\n").count("\n")
    assert changed != text or not text


@given(text=TEXTS, seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_homoglyphs_fold_back(text, seed):
    assert fold_homoglyphs(swap_homoglyphs(text, seed)) == fold_homoglyphs(text)


@given(text=TEXTS, seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_punctuation_changes_no_letter(text, seed):
    letters = re.compile(r"[\W_]+")
    assert letters.sub("", change_punctuation(text, seed)) == letters.sub("", text)


@given(word=st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=5, max_size=12), seed=SEEDS)
@settings(deadline=None, max_examples=200)
def test_a_typo_is_one_slip_inside_a_word(word, seed):
    typed = add_typos(word, seed)
    if protected_spans(word):
        assert typed == word
        return
    assert typed != word
    assert (typed[0], typed[-1]) == (word[0], word[-1])
    assert abs(len(typed) - len(word)) <= 1
    same = sum(a == b for a, b in zip(typed, word, strict=False))
    tail = sum(a == b for a, b in zip(reversed(typed), reversed(word), strict=False))
    assert same >= len(word) - 2 or same + tail >= len(word) - 1
    assert not protected_spans(typed)  # never a number word


@pytest.mark.parametrize("phrase", sorted(rewrites()))
def test_every_rewrite_can_happen(phrase):
    assert paraphrase(f"We {phrase} gladly.", 0) == f"We {rewrites()[phrase]} gladly."
    assert paraphrase(f"{phrase.capitalize()} it.", 0)[0].isupper()


def test_a_phrase_inside_a_word_or_a_formula_stays():
    assert paraphrase("The bigger workshop in $large$ letters", 3) == "The bigger workshop in $large$ letters"
    assert paraphrase("It is large.", 0) in ("It's large.", "It is big.")


def test_an_article_in_front_still_fits():
    assert paraphrase("He ate a whole cake and an easy pie.", 0) == "He ate a whole cake and an easy pie."
    assert paraphrase("He ate the whole cake.", 0) == "He ate the entire cake."
    assert paraphrase("He saw a film.", 0) == "He saw a movie."


def test_a_text_without_a_place_comes_back():
    for name in ("case", "typo", "punctuation", "paraphrase", "homoglyph"):
        assert PERTURBATIONS[name]("$x = 5$ 12", 0) == "$x = 5$ 12"


def test_a_generator_serves_as_seed():
    for name in NAMES:
        first, again = (PERTURBATIONS[name](PROBLEM, torch.Generator().manual_seed(5)) for _ in range(2))
        assert first == again
    generator = torch.Generator().manual_seed(5)
    assert len({add_typos(PROBLEM, generator) for _ in range(8)}) > 1  # each call draws from it


def test_a_condition_does_not_depend_on_the_others():
    everything = perturbed(PROBLEM, 11)
    assert tuple(everything) == NAMES
    assert len(NAMES) == 8
    assert perturbed(PROBLEM, 11, ("typo",)) == {"typo": everything["typo"]}
    assert perturbed(PROBLEM, 12, ("typo",)) != {"typo": everything["typo"]}


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(AssuranceError, match="unknown perturbation 'typos'; did you mean typo"):
        perturbation("typos")
    with pytest.raises(AssuranceError, match="known: case, typo"):
        perturbed("text", 0, ("qqq",))


def test_look_alikes_are_one_to_one():
    assert len(set(HOMOGLYPHS.values())) == len(HOMOGLYPHS)
    assert all(letter.isascii() and not look.isascii() for letter, look in HOMOGLYPHS.items())
