"""Stream documents out of text files, jsonl, parquet (plain or ``.zst``) and installed Python packages.

Input is untrusted: every document is bounded, nothing is read whole, and a broken record is named by file and line.
"""

from __future__ import annotations

import fnmatch
import glob as globbing
import hashlib
import importlib.util
import io
import json
import os
import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datamodules.text.specs import ReadSpec
from modules.optional import require

RECORD_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".ipynb", ".py", ".sage", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hs"),
    *(".jl", ".r", ".m", ".f", ".f90", ".f95", ".g", ".gap", ".mpl", ".maple"),
    *(".v", ".mm", ".lean", ".thy", ".agda", ".lagda", ".idr"),
)
_PACKAGE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_TEMPLATE_FIELD = re.compile(r"\{(\w+)\}")
_PIECE = 1 << 16


class BadInputError(ValueError):
    """A file, line or record that can't be read; the message names it."""


@dataclass(slots=True)
class SourceFile:
    """One input file: where it is, and its name below the source (stable between machines)."""

    path: Path
    relative: str

    @property
    def suffix(self) -> str:
        """Lower-case suffix, that of ``x.jsonl.zst`` being ``.jsonl``."""
        path = Path(self.relative)
        return Path(path.stem).suffix.lower() if path.suffix.lower() == ".zst" else path.suffix.lower()

    @property
    def compressed(self) -> bool:
        return self.relative.lower().endswith(".zst")


@dataclass(slots=True)
class Document:
    """A text and where it came from (``file`` or ``file:line``)."""

    text: str
    origin: str
    suffix: str


def list_files(spec: ReadSpec) -> list[SourceFile]:
    """The files of a source in reading order; the order depends on names only.

    A folder or pattern is read in sorted order. A package is read in the order of the hashes of its file names, so
    that a ``max_bytes`` cap keeps a cross-section instead of the beginning of the alphabet.

    Raises:
        FileNotFoundError: the path, pattern or package gives no file.
        ValueError: a file's suffix is unknown.
    """
    if spec.package is not None:
        files = sorted(_package_files(spec), key=lambda item: hashlib.sha256(item.relative.encode()).digest())
    elif spec.glob is not None:
        paths = sorted(Path(name) for name in globbing.glob(spec.glob, recursive=True))
        files = [SourceFile(path, path.name) for path in paths if path.is_file()]
        if not files:
            raise FileNotFoundError(f"source {spec.name!r}: no file matches glob {spec.glob!r}")
    else:
        root = Path(spec.path or "")
        if root.is_dir():
            files = _walk(root, tuple(spec.suffixes or (*TEXT_SUFFIXES, *RECORD_SUFFIXES)))
        elif root.is_file():
            files = [SourceFile(root, root.name)]
        else:
            raise FileNotFoundError(f"source {spec.name!r}: path {str(root)!r} does not exist")
    files = [item for item in files if not any(fnmatch.fnmatch(item.relative, mask) for mask in spec.exclude)]
    if not files:
        raise FileNotFoundError(f"source {spec.name!r}: no file left of {spec.path or spec.glob or spec.package!r}")
    known = {*TEXT_SUFFIXES, *RECORD_SUFFIXES, *(spec.suffixes or ())}
    for item in files:
        if item.suffix not in known:
            raise ValueError(
                f"source {spec.name!r}: {item.path} has unknown suffix {item.suffix!r}; list it in 'suffixes' to read "
                f"it as text"
            )
    return files


def _walk(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[SourceFile]:
    found = []
    for folder, inside, names in os.walk(root):
        top = Path(folder) == root
        inside[:] = [name for name in inside if name[0] != "." and name != "__pycache__" and not (top and name in skip)]
        for name in names:
            path = Path(folder, name)
            item = SourceFile(path, path.relative_to(root).as_posix())
            # Links are left out: they may leave the folder or form circles.
            if name[0] != "." and item.suffix in suffixes and path.is_file() and not path.is_symlink():
                found.append(item)
    return sorted(found, key=lambda item: item.relative)


def _package_files(spec: ReadSpec) -> list[SourceFile]:
    name = spec.package or ""
    suffixes = tuple(spec.suffixes or (".py",))
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _walk(root, suffixes, skip=frozenset({"site-packages", "dist-packages"}))
    if not _PACKAGE_NAME.fullmatch(name):
        raise ValueError(f"source {spec.name!r}: package must be a top-level package name or 'stdlib', got {name!r}")
    found = importlib.util.find_spec(name)  # top-level: located without running its code
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"source {spec.name!r}: Python package {name!r} is not installed (pip install {name})")
    return _walk(Path(next(iter(found.submodule_search_locations))), suffixes)


