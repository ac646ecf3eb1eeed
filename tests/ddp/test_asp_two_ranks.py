"""Two processes over gloo train solvers and generators as one does, decide the same, and resume bitwise."""

from __future__ import annotations

import subprocess

import pytest
import torch
from population_runs import assert_same, checkpoint, population, rows

pytestmark = pytest.mark.ddp


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _close(one, two, where="", tolerance=2e-4):
    """Nested values equal, floats up to the order of additions."""
    if where.endswith(".down.bias"):  # the norm behind it takes it out: its gradient is rounding, which Adam scales up
        return
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _close(one[key], two[key], f"{where}/{key}", tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two, strict=True)):
            _close(*pair, f"{where}/{index}", tolerance)
    elif isinstance(one, torch.Tensor) and one.is_floating_point():
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance), where
    else:
        assert_same(one, two, where)


def test_asp_on_two_ranks_equals_one_and_resumes(cli, cli_process, support_configs, tmp_path):
    config = support_configs / "asp.yaml"
    steps = "--trainer.max_steps=26"
    assert cli("fit", "-c", config, steps, "--experiment=one") == 0
    two = ["fit", "-c", config, "-c", "hardware/ddp2", steps]
    _check(cli_process(*two, "--experiment=two", "--checkpoint.every_n_steps=17", "--checkpoint.keep_last=9"))
    one, both = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    mine, theirs = population(one), population(both)
    for key in ("iteration", "cursor"):
        assert mine[key] == theirs[key]
    for key in ("staircase", "plan", "gaps"):
        _close(mine["method"][key], theirs["method"][key], key)
    _close(mine["meta_strategies"], theirs["meta_strategies"], "meta_strategies", 1e-3)
    _close(mine["payoff_table"], theirs["payoff_table"], "payoff_table", 1e-2)  # sums over instances, in percent
    _close(checkpoint(one)["state_dict"], checkpoint(both)["state_dict"], "weights")
    start = both / "checkpoints" / "step-00000017.ckpt"
    _check(cli_process(*two, "--experiment=again", "--ckpt_path", start))
    again = tmp_path / "runs" / "again" / "run-001"
    assert_same(population(both), population(again))
    assert_same(rows(both, 17), rows(again, 17))


@pytest.mark.parametrize("name", ["routing_pomo", "routing_am"])
def test_base_solvers_on_two_ranks_equal_one(cli, cli_process, support_configs, tmp_path, name):
    """The same instances and rollouts, the same t-tests."""
    config = support_configs / f"{name}.yaml"
    assert cli("fit", "-c", config, "--experiment=one") == 0
    _check(cli_process("fit", "-c", config, "-c", "hardware/ddp2", "--experiment=two"))
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    _close(checkpoint(one)["state_dict"], checkpoint(two)["state_dict"], "weights")
    skip = {"train/grad_norm", "instances_seen"}
    logged = [[{k: v for k, v in row.items() if k not in skip} for row in rows(folder)] for folder in (one, two)]
    _close(*logged, "log", 5e-3)
