"""Readers: every format, every bound, every broken input by file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules.text.readers import BadInputError, iterate_documents, list_files
from datamodules.text.specs import ReadSpec, SourceSpec, as_spec


def read(spec: ReadSpec, dropped: Counter[str] | None = None) -> list[str]:
    dropped = Counter() if dropped is None else dropped
    return [document.text for document in iterate_documents(spec, list_files(spec), dropped)]


def compress(path: Path) -> Path:
    import zstandard

    target = path.with_name(path.name + ".zst")
    target.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    path.unlink()
    return target


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_formats_plain_and_zstd(tmp_path: Path, kind: str, packed: bool) -> None:
    texts = ["one\ntwo", "Größe ∑", "three"]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif kind == "jsonl":
        write_jsonl(path, [{"text": text} for text in texts])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "x": [1, 2, 3]}), path, row_group_size=2)
    if packed:
        path = compress(path)
    assert read(ReadSpec(name="s", path=str(path), documents="paragraphs")) == texts


def test_folder_and_glob_are_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.txt", "a.md", "skip.bin", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert read(ReadSpec(name="s", path=str(tmp_path))) == ["a.md", "b.txt", "sub/a.txt"]
    assert read(ReadSpec(name="s", path=str(tmp_path), exclude=["sub/*"])) == ["a.md", "b.txt"]
    assert read(ReadSpec(name="s", glob=str(tmp_path / "*.txt"))) == ["b.txt"]


def test_template_and_calculator_marks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "2+3?", "answer": "<<2+3=5>>5 {question}", "n": 1}])
    spec = ReadSpec(name="s", path=str(path), template="Q: {question}\nA: {answer} #{n}", strip_calculator_marks=True)
    assert read(spec) == ["Q: 2+3?\nA: 5 {question} #1"]  # a field's own braces are text


def test_package_is_a_deterministic_cross_section() -> None:
    spec = ReadSpec(name="s", package="json")
    files = [item.relative for item in list_files(spec)]
    assert {"decoder.py", "encoder.py"} <= set(files)
    assert files == [item.relative for item in list_files(spec)]
    assert files != sorted(files)


def test_stdlib_leaves_installed_packages_out() -> None:
    files = [item.relative for item in list_files(ReadSpec(name="s", package="stdlib", exclude=["test/*"]))]
    assert "json/decoder.py" in files
    assert not any(name.startswith(("site-packages", "test/")) for name in files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (b'{"text": "a"}\n\xff\n', r"a\.jsonl:2: not UTF-8 \(byte 0xff\)"),
        (b"[1]\n", r"a\.jsonl:1: expected a JSON object, got list"),
        (b'{"body": "a"}\n', r"a\.jsonl:1: field 'text' is missing \(fields: body\)"),
        (b'{"text": ["a"]}\n', r"a\.jsonl:1: field 'text' holds list, not text"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: lone surrogate"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: not JSON"),
    ],
)
def test_broken_records_are_named_or_skipped(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content + b'{"text": "good"}\n')
    with pytest.raises(BadInputError, match=message):
        read(ReadSpec(name="s", path=str(path)))
    dropped: Counter[str] = Counter()
    assert read(ReadSpec(name="s", path=str(path), bad_input="skip"), dropped)[-1] == "good"
    assert dropped["bad_input"] == 1


def test_bad_utf8_in_text_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xe9\n")
    with pytest.raises(BadInputError, match=r"a\.txt:3: not UTF-8 \(byte 0xe9\)"):
        read(ReadSpec(name="s", path=str(path)))


@pytest.mark.parametrize("kind", ["parquet", "jsonl.zst", "txt.zst"])
def test_corrupt_and_truncated_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"not what it says")
    with pytest.raises(BadInputError, match=r"a\."):
        read(ReadSpec(name="s", path=str(path)))


def test_truncated_zstd_is_not_silently_shorter(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    plain = write_jsonl(tmp_path / "a.jsonl", [{"text": rng.randbytes(40).hex()} for _ in range(500)])
    packed = compress(plain)
    packed.write_bytes(packed.read_bytes()[:-2000])
    with pytest.raises(BadInputError, match="[Tt]runcated"):
        read(ReadSpec(name="s", path=str(packed)))


def test_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInputError, match=r"no column 'text' \(columns: body\)"):
        read(ReadSpec(name="s", path=str(tmp_path / "a.parquet")))


def test_documents_are_bounded(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 300}, {"text": "short"}])
    dropped: Counter[str] = Counter()
    assert read(ReadSpec(name="s", path=str(lines), max_document_bytes=100), dropped) == ["short"]
    assert dropped == {"oversize": 1}
    book = tmp_path / "b.txt"
    book.write_text("".join(f"line {number}\n" for number in range(100)))
    dropped = Counter()
    assert read(ReadSpec(name="s", path=str(book), max_document_bytes=100), dropped) == []
    assert dropped == {"oversize": 1}


@pytest.mark.parametrize("text", ["".join(f"line {n}\n" for n in range(200)), "é" * 500, "ab\n" + "∑" * 90 + "\ncd"])
def test_split_loses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    spec = ReadSpec(name="s", path=str(tmp_path / "b.txt"), max_document_bytes=101, oversize="split")
    pieces = read(spec)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 101
    assert len(pieces) > 2


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"path": "/nowhere"}, FileNotFoundError, "source 's': path '/nowhere' does not exist"),
        ({"glob": "/nowhere/*.txt"}, FileNotFoundError, "no file matches glob"),
        ({"package": "no_such_package_here"}, FileNotFoundError, "is not installed"),
        ({"package": "os.path"}, ValueError, "top-level package name"),
    ],
)
def test_missing_input(spec: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list_files(ReadSpec(name="s", **spec))


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match="unknown suffix '.docx'"):
        list_files(ReadSpec(name="s", path=str(tmp_path / "a.docx")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b", "path": "x"}, "name must be"),
        ({"name": "a"}, "exactly one of path, glob, package; got none"),
        ({"name": "a", "path": "x", "glob": "y"}, r"got \['path', 'glob'\]"),
        ({"name": "a", "path": "x", "weight": 0.0}, "weight must be a finite number > 0, got 0"),
        ({"name": "a", "path": "x", "weight": float("nan")}, "weight must be a finite number > 0, got nan"),
        ({"name": "a", "path": "x", "max_bytes": 0}, "max_bytes must be >= 1"),
        ({"name": "a", "path": "x", "holdout_fraction": 0.5}, r"holdout_fraction must be in \[0, 0.25\]"),
    ],
)
def test_wrong_specs(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_spec(SourceSpec, fields).check()


def test_unknown_spec_key_is_named() -> None:
    with pytest.raises(ValueError, match="SourceSpec: unknown key 'wieght'"):
        as_spec(SourceSpec, {"name": "a", "path": "x", "wieght": 1.0})
