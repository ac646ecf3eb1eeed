"""One byte string for one content: sorted keys, floats at 12 significant digits, no NaN, JSON's own types alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from modules.assurance.figures import rounded
from modules.assurance.subject import AssuranceError


def plain(value: Any, where: str = "value") -> Any:
    """``value`` as JSON's types: mappings with sorted keys, tuples as lists, floats rounded, dataclasses as mappings.

    Raises:
        AssuranceError: NaN, infinity, a key that is no text, a type that JSON does not know; the message says where.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise AssuranceError(f"{where} is {value}: a report holds finite numbers only; leave it out and say why")
        return rounded(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise AssuranceError(f"{where} has the key {key!r}: keys must be text")
        return {key: plain(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain(one, f"{where}[{index}]") for index, one in enumerate(value)]
    raise AssuranceError(f"{where} is a {type(value).__name__}: give numbers, text, lists or mappings")


def canonical_bytes(value: Any, where: str = "value") -> bytes:
    """Readable canonical JSON (one space of indent, one newline at the end): equal contents give equal bytes.

    Raises:
        AssuranceError: as :func:`plain`.
    """
    return (json.dumps(plain(value, where), indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def canonical_line(value: Any, where: str = "value") -> bytes:
    """The same content on one line, its newline included.

    Raises:
        AssuranceError: as :func:`plain`.
    """
    text = json.dumps(plain(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return (text + "\n").encode("ascii")


def digest(value: Any, where: str = "value") -> str:
    """sha256 of :func:`canonical_bytes`."""
    return hashlib.sha256(canonical_bytes(value, where)).hexdigest()
