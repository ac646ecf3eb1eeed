"""Constrained RLHF through the command line: every variant trains, says what it does, and resumes bitwise."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from population_runs import assert_same, checkpoint, rows

GOLD = ["-c", "{configs}/rlhf_gold.yaml"]
VARIANTS: dict[str, list[str]] = {
    "ppo": [],
    "ppo_sat": ["--model.init_args.weights={content: 1.0, markers: 1.0}"],
    "mu_ppo": [],
    "xi_ppo": [],
    "all_ppo": [],
    "fixed_lambda": ["--model.init_args.weights={content: 0.4, markers: 0.3}"],
    "single_constraint": [
        "--model.init_args.maximise=content", "--model.init_args.constraints={markers: {threshold: 0.4}}",
    ],
    "nm_ppo": [],
    "ppo_lag": [
        "--model.init_args.maximise=content", "--model.init_args.constraints={markers: {threshold: 0.4}}",
        "--model.init_args.multiplier.parameterisation=exp", "--model.init_args.multiplier.lambda_max=5.0",
        "--model.init_args.multiplier.window=4",
    ],
}  # fmt: skip


def _final(folder: Path) -> dict[str, Any]:
    whole = checkpoint(folder)
    rank = (folder / "checkpoints" / "last.ckpt").resolve().with_suffix("").with_suffix(".rank-0.pt")
    import torch

    return {
        "weights": dict(whole["state_dict"]),
        "optimizer": whole["optimizer_states"],
        "step": whole["global_step"],
        "rng": torch.load(rank, weights_only=True)["rng"]["torch"],
    }


@pytest.fixture
def gold(support_configs) -> list[str]:
    return ["fit", "-c", str(support_configs / "rlhf_gold.yaml")]


@pytest.fixture
def text(support_configs) -> list[str]:
    return ["fit", "-c", str(support_configs / "rlhf_text.yaml")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_resumes_from_any_checkpoint(cli, gold, tmp_path, variant):
    run = [*gold, f"--model.init_args.variant={variant}", *VARIANTS[variant]]
    assert cli(*run, "--experiment=whole", "--checkpoint.keep_last=9") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    logged = rows(whole)
    assert {"reward/content", "kl/per_token"} <= logged[2].keys() | logged[3].keys()
    assert sum("val/score" in row for row in logged) == 5  # the start model, and 4 validations
    assert cli(*run, "--experiment=again", "--ckpt_path", whole / "checkpoints" / "step-00000004.ckpt") == 0
    again = tmp_path / "runs" / "again" / "run-001"
    assert_same(_final(whole), _final(again))
    assert_same(rows(whole, 4), rows(again, 4))


@pytest.mark.parametrize("phase", ["generation", "update", "search"])
@pytest.mark.parametrize("kind", ["gold", "text"])
def test_killed_in_any_phase_it_ends_the_same(cli, cli_process, request, tmp_path, kind, phase):
    run = request.getfixturevalue(kind)
    if phase == "search":
        run = [*run, "--model.init_args.variant=nm_ppo", "--model.init_args.nelder_mead.patience=1"]
    assert cli(*run, "--experiment=whole") == 0
    at = {"generation": 4, "update": 6, "search": 6}[phase]
    killed = cli_process(
        *run, "--experiment=cut", f"--model.init_args.kill_at={at}", f"--model.init_args.kill_phase={phase}"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli(*run, "--experiment=cut", "--ckpt_path", "last") == 0
    whole, cut = (tmp_path / "runs" / each / "run-001" for each in ("whole", "cut"))
    assert_same(_final(whole), _final(cut))
    assert_same(rows(whole, 1), rows(cut, 1))


def test_group_baselines_critics_and_adapters_train(cli, text, tmp_path):
    grouped = [
        "--model.init_args.advantage=group",
        "--model.init_args.group_size=2",
        "--model.init_args.critic={kind: none}",
    ]
    for number, flags in enumerate([
        ["--model.init_args.critic.kind=separate"], grouped, [*grouped, "--model.init_args.leave_one_out=false"],
        ["--model.init_args.tuning=lora"], ["--model.init_args.ppo.normalise=stream"],
        ["--model.init_args.multiplier.update=per_iteration", "--model.init_args.multiplier.estimator=state"],
    ]):  # fmt: skip
        assert cli(*text, f"--experiment=kind-{number}", "--trainer.max_steps=3", *flags) == 0
        last = rows(tmp_path / "runs" / f"kind-{number}" / "run-001")[-1]
        assert last["val/reward/words"] > 0


def test_a_run_shows_texts_and_exports_a_model(cli, text, tmp_path):
    from modules.language.checkpoint import load_causal_lm

    export = "--trainer.callbacks+={class_path: callbacks.export.ExportModel}"
    assert cli(*text, "--experiment=shown", export) == 0
    folder = tmp_path / "runs" / "shown" / "run-001"
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {0, 3, 6}
    assert all({"prompt", "response", "reference", "scores"} <= row.keys() for row in shown)
    loaded = load_causal_lm(folder / "export")
    saved = checkpoint(folder)["state_dict"]
    for name, weight in loaded.state_dict().items():
        assert weight.equal(saved[f"network.{name}"]), name
    assert cli(*text[:1], *text[1:], "--experiment=next", "--trainer.max_steps=1",
               f"--model.init_args.policy={{path: {folder / 'export'}}}") == 0  # fmt: skip
    start = rows(tmp_path / "runs" / "next" / "run-001")[0]
    end = [row for row in rows(folder) if "val/score" in row][-1]
    assert start["val/reward/meteor"] == pytest.approx(end["val/reward/meteor"], rel=1e-6)


def test_infeasible_thresholds_warn_and_saturate_without_nan(cli, gold, tmp_path):
    flags = ["--model.init_args.constraints={content: {threshold: 0.99}, markers: {threshold: 0.45}}",
             "--model.init_args.multiplier.lr=20.0", "--trainer.max_steps=60", "--trainer.val_check_interval=60",
             "--model.init_args.variant=mu_ppo"]  # fmt: skip
    with pytest.warns(UserWarning, match="constraints.content: threshold 0.99 looks infeasible"):
        assert cli(*gold, "--experiment=high", *flags) == 0
    last = [row for row in rows(tmp_path / "runs" / "high" / "run-001") if "multiplier/content/w" in row][-1]
    assert last["multiplier/content/w"] > 0.95
    assert last["constraint/content/infeasible"] == 1.0
    assert all(value == value for value in last.values())
