"""RICE as a picture for image logs: a radar of the principles beside a heat-map of the judged figures.

Drawn with Pillow, which TensorBoard brings; no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modules.assurance import words
from modules.assurance.figures import PRINCIPLES

Entry = Mapping[str, Any]
Colour = tuple[int, int, int]
_INK, _SOFT, _LINE, _PAPER = (29, 33, 38), (90, 99, 110), (205, 210, 215), (255, 255, 255)
_GOOD, _EVEN, _BAD, _NONE = (31, 122, 77), (242, 226, 170), (179, 38, 30), (214, 218, 222)
_FRESH, _ANCHOR = (36, 87, 166), (138, 111, 174)
_SHARP = 2  # drawn larger and scaled down, for smooth edges


def standing(judgement: Entry, figure: Entry | None) -> float | None:
    """How the pessimistic end stands: 0 at the limit, +1 one scale on its good side, cut to [-1, 1]; ``None``: not
    measured."""
    short = words.shortfall(judgement, figure)
    return None if math.isinf(short) else max(-1.0, min(1.0, -short))


def principle_standings(report: Entry, split: str = "fresh") -> dict[str, float | None]:
    """Principle's letter -> the worst standing of its judged figures; ``None`` where none is judged and measured."""
    figures, found = words.by_key(report), {}
    for letter in PRINCIPLES:
        mine = [
            standing(one, figures.get((one["figure"], split)))
            for one in report["judgements"]
            if one["figure"][0] == letter
        ]
        known = [value for value in mine if value is not None]
        found[letter] = min(known) if known else None
    return found


def colour(value: float | None) -> Colour:
    """Red at -1, pale at the limit, green at +1; grey where nothing was measured."""
    if value is None:
        return _NONE
    end = _GOOD if value >= 0 else _BAD
    share = 0.25 + 0.75 * abs(value) if value else 0.0
    return tuple(round(a + (b - a) * share) for a, b in zip(_EVEN, end, strict=True))  # type: ignore[return-value]


def rice_image(report: Entry, height: int = 360) -> np.ndarray:
    """The picture as uint8 ``[height, width, 3]``, width twice the height.

    The dashed ring of the radar is the limit, the rim one scale beyond it. Rows of the heat-map are figures: fresh and
    anchor units.

    Raises:
        ValueError: a height below 200 pixels, where labels cannot be read.
    """
    if height < 200:
        raise ValueError(f"rice_image: height must be at least 200 pixels, got {height}")
    size = height * _SHARP
    image = Image.new("RGB", (2 * size, size), _PAPER)
    draw = ImageDraw.Draw(image)
    _radar(draw, report, size)
    _heat(draw, report, size)
    return np.asarray(image.resize((2 * height, height), Image.Resampling.LANCZOS), dtype=np.uint8)


def _font(size: float) -> Any:
    return ImageFont.load_default(size)


def _radar(draw: ImageDraw.ImageDraw, report: Entry, size: int) -> None:
    centre, reach = (size * 0.5, size * 0.55), size * 0.28
    letters = list(PRINCIPLES)
    angles = {letter: math.tau * index / len(letters) - math.pi / 2 for index, letter in enumerate(letters)}

    def at(letter: str, radius: float) -> tuple[float, float]:
        return centre[0] + radius * math.cos(angles[letter]), centre[1] + radius * math.sin(angles[letter])

    title = f"Round {report['round']}: {words.RULINGS[report['verdict']]}"
    draw.text((size * 0.04, size * 0.03), title, _INK, font=_font(size * 0.045))
    for share in (0.25, 0.75, 1.0):
        draw.polygon([at(letter, reach * share) for letter in letters], outline=_LINE, width=_SHARP)
    font = _font(size * 0.034)
    standings = {split: principle_standings(report, split) for split in ("fresh", "anchor")}
    for letter in letters:
        draw.line([centre, at(letter, reach)], fill=_LINE, width=_SHARP)
        x, y = at(letter, reach * 1.14)
        anchor = "mm" if abs(math.cos(angles[letter])) < 0.1 else "lm" if math.cos(angles[letter]) > 0 else "rm"
        known = standings["fresh"][letter] is not None
        draw.text((x, y), PRINCIPLES[letter], _INK if known else _SOFT, font=font, anchor=anchor)
    for index, letter in enumerate(letters):  # the limit
        _dashed(draw, at(letter, reach / 2), at(letters[(index + 1) % len(letters)], reach / 2), size)
    for split, shade in (("anchor", _ANCHOR), ("fresh", _FRESH)):
        points = {
            letter: at(letter, reach * (1 + value) / 2)
            for letter, value in standings[split].items()
            if value is not None
        }
        for index, letter in enumerate(letters):
            other = letters[(index + 1) % len(letters)]
            if letter in points and other in points:
                draw.line([points[letter], points[other]], fill=shade, width=2 * _SHARP)
        for x, y in points.values():
            radius = size * 0.012
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)


def _dashed(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], size: int) -> None:
    length = math.dist(start, end)
    steps = max(2, round(length / (size * 0.02)))
    for step in range(0, steps, 2):
        ends = [tuple(a + (b - a) * part / steps for a, b in zip(start, end, strict=True)) for part in (step, step + 1)]
        draw.line([*ends[0], *ends[1]], fill=_INK, width=_SHARP)


def _heat(draw: ImageDraw.ImageDraw, report: Entry, size: int) -> None:
    order = list(PRINCIPLES)
    judged = sorted(report["judgements"], key=lambda one: (order.index(one["figure"][0]), one["figure"]))
    left, top, figures = size * 1.06, size * 0.16, words.by_key(report)
    head = _font(size * 0.036)
    columns = {"fresh": size * 1.62, "anchor": size * 1.79}
    wide = size * 0.15
    for split, x in columns.items():
        draw.text((x + wide / 2, size * 0.11), split, _FRESH if split == "fresh" else _ANCHOR, font=head, anchor="mm")
    if not judged:
        draw.text((left, top + size * 0.05), "no limits declared", _SOFT, font=head)
        return
    tall = min(size * 0.07, (size * 0.95 - top) / len(judged))
    font = _font(max(6.0 * _SHARP, min(size * 0.036, tall * 0.62)))
    for row, one in enumerate(judged):
        y = top + row * tall
        label = one["figure"]
        while label and draw.textlength(label, font) > columns["fresh"] - left - size * 0.02:
            label = label[:-2] + "…"
        draw.text((left, y + tall / 2), label, _INK, font=font, anchor="lm")
        for split, x in columns.items():
            found = standing(one, figures.get((one["figure"], split)))
            draw.rectangle((x, y + _SHARP, x + wide, y + tall - _SHARP), fill=colour(found))
            said = "none" if found is None else f"{found + 0.0:+.2f}"
            dark = found is None or -0.35 < found < 0.35
            draw.text((x + wide / 2, y + tall / 2), said, _INK if dark else _PAPER, font=font, anchor="mm")
