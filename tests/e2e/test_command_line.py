"""The command line as a user meets it: layers, interpolation, overrides, run folders, errors of one line."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]


def _error(capsys) -> str:
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# ------------------------------------------------------------------------------------------------ configs and overrides


def _printed(cli, capsys, *argv) -> dict:
    capsys.readouterr()
    assert cli(*argv, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_layers_interpolation_and_flags(cli, capsys, support_configs, tmp_path):
    """A later file overrides single keys; `${vars.x}` follows the file's, the layer's and the flag's value."""
    config = support_configs / "tiny.yaml"
    layer = tmp_path / "layer.yaml"
    layer.write_text("vars: {other: 1}\nmodel: {init_args: {lr: 0.01}}\n")
    kept = _printed(cli, capsys, "fit", "-c", config, "-c", layer)  # vars of all layers are merged
    assert kept["vars"] == {"width": 4, "other": 1}
    assert kept["model"]["init_args"]["width"] == 4
    layer.write_text("vars: {width: 6}\nmodel: {init_args: {lr: 0.01}}\n")
    base = _printed(cli, capsys, "fit", "-c", config)
    assert (base["model"]["init_args"]["lr"], base["data"]["init_args"]["width"]) == (0.05, 4)
    layered = _printed(cli, capsys, "fit", "-c", config, "-c", layer)
    assert layered["model"]["init_args"]["width"] == layered["data"]["init_args"]["width"] == 6
    assert layered["model"]["init_args"]["lr"] == 0.01
    flag = _printed(cli, capsys, "fit", "-c", config, "-c", layer, "--vars.width=9", "--model.lr=0.5")
    assert flag["model"]["init_args"]["width"] == flag["data"]["init_args"]["width"] == 9
    assert flag["model"]["init_args"]["lr"] == 0.5
    assert flag["trainer"]["use_distributed_sampler"] is False  # configs/base.yaml lies under every run


def test_printed_config_runs_the_same(cli, capsys, support_configs, tmp_path):
    printed = _printed(cli, capsys, "fit", "-c", support_configs / "tiny.yaml", "--trainer.max_steps=4")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed))
    assert cli("fit", "-c", support_configs / "tiny.yaml", "--trainer.max_steps=4", "--experiment", "one") == 0
    assert cli("fit", "-c", again, "--experiment", "two") == 0
    one, two = (
        torch.load(tmp_path / "runs" / name / "run-001" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_saved_config_is_resolved_and_reruns(cli, support_configs, tmp_path):
    config = support_configs / "tiny.yaml"
    assert cli("fit", "-c", config, "--vars.width=5", "--trainer.max_steps=4") == 0
    folder = tmp_path / "runs" / "tiny" / "run-001"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 5
    assert saved["seed_everything"] == 1
    record = json.loads((folder / "environment.json").read_text())
    assert record["packages"]["torch"]
    assert "machine" in record
    assert cli("fit", "-c", folder / "config.yaml", "--experiment", "again") == 0


def test_run_folders_never_overwrite(cli, support_configs, tmp_path):
    for _ in range(2):
        assert cli("fit", "-c", support_configs / "tiny.yaml", "--trainer.max_steps=2") == 0
    assert sorted(p.name for p in (tmp_path / "runs" / "tiny").iterdir()) == ["run-001", "run-002"]


def test_checkpoint_hyperparameters_do_not_override_flags(cli, support_configs, tmp_path):
    """Lightning 2.6 lays a checkpoint's hyperparameters over explicit flags; here the flag wins."""
    config = support_configs / "tiny.yaml"
    assert cli("fit", "-c", config, "--trainer.max_steps=4", "--experiment", "x") == 0
    resumed = ("fit", "-c", config, "--trainer.max_steps=8", "--experiment", "x", "--ckpt_path", "last")
    assert cli(*resumed, "--model.lr=0.7") == 0
    folder = tmp_path / "runs" / "x" / "run-001"
    assert yaml.safe_load((folder / "config-2.yaml").read_text())["model"]["init_args"]["lr"] == 0.7
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.7


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_read_the_last_checkpoint(cli, support_configs, tmp_path, verb):
    config = support_configs / "tiny.yaml"
    assert cli("fit", "-c", config, "--trainer.max_steps=4") == 0
    assert cli(verb, "-c", config, "--ckpt_path", "last") == 0
    assert (tmp_path / "runs" / "tiny" / f"{verb}-001" / "config.yaml").is_file()


def test_best_checkpoint_follows_the_monitor(cli, support_configs, tmp_path):
    config = support_configs / "tiny.yaml"
    assert cli("fit", "-c", config, "--checkpoint.monitor=val/loss", "--checkpoint.keep_last=1") == 0
    folder = tmp_path / "runs" / "tiny" / "run-001"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "val/loss" in row), key=lambda row: row["val/loss"])["step"] + 1
    assert (folder / "checkpoints" / "best.ckpt").resolve().name == f"step-{best:08d}.ckpt"
    assert cli("test", "-c", config, "--ckpt_path", "best") == 0


