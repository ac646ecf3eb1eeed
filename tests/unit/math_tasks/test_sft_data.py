"""SFTDataModule: masks, packing, order of rows, resume, and every refusal."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from datamodules.sft_data import SFTDataModule
from datamodules.text.sft import SFTRows, SFTSource, _pack, prepare_sft
from datamodules.text.tokenizer import TextTokenizer, train_tokenizer
from modules.contracts import DescribesBatch, HasDigest, StatefulData

SEQ_LEN = 48


def pairs(n: int = 23) -> list[dict[str, Any]]:
    return [{"prompt": f"Q: {i} + {i}?\nA:", "response": " " + f"{i} and " * (i % 5) + f"{2 * i}."} for i in range(n)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sft") / "tokenizer"
    train_tokenizer(["Q: 1 + 1?\nA: 1 and 2. The answer is"] * 3, 265, folder)
    return str(folder)


@pytest.fixture
def make(tmp_path: Path, tokenizer_dir: str) -> Any:
    def build(rows: list[Any] | None = None, **options: Any) -> SFTDataModule:
        path = write(tmp_path / "pairs.jsonl", pairs() if rows is None else rows)
        options = {"sources": [SFTSource("pairs", path)], "seq_len": SEQ_LEN, "batch_size": 4, **options}
        return SFTDataModule(tokenizer=tokenizer_dir, cache_dir=str(tmp_path / "cache"), **options)

    return build


def ready(data: SFTDataModule) -> SFTDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def decoded(tokenizer: TextTokenizer, inputs: np.ndarray, labels: np.ndarray) -> list[tuple[str, str]]:
    """(whole text, learnt text) of every example of a row, read back from inputs and labels alone."""
    examples, at = [], 0
    learnt = [index for index, label in enumerate(labels) if label == tokenizer.eod_id]
    for end in learnt:  # the last target of an example is its end-of-document token
        whole = tokenizer.decode(inputs[at : end + 1])
        targets = [label for label in labels[at : end + 1] if label != -100]
        examples.append((whole, tokenizer.decode(targets)))
        at = end + 1
    assert (labels[at:] == -100).all()
    assert (inputs[at:] == tokenizer.eod_id).all()
    return examples


@pytest.mark.parametrize("packing", [False, True])
def test_rows_hold_every_example_once_with_only_the_response_to_learn(make: Any, packing: bool) -> None:
    data = ready(make(packing=packing))
    rows = data._need_setup()
    inputs, labels, ids = rows.fetch(np.arange(len(rows)), document_ids=True)
    assert ids is not None
    found = [decoded(data.tokenizer, *row) for row in zip(inputs, labels, strict=True)]
    expected = Counter((pair["prompt"] + pair["response"], pair["response"]) for pair in pairs())
    assert Counter(example for row in found for example in row) == expected
    assert all(len(row) == 1 for row in found) != packing
    for row, number in zip(found, ids, strict=True):
        changes = np.flatnonzero(np.diff(number))
        assert number[0] == 0
        assert (np.diff(number) >= 0).all()
        assert len(changes) in (len(row) - 1, len(row))
    assert len(rows) == (len(pairs()) if not packing else len(found))
    assert 0 < rows.fill <= 1


def test_labels_are_the_next_token_and_never_cross_examples(make: Any) -> None:
    data = ready(make(packing=True))
    rows = data._need_setup()
    inputs, labels, ids = rows.fetch(np.arange(len(rows)), document_ids=True)
    assert ids is not None
    inside = (ids[:, 1:] == ids[:, :-1]) & (labels[:, :-1] != -100)
    assert inside.any()
    assert (labels[:, :-1][inside] == inputs[:, 1:][inside]).all()
    border = (ids[:, 1:] != ids[:, :-1]) & (labels[:, :-1] != -100)
    assert (labels[:, :-1][border] == data.tokenizer.eod_id).all()


def test_prompt_mask_ends_where_the_prompt_ends(make: Any) -> None:
    data = ready(make([{"prompt": "Q: 1 + 1?\nA:", "response": " 2."}]))
    _, labels, _ = data._need_setup().fetch(np.array([0]))
    prompt, response = data.tokenizer.encode("Q: 1 + 1?\nA:"), data.tokenizer.encode(" 2.")
    learnt = [*response, data.tokenizer.eod_id]
    expected = [-100] * (len(prompt) - 1) + learnt
    assert labels[0].tolist() == expected + [-100] * (SEQ_LEN - len(expected))


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_packing_keeps_examples_whole_and_rows_within_capacity(lengths: list[int], capacity: int) -> None:
    length = np.array(lengths, dtype=np.int64)
    rows = _pack(np.arange(length.size), length, capacity)
    assert sorted(int(i) for row in rows for i in row) == list(range(length.size))
    used = [int(length[row].sum()) for row in rows]
    assert all(total <= capacity for total in used)
    # best fit: no two rows could be merged
    assert all(a + b > capacity for i, a in enumerate(used) for b in used[i + 1 :])


def test_rows_past_the_end_have_no_targets(make: Any) -> None:
    rows = ready(make())._need_setup()
    inputs, labels, ids = rows.fetch(np.array([len(rows), 3, len(rows) + 9]), document_ids=True)
    alone, alone_labels, _ = rows.fetch(np.array([3]))
    assert (labels[[0, 2]] == -100).all()
    assert ids is not None
    assert (ids[[0, 2]] == 0).all()
    assert (inputs[1] == alone[0]).all()
    assert (labels[1] == alone_labels[0]).all()


def test_each_epoch_is_another_order_of_all_rows_fixed_by_the_seed(make: Any) -> None:
    rows, again = ready(make())._need_setup(), ready(make())._need_setup()
    n = len(rows)
    items = np.arange(3 * n)
    order = rows.rows_of(items).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    assert (again.rows_of(items[::-1])[::-1].reshape(3, n) == order).all()
    assert (ready(make(seed=1))._need_setup().rows_of(items).reshape(3, n) != order).any()


class Keeper(LightningModule):
    """Remembers the batches of every optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: dict[int, list[list[int]]] = {}
        self.held_out: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows = self.steps.setdefault(self.trainer.global_step, [])
        rows += torch.cat([batch["input_ids"], batch["labels"]], dim=1).tolist()
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ValidatingKeeper(Keeper):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.held_out.append(batch["labels"])


