"""The tasks of MiniWoB++ (Liu et al. 2018): the packaged pages, and a folder of a user's own beside them."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ORIGIN = "https://miniwob.invalid"  # a reserved name that nothing on a network can answer to

#: The 55 tasks of the RCI paper (Kim et al. 2023, section 4).
PAPER_TASKS = (
    "choose-list", "click-button", "click-button-sequence", "click-checkboxes", "click-checkboxes-large",
    "click-checkboxes-soft", "click-checkboxes-transfer", "click-collapsible", "click-collapsible-2",
    "click-color", "click-dialog", "click-dialog-2", "click-link", "click-menu", "click-option",
    "click-scroll-list", "click-shades", "click-shape", "click-tab", "click-tab-2", "click-tab-2-hard",
    "click-test", "click-test-2", "click-widget", "count-shape", "email-inbox", "email-inbox-forward-nl",
    "email-inbox-forward-nl-turk", "email-inbox-nl-turk", "enter-date", "enter-password", "enter-text",
    "enter-text-dynamic", "enter-time", "focus-text", "focus-text-2", "grid-coordinate", "guess-number",
    "identify-shape", "login-user", "login-user-popup", "multi-layouts", "multi-orderings", "navigate-tree",
    "search-engine", "simple-algebra", "simple-arithmetic", "social-media", "social-media-all",
    "social-media-some", "terminal", "text-transform", "tic-tac-toe", "use-autocomplete", "use-spinner",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One task: its address, and the part of the window that it takes.

    ``width``, ``height``: pixels of the task area.
    """

    name: str
    url: str
    width: int = 160
    height: int = 210


def package_pages() -> Path:
    """The folder of the package's pages.

    Raises:
        ImportError: the package is missing; names the extra that brings it.
    """
    # Found without being imported: importing it would pull in a browser driver that is not needed here.
    spec = importlib.util.find_spec("miniwob")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("package 'miniwob' is needed here but not installed: pip install 'plumbline[rci]'")
    return Path(spec.submodule_search_locations[0]) / "html"


class TaskPages:
    """All tasks that can be loaded, and their files by address.

    Args:
        folder: own pages, ``<task>.html``, which may use the package's scripts as the packaged ones do
            (``../core/core.js``); None: the package's alone.

    Raises:
        FileNotFoundError: ``folder`` has no page. ImportError: the package is missing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.root = package_pages().resolve()
        self.own = None if folder is None else Path(folder).resolve()
        self.tasks = {
            path.stem: Task(path.stem, f"{ORIGIN}/miniwob/{path.stem}.html")
            for path in sorted((self.root / "miniwob").glob("*.html"))
        }
        for path in sorted((self.root / "flight").glob("*/wrapper.html")):
            name = f"flight.{path.parent.name}"
            self.tasks[name] = Task(name, f"{ORIGIN}/flight/{path.parent.name}/wrapper.html", 375, 667)
        if self.own is not None:
            found = sorted(self.own.glob("*.html"))
            if not found:
                raise FileNotFoundError(f"browser tasks: {folder} holds no .html page")
            self.tasks |= {path.stem: Task(path.stem, f"{ORIGIN}/own/{path.stem}.html") for path in found}

    def __getitem__(self, name: str) -> Task:
        self.check([name])
        return self.tasks[name]

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError naming an unknown task and the nearest known ones."""
        for name in names:
            if name not in self.tasks:
                near = difflib.get_close_matches(name, self.tasks, 3, 0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(self.tasks)} tasks"
                raise ValueError(f"browser tasks: no task '{name}'{hint}")

    def read(self, url: str) -> bytes | None:
        """The content behind an address; None: not one of the pages' files."""
        if not url.startswith(f"{ORIGIN}/"):
            return None
        relative = url[len(ORIGIN) + 1 :].split("?")[0].split("#")[0]
        root = self.root
        if self.own is not None and relative.startswith("own/"):
            root, relative = self.own, relative.removeprefix("own/")
        path = (root / relative).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            return None
        return path.read_bytes()
