"""Llemma through `python -m train` on real (small) text: train, kill, resume, export, continue, evaluate."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch


def _rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]


def _last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def _assert_bitwise(one: Path, other: Path) -> None:
    first, second = _last(one), _last(other)
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    assert _rows(one) == _rows(other)


def test_kill_and_resume_is_bitwise(cli, cli_process, support_configs, tmp_path):
    """SIGKILL by a timer at a random point of a real run; loss of every step and final weights are equal."""
    config = support_configs / "llemma_tiny.yaml"
    assert cli("fit", "-c", config, "--experiment", "whole") == 0
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal, random, lightning.pytorch.loops.training_epoch_loop as loop\n"
        "real, left = loop._TrainingEpochLoop.advance, random.Random().randint(5, 11)\n"
        "def advance(self, *a):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *a)\n"
        "loop._TrainingEpochLoop.advance = advance\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = cli_process("fit", "-c", config, "--experiment", "killed", PYTHONPATH=f"{tmp_path}:{root}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    killer.unlink()
    assert cli("fit", "-c", config, "--experiment", "killed", "--ckpt_path", "last") == 0
    _assert_bitwise(tmp_path / "runs" / "whole" / "run-001", tmp_path / "runs" / "killed" / "run-001")


def test_accumulation_equals_the_whole_batch(cli, support_configs, tmp_path):
    """(1 rank, A=4) trains on the same samples as (1 rank, A=1), to float reordering."""
    config = support_configs / "llemma_tiny.yaml"
    assert cli("fit", "-c", config, "--experiment", "one") == 0
    assert cli("fit", "-c", config, "--experiment", "four", "--trainer.accumulate_grad_batches=4",
               "--trainer.val_check_interval=16") == 0  # fmt: skip
    one, four = (
        {row["step"]: row["train/loss"] for row in _rows(tmp_path / "runs" / name / "run-001") if "train/loss" in row}
        for name in ("one", "four")
    )
    assert one.keys() == four.keys()
    for step, loss in one.items():
        assert math.isclose(loss, four[step], abs_tol=1e-5), step


def test_export_continue_with_lora_and_evaluate(cli, support_configs, tmp_path):
    """fit -> Hugging Face directory -> continue with adapters and another RoPE base -> evaluate the export."""
    transformers = pytest.importorskip("transformers")
    config = support_configs / "llemma_tiny.yaml"
    export = "--trainer.callbacks+={class_path: callbacks.export.ExportModel, init_args: {folder: base}}"
    assert cli("fit", "-c", config, "--experiment", "base", export) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert sum(p.numel() for p in model.parameters()) > 10_000
    layer = tmp_path / "continue.yaml"
    layer.write_text(
        "model: {init_args: {model: {path: base, config: null}, rope_theta: 20000.0, tuning: lora, lora: {r: 4}}}\n"
        "data: {init_args: {tokenizer: base}}\n"
        "trainer: {num_sanity_val_steps: -1, callbacks: [{class_path: callbacks.export.ExportModel, "
        "init_args: {folder: tuned}}, "
        "{class_path: callbacks.figures.MetricFigures, init_args: {families: [val/ppl]}}]}\n"
    )
    assert cli("fit", "-c", config, "-c", layer, "--experiment", "tuned") == 0
    folder = tmp_path / "runs" / "tuned" / "run-001"
    rows = _rows(folder)
    assert any(row.get("rope/theta_to") == 20000.0 and row["rope/theta_from"] == 10000.0 for row in rows)
    assert any("start/val/ppl_email" in row for row in rows)
    assert (folder / "figures" / "val_ppl.png").stat().st_size > 1000
    assert "val/ppl_email" in (folder / "summary_fit.txt").read_text()
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "model: {class_path: modules.llemma.Llemma, init_args: {model: {path: tuned}}}\n"
        "data: {class_path: datamodules.MathTaskDataModule, init_args: {batch_size: 4, "
        "tasks: [{name: gsm8k_sample, limit: 3, n_shot: 0, max_new_tokens: 8, k: 2}]}}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false}\n"
    )
    assert cli("test", "-c", tasks, "--experiment", "tuned") == 0
    summary = (tmp_path / "runs" / "tuned" / "test-001" / "summary_test.txt").read_text()
    assert "eval/gsm8k_sample_maj2" in summary
    assert "eval/gsm8k_sample_items" in summary
    items = (tmp_path / "runs" / "tuned" / "test-001" / "items" / "gsm8k_sample.rank-0.jsonl").read_text().splitlines()
    assert len(items) == 3
    assert len(json.loads(items[0])["completions"]) == 2


def test_qlora_trains_adapters_only(cli, support_configs, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = support_configs / "llemma_tiny.yaml"
    tuned = ("--model.tuning=qlora", "--model.lora={r: 4}", "--model.optimizer=adamw8bit", "--trainer.max_steps=4",
             "--model.model.config={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
             "num_attention_heads: 2, max_position_embeddings: 64}")  # fmt: skip
    assert cli("fit", "-c", config, *tuned) == 0
    losses = [row["train/loss"] for row in _rows(tmp_path / "runs" / "llemma_tiny" / "run-001") if "train/loss" in row]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_compiled_training_equals_eager(cli, support_configs, tmp_path, monkeypatch):
    """`compile: true` trains; its losses equal the plain run's to float reordering."""
    import warnings

    config = support_configs / "llemma_tiny.yaml"
    short = ("--trainer.max_steps=3", "--trainer.limit_val_batches=0")
    assert cli("fit", "-c", config, *short, "--experiment", "eager") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations
        assert cli("fit", "-c", config, *short, "--experiment", "compiled", "--model.compile=true") == 0
    eager, compiled = (
        [row["train/loss"] for row in _rows(tmp_path / "runs" / name / "run-001") if "train/loss" in row]
        for name in ("eager", "compiled")
    )
    assert len(eager) == 3
    assert eager == pytest.approx(compiled, abs=1e-4)