def fit(data: SFTDataModule, folder: Path, steps: int, accumulate: int = 1, ckpt_path: Path | None = None) -> Keeper:
    module = ValidatingKeeper() if data.holdout_fraction else Keeper()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def test_resumed_run_sees_the_same_rows_whatever_the_accumulation(make: Any, tmp_path: Path) -> None:
    whole = fit(make(packing=True), tmp_path, 9).steps
    assert list(whole) == list(range(9))
    assert all(len(rows) == 4 for rows in whole.values())
    first = fit(make(packing=True), tmp_path, 4).steps
    rest = fit(make(packing=True), tmp_path, 9, ckpt_path=tmp_path / "4.ckpt").steps
    assert {**first, **rest} == whole
    assert list(rest) == list(range(4, 9))
    assert fit(make(packing=True), tmp_path, 9, accumulate=2).steps == whole
    other = fit(make(packing=True), tmp_path, 9, accumulate=4, ckpt_path=tmp_path / "4.ckpt").steps
    assert other == rest


def test_resume_on_other_data_is_refused(make: Any, tmp_path: Path) -> None:
    fit(make(), tmp_path, 2)
    with pytest.raises(ValueError, match="finetuned on other data: seed was 0, is 3"):
        fit(make(seed=3), tmp_path, 4, ckpt_path=tmp_path / "2.ckpt")
    with pytest.raises(ValueError, match="other data: data was sft-"):
        fit(make(pairs(24)), tmp_path, 4, ckpt_path=tmp_path / "2.ckpt")


