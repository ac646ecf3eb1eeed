"""The model card: Hugging Face's format, the figures in its ``model-index`` block.

The header is plain YAML, written here: ``huggingface_hub`` reads it back, and nothing needs it to write one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from modules.assurance import words
from modules.assurance.figures import PRINCIPLES
from modules.assurance.signature import Signature

Entry = Mapping[str, Any]
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_OPENING = re.compile(r"^([-+#=]|\d+(?=[.)]))")  # would begin a list or a heading
_HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")


def _md(value: object, most: int = words.LONGEST) -> str:
    """Outside text as Markdown that shows it as it is: no markup, no HTML, no table cell broken."""
    line = words.clean(value, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(r"\\\1", line)
    return _OPENING.sub(lambda found: f"&#{ord(found[0])};" if len(found[0]) == 1 else f"{found[0]}&#8203;", line)


def model_card(report: Entry, signature: Signature) -> str:
    """``card.md``.

    Args:
        report: as :func:`modules.assurance.report.build` makes it.
        signature: of its canonical bytes.
    """
    header = yaml.safe_dump(_header(report), sort_keys=False, allow_unicode=True, width=120)
    card = report["card"]
    name = _md(card["title"] or f"{report['family']} module", 120)
    unsigned = (
        [] if signature.signed else [f"# {words.UNSIGNED}", f"{words.INTEGRITY}: nothing says who measured this."]
    )
    blocks = [
        f"# {name}",
        _md(card["summary"]) if card["summary"] else "",
        *unsigned,
        f"## Verdict: {words.RULINGS[report['verdict']]}",
        _md(words.headline(report), 1000),
        "## Robustness, interpretability, controllability, ethicality",
        _figures(report),
        "## Limits",
        _limits(report),
        "## Not measured",
        _missing(report),
        "## Intended use",
        _md(card["intended_use"] or "not stated"),
        "## Out of scope",
        _md(card["out_of_scope"] or "not stated"),
        "## Limitations",
        _md(card["limitations"] or "not stated"),
        "## Data and licences",
        f"Licence of the weights: {_md(card['licence'] or 'not stated')}.",
        _data(card["data"]),
        "## How it was measured",
        f"Suite {_md(report['suite']['name'])}, round {report['round']}, root seed {report['seeds']['root']}. A unit "
        "is an episode, a prompt or an instance; fresh units are new in every round, anchor units never change and "
        f"steer nothing. Intervals are of {words.confidence(report)}. A gate passes only if both splits' intervals lie "
        "on the right side, corrected for several gates (Holm) and for repeated looks; what stays undecided is never "
        "a pass.",
        "## Signature",
        f"sha256 of report.json: `{signature.sha256}`. "
        + ("Signed with HMAC-SHA256. " if signature.signed else f"**{words.UNSIGNED}.** ")
        + f"{words.INTEGRITY}: a signature says that the holder of the key wrote these numbers, not that they were "
        "measured well. Check with `python -m train verify PATH`.",
    ]
    return f"---\n{header}---\n\n" + "\n\n".join(block for block in blocks if block) + "\n"


def _header(report: Entry) -> dict[str, Any]:
    card = report["card"]
    licence = words.clean(card["licence"]).lower()
    header: dict[str, Any] = {"library_name": words.clean(card["library"], 60) or "plumbline"}
    if licence:  # the hub knows short identifiers; anything else is "other" and a name
        known = bool(_HUB_LICENCE.fullmatch(licence))
        header |= {"license": licence} if known else {"license": "other", "license_name": words.clean(card["licence"])}
    header["tags"] = ["plumbline", "assurance", words.clean(report["family"], 60)]
    results = [result for split in ("fresh", "anchor") if (result := _result(report, split))]
    if results:
        name = words.clean(card["title"], 120) or f"{words.clean(report['family'], 60)} module"
        header["model-index"] = [{"name": name, "results": results}]
    return header


def _result(report: Entry, split: str) -> dict[str, Any] | None:
    """One entry of ``model-index``: all measured figures of a split, with intervals as the metrics' arguments."""
    metrics = [
        {
            "type": figure["name"],
            "value": figure["value"],
            "name": words.clean(figure["title"]),
            "args": {name: figure[name] for name in ("low", "high", "se", "n", "estimator", "direction", "unit")},
        }
        for figure in report["figures"]
        if figure["split"] == split and figure["status"] == "measured"
    ]
    if not metrics:
        return None
    suite = words.clean(report["suite"]["name"], 40)
    return {
        "task": {"type": "other", "name": f"RICE assurance, suite {suite}"},
        "dataset": {
            "type": "plumbline-assurance",
            "name": f"{split} units, round {report['round']}, root seed {report['seeds']['root']}",
            "split": split,
        },
        "metrics": metrics,
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(report: Entry) -> str:
    figures, rows = words.by_key(report), []
    judged = {one["figure"]: one for one in report["judgements"]}
    for letter in "riceu":
        for name in words.names(report, letter):
            fresh = figures[name, "fresh"]
            if fresh["status"] != "measured":
                continue
            one = judged.get(name)
            rows.append(
                (
                    PRINCIPLES[letter],
                    f"{_md(fresh['title'])} (`{name}`)",
                    words.measured_text(fresh),
                    words.measured_text(figures.get((name, "anchor"))),
                    words.limit_text(one) if one else "",
                    words.RULINGS[one["ruling"]] if one else "",
                )
            )
    head = ("Principle", "Figure", f"Fresh ({words.confidence(report)} interval)", "Anchor", "Limit", "Ruling")
    return _table(head, rows) if rows else "Nothing was measured."


def _limits(report: Entry) -> str:
    if not report["judgements"]:
        return "No limits were declared."
    rows = [
        (
            f"`{one['figure']}`",
            one["kind"] + (" (optional)" if one["optional"] else ""),
            words.limit_text(one),
            words.RULINGS[one["ruling"]],
            words.number(one["p_holm"]),
            words.number(one["deficit"]),
        )
        for one in report["judgements"]
    ]
    return _table(("Figure", "Kind", "Limit", "Ruling", "p (Holm)", "Deficit"), rows)


def _missing(report: Entry) -> str:
    found = words.not_measured(report)
    if not found:
        return "Every figure of the suite was measured."
    return "\n".join(f"- {_md(title)} (`{name}`): {_md(why)}" for name, title, why in found)


def _data(sources: Sequence[Entry]) -> str:
    if not sources:
        return "No source of training data is named."
    rows = [(_md(one["name"]), _md(one["licence"] or "unknown"), words.number(one["share"])) for one in sources]
    return _table(("Source", "Licence", "Share"), rows)
