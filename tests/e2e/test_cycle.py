"""The alignment cycle as a user types it: align, verify, card; bad input; ranks; a kill with SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("cycle")  # one cycle serves most tests
ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--arguments={trainer.max_steps: 200, trainer.val_check_interval: 200, checkpoint.every_n_steps: 40}"]
CYCLE = ["align", "-c", "cycle/planted", *SHORT, "--assure.n0=400", "--assure.n_max=800"]


@pytest.fixture(scope="module")
def cycle(tmp_path_factory) -> Path:
    """Two rounds of a short cycle, whose gate fails."""
    folder = tmp_path_factory.mktemp("cycle")
    done = _align(folder, "--align.max_rounds=2")
    assert done.returncode == 3, done.stdout + done.stderr
    return folder / "runs/cycle-planted/cycle"


def _command(*more: str) -> list[str]:
    return [sys.executable, "-m", "train", *CYCLE, *more]


def _environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PLUMBLINE_SIGNING")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def _align(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        _command(*more), cwd=folder, env=_environment(**environment), capture_output=True, text=True, timeout=240
    )


def test_two_rounds_are_too_few_and_say_so(cycle):
    decisions = [json.loads(line) for line in (cycle / "ledger.jsonl").read_text().splitlines()]
    last = decisions[-1]["payload"]
    assert (last["outcome"], last["verdict"]) == ("rounds exhausted", "fail")
    objectives = (cycle / "round_01/objectives.yaml").read_text()
    assert "eps: 0.1" in objectives
    report = json.loads((cycle / "round_01/assurance/report.json").read_text())
    assert report["objectives"]["values"] == {"model.init_args.eps": 0.1}
    assert report["round"] == 1
    figures = {(one["name"], one["split"]): one["value"] for one in report["figures"]}
    first = json.loads((cycle / "round_00/assurance/report.json").read_text())
    before = {(one["name"], one["split"]): one["value"] for one in first["figures"]}
    assert figures["r.accuracy", "fresh"] > before["r.accuracy", "fresh"]
    for place in ("summary.html", "round_01/assurance/report.html", "round_01/assurance/card.md"):
        assert (cycle / place).stat().st_size > 1000


def test_verify_and_card(cycle, cli, capsys, tmp_path):
    assert cli("verify", cycle) == 0
    assert "verified" in capsys.readouterr().out
    assert cli("card", cycle) == 0
    assert "model-index" in capsys.readouterr().out
    report = cycle / "round_00/assurance/report.json"
    content = report.read_bytes()
    try:
        report.write_bytes(content.replace(b'"verdict": "fail"', b'"verdict": "pass"'))
        assert cli("verify", cycle) == 3
        assert "round_00/assurance/report.json" in capsys.readouterr().err.replace("\\n", "")
        assert cli("card", report.parent) == 2
    finally:
        report.write_bytes(content)


def test_a_round_by_hand_gives_the_same_report(cycle, cli, tmp_path):
    """Round 1 from its objectives layer and seeds: fit, assure (oracle group 12)."""
    layer = cycle / "round_01/objectives.yaml"
    config = (cycle / "round_01/fit/run-001/config.yaml").read_text()
    seed = next(line for line in config.splitlines() if line.startswith("seed_everything")).split()[-1]
    flags = ["--trainer.max_steps=200", "--trainer.val_check_interval=200", "--trainer.enable_progress_bar=false"]
    assert cli("fit", "-c", "planted/linear", "-c", layer, *flags, f"--seed_everything={seed}") == 0
    code = cli(
        "assure", "-c", "planted/linear", "-c", layer, "-c", cycle / "round_01/assure.yaml", *flags,
        "--ckpt_path=last", "--objectives", layer, "--out", tmp_path / "again",
    )  # fmt: skip
    assert code == 3
    assert (tmp_path / "again/report.json").read_bytes() == (cycle / "round_01/assurance/report.json").read_bytes()


@pytest.mark.ddp
def test_two_ranks_write_the_same_bytes(cycle, cli_process, tmp_path):
    layer = cycle / "round_01/objectives.yaml"
    done = cli_process(
        "assure", "-c", "planted/linear", "-c", layer, "-c", cycle / "round_01/assure.yaml", "-c", "hardware/ddp2",
        "--ckpt_path", cycle / "round_01/fit/run-001/checkpoints/last.ckpt", "--objectives", layer,
        "--out", tmp_path / "two", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr[-2000:]
    for name in ("report.json", "samples.jsonl", "card.md", "report.html", "signature.json"):
        assert (tmp_path / "two" / name).read_bytes() == (cycle / "round_01/assurance" / name).read_bytes(), name


def test_kill_9_and_rerun_give_the_same_ledger(cycle, tmp_path):
    """Killed while round 0 trains, and again while round 1 is on."""
    for wanted in ("round_00/fit/run-001/checkpoints/step-*.ckpt", "round_01/objectives.yaml"):
        driver = subprocess.Popen(
            _command("--align.max_rounds=2"), cwd=tmp_path, env=_environment(), stdout=subprocess.DEVNULL
        )
        folder, deadline = tmp_path / "runs/cycle-planted/cycle", time.monotonic() + 120
        while not any(folder.glob(wanted)):
            assert driver.poll() is None, "the driver ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert _align(tmp_path, "--align.max_rounds=2").returncode == 3
    again = tmp_path / "runs/cycle-planted/cycle"
    assert (again / "ledger.jsonl").read_bytes() == (cycle / "ledger.jsonl").read_bytes()
    assert (again / "summary.html").read_bytes() == (cycle / "summary.html").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align.max_round=2"], "unknown key 'align.max_round'"),
        (["--align.arm=findngs"], "align.arm"),
        (["--assure.limits=[{figure: r.acuracy, tau: 0.9}]"], "r.acuracy"),
        (["--assure.limits=[{figure: r.accuracy, tau: .nan}]"], "tau must be a number"),
        (["--assure.limits=[{figure: r.accuracy, tau: 0.9, kind: watch}]"], "no limit is a gate"),
        (["--assure.suite=quik"], "suite"),
        (["--layers=[planted/liner]"], "planted/linear"),
        (["--objectives=hostile.yaml"], "model.class_path"),
        (["--align.knobs=[{path: model.init_args.epss, rule: mult, driven_by: [r.accuracy], start: 0.0, "
          "bounds: [0, 1]}]"], "model.init_args.eps"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(cli, capsys, tmp_path, flags, message):
    (tmp_path / "hostile.yaml").write_text("model: {class_path: os.system, init_args: {eps: 0.1}}\n")
    assert cli(*CYCLE, *flags, "--out=here") == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.glob("here/round_*"))


def test_assure_refuses_what_does_not_fit(cli, capsys):
    flags = ["-c", "planted/linear", "--trainer.enable_progress_bar=false", "--suite=quick"]
    assert cli("assure", *flags, "--limits=[{figure: r.nashconv, tau: 0.1}]") == 2
    assert "r.nashconv" in capsys.readouterr().err
    assert cli("assure", *flags, "--ckpt_path=nothing.ckpt") == 1
    assert "nothing.ckpt" in capsys.readouterr().err
