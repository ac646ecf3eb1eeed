"""Preference pairs: files, pairs made from dialogues, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.dialogue_data import DialogueDataModule
from datamodules.preference_data import PreferenceDataModule
from datamodules.text.dialogues import reply_samples
from datamodules.text.preferences import PreferencePair, pairs_from_replies, read_preferences
from datamodules.text.synthetic_dialogues import SyntheticDialogue
from modules.contracts import PromptSample


def write(file: Path, *rows: Any) -> Path:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


ROW = {"prompt": "hi <EOU>", "chosen": "hello", "rejected": "no"}


def test_reads_pairs_and_margins(tmp_path):
    file = write(tmp_path / "p.jsonl", ROW, "", {**ROW, "margin": 2, "source": "ignored"})
    assert read_preferences(file) == [
        PreferencePair("hi <EOU>", "hello", "no"), PreferencePair("hi <EOU>", "hello", "no", 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not valid JSON"),
        ([1], "must hold a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' must be a text"),
        ({**ROW, "chosen": " "}, "'chosen' must be a text that is not empty"),
        ({**ROW, "margin": True}, "'margin' must be a finite number, got True"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "'margin' must be a finite number"),
    ],
)
def test_damaged_line_is_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=f"p.jsonl line 2.*{words}"):
        read_preferences(write(tmp_path / "p.jsonl", ROW, row))


def test_missing_and_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="want a JSON Lines file with prompt, chosen and rejected"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no pair"):
        read_preferences(write(tmp_path / "p.jsonl", ""))


def test_pairs_from_replies():
    samples = reply_samples(SyntheticDialogue().dialogues("train", 100), 3, 1)
    pairs = pairs_from_replies(samples, 0)
    assert len(pairs) == len(samples)
    assert all(pair.chosen == one.reference != pair.rejected for pair, one in zip(pairs, samples, strict=True))
    assert pairs_from_replies(samples, 0) == pairs != pairs_from_replies(samples, 1)
    own = sum(set(pair.rejected.split()) <= set(pair.chosen.split()) for pair in pairs) / len(pairs)
    assert 0.4 < own < 0.6  # half of them are the reply itself, spoilt
    assert pairs_from_replies([PromptSample("a", "b"), PromptSample("c", "b")], 0) == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    data = DialogueDataModule(synthetic_dialogues=20, cache_dir=str(tmp_path_factory.mktemp("cache")))
    data.prepare_data()
    data.setup()
    return str(data.tokenizer.directory)


def make(tokenizer: str, **options: Any) -> PreferenceDataModule:
    settings = {"synthetic_dialogues": 20, "min_context": 1, "max_prompt_tokens": 12, "max_response_tokens": 6}
    data = PreferenceDataModule(**{**settings, "tokenizer": tokenizer, "batch_size": 4, **options})
    data.prepare_data()
    data.setup()
    return data


def test_batches_hold_prompt_and_response(tokenizer, tmp_path):
    rows = [{"prompt": f"is the soup {word} ? <EOU>", "chosen": "yes .", "rejected": "no , the soup is . . . .",
             "margin": 0.5} for word in ("fresh", "cheap", "spicy")]  # fmt: skip
    data = make(tokenizer, pairs=str(write(tmp_path / "train.jsonl", *rows)),
                val_pairs=str(write(tmp_path / "val.jsonl", *rows)))  # fmt: skip
    batch = next(iter(data.val_dataloader()))
    assert set(batch.keys()) == set(data.describe())
    assert batch["counted"].tolist() == [True] * 3 + [False]
    assert batch["margin"][:3].tolist() == [0.5] * 3
    for row, pair in enumerate(rows):
        encode, eod = data.tokenizer.encode, data.tokenizer.eod_id
        for key in ("chosen", "rejected"):
            want = encode(pair["prompt"]) + [*encode(pair[key]), eod][:6]
            assert batch[f"{key}_ids"][row, : batch[f"{key}_length"][row]].tolist() == want


def test_pairs_made_from_dialogues_share_the_dialogues_tokens(tokenizer):
    data, again = make(tokenizer), make(tokenizer, pairs_seed=1)
    assert data.digest()["data"] != again.digest()["data"]
    batch = next(iter(data.val_dataloader()))
    sample = data.samples("val")[0]
    encode, eod = data.tokenizer.encode, data.tokenizer.eod_id
    want = encode(sample.prompt)[-12:] + [*encode(sample.reference), eod][:6]
    assert batch["chosen_ids"][0, : batch["chosen_length"][0]].tolist() == want


def test_validation_pairs_are_kept_back(tokenizer, tmp_path):
    rows = [{**ROW, "chosen": f"hello {number}"} for number in range(20)]
    data = make(tokenizer, pairs=str(write(tmp_path / "p.jsonl", *rows)), val_fraction=0.25)
    parts = [{one.reference for one in data.samples(split)} for split in ("train", "val")]
    assert [len(part) for part in parts] == [15, 5]
    assert not parts[0] & parts[1]
    with pytest.raises(ValueError, match="test_splits is empty"):
        data.test_dataloader()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="tokenizer must be a directory"):
        PreferenceDataModule(pairs="p.jsonl")
    with pytest.raises(ValueError, match="val_pairs and test_pairs need pairs"):
        PreferenceDataModule(val_pairs="p.jsonl")
    with pytest.raises(ValueError, match="pairs_seed must be >= 0"):
        PreferenceDataModule(pairs_seed=-1)
