"""The page of a report, for people: one HTML file without scripts or outside resources."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from modules.assurance import words
from modules.assurance.figures import PRINCIPLES
from modules.assurance.markup import KEY_LINE, badge, code, definitions, estimate, table, text, unsigned_banner
from modules.assurance.page_style import document
from modules.assurance.plots import bar, bar_range, interval_plot
from modules.assurance.signature import KEY, KEY_FILE, Signature
from modules.assurance.summary import summary_page

__all__ = ["report_page", "summary_page"]

Entry = Mapping[str, Any]
ORDER = "riceu"
MOST_CONDITIONS = 24  # bars in one chart; the worst ones of more


def report_page(report: Entry, signature: Signature) -> str:
    """``report.html``.

    Args:
        report: as :func:`modules.assurance.report.build` makes it.
        signature: of its canonical bytes.
    """
    card, suite = report["card"], report["suite"]
    title = text(card["title"] or f"{report['family']} module", 120)
    verdict = html.escape(report["verdict"])
    parts = [
        f'<div class="kicker">Assurance report · family {text(report["family"], 60)} · suite {text(suite["name"], 40)} '
        f"· round {report['round']}</div><h1>{title}</h1>",
        f"<p>{text(card['summary'])}</p>" if card["summary"] else "",
        f'<div class="verdict {verdict}"><strong>{html.escape(words.RULINGS[report["verdict"]].upper())}</strong>'
        f"<p>{html.escape(words.headline(report))}</p></div>",
        unsigned_banner(signature.signed),
        _tiles(report),
        _limits(report),
        *(_principle(report, letter) for letter in ORDER),
        _missing(report),
        _deficits(report),
        _objectives(report),
        _card(report),
        _how(report),
        _lineage(report, signature),
    ]
    return document(f"{title}: assurance, round {report['round']}", "\n".join(part for part in parts if part))


def _tiles(report: Entry) -> str:
    tiles = []
    for letter in ORDER:
        mine = [one for one in words.gates(report) if one["figure"][0] == letter]
        fresh = [f for f in report["figures"] if f["name"][0] == letter and f["split"] == "fresh"]
        measured = sum(figure["status"] == "measured" for figure in fresh)
        passed = sum(one["ruling"] == "pass" for one in mine)
        state = ""
        if mine:
            failed = any(one["ruling"] == "fail" for one in mine)
            state = "bad" if failed else "ok" if passed == len(mine) else "open"
        gates = f"{passed} of {words.plural(len(mine), 'gate')} passed" if mine else "no gate"
        tiles.append(
            f'<a class="tile {state}" href="#{letter}"><b>{PRINCIPLES[letter]}</b><span>{gates}</span>'
            f"<span>{measured} of {words.plural(len(fresh), 'figure')} measured</span></a>"
        )
    return f'<nav class="tiles">{"".join(tiles)}</nav>'


def _limits(report: Entry) -> str:
    if not report["judgements"]:
        return ""
    figures, rows = words.by_key(report), []
    order = {"fail": 0, "uncertain": 1, "undefined": 2, "pass": 3}
    for one in sorted(report["judgements"], key=lambda j: (j["kind"] != "gate", order[j["ruling"]], j["figure"])):
        fresh, anchor = (figures.get((one["figure"], split)) for split in ("fresh", "anchor"))
        title = fresh["title"] if fresh else one["figure"]
        place = one["figure"] if fresh and fresh["status"] == "measured" else "missing"
        shown = [e for e in (estimate("fresh", fresh), estimate("anchor", anchor)) if e is not None]
        plot = interval_plot(shown, one["tau"], one["direction"]) if shown else f"<p>{text(one['reason'])}</p>"
        optional = ", optional" if one["optional"] else ""
        note = (
            "" if one["raw"] == one["ruling"] else f'<div class="small soft">plain: {words.RULINGS[one["raw"]]}</div>'
        )
        rows.append(
            (
                f'<a href="#{text(place)}">{text(title, 120)}</a><br>{code(one["figure"])} '
                f'<span class="small soft">{html.escape(one["kind"])}{optional}</span>',
                html.escape(words.limit_text(one)),
                f'<div class="plot">{plot}{_numbers(fresh, anchor)}</div>',
                badge(one["ruling"]) + note,
                _p(one["p_holm"]),
                "–" if one["deficit"] is None else words.number(one["deficit"]),
            )
        )
    head = ("Figure", "Limit", "Measured", "Ruling", ">p", ">Deficit")
    return (
        f'<h2 id="limits">Gates and watches</h2>{KEY_LINE}{table(head, rows, "gates")}<p class="small soft">A gate '
        f"passes only if both intervals lie on the right side. The intervals drawn are plain ones "
        f"({words.confidence(report)}); the ruling also corrects for several gates (Holm) and for repeated looks. "
        "<b>p</b> is Holm's, for gates. The deficit is how far the pessimistic end of the fresh interval falls short, "
        "in units of the limit's scale.</p>"
    )


def _numbers(fresh: Entry | None, anchor: Entry | None) -> str:
    shown = [
        f"<span>{split} {words.measured_text(figure)}</span>"
        for split, figure in (("fresh", fresh), ("anchor", anchor))
        if figure is not None and figure["status"] == "measured"
    ]
    return f'<div class="small soft">{" · ".join(shown)}</div>' if shown else ""


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}" if value < 1 else "1"


def _principle(report: Entry, letter: str) -> str:
    figures = words.by_key(report)
    judged = {one["figure"]: one for one in report["judgements"]}
    measured = [name for name in words.names(report, letter) if figures[name, "fresh"]["status"] == "measured"]
    body = "".join(
        _figure(figures[name, "fresh"], figures.get((name, "anchor")), judged.get(name), words.confidence(report))
        for name in measured
    )
    if not measured:
        body = '<p class="soft">Nothing was measured here.</p>'
    return f'<h2 id="{letter}">{PRINCIPLES[letter]}</h2><p class="soft">{words.QUESTIONS[letter]}</p>{body}'


def _figure(fresh: Entry, anchor: Entry | None, judgement: Entry | None, confidence: str) -> str:
    value, low, high = words.spread(fresh)
    ends = "" if fresh["estimator"] == "exact" else f" <small>{confidence} interval {low} to {high}</small>"
    unit = f" <small>{text(fresh['unit'], 40)}</small>" if fresh["unit"] else ""
    said = html.escape(words.figure_sentence(fresh, anchor))
    if judgement is not None:
        said += f" Asked for: {html.escape(words.limit_text(judgement))} ({html.escape(judgement['kind'])})."
    alarm = ""
    if words.diverges(fresh, anchor):
        alarm = (
            '<p class="small alarm">Fresh and anchor intervals lie apart: training may have come to fit what is '
            "measured.</p>"
        )
    bars = _bars(fresh)
    mark = badge(judgement["ruling"]) if judgement is not None else ""
    return (
        f'<article class="figure" id="{text(fresh["name"])}"><header><h3>{text(fresh["title"])}</h3>{mark}'
        f'<span class="mono">{text(fresh["name"])}</span></header><div class="two{"" if bars else " one"}"><div>'
        f'<div class="big">{value}{unit}{ends}</div><p class="small soft">{said}</p>{alarm}</div>{bars}</div></article>'
    )


def _bars(figure: Entry) -> str:
    """Conditions as bars and baselines beneath; the condition that makes the figure (the worst of them) is marked."""
    conditions, baselines = dict(figure["conditions"]), dict(figure["baselines"])
    if not conditions and not baselines:
        return ""
    value = figure["value"]
    decides = {name for name, mean in conditions.items() if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12)}
    decides = decides if len(conditions) > 1 else set()
    falling = figure["direction"] == "down" or not decides
    ordered = sorted(conditions.items(), key=lambda item: (-item[1] if falling else item[1], item[0]))
    left_out = len(ordered) - MOST_CONDITIONS
    mine = ordered[:MOST_CONDITIONS] if conditions else [("this model", value)]
    low, high = bar_range([*(mean for _, mean in mine), *baselines.values()])
    width = figure["high"] - figure["low"]
    head = "means by condition, the worst first" if decides else "means by condition"
    rows = [f'<span class="head">{head}</span>' if conditions else ""]
    rows += [_row(name, mean, (low, high), "worst" if name in decides else "", width) for name, mean in mine]
    if left_out > 0:
        rows.append(f'<span class="head">and {words.plural(left_out, "condition")} more, in report.json</span>')
    if baselines:
        rows.append('<span class="head">beside it</span>' if conditions else "")
        rows += [_row(name, mean, (low, high), "base", width) for name, mean in sorted(baselines.items())]
    return f'<div class="conditions">{"".join(rows)}</div>'


def _row(name: str, value: float, scale: tuple[float, float], kind: str, width: float) -> str:
    shown = words.number(value, width or None)
    return f'<span class="{kind}">{text(name, 90)}</span>{bar(value, *scale, kind)}<span class="num">{shown}</span>'


def _missing(report: Entry) -> str:
    rows = [(f"{text(title)}<br>{code(name)}", text(why)) for name, title, why in words.not_measured(report)]
    if not rows:
        return '<h2 id="missing">What was not measured</h2><p>Every figure of this suite was measured.</p>'
    return f'<h2 id="missing">What was not measured, and why</h2>{table(("Figure", "Reason"), rows)}'


def _deficits(report: Entry) -> str:
    short = [one for one in report["judgements"] if one["deficit"]]
    if not report["judgements"]:
        return ""
    head = '<h2 id="deficits">Deficits</h2>'
    if not short:
        return f"{head}<p>No deficit: every pessimistic end on fresh units meets its limit.</p>"
    low, high = bar_range([one["deficit"] for one in short])
    rows = "".join(
        f"<span>{code(one['figure'])} {text(one['kind'])}</span>{bar(one['deficit'], low, high, 'worst')}"
        f'<span class="num">{words.number(one["deficit"])}</span>'
        for one in sorted(short, key=lambda one: (-one["deficit"], one["figure"]))
    )
    lead = '<p class="soft">What the next round is to work on, largest first.</p>'
    return f'{head}{lead}<div class="conditions short">{rows}</div>'


def _objectives(report: Entry) -> str:
    head = '<h2 id="objectives">Objectives of this round</h2>'
    objectives = report["objectives"]
    if not objectives or not objectives["values"]:
        return f"{head}<p>No objectives layer: the module was trained as its configuration says.</p>"
    rows = [(code(path), html.escape(words.setting(value))) for path, value in objectives["values"].items()]
    return f"{head}{table(('Knob', 'Value'), rows)}"


def _card(report: Entry) -> str:
    card = report["card"]
    fields = ("intended_use", "out_of_scope", "limitations", "licence")
    rows = [
        (
            name.replace("_", " ").capitalize(),
            text(card[name]) if card[name] else '<span class="soft">not stated</span>',
        )
        for name in fields
    ]
    data = "".join(
        f"<li>{text(one['name'])}: {text(one['licence'] or 'unknown')}, share {words.number(one['share'])}</li>"
        for one in card["data"]
    )
    rows.append(("Training data", f"<ul>{data}</ul>" if data else '<span class="soft">not stated</span>'))
    return f'<h2 id="card">The model</h2>{definitions(rows)}'


def _how(report: Entry) -> str:
    suite = report["suite"]
    used = sorted({f["estimator"] for f in report["figures"] if f["status"] == "measured"})
    estimators = "".join(f"<li><b>{name}</b>: {words.ESTIMATORS[name]}</li>" for name in used)
    probes = ", ".join(text(name) for name in suite["probes"]) or "all that the module offers"
    units = f"{suite['n0'] or 'the suite’s own'} at the first look, {suite['n_max'] or 'the suite’s own'} at most"
    effort = ", ".join(f"{text(name)} {value}" for name, value in suite["effort"].items()) or "the suite’s own"
    rows = [
        ("Suite", f"{text(suite['name'])}; probes: {probes}"),
        ("Units", f"{units}; {100 * suite['anchor_share']:g} % of all are anchor units"),
        ("Level", f"{suite['alpha']:g}; intervals of {words.confidence(report)}"),
        ("Effort", effort),
        ("Seeds", f"root {report['seeds']['root']}; fresh units of round {report['round']}"),
        ("Estimators", f"<ul>{estimators}</ul>"),
    ]
    return (
        '<h2 id="how">How it was measured</h2><p>A unit is what is independent of all others: an episode, a prompt, an '
        "instance. <b>Fresh</b> units are new in every round; <b>anchor</b> units never change and steer nothing, so a "
        "gain on fresh units alone shows. While a gate is undecided, units are doubled; what stays undecided is never "
        f"a pass.</p>{definitions(rows)}"
    )


def _lineage(report: Entry, signature: Signature) -> str:
    lineage, objectives = report["lineage"], report["objectives"] or {}
    more = {name: value for name, value in lineage.items() if name not in ("model_digest", "parent_report")}
    state = "HMAC-SHA256, in signature.json" if signature.signed else f"<b>{words.UNSIGNED}</b>"
    rows = [
        ("Model", code(lineage["model_digest"])),
        ("Last round’s report", code(lineage["parent_report"]) if lineage["parent_report"] else "none: the first"),
        ("Objectives layer", code(objectives["sha256"]) if objectives.get("sha256") else "none"),
        ("Declared limits", code(report["limits"]["digest"])),
        ("Samples", f"{code(report['samples']['sha256'])}, {words.plural(report['samples']['lines'], 'line')}"),
        ("This report", code(signature.sha256)),
        ("Signature", state),
        *((text(name), code(value)) for name, value in more.items()),
    ]
    return (
        f'<h2 id="lineage">Lineage and signature</h2><p class="soft">Digests are sha256.</p>{definitions(rows)}'
        "<h3>How to verify</h3><pre>python -m train verify PATH</pre><p>PATH is this folder, or that of the whole "
        "cycle, whose ledger links every round to the one before. Any changed byte of the report, its samples, its "
        f"card or this page is found. With the key in {code(KEY)} or {code(KEY_FILE)} it also checks who signed. "
        f"{words.INTEGRITY}: a signature says that the holder of the key wrote these numbers, not that they "
        "were measured well.</p>"
    )
