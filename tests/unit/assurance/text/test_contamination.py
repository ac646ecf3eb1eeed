"""Contaminated items, read from the reports that a real corpus build's index gives."""

from __future__ import annotations

import pytest

from datamodules.text.decontamination import EvaluationIndex, contamination
from modules.assurance.subject import AssuranceError
from modules.assurance.text.contamination import contaminated_items


def _words(start: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


ITEMS = [_words(100 * number, 20) for number in range(5)] + ["far too short"]


def _report(documents, ngram=13, items=ITEMS):
    index = EvaluationIndex(ngram)
    for number, text in enumerate(items):
        index.add("test.jsonl", number, {"question": text})
    return contamination(index, documents)


def test_an_item_counts_once_whichever_sources_hold_it():
    reports = {
        "web": _report([f"intro {_words(100, 20)} outro", _words(300, 13)]),
        "books": _report([_words(100, 14), "clean", _words(205, 12)]),  # twelve words are not enough
    }
    units = contaminated_items(reports)
    assert list(units) == ["test.jsonl"]
    assert units["test.jsonl"].tolist() == [True, True, False, False, False]  # 1 and 3 of five; the short one is out


def test_clean_sources_have_no_contaminated_item():
    units = contaminated_items({"web": _report(["nothing of it"]), "books": _report([])})
    assert not units["test.jsonl"].any()
    assert units["test.jsonl"].shape == (5,)


def test_everything_contaminated():
    assert contaminated_items({"web": _report([" ".join(ITEMS)])})["test.jsonl"].all()


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ({}, "no training source was checked"),
        ({"web": None}, "no training source was checked"),
        ({"web": _report([]), "books": None}, "training source 'books' was not checked"),
        ({"web": _report([]), "books": _report([], ngram=8)}, "'web' and 'books' were checked against different"),
        (
            {"web": _report([]), "books": _report([], items=ITEMS[:3])},
            "'web' and 'books' were checked against different",
        ),
        ({"web": {"ngram": 13}}, "a report is malformed"),
        ({"web": {"ngram": 13, "files": {"t": {"items": 2, "too_short": 2, "hits": {"0": {}}}}}}, "1 items hit of 0"),
    ],
)
def test_reports_that_say_too_little_are_refused(reports, message):
    with pytest.raises(AssuranceError, match=message):
        contaminated_items(reports)
