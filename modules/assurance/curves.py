"""TensorBoard's view of assurance: figures with their margins, deficits, knobs, the card, the RICE picture."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.assurance.figures import PRINCIPLES
from modules.assurance.radar import rice_image

Entry = Mapping[str, Any]


def scalars(report: Entry, knobs: Entry | None = None) -> dict[str, float]:
    """``rice/<principle>/<figure>`` with ``_lo`` and ``_hi``, ``rice/deficit/<figure>``, ``rice/knob/<path>``.

    Args:
        report: as :func:`modules.assurance.report.build` gives it; figures on fresh units are taken.
        knobs: path -> value; of weights and ranges each part has a name of its own.
    """
    found: dict[str, float] = {}
    for figure in report["figures"]:
        if figure["split"] == "fresh" and figure["status"] == "measured":
            tag = _tag(figure["name"])
            found |= {tag: figure["value"], f"{tag}_lo": figure["low"], f"{tag}_hi": figure["high"]}
    for judged in report["judgements"]:
        if judged["deficit"] is not None:
            found[f"rice/deficit/{judged['figure']}"] = judged["deficit"]
    for path, value in (knobs or {}).items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= {f"rice/knob/{path}/{name}": float(one) for name, one in value.items()}
        else:
            found[f"rice/knob/{path}"] = float(value)
    return found


def _tag(name: str) -> str:
    return f"rice/{name[0].upper()}/{name}"


def layout(report: Entry) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars: a chart with margins for every measured figure, in sections by principle."""
    sections: dict[str, dict[str, list[Any]]] = {}
    for figure in report["figures"]:
        if figure["split"] == "fresh" and figure["status"] == "measured":
            tag = _tag(figure["name"])
            charts = sections.setdefault(f"RICE: {PRINCIPLES[figure['name'][0]]}", {})
            charts[figure["name"]] = ["Margin", [tag, f"{tag}_lo", f"{tag}_hi"]]
    return sections


def write_pictures(writer: Any, report: Entry, card: str, step: int) -> None:
    """The layout, the card as text and the RICE picture, through a ``SummaryWriter``."""
    writer.add_custom_scalars(layout(report))
    writer.add_text("rice/card", card, step)
    writer.add_image("rice/standing", rice_image(report), step, dataformats="HWC")


def write_curves(folder: str | Path, rounds: Sequence[tuple[Entry, Entry]]) -> None:
    """Event files of a whole cycle against its rounds, written anew each time (they are small).

    Args:
        folder: of the event files; what lies there is replaced.
        rounds: report and knobs of each.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for step, (report, knobs) in enumerate(rounds):
            for tag, value in scalars(report, knobs).items():
                writer.add_scalar(tag, value, step)
            writer.add_image("rice/standing", rice_image(report), step, dataformats="HWC")
        if rounds:
            writer.add_custom_scalars(layout(rounds[-1][0]))
