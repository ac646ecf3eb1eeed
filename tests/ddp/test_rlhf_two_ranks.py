"""Two ranks of 16 responses equal one of 32: rewards, multipliers and policy; and they resume bitwise."""

from __future__ import annotations

import signal
import subprocess

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

pytestmark = pytest.mark.ddp
# one minibatch of the whole rollout: which responses a minibatch holds depends on the number of ranks
WHOLE = ["--model.init_args.ppo.minibatch_responses=null"]


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("rlhf_gold", ["--model.init_args.variant=nm_ppo"]),
        ("rlhf_gold", ["--model.init_args.ppo.normalise=stream"]),
        ("rlhf_text", []),
    ],
    ids=["nm", "stream", "text"],
)
def test_two_ranks_equal_one(cli, cli_process, support_configs, tmp_path, config, flags):
    run = ["fit", "-c", support_configs / f"{config}.yaml", *WHOLE, *flags, "--trainer.num_sanity_val_steps=0"]
    assert cli(*run, "--experiment=one") == 0
    _check(cli_process(*run, "-c", "hardware/ddp2", "--experiment=two"))
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    mine, theirs = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name in mine:
        if name.startswith("multipliers.") or name == "beta":
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-9)
        elif isinstance(mine[name], torch.Tensor):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    left_out = ("_seen", "adv_std", "explained_variance", "_loss", "train/")
    for row, other in zip(rows(one), rows(two), strict=True):
        for key in row:
            if not any(part in key for part in left_out):
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


def test_two_ranks_resume_exactly(cli_process, support_configs, tmp_path):
    run = ["fit", "-c", support_configs / "rlhf_text.yaml", "-c", "hardware/ddp2", "--trainer.num_sanity_val_steps=0"]
    _check(cli_process(*run, "--experiment=whole"))
    killed = cli_process(*run, "--experiment=cut", "--model.init_args.kill_at=4")
    assert killed.returncode in (-signal.SIGKILL, 1, -signal.SIGTERM), killed.stderr
    _check(cli_process(*run, "--experiment=cut", "--ckpt_path", "last"))
    whole, cut = (tmp_path / "runs" / each / "run-001" for each in ("whole", "cut"))
    assert_same(dict(checkpoint(whole)["state_dict"]), dict(checkpoint(cut)["state_dict"]))
    assert_same(rows(whole), rows(cut))
