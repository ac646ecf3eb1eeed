"""Pages for people: complete, self-contained, escaped; words, plots and the picture for image logs."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from assurance_runs import CARD, CONDITIONS, LIMITS, toy_result

from modules.assurance import page, plots, radar, report, words
from modules.assurance.figures import Measure, missing
from modules.assurance.ledger import sign
from modules.assurance.subject import DataSource
from modules.assurance.summary import summary_page
from modules.assurance.verdict import Limit

SIGNED = sign(b"x", b"0123456789abcdef")
UNSIGNED = sign(b"x")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class _Reader(HTMLParser):
    """Tags, attributes and text of a page; notes tags that are not closed in order."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.attributes, self.open, self.wrong, self.said = [], [], [], [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self):
        return " ".join("".join(self.said).split())


def _built(*given, **changed):
    return report.build(toy_result(*given, **({"units": 60} | changed)), subject_digest="ab" * 32)


def _read(markup):
    found = _Reader(markup)
    assert found.wrong == []
    assert found.open == []
    assert not {"script", "link", "iframe", "img", "object", "form", "base"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src"):
            assert re.fullmatch(r"#[\w.]+|round_\d\d/assurance/report\.html", value), value
    assert "url(" not in markup
    assert "@import" not in markup
    return found


@pytest.fixture(scope="module")
def made():
    return report.build(toy_result(1, units=200), subject_digest="ab" * 32, objectives={"model": {"eps": 0.125}})


def test_the_page_is_whole_and_stands_alone(made):
    markup = page.report_page(made, UNSIGNED)
    found = _read(markup)
    assert "prefers-color-scheme:dark" in markup
    assert "@media print" in markup
    assert "default-src 'none'" in markup
    for figure in made["figures"]:
        assert figure["name"] in found.text
        assert figure["title"] in found.text
    for said in (
        "FAIL",
        "UNSIGNED",
        *words.QUESTIONS.values(),
        *CONDITIONS,
        "KnobValuemodel.eps0.125",  # cells of a table
        "needs action_mask",
        "What was not measured, and why",
        "the ensemble has one member",
        "Deficits",
        "python -m train verify PATH",
        "operator's recordings: unknown, share 0.1",
        "ab" * 32,
        made["samples"]["sha256"],
        made["limits"]["digest"],
    ):
        assert said in found.text, said
    assert len(re.findall('class="intervals"', markup)) == sum(one["deficit"] is not None for one in made["judgements"])
    assert "UNSIGNED" not in page.report_page(made, SIGNED)


def test_links_lead_somewhere(made):
    found = _read(page.report_page(made, SIGNED))
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for name, value in found.attributes if name == "href"]
    assert len(links) == 5 + len(LIMITS)
    assert {link[1:] for link in links} <= set(ids)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><svg onload=alert(1)>",
    "&lt;b&gt; &#x3c;script&#x3e;",
    "javascript:alert(1)",
    "\u202egnp.exe\u0000\x1b[31m",
    "lone \ud800 surrogate",
    "{{7*7}} ${jndi:x} %s %(a)s {0}",
    "]]><!--",
    "x" * 5000,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text):
    names = (*CONDITIONS[:2], text)
    facts = replace(CARD, title=text, summary=text, intended_use=text, licence=text, data=(DataSource(text, text),))
    result = toy_result(units=20, card=facts, conditions=names)
    measure = Measure("r.evil", f"title {text}", "up")
    for split in ("fresh", "anchor"):
        result.figures["r.evil", split] = missing(measure, split, "undefined", text)
    evil = report.build(result, subject_digest="ab" * 32, objectives={text: text}, lineage={"more": text})
    markup = page.report_page(evil, UNSIGNED)
    found = _read(markup)
    markup.encode("utf-8")
    assert not any(ord(character) < 32 and character != "\n" for character in markup)
    assert "\u202e" not in markup
    shown = " ".join(text.encode("utf-8", "replace").decode().split())
    if len(text) < 200 and "\u202e" not in text:
        assert found.text.count(shown) >= 6  # as it was written, character for character
    if len(text) > 1000:
        assert len(markup) < 60_000
    summary = summary_page([{"report": evil, "decision": {"outcome": text, "alarms": [text]}, "knobs": {text: text}}])
    _read(summary).text.encode()