def test_held_out_examples_validate_and_do_not_train(make: Any, tmp_path: Path) -> None:
    data = ready(make(pairs(60), holdout_fraction=0.3))
    train, (name,) = data._need_setup(), data.val_names
    held = data._held_out[name]
    assert len(train) + len(held) == 60
    assert 5 <= len(held) <= 35

    def texts(rows: SFTRows) -> set[str]:
        inputs, labels, _ = rows.fetch(np.arange(len(rows)))
        return {decoded(data.tokenizer, *row)[0][0] for row in zip(inputs, labels, strict=True)}

    assert not texts(train) & texts(held)
    module = fit(data, tmp_path, 1)
    assert sum(int((labels != -100).any(dim=1).sum()) for labels in module.held_out) == len(held)


def test_a_batch_is_what_describe_says(make: Any, tmp_path: Path) -> None:
    data = ready(make(document_mask=True, packing=True))

    class FakeTrainer:
        max_steps, world_size, global_rank, accumulate_grad_batches, global_step = 3, 2, 1, 1, 0
        limit_train_batches = 1.0

    data.trainer = FakeTrainer()  # type: ignore[assignment]
    batch = next(iter(data.train_dataloader()))
    kinds = {key: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" for key, value in batch.items()}
    assert kinds == data.describe()
    assert len(data.train_dataloader()) == 3
    assert isinstance(data, DescribesBatch)
    assert isinstance(data, HasDigest)
    assert isinstance(data, StatefulData)
    assert data.steps_per_epoch == -(-len(data._need_setup()) // 4)


def test_step_targets_count_the_whole_step_on_every_rank(make: Any) -> None:
    data = ready(make())

    def batches(rank: int, world_size: int, accumulate: int) -> list[Any]:
        class FakeTrainer:
            max_steps, global_step, limit_train_batches = 1, 0, 1.0

        FakeTrainer.world_size, FakeTrainer.global_rank = world_size, rank  # type: ignore[attr-defined]
        FakeTrainer.accumulate_grad_batches = accumulate  # type: ignore[attr-defined]
        data.trainer = FakeTrainer()  # type: ignore[assignment]
        return list(data.train_dataloader())

    whole = batches(0, 1, 1)
    parts = [*batches(0, 2, 2), *batches(1, 2, 2)]
    total = int((whole[0]["labels"] != -100).sum())
    assert total > 0
    assert sum(int((part["labels"] != -100).sum()) for part in parts) == total
    assert {int(count) for part in [*whole, *parts] for count in part["step_targets"]} == {total}


def test_two_ranks_share_a_step(make: Any) -> None:
    data = ready(make())

    def step(rank: int, world_size: int) -> list[list[int]]:
        class FakeTrainer:
            max_steps, accumulate_grad_batches, global_step, limit_train_batches = 2, 1, 0, 1.0

        FakeTrainer.world_size, FakeTrainer.global_rank = world_size, rank  # type: ignore[attr-defined]
        data.trainer = FakeTrainer()  # type: ignore[assignment]
        return next(iter(data.train_dataloader()))["input_ids"].tolist()

    assert step(0, 2) + step(1, 2) == step(0, 1)


def test_sources_templates_and_marks(tmp_path: Path, tokenizer_dir: str) -> None:
    gsm8k = write(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}])
    plain = write(tmp_path / "p.jsonl", pairs(2))
    sources = [
        {"name": "gsm8k", "path": gsm8k, "prompt": "Q: {question}\nA:", "response": " {answer}",
         "strip_calculator_marks": True},
        {"name": "plain", "path": plain},
    ]  # fmt: skip
    data = SFTDataModule(sources, tokenizer_dir, str(tmp_path / "c"), 64, 2, packing=True)  # type: ignore[arg-type]
    rows = ready(data)._need_setup()
    inputs, labels, _ = rows.fetch(np.arange(len(rows)))
    found = {
        source: decoded(data.tokenizer, *row)
        for source, *row in zip(rows.row_source.tolist(), inputs, labels, strict=True)
    }
    assert found[0] == [("Q: 1+1?\nA: 1+1=2\n#### 2", " 1+1=2\n#### 2")]
    assert len(found[1]) == 2
    torch.save(dict(data.hparams), tmp_path / "h.pt")
    assert torch.load(tmp_path / "h.pt", weights_only=True)["sources"][0]["name"] == "gsm8k"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "response": "r"}, "{"], "pairs.jsonl:2: not JSON"),
        ([{"prompt": "p"}], "pairs.jsonl:1: field 'response' is missing; the line has ['prompt']"),
        ([{"prompt": "p", "response": ["r"]}], "pairs.jsonl:1: field 'response' must be text, got list"),
        ([{"prompt": " ", "response": "r"}], "pairs.jsonl:1: empty prompt"),
        ([{"prompt": "p", "response": ""}], "pairs.jsonl:1: empty response"),
        (['{"prompt": "\\ud800", "response": "r"}'], "pairs.jsonl:1: half a surrogate pair"),
        ([], "pairs.jsonl holds no examples"),
    ],
)
def test_bad_row_is_one_line_and_leaves_no_cache(make: Any, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(rows).prepare_data()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_overlong_example_is_named_or_dropped(make: Any) -> None:
    rows = [*pairs(3), {"prompt": "Q", "response": "1 and " * 60}]
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: \d+ tokens .* more than seq_len \+ 1 = 49 \(1 such"):
        ready(make(rows))
    data = ready(make(rows, overlong="drop"))
    assert (len(data._need_setup()), data._need_setup().dropped) == (3, 1)
    with pytest.raises(ValueError, match="no example is left for training"):
        ready(make(rows[3:], overlong="drop"))


def test_holdout_that_keeps_nothing_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="holdout_fraction 1e-12 keeps no example"):
        ready(make(holdout_fraction=1e-12))


def test_example_of_exactly_one_row_fits(make: Any, tokenizer_dir: str) -> None:
    tokens = len(TextTokenizer(tokenizer_dir).encode("Q")) + len(TextTokenizer(tokenizer_dir).encode(" 22")) + 1
    row = [{"prompt": "Q", "response": " 22"}]
    inputs, labels, _ = ready(make(row, seq_len=tokens - 1))._need_setup().fetch(np.array([0]))
    assert labels[0, -1] == ready(make(row)).tokenizer.eod_id
    assert inputs.shape == (1, tokens - 1)
    with pytest.raises(ValueError, match="more than seq_len"):
        ready(make(row, seq_len=tokens - 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be >= 1, got 0"),
        ({"seed": -1}, "seed and num_workers must be >= 0"),
        ({"holdout_fraction": 1.0}, "holdout_fraction must be in [0, 1), got 1.0"),
        ({"overlong": "cut"}, "overlong must be 'error' or 'drop', got 'cut'"),
        ({"sources": []}, "sources is empty"),
        ({"sources": [{"name": "a", "path": "x", "promt": "y"}]}, "unknown key 'promt'"),
    ],
)
def test_bad_arguments(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_bad_sources(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(1))
    with pytest.raises(ValueError, match="source name 'a' is used twice"):
        make(sources=[SFTSource("a", path), SFTSource("a", path)])
    with pytest.raises(ValueError, match="response uses no {field} of the rows: 'yes'"):
        make(sources=[SFTSource("a", path, response="yes")])
    with pytest.raises(FileNotFoundError, match="SFT source 'a': no file"):
        make(sources=[SFTSource("a", str(tmp_path / "none.jsonl"))])


def test_use_before_preparation_says_so(make: Any) -> None:
    data = make()
    with pytest.raises(FileNotFoundError, match=r"call prepare_data\(\) first"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="call prepare_data"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"6 steps are one epoch.*trainer.max_steps >= 1, got no trainer"):
        ready(data).train_dataloader()


def test_prepared_examples_are_reused_and_a_damaged_table_is_refused(make: Any) -> None:
    data = make()
    tokenizer = TextTokenizer(data.tokenizer_dir)
    folder = prepare_sft(data.sources, tokenizer, data.cache_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare_sft(data.sources, tokenizer, data.cache_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    table = folder / "examples.bin"
    table.write_bytes(table.read_bytes()[:-32])
    with pytest.raises(ValueError, match="examples.bin does not fit its tokens; delete the folder"):
        data.setup("fit")
    table.write_bytes(b"12345")
    with pytest.raises(ValueError, match="examples.bin does not fit its tokens; delete the folder"):
        data.setup("fit")
