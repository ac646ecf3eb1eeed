"""n-gram contamination of training documents by evaluation sets (Azerbayev et al. 2024, section 3.4).

A *hit* is a run of n words (lower-cased, split at whitespace) shared by an evaluation item and a document. Candidates
are found by 64-bit hashes of all n-grams and confirmed word by word, so a reported hit is never a hash collision.
"""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.text.ngrams import ngram_hashes, normalised, word_hashes
from datamodules.text.readers import BadInputError, SourceFile, iterate_records, list_files
from datamodules.text.specs import DecontaminationSpec, ReadSpec
from modules.files import sha256_file

EVALUATION_FIELDS = ("question", "problem", "solution", "answer", "statement", "text")
_MAX_ITEM_BYTES = 1 << 24
_TEST_FILE = re.compile(r"(^|[^a-z])test([^a-z]|$)", re.IGNORECASE)


def evaluation_files(spec: DecontaminationSpec) -> list[Path]:
    """The files of ``spec.files``, patterns expanded.

    Raises:
        FileNotFoundError: a name or pattern gives no file (unless ``missing: skip``).
    """
    found: list[Path] = []
    for pattern in spec.files:
        paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if not paths and spec.missing == "error":
            raise FileNotFoundError(f"decontaminate: no evaluation file matches {pattern!r}")
        found.extend(path for path in paths if path not in found)
    return found


def refuse_test_set(spec: ReadSpec, decontaminate: DecontaminationSpec | None) -> None:
    """Refuse a selection set that is a test set: choosing a mixture by its perplexity would be training on it.

    Raises:
        ValueError: naming the file.
    """
    tested = {sha256_file(path): path.name for path in evaluation_files(decontaminate)} if decontaminate else {}
    for item in list_files(spec):
        match = tested.get(sha256_file(item.path))
        if match or _TEST_FILE.search(Path(item.relative).stem):
            reason = f"is the evaluation file {match}" if match else "is by its name a test set"
            raise ValueError(f"selection_set: {item.relative} {reason}; choose mixtures on training or validation text")


