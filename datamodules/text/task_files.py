"""Readers of the benchmarks' data files: one row to question, raw gold answer and plain extras.

Every reader takes ``(row, where)``, where ``where`` is ``<file>:<line>`` for error messages, and returns
``(question, gold, extras)``. Gold answers are not interpreted here; the scorer's extractor does that for gold and model
text alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.text.few_shot import LETTERS, with_choices
from datamodules.text.readers import SourceFile, iterate_documents, iterate_records
from datamodules.text.specs import ReadSpec

Row = tuple[str, str, dict[str, Any]]
_LONGEST_LINE = 16 * 2**20


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSON-lines file, or of a .txt file as ``{"prompt": line}``, each with its ``<file>:<line>``.

    Blank lines are passed over; ``.zst`` files are decompressed.

    Raises:
        ValueError: ``<file>:<line>`` is not UTF-8, not JSON, not an object, or longer than 16 MiB.
    """
    item, dropped = SourceFile(path, path.name), Counter[str]()
    if item.suffix == ".txt":
        spec = ReadSpec(path.name, path=str(path), documents="lines", max_document_bytes=_LONGEST_LINE)
        rows = ((line.origin, {"prompt": line.text}) for line in iterate_documents(spec, [item], dropped))
    else:
        records = iterate_records(item, _LONGEST_LINE, dropped, _refuse)
        rows = ((f"{path}:{number}", record) for number, record in records)
    yield from rows
    if dropped["oversize"]:
        raise ValueError(f"{path}: {dropped['oversize']} lines are longer than {_LONGEST_LINE} bytes")


def _refuse(message: str) -> None:
    raise ValueError(message)


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    """Non-empty text field of a row, or one line that says which field is wrong where."""
    if name not in row:
        raise ValueError(f"{where}: field '{name}' is missing; the line has {sorted(row)}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field '{name}' must be non-empty text, got {value!r}")
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{where}: field '{name}' holds half a surrogate pair, which no tokenizer takes")
    return value


def _extras(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if isinstance(row.get(name), str | int | float)}


def read_gsm8k(row: Mapping[str, Any], where: str) -> Row:
    gold = _field(row, "answer", where)
    if "####" not in gold:
        raise ValueError(f"{where}: field 'answer' must end in '#### <number>'")
    return _field(row, "question", where), gold, {}


def read_boxed(row: Mapping[str, Any], where: str) -> Row:
    gold = _field(row, "solution", where)
    if "\\boxed" not in gold:
        raise ValueError(f"{where}: field 'solution' has no \\boxed{{}} answer")
    return _field(row, "problem", where), gold, _extras(row, "type", "level")


def read_math500(row: Mapping[str, Any], where: str) -> Row:
    meta = _extras(row, "level", "unique_id")
    if isinstance(row.get("subject"), str):
        meta["type"] = row["subject"]
    return _field(row, "problem", where), _field(row, "answer", where), meta


def read_custom(row: Mapping[str, Any], where: str) -> Row:
    return _field(row, "question", where), _field(row, "answer", where), _extras(row, "type", "level")


def read_choice(row: Mapping[str, Any], where: str) -> Row:
    question = _field(row, "question", where)
    choices = row.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: field 'choices' must be a list of 2 to {len(LETTERS)} texts, got {choices!r}")
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: field 'choices' must hold texts only, got {choices!r}")
    letters = LETTERS[: len(choices)]
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        answer = letters[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise ValueError(
            f"{where}: field 'answer' must be an index 0..{len(letters) - 1} or a letter of {letters}, "
            f"got {row.get('answer')!r}"
        )
    meta = {**_extras(row, "type"), "choices": list(choices)}
    return with_choices(question, choices), answer, meta


_COQ_COMMENT_MARK = re.compile(r"\(\*|\*\)")
_PROOF_LINE = re.compile(r"^\s*Proof\b", re.MULTILINE)


def without_coq_comments(source: str) -> str:
    """The source without its ``(* comments *)``, which may nest; text after an unclosed one is dropped, as by Coq."""
    kept, depth, position = [], 0, 0
    for mark in _COQ_COMMENT_MARK.finditer(source):
        if depth == 0:
            kept.append(source[position : mark.start()])
        if mark.group() == "(*":
            depth += 1
        elif depth:
            depth -= 1
        else:
            kept.append(mark.group())  # a closing mark outside any comment is code, e.g. the end of ``(x *)``
        position = mark.end()
    if depth == 0:
        kept.append(source[position:])
    return "".join(kept).lstrip()


def coq_statement(source: str, name: str, where: str = "Coq source") -> str:
    """A Coq file up to the ``Proof`` line of theorem ``name``: imports, definitions and the statement, no comments.

    Raises:
        ValueError: no theorem of that name, or no line that begins with ``Proof`` after it.
    """
    source = without_coq_comments(source)
    theorem = re.search(rf"^\s*(?:Theorem|Lemma)\s+{re.escape(name)}(?![\w'])", source, re.MULTILINE)
    if theorem is None:
        raise ValueError(f"{where}: the source has no theorem '{name}'")
    proof = _PROOF_LINE.search(source, theorem.end())
    if proof is None:
        raise ValueError(f"{where}: no line begins with 'Proof' after theorem '{name}', so its end is unknown")
    return source[: proof.start()].rstrip() + "\n"


def read_coq(row: Mapping[str, Any], where: str) -> Row:
    name = _field(row, "name", where)
    statement = coq_statement(_field(row, "source", where), name, where)
    return statement, statement, {"name": name, "split": _field(row, "split", where), "prover": "coq"}


def read_lean(row: Mapping[str, Any], where: str) -> Row:
    statement = _field(row, "statement", where)
    meta = {"name": _field(row, "full_name", where), "split": _field(row, "split", where), "prover": "lean4"}
    return statement, statement, meta


def read_prompt(row: Mapping[str, Any], where: str) -> Row:
    return _field(row, "prompt", where), "", {}
