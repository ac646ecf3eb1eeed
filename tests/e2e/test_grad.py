"""GRAD through the command line: phases, exact resume, kills, evaluation under attacks."""

from __future__ import annotations

import csv
import json
import signal

import pytest
import torch
from population_runs import assert_same, assert_same_games, population, rows

STEPS = 13  # 2 + 1 of the first iteration, 2 * (2 + 2 + 1)


def _run(folder, *flags):
    return ["fit", "-c", folder / "grad.yaml", *flags]


@pytest.fixture
def whole(cli, support_configs, tmp_path):
    """A run with a checkpoint after every step."""
    every = ["--checkpoint.every_n_steps=1", "--checkpoint.keep_last=99"]
    assert cli(*_run(support_configs, "--experiment=whole", *every)) == 0
    return tmp_path / "runs" / "whole" / "run-001"


def test_a_run_goes_through_its_phases(whole):
    state = population(whole)
    assert state["iteration"] == 3
    assert [one["count"] for one in state["members"]] == [3, 3]
    table = state["payoff_table"]
    assert (table["counts"] == 4).all()
    assert torch.equal(table["sums"][0], -table["sums"][1])
    for sigma in state["meta_strategies"]:
        assert float(sigma.sum()) == pytest.approx(1.0)
    assert state["frames"] == 64 * (STEPS - 3)
    logged = rows(whole)
    assert {"agent/policy_loss", "adversary/policy_loss", "perturb/linf", "psro/gap", "psro/meta_value"} <= set().union(
        *logged
    )
    assert max(row["perturb/linf"] for row in logged if "perturb/linf" in row) <= 1.0 + 1e-6
    assert max(row["perturb/step_linf"] for row in logged if "perturb/step_linf" in row) <= 0.2 + 1e-6


def test_members_keep_their_own_statistics(cli, support_configs, tmp_path):
    """Agents' normalisers differ and stay; the adversary that does nothing is marked so."""
    assert cli(*_run(support_configs, "--experiment=kept")) == 0
    agents, adversaries = (one["members"] for one in population(tmp_path / "runs" / "kept" / "run-001")["members"])
    assert not torch.equal(agents["std"][0], agents["std"][1])
    assert not torch.equal(agents["std"][1], agents["std"][2])
    assert adversaries["active"].tolist() == [0.0, 1.0, 1.0]


def test_from_any_step_it_continues_bitwise(cli, support_configs, tmp_path, whole):
    """Within the first agent's training (1), at its end (2), after payoffs (3), in an agent's response (4), at its end
    (5), in the adversary's (6), before payoffs (7), after them (8), and later (11)."""
    for step in (1, 2, 3, 4, 5, 6, 7, 8, 11):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        assert cli(*_run(support_configs, f"--experiment=from-{step}", "--ckpt_path", start)) == 0
        again = tmp_path / "runs" / f"from-{step}" / "run-001"
        assert_same(population(whole), population(again), f"from {step}")
        assert_same(rows(whole, step), rows(again, step), f"from {step}")


def test_killed_in_each_phase_it_ends_the_same(cli, cli_process, support_configs, tmp_path):
    run = _run(support_configs, "--experiment=killed", "--checkpoint.every_n_steps=1")
    assert cli(*_run(support_configs, "--experiment=whole", "--checkpoint.every_n_steps=1")) == 0
    resume: list[str] = []
    for step in (2, 5, 7, 9):  # the first agent, an agent's response, an adversary's, the next iteration
        killed = cli_process(*run, f"--model.init_args.kill_at={step}", *resume)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resume = ["--ckpt_path", "last"]
    assert cli(*run, "--ckpt_path", "last") == 0
    whole, again = tmp_path / "runs" / "whole" / "run-001", sorted((tmp_path / "runs" / "killed").iterdir())[-1]
    assert_same_games(population(whole), population(again))
    assert_same(rows(whole, 9), rows(again, 9))


