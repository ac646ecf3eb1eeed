"""Studies: the study file, the pool of workers, and the report's numbers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

from callbacks.jsonl_logger import JsonlLogger
from callbacks.study import __main__ as command
from callbacks.study import plan, report
from callbacks.study.pool import Pool, expected_seconds, last_line, run_study
from modules.assurance import intervals as iv

ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests" / "support"


def _content(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": "two by two",
        "tasks": {"easy": {"low": 0, "high": 10}, "hard": {"low": -1, "high": 1.0, "flags": ["--task=hard"]}},
        "algorithms": {"base": None, "new": {"flags": ["--new"]}},
        "seeds": [0, 1],
        "baselines": {"new": "base"},
    }
    return {**content, **changes}


# -- the study file --
def test_runs_follow_the_study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("common", "easy", "new"):
        Path(f"{name}.yaml").write_text(f"x: {name}\n")
    study = plan.parse_study(
        _content(
            base=["common.yaml"],
            flags=["--all"],
            tasks={"easy": {"low": 0, "high": 1, "layers": ["easy.yaml"], "flags": ["--easy"]}},
            algorithms={"base": {}, "new": {"layers": ["new.yaml"], "flags": ["--new"]}},
            seeds=[7, 3],
        )
    )
    runs = plan.plan_runs(study, Path("out"))
    assert [str(run) for run in runs] == ["easy base seed 7", "easy new seed 7", "easy base seed 3", "easy new seed 3"]
    place = ["--seed_everything=7", "--runs=out/easy/new", "--experiment=seed-7"]
    layers = ["-c", "common.yaml", "-c", "easy.yaml", "-c", "new.yaml"]
    assert list(runs[1].arguments) == ["fit", *layers, "--all", "--easy", "--new", *place]
    assert runs[1].folder == Path("out/easy/new/seed-7")
    assert len({run.digest for run in runs}) == 4


def test_a_digest_is_what_a_run_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("x: 1\n")
    Path("b.yaml").write_text("x: 1\n")

    def digests(base: str, out: str = "out", **changes: Any) -> list[str]:
        return [run.digest for run in plan.plan_runs(plan.parse_study(_content(base=[base], **changes)), Path(out))]

    first = digests("a.yaml")
    assert digests("b.yaml", out="elsewhere", name="renamed", metric="other") == first
    assert digests("a.yaml", flags=["--more"]) != first
    Path("a.yaml").write_text("x: 2\n")
    assert not set(digests("a.yaml")) & set(first)


def test_some_of_a_study():
    runs = plan.plan_runs(plan.parse_study(_content()), Path("out"))
    assert len(runs) == 8
    assert len(plan.selected(runs, ["hard"], [], [1])) == 2
    with pytest.raises(ValueError, match=r"--algorithms: must be among base, new, got old"):
        plan.selected(runs, [], ["old"], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "the file: unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds: must be a list of whole numbers"),
        ({"seeds": [1, True]}, "seeds: must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds: must not repeat"),
        ({"tasks": {}}, "tasks: must be a mapping with at least one name"),
        ({"tasks": {"../up": {"low": 0, "high": 1}}}, r"tasks: names must be letters.*'\.\./up'"),
        ({"tasks": {"a": {"low": 0}}}, "tasks.a: needs the key 'high'"),
        ({"tasks": {"a": {"low": 1, "high": 1}}}, "tasks.a: low must be below high"),
        ({"tasks": {"a": {"low": "0", "high": 1}}}, "tasks.a.low: must be a number"),
        ({"tasks": {"a": {"low": 0, "high": 1, "layer": []}}}, "tasks.a: unknown key 'layer'; did you mean 'layers'"),
        ({"algorithms": {"a": {"flags": "--x"}}}, "algorithms.a.flags: must be a list of texts"),
        ({"algorithms": [1]}, "algorithms: must be a mapping"),
        ({"baselines": {"new": "old"}}, r"baselines: must name algorithms \(base, new\), got 'old'"),
        ({"metric": 3}, "metric: must be a text"),
    ],
)
def test_a_wrong_study_file_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan.parse_study(_content(**changes))


def test_missing_files_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="bad.yaml is not valid YAML"):
        plan.load_study(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match="config file 'emax/nothing' not found"):
        plan.plan_runs(plan.parse_study(_content(base=["emax/nothing"])), tmp_path)


# -- the pool --
FAKE = """
import json, os, pathlib, signal, sys, time

