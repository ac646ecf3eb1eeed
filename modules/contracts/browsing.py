"""Where the computer agent and the browsers meet: episodes, what a page shows, and the instruction grammar.

Sources: MiniWoB++ (Liu et al. 2018); the instruction kinds of RCI (Kim et al. 2023, appendix).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

InstructionKind = Literal["type", "press", "clickxpath", "clickoption", "movemouse"]
KEYS = ("enter", "arrowleft", "arrowright", "arrowup", "arrowdown", "backspace", "space")
MAX_TEXT, MAX_XPATH = 256, 512  # characters, so that a model can't flood a page
_KINDS: tuple[InstructionKind, ...] = ("type", "press", "clickxpath", "clickoption", "movemouse")
_SHAPE = re.compile(r"(?P<kind>[a-z]+)(?:[ \t]+(?P<argument>\S.*))?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Instruction:
    """One executable keyboard or mouse instruction.

    Args:
        kind: ``type`` keystrokes to the focused element; ``press`` one of ``KEYS``; ``clickxpath`` the first match that
            can be clicked; ``clickoption`` select that option in its list; ``movemouse`` hover.
        argument: text, key or XPath. Data, never part of a script.
    """

    kind: InstructionKind
    argument: str

    def __str__(self) -> str:
        return f"{self.kind} {self.argument}"


class GrammarError(ValueError):
    """A text that is no instruction; the message says what is wrong, for the model or for a log."""


def parse_instruction(text: str) -> Instruction:
    """The instruction that ``text`` is, as a whole: ``parse_instruction(str(x)) == x``.

    Words are told apart from case; blanks around the instruction do not count, control characters are never part of
    one, and double quotes are dropped from typed text. Two instructions in one text are none.

    Raises:
        GrammarError: not of the grammar, an empty or too long argument, an unknown key.
    """
    text = text.strip(" \t")
    if _CONTROL.search(text):
        raise GrammarError("an instruction is one line without control characters")
    match = _SHAPE.fullmatch(text)
    kind = match["kind"].lower() if match else ""
    if match is None or kind not in _KINDS:
        raise GrammarError(f"an instruction begins with one of {', '.join(_KINDS)}")
    argument = match["argument"] or ""
    if kind == "type":
        argument = argument.replace('"', "").strip(" \t")
    if kind == "press":
        argument = argument.lower()
        if argument not in KEYS:
            raise GrammarError(f"press takes one of {', '.join(KEYS)}")
    if not argument:
        raise GrammarError(f"{kind} needs {'a text' if kind == 'type' else 'an XPath'}")
    limit = MAX_TEXT if kind == "type" else MAX_XPATH
    if len(argument) > limit:
        raise GrammarError(f"{kind} takes at most {limit} characters, got {len(argument)}")
    return Instruction(kind, argument)  # type: ignore[arg-type]


def is_instruction(text: str) -> bool:
    """Whether ``text`` is of the grammar."""
    try:
        parse_instruction(text)
    except GrammarError:
        return False
    return True


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode: equal specs show equal pages. ``seed`` is any text; the page's generator is seeded with it."""

    task: str
    seed: str


ActionStatus = Literal[
    "ok", "no_match", "bad_xpath", "not_clickable", "malformed", "left_page", "error", "refused"
]  # refused: by whoever oversees the agent; the page was not touched


@dataclass(frozen=True)
class PageView:
    """What is seen after a reset or an instruction.

    Args:
        utterance: the task, as the page words it.
        html: the task's part of the page, per-episode counters stripped: equal specs give equal text.
        page: a compact list of the page's elements, one a line, for small models.
        done: the episode is over.
        reward: the task's raw reward in [-1, 1] (0 before the end), not discounted by time.
        reason: why it ended, in the page's words or ours; empty before the end.
        status: what became of the instruction before it.
        familiar: the episode began on a page that training data hold (told only where they are at hand).
        expert: an instruction that a scripted expert would give here; None: no expert, or not asked for.
    """

    utterance: str
    html: str
    page: str
    done: bool = False
    reward: float = 0.0
    reason: str = ""
    status: ActionStatus = "ok"
    familiar: bool = False
    expert: str | None = None


@dataclass(frozen=True)
class ActionPrompts:
    """Short prompts for small models, the same where they are trained and where they act.

    Args:
        act: asks for the next instruction; with ``{goal}``, ``{page}`` (compact) and ``{history}``, each of whose
            instructions is written as ``done`` with ``{instruction}``.
        critique: after an instruction, asks for its fault.
        improve: after a critique, asks for a better instruction.
    """

    act: str = "{goal}\n{page}\n{history}>"
    done: str = "- {instruction}\n"
    critique: str = "\n?"
    improve: str = "\n>"

    def acting(self, goal: str, page: str, history: Sequence[str]) -> str:
        """The prompt for the next instruction. Page text is data: braces in it mean nothing."""
        past = "".join(self.done.replace("{instruction}", line) for line in history)
        parts = re.split(r"(\{goal\}|\{page\}|\{history\})", self.act)
        values = {"{goal}": goal, "{page}": page, "{history}": past}
        return "".join(values.get(part, part) for part in parts)


@runtime_checkable
class ProvidesPages(Protocol):
    """A datamodule with live pages that a module acts on; ``slots`` of them, numbered from 0.

    Everything asked in one call is done on all pages at once. Trouble with a page (a crash, a time-out, a page that
    left its address) ends its episode with ``status`` ``error`` or ``left_page``, and never raises.
    """

    @property
    def slots(self) -> int: ...

    @property
    def action_prompts(self) -> ActionPrompts: ...

    def reset_pages(self, episodes: Mapping[int, EpisodeSpec]) -> dict[int, PageView]: ...

    def step_pages(self, instructions: Mapping[int, str]) -> dict[int, PageView]:
        """Execute one instruction text per slot; a malformed one changes nothing and is told by ``status``."""
        ...

    def probe_pages(self, instructions: Mapping[int, str]) -> dict[int, ActionStatus]:
        """What would become of instructions, by grammar and by whether their XPath has a match; changes nothing."""
        ...

    def screenshots(self, slots: Sequence[int]) -> dict[int, bytes]:
        """PNG images of the task area, 160 x 210 pixels."""
        ...
