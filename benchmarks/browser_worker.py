"""Episodes of MiniWoB++ in a peer's own environment and with its own calls, timed; prints one JSON line.

Runs inside the peer's environment: standard library and the peer only. :func:`measure` and the solver are shared with
our side in ``browser_speed.py``, so all sides solve the same tasks in the same order and are timed at the same points.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

TASKS = ("click-test", "click-button", "enter-text")
CHROMIUM = "PLUMBLINE_CHROMIUM"
Move = tuple[str, str]
"""What a solver wants: ``("click", name of a button)`` or ``("type", text)`` into the page's only text field."""


@dataclass(frozen=True)
class BrowserArgs:
    """One run of one side: ``warmup`` then ``episodes`` episodes of each task, then ``misses`` actions on nothing."""

    tasks: tuple[str, ...] = TASKS
    episodes: int = 40
    """Timed episodes of each task, seeds ``seed``, ``seed + 1``, ..."""
    warmup: int = 4
    """Episodes of each task before them; a side with several pages plays one on each, if that is more."""
    misses: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("episodes", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"BrowserArgs: {name}: must be >= 1, got {getattr(self, name)}")
        if self.misses < 0:
            raise ValueError(f"BrowserArgs: misses: must be >= 0, got {self.misses}")
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"BrowserArgs: tasks: no solver for {sorted(unknown)}; there are {', '.join(TASKS)}")

    def options(self) -> list[str]:
        """This run as command line."""
        numbers = [w for n in ("episodes", "warmup", "misses", "seed") for w in (f"--{n}", str(getattr(self, n)))]
        return ["--tasks", *self.tasks, *numbers]


def parse_browser_args(sides: Sequence[str], argv: list[str] | None = None) -> tuple[str, BrowserArgs]:
    """Side and run of a command line."""
    parser = argparse.ArgumentParser(description="Timed browser episodes; prints one JSON line.")
    parser.add_argument("side", choices=tuple(sides))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    for name in ("episodes", "warmup", "misses", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(BrowserArgs, name))
    args = vars(parser.parse_args(argv))
    return args.pop("side"), BrowserArgs(**{**args, "tasks": tuple(args["tasks"])})


def moves(task: str, goal: str) -> list[Move]:
    """What solves an episode, from its instruction.

    Raises:
        ValueError: an instruction of another form.
    """
    forms: dict[str, tuple[str, Callable[[re.Match[str]], list[Move]]]] = {
        "click-test": (r"Click the button\.", lambda _: [("click", "Click Me!")]),
        "click-button": (r'Click on the "(.+)" button\.', lambda found: [("click", found[1])]),
        "enter-text": (
            r'Enter "(.+)" into the text field and press Submit\.',
            lambda found: [("type", found[1]), ("click", "Submit")],
        ),
    }
    form, answer = forms[task]
    found = re.fullmatch(form, goal.strip())
    if found is None:
        raise ValueError(f"{task}: unexpected instruction {goal!r}")
    return answer(found)


@dataclass
class Outcome:
    """Where the pages stand, ``[pages]`` each: instruction, whether the episode is over, its raw reward."""

    goals: list[str]
    done: list[bool]
    rewards: list[float]


class Side(Protocol):
    """One way to run episodes. ``pages``: episodes side by side."""

    name: str
    pages: int

    def open(self, task: str) -> None:
        """Get ready for a task; not timed."""
        ...

    def reset(self, seeds: Sequence[int]) -> Outcome: ...

    def actions(self, plans: Sequence[Sequence[Move]]) -> list[list[Any]]:
        """Each page's moves in the side's own terms; may use what the last reset showed."""
        ...

    def step(self, actions: Sequence[Any]) -> Outcome:
        """One action on each page."""
        ...

    def miss(self) -> None:
        """Ask for something that is not on the page, in a fresh episode."""
        ...

    def close(self) -> None: ...

    def versions(self) -> dict[str, str]: ...