def test_test_runs_the_attack_matrix_from_a_checkpoint(cli, support_configs, tmp_path, whole):
    matrix = "--trainer.callbacks+=callbacks.attacks.AttackMatrix"
    start = whole / "checkpoints" / "last.ckpt"
    flags = ["--ckpt_path", start, "--experiment=tested", matrix]
    with pytest.warns(UserWarning, match="is weaker than"):  # after two updates a learned attack has learnt nothing
        assert cli("test", "-c", support_configs / "grad.yaml", *flags) == 0
    folder = tmp_path / "runs" / "tested" / "test-001" / "attacks"
    report = json.loads((folder / "attacks.json").read_text())
    named = [row["attack"] for row in report["attacks"]]
    assert named == ["none", *(f"{n}_coupled" for n in ("random", "ou", "constant", "sa_rl", "sa_rl_delta"))]
    returns = [row["return_mean"] for row in report["attacks"]]
    assert report["worst_case"] == min(returns)
    assert report["natural"] == returns[0]
    for row in report["attacks"][1:]:
        assert 0 < row["linf"] <= 1.0 + 1e-6
        assert row["step_linf"] <= 0.2 + 1e-6
    assert any("its training failed" in flag for flag in report["flags"])
    learned = [row for row in report["attacks"] if row["name"].startswith("sa_rl")]
    assert all(row["runs"] == 1 and row["frames"] == 128 for row in learned)
    with open(folder / "attacks.csv") as stream:
        assert len(list(csv.DictReader(stream))) == len(named)


def test_testing_leaves_training_alone(cli, support_configs, tmp_path, whole):
    """Validation, learned attacks included, changes nothing of what follows."""
    looked = ["--trainer.val_check_interval=4", "--model.init_args.attacks.val_names=[none, random, sa_rl]"]
    assert cli(*_run(support_configs, "--experiment=looked", *looked)) == 0
    assert_same_games(population(whole), population(tmp_path / "runs" / "looked" / "run-001"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.init_args.perturbation.eps=-1"], "eps: budget must be >= 0"),
        (["--model.init_args.perturbation.eps=.nan"], "eps: budget must be >= 0"),
        (["--model.init_args.perturbation.eps_bar=-0.1"], "temporal budget must be >= 0"),
        (["--model.init_args.perturbation.eps=[0.1, 0.2]"], "eps: has 2 entries, a perturbation of action has 1"),
        (["--model.init_args.psro.eval_episodes=0"], "eval_episodes must be >= 1, got 0"),
        (["--model.init_args.perturbation.space=params"], "has none"),
        (["--model.init_args.adversary.kind=pa_ad"], "pa_ad perturbs observations"),
        (["--model.init_args.attacks.names=[mad]"], "goes through the policy's gradient"),
        (["--model.init_args.attacks.names=[nonsense]"], "known are none, random"),
        (["--model.init_args.attacks.budget=2"], "2 runs, but grid lists 1"),
        (["--model.init_args.attacks.grid=[{lrr: 0.1}]"], "PPOSettings has no lrr"),
        (["--data.init_args.task=integratr"], "unknown 'integratr'; the nearest are integrator"),
        (["--data.init_args.task=gym/Hoper-v5"], "Hopper-v5"),
        (["--data.init_args.task=gym/os:Env-v0"], "allow_import"),
        (["--data.init_args.envs=7"], "must be a multiple of envs"),
        (["--data.init_args.options={colour: red}"], "options of integrator"),
        (["--model.init_args.psro.warm_start=late"], "warm_start"),
        (["--model.init_args.adversary.kind=nr"], "has no budget"),
        (["--model.init_args.memory.k=0"], "k must be >= 1"),
    ],
)
def test_bad_input_is_one_line(cli, capsys, support_configs, tmp_path, flags, message):
    assert cli(*_run(support_configs, *flags)) != 0
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_checkpoint_of_another_game_is_refused(cli, capsys, support_configs, tmp_path, whole):
    start = ["--ckpt_path", whole / "checkpoints" / "step-00000004.ckpt"]
    assert cli(*_run(support_configs, *start, "--model.init_args.perturbation.eps_bar=0.3")) != 0
    assert "perturbation" in capsys.readouterr().err
    assert cli(*_run(support_configs, *start, "--model.init_args.psro.br_frames=256")) != 0
    assert "keep init_frames, br_frames" in capsys.readouterr().err
    assert cli(*_run(support_configs, *start, "--data.init_args.options={horizon: 10}")) != 0
    assert "10" in capsys.readouterr().err


def test_vacuous_coupling_and_a_blind_adversary_are_warned_of(cli, support_configs):
    for flag, message in (
        ("--model.init_args.perturbation.eps_bar=2.5", "coupling is vacuous"),
        ("--model.init_args.adversary.observe_previous=false", "observe_previous is false"),
    ):
        with pytest.warns(UserWarning, match=message):
            assert cli(*_run(support_configs, flag, "--trainer.max_steps=1")) == 0
