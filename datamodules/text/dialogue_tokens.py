"""Tokenizers for dialogues, and prompts and replies as padded batches of token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from filelock import FileLock
from tensordict import TensorDict
from torch.utils.data import Dataset

from datamodules.text.dialogues import END_OF_UTTERANCE, last_utterance
from datamodules.text.loader import HeldOutLoader, StreamPosition, TrainLoader
from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.tokenizer import END_OF_DOCUMENT, TextTokenizer, train_tokenizer
from modules.contracts import PromptSample
from modules.files import atomic_directory, canonical_digest
from modules.optional import require

IGNORED = -100
UNKNOWN = "<unk>"
Task = Literal["prompts", "sft", "intent", "preference"]
TASKS: tuple[Task, ...] = get_args(Task)


class Batches(Protocol):
    """Encoded data that gives rows as a batch; numbers past the end give rows that do not count."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray) -> TensorDict: ...

    def targets(self, rows: np.ndarray) -> int | None:
        """Number of targets that a loss over the rows is averaged over; None: it is the same for all rows."""
        ...


@dataclass(frozen=True)
class DialogueTokenizer:
    """A tokenizer to train on the training dialogues.

    Args:
        vocab_size: entries, special ones included; with ``word`` the most, as a small text has fewer words.
        kind: ``word``: the most frequent words (others become ``<unk>``), with ``<EOU>`` as a word of its own; ``bpe``:
            byte-level pairs.
    """

    vocab_size: int = 2000
    kind: Literal["word", "bpe"] = "word"

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.kind not in ("word", "bpe"):
            raise ValueError(f"DialogueDataModule: tokenizer.kind must be 'word' or 'bpe', got {self.kind!r}")
        least = 4 if self.kind == "word" else 300
        if self.vocab_size < least:
            raise ValueError(
                f"DialogueDataModule: tokenizer.vocab_size must be >= {least} for {self.kind}, got {self.vocab_size}"
            )


def train_word_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | Path) -> TextTokenizer:
    """The most frequent words of ``texts`` (split at whitespace) as a tokenizer, saved as a Hugging Face directory.

    Ids: ``<unk>`` 0, ``<EOU>`` 1, words by falling frequency, ``<|endoftext|>`` (ends a reply, and pads) last. Text
    that spells ``<|endoftext|>`` is an unknown word.
    """
    tokenizers = require("tokenizers", extra="rlhf")
    counts = Counter(word for text in texts for word in text.split())
    for special in (UNKNOWN, END_OF_UTTERANCE, END_OF_DOCUMENT):
        counts.pop(special, None)
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 3]
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, END_OF_UTTERANCE, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    # outside the model's own vocabulary, so that no text can spell it
    backend.add_special_tokens([END_OF_DOCUMENT])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }
    with atomic_directory(Path(directory)) as folder:
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return TextTokenizer(directory)


def tokenizer_folder(spec: DialogueTokenizer, texts: Sequence[str], cache_dir: Path) -> Path:
    """Where the tokenizer of these settings and texts is kept."""
    return cache_dir / f"tokenizer-{canonical_digest([1, asdict(spec), list(texts)])[:16]}"


def prepare_tokenizer(spec: DialogueTokenizer, texts: Sequence[str], cache_dir: Path) -> None:
    """Train the tokenizer unless it is there; processes that share the cache wait for one another."""
    folder = tokenizer_folder(spec, texts, cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(str(cache_dir / ".lock")):
        if (folder / "tokenizer.json").is_file():
            return
        if spec.kind == "word":
            train_word_tokenizer(texts, spec.vocab_size, folder)
        else:
            # the mark of an utterance's end stands behind each, or its pieces would hardly be merged
            train_tokenizer((f" {text} {END_OF_UTTERANCE}" for text in texts), spec.vocab_size, folder)


def encode_prompts(prompts: Sequence[str], tokenizer: TextTokenizer, limit: int) -> list[list[int]]:
    """Token ids of prompts, the last ``limit`` of each.

    Raises:
        ValueError: a prompt without any token.
    """
    encoded = tokenizer.encode_batch(list(prompts))
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"DialogueDataModule: prompt {number} has no tokens: {prompts[number][:60]!r}")
    return [ids[-limit:] for ids in encoded]


def encode_replies(replies: Sequence[str], tokenizer: TextTokenizer, limit: int) -> list[list[int]]:
    """Token ids of replies, each ended by ``eod_id`` where that fits into ``limit``.

    A longer reply is cut and does not end, so that nothing learns to stop in mid-sentence.
    """
    # with the space that stands before it in a dialogue: pieces of words depend on it
    return [[*ids, tokenizer.eod_id][:limit] for ids in tokenizer.encode_batch([f" {reply}" for reply in replies])]


