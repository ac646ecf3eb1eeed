"""Supervised finetuning on two ranks equals one: losses of training and validation, and weights."""

from __future__ import annotations

import pytest
import torch
from population_runs import checkpoint, rows

pytestmark = pytest.mark.ddp


def test_two_ranks_equal_one(cli, cli_process, tmp_path):
    run = ["fit", "-c", "rlhf/sft", "--data.synthetic_dialogues=64", "--data.batch_size=16",
           "--data.tokenizer.vocab_size=300", "--data.eval_batch_size=7", "--model.model.config.n_embd=16",
           "--model.model.config.n_layer=1", "--model.model.config.n_head=2", "--trainer.enable_progress_bar=false",
           "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"]  # fmt: skip
    assert cli(*run, "--experiment=one") == 0
    done = cli_process(*run, "-c", "hardware/ddp2", "--experiment=two")
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (tmp_path / "runs" / each / "run-001" for each in ("one", "two"))
    mine, theirs = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    losses = [(key, row[key], other[key]) for row, other in zip(rows(one), rows(two), strict=True)
              for key in ("train/loss", "val/loss") if key in row]  # fmt: skip
    assert {key for key, *_ in losses} == {"train/loss", "val/loss"}
    for key, first, second in losses:  # odd held-out batches: fillers on the second rank do not count
        assert first == pytest.approx(second, rel=1e-5), key
