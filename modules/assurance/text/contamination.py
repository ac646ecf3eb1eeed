"""Which evaluation items stand in the training data, read from the corpus build's own reports (``e.contam``).

The overlap itself is found once, where the documents stream by: the corpus build indexes the evaluation sets' word
n-grams and confirms every hit word by word (``decontaminate:`` of the corpus datamodule), and its report travels with
the corpus. A probe gets the reports through a capability, and this file makes units of them: an item is contaminated
if a document of any training source shares an n-gram with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules.assurance.subject import AssuranceError


def contaminated_items(reports: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Tensor]:
    """Per evaluation file, bool ``[items]``: which of the items that can be found were found in a training source.

    Items without a run of n words are left out: nothing can be said about them. Contaminated ones come first; the
    reports do not name the clean ones.

    Args:
        reports: training source -> its report, or None where the source was not checked. Of a report are read ``ngram``
            and, under ``files``, each evaluation file's ``items``, ``too_short`` and ``hits`` (by item).

    Raises:
        AssuranceError: no source was checked, only some were, the sources were checked with different n or against
            different items, a malformed report.
    """
    if not reports or all(report is None for report in reports.values()):
        raise AssuranceError("contamination: no training source was checked; name evaluation files under decontaminate")
    for source, report in reports.items():
        if report is None:
            raise AssuranceError(
                f"contamination: training source '{source}' was not checked; the others say nothing of it"
            )
    try:
        return _union({source: report for source, report in reports.items() if report is not None})
    except (KeyError, TypeError, AttributeError) as error:
        raise AssuranceError(f"contamination: a report is malformed ({error!r}); build the corpus again") from None


def _union(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    first, reference = next(iter(reports.items()))
    found: dict[str, set[str]] = {file: set() for file in reference["files"]}
    for source, report in reports.items():
        if report["ngram"] != reference["ngram"] or _sizes(report) != _sizes(reference):
            raise AssuranceError(
                f"contamination: sources '{first}' and '{source}' were checked against different items or n"
            )
        for file, entry in report["files"].items():
            found[file] |= set(entry["hits"])
    units = {}
    for file, (items, too_short) in _sizes(reference).items():
        hit = len(found[file])
        if not hit <= items - too_short:
            raise AssuranceError(
                f"contamination: {file}: {hit} items hit of {items - too_short}; build the corpus again"
            )
        units[file] = torch.arange(items - too_short) < hit
    return units


def _sizes(report: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {file: (entry["items"], entry["too_short"]) for file, entry in report["files"].items()}
