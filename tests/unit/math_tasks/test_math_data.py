"""MathTaskDataModule: sharding over ranks, Lightning's loops, prompts of the user, saved state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler

from datamodules.math_data import ItemShardSampler, MathTaskDataModule, describe_tasks, task_dataloaders
from datamodules.text.tasks import TaskItem, TaskSpec, load_tasks
from datamodules.text.tokenizer import TextTokenizer, train_tokenizer
from modules.contracts import DescribesBatch, HasDigest


@given(st.integers(0, 60), st.integers(1, 8), st.integers(1, 20))
def test_ranks_share_every_item_once_in_equally_many_batches(n_items: int, world_size: int, batch_size: int) -> None:
    shards = [list(ItemShardSampler(n_items, batch_size, rank, world_size)) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {-(-n_items // batch_size)}
    assert len(shards[0]) == len(ItemShardSampler(n_items, batch_size, 0, world_size))
    for rank, shard in enumerate(shards):
        assert all(i % world_size == rank for batch in shard for i in batch)
        assert all(len(batch) <= -(-batch_size // world_size) for batch in shard)
    for number, batches in enumerate(zip(*shards, strict=True)):
        merged = sorted(i for batch in batches for i in batch)
        assert merged == list(range(number * batch_size, min((number + 1) * batch_size, n_items)))


@pytest.mark.parametrize(("batch_size", "rank"), [(0, 0), (-2, 0), (1, 2), (1, -1)])
def test_sampler_refuses_bad_batch_size_and_rank(batch_size: int, rank: int) -> None:
    with pytest.raises(ValueError, match="batch_size .* must be >= 1|Invalid rank"):
        ItemShardSampler(5, batch_size, rank, 2)


def test_loading_items_draws_nothing_from_the_global_generator(data: MathTaskDataModule) -> None:
    before = torch.get_rng_state()
    for loader in data.val_dataloader():
        assert sum(len(batch) for batch in loader) > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def data(tmp_path: Path) -> MathTaskDataModule:
    rows = [{"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(5)]
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tasks = [
        TaskSpec("small", like="gsm8k", path=str(path), n_shot=0),
        TaskSpec("gsm8k_sample", limit=3, n_shot=1, k=2),
    ]
    return MathTaskDataModule(tasks, batch_size=2)


class Recorder(LightningModule):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[list[TaskItem]]] = {}

    def test_step(self, batch: list[TaskItem], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.setdefault(dataloader_idx, []).append(batch)

    validation_step = test_step

    def predict_step(self, batch: list[TaskItem], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        return [item["prompt"] for item in batch]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_lightning_hands_on_the_items_unchanged(data: MathTaskDataModule, trainer: Trainer, verb: str) -> None:
    module = Recorder()
    getattr(trainer, verb)(module, datamodule=data, verbose=False)
    expected = load_tasks(data.tasks)
    assert list(module.seen) == [0, 1]
    assert [len(batch) for batch in module.seen[0]] == [2, 2, 1]
    for index, name in enumerate(data.task_names):
        assert [item for batch in module.seen[index] for item in batch] == expected[name]
    assert isinstance(module.seen[0][0][0]["stop"], tuple)


def test_a_second_rank_is_served_its_own_items_and_empty_batches(data: MathTaskDataModule) -> None:
    tasks = load_tasks(data.tasks)
    loaders = [task_dataloaders(tasks, rank, 2, 4) for rank in range(2)]
    names = [[[item["item_id"] for item in batch] for batch in rank_loaders[0]] for rank_loaders in loaders]
    assert names == [[["small/0", "small/2"], ["small/4"]], [["small/1", "small/3"], []]]
    # Lightning exchanges any other kind of sampler for one that repeats items, unless use_distributed_sampler is off.
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders[0])


def test_rank_and_world_size_come_from_the_trainer(data: MathTaskDataModule) -> None:
    class FakeTrainer:
        global_rank, world_size = 1, 2

    data.trainer = FakeTrainer()  # type: ignore[assignment]
    assert [[item["item_id"] for item in batch] for batch in data.val_dataloader()[0]] == [["small/1"], ["small/3"], []]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_predict_reads_the_prompts_of_the_user(tmp_path: Path, trainer: Trainer, name: str) -> None:
    prompts = ["One plus one is", "Prove that", "Let"]
    lines = prompts if name.endswith(".txt") else [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    data = MathTaskDataModule(predict_file=str(tmp_path / name), batch_size=2, predict_k=3, predict_temperature=0.5)
    assert trainer.predict(Recorder(), datamodule=data) == [prompts[:2], prompts[2:]]
    (loader,) = data.predict_dataloader()
    assert {(item["k"], item["temperature"], item["answer_kind"]) for batch in loader for item in batch} == {
        (3, 0.5, "text")
    }


def test_predict_without_a_file_completes_the_tasks(data: MathTaskDataModule, trainer: Trainer) -> None:
    small, sample = trainer.predict(Recorder(), datamodule=data)  # type: ignore[misc]
    assert [len(batch) for batch in small] == [2, 2, 1]
    assert [len(batch) for batch in sample] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tasks is empty and predict_file is not set"),
        ({"tasks": [TaskSpec("gsm8k_sample")], "batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"tasks": [TaskSpec("gsm8k_sampl")]}, "no built-in task 'gsm8k_sampl'; did you mean 'gsm8k_sample'?"),
        ({"tasks": [{"name": "gsm8k", "limits": 3}]}, "TaskSpec: unknown key 'limits'"),
        ({"tasks": [TaskSpec("gsm8k_sample")] * 2}, "name ['gsm8k_sample'] is used more than once"),
        ({"predict_file": "f", "predict_k": 4}, "k = 4 samples at temperature 0"),
        ({"predict_file": "f", "predict_max_new_tokens": 0}, "max_new_tokens must be >= 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MathTaskDataModule(**arguments)


def test_setup_reports_a_missing_file_before_anything_runs(tmp_path: Path) -> None:
    data = MathTaskDataModule([TaskSpec("ocw")], data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="task 'ocw': no file .*ocw_test.jsonl"):
        data.setup("test")
    data = MathTaskDataModule(predict_file=str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match="task 'predict': no file .*none.txt"):
        data.setup("predict")


def test_hyperparameters_survive_a_weights_only_checkpoint(data: MathTaskDataModule, tmp_path: Path) -> None:
    torch.save(dict(data.hparams), tmp_path / "h.pt")
    loaded = torch.load(tmp_path / "h.pt", weights_only=True)
    again = MathTaskDataModule(tasks=loaded["tasks"], batch_size=loaded["batch_size"])
    assert again.tasks == data.tasks


def test_prompts_are_counted_with_the_models_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(["How many rolls are still there? The answer is 25."] * 3, 280, tmp_path / "tokenizer")
    tasks = [TaskSpec("gsm8k_sample", limit=4, max_prompt_tokens=1500)]
    data = MathTaskDataModule(tasks, tokenizer=str(tmp_path / "tokenizer"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer")
    for item in data.items["gsm8k_sample"]:
        assert len(tokenizer.encode(item["prompt"])) <= 1500
        assert 1 <= item["meta"]["n_shot"] < 8
    with pytest.raises(ValueError, match="max_prompt_tokens needs a tokenizer"):
        MathTaskDataModule(tasks).setup("test")


def test_description_and_digest(data: MathTaskDataModule) -> None:
    table = describe_tasks(load_tasks(data.tasks))
    assert (table["small"]["items"], table["small"]["prompt_chars"]) == (5, (17, 17, 17))  # "Q: Question 0?\nA:"
    assert table["gsm8k_sample"]["k"] == 2
    json.dumps(table)
    lines = data.describe()
    assert lines["task small"] == "5 items, number, k=1, prompt characters min/mean/max 17/17/17"
    assert set(TaskItem.__annotations__) < set(lines)
    assert isinstance(data, DescribesBatch)
    assert isinstance(data, HasDigest)
    changed = MathTaskDataModule([data.tasks[0], TaskSpec("gsm8k_sample", limit=3, n_shot=2)], batch_size=2)
    assert data.digest()["task small"] == changed.digest()["task small"]
    assert data.digest()["task gsm8k_sample"] != changed.digest()["task gsm8k_sample"]
