"""Permutations and packing: bijective, exact, shuffled by key, spans of documents right."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.text.packing import HeldOutWindows, PackedSource
from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.shards import TokenShard, write_shard


def make(path: Path, documents: list[list[int]]) -> TokenShard:
    with write_shard(path, vocab_size=70_000, eod_id=0, tokenizer_hash="h") as writer:
        writer.append(documents, text_bytes=1)
    return TokenShard(path)


DOCUMENTS = [list(range(100 * n + 1, 100 * n + 2 + n % 7)) for n in range(40)]


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    image = Permutation(size, derive_keys(seed, "x"))(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_a_huge_range_needs_no_memory() -> None:
    permutation = Permutation(10**15, derive_keys(3))
    index = np.arange(10**15 - 1000, 10**15)
    image = permutation(index)
    assert len(set(image.tolist())) == 1000
    assert ((image >= 0) & (image < 10**15)).all()
    # Mean of 1,000 uniform draws: standard error 1/sqrt(12 * 1000) = 0.009.
    assert abs(image.mean() / 1e15 - 0.5) < 0.04


def test_permutation_positions_look_uniform() -> None:
    # Where does element 0 of a range of 5 go, over 1,000 keys? Chi-square with 4 degrees, 99.99% point 23.5.
    counts = np.zeros(5)
    for key in range(1000):
        counts[Permutation(5, derive_keys(key, "u"))(np.array([0]))[0]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 23.5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=15), st.integers(1, 12), st.integers(0, 5))
def test_shuffled_epoch_is_the_stream_of_shuffled_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, epoch: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    documents = [[1000 * number + i + 1 for i in range(length)] for number, length in enumerate(lengths)]
    shard = make(folder / "s", documents)
    if shard.meta["tokens"] < seq_len + 1:
        return
    packed = PackedSource(shard, "s", seq_len, seed=4, cache_dir=folder / "order")
    order = packed.order(epoch)
    # The plain way: concatenate the documents in the permuted order, cut, permute.
    stream = [token for d in order.documents(np.arange(len(documents))).tolist() for token in [*documents[d], 0]]
    count = (len(stream) - 1) // seq_len
    windows = [stream[w * seq_len : w * seq_len + seq_len + 1] for w in order.windows(np.arange(count)).tolist()]
    tokens, ids = packed.fetch(np.arange(count) + epoch * count, document_ids=True)
    assert packed.windows_per_epoch == count
    assert tokens.tolist() == windows
    assert ids is not None
    # Document numbers rise by one after each end-of-document token, and only there.
    assert (ids[:, 0] == 0).all()
    np.testing.assert_array_equal(np.diff(ids, axis=1), (tokens[:, :-1] == 0).astype(int))


def test_epochs_seeds_and_sources_shuffle_differently_and_reproducibly(tmp_path: Path) -> None:
    shard = make(tmp_path / "s", DOCUMENTS)

    def epoch(seed: int, name: str, number: int) -> list:
        packed = PackedSource(shard, name, 5, seed, tmp_path / "order")
        items = np.arange(packed.windows_per_epoch) + number * packed.windows_per_epoch
        return packed.fetch(items)[0].tolist()

    base = epoch(0, "a", 0)
    assert epoch(0, "a", 0) == base
    for other in (epoch(1, "a", 0), epoch(0, "b", 0), epoch(0, "a", 1)):
        assert other != base
        assert len(other) == len(base)


def test_items_may_mix_epochs_in_any_order(tmp_path: Path) -> None:
    packed = PackedSource(make(tmp_path / "s", DOCUMENTS), "s", 5, 0, tmp_path / "order")
    items = np.random.default_rng(0).integers(0, 5 * packed.windows_per_epoch, 60)
    together = packed.fetch(items)[0]
    single = np.concatenate([packed.fetch(np.array([item]))[0] for item in items])
    np.testing.assert_array_equal(together, single)
    again = pickle.loads(pickle.dumps(packed))
    np.testing.assert_array_equal(again.fetch(items)[0], together)


def test_damaged_order_file_is_made_again(tmp_path: Path) -> None:
    shard = make(tmp_path / "s", DOCUMENTS)
    want = PackedSource(shard, "s", 5, 0, tmp_path / "order").fetch(np.arange(7))[0]
    (file,) = (tmp_path / "order").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    np.testing.assert_array_equal(PackedSource(shard, "s", 5, 0, tmp_path / "order").fetch(np.arange(7))[0], want)


def test_order_file_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make(tmp_path / "s", DOCUMENTS)
    want = PackedSource(shard, "s", 5, 0, tmp_path / "one").order(0).starts.tolist()
    monkeypatch.setattr("datamodules.text.packing._CHUNK", 7)
    assert PackedSource(shard, "s", 5, 0, tmp_path / "two").order(0).starts.tolist() == want


def test_source_shorter_than_a_window(tmp_path: Path) -> None:
    shard = make(tmp_path / "s", [[1, 2, 3]])
    assert PackedSource(shard, "s", 3, shuffle=False).windows_per_epoch == 1
    with pytest.raises(ValueError, match="source 's': 4 tokens, fewer than one window of seq_len . 1 = 5"):
        PackedSource(shard, "s", 4, shuffle=False)
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        PackedSource(shard, "s", 0, shuffle=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_held_out_windows_have_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int
) -> None:
    shard = make(tmp_path_factory.mktemp("h") / "s", [list(range(1, n + 1)) for n in lengths])
    if shard.meta["tokens"] < 2:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            HeldOutWindows(shard, "s", seq_len, 0)
        return
    windows = HeldOutWindows(shard, "s", seq_len, filler=0)
    inputs, labels, ids = windows.fetch(np.arange(len(windows) + 3), document_ids=True)
    stream = shard.token_array.tolist()
    assert labels[labels != -100].tolist() == stream[1:]
    assert inputs[labels != -100].tolist() == stream[:-1]
    assert (labels[len(windows) :] == -100).all()
    assert (labels[: len(windows)] != -100).any(axis=1).all()
    assert ids is not None
    assert (ids[:, 0] == 0).all()
