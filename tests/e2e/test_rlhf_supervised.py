"""What RLHF starts from, through `python -m train`: finetune, classify, rank, resume, accumulate, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modules.language.checkpoint import hash_tokenizer
from modules.rlhf.classifier_files import load_classifier
from modules.rlhf.reward_model import load_reward_model

# 64 synthetic dialogues, few steps
SMALL = ["--data.synthetic_dialogues=64", "--data.batch_size=16", "--data.tokenizer.vocab_size=300",
         "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]  # fmt: skip
TINY = ["--model.model.config.n_embd=16", "--model.model.config.n_layer=1", "--model.model.config.n_head=2"]


def run_flags(steps: int) -> list[str]:
    return [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--checkpoint.every_n_steps=4"]


def rows(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_sft_then_reward_model_and_classifier(cli, tmp_path):
    """Three runs in a row: each lowers its held-out loss, and what they write loads with the shared tokenizer."""
    assert cli("fit", "-c", "rlhf/sft", *SMALL, *TINY, *run_flags(24), "--trainer.val_check_interval=8",
               "--model.optimizer.lr=0.01") == 0  # fmt: skip
    losses = list(rows(tmp_path / "runs" / "rlhf-sft" / "run-001", "val/loss").values())
    assert losses[-1] < losses[0]
    model = tmp_path / "runs" / "rlhf-sft" / "model"
    assert cli("fit", "-c", "rlhf/reward_model", *SMALL, *run_flags(8)) == 0
    reward = load_reward_model(tmp_path / "runs" / "rlhf-reward-model" / "model", hash_tokenizer(model))
    assert reward.score([[3, 4, 1]], [[5, 6]]).isfinite().all()
    assert cli("fit", "-c", "rlhf/intent", *SMALL, *run_flags(80), "--trainer.val_check_interval=40") == 0
    accuracy = list(rows(tmp_path / "runs" / "rlhf-intent" / "run-001", "val/accuracy").values())
    assert accuracy[-1] > 0.7  # synthetic replies show their act in their words
    _, labels = load_classifier(tmp_path / "runs" / "rlhf-intent" / "model", hash_tokenizer(model))
    assert labels == ["inform", "question", "directive", "commissive"]
    assert cli("test", "-c", "rlhf/intent", *SMALL, "--ckpt_path", "last") == 0


def test_exported_model_has_the_same_loss_in_transformers(cli, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli("fit", "-c", "rlhf/sft", *SMALL, *TINY, *run_flags(4)) == 0
    folder = tmp_path / "runs" / "rlhf-sft" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)("is the soup fresh ? <EOU>", return_tensors="pt")
    from modules.language.checkpoint import load_causal_lm

    ours = load_causal_lm(folder)
    hidden = ours(ids["input_ids"])
    torch.testing.assert_close(ours.logits(hidden), theirs(ids["input_ids"]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_resume_is_bitwise(cli, tmp_path, name):
    """Eight steps in one go, and again from the checkpoint after four: losses and weights are equal."""
    flags = [*SMALL, *TINY]
    if name == "reward_model":
        assert cli("fit", "-c", "rlhf/sft", *flags, *run_flags(2)) == 0
        flags = SMALL
    flags = ["-c", f"rlhf/{name}", *flags, *run_flags(8)]
    assert cli("fit", *flags, "--experiment", "whole") == 0
    one, two = tmp_path / "runs" / "whole" / "run-001", tmp_path / "runs" / "again" / "run-001"
    assert cli("fit", *flags, "--experiment", "again", "--ckpt_path", one / "checkpoints" / "step-00000004.ckpt") == 0
    losses = rows(two, "train/loss")
    assert len(losses) == 4
    assert losses.items() <= rows(one, "train/loss").items()
    first, second = last(one)["state_dict"], last(two)["state_dict"]
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())


def test_accumulation_equals_the_whole_batch(cli, tmp_path):
    """A step's reply tokens count equally, whichever micro-batch they fall into."""
    flags = [*SMALL, *TINY, *run_flags(4)]
    assert cli("fit", "-c", "rlhf/sft", *flags, "--experiment", "one") == 0
    assert cli("fit", "-c", "rlhf/sft", *flags, "--experiment", "four", "--trainer.accumulate_grad_batches=4",
               "--trainer.val_check_interval=16") == 0  # fmt: skip
    one, four = (last(tmp_path / "runs" / name / "run-001")["state_dict"] for name in ("one", "four"))
    for key, weight in one.items():
        torch.testing.assert_close(four[key], weight, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ("sft", ["--vars.dialogues=nowhere"], "path: null needs no files"),
        ("sft", ["--model.model.config.n_positions=8"], "tokens exceed the model's context of 8"),
        ("sft", ["--data.task=intent"], "SFT: data.task must be 'sft', got 'intent'"),
        ("reward_model", [], "runs/rlhf-sft/model"),
        ("intent", ["--data.train_splits=dev"], "no split 'dev'"),
    ],
)
def test_bad_input_is_one_line(cli, capsys, config, flags, words):
    assert cli("fit", "-c", f"rlhf/{config}", *SMALL, *run_flags(2), *flags) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
