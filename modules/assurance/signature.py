"""Signatures of report folders: sha256 of every file, and an HMAC of those (FIPS 198-1) where there is a key.

A hash is integrity, not truth: it shows that the files fit together and did not change since. Only the HMAC says that a
holder of the key wrote them. The key comes from ``PLUMBLINE_SIGNING_KEY`` (text) or ``PLUMBLINE_SIGNING_KEY_FILE`` (a
file); without one, a report is unsigned and says so.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.assurance.canonical import canonical_bytes
from modules.assurance.subject import AssuranceError
from modules.files import atomic_write, sha256_file

KEY, KEY_FILE = "PLUMBLINE_SIGNING_KEY", "PLUMBLINE_SIGNING_KEY_FILE"
SHORTEST_KEY = 16  # bytes
REPORT, SAMPLES, CARD, PAGE = "report.json", "samples.jsonl", "card.md", "report.html"
SIGNATURE = "signature.json"
SIGNED_FILES = (REPORT, SAMPLES, CARD, PAGE)
SCHEMA, VERSION = "plumbline.assurance.signature", 1


@dataclass(frozen=True)
class Signature:
    """``sha256`` of some bytes and, where there was a key, their HMAC-SHA256; both as hexadecimal digits."""

    sha256: str
    mac: str = ""

    @property
    def signed(self) -> bool:
        return bool(self.mac)


@dataclass
class Verification:
    """What a check found: ``problems`` mean that evidence was changed or lost, ``notes`` are worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Verification) -> None:
        self.problems += other.problems
        self.notes += other.notes


def signing_key(environment: Mapping[str, str] | None = None) -> bytes | None:
    """The key from the environment, or ``None``.

    Raises:
        AssuranceError: both variables are set, a file that cannot be read, a key shorter than 16 bytes.
    """
    environment = os.environ if environment is None else environment
    text, file = environment.get(KEY), environment.get(KEY_FILE)
    if text is not None and file is not None:
        raise AssuranceError(f"signing key: {KEY} and {KEY_FILE} are both set: unset one")
    if text is None and file is None:
        return None
    if file is not None:
        try:
            key, source = Path(file).read_bytes().strip(), KEY_FILE
        except OSError as error:
            raise AssuranceError(f"signing key: {KEY_FILE} names {file}: {error.strerror or error}") from None
    else:
        key, source = str(text).encode().strip(), KEY
    if len(key) < SHORTEST_KEY:
        raise AssuranceError(
            f"signing key: {source} gives {len(key)} bytes, at least {SHORTEST_KEY} are needed; make one with "
            "python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return key


def mac_of(data: bytes, key: bytes) -> str:
    """HMAC-SHA256 as hexadecimal digits."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def sign(data: bytes, key: bytes | None = None) -> Signature:
    """sha256 of ``data`` and, with a key, its HMAC."""
    return Signature(hashlib.sha256(data).hexdigest(), mac_of(data, key) if key else "")


def seal(folder: Path, key: bytes | None = None) -> Signature:
    """Write ``signature.json`` over the files of a report folder; its presence says that the folder is finished.

    Args:
        folder: holds all of :data:`SIGNED_FILES`.
        key: of the HMAC; ``None``: unsigned.

    Returns:
        Of ``signature.json`` itself.
    """
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "algorithm": "hmac-sha256" if key else "unsigned",
        "files": {name: sha256_file(folder / name) for name in SIGNED_FILES},
    }
    data = _closed(body, mac_of(canonical_bytes(body), key) if key else "")
    with atomic_write(folder / SIGNATURE) as stream:
        stream.write(data)
    return sign(data, key)


def _closed(body: Mapping[str, Any], mac: str) -> bytes:
    """The file's bytes: the body, its HMAC, and a checksum of both, so that a slip shows without the key too."""
    whole = {**body, "mac": mac}
    return canonical_bytes({**whole, "check": hashlib.sha256(canonical_bytes(whole)).hexdigest()})


def load_signature(folder: Path) -> dict[str, Any]:
    """The content of ``signature.json``, its own checksum verified.

    Raises:
        AssuranceError: none there (an unfinished report), damaged, of an unknown or newer form.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        raise AssuranceError(f"{folder} has no {SIGNATURE}: this report is unfinished; measure again")
    data = path.read_bytes()
    try:
        found = json.loads(data)
        body = {name: found[name] for name in ("schema", "version", "algorithm", "files")}
        files_named = all(isinstance(found["files"][name], str) for name in SIGNED_FILES)
        whole = files_named and _closed(body, found["mac"]) == data
    except (ValueError, TypeError, KeyError, RecursionError):
        whole, found = False, {}
    if not whole:
        raise AssuranceError(f"{path} was changed: its bytes do not fit its own checksum")
    if found["schema"] != SCHEMA or found["version"] != VERSION:
        raise AssuranceError(
            f"{path}: form '{found['schema']}' version {found['version']} is unknown here (known: {SCHEMA} {VERSION}):"
            " use the version of Plumbline that wrote it"
        )
    return found


def verify_folder(folder: Path, key: bytes | None) -> Verification:
    """Check all files of a report folder against its signature, and the signature against ``key``."""
    found = Verification()
    try:
        signature = load_signature(folder)
    except AssuranceError as error:
        found.problems.append(str(error))
        return found
    for name in SIGNED_FILES:
        path = folder / name
        if not path.is_file():
            found.problems.append(f"{path} is missing")
        elif sha256_file(path) != signature["files"][name]:
            found.problems.append(f"{path} was changed: its sha256 is not the signed one")
    if not found.problems:
        try:
            samples = json.loads((folder / REPORT).read_bytes())["samples"]["sha256"]
        except (ValueError, TypeError, KeyError, RecursionError):
            samples = None
        if samples != signature["files"][SAMPLES]:
            found.problems.append(f"{folder / SAMPLES} is not the one that {REPORT} was made from")
    body = {name: signature[name] for name in ("schema", "version", "algorithm", "files")}
    if signature["algorithm"] == "unsigned":
        place = found.notes if key is None else found.problems
        place.append(f"{folder} is UNSIGNED: its files fit together, but nothing says who wrote them")
    elif key is None:
        found.notes.append(f"{folder} is signed; set {KEY} or {KEY_FILE} to check by whom")
    elif not hmac.compare_digest(str(signature["mac"]), mac_of(canonical_bytes(body), key)):
        found.problems.append(f"{folder / SIGNATURE}: signed with another key, or forged")
    return found
