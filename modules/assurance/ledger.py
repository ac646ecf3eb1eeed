"""The ledger of a cycle: what was declared, trained, measured and decided, in order, each entry holding the last one's
hash. Changing, dropping or reordering an entry breaks the chain; a key adds an HMAC to every entry.

Kinds and what their payloads hold: ``declared`` (:func:`declared_payload`, before any training), ``objectives``
(:func:`file_payload` of ``round_XX/objectives.yaml``), ``model`` (``digest``: that of the report's lineage), ``report``
(:func:`report_payload`), ``decision`` (free).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modules.assurance.canonical import canonical_line, digest, plain
from modules.assurance.signature import (
    REPORT,
    SIGNATURE,
    Signature,
    Verification,
    mac_of,
    sign,
    signing_key,
    verify_folder,
)
from modules.assurance.subject import AssuranceError
from modules.assurance.suites import SuiteSettings
from modules.assurance.verdict import Limit
from modules.files import disk_full_named, fsync_path, repair_lines, sha256_file, write_bytes

__all__ = ["LEDGER", "Signature", "append", "entries", "inspect_path", "sign", "signing_key", "verify_path"]

LEDGER, OBJECTIVES, ASSURANCE = "ledger.jsonl", "objectives.yaml", "assurance"
KINDS = ("declared", "objectives", "model", "report", "decision")
FIRST = "0" * 64
_FIELDS = {"index", "kind", "round", "payload", "prev", "mac", "sha"}


def round_folder(run: str | Path, round_number: int) -> Path:
    """``<run>/round_XX``."""
    return Path(run) / f"round_{round_number:02d}"


# -- payloads --
def limits_digest(limits: Sequence[Limit]) -> str:
    """sha256 of the limits, in any order; the same before training and in the report."""
    same = [{**asdict(one), "tau": float(one.tau), "scale": float(one.scale)} for one in limits]  # 1 and 1.0 are one
    return digest(sorted(same, key=lambda one: one["figure"]), "limits")


def declared_payload(settings: SuiteSettings, limits: Sequence[Limit], knobs: Sequence[Any] = ()) -> dict[str, str]:
    """Digests of what was fixed before the data were seen: suite settings (without the round), limits, knobs."""
    return {
        "settings": digest(replace(settings, round=0), "settings"),
        "limits": limits_digest(limits),
        "knobs": digest(list(knobs), "knobs"),
    }


def file_payload(path: str | Path) -> dict[str, str]:
    """sha256 of a file's bytes."""
    return {"sha256": sha256_file(Path(path))}


def report_payload(folder: str | Path) -> dict[str, str]:
    """sha256 of a finished folder's report and signature, and its verdict."""
    folder = Path(folder)
    verdict = json.loads((folder / REPORT).read_bytes())["verdict"]
    return {
        "report": sha256_file(folder / REPORT),
        "signature": sha256_file(folder / SIGNATURE),
        "verdict": verdict,
    }


# -- the chain --
def _line(entry: Mapping[str, Any], key: bytes | None) -> dict[str, Any]:
    """``entry`` with its HMAC and, over that too, its hash: a flipped digit anywhere shows without the key."""
    core = {name: entry[name] for name in ("index", "kind", "round", "payload", "prev")}
    sealed = {**core, "mac": mac_of(canonical_line(core), key) if key else ""}
    return {**sealed, "sha": hashlib.sha256(canonical_line(sealed)).hexdigest()}


def _parse(path: Path, key: bytes | None) -> tuple[list[dict[str, Any]], Verification]:
    """All entries up to the first broken one, and what is wrong with the file."""
    found, good = Verification(), []
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        found.problems.append(f"{path}: the last line is cut, by a kill perhaps: go on with the cycle to mend it")
    seen: set[tuple[str, int]] = set()
    previous, unsigned = FIRST, 0
    for index, line in enumerate(lines):
        here = f"{path}: entry {index}"
        try:
            entry = json.loads(line)
            whole = set(entry) == _FIELDS and canonical_line(entry) == line + b"\n"
            sealed = {name: value for name, value in entry.items() if name != "sha"} if whole else {}
            whole = whole and hashlib.sha256(canonical_line(sealed)).hexdigest() == entry["sha"]
        except (ValueError, TypeError, RecursionError):
            whole, entry = False, {}
        if not whole:
            found.problems.append(f"{here} was changed: its bytes do not fit its own hash")
            break
        if entry["index"] != index or entry["prev"] != previous:
            found.problems.append(f"{here} does not follow the one before: the chain is broken")
            break
        name = (entry["kind"], entry["round"])
        if entry["kind"] not in KINDS or name in seen:
            found.problems.append(f"{here}: '{name[0]}' of round {name[1]} is unknown or stands twice")
        if key is None:
            unsigned += not entry["mac"]
        elif not entry["mac"]:
            found.problems.append(f"{here} is UNSIGNED, though a key is given")
        elif not hmac.compare_digest(str(entry["mac"]), str(_line(entry, key)["mac"])):
            found.problems.append(f"{here}: signed with another key, or forged")
        seen.add(name)
        previous = entry["sha"]
        good.append(entry)
    if unsigned:
        found.notes.append(f"{path}: {unsigned} of {len(good)} entries are UNSIGNED: a hash is integrity, not truth")
    return good, found


def entries(path: str | Path) -> list[dict[str, Any]]:
    """All entries of a ledger; none where there is no file yet.

    Raises:
        AssuranceError: a broken ledger.
    """
    path = Path(path)
    if not path.is_file():
        return []
    good, found = _parse(path, None)
    if found.problems:
        raise AssuranceError(f"ledger: {found.problems[0]}")
    return good


