"""Dialogues: DailyDialog folders, one form for their text, duplicates between splits, and samples for replying."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.contracts import PromptSample

END_OF_UTTERANCE = "<EOU>"
ACTS = ("inform", "question", "directive", "commissive")
EMOTIONS = ("none", "anger", "disgust", "fear", "happiness", "sadness", "surprise")

_SEPARATOR = "__eou__"
_PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "´": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "。": ".", "…": "..."}
)
_CONTRACTION = re.compile(r"(?<=\w) ?' ?(s|t|ll|re|ve|d|m)\b", re.IGNORECASE)
# a full stop, comma or colon belongs to a word only between two digits: 10:30, 2.50, 1,000
_MARKS = re.compile(r"(\.{2,}|(?<!\d)[.,:]|[.,:](?!\d)|[!?;\"()<>])")


@dataclass(frozen=True)
class Dialogue:
    """Utterances in turn, and the dialogue act and emotion of each (counted from 0, see ``ACTS``, ``EMOTIONS``)."""

    utterances: tuple[str, ...]
    acts: tuple[int, ...]
    emotions: tuple[int, ...]

    @property
    def key(self) -> str:
        """What two copies of a dialogue share whatever their spacing, case and punctuation."""
        return "".join(letter for text in self.utterances for letter in text.lower() if letter.isalnum())


def normalise_utterance(text: str, lowercase: bool = True) -> str:
    """Plain apostrophes and quotes, contractions in one word, punctuation marks as words of their own.

    ``"Don ’ t worry."`` becomes ``"don't worry ."``.
    """
    text = _CONTRACTION.sub(r"'\1", text.translate(_PLAIN))
    text = " ".join(_MARKS.sub(r" \1 ", text).split())
    return text.lower() if lowercase else text


def read_dialogues(
    path: str | Path, split: str, *, mismatched: Literal["error", "skip"] = "error", lowercase: bool = True
) -> list[Dialogue]:
    """Read ``<path>/<split>/dialogues.txt`` with ``dialogues_act.txt`` and ``dialogues_emotion.txt`` (Li et al. 2017).

    A line is a dialogue, utterances end with ``__eou__``; the label files hold as many numbers per line (acts 1 to 4,
    emotions 0 to 6).

    Args:
        mismatched: a line with another number of utterances than of labels is an error, or is left out.
        lowercase: see :func:`normalise_utterance`.

    Raises:
        FileNotFoundError: a folder or file is missing. ValueError: unequal files or lines, an unknown label, an empty
            utterance; with file and line number.
    """
    folder = Path(path) / split
    if not folder.is_dir():
        parent = Path(path)
        there = ", ".join(sorted(part.name for part in parent.iterdir() if part.is_dir())) if parent.is_dir() else ""
        raise FileNotFoundError(
            f"dialogues: {folder} is no folder; want path/<split>/dialogues.txt, dialogues_act.txt and "
            f"dialogues_emotion.txt ({f'splits there: {there}; ' if there else ''}path: null needs no files)"
        )
    files = [folder / f"dialogues{part}.txt" for part in ("", "_act", "_emotion")]
    columns = [_lines(file) for file in files]
    for file, lines in zip(files[1:], columns[1:], strict=True):
        if len(lines) != len(columns[0]):
            raise ValueError(
                f"dialogues: {file} has {len(lines)} lines, {files[0].name} has {len(columns[0])} "
                f"(first line without a partner: {min(len(lines), len(columns[0])) + 1})"
            )
    dialogues = []
    for number, (text, acts, emotions) in enumerate(zip(*columns, strict=True), 1):
        pieces = text.split(_SEPARATOR)
        pieces = pieces if pieces[-1].strip() else pieces[:-1]
        counts = [len(acts.split()), len(emotions.split())]
        if counts != [len(pieces)] * 2:
            if mismatched == "skip":
                continue
            wrong = files[1] if counts[0] != len(pieces) else files[2]
            raise ValueError(
                f"dialogues: {wrong} line {number} has {counts[0] if wrong is files[1] else counts[1]} labels for "
                f"{len(pieces)} utterances; mend the line, or set mismatched: skip"
            )
        utterances = tuple(normalise_utterance(piece, lowercase) for piece in pieces)
        if "" in utterances:
            raise ValueError(
                f"dialogues: {files[0]} line {number}: utterance {utterances.index('') + 1} is empty; mend the line"
            )
        dialogues.append(
            Dialogue(utterances, _labels(acts, 1, 4, files[1], number), _labels(emotions, 0, 6, files[2], number))
        )
    if not dialogues:
        raise ValueError(f"dialogues: {files[0]} holds no dialogue")
    return dialogues


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"dialogues: {file} does not exist")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"dialogues: {file} is not UTF-8 (byte {error.start})") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _labels(text: str, lowest: int, highest: int, file: Path, number: int) -> tuple[int, ...]:
    values = []
    for word in text.split():
        if not word.isdigit() or not lowest <= int(word) <= highest:
            raise ValueError(f"dialogues: {file} line {number}: label {word!r} is none of {lowest} to {highest}")
        values.append(int(word) - lowest)
    return tuple(values)


def drop_duplicates(dialogues: Iterable[Dialogue], known: Iterable[Dialogue] = ()) -> list[Dialogue]:
    """Leave out dialogues whose text (:attr:`Dialogue.key`) is in ``known`` or came before."""
    seen = {dialogue.key for dialogue in known}
    kept = []
    for dialogue in dialogues:
        if dialogue.key not in seen:
            seen.add(dialogue.key)
            kept.append(dialogue)
    return kept


def prompt_text(context: Sequence[str]) -> str:
    """Utterances as a prompt: each is followed by ``<EOU>``, so that what comes next is a reply."""
    return " ".join(f"{utterance} {END_OF_UTTERANCE}" for utterance in context)


def last_utterance(prompt: str) -> str:
    """The utterance that a prompt asks a reply to.

    A space before it stays (the first of a dialogue has none): pieces of words depend on it.
    """
    return prompt.removesuffix(f" {END_OF_UTTERANCE}").rsplit(END_OF_UTTERANCE, 1)[-1]


def reply_samples(dialogues: Iterable[Dialogue], context_size: int, min_context: int) -> list[PromptSample]:
    """Every utterance with at least ``min_context`` before it, as the reply to the last ``context_size`` of those.

    ``labels``: the reply's ``act`` and ``emotion``.

    Raises:
        ValueError: not 1 <= min_context <= context_size.
    """
    if not 1 <= min_context <= context_size:
        raise ValueError(f"dialogues: want 1 <= min_context <= context_size, got {min_context} and {context_size}")
    return [
        PromptSample(
            prompt=prompt_text(dialogue.utterances[max(0, turn - context_size) : turn]),
            reference=dialogue.utterances[turn],
            labels={"act": dialogue.acts[turn], "emotion": dialogue.emotions[turn]},
        )
        for dialogue in dialogues
        for turn in range(min_context, len(dialogue.utterances))
    ]
