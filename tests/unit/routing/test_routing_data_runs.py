"""RoutingDataModule under a real Trainer: exact resume, one loader per held-out set, nothing to evaluate on."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensordict import TensorDict

from datamodules.routing.tsp import TSP
from datamodules.routing_data import RoutingDataModule

EVAL_SETS: Any = {"uniform": {"sizes": [6, 8], "count": 11}, "mixture_file": {"sizes": [6], "count": 10}}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if find_spec("datamodules.routing.problems") is None:  # until the registry of problems is in the tree
        problems = SimpleNamespace(make_problem=lambda name, **options: {"tsp": TSP}[name](**options))
        monkeypatch.setitem(sys.modules, "datamodules.routing.problems", problems)


class Counts(LightningModule):
    """Sums up what it sees, so that a run's data can be compared from outside; ``updates`` of the weight per batch."""

    def __init__(self, stop_at: int | None = None, updates: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []
        self.held_out: list[tuple[int, int]] = []
        self.stop_at, self.updates, self.automatic_optimization = stop_at, updates, False

    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        self.seen.append(float(batch["locs"].sum()))
        if len(self.seen) == self.stop_at:
            self.trainer.should_stop = True
        for _ in range(self.updates):
            self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]

    def validation_step(self, batch: TensorDict, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        self.held_out += [(dataloader_idx, index) for index in batch["index"].tolist()]
        return batch["index"]

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet(folder: Any, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, num_sanity_val_steps=0, **{"enable_checkpointing": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("epoch", [None, 2])
def test_lightning_resumes_exactly(tmp_path, updates, epoch):
    steps = {"max_steps": 8 * updates}
    data = [RoutingDataModule("tsp", [6, 9], batch_size=4, steps_per_epoch=epoch or 8 * updates) for _ in range(3)]
    whole, first, rest = Counts(updates=updates), Counts(3, updates), Counts(updates=updates)
    quiet(tmp_path, **steps).fit(whole, data[0])
    runner = quiet(tmp_path, **steps)
    runner.fit(first, data[1])
    runner.save_checkpoint(tmp_path / "stopped.ckpt")
    quiet(tmp_path, **steps).fit(rest, data[2], ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert first.seen + rest.seen == whole.seen
    assert (len(first.seen), len(set(whole.seen))) == (3, 8)


def test_lightning_resumes_exactly_from_a_checkpoint_between_two_batches(tmp_path):
    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options: Any = {"max_steps": 6}
    whole, data = Counts(), RoutingDataModule("tsp", 6, batch_size=4, steps_per_epoch=3)
    quiet(tmp_path, callbacks=[Keep()], **options).fit(whole, data)
    for step in (2, 3, 4):  # inside an epoch, at its end, at the next one's start
        rest, again = Counts(), RoutingDataModule("tsp", 6, batch_size=4, steps_per_epoch=3)
        quiet(tmp_path, **options).fit(rest, again, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert rest.seen == whole.seen[step:]


def test_lightning_validates_tests_and_predicts_each_set(tmp_path):
    module, data = Counts(), RoutingDataModule("tsp", 6, batch_size=4, eval_sets=EVAL_SETS, oracle=None)
    runner = quiet(tmp_path, max_steps=2)
    runner.fit(module, data)
    wanted = [(number, index) for number, count in enumerate([11, 11, 10]) for index in range(count)]
    assert module.held_out == wanted
    runner.test(module, data, verbose=False)
    runner.predict(module, data, return_predictions=False)
    assert module.held_out == wanted * 3


def test_lightning_without_evaluation(tmp_path):
    quiet(tmp_path, max_steps=2).fit(Counts(), RoutingDataModule("tsp", 6, batch_size=4))
    data = RoutingDataModule("tsp", 6, batch_size=4, eval_sets=EVAL_SETS, oracle=None)
    quiet(tmp_path, max_steps=2, limit_val_batches=0).fit(Counts(), data)
    assert data.dropped == {}  # no stage needed the sets, so none was made
    with pytest.raises(ValueError, match="eval_sets is empty, there is nothing to evaluate on"):
        quiet(tmp_path).test(Counts(), RoutingDataModule("tsp", 6))
