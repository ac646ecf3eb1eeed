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