def test_tensorboard_holds_the_same_curve(cli, support_configs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli("fit", "-c", support_configs / "tiny.yaml") == 0
    folder = tmp_path / "runs" / "tiny" / "run-001"
    events = EventAccumulator(str(folder))
    events.Reload()
    curve = {point.step: point.value for point in events.Scalars("train/loss")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert curve == {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert len(curve) == 12


def test_user_logger_and_callbacks_are_kept(cli, capsys, support_configs, tmp_path):
    printed = _printed(
        cli, capsys, "fit", "-c", support_configs / "tiny.yaml",
        "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",
    )  # fmt: skip
    assert printed["trainer"]["callbacks"][0]["class_path"].endswith("LearningRateMonitor")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.max_step=3"], ["trainer.max_step", "did you mean 'trainer.max_steps'"]),
        (["--model.init_args.lrr=3"], ["'lrr'", "did you mean 'lr'"]),
        (["--data.batchsize=3"], ["'batchsize'", "did you mean 'batch_size'"]),
        (["--checkpoint.every_n_step=3"], ["every_n_step'", "checkpoint.every_n_steps"]),
        (["--trainer.max_steps=abc"], ["trainer.max_steps", "abc"]),
        (["--model=NoSuchModule"], ["NoSuchModule"]),
        (["-c", "no_such_config"], ["no_such_config", "not found"]),
        (["-c", "llemma/laptp"], ["llemma/laptp", "llemma/laptop"]),
    ],
)
def test_config_mistakes_are_one_line_with_the_nearest_key(cli, capsys, support_configs, arguments, words):
    assert cli("fit", "-c", support_configs / "tiny.yaml", *arguments) == 2
    message = _error(capsys)
    for word in words:
        assert word in message


def test_typo_inside_a_config_file(cli, capsys, tmp_path, support_configs):
    layer = tmp_path / "layer.yaml"
    layer.write_text("data: {init_args: {batch_sze: 4}}\n")
    assert cli("fit", "-c", support_configs / "tiny.yaml", "-c", layer) == 2
    assert "batch_size" in _error(capsys)


def test_unresolved_interpolation_is_one_line(cli, capsys, tmp_path, support_configs):
    layer = tmp_path / "layer.yaml"
    layer.write_text('data: {init_args: {batch_size: "${vars.nothing}"}}\n')
    assert cli("fit", "-c", support_configs / "tiny.yaml", "-c", layer) == 2
    assert "nothing" in _error(capsys)


def test_unknown_verb(cli, capsys):
    assert cli("fitt") == 2
    assert "fit" in _error(capsys)


def test_missing_model_is_one_line(cli, capsys):
    assert cli("fit", "--trainer.max_steps=2") == 2
    assert "model" in _error(capsys)


def test_resume_without_a_checkpoint(cli, capsys, support_configs):
    assert cli("fit", "-c", support_configs / "tiny.yaml", "--ckpt_path", "last") == 1
    assert "no whole checkpoint" in _error(capsys)


def test_foreign_package_of_our_name_is_named(cli, capsys, tmp_path, monkeypatch):
    import importlib.util

    stranger = tmp_path / "elsewhere" / "callbacks"
    stranger.mkdir(parents=True)
    (stranger / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location("callbacks", stranger / "__init__.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "callbacks", module)
    assert cli("fit", "--help") == 2
    assert "shadows" in _error(capsys)


def test_help_names_the_verbs(cli_process):
    done = cli_process("--help")
    assert done.returncode == 0
    for verb in ("fit", "validate", "test", "predict", "prepare"):
        assert verb in done.stdout


# -------------------------------------------------------------------------------------------------- drivers, exit codes


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A verb ``measure`` beside Lightning's, from a module that is imported when it is called."""
    import train

    (tmp_path / "measuring.py").write_text(
        "import argparse\n"
        "def run(arguments):\n"
        "    parser = argparse.ArgumentParser('python -m train measure')\n"
        "    parser.add_argument('-c')\n"
        "    parser.add_argument('--code', type=int, default=0)\n"
        "    found = parser.parse_args(arguments)\n"
        "    print('measured', found.c)\n"
        "    return found.code\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(train.DRIVERS, "measure", "measuring:run")
    yield
    sys.modules.pop("measuring", None)


def test_a_driver_gets_its_arguments_and_returns_its_code(cli, capsys, driver):
    assert cli("measure", "-c", "llemma/laptop", "--code=3") == 3
    assert capsys.readouterr().out == f"measured {ROOT / 'configs' / 'llemma' / 'laptop.yaml'}\n"
    assert cli("measure") == 0
    assert cli("measure", "-c", "llemma/laptp") == 2
    assert "llemma/laptop" in _error(capsys)


def test_help_of_a_driver_is_its_own(cli, capsys, driver):
    assert cli("measure", "--help") == 0
    assert "usage: python -m train measure" in capsys.readouterr().out
    assert cli("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Further verbs, each with --help: .*\balign, verify, card\b.*\bmeasure\b", said)


@pytest.mark.parametrize(("rank_zero", "code"), [(True, 3), (False, 0)])
def test_what_a_verb_returns_is_the_exit_code_of_rank_zero(cli, support_configs, monkeypatch, rank_zero, code):
    from lightning.pytorch import LightningDataModule, LightningModule

    from train.cli import PlumblineTrainer

    def prepare(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> int:
        return 3

    monkeypatch.setattr(PlumblineTrainer, "prepare", prepare)
    monkeypatch.setattr(PlumblineTrainer, "is_global_zero", rank_zero)
    assert cli("prepare", "-c", support_configs / "tiny.yaml") == code


def test_the_module_exits_with_the_code_and_is_recorded_as_train(monkeypatch):
    """`python -m train` starts `train/__main__.py`; a run's record takes the command's name from `sys.argv[0]`."""
    import train

    monkeypatch.setattr(train, "main", lambda: 3)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train" / "__main__.py"), "fit"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("train", run_name="__main__")
    assert left.value.code == 3
    assert [Path(sys.argv[0]).name, *sys.argv[1:]] == ["train", "fit"]


# --------------------------------------------------------------------------------------------------------- checkpoints


def _trained(cli, support_configs, tmp_path, **_) -> Path:
    assert cli("fit", "-c", support_configs / "tiny.yaml", "--trainer.max_steps=6") == 0
    return tmp_path / "runs" / "tiny" / "run-001" / "checkpoints"


def _resume(cli, support_configs) -> int:
    return cli("fit", "-c", support_configs / "tiny.yaml", "--trainer.max_steps=9", "--ckpt_path", "last")


def test_truncated_checkpoint_names_file_and_mend(cli, capsys, support_configs, tmp_path):
    folder = _trained(cli, support_configs, tmp_path)
    newest = (folder / "last.ckpt").resolve()
    newest.write_bytes(newest.read_bytes()[:2000])
    before = sorted(p.name for p in folder.iterdir())
    assert _resume(cli, support_configs) == 1
    message = _error(capsys)
    assert newest.name in message
    assert "step-00000003.ckpt" in message  # the whole one beside it
    assert sorted(p.name for p in folder.iterdir()) == before


def test_foreign_checkpoint_is_refused(cli, capsys, support_configs, tmp_path):
    folder = _trained(cli, support_configs, tmp_path)
    (folder / "last.ckpt").resolve().write_text("not a checkpoint")
    assert _resume(cli, support_configs) == 1
    assert "corrupt or not a checkpoint" in _error(capsys)


def test_swapped_rank_file_is_refused(cli, capsys, support_configs, tmp_path):
    folder = _trained(cli, support_configs, tmp_path)
    rank_file = next(folder.glob("step-00000006.rank-0.pt"))
    content = bytearray(rank_file.read_bytes())
    content[len(content) // 2] ^= 1
    rank_file.write_bytes(bytes(content))
    assert _resume(cli, support_configs) == 1
    assert "SHA-256" in _error(capsys)


def test_lost_last_link_falls_back_to_the_newest_whole_file(cli, support_configs, tmp_path):
    folder = _trained(cli, support_configs, tmp_path)
    (folder / "last.ckpt").unlink()
    assert _resume(cli, support_configs) == 0


def test_full_disk_during_a_save_keeps_the_earlier_checkpoint(cli, capsys, support_configs, tmp_path, monkeypatch):
    """The third write of a main checkpoint file meets a full disk, in the middle of the file."""
    import errno

    import callbacks.checkpoint as checkpoint

    real, calls = checkpoint.torch.save, []

    def save(content, stream):
        calls.append(1)
        if "state_dict" in content and sum(1 for _ in calls) > 5:
            stream.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(content, stream)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    assert cli("fit", "-c", support_configs / "tiny.yaml") == 1
    message = _error(capsys)
    assert "no space left" in message
    assert "--ckpt_path last" in message
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tiny" / "run-001" / "checkpoints"
    assert (folder / "last.ckpt").resolve().name == "step-00000006.ckpt"
    assert not [p for p in folder.iterdir() if "tmp" in p.name]
    assert cli("fit", "-c", support_configs / "tiny.yaml", "--ckpt_path", "last") == 0


def test_kill_between_write_and_rename_leaves_last_whole(support_configs, cli_process, tmp_path):
    """SIGKILL in the middle of the second main file's write."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, torch\n"
        "real, calls = torch.save, []\n"
        "def save(content, stream, *a, **k):\n"
        "    if 'state_dict' in content:\n"
        "        calls.append(1)\n"
        "        if len(calls) == 2:\n"
        "            stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(content, stream, *a, **k)\n"
        "torch.save = save\n"
    )
    import os

    done = cli_process(
        "fit", "-c", support_configs / "tiny.yaml",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests" / "support")]),
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    folder = tmp_path / "runs" / "tiny" / "run-001" / "checkpoints"
    assert (folder / "last.ckpt").resolve().name == "step-00000003.ckpt"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
