"""Oversight of an agent's episode: what it may touch, what it must ask for, how much it may do, and stopping it.

The overseer stands between a loop and whoever drives it: it sees every effect before it happens and trusts nothing that
the agent says. It is no judge of pages: it goes by the elements that an instruction selects in the HTML, so a page
whose buttons lie about what they do is beyond it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modules.contracts.browsing import GrammarError, Instruction, PageView, parse_instruction
from modules.language.backends.base import Request
from modules.optional import require
from modules.rci.effects import Act, Confirm, Halted

#: Words of elements that do what can't be undone.
IRREVERSIBLE = (
    "submit", "send", "delete", "remove", "buy", "purchase", "pay", "order", "book", "post", "publish", "reply",
    "forward", "share", "retweet", "transfer", "confirm", "unsubscribe", "block",
)  # fmt: skip
_TOLD = ("id", "class", "value", "type", "title", "name", "alt", "aria-label", "href")
_LITERAL = re.compile(r"'([^']*)'|\"([^\"]*)\"")


@dataclass
class Oversight:
    """Rules of an episode.

    Args:
        confirm: words; before an instruction that touches an element with one of them, or that presses enter, approval
            is asked for. Empty: never.
        off_limits: texts; an instruction that touches an element with one of them is refused.
        approve: what the module's own approval hook answers; overridden where a person is asked.
        max_calls, max_actions: of an episode; then it ends. None: no limit.
        max_refusals: refused instructions after which an episode ends.
    """

    confirm: list[str] = field(default_factory=lambda: list(IRREVERSIBLE))
    off_limits: list[str] = field(default_factory=list)
    approve: bool = True
    max_calls: int | None = None
    max_actions: int | None = None
    max_refusals: int = 3

    def check(self, owner: str) -> None:
        """Raise ValueError naming the owner and the rule that can't be followed."""
        for key in ("max_calls", "max_actions"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"{owner}: oversight.{key} must be >= 0 or null, got {value}")
        if self.max_refusals < 1:
            raise ValueError(f"{owner}: oversight.max_refusals must be >= 1, got {self.max_refusals}")
        if not all(text.strip() for text in (*self.confirm, *self.off_limits)):
            raise ValueError(f"{owner}: oversight.confirm and off_limits must hold no empty text")


def overseen(
    loop: Generator[Any, Any, Any], rules: Oversight, stopping: Callable[[], bool] | None = None
) -> Generator[Any, Any, Any]:
    """The same loop under ``rules``; an instruction that is refused reaches no page and has status ``refused``.

    Args:
        loop: of one episode.
        rules: for it.
        stopping: asked before every effect; true: the episode ends there.

    Raises:
        Halted: the episode was stopped, its budget is used up, or too many instructions were refused.
    """
    view: PageView | None = None
    result: Any = None
    calls = actions = refusals = 0
    try:
        while True:
            effect = loop.send(result)
            if stopping is not None and stopping():
                raise Halted("stopped")
            if isinstance(effect, Request):
                if rules.max_calls is not None and calls >= rules.max_calls:
                    raise Halted(f"budget of {rules.max_calls} model calls")
                calls += 1
            elif isinstance(effect, Act) and view is not None:
                if rules.max_actions is not None and actions >= rules.max_actions:
                    raise Halted(f"budget of {rules.max_actions} actions")
                if (yield from _refused(effect, view, rules)):
                    refusals += 1
                    if refusals >= rules.max_refusals:
                        raise Halted(f"{refusals} refused instructions")
                    view = result = replace(view, status="refused")
                    continue
                if stopping is not None and stopping():  # approval may have taken a while
                    raise Halted("stopped")
                actions += 1
            result = yield effect
            if isinstance(result, PageView):
                view = result
    except StopIteration as end:
        return end.value
    finally:
        loop.close()


def _refused(effect: Act, view: PageView, rules: Oversight) -> Generator[Any, Any, bool]:
    touched = described(view, effect.instruction)
    if any(holds(touched, text) for text in rules.off_limits):
        return True
    if irreversible(view, effect.instruction, rules.confirm):
        return not (yield Confirm(effect.instruction, touched))
    return False


def irreversible(view: PageView, instruction: str, words: Sequence[str] = IRREVERSIBLE) -> bool:
    """Whether an instruction may do what can't be undone: enter, or an element with one of ``words``."""
    if not words:
        return False
    try:
        parsed = parse_instruction(instruction)
    except GrammarError:
        return False
    if parsed.kind in ("type", "movemouse"):
        return False
    if parsed.kind == "press":
        return parsed.argument == "enter"
    touched = described(view, instruction)
    return any(holds(touched, word) for word in words)


def holds(touched: str, text: str) -> bool:
    """Whether a description has ``text`` at the beginning of a word; case counts for nothing."""
    return re.search(rf"(?<![^\W_]){re.escape(text)}", touched, re.IGNORECASE) is not None


def described(view: PageView, instruction: str) -> str:
    """What is to be read on the elements that an instruction selects: text, and attributes that name them.

    All matches count, since which one can be clicked is known to the browser alone. Where none is found, the strings in
    the instruction stand for it.
    """
    try:
        parsed = parse_instruction(instruction)
    except GrammarError:
        return ""
    if parsed.kind in ("type", "press"):
        return ""
    parts = []
    for element in matches(view.html, parsed):
        parts.append(" ".join(element.text_content().split()))
        parts += [element.get(name) for name in _TOLD if element.get(name)]
    if not parts:
        parts = [one or other for one, other in _LITERAL.findall(parsed.argument)]
    return " | ".join(parts)


def matches(html: str, instruction: Instruction) -> list[Any]:
    """Elements of ``html`` that an instruction's XPath selects, as ``lxml`` elements, in order; [] for a broken one."""
    etree = require("lxml.etree", extra="rci")
    parse = require("lxml.html", extra="rci").fromstring
    try:
        found = parse(f"<div>{html}</div>").xpath(instruction.argument)
    except (etree.LxmlError, ValueError):
        return []
    if not isinstance(found, list):
        return []
    elements = [getattr(one, "getparent", lambda: None)() if isinstance(one, str) else one for one in found]
    return [one for one in elements if isinstance(getattr(one, "tag", None), str)]
