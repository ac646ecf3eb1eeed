"""Scripted experts: what to do next on a page, from its text and the instructions given so far, nothing else.

They read what an agent reads and speak the agent's grammar, so that their episodes are demonstrations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from modules.contracts.browsing import PageView
from modules.optional import require

Expert = Callable[[PageView, Sequence[str]], str]

#: Experts by task; filled by :func:`expert`.
EXPERTS: dict[str, Expert] = {}


class NoMoveError(LookupError):
    """The expert doesn't know how to go on from here (a page that its plan didn't foresee)."""


def expert(*tasks: str) -> Callable[[Expert], Expert]:
    """Register a function as the expert of some tasks.

    Raises:
        ValueError: a task has one already.
    """

    def register(function: Expert) -> Expert:
        for task in tasks:
            if task in EXPERTS:
                raise ValueError(f"experts: task '{task}' has an expert already")
            EXPERTS[task] = function
        return function

    return register


def tree(view: PageView) -> Any:
    """The page as an ``lxml.html`` element; what is a property of a form element is an attribute here.

    ``checked``, ``selected``, ``value`` and ``data-focused`` tell the state of form elements.
    """
    return require("lxml.html", extra="rci").fromstring(f"<div>{view.html}</div>")


def find(view: PageView, pattern: str) -> tuple[str, ...]:
    """Groups of the first match of ``pattern`` in the utterance.

    Raises:
        NoMoveError: it has none.
    """
    match = re.search(pattern, view.utterance)
    if match is None:
        raise NoMoveError(f"the utterance {view.utterance!r} does not read like {pattern!r}")
    return match.groups()


def quote(text: str) -> str:
    """``text`` as an XPath string, whatever quotes are in it."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    parts = "', \"'\", '".join(text.split("'"))
    return f"concat('{parts}')"


def squeeze(text: str) -> str:
    """Blanks collapsed, as XPath's ``normalize-space`` does."""
    return re.sub(r"[ \t\r\n]+", " ", text).strip(" ")


def by_id(name: str) -> str:
    return f"clickxpath //*[@id={quote(name)}]"


def by_text(tag: str, text: str) -> str:
    """Click the first ``tag`` whose whole text is ``text``."""
    return f"clickxpath //{tag}[normalize-space()={quote(squeeze(text))}]"


def element(root: Any, name: str) -> Any:
    """The element with id ``name``.

    Raises:
        NoMoveError: there is none.
    """
    found = root.xpath("//*[@id=$name]", name=name)
    if not found:
        raise NoMoveError(f"the page has no element '{name}'")
    return found[0]


def fill(root: Any, fields: dict[str, str]) -> str | None:
    """What brings text fields, each named by the click that focuses it, to their values; None: they hold them.

    A click, the typing, or a correction, one at a time.
    """
    for click, text in fields.items():
        found = root.xpath(click.removeprefix("clickxpath "))
        if not found:
            raise NoMoveError(f"the page has no field for '{click}'")
        field = found[0]
        value = (field.text or "") if field.tag == "textarea" else field.get("value", "")
        if value == text:
            continue
        if "data-focused" not in field.attrib:
            return click
        return f"type {text[len(value) :]}" if text.startswith(value) else "press backspace"
    return None
