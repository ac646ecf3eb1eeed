"""The text that every loop trains on: Python's standard library through the real corpus DataModule.

Peers read the token file of the shard it writes; Plumbline reads the shard through the DataModule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_BYTES = 3_000_000  # about 800,000 tokens: more than any run of this benchmark uses


def corpus_arguments(cache: Path, vocab: int, seq_len: int, batch: int, seed: int) -> dict[str, Any]:
    """Arguments of ``CorpusDataModule``; nothing is held out, so the shard is the whole text."""
    return {
        "sources": [{"name": "stdlib", "package": "stdlib", "max_bytes": MAX_BYTES}],
        "tokenizer": {"vocab_size": vocab, "sample_bytes": MAX_BYTES},
        "cache_dir": str(cache),
        "seq_len": seq_len,
        "batch_size": batch,
        "seed": seed,
        "holdout_fraction": 0.0,
    }


def prepare_corpus(cache: Path, vocab: int, seq_len: int, batch: int, seed: int) -> Path:
    """Build the corpus if it is not there and return its token file (uint16)."""
    from datamodules.corpus_data import CorpusDataModule
    from datamodules.text.build import load_manifest

    data = CorpusDataModule(**corpus_arguments(cache, vocab, seq_len, batch, seed))
    data.prepare_data()
    (source,) = load_manifest(data.plan)["sources"].values()
    return cache / source["folder"] / "train" / "tokens.bin"