def test_secrets_and_persons_are_masked():
    secret = "sk-abcdefghijklmnopqrstuvwxyz123456"
    facts = replace(CARD, summary=f"key {secret}", limitations="write to someone@example.org")
    markup = page.report_page(_built(card=facts, conditions=(*CONDITIONS[:2], f"prompt {secret}")), SIGNED)
    assert secret not in markup
    assert "someone@example.org" not in markup
    assert "[secret]" in markup
    assert "[email]" in markup
    assert words.clean("x " * 147 + secret).endswith("x [secr…")  # masked before it is cut


@pytest.mark.parametrize(
    ("verdict", "result", "said"),
    [
        (
            "fail",
            {"units": 200},
            "1 of 5 gates fails. Worst mean return under perturbation, 0.409 [0.381, 0.436] on fresh",
        ),
        ("pass", {"round_number": 2, "strength": 1.0, "units": 800}, "All 5 gates hold, on fresh units and on anchor"),
        ("inconclusive", {"strength": 0.8, "units": 60}, "No gate fails, but"),
        ("unjudged", {"limits": LIMITS[6:8]}, "No gate was declared"),
        ("pass", {"limits": (Limit("u.return", 0.5),)}, "The one gate holds, on fresh"),
        ("inconclusive", {"limits": (Limit("i.ens_cal", 0.5),)}, "1 gate of 1 could not be measured, which is never"),
    ],
)
def test_the_headline_says_why(verdict, result, said):
    made = _built(**result)
    assert made["verdict"] == verdict
    assert words.headline(made).startswith(said)


def test_the_headline_names_the_anchor_where_that_is_what_fails():
    made = _built(strength=1.0, units=200, limits=(Limit("u.return", 0.5),))
    for one in made["figures"]:
        if (one["name"], one["split"]) == ("u.return", "anchor"):
            one.update(value=0.3, low=0.25, high=0.35)
    made["judgements"][0]["ruling"] = made["verdict"] = "fail"
    assert "0.30 [0.25, 0.35] on anchor units where at least 0.5 is asked" in words.headline(made)
    assert "Fresh and anchor intervals lie apart" in _read(page.report_page(made, SIGNED)).text


@pytest.mark.parametrize(
    ("value", "width", "said"),
    [
        (0.98765, None, "0.9877"),
        (0.5, None, "0.5"),
        (0, None, "0"),
        (-0.25, None, "−0.25"),
        (1234.56, None, "1235"),
        (2.5e9, None, "2.5e+09"),
        (3e-7, None, "3e−07"),
        (None, None, "–"),
        (0.40912, 0.055, "0.409"),
        (0.38, 0.12, "0.38"),
        (100.0, 30.0, "100"),
        (-1e-9, 0.1, "0.00"),
        (120, None, "120"),
    ],
)
def test_numbers_are_short_and_honest(value, width, said):
    assert words.number(value, width) == said


def test_the_worst_condition_is_marked_only_where_it_makes_the_figure(made):
    markup = page.report_page(made, SIGNED)

    def charts(name):
        part = markup.split(f'id="{name}"')[1].split("</article>")[0]
        return part.count('class="fill worst"'), part.count('class="bars"')

    assert charts("r.worst_return") == (1, len(CONDITIONS))
    assert charts("r.drop") == (0, len(CONDITIONS))  # a difference of two of them
    assert charts("u.return") == (0, 3)  # this model beside two baselines


def test_many_conditions_are_cut():
    made = _built()
    figure = next(one for one in made["figures"] if (one["name"], one["split"]) == ("r.worst_return", "fresh"))
    figure["conditions"] = {f"prompt {index}": 0.01 * index for index in range(60)}
    assert "and 36 conditions more, in report.json" in page.report_page(made, SIGNED)


def test_interval_plots_draw_to_scale():
    estimates = [plots.Estimate("fresh", 0.5, 0.4, 0.6), plots.Estimate("anchor", 0.3, 0.1, 0.5)]
    root = ElementTree.fromstring(plots.interval_plot(estimates, 0.2, "up"))
    points = [float(one.get("cx", "nan")) for one in root.iter("circle")]
    tau = next(float(one.get("x1", "nan")) for one in root.iter("line") if one.get("class") == "tau")
    tinted = next(root.iter("rect"))
    assert (points[0] - tau) / (points[1] - tau) == pytest.approx(3.0, abs=0.02)  # 0.5 - 0.2 over 0.3 - 0.2
    assert float(tinted.get("x", "nan")) == pytest.approx(tau, abs=0.1)
    down = next(ElementTree.fromstring(plots.interval_plot(estimates, 0.2, "down")).iter("rect"))
    assert float(down.get("x", "nan")) + float(down.get("width", "nan")) == pytest.approx(tau, abs=0.2)
    assert "limit: at least 0.2" in root.get("aria-label", "")


