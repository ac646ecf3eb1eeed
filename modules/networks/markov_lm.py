"""A language model that is a table: the next token's logits by condition, position and previous token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NEVER = -1e4
"""Logit of tokens that are never generated; its exponential is exactly 0, yet nothing becomes NaN."""


@dataclass(frozen=True)
class MarkovConfig:
    """Sizes of a :class:`MarkovLM`.

    Args:
        conditions: values of the first prompt token, whose ids follow the symbols'.
        positions: tokens of a response.
        symbols: tokens that responses are made of, ids from 0.
    """

    conditions: int = 2
    positions: int = 10
    symbols: int = 40

    @property
    def vocab_size(self) -> int:
        return self.symbols + self.conditions

    @property
    def hidden_size(self) -> int:
        return self.symbols + 1

    @property
    def max_position_embeddings(self) -> int:
        return self.positions + 2


class MarkovCache:
    """What decoding remembers: each row's condition, and how many tokens it holds."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.condition = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.capacity, self.extent = capacity, 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths.to(self.lengths)

    def select(self, rows: Tensor, capacity: int | None = None) -> MarkovCache:
        new = MarkovCache(len(rows), capacity or self.capacity, self.lengths.device)
        new.condition, new.lengths, new.extent = self.condition[rows], self.lengths[rows], self.extent
        return new


class MarkovLM(nn.Module):
    """Tabular policy of the GoldProxy problem, with a causal language model's interface.

    A prompt is two tokens: the condition (id ``symbols + c``) and a first symbol. The hidden state at a position is the
    table's row of logits with a constant 1 behind; the output head is the identity on it, frozen.

    Args:
        config: sizes.
        table: start logits ``[conditions, positions, symbols, symbols]``; ``None``: zeros (uniform).
    """

    def __init__(self, config: MarkovConfig, table: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        shape = (config.conditions, config.positions, config.symbols, config.symbols)
        if table is not None and tuple(table.shape) != shape:
            raise ValueError(f"MarkovLM: table must be {shape}, got {tuple(table.shape)}")
        self.table = nn.Parameter(torch.zeros(shape) if table is None else table.clone())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.zero_()
            self.lm_head.weight[: config.symbols, : config.symbols] = torch.eye(config.symbols)
            self.lm_head.weight[config.symbols :, config.symbols] = _NEVER
        self.lm_head.requires_grad_(False)

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype | None = None) -> MarkovCache:
        return MarkovCache(rows, capacity, self.table.device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_pattern: Tensor | None = None,
        cache: MarkovCache | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, symbols + 1]`` of tokens int64 ``[B, T]``; options as for other models.

        Position 0 is the condition's and has no row of its own (position 1's is given); padding gives any row.
        """
        config = self.config
        if document_ids is not None or attention_mask is not None:
            raise ValueError("MarkovLM: takes prompts padded on the right only: no document_ids, no attention_mask")
        if cache is not None and cache.extent:
            condition = cache.condition[:, None]
            position_ids = cache.lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            condition = (input_ids[:, :1] - config.symbols).clamp(0, config.conditions - 1)
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            if cache is not None:
                cache.condition = condition[:, 0]
        if cache is not None:
            cache.lengths = cache.lengths + input_ids.shape[1]
            cache.extent += input_ids.shape[1]
        rows = self.table[
            condition,
            (position_ids - 1).clamp(0, config.positions - 1),
            input_ids.clamp(max=config.symbols - 1),
        ]
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits ``[..., symbols + conditions]``."""
        return self.lm_head(hidden)