class EvaluationIndex:
    """All n-grams of the evaluation items, with the items they come from.

    Args:
        ngram: words in a run.
    """

    def __init__(self, ngram: int = 30) -> None:
        if ngram < 1:
            raise ValueError(f"EvaluationIndex: ngram must be >= 1, got {ngram}")
        self.ngram = ngram
        self._texts: list[list[str]] = []  # words of each indexed field
        self._owner: list[tuple[str, int, str]] = []  # (file, item, field)
        self._hashes: list[np.ndarray] = []
        self._places: list[np.ndarray] = []  # (text, position) of each hash
        self.items: Counter[str] = Counter()
        self.too_short: Counter[str] = Counter()
        self._table: np.ndarray | None = None

    @classmethod
    def from_spec(cls, spec: DecontaminationSpec) -> EvaluationIndex:
        """Index the jsonl files of ``spec``.

        Raises:
            FileNotFoundError, BadInputError, ValueError: missing or broken file, no indexable field.
        """
        index = cls(spec.ngram)
        for path in evaluation_files(spec):
            if not path.name.endswith((".jsonl", ".jsonl.zst")):
                raise ValueError(f"decontaminate: evaluation file must be .jsonl, got {str(path)!r}")

            def bad(message: str) -> None:
                raise BadInputError(f"decontaminate: {message}")

            records = iterate_records(SourceFile(path, path.name), _MAX_ITEM_BYTES, Counter(), bad)
            for number, (line, record) in enumerate(records):
                chosen = spec.fields or [name for name in EVALUATION_FIELDS if isinstance(record.get(name), str)]
                texts = {name: record[name] for name in chosen if isinstance(record.get(name), str)}
                if not texts:
                    names = ", ".join(chosen or EVALUATION_FIELDS)
                    raise BadInputError(f"decontaminate: {path}:{line}: no text field among {names}")
                index.add(path.name, number, texts)
        return index

    def add(self, file: str, item: int, texts: dict[str, str]) -> None:
        """Index the fields of one evaluation item."""
        self.items[file] += 1
        long_enough = False
        for field, text in texts.items():
            flat = normalised(text)
            hashes = ngram_hashes(word_hashes(flat), self.ngram)
            if not hashes.size:
                continue
            long_enough = True
            places = np.empty((hashes.size, 2), dtype=np.int32)
            places[:, 0], places[:, 1] = len(self._texts), np.arange(hashes.size)
            self._hashes.append(hashes)
            self._places.append(places)
            self._texts.append(flat.split(" "))
            self._owner.append((file, item, field))
        self.too_short[file] += not long_enough
        self._table = None

    def _build(self) -> None:
        hashes = np.concatenate([*self._hashes, np.empty(0, dtype=np.uint64)])
        places = np.concatenate([*self._places, np.empty((0, 2), dtype=np.int32)])
        order = np.argsort(hashes, kind="stable")
        self._sorted, self._sorted_places = hashes[order], places[order]
        # A bit table in front of the binary search: nearly all n-grams of clean text end here.
        bits = 1 << max(16, int(16 * max(1, hashes.size)).bit_length())
        self._mask = np.uint64(bits - 1)
        self._table = np.zeros(bits, dtype=bool)
        self._table[hashes & self._mask] = True

    def hits(self, text: str) -> set[tuple[str, int, str]]:
        """(file, item number, field) of every evaluation text that shares an n-gram with ``text``."""
        if self._table is None:
            self._build()
        assert self._table is not None
        flat = normalised(text)
        hashes = ngram_hashes(word_hashes(flat), self.ngram)
        candidates = np.flatnonzero(self._table[hashes & self._mask])
        if not candidates.size or not self._sorted.size:
            return set()
        first = np.searchsorted(self._sorted, hashes[candidates], side="left")
        last = np.searchsorted(self._sorted, hashes[candidates], side="right")
        found: set[tuple[str, int, str]] = set()
        words: list[str] | None = None
        for position, low, high in zip(candidates.tolist(), first.tolist(), last.tolist(), strict=True):
            for text_number, at in self._sorted_places[low:high].tolist():
                if self._owner[text_number] in found:
                    continue
                words = words if words is not None else flat.split(" ")
                theirs = self._texts[text_number][at : at + self.ngram]
                if theirs == words[position : position + self.ngram]:
                    found.add(self._owner[text_number])
        return found


class ContaminationReport:
    """Hits gathered over a stream of documents.

    Args:
        index: the evaluation n-grams.
        mode: ``report`` keeps every document (the paper), ``drop`` refuses those with a hit.
        examples: origins of hit documents kept per evaluation item.
    """

    def __init__(self, index: EvaluationIndex, mode: str = "report", examples: int = 3) -> None:
        self.index, self.mode, self._examples = index, mode, examples
        self.documents = 0
        self.documents_hit = 0
        self._fields: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._origins: dict[tuple[str, int], list[str]] = defaultdict(list)

    def keep(self, text: str, origin: str = "") -> bool:
        """Record the hits of a document; False if it is to be dropped."""
        self.documents += 1
        hits = self.index.hits(text)
        if not hits:
            return True
        self.documents_hit += 1
        for file, item, field in hits:
            self._fields[file, item].add(field)
            origins = self._origins[file, item]
            if len(origins) < self._examples and origin not in origins:
                origins.append(origin)
        return self.mode != "drop"

    def summary(self) -> dict[str, Any]:
        """Plain report: per evaluation file its items, those too short to be found, and every hit item."""
        files: dict[str, Any] = {}
        for file, items in sorted(self.index.items.items()):
            hit = {
                str(item): {"fields": sorted(fields), "documents": self._origins[name, item]}
                for (name, item), fields in sorted(self._fields.items())
                if name == file
            }
            files[file] = {"items": items, "too_short": self.index.too_short[file], "hit_items": len(hit), "hits": hit}
        return {
            "ngram": self.index.ngram,
            "mode": self.mode,
            "documents": self.documents,
            "documents_hit": self.documents_hit,
            "files": files,
        }


def contamination(index: EvaluationIndex, documents: Iterable[str], mode: str = "report") -> dict[str, Any]:
    """Report on a stream of documents at once."""
    report = ContaminationReport(index, mode)
    for number, text in enumerate(documents):
        report.keep(text, str(number))
    return report.summary()
