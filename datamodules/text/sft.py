"""Supervised finetuning text: prompt and response pairs, tokenised once, laid out in rows with the prompt masked.

An example's tokens are ``prompt + response + end-of-document``; only response and end-of-document are targets
(Azerbayev et al. 2024, section 5, finetunes on MetaMathQA this way). Prompt and response are tokenised apart, as they
are at generation time, so the mask falls on a token boundary.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.text.permutation import Permutation, derive_keys
from datamodules.text.readers import SourceFile, iterate_records
from datamodules.text.shards import TokenShard, write_shard
from datamodules.text.tokenizer import TextTokenizer
from modules.files import atomic_directory, canonical_digest, sha256_file, write_bytes

IGNORED = -100
_FIELD = re.compile(r"\{(\w+)\}")
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_LONGEST_LINE = 16 * 2**20
_BATCH = 1024
# columns of examples.bin
_PROMPT, _SOURCE, _LINE, _DIGEST = range(4)


@dataclass
class SFTSource:
    """A file of examples.

    Args:
        name: short name, for metrics.
        path: JSON lines, plain or ``.zst``.
        prompt: text of the prompt, with ``{field}`` for fields of the row, e.g. ``"Q: {question}\\nA:"``.
        response: likewise, what the model has to write, e.g. ``" {answer}"``.
        strip_calculator_marks: remove GSM8K's ``<<a=b>>`` annotations from both.
        licence: of the text (an SPDX name), for model cards; None = unknown.
    """

    name: str
    path: str
    prompt: str = "{prompt}"
    response: str = "{response}"
    strip_calculator_marks: bool = False
    licence: str | None = None

    def check(self) -> None:
        """Raise one-line ValueErrors for what can be seen without reading the file."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"SFT source {self.name!r}: name must be letters, digits, '_', '-' or '.'")
        for key in ("prompt", "response"):
            if not _FIELD.search(getattr(self, key)):
                raise ValueError(
                    f"SFT source {self.name!r}: {key} uses no {{field}} of the rows: {getattr(self, key)!r}"
                )
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"SFT source {self.name!r}: no file {self.path}")

    def examples(self) -> Iterator[tuple[int, str, str]]:
        """(line number, prompt, response) of every row.

        Raises:
            ValueError: ``<file>:<line>`` is not a JSON object, lacks a field, or gives an empty prompt or response.
        """
        path = Path(self.path)
        dropped: Counter[str] = Counter()
        for line, row in iterate_records(SourceFile(path, path.name), _LONGEST_LINE, dropped, _refuse):
            where = f"{path}:{line}"
            prompt, response = (self._fill(template, row, where) for template in (self.prompt, self.response))
            for key, text in (("prompt", prompt), ("response", response)):
                if not text.strip():
                    raise ValueError(f"{where}: empty {key}")
            yield line, prompt, response
        if dropped["oversize"]:
            raise ValueError(f"{path}: {dropped['oversize']} lines are longer than {_LONGEST_LINE} bytes")

    def _fill(self, template: str, row: Mapping[str, Any], where: str) -> str:
        def value(match: re.Match[str]) -> str:
            field = match[1]
            if field not in row:
                raise ValueError(f"{where}: field '{field}' is missing; the line has {sorted(row)}")
            if isinstance(row[field], bool) or not isinstance(row[field], str | int | float):
                raise ValueError(f"{where}: field '{field}' must be text, got {type(row[field]).__name__}")
            return str(row[field])

        text = _FIELD.sub(value, template)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half a surrogate pair in the text, which no tokenizer takes") from None
        return _CALCULATOR_MARK.sub("", text) if self.strip_calculator_marks else text


def _refuse(message: str) -> None:
    raise ValueError(message)


def sft_folder(sources: Sequence[SFTSource], tokenizer: TextTokenizer, cache_dir: Path) -> Path:
    """Cache folder of these examples under this tokenizer, named by a digest of all that shapes the tokens."""
    content = [{**asdict(source), "path": sha256_file(Path(source.path))} for source in sources]
    for source in content:
        del source["licence"]  # shapes no token
    return cache_dir / f"sft-{canonical_digest([content, tokenizer.hash])[:24]}"


