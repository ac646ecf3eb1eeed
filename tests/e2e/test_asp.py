"""ASP and its base solvers through the command line."""

from __future__ import annotations

import signal

import pytest
import torch
from population_runs import assert_same, checkpoint, population, rows


def _run(folder, name, *flags):
    return ["fit", "-c", str(folder / f"{name}.yaml"), *flags]


def _weights(folder):
    return {key: value for key, value in checkpoint(folder)["state_dict"].items() if key.startswith("solver.")}


@pytest.fixture
def whole(cli, support_configs, tmp_path):
    """A run with a checkpoint after every step."""
    assert (
        cli(
            *_run(
                support_configs,
                "asp",
                "--experiment=whole",
                "--checkpoint.every_n_steps=1",
                "--checkpoint.keep_last=99",
            )
        )
        == 0
    )
    return tmp_path / "runs" / "whole" / "run-001"


def test_a_run_explores_adapts_and_climbs(whole):
    """The log holds every phase; the payoff table is complete and no gap is negative."""
    logged = rows(whole)
    ended = [row for row in logged if "iteration" in row]
    assert [row["curriculum/phase"] for row in ended][:2] == [0.0, 0.0]
    assert {row["curriculum/scale"] for row in ended} >= {5.0, 6.0}
    for row in ended:
        gaps = [value for key, value in row.items() if key.startswith("gap/held_out/")]
        assert len(gaps) == 3
        assert min(gaps) >= -1e-9
        weights = [value for key, value in row.items() if key.startswith("curriculum/weight_")]
        assert sum(weights) == pytest.approx(1.0)
    state = population(whole)
    counts = state["payoff_table"]["counts"]
    assert counts.shape[0] in (1, 2, 3)
    solvers, generators = counts.shape
    if solvers > 1 and state["cursor"] == 0:
        assert (counts == 8).all()
        payoffs = state["payoff_table"]["sums"]
        assert (payoffs[0] <= 1e-9).all()
        assert torch.equal(payoffs[0], -payoffs[1])
    assert {"train/generator/reward", "train/solver/loss", "train/solver/entropy"} <= set().union(*logged)


def test_from_any_step_it_continues_bitwise(cli, support_configs, tmp_path, whole):
    """Within a generator's response (2), at its end (3), in the solver's (5), at its end (7), in the payoffs (8, 9), in
    the held-out gaps (11), between rounds (12), and in an adaption."""
    ended = [row["step"] for row in rows(whole) if row.get("curriculum/phase") == 1.0]
    assert ended, "no adaption in 60 steps"
    inside = int(ended[0]) - 4
    for step in (2, 3, 5, 7, 8, 9, 11, 12, inside):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        assert cli(*_run(support_configs, "asp", f"--experiment=from-{step}", "--ckpt_path", start)) == 0
        again = tmp_path / "runs" / f"from-{step}" / "run-001"
        assert_same(population(whole), population(again), f"from {step}")
        assert_same(_weights(whole), _weights(again), f"from {step}")
        assert_same(rows(whole, step), rows(again, step), f"from {step}")


@pytest.mark.slow  # from any step it continues bitwise: above, in process
def test_killed_in_each_phase_it_ends_the_same(cli, cli_process, support_configs, tmp_path):
    run = _run(support_configs, "asp", "--experiment=killed", "--checkpoint.every_n_steps=4")
    assert cli(*_run(support_configs, "asp", "--experiment=whole", "--checkpoint.every_n_steps=4")) == 0
    resume: list[str] = []
    for step in (2, 6, 9, 30):  # generator, solver, payoffs, later
        killed = cli_process(*run, f"--model.init_args.kill_at={step}", *resume)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resume = ["--ckpt_path", "last"] if step > 4 else []
    assert cli(*run, "--ckpt_path", "last") == 0
    folders = sorted((tmp_path / "runs" / "killed").iterdir())
    whole, again = tmp_path / "runs" / "whole" / "run-001", folders[-1]
    assert_same(population(whole), population(again))
    assert_same(_weights(whole), _weights(again))
    assert_same(rows(whole, 8), rows(again, 8))


