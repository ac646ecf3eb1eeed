"""Assurance of population games through the command line, and rounds that start from another run's population."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from population_runs import assert_same, assert_same_games, checkpoint, iterations, population

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
PPO = {"hidden": [8], "learning_rate": 1.0e-2, "epochs": 1, "minibatches": 1}
PLAYED = {
    "model": {
        "class_path": "modules.psd_psro.SampledPSRO",
        "init_args": {
            "response": {"class_path": "modules.population.PPOResponse", "init_args": PPO},
            "updates": 2, "episodes": 64, "simulations": 64,
        },
    },
    "data": {
        "class_path": "datamodules.GameDataModule",
        "init_args": {"game": {"class_path": "datamodules.games.KuhnPoker"}, "symmetrize": True, "expand": False},
    },
}  # fmt: skip


@pytest.fixture
def played(tmp_path) -> Path:
    path = tmp_path / "played.yaml"
    path.write_text(yaml.safe_dump(PLAYED))
    return path


@pytest.fixture
def fit(cli, tmp_path):
    def run(name: str, config: object, count: int, *argv: object) -> Path:
        steps = [f"--trainer.max_epochs={count}", f"--experiment={name}"]
        assert cli("fit", "-c", config, *QUIET, *steps, *argv) == 0
        return tmp_path / "runs" / name / "run-001"

    return run


def _figures(folder: Path) -> dict[str, dict]:
    report = json.loads((folder / "report.json").read_text())
    return {one["name"]: one for one in report["figures"] if one["split"] == "fresh"}


def _members(folder: Path) -> list[torch.Tensor]:
    """Per population, one tensor ``[members, ...]``."""
    return [next(iter(one["members"].values())) for one in population(folder)["members"]]


def test_a_solution_is_assured_and_an_untrained_one_fails(cli, fit, tmp_path, capsys):
    folder = fit("kuhn", "psd_psro/kuhn", 4)
    limits = "[{figure: r.nashconv, tau: 0.5}, {figure: u.value, tau: 0.1}, {figure: c.seat, tau: 0}]"
    suite = ["assure", "-c", "psd_psro/kuhn", *QUIET, "--suite=rice", "--limits", limits]
    out = tmp_path / "out"
    assert cli(*suite, "--ckpt_path", folder / "checkpoints" / "last.ckpt", "--out", out) == 0
    assert "verdict: pass" in capsys.readouterr().out
    found = _figures(out)
    assert found["r.nashconv"]["value"] == pytest.approx(iterations(folder)[-1], rel=1e-9)
    assert found["r.pe"]["value"] == pytest.approx(iterations(folder, "meta/population_exploitability")[-1], abs=1e-8)
    assert found["c.rollback"]["value"] == found["e.provenance"]["value"] == 1.0
    assert cli(*suite, "--out", tmp_path / "untrained") == 3  # the first members play at random
    found = _figures(tmp_path / "untrained")
    assert found["r.nashconv"]["value"] == pytest.approx(11 / 12)
    assert found["u.value"]["value"] == 0.0


def test_a_population_of_networks_is_assured_by_play(cli, fit, played, tmp_path):
    folder = fit("played", played, 2)
    suite = ["--suite=custom", "--probes=[played_conduct, played_members, meta_strategy, distributions, rollback]"]
    last = folder / "checkpoints" / "last.ckpt"
    for out in ("one", "two"):
        assert cli("assure", "-c", played, *QUIET, *suite, "--n0=50", "--ckpt_path", last, "--out", tmp_path / out) == 0
    found = _figures(tmp_path / "one")
    assert (found["c.seat"]["value"], found["c.rollback"]["value"]) == (0.0, 1.0)
    assert found["c.mix"]["value"] < 1e-6
    assert len(found["r.pop_ex"]["conditions"]) == 3
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


# -- starting from another run's population --
@pytest.mark.parametrize("kind", ["exact", "sampled cells", "played"])
def test_a_round_goes_on_with_the_last_ones_members(fit, support_configs, played, kind):
    config = {"exact": "psd_psro/kuhn", "sampled cells": support_configs / "psd_psro_ppo.yaml", "played": played}[kind]
    first = fit("first", config, 2)
    second = fit("second", config, 2, f"--warm_start={first / 'checkpoints' / 'last.ckpt'}", "--seed_everything=5")
    before, after = population(first), population(second)
    for mine, theirs in zip(_members(second), _members(first), strict=True):
        assert len(mine) == len(theirs) + 2
        assert_same(mine[: len(theirs)], theirs)
        assert not torch.equal(mine[-1], mine[-2])
    assert (after["iteration"], checkpoint(second)["global_step"]) == (2, checkpoint(first)["global_step"])
    assert after["frames"] == pytest.approx(before["frames"], rel=0.2)  # of this round alone; games differ in length
    assert [point[0] for point in after["history"]["meta/value"]] == [1.0, 2.0]
    payoffs = [torch.as_tensor(state["payoff_table"]["sums"]) for state in (before, after)]
    size = payoffs[0].shape[1:]
    assert_same(payoffs[1][(slice(None), *(slice(n) for n in size))].contiguous(), payoffs[0])


def test_two_exact_rounds_are_one_run_of_both(fit):
    """Best responses depend on nothing but the population, so a warm start loses nothing of it."""
    whole = fit("whole", "psd_psro/leduc", 4, "--trainer.callbacks=null")
    first = fit("first", "psd_psro/leduc", 2, "--trainer.callbacks=null")
    flags = ["--trainer.callbacks=null", f"--warm_start={first / 'checkpoints' / 'last.ckpt'}"]
    second = fit("second", "psd_psro/leduc", 2, *flags)
    assert_same_games(population(second), population(whole), skip=("iteration", "frames", "episodes", "history"))
    share = "--model.init_args.scheme.init_args.uniform_share=0.3"
    other = fit("share", "psd_psro/leduc", 2, *flags, share)
    theirs = _members(second)[0]
    assert torch.equal(_members(other)[0][:3], theirs[:3])
    assert not torch.equal(_members(other)[0][3:], theirs[3:])


def test_a_population_that_does_not_fit_is_refused(cli, fit, support_configs, played, capsys):
    kuhn = fit("kuhn", "psd_psro/kuhn", 1) / "checkpoints" / "last.ckpt"
    scheme = "--model.init_args.scheme"
    pipeline = [f"{scheme}=modules.psd_psro.Pipeline", f"{scheme}.init_args.learners=3"]
    cases = [
        ("psd_psro/leduc", [], "its population plays game kuhn_poker"),
        (support_configs / "psd_psro_ppo.yaml", ["--data.init_args.symmetrize=false"], "its members hold strategy"),
        ("psd_psro/kuhn", pipeline, "has 2 members, Pipeline starts from 4"),
    ]
    for config, flags, says in cases:
        capsys.readouterr()
        argv = ["fit", "-c", config, *flags, *QUIET, "--trainer.max_epochs=1", f"--warm_start={kuhn}"]
        assert cli(*argv, "--experiment=next") != 0
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
