"""Population games killed and resumed: payoffs, meta-strategies, members and logged rows as in an uninterrupted run."""

from __future__ import annotations

import signal

import pytest
from population_runs import assert_same, assert_same_games, checkpoint, population, rows

SETTINGS = {  # name -> layers over psd_psro_ppo, flags
    "ppo, both seats": ([], []),
    "ppo, a population per player": ([], ["--data.init_args.symmetrize=false"]),
    "dqn, both seats": (["psd_psro_dqn"], ["--data.init_args.symmetrize=true"]),
    "dqn, a population per player": (["psd_psro_dqn"], []),
}


def _arguments(folder, base: str, layers: list[str], flags: list[str]) -> list[str]:
    files = [folder / f"{name}.yaml" for name in (base, *layers)]
    return ["fit", *(str(part) for file in files for part in ("-c", file)), *flags]


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_run_continues_exactly_from_any_step(cli, support_configs, tmp_path, name):
    """From checkpoints within a response (8: step 1 of 3), at its end (10), within an evaluation (12), between (14)."""
    run = _arguments(support_configs, "psd_psro_ppo", *SETTINGS[name])
    assert cli(*run, "--experiment=whole", "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    assert population(whole)["payoff_table"]["counts"].max() == 64
    for step in (8, 10, 12, 14):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        assert cli(*run, f"--experiment=from-{step}", "--ckpt_path", start) == 0
        again = tmp_path / "runs" / f"from-{step}" / "run-001"
        assert_same_games(population(whole), population(again))
        assert_same(rows(whole, step), rows(again, step))
    assert len(rows(whole, 8)) > 6


@pytest.mark.parametrize("name", ["ppo, both seats", "dqn, a population per player"])
def test_sampled_run_killed_in_a_response_and_in_an_evaluation_ends_the_same(
    cli, cli_process, support_configs, tmp_path, name
):
    """SIGKILL after step 9 (response step 2 of 3 in iteration 1), then after step 19 (evaluation step 2 of 4)."""
    run = _arguments(support_configs, "psd_psro_ppo", *SETTINGS[name])
    every = "--checkpoint.every_n_steps=2"
    assert cli(*run, "--experiment=whole", every) == 0
    resume: list[str] = []
    for step in (9, 19):
        killed = cli_process(*run, "--experiment=killed", every, f"--model.init_args.kill_at={step}", *resume)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resume = ["--ckpt_path", "last"]
    assert cli(*run, "--experiment=killed", every, *resume) == 0
    assert [p.name for p in (tmp_path / "runs" / "killed").iterdir()] == ["run-001"]
    whole, again = (tmp_path / "runs" / one / "run-001" for one in ("whole", "killed"))
    assert_same_games(population(whole), population(again))
    assert_same(rows(whole), rows(again))
    assert checkpoint(whole)["global_step"] == checkpoint(again)["global_step"] == 21


def test_exact_run_killed_at_iteration_7_equals_at_12(cli, cli_process, support_configs, tmp_path):
    """Table, meta-strategies, weights; here also the pipeline's plateau and the log."""
    run = _arguments(support_configs, "psd_psro_skill", [], [])
    assert cli(*run, "--experiment=whole") == 0
    killed = cli_process(*run, "--experiment=killed", "--model.init_args.kill_at=14")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cut = tmp_path / "runs" / "killed" / "run-001"
    assert population(cut)["iteration"] < 7
    assert cli(*run, "--experiment=killed", "--ckpt_path", "last") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    one, other = population(whole), population(cut)
    assert one["iteration"] == 12
    assert_same(one, other)
    assert_same(rows(whole), rows(cut))


def test_longer_run_goes_on_from_a_finished_one(cli, support_configs, tmp_path):
    run = _arguments(support_configs, "psd_psro_skill", [], [])
    assert cli(*run, "--experiment=long") == 0
    assert cli(*run, "--experiment=grown", "--trainer.max_epochs=5") == 0
    assert cli(*run, "--experiment=grown", "--ckpt_path", "last") == 0
    long, grown = (population(tmp_path / "runs" / name / "run-001") for name in ("long", "grown"))
    assert_same_games(long, grown)
