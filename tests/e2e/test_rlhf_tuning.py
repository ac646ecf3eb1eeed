"""Adapters on a plain, 8-bit and 4-bit policy, and 8-bit optimiser states, through the command line on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def _state(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("tuning", ["lora", "qlora", "int8"])
def test_only_adapters_and_critic_learn_and_the_reference_is_the_model_without_them(
    cli, support_configs, tmp_path, tuning
):
    run = [
        "fit", "-c", support_configs / "rlhf_text.yaml", f"--model.init_args.tuning={tuning}",
        "--model.init_args.lora.r=4", "--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0",
        "--checkpoint={every_n_steps: 1, keep_last: 9}", "--model.init_args.lr=1.0e-2",
    ]  # fmt: skip
    assert cli(*run, "--experiment=whole") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    train = [row for row in rows(whole) if "kl/sequence" in row]
    for row in train[:2]:  # the first iteration is the critic's
        assert row["kl/sequence"] == pytest.approx(0.0, abs=1e-5)
    assert train[2]["kl/k3"] > 1e-5
    start, end = _state(whole, 1), _state(whole, 3)
    assert not any(name.startswith("reference.") for name in start)
    changed = {name for name in start if isinstance(start[name], torch.Tensor) and not start[name].equal(end[name])}
    adapters = {name for name in start if "lora_" in name}
    assert len(adapters) == 2 * 4 * 2  # A and B of four linear maps in two layers
    assert adapters | {"critic.heads.weight"} <= changed
    records = ("critic.", "multipliers.", "divergences.", "evaluations.")
    assert all(name in adapters or name.startswith(records) for name in changed)
    cut = whole / "checkpoints" / "step-00000002.ckpt"
    assert cli(*run, "--experiment=again", "--ckpt_path", cut) == 0
    again = tmp_path / "runs" / "again" / "run-001"
    assert_same(dict(end), dict(_state(again, 3)))
    assert_same(checkpoint(whole)["optimizer_states"], checkpoint(again)["optimizer_states"])
    assert_same(rows(whole, 2), rows(again, 2))


def test_an_8_bit_optimizer_learns_and_resumes(cli, support_configs, tmp_path):
    run = [
        "fit", "-c", support_configs / "rlhf_text.yaml", "--model.init_args.optimizer=adamw8bit",
        "--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0", "--checkpoint={every_n_steps: 1, keep_last: 9}",
    ]  # fmt: skip
    assert cli(*run, "--experiment=whole") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    assert [row for row in rows(whole) if "kl/k3" in row][-1]["kl/k3"] > 1e-6
    states = checkpoint(whole)["optimizer_states"][0]["state"].values()
    kept = [state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in states]
    assert {torch.uint8, torch.float32} == set(kept)  # small tensors stay in 32 bits
    cut = whole / "checkpoints" / "step-00000001.ckpt"  # when only the critic had a state
    assert cli(*run, "--experiment=again", "--ckpt_path", cut) == 0
    assert_same(dict(_state(whole, 3)), dict(_state(tmp_path / "runs" / "again" / "run-001", 3)))
