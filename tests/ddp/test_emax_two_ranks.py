"""Two processes over gloo: with one rank's data they learn bitwise what it learns; with their own they agree."""

from __future__ import annotations

import signal
import subprocess

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

pytestmark = pytest.mark.ddp


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("layers", [[], ["emax_episodes"]], ids=["steps", "episodes"])
def test_two_ranks_with_the_same_data_equal_one(cli, cli_process, support_configs, tmp_path, layers):
    files = [part for name in ("emax_tiny", *layers) for part in ("-c", support_configs / f"{name}.yaml")]
    data = "--data.class_path=marl_runs.SameOnAllRanks"
    run = ["fit", *files, data, "--model.init_args.reward.norm=none"]
    assert cli(*run, "--experiment=one") == 0
    _check(cli_process(*run, "-c", "hardware/ddp2", "--experiment=two"))
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    assert_same(dict(checkpoint(one)["state_dict"]), dict(checkpoint(two)["state_dict"]))
    logged = [[{k: v for k, v in row.items() if k != "frames_seen"} for row in rows(folder)] for folder in (one, two)]
    assert_same(*logged)


def test_two_ranks_collect_for_themselves_and_resume_exactly(cli_process, support_configs, tmp_path):
    run = ["fit", "-c", support_configs / "emax_tiny.yaml", "-c", "hardware/ddp2"]
    _check(cli_process(*run, "--experiment=whole", "--data.init_args.evaluation_streams=2"))
    killed = cli_process(
        *run, "--experiment=cut", "--data.init_args.evaluation_streams=2", "--model.init_args.kill_at=15"
    )
    assert killed.returncode in (-signal.SIGKILL, 1, -signal.SIGTERM), killed.stderr
    _check(cli_process(*run, "--experiment=cut", "--data.init_args.evaluation_streams=2", "--ckpt_path", "last"))
    whole, cut = (tmp_path / "runs" / each / "run-001" for each in ("whole", "cut"))
    assert_same(dict(checkpoint(whole)["state_dict"]), dict(checkpoint(cut)["state_dict"]))
    assert_same(rows(whole), rows(cut))
    assert rows(whole)[-1]["frames"] == 720  # of both ranks
    last = (whole / "checkpoints" / "last.ckpt").resolve().with_suffix("")
    ranks = [torch.load(last.with_suffix(f".rank-{k}.pt"), weights_only=True)["data"] for k in (0, 1)]
    assert not torch.equal(ranks[0]["stream"]["seen"][0], ranks[1]["stream"]["seen"][0])
    parts = [last.with_suffix(f".rank-{k}") / "observation.000000.bin" for k in (0, 1)]
    assert parts[0].read_bytes() != parts[1].read_bytes()
