"""Multi-agent runs killed and resumed: weights, targets, environments, replay and logged rows as without the kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from population_runs import assert_same, checkpoint, rows

VARIANTS = {
    "steps": ([], []),
    "episodes": (["emax_episodes"], []),
    "torchrl collector": ([], ["--data.init_args.collector=torchrl"]),
    "episodes, torchrl collector": (["emax_episodes"], ["--data.init_args.collector=torchrl"]),
    "memory-mapped": ([], ["--data.init_args.storage=memmap"]),
    "package": ([], ["--data.init_args.backend=package"]),
}


def _arguments(folder: Path, layers: list[str], flags: list[str]) -> list[str]:
    files = [folder / f"{name}.yaml" for name in ("emax_tiny", *layers)]
    return ["fit", *(str(part) for file in files for part in ("-c", file)), *flags]


def _final(folder: Path) -> dict[str, Any]:
    """Everything a run's last checkpoint holds, rank files and replay included."""
    whole = checkpoint(folder)
    last = (folder / "checkpoints" / "last.ckpt").resolve()
    rank = torch.load(last.with_suffix("").with_suffix(".rank-0.pt"), weights_only=True)
    replay = last.with_suffix("").with_suffix(".rank-0")
    files = {path.name: torch.tensor(list(path.read_bytes())) for path in sorted(replay.iterdir())}
    return {
        "weights": dict(whole["state_dict"]),
        "optimizer": whole["optimizer_states"],
        "data": rank["data"],
        "rng": rank["rng"]["torch"],
        "replay": files,
        "step": whole["global_step"],
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_run_continues_exactly_from_any_checkpoint(cli, support_configs, tmp_path, name):
    run = _arguments(support_configs, *VARIANTS[name])
    assert cli(*run, "--experiment=whole", "--checkpoint.keep_last=99") == 0
    whole = tmp_path / "runs" / "whole" / "run-001"
    steps = [int(path.stem.split("-")[1]) for path in sorted((whole / "checkpoints").glob("step-*.ckpt"))]
    assert steps[:3] == [6, 12, 18]
    for step in (6, 18):
        start = whole / "checkpoints" / f"step-{step:08d}.ckpt"
        assert cli(*run, f"--experiment=from-{step}", "--ckpt_path", start) == 0
        again = tmp_path / "runs" / f"from-{step}" / "run-001"
        assert_same(_final(whole), _final(again))
        assert_same(rows(whole, step), rows(again, step))
    logged = rows(whole)
    assert sum("val/return" in row for row in logged) == 4
    assert logged[-1]["frames"] == 720


@pytest.mark.parametrize("name", ["steps", "episodes"])
def test_run_killed_twice_ends_the_same(cli, cli_process, support_configs, tmp_path, name):
    """SIGKILL after step 8 and, resumed from step 6, after step 27; replay wraps around in between."""
    run = _arguments(support_configs, *VARIANTS[name])
    assert cli(*run, "--experiment=whole") == 0
    resume: list[str] = []
    for step in (8, 27):
        killed = cli_process(*run, "--experiment=killed", f"--model.init_args.kill_at={step}", *resume)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resume = ["--ckpt_path", "last"]
    assert cli(*run, "--experiment=killed", *resume) == 0
    whole, again = (tmp_path / "runs" / each / "run-001" for each in ("whole", "killed"))
    assert_same(_final(whole), _final(again))
    assert_same(rows(whole), rows(again))


def test_collectors_give_the_same_run(cli, support_configs, tmp_path):
    for layers in ([], ["emax_episodes"]):
        run = _arguments(support_configs, layers, [])
        assert cli(*run, "--experiment=tensor") == 0
        assert cli(*run, "--experiment=torchrl", "--data.init_args.collector=torchrl") == 0
        one, other = (tmp_path / "runs" / each / f"run-00{1 + bool(layers)}" for each in ("tensor", "torchrl"))
        assert_same(rows(one), rows(other))
        assert_same(_final(one)["weights"], _final(other)["weights"])


def test_unchanged_parts_of_replay_are_linked(cli, support_configs, tmp_path, monkeypatch):
    from datamodules.rollout import replay

    monkeypatch.setattr(replay, "PART_ITEMS", 64)
    run = _arguments(support_configs, [], ["--data.init_args.capacity=2000"])
    assert cli(*run, "--experiment=linked", "--checkpoint.keep_last=99") == 0
    folders = sorted((tmp_path / "runs" / "linked" / "run-001" / "checkpoints").glob("step-*.rank-0"))
    index = json.loads((folders[-1] / "replay.json").read_text())
    linked = [name for name in index["parts"] if (folders[-1] / name).stat().st_nlink > 1]
    assert 0 < len(linked) < len(index["parts"])
    start = folders[2].with_name(folders[2].name.replace(".rank-0", ".ckpt"))
    assert cli(*run, "--experiment=again", "--ckpt_path", start) == 0
    assert_same(_final(folders[0].parents[1]), _final(tmp_path / "runs" / "again" / "run-001"))


def test_damaged_replay_is_refused(cli, support_configs, tmp_path, capfd):
    run = _arguments(support_configs, [], [])
    assert cli(*run, "--experiment=whole") == 0
    last = (tmp_path / "runs" / "whole" / "run-001" / "checkpoints" / "last.ckpt").resolve()
    part = next(last.with_suffix("").with_suffix(".rank-0").glob("observation.*.bin"))
    data = bytearray(part.read_bytes())
    data[5] ^= 1
    part.write_bytes(data)
    assert cli(*run, "--experiment=whole", "--ckpt_path", "last") == 1
    assert f"{part.name} is damaged" in capfd.readouterr().err
    part.unlink()
    assert cli(*run, "--experiment=whole", "--ckpt_path", "last") == 1
    assert f"{part.name} is missing" in capfd.readouterr().err
