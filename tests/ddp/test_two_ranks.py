"""Two processes over gloo: equal to one process with the same global batch, and exact through kill and resume."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ddp
TWO_RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def _final(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def _losses(folder: Path, key: str = "train/loss") -> dict[int, float]:
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def _check(done: subprocess.CompletedProcess, code: int = 0) -> None:
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_kill_and_resume_of_two_ranks_is_bitwise(cli_process, support_configs, tmp_path):
    """Rank 0 is killed by SIGKILL; dropout and noise differ by rank, so each rank's generators must come back."""
    config = support_configs / "tiny.yaml"
    _check(cli_process("fit", "-c", config, "--experiment", "whole", *TWO_RANKS))
    killed = cli_process(
        "fit", "-c", config, "--experiment", "killed", *TWO_RANKS, "--model.init_args.kill_at=7"
    )  # both ranks kill themselves after step 7; the checkpoint of step 6 is whole
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    _check(cli_process("fit", "-c", config, "--experiment", "killed", *TWO_RANKS, "--ckpt_path", "last"))
    whole, resumed = (_final(tmp_path / "runs" / name / "run-001") for name in ("whole", "killed"))
    assert whole["global_step"] == resumed["global_step"] == 12
    assert len(whole["plumbline"]["rank_files"]) == 2
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    one, other = (_losses(tmp_path / "runs" / name / "run-001") for name in ("whole", "killed"))
    assert one == other
    states = [
        torch.load(tmp_path / "runs" / "whole" / "run-001" / "checkpoints" / entry["name"], weights_only=True)
        for entry in whole["plumbline"]["rank_files"]
    ]
    assert not torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"]), "ranks share one random stream"


def test_llemma_two_ranks_equal_one(cli, cli_process, support_configs, tmp_path):
    """(2 ranks, A=2) = (1 rank, A=4) on the same samples, losses to 1e-5; and a kill of both ranks resumes bitwise."""
    config = support_configs / "llemma_tiny.yaml"
    every = "--trainer.val_check_interval"
    assert cli("fit", "-c", config, "--experiment", "one", "--trainer.accumulate_grad_batches=4", f"{every}=16") == 0
    two = [*TWO_RANKS, "--trainer.accumulate_grad_batches=2", f"{every}=8"]
    _check(cli_process("fit", "-c", config, "--experiment", "two", *two))
    folders = {name: tmp_path / "runs" / name / "run-001" for name in ("one", "two", "cut")}
    for key, tolerance in (("train/loss", 1e-5), ("val/loss", 1e-5), ("tokens_seen", 0.0)):
        one, both = _losses(folders["one"], key), _losses(folders["two"], key)
        assert one.keys() == both.keys()
        assert len(one) >= 3
        assert all(abs(one[step] - both[step]) <= tolerance for step in one), key
    first, second = _final(folders["one"])["state_dict"], _final(folders["two"])["state_dict"]
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    # SIGKILL of the whole group in step 8, then resume
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal, lightning.pytorch.loops.training_epoch_loop as loop\n"
        "real, left = loop._TrainingEpochLoop.advance, [16]\n"
        "def advance(self, *a):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *a)\n"
        "loop._TrainingEpochLoop.advance = advance\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = cli_process("fit", "-c", config, "--experiment", "cut", *two, PYTHONPATH=f"{tmp_path}:{root}")
    assert done.returncode != 0
    killer.unlink()
    _check(cli_process("fit", "-c", config, "--experiment", "cut", *two, "--ckpt_path", "last"))
    third = _final(folders["cut"])["state_dict"]
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert _losses(folders["two"]) == _losses(folders["cut"])
