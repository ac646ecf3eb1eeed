"""Authored text units: how they are read from the files beside the code, and which split each belongs to.

A unit's split is a hash of its text, so it never moves when others are added, and no two splits share a text:
``anchor`` (a fifth) is measured in every round and feeds nothing, ``train`` (a fifth) may join the training data when
it fails, ``evaluation`` is measured and never trained on (sheet, sections 2.4 and 8).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from modules.assurance.subject import AssuranceError
from modules.seeds import text_seed

TextSplit = Literal["train", "evaluation", "anchor"]
SPLITS: tuple[TextSplit, ...] = get_args(TextSplit)
_FIFTHS: tuple[TextSplit, ...] = ("anchor", "train", "evaluation", "evaluation", "evaluation")

Item = TypeVar("Item")


def split_of(text: str) -> TextSplit:
    """The split of a unit, from its text alone."""
    return _FIFTHS[text_seed(text) % len(_FIFTHS)]


def select(items: Iterable[Item], split: TextSplit | None, key: Callable[[Item], str]) -> list[Item]:
    """The items of one split, in order; all of them for None.

    Args:
        items: to choose from.
        split: wanted.
        key: an item's text, which decides its split.

    Raises:
        AssuranceError: an unknown split.
    """
    if split is None:
        return list(items)
    nearest("split", split, SPLITS)
    return [item for item in items if split_of(key(item)) == split]


def nearest(what: str, name: str, known: Sequence[str]) -> str:
    """``name``, if it is known.

    Raises:
        AssuranceError: it is not; the message holds the nearest known names, or all where none is near.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise AssuranceError(f"unknown {what} '{name}'; {hint}")


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice (it would hide the first one's texts)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_asset(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file, which has exactly ``keys``.

    Raises:
        AssuranceError: no such file, not YAML, not a mapping, a key that is missing, unknown or there twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise AssuranceError(f"{path}: cannot be read ({error.strerror}); name a file that exists") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise AssuranceError(f"{path.name}:{where} not valid YAML ({str(problem).splitlines()[0][:120]})") from None
    if not isinstance(content, dict):
        raise AssuranceError(f"{path.name}: must hold a mapping with keys {', '.join(keys)}")
    for key in content:
        nearest(f"key in {path.name}", key, keys)
    for key in keys:
        if key not in content:
            raise AssuranceError(f"{path.name}: key '{key}' is missing")
    return content


def check_unique(owner: str, texts: Iterable[str]) -> None:
    """Refuse texts that are equal up to case and spaces: one of them could sit in two splits.

    Raises:
        AssuranceError: a text that stands twice.
    """
    seen: set[str] = set()
    for text in texts:
        flat = " ".join(text.casefold().split())
        if flat in seen:
            raise AssuranceError(f"{owner}: this text stands twice: '{text[:80]}'; drop one")
        seen.add(flat)


def check_text(owner: str, text: Any) -> str:
    """``text``, if it is one that says something, without blanks at its ends.

    Raises:
        AssuranceError: it is not.
    """
    if not isinstance(text, str) or not text.strip() or text != text.strip():
        raise AssuranceError(f"{owner}: needs a text without blanks at its ends, got {text!r:.80}")
    return text
