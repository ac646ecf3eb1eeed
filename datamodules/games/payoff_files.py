"""Payoff tables from files: ``.npy``, ``.npz`` and ``.csv``, checked before they are believed; never pickles."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch

from datamodules.games.normal_form import NormalFormGame, from_antisymmetric

ANTISYMMETRY_TOLERANCE = 1e-5
"""Largest ``max |M + M^T|`` as a share of ``max |M|``: float32 tables and printed digits pass, wrong tables do not."""

_KEY = "payoffs"
_PICKLES = (".pkl", ".pickle", ".p", ".pt", ".pth")


def load_payoffs(path: str | Path, normalise: bool = True, max_bytes: int = 1 << 30) -> NormalFormGame:
    """The symmetric zero-sum game of a square antisymmetric table ``[n, n]`` (row wins from column).

    What rounding left of ``M + M^T`` is removed by ``(M - M^T) / 2``, so that the game is exactly zero-sum.

    Args:
        path: a ``.npy`` file, an ``.npz`` file (its array ``payoffs``, or its only one), or a ``.csv`` file of numbers
            separated by commas, without a header.
        normalise: divide by the largest absolute payoff, as PSD-PSRO's code does.
        max_bytes: refuse larger files, and archives that unpack to more, before reading them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle or an object array, another kind of file, too large, not numbers, not two-dimensional,
            empty, an entry that is not finite (the first one's row and column are named), or not antisymmetric.
    """
    path = Path(path)
    owner = f"load_payoffs: {path}"
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(f"{owner}: {_no_pickle()}")
    if suffix not in (".npy", ".npz", ".csv"):
        raise ValueError(f"{owner}: must be .npy, .npz or .csv, got '{path.suffix}'")
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: no such file")
    _check_bytes(owner, path.stat().st_size, max_bytes)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
    matrix = check_payoff_matrix(readers[suffix](path, owner, max_bytes), owner)
    largest = np.abs(matrix).max()
    if normalise and largest > 0:
        matrix = matrix / largest
    return from_antisymmetric(torch.from_numpy(matrix), f"payoff_file({path.stem})")


def check_payoff_matrix(matrix: np.ndarray, owner: str = "load_payoffs") -> np.ndarray:
    """``matrix`` ``[n, n]`` in float64 and exactly antisymmetric.

    Raises:
        ValueError: as :func:`load_payoffs`; the message begins with ``owner``.
    """
    if matrix.dtype.kind not in "fiu":
        raise ValueError(f"{owner}: payoffs must be real numbers, got dtype {matrix.dtype}")
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{owner}: payoffs must be two-dimensional and not empty, got shape {[*matrix.shape]}")
    matrix = matrix.astype(np.float64)
    broken = np.argwhere(~np.isfinite(matrix))
    if len(broken):
        row, column = (int(index) for index in broken[0])
        raise ValueError(
            f"{owner}: payoffs must be finite, got {matrix[row, column]} in row {row}, column {column} (from 0), "
            f"{len(broken)} such in all"
        )
    rule = "payoff matrix must be square and antisymmetric"
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{owner}: {rule} (shape {[*matrix.shape]})")
    gap = float(np.abs(matrix + matrix.T).max())
    if gap > ANTISYMMETRY_TOLERANCE * float(np.abs(matrix).max()):
        hint = "; win probabilities p become payoffs by 2p - 1" if matrix.min() >= 0 else ""
        raise ValueError(f"{owner}: {rule} (max |M+M^T| = {gap:.6g}){hint}")
    return (matrix - matrix.T) / 2


def _no_pickle() -> str:
    return (
        "pickles and object arrays can run code when read and are refused; convert in a place you trust with "
        "numpy.save('payoffs.npy', numpy.asarray(table, dtype=float)) and name that file"
    )


def _check_bytes(owner: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{owner}: {size:,} bytes are more than max_bytes={max_bytes:,}: raise it if that is meant")


def _check_header(stream: IO[bytes], owner: str, max_bytes: int) -> None:
    """Refuse what the header announces before numpy makes room for it; the stream is read up to the data."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:  # later ones exist for field names beyond Latin-1 only
            raise ValueError(f"format version {version} is not one of plain numbers")
        shape, _, dtype = readers[version](stream)
    except ValueError as error:
        raise ValueError(f"{owner}: not a numpy array file ({str(error).splitlines()[0][:120]})") from None
    if dtype.hasobject:
        raise ValueError(f"{owner}: {_no_pickle()}")
    if len(shape) != 2:
        raise ValueError(f"{owner}: payoffs must be two-dimensional and not empty, got shape {[*shape]}")
    _check_bytes(owner, math.prod(shape) * dtype.itemsize, max_bytes)


def _read_array(stream: IO[bytes], owner: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{owner}: cut short or damaged ({str(error).splitlines()[0][:120]})") from None


def _read_npy(path: Path, owner: str, max_bytes: int) -> np.ndarray:
    with open(path, "rb") as stream:
        _check_header(stream, owner, max_bytes)
        stream.seek(0)
        return _read_array(stream, owner)


def _read_npz(path: Path, owner: str, max_bytes: int) -> np.ndarray:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{owner}: not an .npz archive ({error})") from None
    with archive:
        names = [info.filename for info in archive.infolist()]
        chosen = f"{_KEY}.npy" if f"{_KEY}.npy" in names else names[0] if len(names) == 1 else None
        if chosen is None:
            held = ", ".join(name.removesuffix(".npy") for name in names[:8]) or "nothing"
            raise ValueError(f"{owner}: must hold one array or one named '{_KEY}', holds {held}")
        _check_bytes(owner, archive.getinfo(chosen).file_size, max_bytes)
        with archive.open(chosen) as stream:
            _check_header(stream, owner, max_bytes)
        with archive.open(chosen) as stream:
            return _read_array(stream, owner)


def _read_csv(path: Path, owner: str, _: int) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{owner}: not a table of numbers: the file is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{owner}: payoffs must be two-dimensional and not empty, got an empty file")
    try:
        return np.loadtxt(text.splitlines(), dtype=np.float64, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{owner}: not a table of numbers: {str(error).splitlines()[0][:160]}") from None
