"""Synonyms from the database files of WordNet, read as they are.

File formats: WordNet 3.0 manual, wndb(5WN); base forms: morphy(7WN). Only ``index.*``, ``data.*`` and ``*.exc`` are
needed: no ``lexnames``, no ``index.sense``, no corpus installation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from modules.files import sha256_file

_PARTS = ("adj", "adv", "noun", "verb")
# Endings taken off to find a base form, per part of speech: (old, new).
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
    "noun": (
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
        ("men", "man"), ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
}  # fmt: skip


class WordNetSynonyms:
    """Single-word synonyms of a word, over all its senses, kept by word.

    Args:
        folder: holds ``index.{adj,adv,noun,verb}``, ``data.*`` and ``*.exc`` (``dict`` of a WordNet 3 distribution).

    Raises:
        FileNotFoundError: the folder lacks one of them.
        ValueError: an index file is damaged; names file and line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = [self.folder / name for part in _PARTS for name in (f"index.{part}", f"data.{part}", f"{part}.exc")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"wordnet: {self.folder} lacks {', '.join(missing)}; give the folder of the WordNet 3 database files"
            )
        self._files = files
        self._offsets = {part: self._read_index(part) for part in _PARTS}
        self._exceptions = {part: self._read_exceptions(part) for part in _PARTS}
        self._data = {part: (self.folder / f"data.{part}").read_bytes() for part in _PARTS}
        self._known: dict[str, frozenset[str]] = {}

    def _read_index(self, part: str) -> dict[str, str]:
        # Lines are kept whole and split at the first look-up: 150,000 words load in a fraction of a second.
        index: dict[str, str] = {}
        with open(self.folder / f"index.{part}", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith(" "):  # the licence
                    continue
                word, blank, rest = line.partition(" ")
                if not blank:
                    raise ValueError(f"wordnet: {self.folder}/index.{part}, line {number}: not an index line")
                index[word] = rest
        return index

    def _read_exceptions(self, part: str) -> dict[str, list[str]]:
        text = (self.folder / f"{part}.exc").read_text(encoding="utf-8")
        return {words[0]: words[1:] for words in (line.split() for line in text.splitlines()) if words}

    def _base_forms(self, word: str, part: str) -> list[str]:
        forms = self._exceptions[part].get(word)
        if forms is None:
            forms = [word[: -len(old)] + new for old, new in _ENDINGS[part] if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *forms]) if form in self._offsets[part]]

    def _synset_offsets(self, word: str, part: str) -> list[int]:
        fields = self._offsets[part][word].split()
        try:
            count = int(fields[1])
            offsets = [int(field) for field in fields[-count:]]
        except (IndexError, ValueError):
            raise ValueError(f"wordnet: {self.folder}/index.{part}: the line of '{word}' is damaged") from None
        return offsets

    def _words(self, offset: int, part: str) -> list[str]:
        data = self._data[part]
        fields = data[offset : data.find(b"|", offset)].decode("utf-8").split()
        try:
            if int(fields[0]) != offset:
                raise ValueError
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
        except (IndexError, ValueError):
            raise ValueError(
                f"wordnet: {self.folder}/data.{part} has no synset at {offset}: copy the files again"
            ) from None
        # An adjective may carry its place as a mark: "(p)", "(a)" or "(ip)".
        return [word.partition("(")[0] if word.endswith(")") else word for word in words]

    def __call__(self, word: str) -> frozenset[str]:
        """The word's synonyms as WordNet spells them, compounds left out; empty for an unknown word.

        Args:
            word: any inflected form.
        """
        found = self._known.get(word)
        if found is None:
            lower = word.lower()
            found = frozenset(
                name
                for part in _PARTS
                for form in self._base_forms(lower, part)
                for offset in self._synset_offsets(form, part)
                for name in self._words(offset, part)
                if "_" not in name
            )
            self._known[word] = found
        return found

    def digest(self) -> str:
        """sha256 over all files read."""
        return hashlib.sha256("".join(sha256_file(file) for file in self._files).encode()).hexdigest()