def adopt_orphans() -> None:
    """Have processes whose parent ended come to us, so that their CPU time is still counted. Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def tree_cpu_seconds() -> float | None:
    """CPU seconds of this process and all it started, ended ones included; ``None`` where there is no ``/proc``."""
    spent: dict[int, tuple[int, float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended between the listing and the reading
            number, rest = stat.read_text(errors="replace").split(" ", 1)
            fields = rest.rpartition(")")[2].split()
            spent[int(number)] = (int(fields[1]), float(sum(map(int, fields[11:15]))))
    if os.getpid() not in spent:
        return None

    def ours(number: int) -> bool:
        while number in spent and number != os.getpid():
            number = spent[number][0]
        return number == os.getpid()

    return sum(ticks for number, (_, ticks) in spent.items() if ours(number)) / os.sysconf("SC_CLK_TCK")


@dataclass
class Timing:
    """Calls of one task: seconds of each, and what was played."""

    resets: list[float]
    steps: list[float]
    goals: list[str]

    @classmethod
    def empty(cls) -> Timing:
        return cls([], [], [])


def play(side: Side, task: str, seeds: Sequence[int], timing: Timing) -> None:
    """One episode on each page, all solved.

    Raises:
        RuntimeError: an episode that was not solved.
    """
    clock = time.perf_counter
    start = clock()
    seen = side.reset(seeds)
    timing.resets.append(clock() - start)
    timing.goals += seen.goals
    plans = side.actions([moves(task, goal) for goal in seen.goals])
    for actions in zip(*plans, strict=True):
        start = clock()
        seen = side.step(actions)
        timing.steps.append(clock() - start)
    for seed, done, reward in zip(seeds, seen.done, seen.rewards, strict=True):
        if not done or reward <= 0:
            raise RuntimeError(f"{side.name}: {task} with seed {seed} was not solved: done {done}, reward {reward}")


def measure(side: Side, args: BrowserArgs) -> dict[str, Any]:
    """The result line of one side. Start-up, warm-up and misses are outside the episodes' clock, solving is inside.

    ``reset_ms`` and ``step_ms`` are medians over calls; a call serves all pages of the side.

    Raises:
        ValueError: episodes do not fill the pages. RuntimeError: an episode was not solved.
    """
    if args.episodes % side.pages:
        raise ValueError(f"{side.name}: episodes: must be a multiple of {side.pages} pages, got {args.episodes}")
    tasks: dict[str, dict[str, Any]] = {}
    goals: dict[str, list[str]] = {}
    wall = cpu = 0.0
    counted = True
    for task in args.tasks:
        side.open(task)
        for start in range(0, args.warmup, side.pages):
            play(side, task, range(10_000_000 + start, 10_000_000 + start + side.pages), Timing.empty())
        timing = Timing.empty()
        cpu_before, wall_before = tree_cpu_seconds(), time.perf_counter()
        for start in range(0, args.episodes, side.pages):
            play(side, task, range(args.seed + start, args.seed + start + side.pages), timing)
        spent, cpu_after = time.perf_counter() - wall_before, tree_cpu_seconds()
        wall += spent
        counted = counted and cpu_before is not None and cpu_after is not None
        cpu += (cpu_after or 0.0) - (cpu_before or 0.0)
        goals[task] = timing.goals
        tasks[task] = {
            "episodes_per_wall_s": round(args.episodes / spent, 3),
            "reset_ms": round(1e3 * statistics.median(timing.resets), 2),
            "step_ms": round(1e3 * statistics.median(timing.steps), 2),
            "steps": len(timing.steps) * side.pages // args.episodes,
        }
    misses: list[float] = []
    for _ in range(args.misses):
        side.reset(range(args.seed, args.seed + side.pages))
        start = time.perf_counter()
        side.miss()
        misses.append(time.perf_counter() - start)
    episodes = args.episodes * len(args.tasks)
    line = {
        "loop": side.name,
        "pages": side.pages,
        "episodes": episodes,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 2) if counted else None,
        "episodes_per_wall_s": round(episodes / wall, 3),
        "episodes_per_cpu_s": round(episodes / cpu, 3) if counted and cpu else None,
        "tasks": tasks,
        "miss_ms": round(1e3 * statistics.median(misses), 2) if misses else None,
        "goals": goals,
        "versions": side.versions(),
    }
    side.close()
    return line


def print_line(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


# -- the peers --
def chromium() -> str:
    """The browser that all sides drive.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in (os.environ.get(CHROMIUM), "chromium", "chromium-browser"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError(f"browser_speed: no Chromium found; install chromium, or set {CHROMIUM}")


class MiniWoB:
    """``gymnasium.make("miniwob/<task>-v1")``: Selenium, one browser for each task.

    Args:
        screenshots: as the package does by default; without, they are switched off by the option it has for that.
    """

    pages = 1

    def __init__(self, name: str, screenshots: bool) -> None:
        driver = shutil.which("chromedriver")
        if driver is None:
            raise FileNotFoundError("browser_speed: no chromedriver found; install chromium-driver")
        os.environ |= {"MINIWOB_CHROME_BINARY": chromium(), "MINIWOB_CHROMEDRIVER": driver}
        import gymnasium
        import miniwob

        gymnasium.register_envs(miniwob)
        self.name, self._make, self._screenshots = name, gymnasium.make, screenshots
        self.env: Any = None

    def open(self, task: str) -> None:
        self.close()
        self.env = self._make(f"miniwob/{task}-v1")

    def reset(self, seeds: Sequence[int]) -> Outcome:
        options = None if self._screenshots else {"record_screenshots": False}
        self.seen, _ = self.env.reset(seed=int(seeds[0]), options=options)
        return Outcome([self.seen["utterance"]], [False], [0.0])

    def actions(self, plans: Sequence[Sequence[Move]]) -> list[list[Any]]:
        from miniwob.action import ActionTypes

        create = self.env.unwrapped.create_action
        found: list[Any] = []
        for kind, text in plans[0]:
            if kind == "click":
                button = next(e for e in self.seen["dom_elements"] if (e["tag"], e["text"]) == ("button", text))
                found.append(create(ActionTypes.CLICK_ELEMENT, ref=button["ref"]))
            else:
                field = next(e for e in self.seen["dom_elements"] if e["tag"].startswith("input"))
                found.append(create(ActionTypes.FOCUS_ELEMENT_AND_TYPE_TEXT, ref=field["ref"], text=text))
        return [found]

    def step(self, actions: Sequence[Any]) -> Outcome:
        self.seen, _, done, _, info = self.env.step(actions[0])
        return Outcome([self.seen["utterance"]], [bool(done)], [float(info["raw_reward"]) if done else 0.0])

    def miss(self) -> None:
        """An XPath without a match, by the package's driver as it is set up: it has no XPath action of its own."""
        from selenium.common.exceptions import NoSuchElementException
        from selenium.webdriver.common.by import By

        with contextlib.suppress(NoSuchElementException):
            self.env.unwrapped.instance.driver.find_element(By.XPATH, '//button[text()="not there"]')
            raise RuntimeError("miniwob: the miss was a hit")

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("miniwob", "selenium", "gymnasium", "numpy")}