def prepare_sft(sources: Sequence[SFTSource], tokenizer: TextTokenizer, cache_dir: Path) -> Path:
    """Tokenise the examples into a cache folder (streamed, whole or absent) unless it is there already.

    The folder holds a token shard, one document an example, and ``examples.bin``, int64 [examples, 4]: prompt tokens,
    source number, line in its file, first 8 bytes of the text's SHA-256.

    Returns:
        The folder.

    Raises:
        ValueError: no examples in a file, or as :meth:`SFTSource.examples`.
        OSError: from the disk, a full one as one line.
    """
    folder = sft_folder(sources, tokenizer, cache_dir)
    if folder.is_dir():
        return folder
    options = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "tokenizer_hash": tokenizer.hash}
    with (
        atomic_directory(folder) as partial,
        open(partial / "examples.bin", "wb") as table,
        write_shard(partial / "tokens", source_digest=folder.name, **options) as writer,
    ):
        for number, source in enumerate(sources):
            before, examples = writer.documents, source.examples()
            while batch := list(islice(examples, _BATCH)):
                lines, prompts, responses = zip(*batch, strict=True)
                heads, tails = tokenizer.encode_batch(list(prompts)), tokenizer.encode_batch(list(responses))
                texts = [(prompt + response).encode() for prompt, response in zip(prompts, responses, strict=True)]
                keys = [int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True) for text in texts]
                columns = ([len(head) for head in heads], [number] * len(batch), lines, keys)
                write_bytes(table, np.array(columns, dtype="<i8").T.tobytes())
                writer.append([[*head, *tail] for head, tail in zip(heads, tails, strict=True)], sum(map(len, texts)))
            if writer.documents == before:
                raise ValueError(f"SFT source {source.name!r}: {source.path} holds no examples")
    return folder


