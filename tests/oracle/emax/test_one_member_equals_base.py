"""EMAX with one member against the base algorithm: whole runs through the command line, bit for bit.

UCB with any beta is greedy, the averaged target is the one target network, and the vote is the greedy action, so that
the two runs take the same actions, store the same replay, log the same rows and end with the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

BASE = {"kind": "epsilon_greedy", "target": "own_target", "evaluator": "greedy_mean"}
EMAX = {"kind": "ucb", "target": "mean_target", "evaluator": "majority_vote"}


def _config(path: Path, algorithm: dict[str, str], beta: float, mixing: str, recurrent: bool, double_q: bool) -> Path:
    """A run of 41 batches of two updates, restricted actions, evaluated four times."""
    scalarise = "none" if mixing == "none" else "sum"
    path.write_text(
        f"""
model:
  class_path: modules.emax.ValueMARL
  init_args:
    ensemble: {{size: 1}}
    explorer: {{kind: {algorithm["kind"]}, beta: {beta}, epsilon_start: 0.5, epsilon_finish: 0.1, epsilon_frames: 400}}
    target: {{kind: {algorithm["target"]}, double_q: {str(double_q).lower()}, update_every: 7}}
    mixing: {{kind: {mixing}, hypernet_hidden: 8, embed: 4}}
    network: {{hidden: 16, recurrent: {str(recurrent).lower()}}}
    reward: {{scalarise: {scalarise}, norm: standardise}}
    evaluator: {algorithm["evaluator"]}
    learning_rate: 5.0e-3
data:
  class_path: datamodules.MARLDataModule
  init_args:
    task: lbf/5x5-2p-1f-coop
    options: {{episode_limit: 10}}
    envs: 4
    frames_per_batch: 16
    updates_per_batch: 2
    total_frames: 720
    learning_starts: 80
    batch_size: 8
    capacity: 300
    evaluation_episodes: 8
trainer: {{accelerator: cpu, max_epochs: 1, val_check_interval: 10, log_every_n_steps: 1, enable_progress_bar: false,
  num_sanity_val_steps: 0}}
checkpoint: {{every_n_steps: 20}}
""",
        encoding="utf-8",
    )
    return path


def _final(folder: Path) -> dict[str, Any]:
    """Weights, Adam's moments, and the replay's bytes: every observation, action and reward of the run."""
    last = (folder / "checkpoints" / "last.ckpt").resolve()
    whole, replay = checkpoint(folder), last.with_suffix("").with_suffix(".rank-0")
    files = {path.name: torch.tensor(list(path.read_bytes())) for path in sorted(replay.glob("*.bin"))}
    assert any(name.startswith("action.") for name in files)
    return {"weights": dict(whole["state_dict"]), "optimizer": whole["optimizer_states"], "replay": files}


@pytest.mark.parametrize(
    ("mixing", "recurrent", "beta", "double_q"),
    [("none", False, 1.0, False), ("vdn", False, 30.0, True), ("qmix", False, 0.1, False), ("qmix", True, 5.0, False)],
)
def test_whole_run_with_one_member_is_the_base_algorithms(cli, tmp_path, mixing, recurrent, beta, double_q):
    for name, algorithm in (("base", BASE), ("emax", EMAX)):
        file = _config(tmp_path / f"{name}.yaml", algorithm, beta, mixing, recurrent, double_q)
        assert cli("fit", "-c", file, f"--experiment={name}") == 0
    base, emax = (tmp_path / "runs" / name / "run-001" for name in ("base", "emax"))
    logged = rows(base)
    assert logged == rows(emax)
    assert sum("train/loss" in row for row in logged) == 41
    assert sum("val/return" in row for row in logged) == 4
    assert all(row["q/std"] == 0.0 and row["ucb/disagree"] == 0.0 for row in logged if "q/std" in row)
    assert_same(_final(base), _final(emax))


def test_two_runs_that_differ_do_not_pass(cli, tmp_path):
    """The comparison above can fail: another schedule of epsilon gives other bytes."""
    finals = []
    for number, finish in enumerate((0.1, 0.2), 1):
        file = _config(tmp_path / "emax.yaml", EMAX, 1.0, "vdn", False, False)
        finish = f"--model.init_args.explorer.epsilon_finish={finish}"
        assert cli("fit", "-c", file, "--experiment=emax", finish) == 0
        finals.append(_final(tmp_path / "runs" / "emax" / f"run-{number:03d}"))
    with pytest.raises(AssertionError):
        assert_same(finals[0], finals[1])
