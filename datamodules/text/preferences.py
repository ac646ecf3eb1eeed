"""Pairs of a better and a worse response to a prompt: JSON Lines files, and pairs made from dialogues."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from modules.contracts import PromptSample


@dataclass(frozen=True)
class PreferencePair:
    """``chosen`` is the better response to ``prompt``; ``margin``: by how much its score is to be ahead."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Read a JSON Lines file of objects with the texts ``prompt``, ``chosen``, ``rejected`` and perhaps a ``margin``.

    Raises:
        FileNotFoundError: no such file. ValueError: a line that is no such object, an empty text, a margin that is not
            a finite number; with file and line number.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"preferences: {file} does not exist; want a JSON Lines file with prompt, chosen and rejected "
            "(path: null needs no files)"
        )
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"preferences: {file} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({str(error)[:80]})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} must hold a JSON object")
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} must be a text that is not empty")
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"{where}: 'margin' must be a finite number, got {margin!r}")
        pairs.append(PreferencePair(row["prompt"], row["chosen"], row["rejected"], float(margin)))
    if not pairs:
        raise ValueError(f"preferences: {file} holds no pair")
    return pairs


def pairs_from_replies(samples: Sequence[PromptSample], seed: int | str) -> list[PreferencePair]:
    """One pair per sample: the human reply is better than another sample's reply, or than itself spoilt.

    Half of the worse responses are another sample's reply, which does not fit the prompt; the others are the human
    reply with its words shuffled, or with words left out and repeated. Pair i depends on the samples, the seed and i
    alone. A sample whose reply can't be made worse (one word, met everywhere) is left out.
    """
    pairs = []
    for number, sample in enumerate(samples):
        random = Random(f"{seed}/{number}")
        words = sample.reference.split()
        for _ in range(8):
            if len(words) < 3 or random.random() < 0.5:
                worse = samples[random.randrange(len(samples))].reference
            elif random.random() < 0.5:
                worse = " ".join(random.sample(words, len(words)))
            else:
                worse = " ".join(word for word in words for _ in range(random.choice((0, 1, 1, 2))))
            if worse and worse != sample.reference:
                pairs.append(PreferencePair(sample.prompt, sample.reference, worse))
                break
    return pairs