def main(arguments):
    flags = dict((word.lstrip("-") + "=").split("=")[:2] for word in arguments)
    folder = pathlib.Path(flags["runs"], flags["experiment"])
    with open("calls.txt", "a") as stream:
        stream.write(f"{os.getpid()} {folder} {flags.get('ckpt_path', '')}\\n")
    number = len(list(folder.glob("run-*"))) + 1
    run = pathlib.Path(flags["ckpt_path"]) if "ckpt_path" in flags else folder / f"run-{number:03d}"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "last.ckpt").touch()
    print("threads", os.environ["OMP_NUM_THREADS"], "stdin", repr(sys.stdin.read()))
    os.system("echo native")
    if "fail" in flags:
        print("error: it was told to fail", file=sys.stderr)
        print("afterthought", file=sys.stderr)
        return 2
    if "raise" in flags:
        raise SystemExit("no code")
    if "die" in flags and "ckpt_path" not in flags:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(flags.get("sleep", 0)))
    if "empty" not in flags:
        rows = [{"step": n, "frames": 10 * n, "val/return": float(n)} for n in range(3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    return 0
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs studies whose command line is :data:`FAKE`, in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake_train.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def run(content: dict[str, Any], workers: int = 1, resume: bool = False) -> int:
        study, out = plan.parse_study(content), Path("out")
        plan.save_study(content, out)
        return run_study(study, plan.plan_runs(study, out), Pool(out, workers, 3, resume, entry="fake_train:main"))

    return run


def _calls() -> list[list[str]]:
    return [line.split(" ") for line in Path("calls.txt").read_text().splitlines()]


def _state(folder: str) -> dict[str, Any]:
    return json.loads(Path("out", folder, "state.json").read_text())


def test_a_grid_runs_once(fake, capsys):
    assert fake(_content(), workers=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 runs, 0 of them done before"
    assert lines[-1].startswith("[8/8] ")
    assert all("val/return 2 in" in line for line in lines[1:])
    assert "; ETA " in lines[1]
    assert "; ETA " not in lines[-1]
    calls = _calls()
    assert len(calls) == 8
    assert len({pid for pid, *_ in calls}) <= 2  # workers, not a process a run
    log = Path("out/easy/base/seed-0/log.txt").read_text().splitlines()
    assert sorted(log) == ["native", "threads 3 stdin ''"]
    state = _state("hard/new/seed-1")
    assert (state["state"], state["run_folder"]) == ("done", "run-001")
    assert fake(_content()) == 0  # nothing is left
    assert len(_calls()) == 8
    assert fake(_content(seeds=[0, 1, 2])) == 0  # a larger study keeps what it has
    assert len(_calls()) == 12
    assert fake(_content(algorithms={"base": None, "new": {"flags": ["--new", "--other"]}})) == 0
    assert [folder for _, folder, _ in _calls()[12:]] == [
        f"out/{t}/new/seed-{s}" for s in (0, 1) for t in ("easy", "hard")
    ]
    assert _state("easy/new/seed-0")["run_folder"] == "run-002"


def test_failures_are_reported_and_the_others_go_on(fake, capsys):
    algorithms = {
        "bad": {"flags": ["--fail"]},
        "dies": {"flags": ["--die"]},
        "raises": {"flags": ["--raise"]},
        "blind": {"flags": ["--empty"]},
        "good": None,
    }
    content = _content(algorithms=algorithms, baselines={}, seeds=[0], tasks={"easy": {"low": 0, "high": 1}})
    assert fake(content) == 1
    captured = capsys.readouterr()
    assert "[1/5] easy bad seed 0: FAILED" in captured.out
    assert "[5/5] easy good seed 0: val/return 2 in" in captured.out
    errors = captured.err.splitlines()[::2]
    assert errors[0] == "failed: easy bad seed 0: exit 2: error: it was told to fail"
    assert errors[1].startswith("failed: easy dies seed 0: the worker process ended with code -9")
    assert errors[2].startswith("failed: easy raises seed 0: exit 1: SystemExit: no code")
    assert "easy blind seed 0: read_metric:" in errors[3]
    assert len(errors) == 4
    assert captured.err.splitlines()[1] == "  log: out/easy/bad/seed-0/log.txt"
    assert _state("easy/bad/seed-0")["state"] == "failed"
    assert fake(content) == 1  # failed ones are tried again, whole ones are not
    assert [folder.split("/")[2] for _, folder, _ in _calls()[5:]] == ["bad", "dies", "raises"]


def test_a_worker_that_can_not_start_says_why(fake, capsys):
    Path("fake_train.py").write_text("import nothing_of_that_name\n")
    assert fake(_content(seeds=[0], tasks={"easy": {"low": 0, "high": 1}})) == 1
    assert capsys.readouterr().err.count("ModuleNotFoundError: No module named 'nothing_of_that_name'") == 2


def test_an_unfinished_run_is_resumed_only_when_asked(fake, capsys):
    content = _content(seeds=[0], algorithms={"dies": {"flags": ["--die"]}}, baselines={})
    content["tasks"] = {"easy": {"low": 0, "high": 1}}
    assert fake(content) == 1
    assert fake(content) == 1  # from the beginning, in a folder of its own
    assert fake(content, resume=True) == 0
    folder = "out/easy/dies/seed-0"
    assert [call[2] for call in _calls()] == ["", "", f"{folder}/run-002"]
    assert _state("easy/dies/seed-0")["run_folder"] == "run-002"
    content["algorithms"] = {"dies": {"flags": ["--die", "--other"]}}
    assert fake(content, resume=True) == 1  # other settings: the old checkpoints are not this run's
    assert _calls()[-1][2] == ""
    assert fake(content, resume=True) == 0
    assert _calls()[-1][2] == f"{folder}/run-003"


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()  # dead, its parent has not looked yet


SLEEPY = """
import sys
from pathlib import Path
from callbacks.study import plan
from callbacks.study.pool import Pool, run_study
study, _ = plan.load_study(Path("study.yaml"))
out = Path("out")
sys.exit(run_study(study, plan.plan_runs(study, out), Pool(out, 2, entry="fake_train:main")))
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_study_that_ends_takes_its_workers_with_it(fake, tmp_path, how):
    content = _content(seeds=[0], algorithms={"a": None, "b": {"flags": ["--sleep=600"]}}, baselines={})
    Path("study.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPY],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (Path("calls.txt").is_file() and len(_calls()) == 4):  # both short runs are over, both long ones begun
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=30)
    if how == "SIGKILL":
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert errors == "interrupted: 2 of 4 runs ended; the same command goes on\n"
    while not all(_gone(int(pid)) for pid, *_ in _calls()):
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)
    assert [_state(f"{task}/a/seed-0")["state"] for task in ("easy", "hard")] == ["done", "done"]
    assert [_state(f"{task}/b/seed-0")["state"] for task in ("easy", "hard")] == ["started", "started"]
    for run in ("easy", "hard"):  # what is left goes on: nothing is locked, what is done stays
        Path("out", run, "b", "seed-0", "state.json").unlink()
    content["algorithms"] = {"a": None, "b": None}
    assert fake(content) == 0
    assert [folder for _, folder, _ in _calls()[4:]] == ["out/easy/b/seed-0", "out/hard/b/seed-0"]


def test_two_studies_do_not_share_a_folder(fake):
    Path("out").mkdir()
    with FileLock("out/.lock"), pytest.raises(ValueError, match="another study is running in out"):
        fake(_content())
    assert fake(_content()) == 0


def test_a_pool_needs_workers(tmp_path):
    with pytest.raises(ValueError, match="--workers: must be at least 1, got 0"):
        Pool(tmp_path, 0)
    with pytest.raises(ValueError, match="--threads: must be at least 1, got 0"):
        Pool(tmp_path, 1, 0)


def test_expected_seconds_by_hand():
    runs = plan.plan_runs(
        plan.parse_study(_content(seeds=[0])), Path("out")
    )  # easy base, easy new, hard base, hard new
    times = {("easy", "base"): [10.0, 20.0], ("hard", "new"): [30.0]}
    assert expected_seconds(runs, times, 2) == (15 + 20 + 20 + 30) / 2
    assert expected_seconds(runs[3:], times, 2) == 30  # one run is not shared
    assert expected_seconds([], times, 2) == 0


def test_last_line_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert last_line(log) == "(no output)"
    log.write_text("one\ntwo\n\n")
    assert last_line(log) == "two"
    log.write_bytes(b"error: first\nerror: second \xff\nTraceback\n")
    assert last_line(log) == "error: second \ufffd"


# -- the real command line --
def test_a_tiny_grid_trains_resumes_and_is_compared(tmp_path, monkeypatch, cli, support_configs, capsys):
    """Runs in a warm worker equal runs of their own process, and a killed one resumes to the same result."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
    content = {
        "name": "tiny",
        "base": [str(support_configs / "tiny.yaml")],
        "tasks": {"regression": {"low": 0, "high": 4}},
        "algorithms": {"whole": None, "killed": {"flags": ["--model.kill_at=9"]}},
        "seeds": [5],
        "metric": "val/loss",
        "x": "step",
    }
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    argv = ["run", "study.yaml", "--out", "out", "--workers", "1"]
    assert command.main(argv) == 1  # the second run kills its worker
    assert "the worker process ended with code -9" in capsys.readouterr().err
    assert command.main([*argv, "--resume"]) == 0
    assert "compare with: python -m callbacks.study report out" in capsys.readouterr().out
    assert cli("fit", "-c", support_configs / "tiny.yaml", "--seed_everything=5", "--experiment=alone") == 0

    def rows(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in lines]
        return [row for row in kept if set(row) - {"step", "epoch"}]

    alone = rows(tmp_path / "runs" / "alone" / "run-001")
    assert any("val/loss" in row for row in alone)
    for name in ("whole", "killed"):
        assert [path.name for path in Path("out/regression", name, "seed-5").glob("run-*")] == ["run-001"]
        assert rows(Path("out/regression", name, "seed-5", "run-001")) == alone
    assert command.main(["report", "out", "--no-figures"]) == 0
    text = capsys.readouterr().out
    final = np.mean([row["val/loss"] for row in alone if "val/loss" in row][-3:])
    assert f"{final:.3g} (1)" in text
    assert "fewer than 2 runs of whole, killed" in text


# -- the report --
Values = dict[tuple[str, str, int], list[float]]
VALUES: Values = {
    ("easy", "base", 0): [0, 2, 4, 6],
    ("easy", "base", 1): [0, 0, 2, 4],
    ("easy", "new", 0): [0, 6, 9, 9],
    ("easy", "new", 1): [0, 4, 8, 6],
    ("hard", "base", 0): [-1, -1, 0, 0],
    ("hard", "base", 1): [-1, 0, 0, -1],
    ("hard", "new", 0): [-1, 1, 1, 1],
    ("hard", "new", 1): [-1, -1, 1, 0],
}


def _finished(out: Path, content: dict[str, Any], values: Values, lengths: dict[Any, int] | None = None) -> None:
    """Run folders of the runs in ``values`` as training and the pool leave them: evaluations every 100 frames."""
    plan.save_study(content, out)
    for run in plan.plan_runs(plan.parse_study(content), out):
        cell = (run.task, run.algorithm, run.seed)
        if cell not in values:
            continue
        logger = JsonlLogger(run.folder / "run-001")
        for number, value in enumerate(values[cell]):
            logger.log_metrics({"train/loss": 0.0}, number)
            logger.log_metrics({"val/return": value, "frames": (lengths or {}).get(cell, 100) * number}, number)
        plan.write_state(run, "done", earlier=0, run_folder="run-001", seconds=1.0, arguments=[])


def _report(out: Path, **settings: Any) -> dict[str, Any]:
    return report.report_study(out, report.Settings(**settings), figures=False)[1]


def _row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def test_numbers_by_hand(tmp_path):
    _finished(tmp_path, _content(), VALUES)
    results = _report(tmp_path, last=2, replicates=500)
    assert results["missing"] == {}
    assert results["notes"] == []
    final = _row(results["tasks"], task="easy", algorithm="base", measure="final")
    assert final["values"] == [5, 3]
    assert (final["mean"], final["standard_error"], final["n"]) == (4, 1, 2)
    assert _row(results["tasks"], task="easy", algorithm="new", measure="best")["values"] == [9, 8]
    area = _row(results["tasks"], task="easy", algorithm="new", measure="auc")
    assert area["values"] == pytest.approx([(3 + 7.5 + 9) / 3, (2 + 6 + 7) / 3])
    # normalised final scores; base: easy .5 .3, hard .5 .25; new: easy .9 .7, hard 1 .75
    one = _row(results["aggregates"], algorithm="base", measure="final", statistic="iqm")
    assert one["estimate"] == pytest.approx((0.3 + 0.5) / 2)
    assert (one["runs"], one["tasks"]) == (2, 2)
    expected = iv.aggregate([[0.5, 0.5], [0.3, 0.25]], replicates=500)
    assert (one["low"], one["high"]) == (pytest.approx(float(expected.low)), pytest.approx(float(expected.high)))
    gap = _row(results["aggregates"], algorithm="new", measure="final", statistic="optimality_gap")
    assert gap["estimate"] == pytest.approx(1 - 3.35 / 4)
    whole = _row(results["comparisons"], task="all", measure="final")
    assert whole["iqm_difference_estimate"] == pytest.approx((0.75 + 0.9) / 2 - 0.4)
    assert whole["iqm_difference_low"] < whole["iqm_difference_estimate"] < whole["iqm_difference_high"]
    assert whole["probability_of_improvement_estimate"] == 1
    hard = _row(results["comparisons"], task="hard", measure="final")
    assert hard["iqm_difference_estimate"] == pytest.approx(0.875 - 0.375)
    assert {(row["task"], row["measure"]) for row in results["comparisons"]} == {
        (task, measure) for task in ("all", "easy", "hard") for measure in ("final", "auc")
    }


def test_what_is_missing_is_named(tmp_path):
    content = _content(seeds=[0, 1, 2])
    values = {**VALUES, ("hard", "new", 1): [0, float("nan"), 1], ("easy", "base", 2): [1], ("easy", "new", 2): [3, 5]}
    _finished(tmp_path, content, values)
    runs = {str(run): run for run in plan.plan_runs(plan.parse_study(content), tmp_path)}
    plan.write_state(runs["hard base seed 2"], "failed", earlier=0, error="exit 1: error: boom")
    plan.write_state(runs["easy base seed 0"], "started", earlier=0)
    results = _report(tmp_path, replicates=50)
    assert results["missing"] == {
        "easy base seed 0": "not finished",
        "easy base seed 2": "needs 2 evaluations at least, has 1",
        "hard new seed 1": "'val/return' is not finite at frames 100",
        "hard base seed 2": "exit 1: error: boom",
        "hard new seed 2": "not started",
    }
    assert "easy: left out of aggregates: fewer than 2 runs of base" in results["notes"]
    assert "hard: left out of aggregates: fewer than 2 runs of new" in results["notes"]
    assert results["aggregates"] == results["comparisons"] == []
    assert not (tmp_path / "report" / "comparisons.csv").exists()
    assert _row(results["tasks"], task="easy", algorithm="base", measure="final")["standard_error"] is None


def test_fewer_runs_on_a_task_shorten_the_others(tmp_path):
    values = {**VALUES, ("easy", "new", 2): [9.0, 9.0, 9.0, 9.0]}
    _finished(tmp_path, _content(seeds=[0, 1, 2]), values)
    results = _report(tmp_path, replicates=50, last=2)
    assert "new: aggregates use the first 2 runs of each task, the fewest there are" in results["notes"]
    one = _row(results["aggregates"], algorithm="new", measure="final", statistic="mean")
    assert one["estimate"] == pytest.approx(3.35 / 4)


def test_an_algorithm_that_has_not_begun_drops_no_task(tmp_path):
    values = {cell: curve for cell, curve in VALUES.items() if cell[1] == "base"}
    _finished(tmp_path, _content(), values)
    results = _report(tmp_path, replicates=50)
    assert {row["algorithm"] for row in results["aggregates"]} == {"base"}
    assert "algorithm new: no finished run" in results["notes"]
    assert results["comparisons"] == []


def test_areas_are_taken_over_the_span_that_all_runs_share(tmp_path):
    _finished(tmp_path, _content(), VALUES, lengths={("easy", "new", 0): 200})
    results = _report(tmp_path, replicates=50)
    area = _row(results["tasks"], task="easy", algorithm="new", measure="auc")
    # twice the frames an evaluation: [0, 300] holds 0, 6 at 200 and 7.5 at 300
    assert area["values"][0] == pytest.approx((3 * 200 + 6.75 * 100) / 300)
    assert results["notes"] == ["easy: runs differ in length; auc is over the common span [0, 300]"]


def test_runs_of_several_revisions_are_noted(tmp_path):
    _finished(tmp_path, _content(), VALUES)
    for number, path in enumerate(sorted(tmp_path.rglob("run-001"))):
        record = {"git_revision": "a" * 40 if number < 3 else "b" * 40, "git_dirty": number == 0}
        (path / "environment.json").write_text(json.dumps(record))
    (note,) = _report(tmp_path, replicates=50)["notes"]
    for part in ("aaaaaaaaaaaa with changes (1)", "aaaaaaaaaaaa (2)", "bbbbbbbbbbbb (5)"):
        assert part in note


def test_files_and_tables(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need the extra 'marl'")
    _finished(tmp_path, _content(), VALUES)
    assert command.main(["report", str(tmp_path), "--replicates", "200", "--markdown", "--last", "2"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "report"
    assert printed.strip() == (folder / "report.md").read_text().strip()
    assert "| easy | 4 ± 1 (2)        | 8 ± 1 (2)       |" in printed
    assert "95 % stratified bootstrap intervals" in printed
    assert "| new - base           | all  | final   | 0.425 [" in printed
    stored = json.loads((folder / "report.json").read_text())
    assert stored["settings"] == {"last": 2, "replicates": 200, "confidence": 0.95, "seed": 0}
    for name in ("tasks", "aggregates", "comparisons"):
        with open(folder / f"{name}.csv", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == len(stored[name])
        assert "values" not in rows[0]
    assert float(rows[0]["iqm_difference_low"]) == stored["comparisons"][0]["iqm_difference_low"]
    for name in ("learning_curves", "aggregate_curve", "intervals", "performance_profile"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert command.main(["report", str(tmp_path), "--replicates", "200", "--no-figures"]) == 0
    assert "|" not in capsys.readouterr().out


def test_figures_of_a_study_that_has_just_begun(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra 'marl'")
    _finished(tmp_path, _content(), {("easy", "base", 0): [0, 1, 2]})
    report.report_study(tmp_path, report.Settings(replicates=50))
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == ["learning_curves.png"]


def test_aggregate_curve_by_hand(tmp_path, monkeypatch):
    """Tasks of equal length: the first point is 0, the last the IQM of the last evaluations; bands hold the line."""
    pytest.importorskip("matplotlib", reason="figures need the extra 'marl'")
    from callbacks.study import figures

    drawn: dict[str, tuple[np.ndarray, ...]] = {}
    monkeypatch.setattr(figures, "draw_band", lambda axes, *curve: drawn.update({curve[-1]: curve[:-1]}))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    study = plan.parse_study(_content())
    _finished(tmp_path, _content(), VALUES)
    curves = report.read_curves(study, plan.plan_runs(study, tmp_path))
    figures.aggregate_curves(study, curves.runs, curves.spans, ["base", "new"], {"replicates": 300})
    x, middle, low, high = drawn["base"]
    assert (x[0], x[-1], len(x)) == (0, 300, figures.GRID)
    assert middle[0] == low[0] == high[0] == 0
    assert middle[-1] == pytest.approx((0.5 + 0.4) / 2)  # easy .6 .4, hard .5 0
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert drawn["new"][1][-1] == pytest.approx((0.9 + 0.6) / 2)  # easy .9 .6, hard 1 .5


def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(_content()))
    for argv, message in [
        (["run", "nothing", "--out", "out"], "config file 'nothing' not found"),
        (["run", "study.yaml", "--out", "out", "--workers", "0"], "--workers: must be at least 1"),
        (["run", "study.yaml", "--out", "out", "--tasks", "harder"], "--tasks: must be among easy, hard, got harder"),
        (["report", "out"], "study.yaml does not exist: name the --out folder"),
        (["report", "out", "--last", "0"], "--last: must be at least 1"),
    ]:
        assert command.main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    plan.save_study(_content(), Path("out"))
    assert command.main(["report", "out"]) == 1
    assert "no run can be compared yet; easy base seed 0: not started" in capsys.readouterr().err


def test_a_dry_run_prints_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(_content()))
    _finished(Path("out"), _content(), {("easy", "base", 1): [1, 2]})
    assert command.main(["run", "study.yaml", "--out", "out", "--dry-run", "--tasks", "easy", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = "--seed_everything=1 --runs=out/easy/base --experiment=seed-1"
    assert lines[0] == f"done     python -m train fit {place}"
    assert lines[1].startswith("new      python -m train fit --new ")


def test_it_runs_as_a_module_without_lightning(tmp_path):
    _finished(tmp_path / "out", _content(), VALUES)
    code = (
        "import sys; from callbacks.study.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ('lightning' in sys.modules or 'torch' in sys.modules) * 9)"
    )
    argv = ["report", str(tmp_path / "out"), "--replicates", "50", "--no-figures"]
    for start in (["-m", "callbacks.study"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *start, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "two by two: val/return along frames" in done.stdout
