"""Preallocated key/value cache for incremental decoding; rows may have different lengths."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, `states` [layers, 2, rows, kv_heads, capacity, head_dim], and each row's length.

    Prompts are right-padded. All rows write their next tokens at the same slots, from `extent` on, so that a step is
    one slice; what padding wrote before is a gap that is masked and never attended to. So a row's results do not depend
    on its neighbours' lengths. A token's position is the number of its row's tokens before it (`lengths`), not its
    slot.
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
        # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would be NaN.
        self.states = torch.zeros((layers, 2, rows, kv_heads, capacity, head_dim), dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.extent = 0  # slots written, kept on the host so that no step waits for the device
        self.rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [capacity, d/2], where the model uses them
        self._chunk = 0  # tokens last written
        self._gap: Tensor | None = None  # [rows, 1, 1, capacity], -inf in masked slots; None: there are none

    @property
    def keys(self) -> Tensor:
        """[layers, rows, kv_heads, capacity, head_dim], a view."""
        return self.states[:, 0]

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.states[:, 1]

    @property
    def rows(self) -> int:
        return self.states.shape[2]

    @property
    def capacity(self) -> int:
        return self.states.shape[4]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next tokens' keys, values [B, KV, T, D] of a layer; return all its keys and values so far."""
        stop = self.extent + keys.shape[2]
        stored = self.states[layer, ..., :stop, :]
        stored[0, :, :, self.extent :] = keys
        stored[1, :, :, self.extent :] = values
        return stored[0], stored[1]

    def write_pair(self, layer: int, pair: Tensor) -> tuple[Tensor, Tensor]:
        """`write` of keys and values in one tensor [2, B, KV, T, D]: one copy."""
        stored = self.states[layer, ..., : self.extent + pair.shape[3], :]
        stored[..., self.extent :, :] = pair
        return stored[0], stored[1]

    def positions(self, tokens: int) -> Tensor:
        """Positions int64 [rows, tokens] of the next `tokens` tokens."""
        first = self.lengths[:, None]
        return first if tokens == 1 else first + torch.arange(tokens, device=first.device)

    def mask(self, tokens: int) -> Tensor | None:
        """Additive attention mask of the next tokens, [rows or 1, 1, tokens or 1, extent + tokens]; None: no mask."""
        total = self.extent + tokens
        gap = None if self._gap is None else self._gap[..., :total]
        if tokens == 1:
            return gap
        future = torch.full((tokens, total), float("-inf"), dtype=self.states.dtype, device=self.states.device)
        future = future.triu_(self.extent + 1)[None, None]
        return future if gap is None else future + gap

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens in every row."""
        self.lengths += tokens
        self.extent += tokens
        self._chunk = tokens

    def set_lengths(self, lengths: Tensor) -> None:
        """State the real lengths [rows] after a right-padded prompt: what was just written beyond is padding."""
        lengths = lengths.to(self.lengths)
        real = lengths - (self.lengths - self._chunk)
        self.lengths = lengths.clone()
        if bool((real == self._chunk).all()):
            return
        slots = torch.arange(self.capacity, device=real.device) - (self.extent - self._chunk)
        padding = (slots >= real[:, None]) & (slots < self._chunk)
        if self._gap is None:
            self._gap = torch.zeros(self.rows, 1, 1, self.capacity, dtype=self.states.dtype, device=self.states.device)
        self._gap = self._gap.masked_fill(padding[:, None, None], float("-inf"))

    def select(self, rows: Tensor, capacity: int | None = None) -> KVCache:
        """A cache of the given rows (repeats allowed), optionally with another capacity."""
        layers, _, _, kv_heads, old, width = self.states.shape
        capacity = capacity or old
        new = KVCache(layers, len(rows), kv_heads, capacity, width, dtype=self.states.dtype, device=self.states.device)
        new.states[..., : self.extent, :] = self.states[..., : self.extent, :].index_select(2, rows)
        new.lengths = self.lengths[rows]
        new.extent, new._chunk = self.extent, self._chunk
        if capacity == old:
            new.rotary = self.rotary
        if self._gap is not None:
            shape = (len(rows), 1, 1, capacity)
            new._gap = torch.zeros(shape, dtype=self.states.dtype, device=self.states.device)
            new._gap[..., : self.extent] = self._gap[rows][..., : self.extent]
        return new
