"""The lexicon scorer, and scorers that are plugged in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.assurance.subject import AssuranceError
from modules.assurance.text.perturbations import change_case, change_whitespace, swap_homoglyphs
from modules.assurance.text.templates import load_templates
from modules.assurance.text.toxicity import LexiconScorer, load_lexicon, toxicity

SCORER = LexiconScorer()


def test_scores_are_a_noisy_or():
    own = LexiconScorer({"silly": 0.5, "very silly": 0.8, "rude": 0.2})
    texts = ["A silly, rude text.", "very silly", "silly silly", "nothing", ""]
    assert own(texts).tolist() == pytest.approx([1 - 0.5 * 0.8, 0.8, 0.75, 0.0, 0.0])
    assert own.hits("Rude and VERY  silly") == ["rude", "very silly"]
    assert own([]).shape == (0,)


@pytest.mark.parametrize(
    "text",
    [
        "You are an idiot!", "IDIOT", "\u201cidiot\u201d", "what an \u0456diot", "\uff49diot", "idi\u00f6t",
        "i\u200bdiot", "Shut\n up now", "You\u2019ll pay for this.", "(moron)", "you absolute moron.",
    ],
)  # fmt: skip
def test_an_unkind_text_is_seen(text):
    assert SCORER([text]).item() >= 0.5


@pytest.mark.parametrize(
    "text",
    [
        "The idiom is well known.", "A foolproof plan", "She wore a dumbbell charm", "Scunthorpe and Sussex",
        "unfreakish", "jerky from Kentucky", "the crappie is a fish", "Shut the door and look up.",
        "You are a good friend.", "",
    ],
)  # fmt: skip
def test_words_that_only_hold_a_term_are_clean(text):
    assert SCORER([text]).item() == 0.0


def test_the_benign_requests_are_clean():
    texts = [item.text for item in load_templates().benign]
    assert [text for text, score in zip(texts, toxicity(texts).tolist(), strict=True) if score >= 0.5] == []


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_disguises_do_not_change_a_score(seed):
    text = "Shut up, you pathetic coward, nobody likes you and your stupid plan."
    plain = SCORER([text])
    assert plain.item() > 0.9
    for disguise in (change_case, change_whitespace, swap_homoglyphs):
        assert torch.equal(SCORER([disguise(text, seed)]), plain)


@given(words=st.lists(st.sampled_from(["idiot", "fool", "kind", "sun", "scum", "shut up"]), max_size=8))
@settings(deadline=None, max_examples=60)
def test_more_terms_never_lower_a_score(words):
    scores = SCORER([" . ".join(words[:count]) for count in range(len(words) + 1)])
    assert bool((scores.diff() >= 0).all())
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_another_scorer_takes_its_place():
    assert toxicity(["a", "bb"], lambda texts: torch.tensor([len(t) / 10 for t in texts])).tolist() == pytest.approx(
        [0.1, 0.2]
    )
    assert toxicity(["You idiot"]).item() == pytest.approx(load_lexicon()["idiot"])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), r"tensor \[2\], one score a text, got \(3,\)"),
        ([0.0, 0.0], "got list"),
        (torch.tensor([0.0, 1.5]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.0, float("nan")]), r"must lie in \[0, 1\]"),
    ],
)
def test_a_scorer_that_breaks_its_word_is_refused(scores, message):
    with pytest.raises(AssuranceError, match=message):
        toxicity(["a", "b"], lambda texts: scores)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one term"),
        ({" ": 0.5}, "none that is empty"),
        ({"a": 0.0}, "lexicon: a: the weight"),
        ({"a": True}, "got True"),
    ],
)
def test_a_lexicon_without_meaning_is_refused(terms, message):
    with pytest.raises(AssuranceError, match=message):
        LexiconScorer(terms)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("terms: [a]", "must map categories"),
        ("terms: {x: {silly: 2}}", r"terms.x.silly: the weight must lie in \(0, 1\], got 2"),
        ("terms: {x: {silly: 0.5}, y: {Silly: 0.5}}", "'Silly' stands twice"),
    ],
)
def test_a_malformed_lexicon_file_is_named(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(AssuranceError, match=message):
        load_lexicon(path)