class EncodedSamples:
    """Prompts and replies as token ids; see :func:`encode_prompts` and :func:`encode_replies`.

    Args:
        task: what a batch holds, see :class:`datamodules.dialogue_data.DialogueDataModule`.
    """

    def __init__(
        self,
        samples: Sequence[PromptSample],
        tokenizer: TextTokenizer,
        task: Task,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> None:
        self.task, self.eod_id = task, tokenizer.eod_id
        prompts = [last_utterance(one.prompt) if task == "intent" else one.prompt for one in samples]
        self.prompts = Ragged(encode_prompts(prompts, tokenizer, max_prompt_tokens))
        self.replies = Ragged(encode_replies([one.reference for one in samples], tokenizer, max_response_tokens))
        self.acts = np.array([one.labels["act"] for one in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.acts)

    def targets(self, rows: np.ndarray) -> int | None:
        return int(self.replies.length[rows].sum()) if self.task == "sft" else None

    def batch(self, rows: np.ndarray) -> TensorDict:
        """The rows as a batch; numbers past the end give rows that do not count."""
        present = rows < len(self)
        inside = np.where(present, rows, 0)
        if self.task == "sft":
            return self._language_batch(inside, present)
        content: dict[str, Any] = {}
        content["prompt_ids"], content["prompt_length"] = self.prompts.padded(inside, self.eod_id)
        if self.task == "intent":
            content["reply_ids"], content["reply_length"] = self.replies.padded(inside, self.eod_id)
            content["label"] = np.where(present, self.acts[inside], IGNORED)
        else:
            content["index"] = np.where(present, rows, -1)
        return TensorDict({name: torch.from_numpy(value) for name, value in content.items()}, batch_size=[rows.size])

    def _language_batch(self, inside: np.ndarray, present: np.ndarray) -> TensorDict:
        prompt, reply = self.prompts.length[inside], self.replies.length[inside]
        total = prompt + reply
        tokens = np.full((inside.size, int(total.max())), self.eod_id, dtype=np.int64)
        for row, number in enumerate(inside):
            tokens[row, : prompt[row]] = self.prompts[number]
            tokens[row, prompt[row] : total[row]] = self.replies[number]
        place = np.arange(1, tokens.shape[1])
        counted = (place >= prompt[:, None]) & (place < total[:, None]) & present[:, None]
        batch = {
            "input_ids": torch.from_numpy(tokens[:, :-1].copy()),
            "labels": torch.from_numpy(np.where(counted, tokens[:, 1:], IGNORED)),
        }
        return TensorDict(batch, batch_size=[inside.size])


class Ragged:
    """Lists of token ids in one array."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self.length = np.array([len(ids) for ids in lists], dtype=np.int64)
        self._start = np.concatenate(([0], np.cumsum(self.length)))
        self._tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids in lists])

    def __getitem__(self, number: int) -> np.ndarray:
        return self._tokens[self._start[number] : self._start[number + 1]]

    def padded(self, rows: np.ndarray, filler: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 ``[n, longest]`` padded on the right, and lengths int64 ``[n]``."""
        length = self.length[rows]
        ids = np.full((rows.size, int(length.max())), filler, dtype=np.int64)
        for row, number in enumerate(rows):
            ids[row, : length[row]] = self[number]
        return ids, length


def rows_of(items: np.ndarray, size: int, *keys: int | str) -> np.ndarray:
    """Rows of running item numbers: item i is place ``i % size`` of the order of epoch ``i // size``."""
    epochs, places = np.divmod(items, size)
    rows = np.empty_like(items)
    for epoch in np.unique(epochs).tolist():
        rows[epochs == epoch] = Permutation(size, derive_keys(*keys, epoch))(places[epochs == epoch])
    return rows


class _TrainBatches(Dataset):
    def __init__(self, data: Batches, seed: int) -> None:
        self._data, self._seed = data, seed

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray, np.ndarray]) -> TensorDict:
        size = len(self._data)
        batch = self._data.batch(rows_of(index[1], size, self._seed, "dialogues"))
        targets = self._data.targets(rows_of(index[2], size, self._seed, "dialogues"))
        if targets is not None:
            batch["step_targets"] = torch.full((index[1].size,), targets, dtype=torch.int64)
        return batch


class DialogueTrainLoader(TrainLoader):
    """The corpus' step-to-samples function (see :class:`datamodules.text.loader.TrainLoader`) over encoded rows."""

    def __init__(self, data: Batches, seed: int, position: StreamPosition, **options: Any) -> None:
        super().__init__([], position, **options)
        self._windows = _TrainBatches(data, seed)

    def _select(self, source: np.ndarray, item: np.ndarray, chosen: slice) -> tuple[np.ndarray, ...]:
        return source[chosen], item[chosen], item


class _HeldOutBatches(Dataset):
    def __init__(self, data: Batches) -> None:
        self.windows = data

    def __getitem__(self, rows: np.ndarray) -> TensorDict:
        return self.windows.batch(rows)


class DialogueHeldOutLoader(HeldOutLoader):
    """Rows in their order, every rank as many (see :class:`datamodules.text.loader.HeldOutLoader`)."""

    def __init__(self, data: Batches, **options: Any) -> None:
        super().__init__(data, 0, **options)  # type: ignore[arg-type]
        self._dataset = _HeldOutBatches(data)
