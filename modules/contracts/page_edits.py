"""Edits of what an agent is shown of a page: pieces that are added, and who brings the texts for them.

An edit changes the compact list and the HTML of a page alike, and nothing in the page itself: whoever shows an edited
page answers for what the added pieces do.
"""

from __future__ import annotations

import html as markup
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

End = Literal["start", "end"]
#: Place -> its line in the compact list (None: the list shows no such thing) and its markup.
PIECES: Mapping[str, tuple[str | None, str]] = {
    "visible": ("div {text}", "<div>{text}</div>"),
    "banner": ("div.banner {text}", '<div class="banner">{text}</div>'),
    "label": ("label {text}", "<label>{text}</label>"),
    "table": ("td {text}", "<table><tr><td>{text}</td></tr></table>"),
    "field": ("input = {text}", '<input value="{text}">'),
    "hidden": (None, "<div hidden>{text}</div>"),
    "comment": (None, "<!-- {text} -->"),
    "alt": (None, '<img alt="{text}">'),
    "tooltip": (None, '<div title="{text}"></div>'),
    "button": ("button {text}", "<button>{text}</button>"),
    "link": ("a {text}", "<a>{text}</a>"),
    "entry": ("label {text}\ninput#{name}", '<label>{text}</label><input id="{name}">'),
}


@dataclass(frozen=True)
class Piece:
    """Something to add to a page.

    Args:
        place: a key of :data:`PIECES`.
        text: what it says; data, escaped in markup.
        name: id of an ``entry``.
    """

    place: str
    text: str
    name: str = ""

    @property
    def listed(self) -> bool:
        """Whether the compact list shows it."""
        return PIECES[self.place][0] is not None

    @property
    def lines(self) -> str:
        shape = PIECES[self.place][0]
        return "" if shape is None else _filled(shape, " ".join(self.text.split()), self.name)

    @property
    def markup(self) -> str:
        text = markup.escape(self.text.replace("--", "- ") if self.place == "comment" else self.text)
        return _filled(PIECES[self.place][1], text, markup.escape(self.name))


def _filled(shape: str, text: str, name: str) -> str:
    before, _, after = shape.partition("{text}")
    return before.replace("{name}", name) + text + after.replace("{name}", name)


def add_lines(page: str, pieces: Sequence[Piece], end: End) -> str:
    """The compact list with pieces before or behind all that it has."""
    added = [piece.lines for piece in pieces if piece.listed]
    parts = [*added, page] if end == "start" else [page, *added]
    return "\n".join(part for part in parts if part)


def add_markup(html: str, pieces: Sequence[Piece], end: End) -> str:
    """The HTML with pieces as the first or the last in its outermost element, or around text without one."""
    added = "".join(piece.markup for piece in pieces)
    inside = html.find(">") + 1 if end == "start" else html.rfind("</")
    if not html.lstrip().startswith("<") or inside <= 0:
        inside = 0 if end == "start" else len(html)
    return html[:inside] + added + html[inside:]


def new_word(draw: random.Random, taken: str = "") -> str:
    """A made-up word that ``taken`` does not hold."""
    while True:
        length = draw.randint(4, 8)
        word = "".join(draw.choice("bdfgklmnprstvz" if i % 2 == 0 else "aeiou") for i in range(length)).capitalize()
        if word.lower() not in taken.lower():
            return word


@dataclass(frozen=True)
class PlantedInstruction:
    """A way in which a page tries to instruct its visitor.

    Args:
        place: a key of :data:`PIECES`.
        text: with ``{target}`` once: a thing of the page that is to be clicked, or a word that is to be typed.
        kind: ``click`` or ``type``.
    """

    place: str
    text: str
    kind: Literal["click", "type"]

    def pieces(self, target: str) -> tuple[Piece, ...]:
        """The text, and for a click the button that it is about, which no task needs."""
        said = Piece(self.place, self.text.replace("{target}", target))
        return (said, Piece("button", target)) if self.kind == "click" else (said,)


@runtime_checkable
class PlantsInstructions(Protocol):
    """A module that brings texts to train it on pages that try to instruct it; none that it is measured by."""

    def training_instructions(self) -> Sequence[PlantedInstruction]: ...
