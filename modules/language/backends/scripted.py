"""Replies by rule, for tests of the plumbing; what comes of them is no result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from modules.language.backends.base import BackendError, Reply, Request
from modules.language.backends.texts import excerpt, stopped

Rule = Callable[[Request], str]


class ScriptedBackend:
    """Answers by rule: the first pattern found in the request's text gives the reply.

    Args:
        rules: ``{pattern, reply}`` each (the form of a config), pairs (pattern, reply), a mapping of patterns to
            replies, or a function from request to reply. Patterns are regular expressions, searched for anywhere; a dot
            stands for newlines too. Replies are taken literally.

    A reply is cut at the request's stop strings, but not at ``max_new_tokens``. Token counts are words.

    Raises:
        ValueError: a rule that is none, or a pattern that is no regular expression.
    """

    identity = "scripted (plumbing, not a result)"

    def __init__(self, rules: list[dict[str, str]] | Mapping[str, str] | Sequence[tuple[str, str]] | Rule) -> None:
        self._function: Rule | None = rules if callable(rules) else None
        self._rules: list[tuple[re.Pattern[str], str]] = []
        if not callable(rules):
            entries = rules.items() if isinstance(rules, Mapping) else rules
            self._rules = [_compiled(number, entry) for number, entry in enumerate(entries)]

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """See :class:`~modules.language.backends.base.Backend`. Raises BackendError where no rule fits."""
        return [self._reply(request) for request in requests]

    def close(self) -> None:
        """Nothing to close."""

    def _reply(self, request: Request) -> Reply:
        prompt = request.text
        text = self._function(request) if self._function is not None else self._first_match(prompt)
        text = stopped(text, request.stop)[0]
        return Reply(text, "stop", len(prompt.split()), len(text.split()))

    def _first_match(self, prompt: str) -> str:
        for pattern, reply in self._rules:
            if pattern.search(prompt):
                return reply
        raise BackendError(
            f"ScriptedBackend: none of {len(self._rules)} rules fits the prompt that ends {prompt[-80:]!r}; add one"
        )


def _compiled(number: int, entry: Mapping[str, str] | tuple[str, str]) -> tuple[re.Pattern[str], str]:
    if isinstance(entry, Mapping):
        if set(entry) != {"pattern", "reply"}:
            raise ValueError(f"ScriptedBackend: rule {number} wants the keys pattern and reply, got {sorted(entry)}")
        entry = (entry["pattern"], entry["reply"])
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise ValueError(f"ScriptedBackend: rule {number} wants a pattern and a reply, got {excerpt(str(entry))}")
    try:
        return re.compile(entry[0], re.DOTALL), entry[1]
    except re.error as error:
        raise ValueError(f"ScriptedBackend: rule {number}: {entry[0]!r} is no regular expression ({error})") from None
