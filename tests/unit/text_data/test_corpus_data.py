"""The DataModule: batch contract, index function, position, held-out windows, errors before training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.corpus_data import CorpusDataModule
from datamodules.text.loader import StreamPosition
from datamodules.text.tokenizer import TokenizerMismatchError

Make = Callable[..., CorpusDataModule]


def rows(batches: list) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def test_batch_contract(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(document_mask=True)
    data.trainer = fake_trainer(world_size=2, rank=1, accumulate=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.batch_size == torch.Size([2])
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "input_ids": "torch.int64",
        "labels": "torch.int64",
        "source_id": "torch.int64",
        "document_ids": "torch.int32",
    }
    assert {tuple(batch[key].shape) for key in ("input_ids", "labels", "document_ids")} == {(2, 16)}
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    described = data.describe()
    assert described == {
        "input_ids": "int64 [2, 16]",
        "labels": "int64 [2, 16]",
        "source_id": "int64 [2]",
        "document_ids": "int32 [2, 16]",
    }


def test_samples_of_a_step_do_not_depend_on_the_split(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    def steps(world_size: int, accumulate: int) -> list[list[tuple[int, ...]]]:
        collected: list[list[tuple[int, ...]]] = [[] for _ in range(10)]
        for rank in range(world_size):
            data = corpus()
            data.trainer = fake_trainer(world_size, rank, accumulate)
            loader = data.train_dataloader()
            assert len(loader) == 10 * accumulate
            for number, batch in enumerate(loader):
                collected[number // accumulate].extend(rows([batch]))
        return [sorted(step) for step in collected]

    reference = steps(1, 1)
    assert all(len(step) == 8 for step in reference)
    for split in ((1, 4), (2, 2), (4, 1), (8, 1)):
        assert steps(*split) == reference, split


def test_micro_batches_of_ranks_are_the_sheet_formula(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer()
    flat = rows(list(data.train_dataloader()))
    size, accumulate, world = 2, 2, 2
    for rank in range(world):
        other = corpus()
        other.trainer = fake_trainer(world, rank, accumulate)
        for number, batch in enumerate(other.train_dataloader()):
            step, micro = divmod(number, accumulate)
            first = (step * accumulate + micro) * world * size + rank * size
            assert rows([batch]) == flat[first : first + size]


def test_batch_must_divide(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer(world_size=3)
    with pytest.raises(ValueError, match=r"batch_size 8 .* world_size 3 x accumulate_grad_batches 1 = 3"):
        data.train_dataloader()


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_length_must_be_given(corpus: Make, fake_trainer: Callable[..., Any], max_steps: int) -> None:
    data = corpus()
    data.trainer = fake_trainer(max_steps=max_steps)
    with pytest.raises(ValueError, match=rf"trainer.max_steps >= 1, got max_steps={max_steps}"):
        data.train_dataloader()


def test_limit_must_not_cut_a_step(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer(accumulate=4)
    data.trainer.limit_train_batches = 6
    with pytest.raises(ValueError, match="epochs of 6 batches, not a multiple of accumulate_grad_batches 4"):
        data.train_dataloader()


def test_position_counts_finished_steps_not_prefetched_batches(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer(max_steps=12)
    stream = iter(data.train_dataloader())
    seen = [next(stream) for _ in range(9)]  # the loader is ahead of the trainer
    data.trainer.global_step = 5
    state = json.loads(json.dumps(data.state_dict()))
    assert state["step"] == 5
    assert state["consumed_samples"] == 40
    assert sum(state["blend_counts"].values()) == 40
    resumed = corpus()
    resumed.trainer = fake_trainer(max_steps=12, step=5)
    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    assert len(loader) == 12
    rest = list(loader)
    assert len(rest) == 7
    assert rows(rest)[: 4 * 8] == rows(seen[5:])
    assert rows(rest) == rows(seen[5:]) + rows(list(stream))
    assert resumed.state_dict() == state


def test_saving_again_and_again_moves_on(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data, fresh = corpus(), corpus()
    data.trainer = fake_trainer(max_steps=40)
    stream = iter(data.train_dataloader())
    for step in range(1, 41):
        next(stream)
        data.trainer.global_step = step
        counts = data.state_dict()["blend_counts"]
        fresh.trainer = fake_trainer(max_steps=40, step=step)
        assert fresh.state_dict()["blend_counts"] == counts  # replayed without a loader


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"seq_len": 8}, "seq_len was 16, is 8"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"mixture": "4:2:1"}, r"weights\['arxiv'\] was 0.28"),
        ({"holdout_fraction": 0.05}, r"sources\['arxiv'\] was "),
        ({"dedup": {"exact": False}}, r"sources\['arxiv'\] was "),
    ],
)
def test_changed_data_is_refused_by_name(corpus: Make, changes: dict[str, Any], message: str) -> None:
    state = corpus().state_dict()
    with pytest.raises(ValueError, match=f"checkpoint was trained on other data: {message}.*allow_data_change"):
        corpus(**changes).load_state_dict(state)


def test_tolerated_change_repeats_no_sample_of_a_source(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer(max_steps=4)
    before = list(data.train_dataloader())
    data.trainer.global_step = 4
    state = data.state_dict()
    changed = corpus(mixture="1:1:1", allow_data_change=True)
    changed.trainer = fake_trainer(max_steps=8, step=4)
    with pytest.warns(UserWarning, match="resuming on changed data: weights"):
        changed.load_state_dict(state)
    after = list(changed.train_dataloader())
    assert len(after) == 4
    assert not set(rows(before)) & set(rows(after))
    # The new weights hold from the first new sample on: no source is made up for.
    assert np.bincount(torch.cat([b["source_id"] for b in after]).numpy()).tolist() == [11, 11, 10]
    changed.trainer.global_step = 6
    again = corpus(mixture="1:1:1")
    again.trainer = fake_trainer(max_steps=8, step=6)
    again.load_state_dict(changed.state_dict())
    assert rows(list(again.train_dataloader())) == rows(after[2:])
    assert changed.state_dict()["consumed_samples"] == 48


def test_evaluation_ignores_the_position(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(seed=5)
    data.trainer = fake_trainer()
    data.trainer.state.fn = "validate"
    data.load_state_dict(corpus().state_dict())


def test_position_cannot_go_back() -> None:
    position = StreamPosition([1.0, 2.0], 4)
    position.restore(3, 12, [4, 8], [0, 0])
    with pytest.raises(ValueError, match="step 2 lies before the restored step 3"):
        position.at(2)


def test_loading_draws_nothing_from_the_global_generator(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus()
    data.trainer = fake_trainer()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the state under test
    for loader in (data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_worker_processes_give_the_same_batches(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    want, got = corpus(), corpus(num_workers=1)
    want.trainer = got.trainer = fake_trainer(max_steps=4)
    assert rows(list(got.train_dataloader())) == rows(list(want.train_dataloader()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_windows_are_the_same_for_every_world_size(
    corpus: Make, fake_trainer: Callable[..., Any], world_size: int
) -> None:
    def targets(size: int) -> list[list[int]]:
        by_source: list[list[int]] = []
        for rank in range(size):
            data = corpus(eval_batch_size=5)
            data.trainer = fake_trainer(size, rank)
            loaders = data.val_dataloader()
            by_source = by_source or [[] for _ in loaders]
            for number, loader in enumerate(loaders):
                batches = list(loader)
                assert len(batches) == len(loader)
                for batch in batches:
                    assert (batch["source_id"] == number).all()
                    by_source[number].extend(batch["labels"][batch["labels"] != -100].tolist())
        return [sorted(values) for values in by_source]

    data = corpus()
    shards = data._held_out["validation"]
    assert targets(world_size) == [sorted(shard.token_array[1:].tolist()) for shard in shards.values()]


def test_names_and_bytes(corpus: Make, corpus_root: Path) -> None:
    extra = {"name": "extra", "path": str(corpus_root / "text" / "web.jsonl"), "split": "test"}
    data = corpus(eval_sources=[extra])
    assert data.source_names == ["arxiv", "web", "code", "extra"]
    assert data.val_names == ["arxiv", "web", "code"]
    assert data.test_names == ["arxiv", "web", "code", "extra"]
    assert len(data.val_dataloader()) == 3
    assert len(data.test_dataloader()) == 4
    assert next(iter(data.test_dataloader()[3]))["source_id"][0] == 3
    shard = data._held_out["test"]["extra"]
    texts = [json.loads(line)["text"] for line in (corpus_root / "text" / "web.jsonl").read_text().splitlines()]
    assert shard.meta["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert data.test_bytes_per_token["extra"] == pytest.approx(shard.meta["text_bytes"] / shard.meta["tokens"])
    assert data.tokenizer.decode(shard.token_array.tolist()) == "".join(texts)
    assert 1 < data.val_bytes_per_token["web"] < 10


def test_held_out_documents_do_not_depend_on_the_seed_and_are_not_trained_on(corpus: Make) -> None:
    one, two = corpus(seed=0), corpus(seed=9)
    assert one.digest()["held-out validation"] == two.digest()["held-out validation"]
    splits = {split: [str(shard.path) for shard in one._held_out[split].values()] for split in ("validation", "test")}
    text = {
        path: one.tokenizer.decode(np.fromfile(Path(path) / "tokens.bin", dtype="<u2"))
        for path in splits["validation"] + splits["test"]
    }
    train = one.tokenizer.decode(one._packed["web"].shard.token_array)
    web = next(value for path, value in text.items() if Path(path).parent.name.startswith("web"))
    first_document = web.split("web ")[1]
    assert first_document not in train


def test_digest_names_what_ranks_must_share(corpus: Make) -> None:
    base, other = corpus().digest(), corpus(mixture="4:2:1").digest()
    assert all(isinstance(value, str) for value in base.values())
    assert {key for key in base if base[key] != other[key]} == {"weights"}


def test_epoch_warning_shows_the_table(corpus: Make, fake_trainer: Callable[..., Any]) -> None:
    data = corpus(max_epochs_per_source=2.0)
    windows = data._packed["web"].windows_per_epoch
    data.trainer = fake_trainer(max_steps=math.ceil(3 * windows / 8 / data.weights["web"]))
    with pytest.warns(UserWarning, match=r"more than max_epochs_per_source=2 epochs of .*web(.|\n)*train tokens"):
        data.setup("fit")


def test_preparing_twice_builds_nothing(corpus_root: Path, corpus: Make, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in (corpus_root / "cache" / "corpus").rglob("*.bin")}
    corpus()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out = capsys.readouterr().out
    assert "train tokens" in out
    assert "corpus: source" not in out


def arguments(corpus_root: Path, **changes: Any) -> dict[str, Any]:
    from copy import deepcopy

    base = {
        "sources": [{"name": "web", "path": str(corpus_root / "text" / "web.jsonl")}],
        "tokenizer": {"vocab_size": 280, "sample_bytes": 20_000},
        "cache_dir": str(corpus_root / "cache"),
        "seq_len": 16,
        "batch_size": 8,
        "holdout_fraction": 0.1,
    }
    return {**deepcopy(base), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, ValueError, "sources is empty"),
        ({"sources": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, ValueError, "'a' is used twice"),
        ({"sources": [{"name": "a", "path": "x", "weight": float("nan")}]}, ValueError, "weight must be"),
        ({"seq_len": 0}, ValueError, "seq_len must be >= 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"holdout_fraction": 0.6}, ValueError, r"holdout_fraction must be in \[0, 0.25\], got 0.6"),
        ({"mixture": "1:2"}, ValueError, "2 ratios for 1 sources"),
        ({"replay": {"zzz": 0.1}}, ValueError, "replay: unknown source 'zzz'"),
        ({"tokenizer": {"vocab_size": 100}}, ValueError, "vocab_size must be >= 257"),
        ({"dedup": {"ngram": 0}}, ValueError, "dedup: ngram must be >= 1"),
        ({"decontaminate": {"ngram": 0}}, ValueError, "decontaminate: ngram must be >= 1"),
    ],
)
def test_wrong_arguments_fail_in_the_constructor(
    corpus_root: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CorpusDataModule(**arguments(corpus_root, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": [{"name": "a", "path": "/nowhere.txt"}]}, FileNotFoundError, "'/nowhere.txt' does not exist"),
        (
            {"sources": [{"name": "a", "path": "/n.txt", "missing": "skip"}]},
            ValueError,
            "no training source is present",
        ),
        ({"tokenizer": "/nowhere"}, FileNotFoundError, "tokenizer.json does not exist"),
        ({"decontaminate": {"files": ["/nowhere/*.jsonl"]}}, FileNotFoundError, "no evaluation file matches"),
    ],
)
def test_missing_input_fails_in_prepare(
    corpus_root: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CorpusDataModule(**arguments(corpus_root, **changes)).prepare_data()


def test_absent_evaluation_files_may_be_left_out(corpus_root: Path) -> None:
    absent = {"files": ["/nowhere/*.jsonl"], "missing": "skip"}
    data = CorpusDataModule(**arguments(corpus_root, decontaminate=absent))
    data.prepare_data()
    data.setup()
    assert data.contamination["web"]["files"] == {}


def test_setup_without_prepare(corpus_root: Path, tmp_path: Path) -> None:
    data = CorpusDataModule(**arguments(corpus_root, cache_dir=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"not prepared for these options: run prepare_data\(\)"):
        data.setup()
    with pytest.raises(RuntimeError, match="call prepare_data"):
        data.val_names  # noqa: B018


def test_everything_filtered_away(corpus_root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print('no mathematics here')\n" * 30)
    source = {"name": "a", "path": str(tmp_path / "a.py"), "filter": "algebraic_stack"}
    tokenizer = str(next((corpus_root / "cache").glob("tokenizer-*")))
    data = CorpusDataModule(**arguments(corpus_root, sources=[source], tokenizer=tokenizer, cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"source 'a': nothing left to train or measure on \(1 no_math_import\)"):
        data.prepare_data()
    assert list((tmp_path / "corpus").iterdir()) == []


def test_window_longer_than_a_source(corpus: Make) -> None:
    with pytest.raises(ValueError, match="source 'arxiv': .* tokens, fewer than one window of seq_len . 1 = 1000001"):
        corpus(seq_len=1_000_000)


def test_tokenizer_swapped_after_preparation(corpus_root: Path, tmp_path: Path) -> None:
    from datamodules.text.tokenizer import train_tokenizer

    train_tokenizer(["a b c d " * 9, "let x be the sum"], 262, tmp_path / "tok")
    settings = arguments(corpus_root, tokenizer=str(tmp_path / "tok"), cache_dir=str(tmp_path / "cache"))
    CorpusDataModule(**settings).prepare_data()
    train_tokenizer(["z y x w " * 9, "all primes below"], 262, tmp_path / "tok")
    with pytest.raises(TokenizerMismatchError, match="prepared with .*, model expects"):
        CorpusDataModule(**settings).setup()


def test_damaged_cache_is_found_at_setup(corpus_root: Path, tmp_path: Path) -> None:
    settings = arguments(corpus_root, cache_dir=str(tmp_path))
    CorpusDataModule(**settings).prepare_data()
    tokens = next(tmp_path.glob("corpus/web-*/train/tokens.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens.bin is truncated.*prepare the corpus again"):
        CorpusDataModule(**settings).setup()


def test_missing_source_is_left_out_and_the_rest_rescaled(corpus: Make, corpus_root: Path) -> None:
    sources = [
        {"name": "web", "path": str(corpus_root / "text" / "web.jsonl")},
        {"name": "code", "path": str(corpus_root / "text" / "code.jsonl")},
        {"name": "gone", "path": "/nowhere.txt", "missing": "skip"},
    ]
    data = corpus(sources=sources, mixture="4:1:5")
    assert data.weights == {"web": pytest.approx(0.8), "code": pytest.approx(0.2)}
    assert data.source_names == ["web", "code"]


def test_training_on_an_evaluation_file_is_refused(corpus_root: Path) -> None:
    web = str(corpus_root / "text" / "web.jsonl")
    data = CorpusDataModule(**arguments(corpus_root, decontaminate={"files": [web]}))
    with pytest.raises(ValueError, match="source 'web': web.jsonl is the evaluation file web.jsonl; never train on"):
        data.prepare_data()


def test_selection_set_must_not_be_a_test_set(corpus: Make, corpus_root: Path, tmp_path: Path) -> None:
    code = str(corpus_root / "text" / "code.jsonl")
    chosen = {"name": "choice", "path": code}
    web = arguments(corpus_root)
    with pytest.raises(ValueError, match="code.jsonl is the evaluation file code.jsonl; choose mixtures on"):
        CorpusDataModule(**web, selection_set=chosen, decontaminate={"files": [code]})
    for name in ("math_test.jsonl", "test.jsonl", "a-test-b.jsonl"):
        (tmp_path / name).write_text('{"text": "a b c"}\n')
        with pytest.raises(ValueError, match="by its name a test set"):
            CorpusDataModule(**web, selection_set={"name": "choice", "path": str(tmp_path / name)})
    assert corpus(**arguments(corpus_root, mixture=None), selection_set=chosen).val_names == ["web", "choice"]


def test_interrupted_preparation_is_finished_later(
    corpus_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    sources = [{"name": name, "path": str(corpus_root / "text" / f"{name}.jsonl")} for name in ("web", "code")]
    settings = arguments(corpus_root, sources=sources, cache_dir=str(tmp_path / "cache"))

    def full(stream: Any, data: bytes) -> None:
        if "code-" in str(stream.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        stream.write(data)

    (tmp_path / "cache" / "corpus" / ".code-old.1.tmp").mkdir(parents=True)  # left by a killed run
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.text.shards.write_bytes", full)
        with pytest.raises(OSError, match="disk full while writing"):
            CorpusDataModule(**settings).prepare_data()
    (web,) = (tmp_path / "cache" / "corpus").iterdir()  # the finished source stays, nothing else
    made = (web / "source.json").stat().st_mtime_ns
    CorpusDataModule(**settings).prepare_data()
    assert (web / "source.json").stat().st_mtime_ns == made
    assert len(list((tmp_path / "cache" / "corpus").iterdir())) == 2


def test_caps_and_decontamination_in_the_pipeline(corpus_root: Path, tmp_path: Path) -> None:
    problem = " ".join(f"word{i}" for i in range(30))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"problem": problem, "answer": "4"}) + "\n")
    lines = [f"clean document {i} with some words" for i in range(60)]
    lines[7] = f"before {problem.upper()} after"
    lines[9] = "before " + " ".join(problem.split()[:29]) + " after"
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    source = {"name": "a", "path": str(tmp_path / "a.txt"), "documents": "lines", "max_documents": 50}
    tokenizer = str(next((corpus_root / "cache").glob("tokenizer-*")))
    for mode, documents in (("report", 50), ("drop", 50)):
        settings = arguments(
            corpus_root,
            sources=[source],
            tokenizer=tokenizer,
            cache_dir=str(tmp_path / mode),
            decontaminate={"files": [str(tmp_path / "exam.jsonl")], "mode": mode},
        )
        data = CorpusDataModule(**settings)
        data.prepare_data()
        data.setup()
        report = data.contamination["a"]
        assert report["documents_hit"] == 1
        assert report["files"]["exam.jsonl"]["hits"] == {
            "0": {"fields": ["problem"], "documents": [f"{tmp_path / 'a.txt'}:8"]}
        }
        entry = data._need_setup()["sources"]["a"]
        assert sum(split["documents"] for split in entry["splits"].values()) == documents
        assert entry["dropped"] == ({"contaminated": 1} if mode == "drop" else {})
