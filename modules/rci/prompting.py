"""Prompts as data: one YAML file a task over a file of defaults; page and model text never act as templates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from modules.contracts.browsing import ActionPrompts, PageView
from modules.files import canonical_digest
from modules.rci.loop import Context, RCIPrompts

FOLDER = Path(__file__).parent / "prompts"
_FIELD = re.compile(r"\{(\w+)\}")
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}


@dataclass(frozen=True)
class TaskPrompts:
    """What a task is asked with; see ``prompts/default.yaml`` for each text.

    An empty ``plan``, ``state`` or ``agent`` text switches that grounding off for the task.
    """

    system: str = ""
    view: Literal["html", "page"] = "html"
    kinds: Sequence[str] = ()
    describe: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    page: str = ""
    goal: str = ""
    exemplars: Sequence[Mapping[str, str]] = ()
    exemplar: str = ""
    plan: str = ""
    plan_critique: str = ""
    plan_improve: str = ""
    plan_requirement: str = ""
    planned: str = ""
    history: str = ""
    next_first: str = ""
    next: str = ""
    next_first_unplanned: str = ""
    next_unplanned: str = ""
    state: str = ""
    agent: str = ""
    critique: str = ""
    improve: str = ""
    before: str = ""
    after: str = ""

    @property
    def action_rci(self) -> RCIPrompts:
        return RCIPrompts(self.critique, self.improve, self.before, self.after)

    def start(self, goal: str, exemplars: bool) -> Context:
        """A conversation with what does not depend on the page's state."""
        context = Context().say(self.system, "system")
        lines = "\n".join(self.describe[kind] for kind in self.kinds)
        context.say(fill(self.base, kinds=lines))
        if exemplars:
            for shown in self.exemplars:
                context.say(fill(self.exemplar, goal=shown["goal"], plan=shown["plan"]))
        return context

    def seen(self, view: PageView) -> str:
        """The page as this model is shown it."""
        return view.html if self.view == "html" else view.page

    def ask_next(self, number: int, previous: str, planned: bool) -> str:
        """The question for the ``number``-th instruction of an episode (from 1)."""
        if number == 1:
            return self.next_first if planned else self.next_first_unplanned
        nth = f"{number}{'th' if 10 < number % 100 < 14 else _ENDINGS.get(number % 10, 'th')}"
        return fill(self.next if planned else self.next_unplanned, nth=nth, previous=previous)


def fill(template: str, **values: str) -> str:
    """``template`` with ``{name}`` replaced; braces inside values mean nothing."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), template)


class PromptLibrary:
    """Prompts by task.

    Args:
        name: ``default`` (models that follow instructions) or ``compact`` (small models trained on demonstrations).
        folder: own files over the packaged ones: ``default.yaml`` and ``<task>.yaml`` there replace single keys.

    Raises:
        ValueError, FileNotFoundError: an unknown name, an unknown key or a bad file; one line that names it.
    """

    def __init__(self, name: str = "default", folder: str | Path | None = None) -> None:
        if name not in ("default", "compact"):
            raise ValueError(f"RCI: prompts must be 'default' or 'compact', got {name!r}")
        self.name = name
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise FileNotFoundError(f"RCI: prompt_folder {self.folder} does not exist")
        self._cache: dict[str, TaskPrompts] = {}
        self._base = self._read(FOLDER / f"{name}.yaml")
        if self.folder is not None and (self.folder / f"{name}.yaml").is_file():
            self._base |= self._read(self.folder / f"{name}.yaml")

    def __getitem__(self, task: str) -> TaskPrompts:
        if task not in self._cache:
            values = dict(self._base)
            for folder in (FOLDER, self.folder):
                path = None if folder is None else folder / f"{task}.yaml"
                if self.name == "default" and path is not None and path.is_file():
                    values |= self._read(path)
            unknown = [kind for kind in values.get("kinds", []) if kind not in values.get("describe", {})]
            if unknown:
                raise ValueError(f"RCI: prompts for {task}: kind '{unknown[0]}' has no text in 'describe'")
            self._cache[task] = TaskPrompts(**values)
        return self._cache[task]

    @property
    def compact(self) -> bool:
        return self.name == "compact"

    def digest(self, tasks: Sequence[str], action: ActionPrompts | None) -> str:
        """Identity of everything said about ``tasks``."""
        content: dict[str, Any] = {task: repr(self[task]) for task in sorted(set(tasks))}
        return canonical_digest([self.name, content, repr(action) if self.compact else ""])[:16]

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"RCI: prompts {path}: {str(error).splitlines()[0][:120]}") from None
        if not isinstance(content, dict):
            raise ValueError(f"RCI: prompts {path} must hold keys and texts")
        known = {entry.name for entry in fields(TaskPrompts)}
        for key, value in content.items():
            if key not in known:
                raise ValueError(f"RCI: prompts {path}: unknown key '{key}'; keys are {', '.join(sorted(known))}")
            if fault := _fault(key, value):
                raise ValueError(f"RCI: prompts {path}: {fault}")
        return content


def _fault(key: str, value: Any) -> str:
    """What is wrong with the value of a key; empty: nothing."""
    if key == "exemplars":
        good = isinstance(value, list) and all(
            isinstance(shown, dict) and isinstance(shown.get("goal"), str) and isinstance(shown.get("plan"), str)
            for shown in value
        )
        return "" if good else "exemplars must be a list, and every exemplar needs goal and plan, both texts"
    if key == "view":
        return "" if value in ("html", "page") else f"view must be html or page, got {value!r}"
    if key == "kinds":
        good = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
        return "" if good else "kinds must be a list of instruction kinds"
    if key == "describe":
        good = isinstance(value, dict) and all(isinstance(part, str) for item in value.items() for part in item)
        return "" if good else "describe must give a text for each instruction kind"
    return "" if isinstance(value, str) else f"'{key}' must be a text, got {value!r}"