def _error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.sources=[{name: gone, path: nowhere.txt}]"], ["nowhere.txt"]),
        (["--data.batch_size=7", "--trainer.accumulate_grad_batches=2"], ["batch_size 7", "multiple"]),
        (["--data.seq_len=256"], ["256", "max_position_embeddings"]),
        (["--model.lr=-1"], ["lr must be > 0"]),
        (["--model.model={path: nowhere, config: null}"], ["nowhere"]),
        (["--data.tokenizer=nowhere"], ["nowhere"]),
        (["--trainer.max_steps=-1"], ["max_steps"]),
        (["--model.optimizer=adamww"], ["adamww", "adamw8bit"]),
        (["--checkpoint.monitor=val/losss"], ["val/losss", "val/loss"]),
    ],
)
def test_bad_input_is_one_line(cli, capsys, support_configs, arguments, words):
    assert cli("fit", "-c", support_configs / "llemma_tiny.yaml", *arguments) in (1, 2)
    message = _error(capsys)
    for word in words:
        assert word in message


def test_another_tokenizer_is_refused(cli, capsys, support_configs, tmp_path):
    config = support_configs / "llemma_tiny.yaml"
    export = "--trainer.callbacks+={class_path: callbacks.export.ExportModel, init_args: {folder: base}}"
    assert cli("fit", "-c", config, export, "--trainer.max_steps=1") == 0
    other = ["--model.model={path: base, config: null}", "--data.tokenizer={vocab_size: 300, sample_bytes: 100000}"]
    assert cli("fit", "-c", config, *other) == 1
    assert "data prepared with" in _error(capsys)


@pytest.mark.parametrize("damage", ["truncate", "empty", "swap"])
def test_damaged_shard_is_refused_before_training(cli, capsys, support_configs, tmp_path, damage):
    config = support_configs / "llemma_tiny.yaml"
    assert cli("prepare", "-c", config) == 0
    tokens = next((tmp_path / "cache").glob("corpus/json-*/train/tokens.bin"))
    content = tokens.read_bytes()
    tokens.write_bytes({"truncate": content[:-10], "empty": b"", "swap": content + b"\\0\\0"}[damage])
    capsys.readouterr()
    assert cli("fit", "-c", config) == 1
    assert "json" in _error(capsys)
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_nonfinite_gradients_skip_then_stop_with_the_last_checkpoint_kept(cli, capsys, support_configs, tmp_path,
                                                                          monkeypatch):  # fmt: skip
    from modules.llemma import Llemma

    real = Llemma.training_step

    def poisoned(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 3 or batch_idx >= 7 else loss

    monkeypatch.setattr(Llemma, "training_step", poisoned)
    assert cli("fit", "-c", support_configs / "llemma_tiny.yaml", "--trainer.max_steps=40") == 1
    assert "not finite in 4 steps in a row" in _error(capsys)
    checkpoint = _last(tmp_path / "runs" / "llemma_tiny" / "run-001")
    assert all(torch.isfinite(weight.float()).all() for weight in checkpoint["state_dict"].values())
