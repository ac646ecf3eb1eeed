"""A small corpus of three sources and the DataModule over it, prepared once a session."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.corpus_data import CorpusDataModule


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(("let", "x", "be", "the", "sum", "of", "all", "primes", "below")) for _ in range(words))


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(("arxiv", "web", "code")):
        rng = random.Random(number)
        lines = [json.dumps({"text": f"{name} {i}: {sentence(rng, rng.randrange(5, 60))}"}) for i in range(150)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def corpus_arguments(root: Path) -> dict[str, Any]:
    return {
        "sources": [{"name": name, "path": str(root / "text" / f"{name}.jsonl")} for name in ("arxiv", "web", "code")],
        "mixture": "2:4:1",
        "tokenizer": {"vocab_size": 280, "sample_bytes": 20_000},
        "cache_dir": str(root / "cache"),
        "seq_len": 16,
        "batch_size": 8,
        "holdout_fraction": 0.1,
    }


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root / "text")
    CorpusDataModule(**corpus_arguments(root)).prepare_data()
    return root


@pytest.fixture
def corpus(corpus_root: Path) -> Callable[..., CorpusDataModule]:
    """Make a DataModule over the shared corpus, set up; keyword arguments override."""

    def make(**changes: Any) -> CorpusDataModule:
        module = CorpusDataModule(**{**corpus_arguments(corpus_root), **changes})
        module.prepare_data()
        module.setup()
        return module

    return make


@pytest.fixture
def fake_trainer() -> Callable[..., Any]:
    """What the loaders read of a Trainer, for simulating ranks and accumulation without processes."""

    def make(world_size: int = 1, rank: int = 0, accumulate: int = 1, max_steps: int = 10, step: int = 0) -> Any:
        return SimpleNamespace(
            world_size=world_size,
            global_rank=rank,
            accumulate_grad_batches=accumulate,
            max_steps=max_steps,
            global_step=step,
            limit_train_batches=1.0,
            state=SimpleNamespace(fn="fit"),
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(
                    batch_progress=SimpleNamespace(
                        current=SimpleNamespace(ready=0, started=0, processed=0, completed=0),
                        total=SimpleNamespace(ready=0, started=0, processed=0, completed=0),
                    )
                )
            ),
        )

    return make
