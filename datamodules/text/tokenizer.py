"""Tokenizers from Hugging Face directories, trained ones too, and the hash that ties data to a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modules.files import atomic_directory, read_json_object, tokenizer_digest
from modules.optional import require

END_OF_DOCUMENT = "<|endoftext|>"


class TokenizerMismatchError(ValueError):
    """Token data and model (or two parts of a corpus) were made with different tokenizers."""

    def __init__(self, have: str, want: str, what: str = "data") -> None:
        super().__init__(
            f"{what} prepared with {have[:12]}, model expects {want[:12]}: prepare the corpus again with the model's "
            f"tokenizer directory, or load the model that belongs to this corpus"
        )


def tokenizer_hash(directory: str | Path) -> str:
    """Identity of the directory's tokenizer (:func:`modules.files.tokenizer_digest`)."""
    return tokenizer_digest(_read_json(Path(directory) / "tokenizer.json"))


def check_tokenizer(have: str, want: str, what: str = "data") -> None:
    """Raise TokenizerMismatchError unless the two hashes are equal."""
    if have != want:
        raise TokenizerMismatchError(have, want, what)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} does not exist; give a directory that holds tokenizer.json")
    return read_json_object(path, "tokenizer")


class TextTokenizer:
    """A tokenizer directory, ready to encode a corpus.

    Text is data here: a document that spells ``<|endoftext|>`` or ``</s>`` gets ordinary tokens, never the special one,
    and nothing is truncated, padded or wrapped in BOS/EOS whatever the directory's settings say.

    Attributes:
        hash: see ``tokenizer_hash``.
        vocab_size: largest token id + 1, added tokens included.
        eod_id: token put after each document (the directory's ``eos_token``).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        content = _read_json(self.directory / "tokenizer.json")
        tokenizers = require("tokenizers", extra="llemma")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        except Exception as error:  # the Rust side raises bare Exception
            reason = str(error)[:160]
            raise ValueError(f"tokenizer: {self.directory / 'tokenizer.json'} can't be loaded ({reason})") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.hash = tokenizer_digest(content)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if not (self.directory / name).is_file():
                continue
            token = _read_json(self.directory / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and (number := self._backend.token_to_id(token)) is not None:
                return number
        raise ValueError(f"tokenizer: {self.directory} names no eos_token of its vocabulary, needed to end documents")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text (parallel in the library's own threads); no special tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, byte for byte, into an existing or new directory."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (self.directory / name).is_file():
                (target / name).write_bytes((self.directory / name).read_bytes())


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | Path, blanks_apart: bool = False
) -> TextTokenizer:
    """Train a byte-level BPE whose digits are single tokens (as Llama's), and save it as a Hugging Face directory.

    Any text survives encode and decode unchanged: all 256 bytes are in the vocabulary and nothing is normalised.

    Args:
        texts: streamed; held only as word counts.
        vocab_size: entries, ``<|endoftext|>`` (id 0) included.
        blanks_apart: a blank is a token of its own, so that a word has the same tokens behind a blank and behind a
            quote: what small models need to copy it. Texts take more tokens.

    Raises:
        ValueError: the texts are too few for ``vocab_size`` entries.
    """
    tokenizers = require("tokenizers", extra="llemma")
    pre, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = [pre.Split(" ", "isolated")] if blanks_apart else []
    backend.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), *split, pre.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"tokenizer: the text sample yields only {found} of vocab_size={vocab_size} entries; lower it")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }
    with atomic_directory(Path(directory)) as folder:
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return TextTokenizer(directory)