@pytest.mark.parametrize("name", ["routing_pomo", pytest.param("routing_am", marks=pytest.mark.slow)])
def test_base_solvers_killed_end_the_same(cli, cli_process, support_configs, tmp_path, name):
    """Also across the rollout baseline's t-tests, which replace its frozen policy."""
    every = "--checkpoint.every_n_steps=2"
    assert cli(*_run(support_configs, name, "--experiment=whole", every)) == 0
    run = _run(support_configs, name, "--experiment=killed", every)
    killed = cli_process(*run, "--model.init_args.kill_at=5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cli(*run, "--ckpt_path", "last") == 0
    whole, again = (tmp_path / "runs" / each / "run-001" for each in ("whole", "killed"))
    assert_same(checkpoint(whole)["state_dict"], checkpoint(again)["state_dict"])
    assert_same(checkpoint(whole)["optimizer_states"], checkpoint(again)["optimizer_states"])
    assert_same(rows(whole), rows(again))
    if name == "routing_am":
        assert int(checkpoint(whole)["state_dict"]["baseline.replaced"]) > 0
        assert int(checkpoint(whole)["state_dict"]["baseline.epochs"]) == 4


@pytest.mark.parametrize(("flag", "phases"), [("method=explore", 1), ("max_phases=2", 2)])
def test_a_run_ends_with_its_game_or_after_its_phases(cli, support_configs, tmp_path, flag, phases):
    assert cli(*_run(support_configs, "asp", "--experiment=ended", f"--model.init_args.{flag}")) == 0
    state = population(tmp_path / "runs" / "ended" / "run-001")
    assert state["method"]["staircase"]["phases"] == phases
    assert state["cursor"] == 0  # whole iterations
    assert state["iteration"] in ((2,) if phases == 1 else (3, 4))  # two rounds a game, one iteration an adaption


def test_without_generators_a_round_is_uniform_training(cli, support_configs, tmp_path):
    """Exploring in 0 rounds and adapting to one scale are both the base solver on uniform instances: equal weights."""
    one_scale = ["--model.init_args.staircase.end=5", "--trainer.max_steps=5"]
    for method, rounds in (("explore", 0), ("adapt", 2)):
        flags = [f"--model.init_args.method={method}", f"--model.init_args.rounds={rounds}", f"--experiment={method}"]
        assert cli(*_run(support_configs, "asp", *one_scale, *flags)) == 0
    explored, adapted = (tmp_path / "runs" / method / "run-001" for method in ("explore", "adapt"))
    assert_same(_weights(explored), _weights(adapted))


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.init_args.generator={steps: 3, batch_size: 8, reward: gap_proxy, normalize: unit_box}"],
        [
            "--model.init_args.generator={steps: 3, batch_size: 8, reward: cost, "
            "squash: minmax, estimator: official, baseline: none}"
        ],
        [
            "--model.init_args.training.base=am",
            "--model.init_args.training.baseline_instances=16",
            "--model.init_args.decoding.starts=false",
        ],
        ["--model.init_args.meta_solver=modules.population.Uniform"],
        ["--model.init_args.use_std=false"],
        [
            "--data.init_args.problem=cvrp",
            "--data.init_args.problem_options={capacity: 20}",
            "--model.init_args.staircase.end=6",
        ],
    ],
    ids=["proxy", "official", "am", "uniform meta-solver", "no std", "cvrp"],
)
def test_variants_run(cli, support_configs, tmp_path, flags):
    assert cli(*_run(support_configs, "asp", "--trainer.max_steps=28", "--experiment=variant", *flags)) == 0
    ended = [row for row in rows(tmp_path / "runs" / "variant" / "run-001") if "iteration" in row]
    assert len(ended) >= 2
    assert all(row["gap/mean_seen"] >= -1e-9 for row in ended)


def test_a_budget_of_instances_ends_the_run_and_test_uses_the_kept_solver(cli, support_configs, tmp_path, capsys):
    flags = ["--model.init_args.max_instances=40", "--experiment=budget"]
    assert cli(*_run(support_configs, "asp", *flags)) == 0
    folder = tmp_path / "runs" / "budget" / "run-001"
    last = checkpoint(folder)
    assert last["instances"] == 40
    assert last["population"]["method"]["best"].keys() == {"best_seen", "best_all"}
    test = ["test", "-c", str(support_configs / "asp.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    gaps = []
    for keep in ("last", "best_all"):
        capsys.readouterr()
        assert cli(*test, f"--experiment=test-{keep}", f"--model.init_args.evaluation.keep={keep}") == 0
        out = capsys.readouterr().out
        assert "test/gap/uniform/6" in out
        gaps.append(next(line for line in out.splitlines() if line.startswith("test/gap/mixture_file/5")))
    assert all("-" not in line.split()[-1] for line in gaps)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.init_args.evaluation.held_out=other"], "the datamodule has no held-out set other/5"),
        (["--model.init_args.staircase.end=3"], "end must be >= start (5), got 3"),
        (["--model.init_args.staircase.threshold=0"], "threshold must be > 0"),
        (["--model.init_args.max_instances=2"], "max_instances must be at least a batch (8), got 2"),
        (["--model.init_args.generator={squash: minmax}"], "minmax has no density to score"),
        (["--data.init_args.oracle=null"], "no instance"),
        (["--data.init_args.problem=tps"], "tps"),
    ],
)
def test_bad_settings_are_one_clear_line(cli, support_configs, capsys, flags, message):
    assert cli(*_run(support_configs, "asp", *flags)) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_solver_of_another_problem_is_refused(cli, support_configs, tmp_path, capsys):
    assert cli(*_run(support_configs, "routing_pomo", "--trainer.max_steps=1", "--experiment=tsp")) == 0
    trained = tmp_path / "runs" / "tsp" / "run-001" / "checkpoints" / "last.ckpt"
    test = ["test", "-c", str(support_configs / "routing_pomo.yaml"), "--ckpt_path", str(trained)]
    capsys.readouterr()
    assert (
        cli(
            *test,
            "--data.init_args.problem=cvrp",
            "--data.init_args.eval_sets={uniform: {sizes: [10], count: 2}}",
            "--data.init_args.size=10",
        )
        != 0
    )
    assert "of problem tsp, the datamodule has cvrp" in capsys.readouterr().err.strip().splitlines()[-1]
