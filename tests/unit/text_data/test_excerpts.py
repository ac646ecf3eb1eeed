"""Pieces of documents, token frequencies and licences, for measuring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.corpus_data import CorpusDataModule
from datamodules.sft_data import SFTDataModule
from datamodules.text import excerpts
from datamodules.text.excerpts import frequencies, licence_of, pieces
from datamodules.text.shards import TokenShard, write_shard
from datamodules.text.specs import SourceSpec
from modules.contracts.corpora import ProvidesExcerpts, ReportsContamination

LENGTHS = (3, 16, 40, 41, 100)


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    with write_shard(tmp_path / "shard", vocab_size=900, eod_id=0, tokenizer_hash="h") as writer:
        writer.append([list(range(100 * n + 1, 100 * n + 1 + length)) for n, length in enumerate(LENGTHS)], 1)
    return TokenShard(tmp_path / "shard")


def test_pieces_stay_in_their_document_and_leave_short_ends_out(shard: TokenShard) -> None:
    found = pieces("web", shard, 20)
    assert [piece.tolist() for piece in (found[n] for n in range(len(found)))] == [
        list(range(101, 117)), list(range(201, 221)), list(range(221, 241)), list(range(301, 321)),
        list(range(321, 341)), *[list(range(401 + 20 * n, 421 + 20 * n)) for n in range(5)],
    ]  # fmt: skip
    assert found[0].dtype == np.int64
    assert len({found.key(number) for number in range(len(found))}) == len(found)
    assert found.key(1) == f"web:{int(shard.offset_array[2])}"
    assert len(pieces("web", shard, 20, np.array([2]))) == 2
    with pytest.raises(ValueError, match="at least 2"):
        pieces("web", shard, 1)


def test_a_large_corpus_is_thinned_out_evenly(shard: TokenShard, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pieces("web", shard, 20)
    monkeypatch.setattr(excerpts, "LARGEST", 4)
    few = pieces("web", shard, 20)
    assert few.starts.tolist() == whole.starts[[0, 3, 6, 9]].tolist()


def test_frequencies_count_tokens(shard: TokenShard) -> None:
    found = frequencies(shard, 900)
    assert found.sum() == pytest.approx(1.0)
    total = sum(LENGTHS) + len(LENGTHS)
    assert found[0] == pytest.approx(len(LENGTHS) / total)
    assert found[1] == pytest.approx(1 / total)
    assert found[899] == 0


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ({"package": "stdlib"}, "PSF-2.0"), ({"package": "json"}, "PSF-2.0"), ({"path": "x"}, "unknown"),
        ({"path": "x", "licence": "CC0-1.0"}, "CC0-1.0"), ({"package": "no_such_package_here"}, "unknown"),
        ({"package": "numpy", "licence": "MIT"}, "MIT"),
    ],
)  # fmt: skip
def test_licence(source: dict[str, Any], licence: str) -> None:
    assert licence_of(SourceSpec("one", **source)) == licence


def test_an_installed_package_names_its_licence() -> None:
    assert "BSD" in licence_of(SourceSpec("one", package="sympy"))


def test_a_licence_changes_no_cache(corpus: Callable[..., CorpusDataModule]) -> None:
    plain = corpus()
    sources = [{"name": s.name, "path": s.path, "licence": "MIT"} for s in plain.plan.sources]
    assert corpus(sources=sources).plan.file == plain.plan.file
    assert set(corpus(sources=sources).licences().values()) == {"MIT"}


def test_corpus_provides_train_and_test_apart(corpus: Callable[..., CorpusDataModule]) -> None:
    data = corpus()
    assert isinstance(data, ProvidesExcerpts)
    assert isinstance(data, ReportsContamination)
    assert data.corpora("train") == data.corpora("test") == ("arxiv", "web", "code")
    train, test = (
        {tuple(found[n]) for n in range(len(found))}
        for found in (data.excerpts(split, "web", 16) for split in ("train", "test"))
    )
    assert len(train) > 5 * len(test) > 0
    assert not train & test
    counts = data.token_counts()
    assert counts.shape == (data.tokenizer.vocab_size,)
    assert counts.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="corpus 'x' has no test text"):
        data.excerpts("test", "x", 16)


def test_finetuning_data_provide_examples(corpus: Callable[..., CorpusDataModule], tmp_path: Path) -> None:
    rows = [{"prompt": f"sum of {n} primes?", "response": f" all primes below {n} x"} for n in range(60)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{**row, "prompt": "let " + row["prompt"]} for row in rows]
    sources = [
        {"name": "one", "path": str(tmp_path / "one.jsonl"), "licence": "MIT"},
        {"name": "two", "path": str(tmp_path / "two.jsonl")},
    ]
    data = SFTDataModule(
        sources=sources, tokenizer=str(corpus().tokenizer.directory), cache_dir=str(tmp_path / "sft"), seq_len=64,  # type: ignore[arg-type]
        batch_size=4, holdout_fraction=0.3,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    assert isinstance(data, ProvidesExcerpts)
    assert data.corpora("train") == data.corpora("test") == ("one", "two")
    for number, name in enumerate(("one", "two")):
        train, test = (data.excerpts(split, name, 64) for split in ("train", "test"))
        assert len(train) + len(test) == 60
        assert {train.key(n) for n in range(len(train))}.isdisjoint(test.key(n) for n in range(len(test)))
        assert all(data.tokenizer.decode(test[n]).startswith("let " * number + "sum") for n in range(len(test)))
    assert sum(data.stream_shares().values()) == pytest.approx(1.0)
    assert data.licences() == {"one": "MIT", "two": "unknown"}
    assert data.token_counts().sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no train example"):
        data.excerpts("train", "three", 64)
