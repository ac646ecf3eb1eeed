"""Control methods without a population through the command line: runs, exact resume, kills, the attack suite."""

from __future__ import annotations

import json
import signal

import pytest
from control_runs import control
from population_runs import assert_same, rows

METHODS = {
    "ppo": [],
    "ppo_stack": ["--model.init_args.memory={kind: stack, k: 2}"],
    "ppo_lstm": ["--model.init_args.memory={kind: lstm, history: 4}"],
    "sa_ppo": ["--model=modules.baselines.SAPPO", "--model.init_args.regulariser={kappa: 0.1, method: ibp}"],
    "atla": ["--model=control_runs.KilledATLA"],
    "pa_atla": ["--model=control_runs.KilledATLA", "--model.init_args.adversary.kind=pa_ad",
                "--model.init_args.regulariser.kappa=0.1"],
    "params": ["--model=control_runs.KilledATLA", "--model.init_args.perturbation.space=params"],
    "wocar": ["--model=control_runs.KilledWocaR", "--model.init_args.inner_steps=3"],
    "nr": ["--model=control_runs.KilledActionRobust", "--model.init_args.perturbation.space=action"],
    "pr": ["--model=control_runs.KilledActionRobust", "--model.init_args.perturbation.space=action",
           "--model.init_args.adversary={kind: pr, alpha: 0.3, observe_previous: false}",
           "--model.init_args.agent_steps=1"],
}  # fmt: skip


def _run(folder, *flags):
    return ["fit", "-c", folder / "control.yaml", *flags]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_bitwise(cli, support_configs, tmp_path, name):
    flags = METHODS[name]
    if "--model=" in "".join(flags):  # another class on the command line: its own size and length
        common = ["hidden=[8]", "total_frames=384", "ppo={epochs: 2, minibatches: 4, lr: 1.0e-3}"]
        flags = [flags[0], *(f"--model.init_args.{one}" for one in common), *flags[1:]]
    every = ["--checkpoint.every_n_steps=3", "--checkpoint.keep_last=9"]
    assert cli(*_run(support_configs, "--experiment=whole", *every, *flags)) == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    start = whole / "checkpoints" / "step-00000003.ckpt"
    assert cli(*_run(support_configs, "--experiment=again", *flags, "--ckpt_path", start)) == 0
    again = tmp_path / "runs" / "again" / "run-001"
    assert control(whole)["frames"] == 384
    assert_same(control(whole), control(again))
    assert_same(rows(whole, 3), rows(again, 3))


@pytest.mark.parametrize(
    "task", ["mujoco/Hopper-v5", pytest.param("mujoco/InvertedPendulum-v5", marks=pytest.mark.slow)]
)
def test_batched_mujoco_killed_ends_the_same(cli, cli_process, support_configs, tmp_path, task):
    flags = [f"--data.init_args.task={task}", "--data.init_args.options={}", "--checkpoint.every_n_steps=1"]
    assert cli(*_run(support_configs, "--experiment=whole", *flags)) == 0
    run = _run(support_configs, "--experiment=killed", *flags)
    killed = cli_process(*run, "--model.init_args.kill_at=3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli(*run, "--ckpt_path", "last") == 0
    whole, again = tmp_path / "runs" / "whole" / "run-001", sorted((tmp_path / "runs" / "killed").iterdir())[-1]
    assert_same(control(whole), control(again))
    assert_same(rows(whole, 3), rows(again, 3))


@pytest.mark.slow  # GRAD killed in each phase: test_grad.py; batched MuJoCo killed: above
def test_grad_on_batched_mujoco_killed_in_each_phase_ends_the_same(cli, cli_process, support_configs, tmp_path):
    flags = ["--data.init_args.task=mujoco/InvertedPendulum-v5", "--checkpoint.every_n_steps=1"]
    config = ["fit", "-c", support_configs / "grad.yaml", *flags]
    assert cli(*config, "--experiment=whole") == 0
    resume: list[str] = []
    for step in (2, 5, 7):  # before payoffs, in an agent's response, in an adversary's
        killed = cli_process(*config, "--experiment=killed", f"--model.init_args.kill_at={step}", *resume)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resume = ["--ckpt_path", "last"]
    assert cli(*config, "--experiment=killed", "--ckpt_path", "last") == 0
    from population_runs import assert_same_games, population

    whole, again = tmp_path / "runs" / "whole" / "run-001", sorted((tmp_path / "runs" / "killed").iterdir())[-1]
    assert_same_games(population(whole), population(again))


@pytest.mark.filterwarnings("ignore:.*is weaker than.*")
def test_the_whole_suite_of_state_attacks(cli, support_configs, tmp_path):
    assert cli(*_run(support_configs, "--experiment=made")) == 0
    start = tmp_path / "runs" / "made" / "run-001" / "checkpoints" / "last.ckpt"
    matrix = "--trainer.callbacks+=callbacks.attacks.AttackMatrix"
    flags = ["--ckpt_path", start, "--experiment=tested", matrix]
    assert cli("test", "-c", support_configs / "control.yaml", *flags) == 0
    report = json.loads((tmp_path / "runs" / "tested" / "test-001" / "attacks" / "attacks.json").read_text())
    named = [row["attack"] for row in report["attacks"]]
    kinds = ("random", "ou", "constant", "mad", "critic", "robust_sarsa", "sa_rl", "sa_rl_delta", "pa_ad")
    assert named == ["none", *(name for kind in kinds for name in (kind, f"{kind}_coupled"))]
    for row in report["attacks"][1:]:
        assert row["linf"] <= 0.1 + 1e-6
        if row["coupled"]:
            assert row["step_linf"] <= 0.02 + 1e-6
    assert report["worst_case"] == min(row["return_mean"] for row in report["attacks"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.init_args.ppo.lr=1e30"], "no longer finite"),
        (["--data.init_args.task=cartpole", "--data.init_args.options={continuous: false}"], "are discrete"),
        (["--model.init_args.memory={kind: lstm, history: 3}"], "history must divide"),
    ],
)
def test_bad_input_is_one_line(cli, capsys, support_configs, flags, message):
    assert cli(*_run(support_configs, *flags)) != 0
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_checkpoint_of_another_kind_is_refused(cli, capsys, support_configs, tmp_path):
    assert cli(*_run(support_configs, "--experiment=made")) == 0
    start = tmp_path / "runs" / "made" / "run-001" / "checkpoints" / "last.ckpt"
    assert cli("fit", "-c", support_configs / "grad.yaml", "--ckpt_path", start) != 0
    assert "holds no population" in capsys.readouterr().err
