"""Control modules under assurance through the command line, and rounds that start from the last one's weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
from control_runs import control
from population_runs import population, rows

PROBES = "[attacked_returns, varied_dynamics, small_perturbations, action_bounds, action_overrides, rollback, card]"
SUITE = ["--suite=custom", f"--probes={PROBES}", "--n0=4", "--n_max=4"]
COMMON = ["hidden=[8]", "total_frames=384", "ppo={epochs: 2, minibatches: 4, lr: 1.0e-3}"]


def _other(name: str, *flags: str) -> list[str]:
    return [f"--model=modules.baselines.{name}", *(f"--model.init_args.{one}" for one in (*COMMON, *flags))]


def _params(state) -> torch.Tensor:
    return state["agent"]["policy"]["flat"]


def test_grad_is_assured_and_its_population_goes_on(cli, support_configs, tmp_path, capfd):
    config = ["-c", support_configs / "grad.yaml"]
    assert cli("fit", *config, "--experiment=one", "--model.init_args.perturbation.train_share=0.5") == 0
    one = tmp_path / "runs" / "one" / "run-001"
    shown = [row["perturb/linf"] for row in rows(one) if "perturb/linf" in row]
    assert 0 < max(shown) <= 0.5 + 1e-6

    # the verb: budgets of evaluation differ from those of training, and that is fine
    out = tmp_path / "report"
    assert cli("assure", *config, "--ckpt_path", one / "checkpoints" / "last.ckpt", *SUITE, "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    figures = {one["name"]: one for one in report["figures"] if one["split"] == "fresh"}
    assert figures["c.interrupt"]["value"] == figures["c.rollback"]["value"] == figures["c.budget"]["value"] == 1.0
    assert set(figures["r.worst_return"]["conditions"]) == {
        "none", "random_coupled", "ou_coupled", "constant_coupled", "search_coupled",
    }  # fmt: skip
    assert "no bounds" in figures["c.box"]["reason"]

    start = ["--warm_start", one / "checkpoints" / "last.ckpt"]
    assert cli("fit", *config, "--experiment=two", *start) == 0
    before, after = population(one), population(tmp_path / "runs" / "two" / "run-001")
    kept = int((before["meta_strategies"][0] > 1e-6).sum())
    chosen = (before["meta_strategies"][0] > 1e-6).nonzero().squeeze(1)
    assert (after["iteration"], after["frames"], after["members"][0]["count"]) == (3, before["frames"], kept + 3)
    old, new = before["members"][0]["members"], after["members"][0]["members"]
    for name, value in old.items():
        assert torch.equal(new[name][:kept], value[chosen]), name
    assert not torch.equal(new["policy.weight_0"][kept], old["policy.weight_0"][chosen[-1]])  # it trained
    assert after["members"][1]["members"]["active"][0] == 0.0
    assert (after["payoff_table"]["counts"] == 4).all()  # all measured again

    capfd.readouterr()
    assert cli("fit", "-c", support_configs / "control.yaml", "--experiment=wrong", *start) != 0
    assert "holds no control state" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["ATLA", pytest.param("WocaR", marks=pytest.mark.slow)])
def test_a_warm_start_takes_over_what_was_learnt(cli, support_configs, tmp_path, name):
    flags = [*_other(name), "--seed_everything=3"]
    config = ["-c", support_configs / "control.yaml"]
    quiet = ["--model.init_args.perturbation.train_share=0"] if name == "ATLA" else []
    assert cli("fit", *config, *flags, *quiet, "--experiment=one") == 0
    one = tmp_path / "runs" / "one" / "run-001"
    learnt = control(one)
    start = ["--warm_start", one / "checkpoints" / "last.ckpt"]
    still = ["--model.init_args.ppo={epochs: 1, minibatches: 1, lr: 1.0e-12, value_lr: 1.0e-12}"]
    assert cli("fit", *config, *flags, *start, *still, "--experiment=still") == 0
    again = control(tmp_path / "runs" / "still" / "run-001")
    assert (learnt["adversary"] is None, again["adversary"] is None) == (True, name == "WocaR")
    assert (again["frames"], again["steps"]) == (384, 6)
    assert again["agent"]["updates"] == (3 if name == "ATLA" else 6)
    moved = _params(again) - _params(learnt)
    raised = math.log(1.0) - float(_params(learnt)[0, -1])  # log_std comes last
    assert float(moved[0, :-1].abs().max()) < 1e-6
    assert float(moved[0, -1]) == pytest.approx(max(0.0, raised), abs=1e-6)
    assert again["agent"]["moments"]["count"] > learnt["agent"]["moments"]["count"]
    assert cli("fit", *config, *flags, *start, "--experiment=on") == 0
    on = control(tmp_path / "runs" / "on" / "run-001")
    assert float((_params(on) - _params(learnt))[0, :-1].abs().max()) > 1e-3
