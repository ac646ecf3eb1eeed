"""The assurance callback within training: figures in the loggers, no trace in the run, gates that stop it."""

from __future__ import annotations

import json

import pytest
import torch

from callbacks.assurance import AssuranceCallback
from modules.assurance.subject import AssuranceError

FIT = ["fit", "-c", "planted/linear", "--trainer.max_steps=40", "--trainer.val_check_interval=20",
       "--trainer.enable_progress_bar=false"]  # fmt: skip


def _callback(**arguments) -> list[str]:
    given = json.dumps({"class_path": "callbacks.assurance.AssuranceCallback", "init_args": arguments})
    return [f"--trainer.callbacks=[{given}]"]


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_the_callback_is_the_run_without_it(cli, tmp_path):
    assert cli(*FIT, "--experiment=plain") == 0
    limits = [{"figure": "r.accuracy", "tau": 0.9, "scale": 0.1}]
    assert cli(*FIT, "--experiment=watched", *_callback(suite="quick", limits=limits)) == 0
    plain, watched = (
        torch.load(tmp_path / "runs" / name / "run-001/checkpoints/last.ckpt", weights_only=True)
        for name in ("plain", "watched")
    )
    for name, weight in plain["state_dict"].items():
        assert torch.equal(weight, watched["state_dict"][name])
    rows = [row for row in _rows(tmp_path / "runs/watched/run-001") if "rice/R/r.accuracy" in row]
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[0]["rice/R/r.accuracy_lo"] <= rows[0]["rice/R/r.accuracy"] <= rows[0]["rice/R/r.accuracy_hi"]
    assert rows[0]["rice/deficit/r.accuracy"] == pytest.approx((0.9 - rows[0]["rice/R/r.accuracy_lo"]) / 0.1)
    assert 0 < rows[1]["rice/share"] < 1
    state = watched["callbacks"]["AssuranceCallback"]
    assert state["validations"] == 2
    assert state["verdict"] == "fail"
    assert state["deficits"]["r.accuracy"] == pytest.approx(rows[1]["rice/deficit/r.accuracy"])


@pytest.mark.parametrize(("way", "code", "steps"), [("stop", 0, 20), ("raise", 1, None)])
def test_a_failed_gate_ends_training(cli, capsys, tmp_path, way, code, steps):
    limits = [{"figure": "r.accuracy", "tau": 0.99, "scale": 0.1}]
    assert cli(*FIT, "--experiment=gated", *_callback(limits=limits, gates_stop=way)) == code
    if steps is None:
        assert "step 20: gate failed: r.accuracy (limit 0.99)" in capsys.readouterr().err
    else:
        last = torch.load(tmp_path / "runs/gated/run-001/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == steps


def test_every_second_validation(cli, tmp_path):
    assert cli(*FIT, "--trainer.val_check_interval=10", "--experiment=seldom", *_callback(every_n_validations=2)) == 0
    rows = [row for row in _rows(tmp_path / "runs/seldom/run-001") if "rice/R/r.accuracy" in row]
    assert [row["step"] for row in rows] == [10, 30]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every_n_validations": 0}, "every_n_validations"),
        ({"gates_stop": "yes"}, "gates_stop"),
        ({"suite": "q"}, "suite"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(AssuranceError, match=message):
        AssuranceCallback(**wrong)


def test_a_module_without_subject_is_refused_before_training(cli, capsys, support_configs):
    from tiny import TinyModule  # noqa: F401  (a module of the tests)

    assert cli("fit", "-c", support_configs / "tiny.yaml", *_callback()) == 2
    assert "offers no assurance_subject()" in capsys.readouterr().err
