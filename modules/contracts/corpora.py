"""Where language models and corpora meet beyond batches: excerpts to measure on, and disturbed training text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

TextSplit = Literal["train", "test"]
Disturbance = Callable[[str, int], str]
"""A pure function of text and seed."""


@dataclass(frozen=True)
class Excerpts:
    """Pieces of a corpus's documents, none across two of them; read on demand.

    Args:
        corpus: its name.
        tokens: ``[tokens]``, of any unsigned type, usually memory-mapped.
        starts: ``[pieces]`` int64, place of each first token.
        lengths: ``[pieces]`` int64.
    """

    corpus: str
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        """Token ids ``[length]`` int64."""
        start = int(self.starts[number])
        return self.tokens[start : start + int(self.lengths[number])].astype(np.int64)

    def key(self, number: int) -> str:
        """What identifies the piece: it never changes as long as the corpus does not."""
        return f"{self.corpus}:{int(self.starts[number])}"


@runtime_checkable
class ProvidesExcerpts(Protocol):
    """A datamodule whose text can be measured on, piece by piece; set up for any stage.

    ``tokenizer`` has ``encode(text)``, ``decode(ids)``, ``vocab_size`` and ``eod_id``. ``train`` is what training
    reads; ``test`` is held out of it, and model selection does not read it where there is more than one held-out split.
    """

    tokenizer: Any
    seq_len: int

    def corpora(self, split: TextSplit) -> tuple[str, ...]:
        """Names of the corpora that have text in ``split``."""
        ...

    def excerpts(self, split: TextSplit, corpus: str, length: int) -> Excerpts:
        """Pieces of ``length`` tokens; of a document's last piece what is left, unless that is very short."""
        ...

    def token_counts(self) -> np.ndarray:
        """``[vocab_size]`` float64: relative frequencies of tokens in the training stream, from a sample of it."""
        ...

    def stream_shares(self) -> Mapping[str, float]:
        """Training corpus -> its share of the tokens trained on; they add up to 1."""
        ...

    def licences(self) -> Mapping[str, str]:
        """Training corpus -> licence of its text; ``unknown`` where nobody said."""
        ...


@runtime_checkable
class ReportsContamination(Protocol):
    """A datamodule that knows which evaluation items stand in its training text."""

    @property
    def contamination(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Training corpus -> report of the corpus build, None where none was asked for."""
        ...


@runtime_checkable
class DisturbsText(Protocol):
    """A module that names the ways in which its training text may be disturbed, for data that are to do it."""

    def disturbances(self) -> Mapping[str, Disturbance]:
        """Name -> way; what a text means stays."""
        ...
