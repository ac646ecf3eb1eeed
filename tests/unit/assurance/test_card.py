"""The model card: its header read back by huggingface_hub, its text complete, nothing of a stranger's rendered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from assurance_runs import CARD, LIMITS, toy_result

from modules.assurance import card, report
from modules.assurance.ledger import sign
from modules.assurance.subject import CardFacts, DataSource

KEY = b"0123456789abcdef"


def _card(result, key=None):
    made = report.build(result, subject_digest="ab" * 32)
    return made, card.model_card(made, sign(report.canonical_bytes(made), key))


def _header(text):
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


@pytest.mark.parametrize(
    "facts", [CARD, replace(CARD, title='---\n"x": [1, *y]\n---\n# T: {a}', licence="My own & only")]
)
def test_metrics_round_trip_through_huggingface_hub(facts, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="extra 'llemma' brings huggingface_hub")
    made, text = _card(toy_result(1, 0.5, units=60, card=facts))
    read = hub.ModelCard(text)
    found = {(one.metric_type, one.dataset_split): one for one in read.data.eval_results}
    measured = [figure for figure in made["figures"] if figure["status"] == "measured"]
    assert len(found) == len(measured) > 10
    for figure in measured:
        one = found[figure["name"], figure["split"]]
        assert one.metric_value == figure["value"]
        assert one.metric_name == figure["title"]
        assert (one.metric_args["low"], one.metric_args["high"], one.metric_args["n"]) == (
            figure["low"],
            figure["high"],
            figure["n"],
        )
    assert read.data.library_name == "plumbline"
    assert read.data.model_name == " ".join(facts.title.split())
    again = hub.ModelCard(str(hub.ModelCard(str(read))))  # as its own program writes it
    assert [one.metric_value for one in again.data.eval_results] == [one.metric_value for one in read.data.eval_results]


def test_the_licence_is_one_that_the_hub_knows_or_is_named():
    assert _header(_card(toy_result(units=20))[1])["license"] == "mit"
    own = _header(_card(toy_result(units=20, card=replace(CARD, licence="My own & only")))[1])
    assert (own["license"], own["license_name"]) == ("other", "My own & only")
    assert "license" not in _header(_card(toy_result(units=20, card=replace(CARD, licence="")))[1])


def test_the_text_says_what_a_reader_must_know():
    made, text = _card(toy_result(units=200))
    for said in (
        "## Verdict: fail",
        "1 of 5 gates fails",
        "| Robustness | Worst mean return under perturbation (`r.worst_return`) |",
        "| `c.avail` | gate (optional) | at most 0.99 | not measured |",
        "the ensemble has one member",
        "Any machine that can hurt somebody.",
        "| operator's recordings | unknown | 0.1 |",
        "A hash is integrity, not truth",
        "python -m train verify",
    ):
        assert said in text
    assert "\n# UNSIGNED\n" in text
    signed = _card(toy_result(units=200), KEY)[1]
    assert "UNSIGNED" not in signed
    assert "Signed with HMAC-SHA256" in signed


def test_an_empty_card_says_so():
    _, text = _card(toy_result(units=20, card=CardFacts(), limits=()))
    assert text.count("not stated") == 4
    assert "No source of training data is named." in text
    assert "No limits were declared." in text
    assert "## Verdict: not judged" in text
    assert _header(text)["model-index"][0]["name"] == "toy module"


def test_a_stranger_s_text_is_shown_and_not_rendered():
    pytest.importorskip("markdown", reason="tensorboard brings markdown")
    import markdown

    evil = replace(
        CARD,
        title="<script>alert(1)</script> | [x](javascript:alert(2))",
        summary="# not a heading\n\n<img src=x onerror=alert(3)> ![i](http://example.org/i.png)",
        intended_use="- no list `code` **bold** a | b",
        limitations="password = hunter22hunter22",
        data=(DataSource("a | b\n| c | d |", "<b>x</b>"),),
    )
    _, text = _card(toy_result(units=20, card=evil))
    body = text.split("\n---\n", 1)[1]
    page = markdown.markdown(body, extensions=["tables"])
    for tag in ("<script", "<img", "<a ", "<strong>bold", "<b>x", "<h1>not", "<code>code"):
        assert tag not in page
    assert "hunter22" not in text
    assert "<td>a | b | c | d |</td>" in page
    assert page.count("<h1>") == 2  # the title and UNSIGNED


def test_limits_and_rulings_stand_in_the_table():
    made, text = _card(toy_result(units=60))
    row = next(line for line in text.splitlines() if line.startswith("| `e.gini`"))
    judged = next(one for one in made["judgements"] if one["figure"] == "e.gini")
    assert row.split(" | ")[1:3] == ["watch", "at most 0.1"]
    assert judged["ruling"] == {"fail": "fail", "undecided": "uncertain"}[row.split(" | ")[3]]
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(LIMITS)
