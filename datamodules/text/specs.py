"""Typed configuration of a corpus: sources, filters, tokenizer, deduplication, decontamination."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class ReadSpec:
    """Where text comes from and how a document is cut out of it. Exactly one of path, glob and package.

    Args:
        name: short name; it appears in metric names (``val/ppl_<name>``) and cache folders.
        path: a file, or a folder that is searched for files with a known suffix.
        glob: a pattern such as ``corpus/**/*.jsonl.zst``.
        package: an installed Python package whose sources are read, or ``stdlib``.
        suffixes: file suffixes read from a folder or package; None = all known for a folder, ``[".py"]`` for a package.
        exclude: patterns (``fnmatch``, on the path below the folder or package) of files to leave out.
        field: field of a jsonl or parquet record that holds the text.
        template: text built from several fields instead, e.g. ``"{question}\\n{answer}"``.
        documents: what one document of a plain text file is.
        strip_calculator_marks: remove GSM8K's ``<<a=b>>`` annotations.
        filter: ``algebraic_stack`` applies the rules of Azerbayev et al. 2024, section 2.1 / appendix B.
        language: rule set of the filter; None = by file suffix.
        max_documents, max_bytes: stop after so many kept documents or UTF-8 bytes; None = no cap.
        max_document_bytes: hard bound on one document, against hostile input.
        oversize: a longer document is dropped (and counted) or cut in pieces at line ends (plain text files only).
        bad_input: undecodable text or a broken record stops with an error, or is skipped and counted.
            None = error, except for packages, whose test data holds broken files on purpose.
        missing: an absent path or package is an error, or leaves the source out with a warning.
        licence: of the text (an SPDX name), for model cards; None = a package's own, else unknown.
    """

    name: str
    path: str | None = None
    glob: str | None = None
    package: str | None = None
    suffixes: list[str] | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    template: str | None = None
    documents: Literal["file", "lines", "paragraphs"] = "file"
    strip_calculator_marks: bool = False
    filter: Literal["none", "algebraic_stack"] = "none"
    language: str | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 16 * 2**20
    oversize: Literal["drop", "split"] = "drop"
    bad_input: Literal["error", "skip"] | None = None
    missing: Literal["error", "skip"] = "error"
    licence: str | None = None

    def check(self) -> None:
        """Raise one-line ValueErrors for what can be seen without touching a file."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"source {self.name!r}: name must be letters, digits, '_', '-' or '.'")
        given = [key for key in ("path", "glob", "package") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"source {self.name!r}: give exactly one of path, glob, package; got {given or 'none'}")
        for key in ("max_documents", "max_bytes", "max_document_bytes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"source {self.name!r}: {key} must be >= 1, got {value}")
        if self.oversize == "split" and self.documents != "file":
            raise ValueError(f"source {self.name!r}: oversize 'split' needs documents 'file', got {self.documents!r}")


@dataclass
class SourceSpec(ReadSpec):
    """A training source. Weight None = given by ``mixture`` or ``replay``, else 1.

    Args:
        weight: relative share in the stream, any positive scale.
        holdout_fraction: overrides the corpus-wide fraction of documents held out for each of validation and test.
    """

    weight: float | None = None
    holdout_fraction: float | None = None

    def check(self) -> None:
        super().check()
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"source {self.name!r}: weight must be a finite number > 0, got {self.weight}")
        if self.holdout_fraction is not None:
            check_fraction(f"source {self.name!r}: holdout_fraction", self.holdout_fraction)


@dataclass
class EvalSourceSpec(ReadSpec):
    """A source that is only ever measured on, whole (for instance the text of GSM8K test).

    Args:
        split: in which stage its perplexity is measured.
    """

    split: Literal["validation", "test", "both"] = "both"


@dataclass
class TokenizerTraining:
    """Train a byte-level BPE with single digits on the sources themselves.

    Args:
        vocab_size: entries, the end-of-document token included.
        sample_bytes: bytes of text sampled, spread evenly over the sources.
    """

    vocab_size: int = 32_000
    sample_bytes: int = 100_000_000

    def check(self) -> None:
        if self.vocab_size < 257:  # 256 bytes and the end-of-document token
            raise ValueError(f"tokenizer: vocab_size must be >= 257 for a byte-level BPE, got {self.vocab_size}")
        if self.sample_bytes < 1:
            raise ValueError(f"tokenizer: sample_bytes must be >= 1, got {self.sample_bytes}")


@dataclass
class DedupSpec:
    """Deduplication inside one source.

    Args:
        exact: drop documents whose whitespace-normalised text was seen before (SHA-256).
        near: drop near-duplicates by MinHash over word n-grams: a document goes if it shares one of ``bands`` bands
            of ``rows`` hashes with an earlier one, i.e. with probability 1 - (1 - s**rows)**bands at Jaccard s.
        ngram: words in a shingle.
    """

    exact: bool = True
    near: bool = False
    ngram: int = 5
    bands: int = 16
    rows: int = 8

    def check(self) -> None:
        for key in ("ngram", "bands", "rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"dedup: {key} must be >= 1, got {getattr(self, key)}")


@dataclass
class DecontaminationSpec:
    """n-gram overlap with evaluation sets (Azerbayev et al. 2024, section 3.4: 30-grams, reported, not removed).

    Args:
        files: jsonl files of evaluation items (patterns allowed).
        ngram: words (lower-cased, split at whitespace) a document must share with an item to be a hit.
        mode: report hits, or also drop the documents.
        fields: record fields indexed; None = those of question, problem, solution, answer, statement, text present.
        missing: an absent file is an error, or is left out (the report then has no entry for it).
    """

    files: list[str] = dataclasses.field(default_factory=list)
    ngram: int = 30
    mode: Literal["report", "drop"] = "report"
    fields: list[str] | None = None
    missing: Literal["error", "skip"] = "error"

    def check(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"decontaminate: ngram must be >= 1, got {self.ngram}")


Spec = TypeVar("Spec")


def as_spec(kind: type[Spec], value: Any) -> Spec:
    """Accept a dataclass instance or a mapping of its fields (from YAML read without the CLI)."""
    if isinstance(value, kind):
        return value
    known = [item.name for item in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    try:
        given = dict(value)
    except (TypeError, ValueError):
        raise ValueError(f"{kind.__name__}: expected a mapping of {', '.join(known)}, got {value!r}") from None
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


def check_fraction(label: str, value: float) -> None:
    """Held-out documents go to validation and to test, so at most half of a source can leave training."""
    if not (math.isfinite(value) and 0 <= value <= 0.25):
        raise ValueError(f"{label} must be in [0, 0.25], got {value}")
