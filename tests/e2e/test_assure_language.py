"""`assure` on a language model through the command line, and a fit on disturbed text from a warm start."""

from __future__ import annotations

import json
from pathlib import Path

PROBES = "[text_loss, text_perturbed, text_lens, text_stop, text_mask, text_resume, text_licence, rollback, card]"


def _report(folder: Path) -> dict[str, dict]:
    figures = json.loads((folder / "report.json").read_text())["figures"]
    return {figure["name"]: figure for figure in figures if figure["split"] == "fresh"}


def test_a_round_by_hand(cli, support_configs, tmp_path):
    """fit, assure with gates, and a warm start with the knobs moved that the findings would move."""
    config = support_configs / "llemma_tiny.yaml"
    assert cli("fit", "-c", config, "--experiment=first") == 0
    last = tmp_path / "runs" / "first" / "run-001" / "checkpoints" / "last.ckpt"
    common = ["--suite=custom", f"--probes={PROBES}", "--n0=12", "--n_max=12", "--ckpt_path", last]
    useless = '--limits=[{"figure": "u.bits_saved", "tau": 1.0, "kind": "gate", "scale": 0.1}]'
    assert cli("assure", "-c", config, *common, "--out=report", useless) == 3  # after twelve steps it knows little
    found = _report(tmp_path / "report")
    for name in ("c.stop", "c.mask", "c.resume", "c.rollback", "e.licence", "e.provenance"):
        assert found[name]["value"] == 1.0, name
    assert set(found["r.ood_loss"]["conditions"]) == {"json", "email"}
    assert found["r.ood_loss"]["value"] < found["r.ood_loss"]["baselines"]["uniform"]
    assert found["r.ppl_ratio"]["value"] > 1.0
    assert len(found["r.ppl_ratio"]["conditions"]) == 8

    layer = tmp_path / "objectives.yaml"
    layer.write_text("data: {init_args: {perturbed_share: 0.5, shares: {json: 0.3, email: 0.7}}}\n")
    moved = ["-c", config, "-c", layer, "--warm_start", last, "--trainer.max_steps=4"]
    assert cli("fit", *moved, "--experiment=moved") == 0
    rows = (tmp_path / "runs" / "moved" / "run-001" / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]
    assert len(losses) == 4
    assert losses[0] < found["r.ood_loss"]["baselines"]["uniform"]  # from the learnt weights
