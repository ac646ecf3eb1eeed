"""Two processes over gloo solve the same game as one, bit for bit: ranks share out the play and nothing else."""

from __future__ import annotations

import subprocess

import pytest
from population_runs import assert_same, assert_same_games, population, rows

pytestmark = pytest.mark.ddp


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("psd_psro_skill", []),
        ("psd_psro_ppo", []),
    ],
)
def test_two_ranks_equal_one_bitwise(cli, cli_process, support_configs, tmp_path, name, flags):
    """Exact responses, and PPO with sampled payoffs: members, payoff sums and counts, meta-strategies, history, log."""
    config = support_configs / f"{name}.yaml"
    assert cli("fit", "-c", config, *flags, "--experiment=one") == 0
    _check(cli_process("fit", "-c", config, "-c", "hardware/ddp2", *flags, "--experiment=two"))
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    assert_same_games(population(one), population(two))
    # frames_seen is rank 0's count times the ranks, by design of Throughput, and games vary in length; frames is not
    logged = [[{k: v for k, v in row.items() if k != "frames_seen"} for row in rows(folder)] for folder in (one, two)]
    assert_same(*logged)
    if name == "psd_psro_ppo":
        assert population(two)["frames"] > 1000
        assert population(two)["payoff_table"]["counts"].max() == 64
