"""MAPPO on rollouts: exact resume, both collectors, both critics, and what its datamodule refuses."""

from __future__ import annotations

import pytest
import torch
from population_runs import assert_same, checkpoint, rows


@pytest.mark.parametrize("critic", ["central", "local"])
def test_run_continues_exactly_and_equals_torchrl_collector(cli, support_configs, tmp_path, critic):
    run = ["fit", "-c", support_configs / "mappo_tiny.yaml", f"--model.init_args.critic={critic}"]
    assert cli(*run, "--experiment=whole", "--checkpoint.keep_last=9") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    start = whole / "checkpoints" / "step-00000005.ckpt"
    assert cli(*run, "--experiment=again", "--ckpt_path", start) == 0
    assert cli(*run, "--experiment=torchrl", "--data.init_args.collector=torchrl") == 0
    again, torchrl = (tmp_path / "runs" / name / "run-001" for name in ("again", "torchrl"))
    assert_same(dict(checkpoint(whole)["state_dict"]), dict(checkpoint(again)["state_dict"]))
    assert_same(rows(whole, 5), rows(again, 5))
    assert_same(rows(whole), rows(torchrl))
    logged = rows(whole)
    assert logged[-1]["frames"] == 768
    assert sum("val/return" in row for row in logged) == 3
    entropies = [row["train/entropy"] for row in logged if "train/entropy" in row]
    assert 1.7 < entropies[0] < torch.tensor(6.0).log()  # starts near uniform over six actions
    assert all(0.0 <= row["train/clip_fraction"] <= 1.0 for row in logged if "train/clip_fraction" in row)


def test_rows_of_an_epoch_are_every_step_once(cli, support_configs, monkeypatch):
    from datamodules import MARLRolloutDataModule

    seen = []
    served = MARLRolloutDataModule.next_batch

    def spy(self):
        batch = served(self)
        seen.append(batch)
        return batch

    monkeypatch.setattr(MARLRolloutDataModule, "next_batch", spy)
    assert cli("fit", "-c", support_configs / "mappo_tiny.yaml") == 0
    batch = seen[0]
    assert batch.batch_size == torch.Size([4, 32])
    first, second = (batch[2 * e : 2 * e + 2]["advantage"].reshape(64, -1).sort(0).values for e in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(batch[0]["advantage"], batch[2]["advantage"])


def test_wrong_partner_is_named(cli, support_configs, capfd):
    wrong = "--model={class_path: modules.emax.ValueMARL}"
    assert cli("fit", "-c", support_configs / "mappo_tiny.yaml", wrong) == 1
    assert "MARLRolloutDataModule: ValueMARL does not learn from rollouts" in capfd.readouterr().err


def test_minibatches_must_divide_the_rollout(cli, support_configs, capfd):
    assert cli("fit", "-c", support_configs / "mappo_tiny.yaml", "--data.init_args.minibatches=7") == 1
    assert "minibatches must divide the 64 frames" in capfd.readouterr().err
