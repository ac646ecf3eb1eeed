"""The browser benchmark: pins, the shared solver and clock, equal episodes, ratios, and our side in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
GOALS = {
    "click-test": "Click the button.",
    "click-button": 'Click on the "Ok" button.',
    "enter-text": 'Enter "Myron" into the text field and press Submit.',
}


def line(rate: float, **changes: Any) -> dict[str, Any]:
    return {
        "episodes_per_wall_s": rate, "episodes_per_cpu_s": rate / 2, "miss_ms": 1000 / rate,
        "tasks": {"click-test": {"reset_ms": 10.0, "step_ms": 5.0}}, "goals": {"click-test": ["a", "b"]},
        "versions": {"x": "1"}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["miniwob", "browsergym"])
def test_the_peers_are_pinned_and_bring_no_torch(load, name):
    peers = load("peers")
    with_deps, without = peers.read_requirements((BENCHMARKS / "requirements" / f"{name}.txt").read_text())
    assert name in peers.PEERS
    assert all("==" in one for one in (*with_deps, *without))
    assert not any(one.startswith("torch") for one in (*with_deps, *without))


def test_a_peer_without_torch_is_not_asked_for_it(load, tmp_path, monkeypatch):
    peers = load("peers")
    ran: list[list[str]] = []

    def run(command: list[str], what: str) -> str:
        ran.append(command)
        if what.startswith("creating"):
            python = peers.peer_python(what.rpartition("/")[2], tmp_path)
            python.parent.mkdir(parents=True)
            python.touch()
        return "miniwob==1.1.0\n" if what == "pip freeze" else ""

    monkeypatch.setattr(peers, "_run", run)
    peers.ensure_peer("miniwob", tmp_path)
    assert not [command for command in ran if "import torch; print(torch.__version__)" in command]
    assert peers.installed_packages("miniwob", tmp_path) == {"miniwob": "1.1.0"}
    with pytest.raises(RuntimeError, match="ended with torch"):
        peers.ensure_peer("sb3", tmp_path)  # names torch; what is printed here is none


def test_the_worker_needs_nothing_but_the_standard_library():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import browser_worker; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(BENCHMARKS)], capture_output=True, text=True, check=True
    )
    for name in ("torch", "numpy", "gymnasium", "selenium", "miniwob"):
        assert f"'{name}'" not in done.stdout


def test_settings_reach_the_worker_and_nonsense_is_refused(load):
    worker = load("browser_worker")
    run = worker.BrowserArgs(("click-test", "enter-text"), 16, 2, 1, 7)
    assert worker.parse_browser_args(["a", "b"], ["b", *run.options()]) == ("b", run)
    for change, message in (
        ({"episodes": 0}, "episodes: must be >= 1, got 0"), ({"misses": -1}, "misses: must be >= 0, got -1"),
        ({"tasks": ("click-tab",)}, r"no solver for \['click-tab'\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            worker.BrowserArgs(**change)


def test_the_solver_reads_the_instruction(load):
    moves = load("browser_worker").moves
    assert moves("click-test", GOALS["click-test"]) == [("click", "Click Me!")]
    assert moves("click-button", GOALS["click-button"]) == [("click", "Ok")]
    assert moves("enter-text", GOALS["enter-text"]) == [("type", "Myron"), ("click", "Submit")]
    with pytest.raises(ValueError, match="click-button: unexpected instruction 'Click the button.'"):
        moves("click-button", "Click the button.")


class Scripted:
    """A side of two pages whose episodes are solved by every move of the solver, or end with ``reward``."""

    name, pages = "scripted", 2

    def __init__(self, worker: Any, reward: float = 1.0) -> None:
        self.outcome, self.reward = worker.Outcome, reward
        self.opened: list[str] = []
        self.seeds: list[int] = []
        self.left, self.missed, self.closed = 0, 0, False

    def open(self, task: str) -> None:
        self.opened.append(task)

    def reset(self, seeds: Sequence[int]) -> Any:
        self.seeds += seeds
        return self.outcome([GOALS[self.opened[-1]]] * 2, [False] * 2, [0.0] * 2)

    def actions(self, plans: Any) -> list[list[Any]]:
        self.left = len(plans[0])
        return [list(plan) for plan in plans]

    def step(self, actions: Any) -> Any:
        assert len(actions) == 2
        self.left -= 1
        return self.outcome([""] * 2, [self.left == 0] * 2, [self.reward if self.left == 0 else 0.0] * 2)

    def miss(self) -> None:
        self.missed += 1

    def close(self) -> None:
        self.closed = True

    def versions(self) -> dict[str, str]:
        return {"scripted": "1"}


def test_a_side_is_timed_over_the_asked_episodes(load):
    worker = load("browser_worker")
    side = Scripted(worker)
    found = worker.measure(side, worker.BrowserArgs(episodes=4, warmup=1, misses=3, seed=50))
    assert (found["episodes"], found["pages"], side.opened) == (12, 2, list(worker.TASKS))
    assert side.seeds[:6] == [10_000_000, 10_000_001, 50, 51, 52, 53]  # warm-up fills the pages, then the asked seeds
    assert {task: row["steps"] for task, row in found["tasks"].items()} == {
        "click-test": 1, "click-button": 1, "enter-text": 2,
    }  # fmt: skip
    assert found["goals"]["enter-text"] == [GOALS["enter-text"]] * 4
    assert (side.missed, side.closed) == (3, True)
    assert found["miss_ms"] is not None
    assert found["wall_s"] >= 0
    json.dumps(found)


def test_an_episode_that_is_not_solved_stops_the_benchmark(load):
    worker = load("browser_worker")
    with pytest.raises(RuntimeError, match="scripted: click-test with seed 10000000 was not solved.*reward -1"):
        worker.measure(Scripted(worker, reward=-1.0), worker.BrowserArgs(episodes=2))
    with pytest.raises(ValueError, match="must be a multiple of 2 pages, got 3"):
        worker.measure(Scripted(worker), worker.BrowserArgs(episodes=3))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_cpu_time_counts_children_while_they_live_and_after(load):
    worker = load("browser_worker")
    before = worker.tree_cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.4: pass\nprint(1, flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert worker.tree_cpu_seconds() - before >= 0.35
    child.communicate(b"\n")
    assert worker.tree_cpu_seconds() - before >= 0.35


def test_sides_that_were_asked_something_else_are_not_compared(load):
    check = load("browser_speed").check_equal_episodes
    other = {"click-test": ["a", "c"]}
    check({"miniwob": line(1.0), "browsergym": line(1.0, goals=other), "plumbline": line(2.0)})  # it seeds otherwise
    with pytest.raises(ValueError, match="click-test, episode 1: miniwob asked 'b', plumbline 'c'"):
        check({"miniwob": line(1.0), "plumbline": line(2.0, goals=other)})


def test_ratios_are_taken_within_a_round(load):
    rounds = [{"miniwob": line(10.0), "plumbline": line(30.0)}, {"miniwob": line(100.0), "plumbline": line(150.0)},
              {"miniwob": line(20.0), "plumbline": line(40.0)}]  # fmt: skip
    found = load("browser_speed").summarise(rounds)
    assert found["ratio_wall"] == {"plumbline / miniwob": {"median": 2.0, "min": 1.5, "max": 3.0}}
    assert found["episodes_per_wall_s"]["plumbline"] == {"median": 40.0, "min": 30.0, "max": 150.0}
    assert found["miss_ms"]["miniwob"] == {"median": 50.0, "min": 10.0, "max": 100.0}
    assert found["calls_ms"]["click-test"]["miniwob"]["reset"]["median"] == 10.0
    without = [{name: {**one, "episodes_per_cpu_s": None} for name, one in each.items()} for each in rounds]
    assert "ratio_cpu" not in load("browser_speed").summarise(without)


def test_a_run_writes_every_round_and_no_folder_of_this_machine(load, tmp_path, monkeypatch):
    driver = load("browser_speed")
    ran: list[tuple[str, list[str]]] = []

    def run_loop(name: str, command: list[str]) -> dict[str, Any]:
        ran.append((name, command))
        return line({"miniwob": 10.0, "browsergym": 1.0, "plumbline": 30.0}[name])

    monkeypatch.setattr(driver, "run_loop", run_loop)
    monkeypatch.setattr(driver, "ensure_peer", lambda name, root: root / name / "python")
    monkeypatch.setattr(driver, "browser_version", lambda: "Chromium 1")
    out = tmp_path / "out.json"
    argv = ["--sides", "miniwob", "browsergym", "plumbline", "--tasks", "click-test", "--rounds", "2", "--episodes",
            "16", "--root", str(tmp_path), "--date", "2026-01-02", "--out", str(out)]  # fmt: skip
    assert driver.main(argv) == 0
    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert record["command"].endswith("--rounds 2 --episodes 16 --date 2026-01-02")
    assert record["ratio_wall"]["plumbline / browsergym"]["median"] == 30.0
    assert len(record["rounds"]) == 2
    assert "goals" not in out.read_text()
    assert [name for name, _ in ran] == ["miniwob", "browsergym", "plumbline", "plumbline", "browsergym", "miniwob"]
    first = dict(ran[:3])
    assert first["miniwob"][0] == str(tmp_path / "miniwob" / "python")
    assert first["browsergym"][first["browsergym"].index("--episodes") + 1] == "4"
    assert first["miniwob"][first["miniwob"].index("--episodes") + 1] == "16"
    assert [command[-1] for name, command in ran if name == "plumbline"] == ["0", "16"]  # new episodes each round


def test_a_side_that_fails_ends_the_run_with_one_line(load, tmp_path, monkeypatch, capsys):
    driver = load("browser_speed")

    def run_loop(name: str, command: list[str]) -> dict[str, Any]:
        raise RuntimeError(f"{name} failed")

    monkeypatch.setattr(driver, "run_loop", run_loop)
    monkeypatch.setattr(driver, "browser_version", lambda: "Chromium 1")
    assert driver.main(["--sides", "plumbline", "--rounds", "1", "--out", str(tmp_path / "out.json")]) == 1
    assert capsys.readouterr().err == "plumbline failed\n"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(
    not (os.environ.get("PLUMBLINE_CHROMIUM") or shutil.which("chromium")), reason="needs the package chromium"
)
@pytest.mark.parametrize("name", ["plumbline", "plumbline_env"])
def test_our_sides_solve_every_episode_in_a_real_browser(load, name):
    pytest.importorskip("miniwob", reason="needs the extra 'rci'")
    driver, worker = load("browser_speed"), load("browser_worker")
    found = worker.measure(driver.OurPages(name), worker.BrowserArgs(episodes=2, warmup=1, misses=1))
    assert {task: row["steps"] for task, row in found["tasks"].items()} == {
        "click-test": 1, "click-button": 1, "enter-text": 3,
    }  # fmt: skip
    assert found["goals"]["click-test"] == ["Click the button."] * 2
    assert found["miss_ms"] < 5000