class SFTRows:
    """Examples of one prepared folder laid out in rows of ``seq_len`` targets.

    Row r holds one example (``packing`` off) or several whole ones of the same source (on: best-fit decreasing, made
    once). No target crosses from one example into the next. The rest of a row is filled with end-of-document tokens
    and ignored labels.

    Args:
        folder: from :func:`prepare_sft`.
        sources: the sources it was made from.
        tokenizer_hash, filler: of the tokenizer in use; ``filler`` is its end-of-document token.
        seq_len: T, targets per row.
        packing: several examples a row.
        overlong: what to do with an example of more than ``seq_len + 1`` tokens.
        split: ``train`` or ``validation``; ``holdout_fraction`` of the examples, by the hash of their text, validate.
        source: take this source only; None = all.
        seed: of the order of rows, which is another one every epoch.

    Attributes:
        row_source: int64 [rows], source number of every row.
        row_targets: int64 [rows], labels of every row that are not -100.
        shard: the examples of all splits, one document each.
        dropped: examples left out as overlong.

    Raises:
        ValueError: an overlong example (``overlong: error``), named by file and line; no example left.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[SFTSource],
        tokenizer_hash: str,
        filler: int,
        seq_len: int,
        packing: bool = False,
        overlong: Literal["error", "drop"] = "error",
        split: Literal["train", "validation"] = "train",
        source: int | None = None,
        holdout_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.seq_len, self.split, self._seed, self._filler = seq_len, split, seed, filler
        self.shard = TokenShard(folder / "tokens", tokenizer_hash=tokenizer_hash)
        table = np.fromfile(folder / "examples.bin", dtype="<i8")
        if table.size != 4 * self.shard.meta["documents"]:
            raise ValueError(f"SFT cache {folder}: examples.bin does not fit its tokens; delete the folder")
        table = table.reshape(-1, 4)
        self._prompt = table[:, _PROMPT]
        # The first token is never a target: n tokens take n - 1 places.
        self._length = np.diff(self.shard.offset_array) - 1
        held_out = table[:, _DIGEST].astype(np.uint64) < np.uint64(round(holdout_fraction * (2**64 - 1)))
        chosen = held_out if split == "validation" else ~held_out
        if source is not None:
            chosen &= table[:, _SOURCE] == source
        overlong_ones = np.flatnonzero(chosen & (self._length > seq_len))
        if overlong_ones.size and overlong == "error":
            _, number, line, _ = table[overlong_ones[0]].tolist()
            raise ValueError(
                f"{sources[number].path}:{line}: {self._length[overlong_ones[0]] + 1} tokens with the end-of-document "
                f"token, more than seq_len + 1 = {seq_len + 1} ({overlong_ones.size} such examples); raise seq_len or "
                f"set overlong: drop"
            )
        self.dropped = int(overlong_ones.size)
        kept = np.flatnonzero(chosen & (self._length <= seq_len))
        if not kept.size and split == "train":
            raise ValueError(
                f"SFT: no example is left for training (holdout_fraction {holdout_fraction}, {self.dropped} overlong)"
            )
        rows: list[np.ndarray] = []
        for number in range(len(sources)):
            of_source = kept[table[kept, _SOURCE] == number]
            rows += _pack(of_source, self._length, seq_len) if packing else list(of_source[:, None])
        self._example_source = table[:, _SOURCE]
        self._order = np.concatenate(rows) if rows else kept
        self._starts = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
        self.row_source = table[self._order[self._starts[:-1]], _SOURCE]
        # a target counts if it lies in the response: places prompt - 1 to length - 1 of an example
        counted = self._length[self._order] - np.clip(self._prompt[self._order] - 1, 0, None)
        totals = np.concatenate(([0], np.cumsum(np.clip(counted, 0, None))))
        self.row_targets = totals[self._starts[1:]] - totals[self._starts[:-1]]
        self._epochs: dict[int, Permutation] = {}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def examples_of(self, source: int) -> np.ndarray:
        """Numbers of a source's examples in the rows, which are those of the shard's documents: int64, ascending."""
        return np.sort(self._order[self._example_source[self._order] == source])

    @property
    def fill(self) -> float:
        """Share of the places in all rows that hold an example."""
        return float(self._length[self._order].sum()) / (max(1, len(self)) * self.seq_len)

    def rows_of(self, items: np.ndarray) -> np.ndarray:
        """Rows of running item numbers: item i is place ``i % rows`` of epoch ``i // rows``'s order."""
        epochs, places = np.divmod(items, len(self))
        rows = np.empty_like(items)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._epochs:
                self._epochs = {epoch: Permutation(len(self), derive_keys(self._seed, "sft", epoch))}
            rows[epochs == epoch] = self._epochs[epoch](places[epochs == epoch])
        return rows

    def fetch(self, rows: np.ndarray, document_ids: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Read rows; numbers >= len(self) give rows without any target.

        Args:
            rows: int64 [n].
            document_ids: also number the examples inside each row; the filler gets the next number.

        Returns:
            input_ids int64 [n, T], labels int64 [n, T] (already shifted, -100 where nothing is to be learnt), document
            ids int32 [n, T] or None.
        """
        shape = (rows.size, self.seq_len)
        inputs = np.full(shape, self._filler, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        present = rows < len(self)
        inside = np.where(present, rows, 0)
        first = self._starts[inside]
        count = np.where(present, self._starts[inside + 1] - first, 0)
        # one piece an example
        piece_row = np.repeat(np.arange(rows.size), count)
        piece = np.arange(piece_row.size) - np.repeat(np.cumsum(count) - count, count)
        example = self._order[np.repeat(first, count) + piece]
        length = self._length[example]
        before = np.cumsum(length) - length
        row_begin = np.concatenate((before, [length.sum()]))[np.cumsum(count) - count]
        # one entry a target
        within = np.arange(int(length.sum())) - np.repeat(before, length)
        row = np.repeat(piece_row, length)
        column = np.repeat(before - row_begin[piece_row], length) + within
        source = np.repeat(self.shard.offset_array[example], length) + within
        inputs[row, column] = self.shard.token_array[source]
        target = self.shard.token_array[source + 1].astype(np.int64)
        labels[row, column] = np.where(within + 1 >= np.repeat(self._prompt[example], length), target, IGNORED)
        if not document_ids:
            return inputs, labels, None
        ids = np.repeat(count.astype(np.int32)[:, None], self.seq_len, axis=1)
        ids[row, column] = np.repeat(piece, length)
        return inputs, labels, ids


def _pack(examples: np.ndarray, length: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing: longest example first, each into the fullest row that still takes it.

    Rows come out within 22% + 1 of the fewest possible (Johnson et al. 1974), in practice nearly full.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted keys of by_room
    for example in examples[np.argsort(-length[examples], kind="stable")].tolist():
        need = int(length[example])
        at = bisect_left(rooms, need)
        if at < len(rooms):
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[row].append(example)
        else:
            room, row = capacity, len(rows)
            rows.append([example])
        left = room - need
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]
