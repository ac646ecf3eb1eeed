"""Pseudo-random permutations of huge ranges in O(1) memory."""

from __future__ import annotations

import hashlib

import numpy as np

from datamodules.text.ngrams import mix64

_ROUNDS = 12


def derive_keys(*parts: int | str) -> np.ndarray:
    """uint64 [rounds] keys from a seed and names; any change of a part gives unrelated keys."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.SeedSequence(np.frombuffer(digest, dtype=np.uint32).tolist()).generate_state(_ROUNDS, np.uint64)


class Permutation:
    """A keyed bijection of ``range(size)`` that is computed, not stored.

    An unbalanced Feistel network over the next power of two, walked until it falls back into the range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"); fewer than two walks on average.

    Args:
        size: length of the range, >= 1.
        keys: from ``derive_keys``; None gives the identity.
    """

    def __init__(self, size: int, keys: np.ndarray | None) -> None:
        if size < 1:
            raise ValueError(f"Permutation: size must be >= 1, got {size}")
        self.size = size
        self._keys = keys
        bits = max(2, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64 images of int64 ``index`` (each in ``range(size)``), same shape."""
        if self._keys is None or self.size == 1:
            return index.astype(np.int64)
        image = self._encrypt(index.astype(np.uint64))
        outside = np.flatnonzero(image >= self.size)
        while outside.size:
            image[outside] = self._encrypt(image[outside])
            outside = outside[image[outside] >= self.size]
        return image.astype(np.int64)

    def _encrypt(self, value: np.ndarray) -> np.ndarray:
        assert self._keys is not None
        high_bits, low_bits = self._high_bits, self._low_bits
        for key in self._keys:  # an even number of rounds brings the two widths back to their places
            low = value & np.uint64((1 << low_bits) - 1)
            high = value >> np.uint64(low_bits)
            # The low part moves up; the high part, masked by a hash of the low one, moves down.
            masked = high ^ (mix64(low + key) & np.uint64((1 << high_bits) - 1))
            value = (low << np.uint64(high_bits)) | masked
            high_bits, low_bits = low_bits, high_bits
        return value
