"""From sources to shards: read, filter, deduplicate, decontaminate, split, tokenise, write.

The cache is addressed by content: a source's folder is named by the digest of its files, its reading options, the
tokenizer and the cleaning options. Preparing again finds the folder and does nothing; preparing after an interruption
builds what is missing. Layout below ``cache_dir``::

    tokenizer-<key>/                 a trained tokenizer
    corpus/<source>-<key>/<split>/   token shards: train, validation, test (or whole, for evaluation sources)
    corpus/<source>-<key>/source.json   counts, drop reasons, contamination report
    plans/<digest>.json              which folders belong to a configuration
    order/                           shuffle orders, see ``packing``
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from datamodules.text.decontamination import ContaminationReport, EvaluationIndex, evaluation_files
from datamodules.text.dedup import Deduplicator, text_digest
from datamodules.text.files import FileDigests
from datamodules.text.filters import algebraic_stack
from datamodules.text.readers import Document, SourceFile, iterate_documents, list_files
from datamodules.text.shards import ShardWriter, write_shard
from datamodules.text.specs import (
    DecontaminationSpec,
    DedupSpec,
    EvalSourceSpec,
    ReadSpec,
    SourceSpec,
    TokenizerTraining,
)
from datamodules.text.tokenizer import TextTokenizer, check_tokenizer, tokenizer_hash, train_tokenizer
from modules.files import atomic_directory, canonical_digest, write_json

_PIPELINE = 1  # part of every key: raise it when the same input gives other shards
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000
_REPORT_SECONDS = 2.0
# Reading options that do not change what is read once the list of files is known.
_NOT_CONTENT = frozenset(
    (
        "name",
        "path",
        "glob",
        "package",
        "suffixes",
        "exclude",
        "missing",
        "weight",
        "holdout_fraction",
        "split",
        "licence",
    )
)


@dataclass
class CorpusPlan:
    """All that decides the content of a prepared corpus (not how it is mixed and packed)."""

    sources: list[SourceSpec]
    eval_sources: list[EvalSourceSpec]
    tokenizer: str | TokenizerTraining
    cache_dir: Path
    holdout_fraction: float
    dedup: DedupSpec
    decontaminate: DecontaminationSpec | None

    def digest(self) -> str:
        """Names the plan's file; the same on every rank without touching the corpus."""
        spec = dataclasses.asdict(self)
        del spec["cache_dir"]
        for source in spec["sources"]:
            del source["weight"], source["licence"]
        for source in spec["eval_sources"]:
            del source["split"], source["licence"]
        return canonical_digest([_PIPELINE, spec])[:24]

    @property
    def file(self) -> Path:
        return self.cache_dir / "plans" / f"{self.digest()}.json"


Say = Callable[[str], None]