def iterate_documents(spec: ReadSpec, files: list[SourceFile], dropped: Counter[str]) -> Iterator[Document]:
    """Stream the documents of ``files``.

    Args:
        dropped: counts what is left out, by reason (``oversize``, ``bad_input``, ``blank``).

    Raises:
        BadInputError: undecodable text or a broken record (unless ``bad_input: skip``), naming file and line.
    """
    skip_bad = spec.bad_input == "skip" or (spec.bad_input is None and spec.package is not None)

    def bad(message: str) -> None:
        if not skip_bad:
            raise BadInputError(f"source {spec.name!r}: {message}")
        dropped["bad_input"] += 1

    for item in files:
        if item.suffix == ".jsonl":
            stream = _jsonl_documents(spec, item, dropped, bad)
        elif item.suffix == ".parquet":
            stream = _parquet_documents(spec, item, dropped, bad)
        else:
            stream = _text_documents(spec, item, dropped, bad)
        try:
            for document in stream:
                if spec.strip_calculator_marks:
                    document.text = _CALCULATOR_MARK.sub("", document.text)
                if document.text.strip():
                    yield document
                else:
                    dropped["blank"] += 1
        except OSError as error:
            # Truncated or corrupt compression surfaces here; the rest of the file can't be trusted.
            bad(f"{item.path}: {error}")


def open_binary(item: SourceFile) -> IO[bytes]:
    """Open a file for buffered reading, decompressing ``.zst`` on the way (a cut-off stream raises OSError)."""
    if not item.compressed:
        return open(item.path, "rb", buffering=1 << 20)
    arrow = require("pyarrow", extra="llemma")
    return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(item.path)), "zstd"), 1 << 20)


def _bounded_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line without its end), None for a line longer than ``limit``."""
    number = 0
    while line := stream.readline(limit + 2):
        number += 1
        if not line.endswith(b"\n") and len(line) > limit:
            while (rest := stream.readline(_PIECE)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.rstrip(b"\r\n")


Bad = Callable[[str], None]


def _text_documents(spec: ReadSpec, item: SourceFile, dropped: Counter[str], bad: Bad) -> Iterator[Document]:
    with open_binary(item) as stream:
        for line, data in _text_pieces(spec, stream):
            origin = str(item.path) if line == 0 else f"{item.path}:{line}"
            if data is None:
                dropped["oversize"] += 1
                continue
            try:
                text = data.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                at = max(line, 1) + data[: error.start].count(b"\n")
                bad(f"{item.path}:{at}: not UTF-8 (byte {data[error.start]:#04x})")
                continue
            yield Document(text.replace("\r\n", "\n"), origin, item.suffix)


def _text_pieces(spec: ReadSpec, stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(first line or 0 for a whole file, bytes of one document or None when too long)."""
    limit = spec.max_document_bytes
    if spec.documents == "lines":
        yield from _bounded_lines(stream, limit)
    elif spec.documents == "paragraphs":
        yield from _paragraphs(stream, limit)
    else:
        data = stream.read(limit + 1)
        if len(data) <= limit:
            yield 0, data
        elif spec.oversize == "drop":
            yield 0, None
        else:
            line = 1
            while data:
                # Cut after the last line end that fits; a single endless line is cut at a character boundary.
                cut = len(data)
                if cut > limit:
                    cut = data.rfind(b"\n", 0, limit) + 1 or _character_cut(data, limit)
                yield line, data[:cut]
                line += data.count(b"\n", 0, cut)
                data = data[cut:] + stream.read(limit + 1 - (len(data) - cut))


