"""Kill and resume: weights, optimiser and logged losses equal the uninterrupted run's, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch


def _final(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def _rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]


def _assert_equal_runs(one: Path, other: Path) -> None:
    first, second = _final(one), _final(other)
    assert first["global_step"] == second["global_step"]
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    for index, state in first["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["optimizer_states"][0]["state"][index][key]), (index, key)
    assert first["lr_schedulers"] == second["lr_schedulers"]
    assert _rows(one) == _rows(other)


KILLS = [(6, "train"), (8, "validation"), (11, "train")]  # 6: right after a checkpoint, before its row is logged again


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kill_and_resume_is_bitwise(cli, cli_process, support_configs, tmp_path, accumulate):
    """SIGKILL after training steps and inside validation; each resume continues in the same folder."""
    config = support_configs / "tiny.yaml"
    extra = [f"--trainer.accumulate_grad_batches={accumulate}", f"--trainer.val_check_interval={4 * accumulate}"]
    assert cli("fit", "-c", config, "--experiment", "whole", *extra) == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    kills = KILLS if accumulate == 1 else KILLS[1:2]
    arguments: list[str] = []
    for step, where in kills:  # one run, killed again and again
        killed = cli_process(
            "fit", "-c", config, "--experiment", "killed", *extra, *arguments,
            f"--model.init_args.kill_at={step}", f"--model.init_args.kill_where={where}",
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        arguments = ["--ckpt_path", "last"]
    assert cli("fit", "-c", config, "--experiment", "killed", *extra, "--ckpt_path", "last") == 0
    assert [p.name for p in (tmp_path / "runs" / "killed").iterdir()] == ["run-001"]
    _assert_equal_runs(whole, tmp_path / "runs" / "killed" / "run-001")


def test_sigterm_saves_at_the_next_step_and_resumes_bitwise(cli, support_configs, tmp_path, monkeypatch):
    """A polite stop loses no step even when no checkpoint was due."""
    import os

    import tiny

    config = support_configs / "tiny.yaml"
    never = "--checkpoint.every_n_steps=1000"
    assert cli("fit", "-c", config, "--experiment", "whole", never) == 0

    def terminate(self, outputs, batch, batch_idx):
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tiny.TinyModule, "on_train_batch_end", terminate)
    assert cli("fit", "-c", config, "--experiment", "stopped", never) == 128 + signal.SIGTERM
    stopped = tmp_path / "runs" / "stopped" / "run-001"
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli("fit", "-c", config, "--experiment", "stopped", never, "--ckpt_path", "last") == 0
    _assert_equal_runs(tmp_path / "runs" / "whole" / "run-001", stopped)


def test_finished_run_resumed_with_more_steps_equals_the_long_run(cli, support_configs, tmp_path):
    config = support_configs / "tiny.yaml"
    assert cli("fit", "-c", config, "--experiment", "long", "--trainer.max_steps=16") == 0
    assert cli("fit", "-c", config, "--experiment", "grown", "--trainer.max_steps=8") == 0
    assert cli("fit", "-c", config, "--experiment", "grown", "--trainer.max_steps=16", "--ckpt_path", "last") == 0
    long, grown = (tmp_path / "runs" / name / "run-001" for name in ("long", "grown"))
    for name, weight in _final(long)["state_dict"].items():
        assert torch.equal(weight, _final(grown)["state_dict"][name]), name