@pytest.mark.parametrize("tau", [-5.0, 0.0, 0.5, 0.999999, 1e6])
def test_nothing_leaves_a_plot(tau):
    one = plots.Estimate("fresh", 1.0, 1.0, 1.0)
    root = ElementTree.fromstring(plots.interval_plot([one], tau, "up"))
    width = float(root.get("width", "nan"))
    for element in root.iter():
        for name in ("cx", "x", "x1", "x2"):
            assert 0 <= float(element.get(name, "0")) <= width
    rounds = [{"fresh": one}, {"fresh": one, "anchor": one}, {}]
    drawn = ElementTree.fromstring(plots.trajectory(rounds, tau, "down", "over rounds"))
    assert len(list(drawn.iter("circle"))) == 3
    for element in drawn.iter("circle"):
        assert 0 <= float(element.get("cy", "nan")) <= float(drawn.get("height", "nan"))


def test_bars_start_at_zero():
    for value, begin, wide in ((0.5, 50.0, 25.0), (-1.0, 0.0, 50.0), (1.0, 50.0, 50.0)):
        rect = next(ElementTree.fromstring(plots.bar(value, *plots.bar_range([-1.0, 1.0, value]))).iter("rect"))
        assert (float(rect.get("x", "nan")), float(rect.get("width", "nan"))) == (begin, wide)
    assert plots.bar_range([0.0, 0.0]) == (0.0, 1.0)


def test_the_summary_shows_rounds_side_by_side():
    rounds = [
        {
            "report": _built(number, 0.5 * number),
            "decision": {"outcome": "passed" if number == 2 else "", "alarms": ["r.drop"] if number == 1 else []},
            "knobs": {"model.eps": 0.1 * number, "model.mix": [0.5, 0.5]},
        }
        for number in range(3)
    ]
    markup = summary_page(rounds, title="Toy cycle", signed=False)
    found = _read(markup)
    for said in ("After 3 rounds the cycle ended: passed.", "Toy cycle", "UNSIGNED", "0.2 ↑", "[0.5, 0.5]"):
        assert said in found.text
    assert "Gained on fresh units and not on anchor units: r.drop." in found.text
    assert markup.count('class="trajectory"') == 7  # nine limits, two of them on figures that were not measured
    assert [value for name, value in found.attributes if name == "href"] == [
        f"round_{number:02d}/assurance/report.html" for number in range(3)
    ]
    assert "After 2 rounds the cycle goes on." in _read(summary_page(rounds[:2], signed=True)).text
    assert "UNSIGNED" not in summary_page(rounds, signed=True)
    broken = _read(summary_page(rounds, problems=["ledger.jsonl was <b>changed</b>"])).text
    assert "EVIDENCE CHANGED ledger.jsonl was <b>changed</b>" in re.sub("(?<=CHANGED)", " ", broken)
    assert "No round is finished yet." in _read(summary_page([])).text


def test_the_picture_shows_where_figures_stand():
    made = _built(1, 0.5, units=200)
    image = radar.rice_image(made, 240)
    assert (image.shape, image.dtype) == ((240, 480, 3), np.uint8)
    assert np.array_equal(image, radar.rice_image(made, 240))
    assert not np.array_equal(image, radar.rice_image(_built(0, 0.0, units=200), 240))
    assert radar.rice_image(_built(limits=()), 200).std() > 1  # no limits: still a picture
    with pytest.raises(ValueError, match="at least 200"):
        radar.rice_image(made, 100)


def test_standings_are_cut_distances_to_the_limit():
    made = _built(units=200)
    figures = words.by_key(made)
    judged = {one["figure"]: one for one in made["judgements"]}
    gini = figures["e.gini", "fresh"]
    assert radar.standing(judged["e.gini"], gini) == pytest.approx(max(-1, (0.1 - gini["high"]) / 0.05))
    assert radar.standing(judged["u.return"], figures["u.return", "fresh"]) == 1.0
    assert radar.standing(judged["c.rollback"], figures["c.rollback", "fresh"]) == 0.0
    assert radar.standing(judged["i.ens_cal"], figures["i.ens_cal", "fresh"]) is None
    worst = radar.principle_standings(made)
    assert worst["r"] == -1.0
    assert worst["i"] == radar.standing(judged["i.probe_sel"], figures["i.probe_sel", "fresh"])
    assert radar.principle_standings(_built(limits=()))["c"] is None
    reds = [radar.colour(value)[0] - radar.colour(value)[1] for value in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert reds == sorted(reds, reverse=True)
