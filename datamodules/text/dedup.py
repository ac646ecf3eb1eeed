"""Deduplication inside a source: exact by SHA-256, near by MinHash with locality-sensitive banding."""

from __future__ import annotations

import hashlib

import numpy as np

from datamodules.text.ngrams import SortedSet, mix64, ngram_hashes, normalised, word_hashes
from datamodules.text.specs import DedupSpec

_CHUNK = 4096


def text_digest(text: str) -> bytes:
    """SHA-256 of the text with whitespace runs made single spaces (case is kept)."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


class MinHash:
    """MinHash signatures (Broder 1997) over word n-grams.

    Each of the ``bands * rows`` hash functions is a seeded bijection of 64-bit shingle hashes; its minimum over the
    document's shingles agrees between two documents with probability equal to their Jaccard similarity.
    """

    def __init__(self, ngram: int = 5, bands: int = 16, rows: int = 8) -> None:
        self.ngram, self.bands, self.rows = ngram, bands, rows
        self._keys = mix64(np.arange(1, bands * rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def signature(self, text: str) -> np.ndarray:
        """uint64 [bands * rows]. A document shorter than ``ngram`` words counts as one shingle."""
        words = word_hashes(normalised(text))
        shingles = np.unique(ngram_hashes(words, min(self.ngram, max(1, words.size))))
        best = np.full(self._keys.size, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, shingles.size, _CHUNK):
            part = mix64(shingles[None, start : start + _CHUNK] ^ self._keys[:, None])
            np.minimum(best, part.min(axis=1), out=best)
        return best

    def band_keys(self, text: str) -> np.ndarray:
        """uint64 [bands]: one key per band of ``rows`` signature entries, different bands never comparable."""
        signature = self.signature(text).reshape(self.bands, self.rows)
        key = np.arange(1, self.bands + 1, dtype=np.uint64)
        for row in range(self.rows):
            key = mix64(key * np.uint64(0xD1342543DE82EF95) + signature[:, row])
        return key


class Deduplicator:
    """Says of each document, in stream order, whether it repeats an earlier one."""

    def __init__(self, spec: DedupSpec) -> None:
        self._exact = SortedSet("S32") if spec.exact else None
        self._minhash = MinHash(spec.ngram, spec.bands, spec.rows) if spec.near else None
        self._bands = SortedSet(np.uint64)

    def duplicate(self, text: str) -> str:
        """``"duplicate"``, ``"near_duplicate"`` or ``""``; a new document is remembered."""
        if self._exact is not None:
            # numpy strips trailing zero bytes of "S" values; at a fixed length of 32 that loses nothing.
            digest = np.array([text_digest(text)], dtype="S32")
            if self._exact.contains(digest)[0]:
                return "duplicate"
            self._exact.add(digest)
        if self._minhash is not None:
            keys = self._minhash.band_keys(text)
            if self._bands.contains(keys).any():
                return "near_duplicate"
            self._bands.add(keys)
        return ""
