"""Objectives as a config layer: knob values and nothing else.

A layer may come from a stranger, and configs can name classes and read the environment: :func:`read_layer` takes plain
values at paths that are allowed, and refuses all else before anything is built from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from modules.assurance.knobs import Knob, is_number, short
from modules.assurance.subject import AssuranceError

LARGEST = 64 * 1024  # bytes
DEEPEST = 16  # levels of mappings and lists
LONGEST_KEY = 200  # characters
_SHA = re.compile(r"[0-9a-f]{0,64}")


def layer_text(knobs: Mapping[str, Any], round_number: int, parent: str) -> str:
    """Canonical YAML: sorted keys, shortest floats that read back the same, a first line for people.

    Args:
        knobs: dotted path -> number, or flat list or mapping of numbers.
        round_number, parent: for the first line; ``parent`` is a report's sha256, or empty.

    Raises:
        AssuranceError: a parent that is no sha256; a path within another one.
    """
    if not _SHA.fullmatch(parent):
        raise AssuranceError(f"objectives: parent must be a report's sha256, got {parent[:80]!r}")
    nested: dict[str, Any] = {}
    for path, value in sorted(knobs.items()):
        *above, last = path.split(".")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise AssuranceError(f"objectives: {path} lies within another knob: drop one of them")
        if last in place:
            raise AssuranceError(f"objectives: {path} holds another knob: drop one of them")
        place[last] = value
    head = f"# Objectives of round {round_number}, from {f'report {parent}' if parent else 'the declared start'}.\n"
    return head + yaml.safe_dump(nested, sort_keys=True, default_flow_style=False, width=10**6, allow_unicode=False)


def read_layer(path: str | Path, allowed: Iterable[str | Knob]) -> dict[str, Any]:
    """Knob values of a layer file that is not trusted.

    Args:
        path: at most 64 KiB of UTF-8.
        allowed: the knobs, whose rules and bounds the values must then fit, or mere paths.

    What is built from a layer is built from the returned values (:func:`layer_text` writes them), not from the file.

    Returns:
        Path -> a number, text or truth value, or a flat list or mapping of numbers.

    Raises:
        AssuranceError: one line that names the file, the key and the mend.
    """
    path = Path(path)
    knobs: dict[str, Knob | None] = {}
    for one in allowed:
        knobs[one.path if isinstance(one, Knob) else one] = one if isinstance(one, Knob) else None
    try:
        content = _parsed(_text(path))
        found: dict[str, Any] = {}
        _walk(content, "", knobs, found)
    except AssuranceError as error:
        raise AssuranceError(f"{path}: {error}") from None
    return found


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(LARGEST + 1)
    except OSError as error:
        raise AssuranceError(f"cannot be read ({error.strerror})") from None
    if len(raw) > LARGEST:
        raise AssuranceError(f"has more than {LARGEST // 1024} KiB: an objectives layer holds knob values alone")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise AssuranceError("is not UTF-8 text: save it as such") from None
    if "${" in text:
        line = text[: text.index("${")].count("\n") + 1
        raise AssuranceError(f"line {line}: ${{...}} is not allowed in an objectives layer: write the value out")
    return text


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        _check_keys(node, "")
        content = yaml.safe_load(text)
    except AssuranceError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise AssuranceError(f"is not valid YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, Mapping):
        raise AssuranceError("must be a mapping of nested keys to values, like model: {init_args: {eps: 0.1}}")
    return content


def _check_events(text: str) -> None:
    """Refuse what makes a small text large or strange, while it is still a stream of events."""
    depth, documents = 0, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise AssuranceError(f"{where}: anchors and aliases (&{event.anchor}) are not allowed: write the value out")
        if getattr(event, "tag", None) is not None:
            raise AssuranceError(f"{where}: the tag {event.tag[:60]} is not allowed: write a plain value")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or documents > 1:
            what = "nests too deeply" if depth > DEEPEST else "begins a second document"
            raise AssuranceError(f"{where}: {what}: a layer is one mapping of nested keys")


def _check_keys(node: yaml.Node, prefix: str) -> None:
    """Refuse keys that are no text, stand twice, or mean something to YAML or to a config."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        where = f"line {key.start_mark.line + 1}"
        if key.tag != "tag:yaml.org,2002:str" or not 0 < len(key.value) <= LONGEST_KEY:
            raise AssuranceError(f"{where}: key '{short(key.value)}' must be text of at most {LONGEST_KEY} characters")
        name = f"{prefix}{key.value}"
        if "${" in key.value:
            raise AssuranceError(f"{where}: ${{...}} is not allowed in a key: write it out")
        if key.value == "class_path":
            raise AssuranceError(f"{where}: '{short(name)}': a layer names no class: remove it")
        if key.value in seen:
            raise AssuranceError(f"{where}: key '{short(name)}' stands twice: keep one")
        seen.add(key.value)
        _check_keys(value, f"{name}.")


def _walk(content: Mapping[str, Any], prefix: str, knobs: Mapping[str, Knob | None], found: dict[str, Any]) -> None:
    for key, value in content.items():
        path = f"{prefix}{key}"
        known = "." not in key  # nested keys alone: one way to write a path
        if known and path in knobs:
            knob = knobs[path]
            found[path] = _plain(path, value) if knob is None else knob.check(value)
        elif known and isinstance(value, Mapping) and any(one.startswith(f"{path}.") for one in knobs):
            _walk(value, f"{path}.", knobs, found)
        else:
            near = difflib.get_close_matches(path, sorted(knobs), n=1, cutoff=0.4)
            mend = f"the nearest knob is {near[0]} (as nested keys)" if near else "no knob has such a path: remove it"
            raise AssuranceError(f"'{short(path)}' is not a knob's value that may be set; {mend}")


def _plain(path: str, value: Any) -> Any:
    """A number, text or truth value, or a flat collection of numbers."""
    if isinstance(value, str) and "${" in value:
        raise AssuranceError(f"{path}: ${{...}} is not allowed in an objectives layer: write the value out")
    if isinstance(value, bool | str) or is_number(value):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise AssuranceError(f"{path}: {value} is not a finite number: give one")
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [None]
    if not all(map(is_number, parts)):
        raise AssuranceError(
            f"{path}: give a number, text, true or false, or a flat list or mapping of numbers, not {short(value)}"
        )
    return value