class BrowserGym:
    """``gymnasium.make("browsergym/miniwob.<task>")``: Playwright, two new browsers for each episode.

    Playwright looks for a download of its own; the system's browser is linked there, in the peer's environment.
    """

    name = "browsergym"
    pages = 1

    def __init__(self) -> None:
        home = Path(sys.prefix)
        pages = find_spec("miniwob")
        if pages is None or not pages.submodule_search_locations:
            raise ImportError("browser_speed: the environment has no pages; build it with peers.py browsergym")
        os.environ["PLAYWRIGHT_BROWSERS_PATH"] = str(home / "browsers")
        os.environ["MINIWOB_URL"] = f"file://{pages.submodule_search_locations[0]}/html/miniwob/"
        import browsergym.miniwob  # noqa: F401  # pyright: ignore[reportMissingImports]
        import gymnasium
        from browsergym.core import _get_global_playwright  # pyright: ignore[reportMissingImports]

        expected = Path(_get_global_playwright().chromium.executable_path)
        expected.parent.mkdir(parents=True, exist_ok=True)
        expected.unlink(missing_ok=True)
        expected.symlink_to(chromium())
        self._make = gymnasium.make
        self.env: Any = None

    def open(self, task: str) -> None:
        self.close()
        self.env = self._make(f"browsergym/miniwob.{task}")

    def reset(self, seeds: Sequence[int]) -> Outcome:
        self.seen, _ = self.env.reset(seed=int(seeds[0]))
        return Outcome([self.seen["goal"]], [False], [0.0])

    def _bid(self, role: str, name: str | None = None) -> str:
        """The number of an element, from the accessibility tree of the last observation."""
        for node in self.seen["axtree_object"]["nodes"]:
            named = name is None or node.get("name", {}).get("value") == name
            if named and node.get("role", {}).get("value") == role and node.get("browsergym_id"):
                return node["browsergym_id"]
        raise RuntimeError(f"browsergym: no {role} {name!r} in the accessibility tree")

    def actions(self, plans: Sequence[Sequence[Move]]) -> list[list[Any]]:
        def action(kind: str, text: str) -> str:
            if kind == "click":
                return f"click({self._bid('button', text)!r})"
            return f"fill({self._bid('textbox')!r}, {text!r})"

        return [[action(kind, text) for kind, text in plans[0]]]

    def step(self, actions: Sequence[Any]) -> Outcome:
        self.seen, reward, done, _, _ = self.env.step(actions[0])
        return Outcome([self.seen["goal"]], [bool(done)], [float(reward)])

    def miss(self) -> None:
        """A click on a number that no element has: its own actions know elements by number."""
        self.seen, *_ = self.env.step('click("9999")')
        if not self.seen["last_action_error"]:
            raise RuntimeError("browsergym: the miss was a hit")

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("browsergym-core", "browsergym-miniwob", "playwright", "gymnasium")}


PEERS: dict[str, Callable[[], Side]] = {
    "miniwob": lambda: MiniWoB("miniwob", screenshots=True),
    "miniwob_no_images": lambda: MiniWoB("miniwob_no_images", screenshots=False),
    "browsergym": BrowserGym,
}


def main(argv: list[str] | None = None) -> int:
    name, args = parse_browser_args(tuple(PEERS), argv)
    warnings.filterwarnings("ignore")
    adopt_orphans()
    print_line(measure(PEERS[name](), args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