def _character_cut(data: bytes, limit: int) -> int:
    cut = limit
    while cut > max(1, limit - 4) and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _paragraphs(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    first, size, lines = 0, 0, []
    for number, line in _bounded_lines(stream, limit):
        if line is not None and not line.strip():
            if first:
                yield first, b"\n".join(lines) if size <= limit else None
            first, size, lines = 0, 0, []
            continue
        first = first or number
        size += limit + 1 if line is None else len(line) + 1
        if size <= limit and line is not None:
            lines.append(line)
    if first:
        yield first, b"\n".join(lines) if size <= limit else None


def _jsonl_documents(spec: ReadSpec, item: SourceFile, dropped: Counter[str], bad: Bad) -> Iterator[Document]:
    for line, record in iterate_records(item, spec.max_document_bytes, dropped, bad):
        origin = f"{item.path}:{line}"
        text = _compose(spec, record, origin, bad)
        if text is not None:
            yield Document(text, origin, item.suffix)


def iterate_records(
    item: SourceFile, limit: int, dropped: Counter[str], bad: Bad
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of a jsonl file; blank lines are passed over."""
    with open_binary(item) as stream:
        for line, data in _bounded_lines(stream, limit):
            if data is None:
                dropped["oversize"] += 1
                continue
            if not data.strip():
                continue
            try:
                record = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                bad(f"{item.path}:{line}: not UTF-8 (byte {data[error.start]:#04x})")
                continue
            except (ValueError, RecursionError) as error:
                bad(f"{item.path}:{line}: not JSON ({str(error)[:120]})")
                continue
            if not isinstance(record, dict):
                bad(f"{item.path}:{line}: expected a JSON object, got {type(record).__name__}")
                continue
            yield line, record


def _compose(spec: ReadSpec, record: dict[str, Any], origin: str, bad: Bad) -> str | None:
    """The text of a record by ``field`` or ``template``; None after a tolerated bad record."""
    names = _TEMPLATE_FIELD.findall(spec.template) if spec.template is not None else [spec.field]
    values: dict[str, str] = {}
    for name in names:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            have = ", ".join(sorted(map(str, record))[:8])
            kind = "is missing" if name not in record else f"holds {type(value).__name__}, not text"
            bad(f"{origin}: field {name!r} {kind} (fields: {have})")
            return None
        values[name] = str(value)
    text = values[spec.field] if spec.template is None else _TEMPLATE_FIELD.sub(lambda m: values[m[1]], spec.template)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair, which no encoder takes
        bad(f"{origin}: lone surrogate escape in text")
        return None
    return text


def _parquet_documents(spec: ReadSpec, item: SourceFile, dropped: Counter[str], bad: Bad) -> Iterator[Document]:
    arrow = require("pyarrow", extra="llemma")
    parquet = require("pyarrow.parquet", extra="llemma")
    names = _TEMPLATE_FIELD.findall(spec.template) if spec.template is not None else [spec.field]
    with tempfile.TemporaryFile() as plain:
        handle: Any = str(item.path)
        if item.compressed:  # parquet needs random access
            with open_binary(item) as stream:
                while data := stream.read(1 << 20):
                    plain.write(data)
            plain.seek(0)
            handle = plain
        try:
            with parquet.ParquetFile(handle) as table:
                absent = sorted(set(names) - set(table.schema_arrow.names))
                if absent:
                    bad(f"{item.path}: no column {absent[0]!r} (columns: {', '.join(table.schema_arrow.names[:8])})")
                    return
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=names):
                    for record in batch.to_pylist():
                        row += 1
                        text = _compose(spec, record, f"{item.path}: row {row}", bad)
                        if text is None:
                            continue
                        if len(text.encode()) > spec.max_document_bytes:
                            dropped["oversize"] += 1
                            continue
                        yield Document(text, f"{item.path}: row {row}", item.suffix)
        except (arrow.ArrowException, OSError) as error:
            bad(f"{item.path}: broken parquet ({str(error).splitlines()[0][:160]})")
