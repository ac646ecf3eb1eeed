"""Assurance of RLHF through the command line: reports of a tabular and of a speaking policy, warm starts from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import checkpoint, rows

LIMIT = ["--model.init_args.variant=ppo_lag", "--model.init_args.maximise=content",
         "--model.init_args.multiplier.parameterisation=softplus", "--model.init_args.kl.budget=0.5"]  # fmt: skip


def _markers(threshold: float) -> str:
    return f"--model.init_args.constraints={{markers: {{threshold: {threshold}, required: 0.3, kind: ge}}}}"


def _figures(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "report.json").read_text())
    return {one["name"]: one for one in report["figures"] if one["split"] == "fresh"}


def test_a_tabular_policy_is_measured_and_the_next_round_starts_from_it(cli, support_configs, tmp_path):
    gold = ["-c", support_configs / "rlhf_gold.yaml", *LIMIT, "--trainer.max_steps=6"]
    assert cli("fit", *gold, _markers(0.3), "--experiment=first") == 0
    first = tmp_path / "runs" / "first" / "run-001"
    last = first / "checkpoints" / "last.ckpt"
    limits = ["--limits=[{figure: c.violation, tau: 0.0, scale: 0.05}, {figure: u.reward, tau: 5.0, scale: 1.0}]"]
    assert cli("assure", *gold, _markers(0.3), f"--ckpt_path={last}", "--suite=quick", "--out=report", *limits) == 3
    found = _figures(tmp_path / "report")
    measured = {name for name, one in found.items() if one["status"] == "measured"}
    assert measured >= {"u.reward", "u.gold", "c.sat", "c.violation", "c.kl", "c.kl_over", "i.mult_final", "r.overopt",
                        "r.rm_shift", "i.reward_decomp", "i.card", "e.provenance"}  # fmt: skip
    state = checkpoint(first)["state_dict"]
    logged = [row for row in rows(first) if "kl/per_token" in row]
    over = sum(row["kl/per_token"] > 0.5 for row in logged) / len(logged)
    assert found["c.kl_over"]["value"] == pytest.approx(over)
    assert len(state["evaluations.kept"]) == 512
    assert state["evaluations.place"].tolist() == [4, 4, 1]  # the start model, and three validations
    weight = [row["multiplier/markers/w"] for row in rows(first) if "multiplier/markers/w" in row][-1]
    assert found["i.mult_final"]["value"] == pytest.approx(abs(weight), rel=1e-5)

    assert cli("fit", *gold, _markers(0.4), "--experiment=second", f"--warm_start={last}") == 0
    second = tmp_path / "runs" / "second" / "run-001"
    started, ended = rows(second)[0], checkpoint(second)
    assert started["val/score"] == pytest.approx([row["val/score"] for row in rows(first) if "val/score" in row][-1])
    assert ended["global_step"] == 6
    assert not torch.equal(ended["state_dict"]["network.table"], state["network.table"])
    assert torch.equal(ended["state_dict"]["reference.table"], state["reference.table"])
    assert ended["state_dict"]["multipliers.thresholds"].tolist() == [0.4]
    assert ended["state_dict"]["evaluations.place"].tolist() == [4, 4, 1]


def test_a_speaking_policy_is_measured_in_words(cli, support_configs, tmp_path):
    text = ["-c", support_configs / "rlhf_text.yaml", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert cli("fit", *text, "--experiment=text") == 0
    last = tmp_path / "runs" / "text" / "run-001" / "checkpoints" / "last.ckpt"
    assert cli("assure", *text, f"--ckpt_path={last}", "--suite=quick", "--out=report") == 0
    found = _figures(tmp_path / "report")
    measured = {name for name, one in found.items() if one["status"] == "measured"}
    assert measured >= {"u.reward", "c.sat", "r.prompt", "e.refuse", "e.overrefuse", "e.swap", "e.tox", "r.overopt"}
    assert found["e.refuse"]["value"] == found["e.overrefuse"]["value"] == 0.0
    assert "no KL budget" in found["c.kl"]["reason"]
