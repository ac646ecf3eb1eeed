"""Planted features through the command line: figures, bitwise resume, group objectives by config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

from modules.planted import PlantedClassifier

QUICK = [
    "--trainer.accelerator=cpu", "--trainer.max_steps=8", "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=3",
    "--checkpoint.keep_last=9", "--data.init_args.val_size=200",
]  # fmt: skip
GROUPS = [
    "--data.init_args.groups=[1.0, -1.0]", "--data.init_args.shares=[0.9, 0.1]", "--model.init_args.eps=0.1",
    "--model.init_args.objective.init_args={kind: dro, groups: 2, eta: 0.5}",
]  # fmt: skip


def _run(tmp_path: Path, name: str) -> Path:
    return tmp_path / "runs" / name / "run-001"


def test_a_linear_run_logs_the_closed_form_and_its_checkpoint_loads_alone(cli, tmp_path):
    assert cli("fit", "-c", "planted/linear", *QUICK, "--experiment=one", "--model.init_args.eps=0.2") == 0
    folder = _run(tmp_path, "one")
    figures = [row for row in rows(folder) if "val/robust_accuracy" in row]
    assert len(figures) == 2
    for row in figures:
        assert row["val/robust_accuracy"] == pytest.approx(row["val/exact_robust_accuracy"], abs=1e-9)
        assert 0 <= row["val/robust_accuracy"] <= row["val/clean_accuracy"] <= 1
    last = folder / "checkpoints" / "last.ckpt"
    module = PlantedClassifier.load_from_checkpoint(last, weights_only=True)
    assert module.eps == 0.2
    assert torch.equal(module.network.weight, checkpoint(folder)["state_dict"]["network.weight"])
    assert cli("test", "-c", "planted/linear", *QUICK, "--ckpt_path", last, "--data.init_args.test_size=300") == 0
    (tested,) = rows(tmp_path / "runs" / "planted-linear" / "test-001")
    assert tested["test/robust_accuracy"] == pytest.approx(tested["test/exact_robust_accuracy"], abs=1e-9)


@pytest.mark.parametrize("config", ["linear", "mlp"])
def test_resume_is_bitwise(cli, tmp_path, config):
    run = ["fit", "-c", f"planted/{config}", *QUICK, *(GROUPS if config == "mlp" else [])]
    assert cli(*run, "--experiment=whole") == 0
    whole = _run(tmp_path, "whole")
    assert cli(*run, "--experiment=again", "--ckpt_path", whole / "checkpoints" / "step-00000006.ckpt") == 0
    again = _run(tmp_path, "again")
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_same(checkpoint(whole)[key], checkpoint(again)[key], key)
    assert_same(rows(whole, 6), rows(again, 6))
    if config == "mlp":
        q = checkpoint(again)["state_dict"]["objective.q"]
        assert float(q.sum()) == pytest.approx(1.0)
        assert q[1] != 0.5
        last = rows(again)[-1]
        assert {"val/worst_group_robust_accuracy", "val/clean_accuracy/group_1"} <= {k for r in rows(again) for k in r}
        assert last["step"] >= 7


def test_other_data_and_groups_that_do_not_fit_end_in_one_line(cli, tmp_path, capsys):
    assert cli("fit", "-c", "planted/linear", *QUICK, "--experiment=whole") == 0
    start = _run(tmp_path, "whole") / "checkpoints" / "step-00000003.ckpt"
    capsys.readouterr()
    assert cli("fit", "-c", "planted/linear", *QUICK, "--ckpt_path", start, "--data.init_args.train_size=1000") == 1
    assert "train_size was 2000, is 1000" in capsys.readouterr().err
    assert cli("fit", "-c", "planted/linear", *QUICK, "--data.init_args.groups=[1.0, -1.0]") == 1
    assert "objective.groups is 1, the data's is 2: make them equal" in capsys.readouterr().err
