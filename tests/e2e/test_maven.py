"""MAVEN through the command line: the latent is stored with every episode, and a resumed run is the same run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

VARIANTS = {
    "feed-forward": [],
    "recurrent": ["--model.init_args.network.recurrent=true"],
    "torchrl collector": ["--data.init_args.collector=torchrl"],
    "step discriminator": ["--model.init_args.latent.discriminator=step", "--model.init_args.mixing.kind=vdn"],
}


def _arguments(folder: Path, *flags: str) -> list[str]:
    return ["fit", "-c", str(folder / "maven_tiny.yaml"), *flags]


def _replay(folder: Path) -> dict[str, torch.Tensor]:
    last = (folder / "checkpoints" / "last.ckpt").resolve()
    files = sorted(last.with_suffix("").with_suffix(".rank-0").iterdir())
    return {path.name: torch.tensor(list(path.read_bytes())) for path in files}


def _final(folder: Path) -> dict[str, Any]:
    """Everything a run's last checkpoint holds, rank files and replay included."""
    whole = checkpoint(folder)
    last = (folder / "checkpoints" / "last.ckpt").resolve()
    rank = torch.load(last.with_suffix("").with_suffix(".rank-0.pt"), weights_only=True)
    return {
        "weights": dict(whole["state_dict"]),
        "optimizer": whole["optimizer_states"],
        "data": rank["data"],
        "rng": rank["rng"]["torch"],
        "replay": _replay(folder),
        "step": whole["global_step"],
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_run_continues_exactly_from_any_checkpoint(cli, support_configs, tmp_path, name):
    run = _arguments(support_configs, *VARIANTS[name])
    assert cli(*run, "--experiment=whole", "--checkpoint.keep_last=99") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    for step in (6, 18):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        assert cli(*run, f"--experiment=from-{step}", "--ckpt_path", start) == 0
        again = tmp_path / "runs" / f"from-{step}" / "run-001"
        assert_same(_final(whole), _final(again))
        assert_same(rows(whole, step), rows(again, step))
    logged = rows(whole)
    assert sum("val/return" in row for row in logged) == 4
    for key in ("latent/information", "latent/entropy", "latent/baseline", "latent/recent"):
        values = [row[key] for row in logged if key in row]
        assert len(values) == 41, key
        assert all(map(math.isfinite, values)), key
    recent = [row["latent/recent"] for row in logged if "latent/recent" in row]
    assert recent[0] == 1.0
    assert min(recent) < 0.5


def test_replay_holds_the_latent_of_every_episode(cli, support_configs, tmp_path):
    assert cli(*_arguments(support_configs, "--experiment=whole")) == 0
    stored = _replay(tmp_path / "runs" / "whole" / "run-001")
    latent = stored["carry_latent.000000.bin"].to(torch.uint8).view(torch.int64)
    begun = stored["carry_latent_frames.000000.bin"].to(torch.uint8).view(torch.int64)
    log_prob = stored["carry_latent_log_prob.000000.bin"].to(torch.uint8).view(torch.float32)
    assert latent.shape == begun.shape == log_prob.shape == (40,)
    assert set(latent.tolist()) == {0, 1, 2}
    assert int(begun.max()) >= 640
    assert set((begun % 16).tolist()) == {0}
    assert bool((log_prob < 0.0).all())


def test_collectors_give_the_same_run(cli, support_configs, tmp_path):
    """Latents are drawn by the newest policy in both, also in episodes that start with a chunk."""
    for collector in ("tensor", "torchrl"):
        flags = (f"--data.init_args.collector={collector}", f"--experiment={collector}")
        assert cli(*_arguments(support_configs, *flags)) == 0
    one, other = (tmp_path / "runs" / each / "run-001" for each in ("tensor", "torchrl"))
    assert_same(rows(one), rows(other))
    assert_same(_final(one)["weights"], _final(other)["weights"])
    assert_same(_replay(one), _replay(other))


def test_bad_settings_end_in_one_line(cli, support_configs, capfd):
    for flag, message in (
        ("--model.init_args.latent.size=1", "Latent: size must be >= 2, got 1"),
        ("--model.init_args.ensemble.size=2", "MAVEN: ensemble must be one member"),
        ("--model.init_args.mixing.kind=none", "MAVEN: mixing.kind must be qmix or vdn"),
    ):
        assert cli(*_arguments(support_configs, flag)) != 0
        assert message in capfd.readouterr().err, flag