def prepare(plan: CorpusPlan, say: Say = lambda line: None) -> dict[str, Any]:
    """Build what is missing of a corpus; safe to call from several processes at once.

    Args:
        say: receives progress lines.

    Returns:
        The manifest: ``{"tokenizer": folder or None, "tokenizer_hash", "sources": {name: {"folder", "digest",
        "splits", "report"}}, "missing": [names]}``, also written to ``plan.file``.

    Raises:
        FileNotFoundError, ValueError, OSError: one line each; nothing half-written stays.
    """
    plan.cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(plan.cache_dir / ".lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"waiting for another process that prepares a corpus in {plan.cache_dir}")
        lock.acquire()
    try:
        for left_over in (*plan.cache_dir.glob(".*.tmp"), *plan.cache_dir.glob("corpus/.*.tmp")):
            _remove(left_over)  # of a killed run; we hold the lock, so nobody is writing it
        return _prepare_locked(plan, say)
    finally:
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prepare_locked(plan: CorpusPlan, say: Say) -> dict[str, Any]:
    digests = FileDigests(plan.cache_dir / "files.json")
    inputs: dict[str, tuple[ReadSpec, list[SourceFile]]] = {}
    missing = []
    for spec in (*plan.sources, *plan.eval_sources):
        try:
            inputs[spec.name] = (spec, list_files(spec))
        except FileNotFoundError as error:
            if spec.missing == "error":
                raise
            say(f"left out: {error}")
            missing.append(spec.name)
    train = [spec for spec in plan.sources if spec.name in inputs]
    if not train:
        raise ValueError("corpus: no training source is present")
    content = {name: [[f.relative, digests[f.path]] for f in files] for name, (_, files) in inputs.items()}
    tested = [[path.name, digests[path]] for path in evaluation_files(plan.decontaminate)] if plan.decontaminate else []
    _refuse_evaluation_files(train, content, tested)
    digests.save()

    tokenizer, folder = _tokenizer(plan, train, inputs, content, say)
    index = None  # evaluation n-grams, indexed only if something is to be built
    cleaning = [dataclasses.asdict(plan.dedup), dataclasses.asdict(plan.decontaminate) if plan.decontaminate else None]
    if cleaning[1]:
        cleaning[1]["files"] = tested
    entries: dict[str, Any] = {}
    for name, (spec, files) in inputs.items():
        holdout = _holdout(plan, spec)
        cleaned = cleaning if holdout is not None else []
        key = canonical_digest([_PIPELINE, _content_options(spec), content[name], tokenizer.hash, holdout, cleaned])
        target = plan.cache_dir / "corpus" / f"{name}-{key[:16]}"
        if not (target / "source.json").is_file():
            if index is None and plan.decontaminate is not None and holdout is not None:
                index = EvaluationIndex.from_spec(plan.decontaminate)
            builder = _SourceBuilder(plan, spec, tokenizer, holdout, key, index, say)
            builder.build(files, target)
        report = json.loads((target / "source.json").read_text(encoding="utf-8"))
        entries[name] = {"folder": f"corpus/{target.name}", "digest": key, **report}
    manifest = {"tokenizer": folder, "tokenizer_hash": tokenizer.hash, "sources": entries, "missing": missing}
    write_json(plan.file, manifest)
    return manifest


def _content_options(spec: ReadSpec) -> dict[str, Any]:
    options = {key: value for key, value in dataclasses.asdict(spec).items() if key not in _NOT_CONTENT}
    return {**options, "package": spec.package is not None}


def _holdout(plan: CorpusPlan, spec: ReadSpec) -> float | None:
    """Held-out fraction of a training source; None for evaluation sources, which are not split or cleaned."""
    if not isinstance(spec, SourceSpec):
        return None
    return plan.holdout_fraction if spec.holdout_fraction is None else spec.holdout_fraction


def _refuse_evaluation_files(train: list[SourceSpec], content: dict[str, list], tested: list[list[str]]) -> None:
    names = {digest: name for name, digest in tested}
    for spec in train:
        for relative, digest in content[spec.name]:
            if digest in names:
                raise ValueError(
                    f"source {spec.name!r}: {relative} is the evaluation file {names[digest]}; never train on it "
                    f"(use it in eval_sources)"
                )


def _tokenizer(
    plan: CorpusPlan, train: list[SourceSpec], inputs: dict, content: dict, say: Say
) -> tuple[TextTokenizer, str | None]:
    """The tokenizer and, if it is a trained one, its folder below cache_dir."""
    if isinstance(plan.tokenizer, str):
        return TextTokenizer(plan.tokenizer), None
    holdout = [_holdout(plan, spec) for spec in train]
    parts = [[_content_options(spec), content[spec.name]] for spec in train]
    key = canonical_digest([_PIPELINE, dataclasses.asdict(plan.tokenizer), holdout, parts])
    folder = f"tokenizer-{key[:16]}"
    if not (plan.cache_dir / folder / "tokenizer.json").is_file():
        size, sample = plan.tokenizer.vocab_size, plan.tokenizer.sample_bytes
        say(f"training a tokenizer of {size} entries on up to {sample:,} bytes")
        budget = max(1, sample // len(train))
        texts = (
            text
            for spec, fraction in zip(train, holdout, strict=True)
            for text in _sample(spec, inputs[spec.name][1], budget, fraction or 0.0)
        )
        train_tokenizer(texts, size, plan.cache_dir / folder)
    return TextTokenizer(plan.cache_dir / folder), folder


def _sample(spec: SourceSpec, files: list[SourceFile], budget: int, holdout: float) -> Iterator[str]:
    """About ``budget`` bytes of training text, spread over the source by the hash of each document."""
    size = sum(item.path.stat().st_size * (4 if item.compressed else 1) for item in files)
    share = min(1.0, 1.2 * budget / max(1, min(size, spec.max_bytes or size)))
    taken = 0
    for document, length in kept_documents(spec, files, Counter()):
        digest = text_digest(document.text)
        if split_of(digest, holdout) != "train" or _uniform(b"tokenizer", digest) >= share:
            continue
        taken += length
        yield document.text
        if taken >= budget:
            return


def _uniform(salt: bytes, digest: bytes) -> float:
    return int.from_bytes(hashlib.sha256(salt + digest).digest()[:8], "big") / 2**64


def split_of(digest: bytes, fraction: float) -> str:
    """``train``, ``validation`` or ``test`` by a document's content digest.

    The choice depends on nothing else: not on the seed, the order or the rest of the corpus, so a held-out document
    stays held out in every later version of the corpus.
    """
    place = _uniform(b"held-out", digest)
    return "validation" if place < fraction else "test" if place < 2 * fraction else "train"


def _keep_all(document: Document) -> str:
    return ""


def kept_documents(
    spec: ReadSpec, files: list[SourceFile], dropped: Counter[str], clean: Callable[[Document], str] = _keep_all
) -> Iterator[tuple[Document, int]]:
    """(document, its UTF-8 bytes) after filter and ``clean`` (which names a reason to drop), within the caps."""
    documents = taken = 0
    for document in iterate_documents(spec, files, dropped):
        if spec.filter == "algebraic_stack":
            text, reason = algebraic_stack(document.text, document.suffix, spec.language)
            if text is None:
                dropped[reason] += 1
                continue
            document.text = text
        if reason := clean(document):
            dropped[reason] += 1
            continue
        size = len(document.text.encode("utf-8"))
        yield document, size
        documents += 1
        taken += size
        if documents == spec.max_documents or (spec.max_bytes is not None and taken >= spec.max_bytes):
            return


class _SourceBuilder:
    """Builds one source's folder."""

    def __init__(
        self, plan: CorpusPlan, spec: ReadSpec, tokenizer: TextTokenizer, holdout: float | None, key: str,
        index: EvaluationIndex | None, say: Say,
    ) -> None:  # fmt: skip
        self._spec, self._tokenizer, self._holdout, self._key, self._say = spec, tokenizer, holdout, key, say
        self._dedup = Deduplicator(plan.dedup) if holdout is not None else None
        mode = plan.decontaminate.mode if plan.decontaminate else "report"
        self._contamination = ContaminationReport(index, mode) if index is not None and holdout is not None else None
        self._dropped: Counter[str] = Counter()
        self._texts: dict[str, list[str]] = {}
        self._characters = 0

    def build(self, files: list[SourceFile], target: Path) -> None:
        started = reported = time.monotonic()
        documents = size = 0
        with atomic_directory(target) as folder, ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for document, length in kept_documents(self._spec, files, self._dropped, self._clean):
                documents, size = documents + 1, size + length
                split = "whole" if self._holdout is None else split_of(text_digest(document.text), self._holdout)
                self._texts.setdefault(split, []).append(document.text)
                self._characters += len(document.text)
                if self._characters >= _BATCH_CHARACTERS or documents % _BATCH_DOCUMENTS == 0:
                    self._flush(folder, writers, stack)
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    self._say(f"source {self._spec.name}: {documents:,} documents, {size / 1e6:.1f} MB")
            self._flush(folder, writers, stack)
            if not writers or ("train" not in writers and self._holdout is not None):
                reasons = ", ".join(f"{count} {reason}" for reason, count in self._dropped.most_common())
                left = reasons or "no document"
                raise ValueError(f"source {self._spec.name!r}: nothing left to train or measure on ({left})")
            stack.close()  # finishes the shards
            seconds = time.monotonic() - started
            write_json(folder / "source.json", self._report(writers, seconds))
        tokens = sum(writer.tokens for writer in writers.values())
        self._say(f"source {self._spec.name}: {documents:,} documents, {tokens:,} tokens in {seconds:.1f} s")

    def _clean(self, document: Document) -> str:
        if self._dedup is not None and (reason := self._dedup.duplicate(document.text)):
            return reason
        if self._contamination is not None and not self._contamination.keep(document.text, document.origin):
            return "contaminated"
        return ""

    def _flush(self, folder: Path, writers: dict[str, ShardWriter], stack: ExitStack) -> None:
        for split, texts in self._texts.items():
            if split not in writers:
                writers[split] = stack.enter_context(
                    write_shard(
                        folder / split,
                        vocab_size=self._tokenizer.vocab_size,
                        eod_id=self._tokenizer.eod_id,
                        tokenizer_hash=self._tokenizer.hash,
                        source_digest=self._key,
                    )
                )
            ids = self._tokenizer.encode_batch(texts)
            writers[split].append(ids, sum(len(text.encode("utf-8")) for text in texts))
        self._texts, self._characters = {}, 0

    def _report(self, writers: dict[str, ShardWriter], seconds: float) -> dict[str, Any]:
        splits = {
            split: {"tokens": writer.tokens, "documents": writer.documents, "text_bytes": writer.text_bytes}
            for split, writer in sorted(writers.items())
        }
        return {
            "splits": splits,
            "dropped": dict(sorted(self._dropped.items())),
            "seconds": round(seconds, 3),
            "contamination": self._contamination.summary() if self._contamination is not None else None,
        }


def load_manifest(plan: CorpusPlan) -> dict[str, Any]:
    """The manifest that ``prepare`` wrote.

    Raises:
        FileNotFoundError: the corpus was not prepared with this configuration.
        TokenizerMismatchError: the tokenizer directory changed since.
    """
    if not plan.file.is_file():
        raise FileNotFoundError(f"corpus in {plan.cache_dir} is not prepared for these options: run prepare_data()")
    manifest = json.loads(plan.file.read_text(encoding="utf-8"))
    check_tokenizer(manifest["tokenizer_hash"], tokenizer_hash(tokenizer_folder(plan, manifest)))
    return manifest


def tokenizer_folder(plan: CorpusPlan, manifest: dict[str, Any]) -> Path:
    """Directory of the corpus' tokenizer."""
    return plan.cache_dir / manifest["tokenizer"] if manifest["tokenizer"] else Path(str(plan.tokenizer))


def corpus_table(manifest: dict[str, Any]) -> str:
    """The corpus as a plain-text table."""
    head = ["source", "documents", "dropped", "train tokens", "validation", "test", "bytes/token", "contaminated"]
    rows = [head]
    for name, entry in manifest["sources"].items():
        splits = entry["splits"]
        tokens = {split: counts["tokens"] for split, counts in splits.items()}
        shown = [f"{tokens[split]:,}" if split in tokens else "-" for split in ("train", "validation", "test")]
        if "whole" in tokens:
            shown[1] = shown[2] = f"{tokens['whole']:,}"
        hit = entry["contamination"]["documents_hit"] if entry["contamination"] else "-"
        ratio = sum(counts["text_bytes"] for counts in splits.values()) / sum(tokens.values())
        documents = sum(counts["documents"] for counts in splits.values())
        rows.append([name, f"{documents:,}", f"{sum(entry['dropped'].values()):,}", *shown, f"{ratio:.2f}", str(hit)])
    return format_table(rows)


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
