"""Teams through the command line: trained with missing partners, measured, trained on from the weights."""

from __future__ import annotations

import json

import pytest
import torch
from population_runs import assert_same, checkpoint, rows


def _report(folder) -> dict[str, dict]:
    figures = json.loads((folder / "report.json").read_text())["figures"]
    return {figure["name"]: figure for figure in figures if figure["split"] == "fresh"}


def test_a_team_is_measured_and_trained_on(cli, support_configs, tmp_path):
    config = support_configs / "emax_tiny.yaml"
    short = ["--data.init_args.total_frames=400", "--trainer.limit_val_batches=0"]
    run = ["-c", config, "--model.init_args.dropout.probability=0.4", *short]
    assert cli("fit", *run, "--experiment=one") == 0
    one = tmp_path / "runs" / "one" / "run-001"
    last = one / "checkpoints" / "last.ckpt"
    out = tmp_path / "out"
    limits = "--limits=[{figure: c.interrupt, tau: 0.8}, {figure: c.avail, tau: 0.8}]"
    assert cli("assure", *run, "--ckpt_path", last, "--suite=quick", "--out", out, limits) == 0
    found = _report(out)
    for name in ("u.return", "c.interrupt", "c.avail", "i.ens_cal", "i.ens_ece", "i.credit", "i.card"):
        assert found[name]["status"] == "measured", found[name]
    assert found["c.interrupt"]["value"] == found["c.avail"]["value"] == 1.0
    # on from these weights with another share of missing agents, and measured among the agents of that run
    assert cli("fit", "-c", config, *short, "--warm_start", last, "--experiment=two", "--seed_everything=9") == 0
    two = tmp_path / "runs" / "two" / "run-001"
    first, second = (checkpoint(folder)["state_dict"]["online"] for folder in (one, two))
    assert not torch.equal(first, second)
    # another seed's weights would lie about 0.5 apart; these few updates moved them by less than a tenth of that
    assert 0.0 < float((second - first).abs().max()) < 0.05
    partners = f"--model.init_args.partners=[{last}]"
    probes = "--probes=[partners]"
    assert cli("assure", "-c", config, "--ckpt_path", two / "checkpoints" / "last.ckpt", "--suite=custom", probes,
               partners, "--n0=50", "--out", tmp_path / "mixed") == 0  # fmt: skip
    conditions = _report(tmp_path / "mixed")["r.partner"].get("conditions", {})
    assert set(conditions) <= {"among themselves", "among agents of other checkpoints"}


@pytest.mark.parametrize("config", ["mappo_tiny", "maven_tiny"])
def test_other_teams_are_measured_too(cli, support_configs, tmp_path, config):
    flags = ["-c", support_configs / f"{config}.yaml", "--model.init_args.dropout={probability: 0.5, kind: idle}"]
    short = ["--data.init_args.total_frames=192", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=0"]
    assert cli("fit", *flags, *short, "--experiment=one") == 0
    last = tmp_path / "runs" / "one" / "run-001" / "checkpoints" / "last.ckpt"
    out = tmp_path / "out"
    probes = "--probes=[disturbed_team,team_obedience,rollback]"
    assert cli("assure", *flags, "--ckpt_path", last, "--suite=custom", probes, "--n0=50", "--out", out) == 0
    found = _report(out)
    assert found["u.return"]["status"] == "measured"
    assert found["c.interrupt"]["value"] == found["c.avail"]["value"] == found["c.rollback"]["value"] == 1.0


def test_suites_within_training_change_nothing(cli, support_configs, tmp_path):
    flags = ["-c", support_configs / "emax_tiny.yaml", "--data.init_args.total_frames=320",
             "--model.init_args.dropout.probability=0.4", "--trainer.val_check_interval=8"]  # fmt: skip
    watched = ["--trainer.callbacks+=callbacks.assurance.AssuranceCallback", "--trainer.callbacks.suite=quick"]
    assert cli("fit", *flags, "--experiment=plain") == 0
    assert cli("fit", *flags, *watched, "--experiment=watched") == 0
    plain, seen = (tmp_path / "runs" / name / "run-001" for name in ("plain", "watched"))
    assert_same(checkpoint(plain)["state_dict"], checkpoint(seen)["state_dict"], "state_dict")
    assert any("rice/U/u.return" in row for row in rows(seen))
