"""Errors in one line: exit codes, the nearest valid key or class, and which errors are ours."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.folders import PACKAGES, ROOT

EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPT = 1, 2, 130


class ConfigError(Exception):
    """A command line or config file that does not parse; the message is one line."""


def known_keys(parser: Any) -> list[str]:
    """Keys that a parser and its subcommands take."""
    keys = []
    for action in parser._actions:
        keys.append(action.dest)
        for sub in (getattr(action, "_name_parser_map", None) or {}).values():
            keys.extend(a.dest for a in sub._actions)
    return [key for key in keys if key and key != "help"]


_UNKNOWN_KEY = (
    r"Option '([\w.+]+)' is not accepted",
    r"Key '?\"?([\w.+]+)'?\"? is not expected",
    r"[Uu]nrecognized arguments?:\s*-*([\w.+]+)",
    r"unexpected keyword argument '(\w+)'",
)


def one_line(message: str, known: list[str], parameters: Callable[[], dict[str, set[str]]]) -> str:
    """A parser's report in one line, with the nearest valid key or class.

    Args:
        known: keys of the parser that reported.
        parameters: gives the parameters of each class that the configs name, by class path; it imports those classes,
            so it is called only where it helps.
    """
    text = " ".join(message.split())
    inner = re.search(r"unknown (?:key|class) '[^']+'(?: in '[^']+')?(?:; did you mean '[^']+'\?)?", text)
    parent = re.search(r'[Pp]arser key "([\w.]+)"', text)
    if inner:  # raised by a nested parser: it knew the key, this level knows where
        key = inner.group(0)
        return key if " in '" in key or not parent else re.sub(r"^(unknown \w+ '[^']+')", rf"\1 in '{parent[1]}'", key)
    unknown = next((match for pattern in _UNKNOWN_KEY if (match := re.search(pattern, text))), None)
    if unknown is None:
        return _unknown_class(text, parent) or (text if len(text) <= 600 else text[:600] + " ...")
    key = unknown.group(1)
    place = f" in '{parent.group(1)}'" if parent and parent.group(1) not in key else ""
    by_class = parameters()
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if parent or not near:
        leaves = {name for names in by_class.values() for name in names} | {k.rsplit(".", 1)[-1] for k in known}
        near = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.6) or near
    if near:
        return f"unknown key '{key}'{place}; did you mean '{near[0]}'?"
    valid = next((f"; {path} takes {', '.join(sorted(names))}" for path, names in by_class.items()), "")
    return f"unknown key '{key}'{place}{valid}"


def _unknown_class(text: str, parent: re.Match[str] | None) -> str | None:
    """The class path that leads nowhere and the nearest one that leads somewhere, out of a parser's report."""
    pattern = r"class_path '([\w.]+)': (?:module '[\w.]+' has no attribute|No module named)|import path string: (\w+)"
    match = re.search(pattern, text)
    if match is None:
        return None
    path = match[1] or match[2]
    ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in PACKAGES]
    known = {f"{module.__name__}.{name}" for module in ours for name in getattr(module, "__all__", ())}
    near = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.8)
    if not near:  # right name, wrong module, or no module
        leaves = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(path.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.7)]
    place = f" in '{parent[1]}'" if parent else ""
    return f"unknown class '{path}'{place}" + (f"; did you mean '{near[0]}'?" if near else "")


def constructor_refusal(text: str) -> str | None:
    """What a class's ``__init__`` said to its arguments, out of the parser's report on every type it tried."""
    if "Does not validate against any of the Union subtypes" not in text:
        return None
    tried = re.findall(r"^\s*- (.*?)(?=^\s*- |^\s*Given value|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    # unions may nest, and a class is tried as each of their types
    noise = r"Does not validate|Expected a <class 'NoneType'>|Import path \S+ does not correspond to a subclass"
    said = [" ".join(part.split()) for part in tried if not re.match(noise, part)]
    return said[0][:600] if said else None


def is_ours(error: BaseException) -> bool:
    """Whether our own code raised it on purpose: then its message is the whole story."""
    ours = ("train", *PACKAGES)
    if type(error).__module__.split(".")[0] in ours:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, ValueError | OSError | ImportError):
        return False
    path = Path(frames[-1].filename).resolve()
    return any((ROOT / package) in path.parents for package in ours)


def fail(message: str, code: int) -> int:
    """Print the one line of an error and return its exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
