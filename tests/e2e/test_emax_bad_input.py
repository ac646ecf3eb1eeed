"""What a multi-agent run refuses: one line that names the culprit and the mend, before anything is learnt."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest


@pytest.fixture
def refused(cli, capfd, support_configs):
    """Runs the tiny config with flags that must be refused; returns the one line."""

    def run(*flags: object) -> str:
        code = cli("fit", "-c", support_configs / "emax_tiny.yaml", *flags)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code in (1, 2)
        assert len(lines) == 1, lines
        assert len(lines[0]) < 500
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.init_args.task=lbf/8x8-2p-2f-cop"], ["lbf/8x8-2p-2f-cop", "lbf/8x8-2p-2f-coop"]),
        (["--data.init_args.task=lfb/8x8-2p-2f"], ["lfb/8x8-2p-2f", "lbf/"]),
        (["--data.init_args.task=lbf/15x15-3p-5f"], ["lbf/15x15-3p-5f", "1..4", "lbf/15x15-3p-4f", "{food: 5}"]),
        (["--data.init_args.task=lbf/15x15-3p-5f", "--data.init_args.backend=package"], ["lbf/15x15-3p-5f", "food"]),
        (["--data.init_args.options={episode_limt: 10}"], ["episode_limt", "episode_limit"]),
        (["--data.init_args.frames_per_batch=18"], ["frames_per_batch", "multiple of envs (4)", "18"]),
        (["--data.init_args.total_frames=60"], ["total_frames", "learning_starts (80)", "60"]),
        (["--data.init_args.capacity=8"], ["capacity", "16 items", "8"]),
        (["--model.init_args.ensemble.size=0"], ["Ensemble", "size must be >= 1", "0"]),
        (["--model.init_args.ensemble.bootstrap_p=1.5"], ["bootstrap_p", "(0, 1]", "1.5"]),
        (["--model.init_args.explorer.beta=-1"], ["Explorer", "beta", "-1"]),
        (["--model.init_args.explorer.beta=.nan"], ["Explorer", "beta", "nan"]),
        (["--model.init_args.reward.scalarise=none"], ["qmix needs a common reward", "reward.scalarise"]),
        (["--model.init_args.gamma=1.1"], ["gamma", "[0, 1]", "1.1"]),
        (["--trainer.gradient_clip_val=1.0"], ["gradient clipping"]),
    ],
)  # fmt: skip
def test_refusals(refused, flags, says):
    line = refused(*flags)
    assert all(part in line for part in says), line


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_datamodule_of_another_kind(refused):
    game = "init_args: {game: {class_path: datamodules.games.KuhnPoker}}"
    line = refused(f"--data={{class_path: datamodules.GameDataModule, {game}}}")
    assert "KilledMARL: needs a datamodule with multi-agent environments (datamodules.MARLDataModule)" in line


def test_replay_larger_than_the_disk(refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    line = refused("--data.init_args.capacity=1000000", "--data.init_args.storage=memmap")
    assert all(part in line for part in ("capacity", "1,000,000 items", "3 times", "0.0 GB free", "lower capacity"))


def test_replay_larger_than_memory(refused, monkeypatch):
    from datamodules.rollout import replay

    monkeypatch.setattr(replay, "_memory_bytes", lambda: 10**6)
    line = refused("--data.init_args.capacity=1000000")
    assert all(part in line for part in ("capacity", "memory", "storage: memmap"))


def test_checkpoint_of_another_task(cli, support_configs, capfd, tmp_path):
    config = support_configs / "emax_tiny.yaml"
    assert cli("fit", "-c", config, "--experiment=one") == 0
    last = tmp_path / "runs" / "one" / "run-001" / "checkpoints" / "last.ckpt"
    assert cli("test", "-c", config, "--ckpt_path", last, "--data.init_args.task=lbf/5x5-2p-2f-coop") == 1
    assert "lbf/5x5-2p-1f-coop" in capfd.readouterr().err
    assert cli("fit", "-c", config, "--ckpt_path", last, "--data.init_args.frames_per_batch=32") == 1
    assert "frames_per_batch: the checkpoint has 16, the config 32" in capfd.readouterr().err


def test_diverging_target_is_stopped(cli, support_configs, capfd):
    """Rewards of up to 1 with targets of a hundred: the line says what to do."""
    config = support_configs / "emax_tiny.yaml"
    flags = [
        "--model.init_args.reward.norm=none",
        "--model.init_args.target={kind: mean_online, double_q: false}",
        "--model.init_args.learning_rate=1.0",
        "--model.init_args.gamma=0.5",
        "--data.init_args.options={episode_limit: 10, penalty: 0.1}",
        "--data.init_args.total_frames=4000",
    ]
    assert cli("fit", "-c", config, *flags) == 1
    assert "target.kind: mean_target" in capfd.readouterr().err
