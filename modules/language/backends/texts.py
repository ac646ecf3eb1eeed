"""What backends share about texts: turns as messages, replies cut at stop strings. No torch in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modules.language.backends.base import Turn


def merge_turns(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Chat messages ``{"role", "content"}``; neighbouring turns of one role are joined, with nothing between."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        if messages and messages[-1]["role"] == turn.role:
            messages[-1]["content"] += turn.text
        else:
            messages.append({"role": turn.role, "content": turn.text})
    return messages


def stopped(text: str, stop: Iterable[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    end = min((at for string in stop if string and (at := text.find(string)) >= 0), default=-1)
    return (text, False) if end < 0 else (text[:end], True)


def excerpt(text: str, length: int = 80) -> str:
    """The first characters of ``text`` on one line, quoted, for messages."""
    return repr(text[:length]) + ("..." if len(text) > length else "")
