"""An agent that does something at random: the baseline of usefulness and of harm."""

from __future__ import annotations

import random
import re
from collections.abc import Generator
from typing import Any

from modules.contracts.browsing import EpisodeSpec, PageView
from modules.optional import require
from modules.rci.effects import Act, Reset

CLICKABLE = "//button|//a|//input|//label|//option|//select|//span|//textarea"
_QUOTED = re.compile(r'"([^"]+)"')
_TYPED = 0.25
"""Share of actions that type, where the task quotes something."""


def random_instruction(view: PageView, draw: random.Random) -> str:
    """Click an element of the page, all alike, or type something that the task quotes."""
    quoted = _QUOTED.findall(view.utterance)
    if quoted and draw.random() < _TYPED:
        return f"type {draw.choice(quoted)}"
    elements = require("lxml.html", extra="rci").fromstring(f"<div>{view.html}</div>").xpath(CLICKABLE)
    if not elements:
        return "press enter"
    element = draw.choice(elements)
    name, text = element.get("id") or "", " ".join(element.text_content().split())
    if name and "'" not in name:
        return f"clickxpath //*[@id='{name}']"
    if text and "'" not in text and len(text) < 200:
        return f"clickxpath //{element.tag}[normalize-space()='{text}']"
    same = [one for one in elements if one.tag == element.tag]
    return f"clickxpath (//{element.tag})[{same.index(element) + 1}]"


def random_episode(spec: EpisodeSpec, draw: random.Random, steps: int) -> Generator[Any, Any, PageView]:
    """The loop of an episode of at most ``steps`` actions; returns the last view."""
    view = yield Reset(spec)
    for _ in range(steps):
        if view.done:
            break
        view = yield Act(random_instruction(view, draw))
    return view
