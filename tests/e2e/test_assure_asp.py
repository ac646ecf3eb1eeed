"""Assurance of routing modules through the command line, and starting a round from another run's solver."""

from __future__ import annotations

import json

import pytest
import torch
from population_runs import checkpoint

from modules.routing.trained import load_solver


def _fit(cli, support_configs, name, experiment, *flags):
    return cli("fit", "-c", support_configs / f"{name}.yaml", f"--experiment={experiment}", *flags)


def _figures(folder):
    report = json.loads((folder / "report.json").read_text())
    return {one["name"]: one for one in report["figures"] if one["split"] == "fresh"}


def test_asp_is_assured_with_the_solver_it_keeps(cli, support_configs, tmp_path, capsys):
    assert _fit(cli, support_configs, "asp", "asp", "--trainer.max_steps=30") == 0
    last = tmp_path / "runs" / "asp" / "run-001" / "checkpoints" / "last.ckpt"
    limits = "[{figure: u.gap_closed, tau: -100}, {figure: r.gap_ood, tau: 0.0, kind: watch}]"
    run = ["assure", "-c", support_configs / "asp.yaml", "--ckpt_path", last, "--limits", limits,
           "--suite=custom", "--probes=[instance_kinds, gap_closed, decoding_budget, fixed_prefix, card]",
           "--n0=4"]  # fmt: skip
    values = {}
    for keep in ("last", "best_all"):
        out = tmp_path / keep
        assert cli(*run, "--out", out, f"--model.init_args.evaluation.keep={keep}", "--experiment=a") == 0
        assert "verdict: pass" in capsys.readouterr().out
        found = _figures(out)
        assert set(found["r.gap_ood"]["conditions"]) == {
            "mixture_file/5", "mixture_file/6", "mixture_file/7", "uniform/6",
        }  # fmt: skip
        assert found["c.feasible"]["value"] == found["c.time"]["value"] == found["c.warm"]["value"] == 1.0
        assert found["r.gap_ood"]["value"] >= 0
        assert found["e.provenance"]["value"] == 1.0
        values[keep] = found["r.gap_ood"]["value"]
    kept = load_solver(last, "best_all").state_dict()
    same = all(torch.equal(kept[name], value) for name, value in load_solver(last).state_dict().items())
    assert same == (values["last"] == values["best_all"])


def test_a_suite_within_training_leaves_no_trace(cli, support_configs, tmp_path):
    callback = "[{class_path: callbacks.assurance.AssuranceCallback, init_args: {n0: 2}}]"
    flags = ("--trainer.max_steps=6", "--model.init_args.solver.norm=batch")
    assert _fit(cli, support_configs, "routing_pomo", "watched", *flags, f"--trainer.callbacks={callback}") == 0
    assert _fit(cli, support_configs, "routing_pomo", "plain", *flags) == 0
    watched, plain = (tmp_path / "runs" / name / "run-001" for name in ("watched", "plain"))
    for key, value in checkpoint(plain)["state_dict"].items():
        assert torch.equal(checkpoint(watched)["state_dict"][key], value), key
    assert any("rice/R/r.gap_ood" in line for line in (watched / "metrics.jsonl").read_text().splitlines())


def test_a_checkpoint_alone_is_assured_on_vehicles(cli, support_configs, tmp_path):
    data = [
        "--data.init_args.oracle=ruin_recreate(20)",
        "--data.init_args.eval_sets={uniform: {sizes: [10], count: 4}}",
    ]
    assert _fit(cli, support_configs, "routing_am", "am", "--trainer.max_steps=1", *data) == 0
    trained = ["--model=modules.routing.TrainedSolver",
               f"--model.init_args.checkpoint={tmp_path / 'runs' / 'am' / 'run-001'}"]  # fmt: skip
    module = ["--data=datamodules.RoutingDataModule", "--data.init_args.problem=cvrp", "--data.init_args.size=10"]
    suite = ["--suite=custom", "--probes=[vehicle_equity, gap_closed, card]", "--n0=4"]
    assert cli("assure", *trained, *module, *data, *suite, "--out", tmp_path / "out", "--trainer.accelerator=cpu") == 0
    found = _figures(tmp_path / "out")
    assert 0 <= found["e.equity"]["value"] < 1
    assert "reference: ruin_recreate(20)" in str(found["u.gap_closed"]["baselines"])
    assert found["e.provenance"]["value"] == 0.0  # the checkpoint does not say what it was trained on


@pytest.mark.parametrize("name", ["routing_pomo", "routing_am", "asp"])
def test_a_round_starts_from_the_last_ones_solver(cli, support_configs, tmp_path, name):
    """Any routing module's checkpoint serves; at a rate too small to see the weights are those, else they move."""
    plain = ["--data.init_args.oracle=null", "--trainer.limit_val_batches=0", "--checkpoint.every_n_steps=1"]
    first = "routing_am" if name == "routing_am" else "routing_pomo"
    assert _fit(cli, support_configs, first, "first", "--trainer.max_steps=2", *plain) == 0
    start = tmp_path / "runs" / "first" / "run-001"
    learnt = load_solver(start).state_dict()
    method = ["--model.init_args.method=adapt"] if name == "asp" else []
    rate = "training.lr" if name == "asp" else "lr"
    for lr, moved in ((1e-30, False), (1e-3, True))[: 1 if name == "routing_am" else 2]:
        flags = [f"--model.init_args.{rate}={lr}", f"--warm_start={start}", "--trainer.max_steps=1", *plain, *method]
        assert _fit(cli, support_configs, name, f"next-{moved}", *flags) == 0
        saved = checkpoint(tmp_path / "runs" / f"next-{moved}" / "run-001")
        weights = {key.removeprefix("solver."): value for key, value in saved["state_dict"].items()}
        assert all(torch.equal(weights[key], value) for key, value in learnt.items()) != moved
        assert (saved["global_step"], saved["instances"]) == (1, 8)
        if name == "routing_am":
            frozen = {key: saved["state_dict"][f"baseline.frozen.{key}"] for key in learnt}
            assert all(torch.equal(frozen[key], value) for key, value in learnt.items())
            assert int(saved["state_dict"]["baseline.epochs"]) == 0


def test_weights_of_another_problem_are_refused(cli, support_configs, tmp_path, capsys):
    plain = ["--data.init_args.oracle=null", "--trainer.limit_val_batches=0"]
    assert _fit(cli, support_configs, "routing_am", "cvrp", "--trainer.max_steps=1", *plain) == 0
    start = tmp_path / "runs" / "cvrp" / "run-001"
    assert _fit(cli, support_configs, "asp", "next", f"--warm_start={start}") != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the solver is one of problem cvrp" in error
