"""The report of a suite: one canonical JSON, its samples, a card and a page for people, a signature.

What is signed holds no clock, path, machine or number of ranks: the same model, settings and units give the same bytes.
What a run took stands beside, in ``timing.json``, which is not signed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from modules.assurance import card, page
from modules.assurance.canonical import canonical_bytes, plain
from modules.assurance.figures import DIGITS, Figure, Sample
from modules.assurance.ledger import limits_digest
from modules.assurance.signature import CARD, PAGE, REPORT, SAMPLES, SIGNATURE, load_signature, seal, sign, signing_key
from modules.assurance.subject import AssuranceError, state_digest
from modules.assurance.suites import SuiteResult
from modules.files import atomic_write, sha256_file, write_bytes, write_json

__all__ = ["build", "canonical_bytes", "read", "sample_lines", "usefulness", "write"]

SCHEMA, VERSION = "plumbline.assurance.report", 1
TIMING = "timing.json"
LARGEST_LAYER = 64 * 1024  # bytes of an objectives layer
NAMELESS = "value"  # the condition of a sample that has no named ones


def build(
    result: SuiteResult,
    *,
    lineage: Mapping[str, Any] | None = None,
    objectives: str | Mapping[str, Any] | None = None,
    subject_digest: str,
) -> dict[str, Any]:
    """The report as JSON's types; :func:`canonical_bytes` of it are what is signed.

    Args:
        result: of the suite.
        lineage: where the model comes from: ``parent_report`` (sha256 of the last round's report),
            ``checkpoint_digest`` where a whole checkpoint and not the measured part of it is what the ledger names,
            and more of plain values.
        objectives: the layer that this round was trained with: its YAML text, or its values, nested or dotted.
        subject_digest: of the measured weights (:func:`modules.assurance.subject.state_digest`).

    Raises:
        AssuranceError: NaN or infinity anywhere, an objectives layer that is none; the message says where.
    """
    settings, by_name = result.settings, {name: figure for (name, _), figure in result.figures.items()}
    suite = {**asdict(settings), "name": settings.suite, "level": settings.level}
    suite |= {"max_looks": result.max_looks, "ruling_alpha": result.level}
    for moved in ("suite", "round", "root_seed"):
        del suite[moved]
    digest, count = hashlib.sha256(), 0
    for line in sample_lines(result):
        digest.update(line)
        count += 1
    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "family": result.subject.family,
        "suite": suite,
        "round": settings.round,
        "seeds": {"root": settings.root_seed, "fresh": settings.round, "anchor": 0},
        "limits": {
            "digest": limits_digest(result.limits),
            "declared": sorted((asdict(limit) for limit in result.limits), key=lambda limit: limit["figure"]),
        },
        "figures": [
            _figure(result.figures[key]) for key in sorted(result.figures, key=lambda k: (k[0], k[1] != "fresh"))
        ],
        "judgements": [
            {
                "figure": one.limit.figure,
                "direction": by_name[one.limit.figure].direction,
                **{name: getattr(one.limit, name) for name in ("tau", "kind", "scale", "optional")},
                **{name: getattr(one, name) for name in ("raw", "ruling", "p", "p_holm", "deficit", "reason")},
            }
            for one in sorted(result.judgements, key=lambda one: one.limit.figure)
        ],
        "verdict": result.verdict,
        "objectives": _objectives(objectives),
        "lineage": {"parent_report": "", **(lineage or {}), "model_digest": subject_digest},
        "card": {**asdict(result.subject.card), "completeness": result.subject.card.completeness()},
        "samples": {"sha256": digest.hexdigest(), "lines": count},
    }
    return plain(report, "report")


def _figure(figure: Figure) -> dict[str, Any]:
    found = {one.name: getattr(figure, one.name) for one in fields(figure)} | {"principle": figure.principle}
    return plain(found, f"report: figure {figure.name} ({figure.split})")


def _objectives(objectives: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``{"sha256": of the text or "", "values": dotted path -> value}``."""
    if objectives is None:
        return None
    digest, values = "", objectives
    if isinstance(objectives, str):
        digest = hashlib.sha256(objectives.encode()).hexdigest()
        values = _parsed(objectives)
    if not isinstance(values, Mapping):
        raise AssuranceError(f"objectives: a layer is a mapping of keys to values, got a {type(values).__name__}")
    return {"sha256": digest, "values": _dotted(values)}


def _parsed(text: str) -> Any:
    if len(text.encode()) > LARGEST_LAYER:
        raise AssuranceError(f"objectives: the layer has more than {LARGEST_LAYER // 1024} KiB: it holds knobs alone")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise AssuranceError("objectives: the layer uses a YAML alias (*name): write the value out")
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise AssuranceError(
            f"objectives: the layer is not valid YAML ({' '.join(str(error).split())[:100]})"
        ) from None


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= _dotted(value, f"{path}.")
        else:
            found[path] = value
    return found


def sample_lines(result: SuiteResult) -> Iterator[bytes]:
    """``samples.jsonl``: one line a unit: figure, split, number of the unit, value by condition; in a fixed order."""
    for (name, split), sample in sorted(result.samples.items(), key=lambda item: (item[0][0], item[0][1] != "fresh")):
        yield from _unit_lines(name, split, sample)


def _unit_lines(name: str, split: str, sample: Sample) -> Iterator[bytes]:
    conditions = sample.conditions or (NAMELESS,)
    order = sorted(range(len(conditions)), key=lambda column: conditions[column])
    head = f'{{"figure":{json.dumps(name)},"split":{json.dumps(split)},"unit":'
    keys = [f"{json.dumps(conditions[column])}:" for column in order]
    for unit, row in enumerate(sample.values[:, order].tolist()):
        cells = ",".join([key + repr(float(f"{value:.{DIGITS}g}") + 0.0) for key, value in zip(keys, row, strict=True)])
        yield f'{head}{unit},"values":{{{cells}}}}}\n'.encode("ascii")


def write(
    folder: str | Path,
    result: SuiteResult,
    *,
    objectives: str | Mapping[str, Any] | None = None,
    parent: str = "",
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the report folder: ``report.json``, ``samples.jsonl``, ``card.md``, ``report.html``, ``timing.json``, and
    last ``signature.json``, without which a folder is unfinished. Every file is whole or absent.

    The key of the signature comes from the environment (:mod:`modules.assurance.signature`).

    Args:
        folder: made where there is none; an older report in it is replaced.
        result: of the suite.
        objectives: as in :func:`build`.
        parent: sha256 of the last round's ``report.json``; empty: the first.
        lineage: more about where the model comes from.

    Returns:
        The report.

    Raises:
        AssuranceError: as :func:`build`; a signing key that is none.
        OSError: from writing, the disk being full in one line.
    """
    folder, key = Path(folder), signing_key()
    report = build(
        result,
        lineage={**(lineage or {}), "parent_report": parent},
        objectives=objectives,
        subject_digest=state_digest(result.subject.model),
    )
    content = canonical_bytes(report, "report")
    signature = sign(content, key)
    (folder / SIGNATURE).unlink(missing_ok=True)  # an older one must not vouch for a mixture
    with atomic_write(folder / SAMPLES) as stream:
        for line in sample_lines(result):
            write_bytes(stream, line)
    texts = ((REPORT, content), (CARD, card.model_card(report, signature)), (PAGE, page.report_page(report, signature)))
    for name, text in texts:
        with atomic_write(folder / name) as stream:
            write_bytes(stream, text if isinstance(text, bytes) else text.encode())
    write_json(folder / TIMING, _timing(result))
    seal(folder, key)
    return report


def _timing(result: SuiteResult) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "looks": result.looks,
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    }


def read(folder: str | Path) -> dict[str, Any]:
    """The report of a finished folder, its bytes checked against the signature's sha256.

    Raises:
        AssuranceError: an unfinished folder, changed bytes, a schema that is unknown or newer than this code.
    """
    folder = Path(folder)
    signature = load_signature(folder)
    path = folder / REPORT
    if not path.is_file() or sha256_file(path) != signature["files"][REPORT]:
        raise AssuranceError(f"{path} is missing or was changed: its sha256 is not the signed one")
    try:
        report = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise AssuranceError(f"{path} is no report of this kind: its schema must be '{SCHEMA}'")
    if report.get("version") != VERSION:
        raise AssuranceError(
            f"{path} has schema version {report.get('version')}, this code reads {VERSION}: use the version of "
            "Plumbline that wrote it"
        )
    return report


def usefulness(report: Mapping[str, Any]) -> float | None:
    """The value of the first usefulness figure on fresh units; ``None`` where none was measured."""
    for figure in report["figures"]:
        if figure["name"].startswith("u.") and figure["split"] == "fresh" and figure["status"] == "measured":
            return figure["value"]
    return None
