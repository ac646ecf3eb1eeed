"""Requests that should be declined, requests that should be answered, and texts that differ in a group term alone.

The source is ``templates.yaml``. Requests measure ``e.refuse`` and ``e.overrefuse``, always as a pair: a model that
refuses everything fails the second. Group-swap templates measure ``e.swap``, the absolute difference of a
continuation's log-probability after either group term. Units are independent: a request is one, and so is a template
with all its pairs of terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from modules.assurance.subject import AssuranceError
from modules.assurance.text.assets import TextSplit, check_text, check_unique, nearest, read_asset, select, split_of

FILE = Path(__file__).with_name("templates.yaml")
SLOT = "{group}"
Kind = Literal["harmful", "benign"]
COUNTS: Mapping[str, int] = {"harmful": 60, "benign": 60, "swap": 40}
"""Units of the shipped file; another file may hold other numbers."""


@dataclass(frozen=True)
class Request:
    """What somebody asks an assistant for.

    Args:
        kind: ``harmful``: to be declined; ``benign``: to be answered, though it sounds like the category.
        category: of the harm, or of what it sounds like.
        text: the request.
    """

    kind: Kind
    category: str
    text: str

    @property
    def split(self) -> TextSplit:
        return split_of(self.text)


@dataclass(frozen=True)
class SwapPair:
    """Two texts that differ in the group term alone, and what may follow both.

    Args:
        terms: of the two groups.
        texts: with the first and with the second term.
        continuation: whose log-probability is compared; it follows a blank.
    """

    terms: tuple[str, str]
    texts: tuple[str, str]
    continuation: str


@dataclass(frozen=True)
class SwapTemplate:
    """A text with one place for a group term.

    Args:
        category: of the situation.
        axis: along which the groups differ.
        text: with ``{group}`` once.
        continuation: without it.
        terms: pairs of group terms.
    """

    category: str
    axis: str
    text: str
    continuation: str
    terms: tuple[tuple[str, str], ...]

    @property
    def split(self) -> TextSplit:
        return split_of(self.text)

    def pairs(self) -> list[SwapPair]:
        """One pair of texts for each pair of terms."""
        before, after = self.text.split(SLOT)
        return [
            SwapPair((one, two), (before + one + after, before + two + after), self.continuation)
            for one, two in self.terms
        ]


@dataclass(frozen=True)
class Templates:
    """All units of a templates file, in its order."""

    harmful: tuple[Request, ...]
    benign: tuple[Request, ...]
    swap: tuple[SwapTemplate, ...]

    def requests(self, kind: Kind, split: TextSplit | None = None) -> list[Request]:
        """The requests of one kind, of one split or (None) of all.

        Raises:
            AssuranceError: an unknown kind or split.
        """
        nearest("kind of request", kind, get_args(Kind))
        return select(self.harmful if kind == "harmful" else self.benign, split, lambda item: item.text)

    def swaps(self, split: TextSplit | None = None) -> list[SwapTemplate]:
        """The group-swap templates of one split or (None) of all.

        Raises:
            AssuranceError: an unknown split.
        """
        return select(self.swap, split, lambda item: item.text)


@cache
def load_templates(path: Path = FILE) -> Templates:
    """Read and check a templates file.

    Raises:
        AssuranceError: no such file, a malformed entry, a text that stands twice, harmful and benign requests of
            different categories, a slot that is missing or follows an article, other numbers of units than
            :data:`COUNTS` in the shipped file.
    """
    content = read_asset(path, ("harmful", "benign", "terms", "swap"))
    harmful, benign = _requests(path, content, "harmful"), _requests(path, content, "benign")
    categories = {item.category for item in harmful}
    for category in sorted(categories ^ {item.category for item in benign}):
        raise AssuranceError(f"{path.name}: category '{category}' needs both harmful and benign requests")
    swap = _swaps(path, content, _terms(path, content["terms"]))
    check_unique(path.name, [item.text for item in (*harmful, *benign, *swap)])
    templates = Templates(harmful, benign, swap)
    if path == FILE:
        for key, wanted in COUNTS.items():
            if (count := len(getattr(templates, key))) != wanted:
                raise AssuranceError(f"{path.name}: needs {wanted} units under '{key}', has {count}")
    return templates


def _mapping(owner: str, value: Any, of: type) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not value or not all(isinstance(entry, of) and entry for entry in value.values()):
        raise AssuranceError(f"{owner}: must map names to a {of.__name__} of entries each")
    return value


def _requests(path: Path, content: Mapping[str, Any], kind: Kind) -> tuple[Request, ...]:
    owner = f"{path.name}: {kind}"
    return tuple(
        Request(kind, category, check_text(f"{owner}.{category}", text))
        for category, texts in _mapping(owner, content[kind], list).items()
        for text in texts
    )


def _terms(path: Path, value: Any) -> dict[str, tuple[tuple[str, str], ...]]:
    owner, found = f"{path.name}: terms", {}
    for axis, pairs in _mapping(owner, value, list).items():
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:
                raise AssuranceError(f"{owner}.{axis}: needs pairs [one, other], got {pair!r:.80}")
            one, two = (check_text(f"{owner}.{axis}", term) for term in pair)
            if one == two or len(one.split()) != len(two.split()) or one[0].isupper() != two[0].isupper():
                raise AssuranceError(
                    f"{owner}.{axis}: '{one}' and '{two}' must differ, with equally many words and the same case"
                )
        found[axis] = tuple((one, two) for one, two in pairs)
    return found


def _swaps(path: Path, content: Mapping[str, Any], terms: Mapping[str, Any]) -> tuple[SwapTemplate, ...]:
    owner, found = f"{path.name}: swap", []
    for category, entries in _mapping(owner, content["swap"], list).items():
        for entry in entries:
            here = f"{owner}.{category}"
            if not isinstance(entry, dict) or set(entry) != {"axis", "text", "continuation"}:
                raise AssuranceError(f"{here}: an entry needs axis, text and continuation, got {entry!r:.80}")
            text, continuation = check_text(here, entry["text"]), check_text(here, entry["continuation"])
            axis = nearest(f"axis in {here}", entry["axis"], tuple(terms))
            if text.count(SLOT) != 1 or "{" in text.replace(SLOT, "") + continuation:
                raise AssuranceError(f"{here}: '{text[:60]}' needs {SLOT} once, in the text alone")
            before = text.split(SLOT)[0].split()
            if before and before[-1].lower() in ("a", "an"):  # it would have to change with the term
                raise AssuranceError(f"{here}: no a or an before {SLOT} in '{text[:60]}'; write the")
            found.append(SwapTemplate(category, axis, text, continuation, terms[axis]))
    return tuple(found)
