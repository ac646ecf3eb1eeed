"""Small plots as inline SVG, without scripts or outside resources: colours come from the page's style sheet.

Every function takes numbers and returns markup; labels are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modules.assurance.words import number

Direction = Literal["up", "down"]
_GLYPH = 6.2  # pixels of a digit at the plots' font size, for keeping labels apart


@dataclass(frozen=True)
class Estimate:
    """A point with its interval, and what to call it."""

    label: str
    value: float
    low: float
    high: float


class _Scale:
    """Maps ``[low, high]`` with a margin to pixels ``[start, end]``; a single value lies in the middle."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.1 * (high - low) or max(abs(low) * 0.1, 1e-3)
        self.low, self.high = low - margin, high + margin
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">{"".join(body)}</svg>'
    )


def interval_plot(estimates: Sequence[Estimate], tau: float, direction: Direction) -> str:
    """Each estimate as a point with its interval on a line of its own, above one another, against the threshold.

    The side where the limit holds is tinted.
    """
    left, width, row = 52.0, 320.0, 19.0
    bottom = 6 + row * len(estimates)
    ends = [end for one in estimates for end in (one.low, one.high, one.value)]
    scale = _Scale([*ends, tau], left + 6, width - 8)
    at = scale(tau)
    begin, end = (at, width) if direction == "up" else (left, at)
    body = [
        f'<rect class="holds" x="{begin:.1f}" y="2" width="{max(0.0, end - begin):.1f}" height="{bottom:.1f}"/>',
        f'<line class="axis" x1="{left:g}" x2="{width:g}" y1="{bottom + 2:.1f}" y2="{bottom + 2:.1f}"/>',
        f'<line class="tau" x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="{bottom + 5:.1f}"/>',
    ]
    for index, one in enumerate(estimates):
        y = 6 + row * (index + 0.5)
        kind = "mark" if index == 0 else "mark second"
        low, high, middle = scale(one.low), scale(one.high), scale(one.value)
        body.append(_text(left - 8, y + 4, one.label, "name", "end"))
        if high - low > 0.5:
            path = f"M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8M{low:.1f} {y:.1f}H{high:.1f}"
            body.append(f'<path class="{kind} bar" d="{path}"/>')
        body.append(f'<circle class="{kind}" cx="{middle:.1f}" cy="{y:.1f}" r="3.6"/>')
    text = number(tau)
    half = len(text) * _GLYPH / 2
    centre = min(max(at, left + half), width - half)
    body.append(_text(centre, bottom + 16, text, "limit"))
    span = scale.high - scale.low
    ticks = ((min(ends), "start", left), (max(ends), "end", width)) if max(ends) > min(ends) else ()
    for value, anchor, place in ticks:
        tick = number(value, span)
        room = abs(place - centre) - half - len(tick) * _GLYPH
        if room > 8:
            body.append(_text(place, bottom + 16, tick, "tick", anchor))
    said = "; ".join(f"{one.label} {number(one.value)}, {number(one.low)} to {number(one.high)}" for one in estimates)
    word = "at least" if direction == "up" else "at most"
    return _svg(width, bottom + 20, f"{said}; limit: {word} {text}", body, "intervals")


def bar(value: float, low: float, high: float, kind: str = "") -> str:
    """One horizontal bar from 0 to ``value`` on the scale ``[low, high]``, which holds 0; it fills its cell."""
    reach = (high - low) or 1.0
    begin, end = sorted(((0.0 - low) / reach * 100, (value - low) / reach * 100))
    zero = (0.0 - low) / reach * 100
    return (
        '<svg class="bars" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill {kind}" x="{begin:.2f}" y="1" width="{max(end - begin, 0.4):.2f}" height="8"/>'
        f'<line class="axis" x1="{zero:.2f}" x2="{zero:.2f}" y1="0" y2="10"/></svg>'
    )


def bar_range(values: Sequence[float], cap: float | None = None) -> tuple[float, float]:
    """A scale for :func:`bar` that holds 0, all values and ``cap``."""
    every = [0.0, *values, *([] if cap is None else [cap])]
    return min(every), max(every) if max(every) > min(every) else min(every) + 1.0


def trajectory(rounds: Sequence[Mapping[str, Estimate]], tau: float | None, direction: Direction, title: str) -> str:
    """Estimates over rounds: one line a split (``fresh``, ``anchor``), intervals as whiskers, the threshold dashed.

    Args:
        rounds: split -> estimate, by round; a split that was not measured is left out.
        tau: threshold, if there is one.
        direction: of the figure.
        title: read out in place of the picture.
    """
    left, top, bottom = 50.0, 10.0, 116.0
    step = max(60.0, min(140.0, 360.0 / max(1, len(rounds))))
    width = left + step * len(rounds) + 8
    ends = [end for one in rounds for estimate in one.values() for end in (estimate.low, estimate.high)]
    if not ends:
        return ""
    scale = _Scale(ends + ([] if tau is None else [tau]), bottom, top)
    body = []
    if tau is not None:
        at = scale(tau)
        begin, end = (top - 6, at) if direction == "up" else (at, bottom + 6)
        body += [
            f'<rect class="holds" x="{left:g}" y="{begin:.1f}" width="{width - left:g}" '
            f'height="{max(0.0, end - begin):.1f}"/>',
            f'<line class="tau" x1="{left:g}" x2="{width:g}" y1="{at:.1f}" y2="{at:.1f}"/>',
            _text(left - 6, at + 4, number(tau), "limit", "end"),
        ]
    for value in dict.fromkeys((min(ends), max(ends))):
        if tau is None or abs(scale(value) - scale(tau)) > 14:
            body.append(_text(left - 6, scale(value) + 4, number(value, scale.high - scale.low), "tick", "end"))
    body.append(f'<line class="axis" x1="{left:g}" x2="{width:g}" y1="{bottom + 8:g}" y2="{bottom + 8:g}"/>')
    for offset, split, kind in ((7.0, "anchor", "mark second"), (-7.0, "fresh", "mark")):
        places = [
            (left + step * (index + 0.5) + offset, one[split]) for index, one in enumerate(rounds) if split in one
        ]
        line = "L".join(f"{x:.1f} {scale(one.value):.1f}" for x, one in places)
        body.append(f'<path class="{kind} line" d="M{line}"/>' if len(places) > 1 else "")
        for x, one in places:
            low, high = scale(one.low), scale(one.high)
            if low - high > 0.5:
                path = f"M{x - 3.5:.1f} {low:.1f}h7M{x - 3.5:.1f} {high:.1f}h7M{x:.1f} {low:.1f}V{high:.1f}"
                body.append(f'<path class="{kind} bar" d="{path}"/>')
            body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{scale(one.value):.1f}" r="3.6"/>')
    for index, one in enumerate(rounds):
        label = next((estimate.label for estimate in one.values()), "")
        body.append(_text(left + step * (index + 0.5), bottom + 22, label, "tick"))
    return _svg(width, bottom + 28, title, body, "trajectory")
