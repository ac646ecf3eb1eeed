"""What the command line means: names of shipped configs, ``vars`` of all layers merged, the experiment's name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.errors import ConfigError
from train.folders import CONFIGS


def expand_config_names(argv: list[str]) -> list[str]:
    """Let ``-c llemma/laptop`` mean ``<plumbline>/configs/llemma/laptop.yaml`` where no such file exists."""
    expanded = list(argv)
    for index, token in enumerate(argv):
        flag, sep, value = token.partition("=")
        if flag in ("-c", "--config") and sep:
            expanded[index] = f"{flag}={find_config(value)}"
        elif flag in ("-c", "--config") and index + 1 < len(argv):
            expanded[index + 1] = find_config(argv[index + 1])
    return expanded


def find_config(name: str) -> str:
    """The file that ``-c name`` means: a file, or a shipped config by its name.

    Raises:
        ConfigError: neither; names the nearest shipped configs.
    """
    if Path(name).is_file():
        return name
    for candidate in (CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    known = [str(path.relative_to(CONFIGS).with_suffix("")) for path in sorted(CONFIGS.rglob("*.yaml"))]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=3, cutoff=0.4)
    hint = f"; nearest shipped configs: {', '.join(near)}" if near else f"; shipped configs: {', '.join(known)}"
    raise ConfigError(f"config file '{name}' not found{hint}")


def config_files(argv: list[str]) -> list[Path]:
    """The files given with ``-c``, in order."""
    found = [token.partition("=")[2] for token in argv if re.match(r"(-c|--config)=", token)]
    found += [argv[i + 1] for i, token in enumerate(argv[:-1]) if token in ("-c", "--config")]
    return [Path(name) for name in found]


@contextlib.contextmanager
def merged_vars(argv: list[str]) -> Iterator[list[str]]:
    """Arguments with one more ``-c`` file behind the last, holding the ``vars`` of all layers merged.

    The parser merges what it knows the keys of; of a free dictionary the last layer would be all that is left.
    """
    import yaml

    merged: dict[str, Any] = {}
    layers = 0
    for path in config_files(argv):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser names what is wrong with the file
        if isinstance(content, dict) and isinstance(content.get("vars"), dict):
            merged.update(content["vars"])
            layers += 1
    if layers < 2:
        yield argv
        return
    last = max(
        i + (token in ("-c", "--config")) for i, token in enumerate(argv) if re.match(r"(-c|--config)(=|$)", token)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vars.yaml"
        path.write_text(yaml.safe_dump({"vars": merged}), encoding="utf-8")
        yield [*argv[: last + 1], "-c", str(path), *argv[last + 1 :]]


def experiment_name(subcommand: str) -> str:
    """Name of the first config file, with its folders if it is a shipped one; without config files the verb's."""
    paths = config_files(sys.argv[1:])
    if not paths:
        return subcommand
    first = paths[0]
    if CONFIGS in first.resolve().parents:
        return "-".join(first.resolve().relative_to(CONFIGS).with_suffix("").parts)
    return first.stem


def class_parameters() -> dict[str, set[str]]:
    """Parameters of every class that the command line and its config files name, nested dataclass fields included."""
    text = " ".join(sys.argv) + "\n".join(f.read_text("utf-8") for f in config_files(sys.argv[1:]) if f.is_file())
    found: dict[str, set[str]] = {}

    def walk(annotation: Any, names: set[str]) -> None:
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            fresh = set(hints) - names
            names.update(hints)
            for name in fresh:
                walk(hints[name], names)
        for inner in typing.get_args(annotation):
            walk(inner, names)

    for path in sorted(set(re.findall(r"\b((?:\w+\.)+[A-Z]\w*)\b", text))):
        module, name = path.rsplit(".", 1)
        try:
            signature = inspect.signature(getattr(importlib.import_module(module), name), eval_str=True)
        except (ImportError, AttributeError, ValueError, TypeError, NameError):
            continue
        names = set(signature.parameters)
        for parameter in signature.parameters.values():
            walk(parameter.annotation, names)
        found[path] = names
    return found
