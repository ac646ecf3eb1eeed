"""Figures and verdicts in words: what cards and pages say of a report. Everything here takes the report's JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modules.assurance.text.privacy import mask_secrets

Entry = Mapping[str, Any]
LONGEST = 300  # characters of a text that came from outside
LONGEST_READ = 20_000  # what lies beyond is never shown, so it need not be masked
QUESTIONS: Mapping[str, str] = {
    "r": "Does behaviour hold up under attack, shift and noise?",
    "i": "Can people see how it works and why it decides?",
    "c": "Can people steer, bound and stop it?",
    "e": "Does its conduct fit shared norms and values?",
    "u": "Does it do its job? A model that does nothing must not pass.",
}
ESTIMATORS: Mapping[str, str] = {
    "exact": "no sampling: a closed form or an exhaustive check",
    "proportion": "share of units, Clopper-Pearson interval",
    "worst_proportion": "share in the worst condition, Clopper-Pearson intervals at level alpha / conditions",
    "mean": "mean over units, Student's t interval",
    "bootstrap": "statistic over units, percentile bootstrap interval",
}
RULINGS: Mapping[str, str] = {
    "pass": "pass",
    "fail": "fail",
    "uncertain": "undecided",
    "inconclusive": "inconclusive",
    "undefined": "not measured",
    "unjudged": "not judged",
}
UNSIGNED = "UNSIGNED"
INTEGRITY = "A hash is integrity, not truth"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\uffff]")


def clean(text: object, most: int = LONGEST) -> str:
    """One line of ``text`` that is safe to show: no control or direction marks, secrets masked, at most ``most``
    characters."""
    line = str(text)[:LONGEST_READ].encode("utf-8", "replace").decode()  # half a surrogate pair has no UTF-8
    line = mask_secrets(_CONTROLS.sub("", " ".join(line.split())))
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def number(value: float | None, width: float | None = None) -> str:
    """``value`` at four significant digits, or to two of an interval's ``width``."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4 and not width:
        return f"{value:.3g}".replace("-", "−")
    if width:
        places = min(6, max(0, 1 - math.floor(math.log10(width))))
    else:
        places = 0 if size >= 1000 else max(0, 3 - math.floor(math.log10(size))) if size else 0
    text = f"{value:.{places}f}"
    if "." in text and not width:
        text = text.rstrip("0").rstrip(".")
    text = "0" if not text.strip("-0.") and not width else text
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def spread(figure: Entry) -> tuple[str, str, str]:
    """Value and both ends of the interval, at one number of places."""
    width = (figure["high"] - figure["low"]) or None
    value, low, high = (number(figure[name], width) for name in ("value", "low", "high"))
    return value, low, high


def measured_text(figure: Entry | None) -> str:
    """``0.41 [0.38, 0.44]``, or a dash."""
    if figure is None or figure["status"] != "measured":
        return "–"
    value, low, high = spread(figure)
    return value if figure["estimator"] == "exact" else f"{value} [{low}, {high}]"


def limit_text(judgement: Entry) -> str:
    """``at least 0.6``."""
    return f"{'at least' if judgement['direction'] == 'up' else 'at most'} {number(judgement['tau'])}"


def by_key(report: Entry) -> dict[tuple[str, str], Entry]:
    """(name, split) -> figure."""
    return {(figure["name"], figure["split"]): figure for figure in report["figures"]}


def names(report: Entry, principle: str) -> list[str]:
    """Names of a principle's figures: the judged ones first, then measured ones, then the rest."""
    judged = {one["figure"]: one["kind"] != "gate" for one in report["judgements"]}
    fresh = {figure["name"]: figure for figure in report["figures"] if figure["split"] == "fresh"}
    mine = [name for name in fresh if name[0] == principle]
    return sorted(
        mine, key=lambda name: (name not in judged, judged.get(name), fresh[name]["status"] != "measured", name)
    )


def gates(report: Entry) -> list[Entry]:
    """Judgements that decide the verdict, without optional ones on figures that are not there."""
    every = [one for one in report["judgements"] if one["kind"] == "gate"]
    return [one for one in every if not (one["optional"] and one["ruling"] == "undefined")]


def shortfall(judgement: Entry, figure: Entry | None) -> float:
    """How far the pessimistic end lies beyond the limit (negative: short of it), in the limit's scale."""
    if figure is None or figure["status"] != "measured":
        return -math.inf
    sign = 1.0 if judgement["direction"] == "up" else -1.0
    bound = figure["low"] if sign > 0 else figure["high"]
    return sign * (judgement["tau"] - bound) / judgement["scale"]


