"""A backend that asks the scripted experts: tests of plumbing only, never a result.

It reads task, goal, page and history from a prompt whose parts are marked (``rci_prompts``, see :func:`write_prompts`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from datamodules.envs.browser.demonstrations import expert_move
from modules.contracts.browsing import PageView
from modules.language.backends.base import BackendError, Reply, Request

REPAIR = "NOT AN INSTRUCTION, AGAIN:"


def write_prompts(folder: Path, tasks: Sequence[str]) -> Path:
    """Prompts that mark their parts, in a new folder."""
    folder.mkdir()
    common = {
        "page": "<<PAGE\n{page}\nPAGE>>\n", "goal": "<<GOAL\n{goal}\nGOAL>>\n",
        "history": "<<DONE\n{history}\nDONE>>\n", "agent": REPAIR, "state": "", "exemplars": [],
    }  # fmt: skip
    for task in tasks:
        content = {**common, "base": f"<<TASK\n{task}\nTASK>>\n", "kinds": ["type"]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


class ExpertBackend:
    """Args:
    broken_step: the first draft of this step of an episode (from 1) is no instruction; 0: never.
    fail_after: calls after which it fails as an endpoint that is down would; 0: never.
    """

    def __init__(self, broken_step: int = 0, fail_after: int = 0) -> None:
        self.broken_step, self.fail_after, self.calls = broken_step, fail_after, 0

    @property
    def identity(self) -> str:
        return f"experts {self.broken_step} (plumbing, not a result)"

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        replies = []
        for request in requests:
            self.calls += 1
            if 0 < self.fail_after < self.calls:
                raise BackendError("experts: the endpoint is down")
            replies.append(Reply(self._answer(request.text), prompt_tokens=len(request.text), completion_tokens=1))
        return replies

    def _answer(self, text: str) -> str:
        past = _part(text, "DONE").splitlines() if "<<DONE" in text else []
        if len(past) + 1 == self.broken_step and REPAIR not in text:
            return "please click the right button"
        view = PageView(_part(text, "GOAL"), _part(text, "PAGE"), "")
        return expert_move(_part(text, "TASK"), view, past) or "press enter"

    def close(self) -> None: ...


def _part(text: str, name: str) -> str:
    found = re.search(rf"<<{name}\n(.*?)\n{name}>>", text, re.DOTALL)
    assert found is not None, name
    return found[1]
