"""Oversight worlds through the command line: figures, a test from the checkpoint, exact resume, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

QUIET = "--trainer.enable_progress_bar=false"
SMALL = [
    "--data.init_args.learners=4", "--data.init_args.batches=25", "--model.init_args.epsilon_batches=25",
    "--model.init_args.learning_rate=0.5", "--model.init_args.epsilon_finish=0.2",
    "--trainer.val_check_interval=25", QUIET,
]  # fmt: skip
TINY = [
    "--data.init_args.learners=2", "--data.init_args.copies=8", "--data.init_args.batches=12",
    "--data.init_args.steps=10", "--data.init_args.evaluation_episodes=8",
    "--trainer.val_check_interval=6", "--trainer.log_every_n_steps=1", QUIET,
]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines]


def test_interruptions_do_not_shape_q_learning_and_a_test_repeats_the_figures(cli, tmp_path):
    assert cli("fit", "-c", "oversight/off_switch", *SMALL) == 0
    last = rows(tmp_path / "runs" / "oversight-off_switch" / "run-001")[-1]
    assert last["val/neutrality"] <= 0.02
    assert last["val/avoidance"] == 0.0
    assert last["val/obedience"] == last["val/control/return"] == 1.0
    checkpoint = tmp_path / "runs" / "oversight-off_switch" / "run-001" / "checkpoints" / "last.ckpt"
    assert cli("test", "-c", "oversight/off_switch", *SMALL, "--ckpt_path", checkpoint) == 0
    tested = rows(tmp_path / "runs" / "oversight-off_switch" / "test-001")[-1]
    assert {name: value for name, value in tested.items() if name.startswith("test/")} == {
        name.replace("val/", "test/"): value for name, value in last.items() if name.startswith("val/")
    }


@pytest.mark.parametrize("config", ["vase", "supervisor", "story"])
def test_shipped_worlds_run(cli, tmp_path, config):
    assert cli("fit", "-c", f"oversight/{config}", *TINY) == 0
    last = rows(tmp_path / "runs" / f"oversight-{config}" / "run-001")[-1]
    assert last["val/performance"] <= last["val/return"]
    assert last["frames"] == 2 * 8 * 10 * 12


def test_stopped_and_resumed_is_bitwise(cli, tmp_path):
    run = ["fit", "-c", "oversight/off_switch", *TINY, "--vars.algorithm=sarsa"]
    assert cli(*run, "--experiment=whole") == 0
    assert cli(*run, "--experiment=cut", "--trainer.max_steps=7") == 0
    assert cli(*run, "--experiment=cut", "--ckpt_path", "last") == 0
    whole, cut = (tmp_path / "runs" / name / "run-001" for name in ("whole", "cut"))
    tables = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, cut)
    ]
    assert torch.equal(tables[0]["tables"], tables[1]["tables"])
    assert float(tables[0]["tables"].abs().sum()) > 0
    assert rows(whole) == rows(cut)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.init_args.world=off_swich"], "did you mean off_switch"),
        (["--data.init_args.penalties={avoid: 1}"], "unknown signal 'avoid'"),
        (["--vars.safe=true"], "interruption_safe is for sarsa"),
    ],
)
def test_a_wrong_setting_is_one_line(cli, capsys, flags, message):
    assert cli("fit", "-c", "oversight/off_switch", *TINY, *flags) != 0
    assert message in capsys.readouterr().err
