"""Two ranks equal one with as many responses: advantages, rewards, multipliers, policy; and they resume bitwise."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import assert_same, checkpoint, rows
from torch import Tensor

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(600)]  # three launches of two ranks


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _together(name: str, ranks: int, key: str) -> Tensor:
    """``key`` of the first rollout ``[P, S, R, ...]`` over all ranks; each pads to its own longest response."""
    parts: list[dict[str, Any]] = [torch.load(f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    longest = max(part["tokens"].shape[2] for part in parts)
    found = []
    for part in parts:
        rest = part[key].shape[3:]
        padded = part[key].new_zeros(*part[key].shape[:2], longest, *rest)
        padded[:, :, : part[key].shape[2]] = part[key]
        found.append(padded)
    return torch.cat(found)


def _assert_equal_learning(one: Path, two: Path) -> None:
    mine, theirs = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name, value in mine.items():
        if name.startswith("multipliers.") or name == "beta":
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-9)
        elif isinstance(value, Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
        else:
            assert_same(value, theirs[name], name)  # the search
    for row, other in zip(rows(one), rows(two), strict=True):
        for key in row:
            if not key.endswith("_seen"):  # rank 0's count times the ranks
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("rlhf_gold", ["--data.init_args.batch_size=64"]),
        ("rlhf_text", ["--data.init_args.batch_size=32", "--model.init_args.ppo.normalise=stream",
                       "--model.init_args.variant=nm_ppo", "--model.init_args.nelder_mead.patience=1"]),
    ],
    ids=["gold", "text"],
)  # fmt: skip
def test_two_ranks_equal_one_and_resume(cli, cli_process, support_configs, tmp_path, config, flags):
    """Batch baseline with the mixture normalised; value heads with each stream normalised and searched thresholds."""
    # one minibatch of the whole rollout: which responses a minibatch holds depends on the number of ranks
    run = [
        "fit", "-c", support_configs / f"{config}.yaml", "--model.init_args.ppo={minibatch_responses: null}", *flags,
        "--trainer.max_steps=6", "--trainer.num_sanity_val_steps=0", "--checkpoint.keep_last=9",
    ]  # fmt: skip
    assert cli(*run, "--experiment=one", "--model.init_args.keep_rollout=one") == 0
    _check(cli_process(*run, "-c", "hardware/ddp2", "--experiment=two", "--model.init_args.keep_rollout=two"))
    for key in ("tokens", "scores", "advantage", "target"):
        mine, theirs = _together(str(tmp_path / "one"), 1, key), _together(str(tmp_path / "two"), 2, key)
        assert len(mine) == {"rlhf_gold": 64, "rlhf_text": 32}[config]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    _assert_equal_learning(one, two)
    if config == "rlhf_text":
        cut = two / "checkpoints" / "step-00000002.ckpt"
        _check(cli_process(*run, "-c", "hardware/ddp2", "--experiment=again", "--ckpt_path", cut))
        again = tmp_path / "runs" / "again" / "run-001"
        assert_same(dict(checkpoint(two)["state_dict"]), dict(checkpoint(again)["state_dict"]))
        assert_same(rows(two, 2), rows(again, 2))
