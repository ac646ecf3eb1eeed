"""Preallocated key/value cache for incremental decoding; rows may have different lengths."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, [layers, rows, kv_heads, capacity, head_dim], and the tokens each row holds.

    Prompts are right-padded: a row's keys sit at slots 0..length-1, what padding wrote beyond is overwritten by the
    row's next tokens and never attended to. So a row's results do not depend on its neighbours' lengths.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if capacity < 1 or rows < 1:
            raise ValueError(f"KVCache: rows and capacity must be >= 1, got {rows} and {capacity}")
        shape = (layers, rows, kv_heads, capacity, head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.extent = 0  # upper bound of `lengths`, kept on the host so that no step waits for the device

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store keys, values [B, KV, T, D] at slots `positions` [B, T] (None: 0..T-1); return all written so far."""
        stop = self.extent + keys.shape[2]
        if positions is None:
            self.keys[layer, :, :, : keys.shape[2]] = keys
            self.values[layer, :, :, : keys.shape[2]] = values
        else:
            rows = torch.arange(self.rows, device=keys.device)[:, None]
            self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens in every row."""
        self.lengths += tokens
        self.extent += tokens

    def set_lengths(self, lengths: Tensor) -> None:
        """State the real lengths [rows] after a right-padded prompt."""
        self.lengths = lengths.to(self.lengths)

    def select(self, rows: Tensor, capacity: int | None = None) -> KVCache:
        """A cache of the given rows (repeats allowed), optionally with another capacity."""
        layers, _, kv_heads, old, width = self.keys.shape
        new = KVCache(
            layers, len(rows), kv_heads, capacity or old, width, dtype=self.keys.dtype, device=self.keys.device
        )
        new.keys[..., : self.extent, :] = self.keys[:, rows, :, : self.extent]
        new.values[..., : self.extent, :] = self.values[:, rows, :, : self.extent]
        new.lengths = self.lengths[rows]
        new.extent = self.extent
        return new