def append(
    path: str | Path, kind: str, round_number: int, payload: Mapping[str, Any], key: bytes | None = None
) -> dict[str, Any]:
    """Add an entry, durably; nothing happens where the same one stands already.

    A last line that a kill cut in two is dropped first.

    Args:
        path: of ``ledger.jsonl``; made with its folder.
        kind: one of :data:`KINDS`; a round has at most one entry of each.
        round_number: of the cycle.
        payload: numbers, text, lists, mappings.
        key: of the HMAC; ``None``: from the environment.

    Returns:
        The entry as it stands in the file.

    Raises:
        AssuranceError: an unknown kind, a broken ledger, another payload for a kind and round that stand already.
    """
    if kind not in KINDS:
        raise AssuranceError(f"ledger: kind must be one of {', '.join(KINDS)}, got '{kind}'")
    path, key = Path(path), key or signing_key()
    payload = plain(payload, f"ledger: {kind}")
    repair_lines(path)
    present = entries(path)
    for entry in present:
        if (entry["kind"], entry["round"]) == (kind, round_number):
            if entry["payload"] == payload:
                return entry
            raise AssuranceError(
                f"ledger: {path} holds another '{kind}' of round {round_number} already; a ledger is only added to: "
                "start the changed cycle in a folder of its own"
            )
    previous = present[-1]["sha"] if present else FIRST
    core = {"index": len(present), "kind": kind, "round": round_number, "payload": payload, "prev": previous}
    entry = _line(core, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_named(path), open(path, "ab") as stream:
        write_bytes(stream, canonical_line(entry))
        stream.flush()
        os.fsync(stream.fileno())
    fsync_path(path.parent)
    return entry


# -- verification --
def verify_path(path: str | Path, key: bytes | None = None) -> list[str]:
    """Problems of a report folder, a cycle's folder or a ledger; empty: nothing was changed. See :func:`inspect_path`.

    Raises:
        AssuranceError: there is nothing to verify at ``path``.
    """
    return inspect_path(path, key).problems


def inspect_path(path: str | Path, key: bytes | None = None) -> Verification:
    """Check hashes, links and HMACs of all that lies at ``path``.

    Args:
        path: a folder with ``report.json``, that of a cycle (its ledger and every round's files), or a ledger.
        key: ``None``: from the environment. With a key, what is unsigned is a problem; without one, a note.

    Raises:
        AssuranceError: there is nothing to verify at ``path``.
    """
    path, key = Path(path), key or signing_key()
    if path.is_file() and path.name in (REPORT, SIGNATURE):
        path = path.parent
    if path.is_file():
        return _parse(path, key)[1]
    if (path / LEDGER).is_file():
        return _verify_cycle(path, key)
    if (path / REPORT).is_file() or (path / SIGNATURE).is_file():
        return verify_folder(path, key)
    raise AssuranceError(f"nothing to verify at {path}: give a report folder, a cycle's folder or a {LEDGER}")


def _verify_cycle(run: Path, key: bytes | None) -> Verification:
    good, found = _parse(run / LEDGER, key)
    payloads = {(entry["kind"], entry["round"]): entry["payload"] for entry in good}
    if good and good[0]["kind"] != "declared" and any(kind == "declared" for kind, _ in payloads):
        found.problems.append(f"{run / LEDGER}: limits were declared after the cycle had begun")
    declared = [payload for (kind, _), payload in payloads.items() if kind == "declared"]
    rounds = {number for _, number in payloads}
    for folder in sorted(run.glob("round_*")):
        digits = folder.name.removeprefix("round_")
        if folder.is_dir() and digits.isdigit():
            rounds.add(int(digits))
    for number in sorted(rounds):
        _verify_round(run, number, payloads, declared, key, found)
    return found


def _verify_round(
    run: Path,
    number: int,
    payloads: Mapping[tuple[str, int], dict[str, Any]],
    declared: Sequence[Mapping[str, Any]],
    key: bytes | None,
    found: Verification,
) -> None:
    folder = round_folder(run, number)
    objectives, report = folder / OBJECTIVES, folder / ASSURANCE / REPORT
    written, entry = payloads.get(("objectives", number)), payloads.get(("report", number))
    lost = "stands in no entry of the ledger, which was cut, or the cycle was killed here: go on with it"
    if written is None and objectives.is_file():
        found.problems.append(f"{objectives} {lost}")
    elif written is not None and not objectives.is_file():
        found.problems.append(f"{objectives} is missing")
    elif written is not None and sha256_file(objectives) != written.get("sha256"):
        found.problems.append(f"{objectives} was changed: its sha256 is not the ledger's")
    if entry is None:
        if (report.parent / SIGNATURE).is_file():
            found.problems.append(f"{report} {lost}")
        elif report.parent.is_dir():
            found.notes.append(f"{report.parent} is unfinished")
        return
    if ("decision", number) not in payloads:
        found.notes.append(f"{folder} has a report and no decision yet")
    found.add(verify_folder(report.parent, key))
    for name, file in (("report", report), ("signature", report.parent / SIGNATURE)):
        if file.is_file() and sha256_file(file) != entry.get(name):
            found.problems.append(f"{file} was changed: its sha256 is not the ledger's")
    try:
        content = json.loads(report.read_bytes())
        lineage, limits = content["lineage"], content["limits"]["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        return  # a problem of the folder, named above
    if any(payload.get("limits") != limits for payload in declared):
        found.problems.append(f"{report}: its limits are not those that were declared before training")
    model = payloads.get(("model", number), {}).get("digest")
    if model is not None and lineage.get("checkpoint_digest", lineage.get("model_digest")) != model:
        found.problems.append(f"{report}: the measured model is not the one that round {number} trained")
    before = payloads.get(("report", number - 1), {}).get("report", "")
    if lineage.get("parent_report", before) != before:
        found.problems.append(f"{report}: its parent is not the report of round {number - 1}")
