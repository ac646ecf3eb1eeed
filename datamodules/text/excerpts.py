"""Pieces of documents to measure on, and the licences of installed text."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping

import numpy as np

from datamodules.text.shards import TokenShard
from datamodules.text.specs import ReadSpec
from modules.contracts.corpora import Excerpts, TextSplit

LARGEST = 20_000  # pieces of one corpus: more are thinned out evenly
SHORTEST = 16  # tokens of a document's last piece
COUNTED = 2_000_000  # tokens of one corpus that frequencies are counted from
UNKNOWN = "unknown"
_LONGEST_LICENCE = 60


def pieces(corpus: str, shard: TokenShard, length: int, documents: np.ndarray | None = None) -> Excerpts:
    """A shard's documents cut into pieces of ``length`` tokens, the tokens that end documents left out.

    A document's last piece is what is left of it, and dropped below :data:`SHORTEST` tokens (or ``length // 4``).

    Args:
        documents: int64 numbers of the documents to take; None: all.

    Raises:
        ValueError: length below 2.
    """
    if length < 2:
        raise ValueError(f"excerpts of {corpus!r}: length must be at least 2, got {length}")
    begins, ends = shard.offset_array[:-1], shard.offset_array[1:] - 1
    if documents is not None:
        begins, ends = begins[documents], ends[documents]
    least = max(2, min(SHORTEST, length // 4))
    sizes = ends - begins
    counts = sizes // length + (sizes % length >= least)
    total = int(counts.sum())
    # thinned out by running number, so that nothing as long as the corpus is made
    number = np.arange(total) if total <= LARGEST else np.linspace(0, total - 1, LARGEST).astype(np.int64)
    after = np.cumsum(counts)
    document = np.searchsorted(after, number, side="right")
    within = number - (after - counts)[document]
    starts = begins[document] + within * length
    return Excerpts(corpus, shard.token_array, starts, np.minimum(length, ends[document] - starts))


def frequencies(shard: TokenShard, vocab_size: int) -> np.ndarray:
    """Relative frequencies ``[vocab_size]`` float64 of a shard's tokens, from evenly spread ones of a large shard."""
    step = -(-len(shard.token_array) // COUNTED)
    counted = np.bincount(shard.token_array[::step].astype(np.int64), minlength=vocab_size).astype(np.float64)
    return counted / counted.sum()


def licence_of(spec: ReadSpec) -> str:
    """What the config says; of an installed package else what its metadata say; else ``unknown``."""
    if spec.licence is not None:
        return spec.licence
    if spec.package is None:
        return UNKNOWN
    if spec.package == "stdlib" or spec.package in sys.stdlib_module_names:
        return "PSF-2.0"
    try:
        about = importlib.metadata.metadata(spec.package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(spec.package, [])
        if not names:
            return UNKNOWN
        about = importlib.metadata.metadata(names[0])
    classes = [one.split(" :: ")[-1] for one in about.get_all("Classifier") or [] if one.startswith("License ::")]
    stated = [about[name] if name in about else "" for name in ("License-Expression", "License")]  # noqa: SIM401
    for said in (stated[0], *classes, stated[1]):
        if said and len(said) <= _LONGEST_LICENCE and "\n" not in said:
            return said.strip()
    return UNKNOWN


class MeasuredCorpus:
    """The members of :class:`modules.contracts.corpora.ProvidesExcerpts`, over token shards."""

    def _shards(self, split: TextSplit) -> Mapping[str, TokenShard]:
        """Corpus -> shard."""
        raise NotImplementedError

    def corpora(self, split: TextSplit) -> tuple[str, ...]:
        """Names of the corpora that have text in ``split``."""
        return tuple(self._shards(split))

    def excerpts(self, split: TextSplit, corpus: str, length: int) -> Excerpts:
        """See :func:`pieces`.

        Raises:
            ValueError: the corpus has no text in ``split``.
        """
        shards = self._shards(split)
        if corpus not in shards:
            raise ValueError(f"excerpts: corpus {corpus!r} has no {split} text; those that have: {', '.join(shards)}")
        return pieces(corpus, shards[corpus], length)

    def stream_shares(self) -> Mapping[str, float]:
        """Training corpus -> its share of the tokens trained on."""
        raise NotImplementedError

    def token_counts(self) -> np.ndarray:
        """``[vocab_size]`` float64: relative frequencies of tokens in the training stream."""
        shards, shares = self._shards("train"), self.stream_shares()
        size = max(int(shard.meta["vocab_size"]) for shard in shards.values())
        return sum((shares[name] * frequencies(shard, size) for name, shard in shards.items()), np.zeros(size))
