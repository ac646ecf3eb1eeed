"""Tokenizers: training, canonical hash, special tokens as plain text, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.text.tokenizer import TextTokenizer, TokenizerMismatchError, check_tokenizer, train_tokenizer

SAMPLE = [f"def f{i}(x):\n    return x + {i * 37}  # the value is {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(SAMPLE, 280, tmp_path_factory.mktemp("t") / "tok")


@settings(max_examples=60)
@given(text=st.text())
def test_any_text_survives(trained: TextTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= number < trained.vocab_size for number in ids)
    assert trained.eod_id not in ids


def test_special_tokens_in_text_are_text(trained: TextTokenizer) -> None:
    ids = trained.encode("a<|endoftext|>b")
    assert trained.eod_id not in ids
    assert trained.decode(ids) == "a<|endoftext|>b"


def test_digits_are_single_tokens(trained: TextTokenizer) -> None:
    assert [trained.decode([number]) for number in trained.encode("20250")] == list("20250")


def test_training_is_deterministic_and_sized(trained: TextTokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(SAMPLE), 280, tmp_path / "again")
    assert (again.hash, again.vocab_size, again.eod_id) == (trained.hash, 280, 0)


def test_training_refuses_a_vocabulary_the_text_cannot_fill(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="yields only .* of vocab_size=5000"):
        train_tokenizer(["abc abc"], 5000, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_hash_ignores_layout_and_run_time_settings(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(dict(reversed(content.items()))))
    copy = TextTokenizer(tmp_path / "copy")
    assert copy.hash == trained.hash
    assert copy.encode(SAMPLE[0]) == trained.encode(SAMPLE[0])  # the truncation to 3 is not applied
    content["model"]["merges"] = content["model"]["merges"][::-1]
    path.write_text(json.dumps(content))
    assert TextTokenizer(tmp_path / "copy").hash != trained.hash


def test_mismatch_names_both_hashes() -> None:
    check_tokenizer("a" * 64, "a" * 64)
    with pytest.raises(TokenizerMismatchError, match="data prepared with aaaaaaaaaaaa, model expects bbbbbbbbbbbb"):
        check_tokenizer("a" * 64, "b" * 64)


def test_clear_errors_for_bad_directories(trained: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist; give a directory"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="can't be loaded"):
        TextTokenizer(tmp_path)
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token"):
        TextTokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert TextTokenizer(tmp_path).eod_id == 0
