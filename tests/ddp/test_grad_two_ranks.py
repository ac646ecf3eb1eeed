"""Two processes over gloo train agents and adversaries as one does, decide the same, and resume bitwise."""

from __future__ import annotations

import subprocess

import pytest
import torch
from population_runs import assert_same, population, rows

pytestmark = pytest.mark.ddp


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_grad_on_two_ranks_equals_one_and_resumes(cli, cli_process, support_configs, tmp_path):
    config = support_configs / "grad.yaml"
    assert cli("fit", "-c", config, "--experiment=one") == 0
    two = ["fit", "-c", config, "-c", "hardware/ddp2"]
    _check(cli_process(*two, "--experiment=two", "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99"))
    one, both = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    mine, theirs = population(one), population(both)
    for key in ("iteration", "cursor", "frames", "episodes"):
        assert mine[key] == theirs[key]
    for store, other in zip(mine["members"], theirs["members"], strict=True):
        for name, value in store["members"].items():
            torch.testing.assert_close(value, other["members"][name], rtol=2e-4, atol=2e-4, msg=name)
    torch.testing.assert_close(mine["payoff_table"]["sums"], theirs["payoff_table"]["sums"], rtol=1e-3, atol=1e-2)
    assert torch.equal(mine["payoff_table"]["counts"], theirs["payoff_table"]["counts"])
    start = both / "checkpoints" / "step-00000006.ckpt"  # in an adversary's response
    _check(cli_process(*two, "--experiment=again", "--ckpt_path", start))
    again = tmp_path / "runs" / "again" / "run-001"
    assert_same(theirs, population(again))
    assert_same(rows(both, 6), rows(again, 6))
