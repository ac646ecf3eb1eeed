"""Payoff files: what is read, and what is refused before it is believed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.games.generated import random_game_of_skill
from datamodules.games.payoff_files import load_payoffs


@pytest.fixture
def matrix() -> np.ndarray:
    return 3 * random_game_of_skill(6, 0).table[0].numpy()


def _write(path: Path, matrix: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, matrix)
    elif path.suffix == ".npz":
        np.savez_compressed(path, matrix)
    else:
        np.savetxt(path, matrix, delimiter=",", fmt="%.17g")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_every_kind_of_file_gives_the_same_game(tmp_path, matrix, suffix):
    path = _write(tmp_path / f"table{suffix}", matrix)
    raw, normalised = load_payoffs(path, normalise=False), load_payoffs(path)
    np.testing.assert_array_equal(raw.table[0].numpy(), matrix)
    np.testing.assert_allclose(normalised.table[0].numpy(), matrix / 3, rtol=0, atol=1e-15)
    assert raw.zero_sum
    assert raw.symmetric
    assert raw.name == "payoff_file(table)"


def test_float32_rounding_and_integers_pass(tmp_path, matrix):
    noisy = matrix.astype(np.float32) + np.float32(1e-6)
    table = load_payoffs(_write(tmp_path / "f.npy", noisy), normalise=False).table[0].numpy()
    np.testing.assert_array_equal(table, -table.T)
    np.testing.assert_allclose(table, matrix, rtol=0, atol=1e-6)
    whole = np.array([[0, 2], [-2, 0]], dtype=np.int8)
    assert load_payoffs(_write(tmp_path / "i.npy", whole)).table[0].tolist() == [[0, 1], [-1, 0]]
    assert load_payoffs(_write(tmp_path / "zero.npy", np.zeros((2, 2)))).table.abs().max() == 0


def test_an_archive_with_several_arrays_needs_the_key(tmp_path, matrix):
    path = tmp_path / "several.npz"
    np.savez(path, payoffs=matrix, other=np.zeros(3))
    np.testing.assert_array_equal(load_payoffs(path, normalise=False).table[0].numpy(), matrix)
    np.savez(path, first=matrix, other=np.zeros(3))
    with pytest.raises(ValueError, match="one named 'payoffs', holds first, other"):
        load_payoffs(path)


class _Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["t.pkl", "t.npy", "t.npz"])
def test_pickles_are_refused_and_never_run(tmp_path, name):
    path, trace = tmp_path / name, tmp_path / "trace"
    objects = np.array([[_Bomb(trace)]], dtype=object)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(_Bomb(trace)))
    elif path.suffix == ".npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, objects, allow_pickle=True)
    with pytest.raises(ValueError, match=r"can run code.*convert .*numpy\.save"):
        load_payoffs(path)
    assert not trace.exists()


def test_a_pickle_under_another_name_is_no_array(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "t.npy").write_bytes(pickle.dumps(_Bomb(trace)))
    with pytest.raises(ValueError, match="not a numpy array file"):
        load_payoffs(tmp_path / "t.npy")
    assert not trace.exists()


def _with(matrix: np.ndarray, value: float) -> np.ndarray:
    matrix = matrix.copy()
    matrix[1, 4] = value
    return matrix


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _with(m, np.nan), r"must be finite, got nan in row 1, column 4"),
        (lambda m: _with(m, -np.inf), r"must be finite, got -inf in row 1, column 4"),
        (lambda m: m[:, :4], r"square and antisymmetric \(shape \[6, 4\]\)"),
        (lambda m: m + 0.5, r"square and antisymmetric \(max \|M\+M\^T\| = 1\)"),
        (lambda m: (m / 3 + 1) / 2, r"win probabilities p become payoffs by 2p - 1"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, matrix, suffix, change, message):
    path = _write(tmp_path / f"t{suffix}", change(matrix))
    with pytest.raises(ValueError, match=message) as caught:
        load_payoffs(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 3)), r"two-dimensional and not empty, got shape \[2, 3, 3\]"),
        (np.zeros((0, 0)), r"two-dimensional and not empty, got shape \[0, 0\]"),
        (np.zeros((2, 2), dtype=complex), "real numbers, got dtype complex128"),
        (np.zeros((2, 2), dtype=bool), "real numbers, got dtype bool"),
        (np.array([["a", "b"], ["c", "d"]]), "real numbers, got dtype <U1"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        load_payoffs(_write(tmp_path / "t.npy", array))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"0,1\n-1,x\n", "not a table of numbers: could not convert string 'x'"),
        (b"0,1\n-1\n", "not a table of numbers"),
        (b"a,b\n0,1\n-1,0\n", "not a table of numbers"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_wrong_csv_is_refused(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_payoffs(tmp_path / "t.csv")


def test_other_names_missing_and_damaged_files_are_refused(tmp_path, matrix):
    with pytest.raises(ValueError, match=r"must be .npy, .npz or .csv, got '.txt'"):
        load_payoffs(tmp_path / "t.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_payoffs(tmp_path / "t.npy")
    path = _write(tmp_path / "t.npy", matrix)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load_payoffs(path)
    (tmp_path / "t.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an .npz archive"):
        load_payoffs(tmp_path / "t.npz")


def test_size_is_bounded_before_reading(tmp_path, matrix):
    path = _write(tmp_path / "t.npy", matrix)
    size = path.stat().st_size
    load_payoffs(path, max_bytes=size)
    with pytest.raises(ValueError, match=f"{size} bytes are more than max_bytes={size - 1}"):
        load_payoffs(path, max_bytes=size - 1)
    zeros = _write(tmp_path / "t.npz", np.zeros((500, 500)))  # packs to a few kB, unpacks to 2 MB
    assert zeros.stat().st_size < 100_000
    with pytest.raises(ValueError, match="bytes are more than max_bytes=100,000"):
        load_payoffs(zeros, max_bytes=100_000)


@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
def test_a_header_that_lies_about_its_size_is_refused(tmp_path, name):
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**8, 10**8)}
    np.lib.format.write_array_header_1_0(stream, header)
    path = tmp_path / name
    if path.suffix == ".npy":
        path.write_bytes(stream.getvalue())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("payoffs.npy", stream.getvalue())
    with pytest.raises(ValueError, match="80,000,000,000,000,000 bytes are more than"):
        load_payoffs(path)
