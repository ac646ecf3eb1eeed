"""Token shards: round trip, dtype choice, one clear error per fault, a full disk."""

from __future__ import annotations

import errno
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import MemoryMappedTensor

from datamodules.text.files import FileDigests
from datamodules.text.shards import ShardError, TokenShard, write_shard
from datamodules.text.tokenizer import TokenizerMismatchError
from modules.files import atomic_directory

HASH = "a" * 64


def make(path: Path, documents: list[list[int]], vocab_size: int = 300, **kwargs: Any) -> Path:
    with write_shard(path, vocab_size=vocab_size, eod_id=0, tokenizer_hash=HASH, **kwargs) as writer:
        for document in documents:
            writer.append([document], text_bytes=3 * len(document))
    return path


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 299), max_size=8), min_size=1, max_size=12))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    shard = TokenShard(make(tmp_path_factory.mktemp("s") / "shard", documents))
    assert shard.token_array.tolist() == [token for document in documents for token in [*document, 0]]
    bounds = shard.offset_array.tolist()
    assert [shard.token_array[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)] == [
        [*document, 0] for document in documents
    ]
    assert shard.bytes_per_token == pytest.approx(3 * sum(map(len, documents)) / bounds[-1])
    shard.verify()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_dtype_by_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    shard = TokenShard(make(tmp_path / "s", [[vocab_size - 1]], vocab_size))
    assert shard.meta["dtype"] == dtype
    assert isinstance(shard.tokens, MemoryMappedTensor)
    assert shard.token_array.tolist() == [vocab_size - 1, 0]
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 2 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("token", [300, -1])
def test_writer_refuses_tokens_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token} outside the tokenizer's vocabulary of 300"):
        make(tmp_path / "s", [[5, token]])
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_an_empty_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document was written"):
        make(tmp_path / "s", [])
    assert list(tmp_path.iterdir()) == []


def test_missing_shard_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; prepare the corpus first"):
        TokenShard(tmp_path / "none")
    for name in ("tokens.bin", "documents.bin", "shard.json"):
        path = make(tmp_path / f"without-{name}", [[1, 2]])
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
            TokenShard(path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "is truncated: .* bytes, expected"),
        (lambda data: b"", "is empty, expected"),
        (lambda data: data * 2, "is too long"),
    ],
)
def test_wrong_sizes(tmp_path: Path, name: str, change: Any, message: str) -> None:
    path = make(tmp_path / "s", [[1, 2], [3]])
    (path / name).write_bytes(change((path / name).read_bytes()))
    with pytest.raises(ShardError, match=f"token shard .*{name} {message}"):
        TokenShard(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "has version 99, this release reads 1"),
        ({"format": "other"}, "not of format 'plumbline-tokens'"),
        ({"dtype": "float32"}, "unknown dtype 'float32'"),
        ({"dtype": "uint32"}, "tokens.bin is truncated"),
        ({"tokens": "5"}, "'tokens' must be int, got '5'"),
        ({"tokens": -1}, "'tokens' must be int, got -1"),
        ({"tokens": 0}, r"is empty \(0 tokens\)"),
        ({"tokens": True}, "'tokens' must be int, got True"),
        ({"sha256": {}}, "must name tokens.bin and documents.bin"),
    ],
)
def test_wrong_metadata(tmp_path: Path, change: dict, message: str) -> None:
    path = make(tmp_path / "s", [[1, 2], [3]])
    meta = json.loads((path / "shard.json").read_text())
    (path / "shard.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(ShardError, match=message):
        TokenShard(path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 50_000])
def test_garbage_metadata(tmp_path: Path, content: str) -> None:
    path = make(tmp_path / "s", [[1, 2]])
    (path / "shard.json").write_text(content)
    with pytest.raises(ShardError, match="shard.json is not"):
        TokenShard(path)


def test_verify_finds_flipped_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "s", [[1, 2], [3]])
    data = bytearray((path / "tokens.bin").read_bytes())
    data[0] ^= 1
    (path / "tokens.bin").write_bytes(data)
    shard = TokenShard(path)  # the size is right: opening stays cheap
    with pytest.raises(ShardError, match="tokens.bin has sha256 .* shard.json says"):
        shard.verify()


def test_offsets_must_span_the_tokens(tmp_path: Path) -> None:
    path = make(tmp_path / "s", [[1, 2], [3]])
    np.array([0, 3, 4], dtype="<i8").tofile(path / "documents.bin")
    with pytest.raises(ShardError, match="does not span"):
        TokenShard(path)


def test_tokenizer_and_vocabulary_of_the_reader(tmp_path: Path) -> None:
    path = make(tmp_path / "s", [[1, 250]])
    TokenShard(path, tokenizer_hash=HASH, vocab_size=251)
    with pytest.raises(TokenizerMismatchError, match="prepared with aaaaaaaaaaaa, model expects bbbbbbbbbbbb"):
        TokenShard(path, tokenizer_hash="b" * 64)
    with pytest.raises(ShardError, match="token id 250, outside the model's vocabulary of 250"):
        TokenShard(path, vocab_size=250)


def test_a_pickled_shard_is_mapped_again_not_copied(tmp_path: Path) -> None:
    shard = TokenShard(make(tmp_path / "s", [list(range(1, 200))] * 100))
    data = pickle.dumps(shard)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).token_array, shard.token_array)


@pytest.mark.skipif(sys.platform != "linux", reason="page release is Linux only")
def test_released_pages_leave_resident_memory_and_read_the_same(tmp_path: Path) -> None:
    shard = TokenShard(make(tmp_path / "s", [list(range(1, 300))] * 20_000))

    def resident() -> int:
        # The mapping's own line; the process total is too noisy for 12 MB.
        lines = Path("/proc/self/smaps").read_text().split(str(shard.path / "tokens.bin"))[1].splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    total = int(shard.token_array.sum())
    assert resident() > 10_000  # kB
    shard.release()
    assert resident() == 0
    assert int(shard.token_array.sum()) == total


@pytest.mark.parametrize("failing_call", [1, 2, 3, 5])
def test_full_disk_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    path = make(tmp_path / "s", [[7, 8, 9]])
    calls = 0

    def full(stream: Any, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            stream.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        stream.write(data)

    for module in ("datamodules.text.shards.write_bytes", "modules.files.write_bytes"):
        monkeypatch.setattr(module, full)
    with pytest.raises(OSError, match="disk full while writing .*: '.*/s'") as caught:
        make(tmp_path / "s", [[1, 2], [3]])
    assert caught.value.errno == errno.ENOSPC
    assert len(str(caught.value).splitlines()) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["s"]
    assert TokenShard(path).token_array.tolist() == [7, 8, 9, 0]
    TokenShard(path).verify()


def test_replacing_a_shard(tmp_path: Path) -> None:
    make(tmp_path / "s", [[1]])
    assert TokenShard(make(tmp_path / "s", [[2, 3]])).token_array.tolist() == [2, 3, 0]
    assert [item.name for item in tmp_path.iterdir()] == ["s"]


def test_other_errors_pass_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="no"), atomic_directory(tmp_path / "d"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "d"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_file_digests_are_remembered_and_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, memo = tmp_path / "a", tmp_path / "memo.json"
    data.write_text("one")
    first = FileDigests(memo)
    digest = first[data]
    first.save()
    again = FileDigests(memo)
    monkeypatch.setattr("datamodules.text.files.sha256_file", lambda path: "hashed again")
    assert again[data] == digest
    data.write_text("other")
    assert again[data] == "hashed again"
    memo.write_text("{broken")
    assert FileDigests(memo)[data] == "hashed again"
