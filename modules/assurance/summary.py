"""The page of a cycle: its rounds side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from modules.assurance import words
from modules.assurance.markup import KEY_LINE, badge, code, estimate, table, text, unsigned_banner
from modules.assurance.page_style import document
from modules.assurance.plots import bar, bar_range, trajectory
from modules.assurance.signature import PAGE, signing_key

Entry = Mapping[str, Any]


def summary_page(
    rounds: Sequence[Entry], *, title: str = "", signed: bool | None = None, problems: Sequence[str] = ()
) -> str:
    """``summary.html``: verdicts, trajectories of the judged figures, deficits and knobs over the rounds.

    Args:
        rounds: those that are finished, in order: ``report`` (as :func:`modules.assurance.report.build` makes it),
            ``decision`` (``outcome`` that ended the cycle or empty, ``alarms``: figures that gained on fresh units
            alone) and ``knobs`` (path -> value); the last two may be missing.
        title: of the experiment.
        signed: whether the reports carry an HMAC; ``None``: as the environment has a key.
        problems: of :func:`modules.assurance.ledger.verify_path`.
    """
    name = text(title or "Alignment cycle", 120)
    reports = [one["report"] for one in rounds]
    body = [f'<div class="kicker">Alignment cycle · {words.plural(len(rounds), "round")}</div><h1>{name}</h1>']
    if problems:
        items = "".join(f"<li>{text(problem)}</li>" for problem in problems)
        body.append(f'<div class="unsigned"><strong>EVIDENCE CHANGED</strong><ul>{items}</ul></div>')
    if not rounds:
        return document(f"{name}: summary", "\n".join([*body, "<p>No round is finished yet.</p>"]))
    body += [
        _verdict(rounds),
        unsigned_banner(signing_key() is not None if signed is None else signed),
        _rounds(rounds),
        _trajectories(reports),
        _deficits(reports),
        _knobs(rounds),
        '<h2 id="verify">How to verify</h2><pre>python -m train verify PATH</pre><p>PATH is the folder that holds this '
        "page: the ledger, every report, its samples and its objectives are checked.</p>",
    ]
    return document(f"{name}: summary", "\n".join(part for part in body if part))


def _decision(one: Entry) -> Entry:
    return one.get("decision") or {}


def _verdict(rounds: Sequence[Entry]) -> str:
    last = rounds[-1]["report"]
    outcome = words.clean(_decision(rounds[-1]).get("outcome", ""))
    so_far = f"After {words.plural(len(rounds), 'round')}"
    ended = f"{so_far} the cycle ended: {outcome}." if outcome else f"{so_far} the cycle goes on."
    return (
        f'<div class="verdict {html.escape(last["verdict"])}"><strong>'
        f"{html.escape(words.RULINGS[last['verdict']].upper())}</strong><div><p>{html.escape(ended)}</p>"
        f"<p>{html.escape(words.headline(last))}</p></div></div>"
    )


def _rounds(rounds: Sequence[Entry]) -> str:
    rows = []
    for one in rounds:
        report, decisive = one["report"], words.gates(one["report"])
        number = int(report["round"])
        passed = sum(gate["ruling"] == "pass" for gate in decisive)
        why = html.escape(words.headline(report))
        if alarms := _decision(one).get("alarms"):
            which = ", ".join(code(alarm) for alarm in alarms)
            why += f'<div class="small alarm">Gained on fresh units and not on anchor units: {which}.</div>'
        rows.append(
            (
                f'<a href="round_{number:02d}/assurance/{PAGE}">round {number}</a>',
                badge(report["verdict"]),
                f"{passed} of {len(decisive)}",
                why,
            )
        )
    return f'<h2 id="rounds">Rounds</h2>{table(("Round", "Verdict", "Gates passed", "Why"), rows, "rounds")}'


def _judged(reports: Sequence[Entry]) -> list[Entry]:
    """The latest judgement of every figure, gates first."""
    latest = {one["figure"]: one for report in reports for one in report["judgements"]}
    return sorted(
        latest.values(), key=lambda one: (one["kind"] != "gate", "riceu".index(one["figure"][0]), one["figure"])
    )


def _trajectories(reports: Sequence[Entry]) -> str:
    shown, absent = [], []
    every = [words.by_key(report) for report in reports]
    for one in _judged(reports):
        name = one["figure"]
        keys = {split: (name, split) for split in ("fresh", "anchor")}
        title = next((found[key]["title"] for found in reversed(every) for key in keys.values() if key in found), name)
        points = []
        for report, found in zip(reports, every, strict=True):
            both = {split: estimate(f"round {report['round']}", found.get(key)) for split, key in keys.items()}
            points.append({split: point for split, point in both.items() if point is not None})
        plot = trajectory(points, one["tau"], one["direction"], f"{words.clean(title, 120)} over rounds")
        if not plot:
            absent.append(f"{text(title, 120)} ({code(name)})")
            continue
        apart = words.diverges(*(every[-1].get(key) for key in keys.values()))
        alarm = '<p class="small alarm">Fresh and anchor intervals lie apart.</p>' if apart else ""
        shown.append(
            f'<article class="figure"><header><h3>{text(title, 120)}</h3>{badge(one["ruling"])}</header>'
            f'<p class="small soft">{code(name)} {html.escape(one["kind"])}: {html.escape(words.limit_text(one))}.</p>'
            f"{plot}{alarm}</article>"
        )
    if not shown and not absent:
        return ""
    rest = f"<p>Not measured in any round: {'; '.join(absent)}.</p>" if absent else ""
    return f'<h2 id="figures">Figures against their limits</h2>{KEY_LINE}<div class="grid">{"".join(shown)}</div>{rest}'


def _deficits(reports: Sequence[Entry]) -> str:
    every = [{one["figure"]: one["deficit"] for one in report["judgements"]} for report in reports]
    scale = bar_range([value for found in every for value in found.values() if value is not None])
    rows = []
    for one in _judged(reports):
        values = [found.get(one["figure"]) for found in every]
        cells = [words.number(value) + (bar(value, *scale, "worst") if value else "") for value in values]
        rows.append((f'{code(one["figure"])} <span class="small soft">{html.escape(one["kind"])}</span>', *cells))
    if not rows:
        return ""
    head = ("Figure", *(f"Round {report['round']}" for report in reports))
    return (
        '<h2 id="deficits">Deficits</h2><p class="soft">How far the pessimistic end of the fresh interval falls short '
        f"of the limit, in units of the limit's scale.</p>{table(head, rows, 'equal')}"
    )


def _knobs(rounds: Sequence[Entry]) -> str:
    every = [one.get("knobs") or (one["report"]["objectives"] or {}).get("values") or {} for one in rounds]
    paths = sorted({path for values in every for path in values})
    if not paths:
        return '<h2 id="knobs">Knobs</h2><p>No round had an objectives layer.</p>'
    rows = []
    for path in paths:
        cells, before = [], None
        for values in every:
            value = values.get(path)
            cells.append(_move(value, before))
            before = before if value is None else value
        rows.append((code(path), *cells))
    head = ("Knob", *(f"Round {one['report']['round']}" for one in rounds))
    return (
        '<h2 id="knobs">Knobs</h2><p class="soft">What each round was trained with; moves are bold.</p>'
        f"{table(head, rows, 'equal')}"
    )


def _move(value: Any, before: Any) -> str:
    if value is None:
        return "–"
    shown = html.escape(words.setting(value))
    if before is None or value == before:
        return shown
    arrow = ""
    if isinstance(value, int | float) and isinstance(before, int | float):
        arrow = " ↑" if value > before else " ↓"
    return f'<span class="moved">{shown}{arrow}</span>'
