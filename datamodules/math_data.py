"""Evaluation data for mathematics: one loader per task, sharded over ranks by item index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.text.specs import as_spec
from datamodules.text.tasks import TaskItem, TaskSpec, check_tasks, load_tasks
from datamodules.text.tokenizer import TextTokenizer
from modules.files import canonical_digest


class TaskDataset(Dataset[list[TaskItem]]):
    """Items of one task, addressed by lists of indices: ``dataset[[0, 2]]`` is a batch of two items.

    Args:
        name: task name.
        items: in evaluation order.
    """

    def __init__(self, name: str, items: Sequence[TaskItem]) -> None:
        self.name = name
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Sequence[int]) -> list[TaskItem]:
        return [self.items[i] for i in index]


class ItemShardSampler(DistributedSampler):
    """Batches of item indices for one rank.

    Global batch b holds items [b * batch_size, (b + 1) * batch_size); rank r takes those with
    ``index % world_size == r``.

    All ranks get ceil(items / batch_size) batches, so collectives after each batch match up; a rank may find a batch
    short or empty. Unlike torch's sampler it repeats no item to fill up: accuracies count each item once, and the set
    of items does not depend on the world size. It is a ``DistributedSampler`` so that Lightning leaves it in place
    whatever ``use_distributed_sampler`` says.

    Args:
        n_items: items of the task.
        batch_size: items per batch over all ranks.
        rank, world_size: of this process.

    Raises:
        ValueError: ``batch_size`` < 1, or ``rank`` outside 0..world_size - 1.
    """

    def __init__(self, n_items: int, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"tasks: batch_size (prompts over all ranks) must be >= 1, got {batch_size}")
        super().__init__(range(n_items), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.n_items = n_items
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.n_items // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.n_items, self.batch_size):
            stop = min(start + self.batch_size, self.n_items)
            yield list(range(start + (self.rank - start) % self.num_replicas, stop, self.num_replicas))


def _identity(batch: list[TaskItem]) -> list[TaskItem]:
    return batch


def task_dataloaders(
    tasks: Mapping[str, Sequence[TaskItem]], rank: int, world_size: int, batch_size: int
) -> list[DataLoader]:
    """One loader per task, in the order of ``tasks``; each yields this rank's ``list[TaskItem]`` per global batch.

    Args:
        tasks: name to items, as :func:`datamodules.text.tasks.load_tasks` returns.
        rank, world_size: of this process.
        batch_size: prompts per batch over all ranks.

    Raises:
        ValueError: as :class:`ItemShardSampler`.
    """
    return [
        DataLoader(
            TaskDataset(name, items),
            batch_size=None,
            sampler=ItemShardSampler(len(items), batch_size, rank, world_size),
            collate_fn=_identity,
            generator=torch.Generator(),  # without its own, every pass would draw a seed from the global generator
        )
        for name, items in tasks.items()
    ]


def describe_tasks(tasks: Mapping[str, Sequence[TaskItem]]) -> dict[str, dict[str, Any]]:
    """Per task: number of items, answer kind, sampling, and prompt length in characters (min, mean, max)."""
    table = {}
    for name, items in tasks.items():
        first, lengths = items[0], [len(item["prompt"]) for item in items]
        table[name] = {
            "items": len(items),
            "answer_kind": first["answer_kind"],
            "gold_kind": first["gold_kind"],
            "k": first["k"],
            "temperature": first["temperature"],
            "top_p": first["top_p"],
            "max_new_tokens": first["max_new_tokens"],
            "stop": list(first["stop"]),
            "prompt_chars": (min(lengths), sum(lengths) // len(lengths), max(lengths)),
            "overlong": sum("overlong" in item["meta"] for item in items),
        }
    return table


class MathTaskDataModule(pl.LightningDataModule):
    """Serves evaluation tasks to ``validate`` and ``test``, and a user's prompts to ``predict``.

    A batch is a ``list[TaskItem]`` (see :class:`datamodules.text.tasks.TaskItem`); dataloader i belongs to
    ``task_names[i]``. Some batches may be empty on some ranks.

    Args:
        tasks: what to evaluate, one loader each.
        batch_size: prompts per batch over all ranks.
        data_dir: folder that holds ``math/``; not needed for ``gsm8k_sample`` and for tasks with a ``path``.
        tokenizer: directory with ``tokenizer.json``, to count prompt tokens with; needed by tasks with
            ``max_prompt_tokens``.
        predict_file: prompts for ``predict``: .txt with one prompt a line, or .jsonl with a field ``prompt``.
        predict_k, predict_temperature, predict_top_p, predict_max_new_tokens: sampling for ``predict``; temperature 0
            is greedy.

    Raises:
        ValueError: no tasks and no ``predict_file``, a bad value, or a bad line in a data file.
        FileNotFoundError: a data file is missing.
    """

    def __init__(
        self,
        tasks: list[TaskSpec] | None = None,
        batch_size: int = 8,
        data_dir: str | None = None,
        tokenizer: str | None = None,
        predict_file: str | None = None,
        predict_k: int = 1,
        predict_temperature: float = 0.0,
        predict_top_p: float = 1.0,
        predict_max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        specs = [as_spec(TaskSpec, spec) for spec in tasks or []]
        check_tasks(specs)
        if not specs and predict_file is None:
            raise ValueError("MathTaskDataModule: tasks is empty and predict_file is not set; nothing to evaluate")
        if batch_size < 1:
            raise ValueError(f"MathTaskDataModule: batch_size must be >= 1, got {batch_size}")
        self.tasks = specs
        self.batch_size = batch_size
        self.data_dir = data_dir
        self.tokenizer = tokenizer
        self.predict_spec = None
        if predict_file is not None:
            self.predict_spec = TaskSpec(
                name="predict",
                like="prompts",
                path=predict_file,
                k=predict_k,
                temperature=predict_temperature,
                top_p=predict_top_p,
                max_new_tokens=predict_max_new_tokens,
            )
            self.predict_spec.check()
        # Specs as dicts: a checkpoint with dataclass objects in it could not be loaded with weights_only=True.
        self.save_hyperparameters(
            {"tasks": [asdict(spec) for spec in specs], "batch_size": batch_size, "predict_file": predict_file},
            logger=False,
        )
        self._items: dict[str, list[TaskItem]] | None = None

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in dataloader order."""
        return [spec.name for spec in self.tasks]

    @property
    def items(self) -> dict[str, list[TaskItem]]:
        """All items by task, on every rank; read at first use."""
        if self._items is None:
            self._items = load_tasks(self.tasks, self.data_dir, self._token_counter())
        return self._items

    def setup(self, stage: str) -> None:
        """Reads the task files, so that a missing or bad one is reported before any model is touched."""
        if stage == "predict" and self.predict_spec is not None:
            load_tasks([self.predict_spec])
        else:
            _ = self.items

    def val_dataloader(self) -> list[DataLoader]:
        return self._loaders(self.items)

    def test_dataloader(self) -> list[DataLoader]:
        return self._loaders(self.items)

    def predict_dataloader(self) -> list[DataLoader]:
        """Loader of the user's prompts; of the tasks' prompts where no ``predict_file`` is set."""
        if self.predict_spec is None:
            return self._loaders(self.items)
        return self._loaders(load_tasks([self.predict_spec]))

    def describe(self) -> dict[str, str]:
        """Keys and types of an item in a batch (a ``list[TaskItem]``), and one line a task."""
        keys = {key: str(kind) for key, kind in TaskItem.__annotations__.items()}
        tasks = {
            f"task {name}": f"{row['items']} items, {row['answer_kind']}, k={row['k']}, prompt characters min/mean/max "
            f"{'/'.join(map(str, row['prompt_chars']))}"
            for name, row in describe_tasks(self.items).items()
        }
        return {**keys, **tasks}

    def digest(self) -> dict[str, str]:
        """What every rank must agree on: the items, by task, and the batch size."""
        items = {f"task {name}": canonical_digest(rows) for name, rows in self.items.items()}
        return {"batch_size": str(self.batch_size), **items}

    def _loaders(self, items: Mapping[str, Sequence[TaskItem]]) -> list[DataLoader]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return task_dataloaders(items, rank, world_size, self.batch_size)

    def _token_counter(self) -> Callable[[str], int] | None:
        if self.tokenizer is None:
            return None
        tokenizer = TextTokenizer(self.tokenizer)
        return lambda text: len(tokenizer.encode(text))
