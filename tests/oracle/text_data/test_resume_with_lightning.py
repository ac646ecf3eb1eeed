"""Exact resume through Lightning's own fit loop: the same batches, the same parameters, bit for bit."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from datamodules.corpus_data import CorpusDataModule


class Bigram(LightningModule):
    """The smallest language model; it remembers the samples of each optimiser step."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.seen: dict[int, list[tuple[int, ...]]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.trainer.global_step
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seen[step] = []  # a step begun again replaces what was left of it
        self.seen[step].extend(tuple(row) for row in batch["input_ids"].tolist())
        return nn.functional.cross_entropy(self.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class SaveEvery(Callback):
    """Save where Lightning's own checkpoint callback saves by steps: at the end of the batch that made the step."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.last = folder, every, 0

    def on_train_batch_end(self, trainer: Trainer, *unused: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step != self.last:
            self.last = step
            trainer.save_checkpoint(self.folder / f"step={step}.ckpt")


class StopInside(Callback):
    """Raise inside a micro-batch, after saving what a save-on-exception would."""

    def __init__(self, step: int, micro: int, path: Path) -> None:
        self.step, self.micro, self.path = step, micro, path

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step * trainer.accumulate_grad_batches + self.micro:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    rng = random.Random(0)
    for name in ("web", "code"):
        lines = [
            json.dumps({"text": " ".join(f"{name}{rng.randrange(300)}" for _ in range(rng.randrange(5, 50)))})
            for _ in range(120)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def corpus(root: Path, **changes: Any) -> CorpusDataModule:
    settings = {
        "sources": [{"name": n, "path": str(root / f"{n}.jsonl"), "weight": w} for n, w in (("web", 2), ("code", 1))],
        "tokenizer": {"vocab_size": 262, "sample_bytes": 50_000},
        "cache_dir": str(root / "cache"),
        "seq_len": 12,
        "batch_size": 8,
        "holdout_fraction": 0.05,
    }
    return CorpusDataModule(**{**settings, **changes})


def run(
    root: Path, max_steps: int, accumulate: int = 2, ckpt: Path | None = None, data: CorpusDataModule | None = None,
    callbacks: list[Callback] | None = None, **trainer_options: Any,
) -> Bigram:  # fmt: skip
    module = Bigram(262)
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
    }  # fmt: skip
    trainer = Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks or [],
        enable_checkpointing=False,
        **{**options, **trainer_options},
    )
    with contextlib.suppress(SystemExit):  # Lightning turns Ctrl-C into an exit
        trainer.fit(module, datamodule=data or corpus(root), ckpt_path=ckpt, weights_only=True)
    return module


def assert_same(left: Bigram, right: Bigram) -> None:
    for (name, one), (_, other) in zip(left.state_dict().items(), right.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_resumed_run_equals_the_uninterrupted_one(root: Path, tmp_path: Path, cut: int, workers: int) -> None:
    whole = run(root, 10, callbacks=[SaveEvery(tmp_path, 1)], data=corpus(root, num_workers=workers))
    rest = run(root, 10, ckpt=tmp_path / f"step={cut}.ckpt", data=corpus(root, num_workers=workers))
    assert sorted(whole.seen) == list(range(10))
    assert rest.seen == {step: rows for step, rows in whole.seen.items() if step >= cut}
    assert_same(rest, whole)


def test_longer_run_goes_on_from_a_finished_one(root: Path, tmp_path: Path) -> None:
    whole = run(root, 10)
    run(root, 6, callbacks=[SaveEvery(tmp_path, 6)])
    rest = run(root, 10, ckpt=tmp_path / "step=6.ckpt")
    assert rest.seen == {step: whole.seen[step] for step in range(6, 10)}
    assert_same(rest, whole)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4)])
def test_batch_may_be_split_otherwise_after_the_resume(root: Path, tmp_path: Path, before: int, after: int) -> None:
    whole = run(root, 8, accumulate=2)
    run(root, 8, accumulate=before, callbacks=[SaveEvery(tmp_path, 3)])
    rest = run(root, 8, accumulate=after, ckpt=tmp_path / "step=3.ckpt")
    assert rest.seen == {step: whole.seen[step] for step in range(3, 8)}
    assert rest.trainer.current_epoch == whole.trainer.current_epoch
    for one, other in zip(rest.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_checkpoint_inside_a_step_repeats_that_step_whole(root: Path, tmp_path: Path, micro: int) -> None:
    whole = run(root, 6, accumulate=4)
    path = tmp_path / "inside.ckpt"
    part = run(root, 6, accumulate=4, callbacks=[StopInside(3, micro, path)])
    assert max(part.seen) == (3 if micro else 2)
    rest = run(root, 6, accumulate=4, ckpt=path)
    assert rest.seen == {step: whole.seen[step] for step in range(3, 6)}
    assert_same(rest, whole)


def test_epochs_by_limit_train_batches_go_on_through_the_stream(root: Path, tmp_path: Path) -> None:
    whole = run(root, 9)
    short = run(root, 9, limit_train_batches=6, callbacks=[SaveEvery(tmp_path, 1)])
    assert short.seen == whole.seen
    for cut in (2, 3, 5):
        rest = run(root, 9, limit_train_batches=6, ckpt=tmp_path / f"step={cut}.ckpt")
        assert rest.seen == {step: whole.seen[step] for step in range(cut, 9)}, cut
        assert_same(rest, whole)


def test_validation_between_steps_changes_nothing(root: Path) -> None:
    plain = run(root, 6)
    validated = run(
        root, 6, limit_val_batches=1.0, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=1
    )
    assert validated.seen == plain.seen
    assert {2, 4, 6} <= set(validated.validated)
    assert_same(plain, validated)


def test_checkpoint_holds_plain_values_only(root: Path, tmp_path: Path) -> None:
    run(root, 4, callbacks=[SaveEvery(tmp_path, 2)])
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert content["CorpusDataModule"]["consumed_samples"] == 16
    assert content["datamodule_hyper_parameters"]["seq_len"] == 12
    json.dumps(content["CorpusDataModule"])


def test_other_data_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    run(root, 4, callbacks=[SaveEvery(tmp_path, 2)])
    with pytest.raises(ValueError, match="checkpoint was trained on other data: seed was 0, is 1"):
        run(root, 4, ckpt=tmp_path / "step=2.ckpt", data=corpus(root, seed=1))