def headline(report: Entry) -> str:
    """One to three sentences that say why the verdict is what it is."""
    decisive, figures = gates(report), by_key(report)
    total = len(decisive)
    if not total:
        return "No gate was declared: the figures are measured and not judged."
    if report["verdict"] == "pass":
        every = "The one gate holds" if total == 1 else f"All {total} gates hold"
        return f"{every}, on fresh units and on anchor units."
    failed = report["verdict"] == "fail"
    missed = [one for one in decisive if one["ruling"] == ("fail" if failed else "uncertain")]
    lacking = [one for one in decisive if one["ruling"] == "undefined"]
    parts = []
    if missed:
        one = len(missed) == 1
        verb = ("fails" if one else "fail") if failed else ("is undecided" if one else "are undecided")
        start = "" if failed else "No gate fails, but "
        parts.append(f"{start}{len(missed)} of {total} {'gate' if total == 1 else 'gates'} {verb}.")
        ranked = [(*_weak_split(gate, figures), gate) for gate in missed]
        short, split, worst = max(ranked, key=lambda item: item[0])
        figure = figures[worst["figure"], split]
        lead = "" if one else "Furthest from its limit: "
        clear = "" if short > 0 else "; that clears the limit, but not after correction for several gates and looks"
        parts.append(
            f"{lead}{clean(figure['title'])}, {measured_text(figure)} on {split} units where {limit_text(worst)} is "
            f"asked{clear}."
        )
    if lacking:
        be = "gate" if len(lacking) == 1 else "gates"
        parts.append(f"{len(lacking)} {be} of {total} could not be measured, which is never a pass.")
    return " ".join(parts)


def _weak_split(judgement: Entry, figures: Mapping[tuple[str, str], Entry]) -> tuple[float, str]:
    """Shortfall and name of the fresh split where that misses the limit, else of the worse one."""
    fresh, anchor = (shortfall(judgement, figures.get((judgement["figure"], split))) for split in ("fresh", "anchor"))
    return (fresh, "fresh") if fresh > 0 or fresh >= anchor else (anchor, "anchor")


def figure_sentence(fresh: Entry, anchor: Entry | None) -> str:
    """How a measured figure came about: units, estimator, the anchor split, what is better."""
    better = "More is better." if fresh["direction"] == "up" else "Less is better."
    if fresh["estimator"] == "exact":
        return f"Exact: {ESTIMATORS['exact']}. {better}"
    parts = [f"From {plural(fresh['n'], 'fresh unit')}: {ESTIMATORS[fresh['estimator']]}."]
    if anchor is not None and anchor["status"] == "measured":
        a_value, a_low, a_high = spread(anchor)
        parts.append(f"Anchor units ({anchor['n']:,}): {a_value}, {a_low} to {a_high}.")
    elif anchor is not None:
        parts.append(f"Anchor units: not measured ({clean(anchor['reason'])}).")
    return " ".join([*parts, better])


def diverges(fresh: Entry | None, anchor: Entry | None) -> bool:
    """Whether the splits' intervals lie apart: a sign of fitting one's training to what is measured."""
    if fresh is None or anchor is None or fresh["status"] != "measured" or anchor["status"] != "measured":
        return False
    return fresh["low"] > anchor["high"] or anchor["low"] > fresh["high"]


def not_measured(report: Entry) -> list[tuple[str, str, str]]:
    """(name, title, reason) of every figure that was not, a split alone being named."""
    found = []
    figures = by_key(report)
    for (name, split), figure in figures.items():
        if figure["status"] == "measured":
            continue
        fresh = figures.get((name, "fresh"))
        if split == "anchor" and fresh is not None and fresh["status"] != "measured":
            continue
        kind = "does not apply" if figure["status"] == "not_applicable" else "undefined"
        where = " (anchor units)" if split == "anchor" else ""
        found.append((name, f"{figure['title']}{where}", f"{kind}: {figure['reason']}"))
    return found


def plural(count: int, noun: str) -> str:
    """``1 gate``, ``2 gates``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def confidence(report: Entry) -> str:
    """``95 %``."""
    return f"{100 * (1 - report['suite']['alpha']):g} %"


def setting(value: Any) -> str:
    """A knob's value: numbers short, lists and mappings in brackets."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return number(value) if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key, 60)}: {setting(one)}" for key, one in value.items()) or "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(setting(one) for one in value) + "]"
    return clean(value, 120)
