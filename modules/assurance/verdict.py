"""Limits and verdicts: uncertain is never a pass.

A gate passes only if both splits' intervals lie on the right side: the p-value of that claim is the larger of the two
splits' (intersection-union test, Berger 1982). Across gates Holm's step-down procedure keeps the chance of any wrong
pass at alpha. Units are doubled while a gate is uncertain; each look is judged at alpha / looks, so that looking again
does not make passes likelier either. The intervals that a report shows are plain ones of level alpha; the verdict uses
the corrected level, and both are written.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modules.assurance.figures import Figure, Sample, Split
from modules.assurance.subject import AssuranceError

Ruling = Literal["pass", "fail", "uncertain", "undefined"]
Verdict = Literal["pass", "fail", "inconclusive", "unjudged"]
EXIT_CODES: Mapping[Verdict, int] = {"pass": 0, "fail": 3, "inconclusive": 4, "unjudged": 0}


@dataclass(frozen=True)
class Limit:
    """A demand on a figure.

    Args:
        figure: its name.
        tau: threshold: at least (``up``) or at most (``down``).
        kind: ``gate`` decides the verdict, ``watch`` is only reported.
        scale: unit of the deficit, in the figure's unit.
        optional: a gate on a figure that the module does not offer is skipped in place of refused.

    Raises:
        AssuranceError: a threshold that is not a number, a scale that is not positive.
    """

    figure: str
    tau: float
    kind: Literal["gate", "watch"] = "gate"
    scale: float = 1.0
    optional: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.tau):
            raise AssuranceError(f"limit on {self.figure}: tau must be a number, got {self.tau}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise AssuranceError(f"limit on {self.figure}: scale must be positive, got {self.scale}")
        if self.kind not in ("gate", "watch"):
            raise AssuranceError(f"limit on {self.figure}: kind must be gate or watch, got '{self.kind}'")


@dataclass(frozen=True)
class Judgement:
    """What became of a limit.

    ``raw``: by the plain intervals. ``ruling``: with Holm's correction and that for repeated looks. ``p``: of the claim
    that the limit holds on both splits; ``p_holm`` adjusted. ``deficit``: how far the pessimistic end of the fresh
    interval falls short, in units of the limit's scale; ``None`` where the figure is undefined.
    """

    limit: Limit
    raw: Ruling
    ruling: Ruling
    p: float
    p_holm: float
    deficit: float | None
    reason: str = ""


def deficit(figure: Figure, limit: Limit) -> float | None:
    """``max(0, d (tau - bound) / scale)``, d = +1 where more is better, bound = pessimistic end of the interval."""
    bound = figure.pessimistic
    if not figure.measured or bound is None:
        return None
    sign = 1.0 if figure.direction == "up" else -1.0
    return max(0.0, sign * (limit.tau - bound) / limit.scale)


def check_limits(limits: Sequence[Limit], known: Iterable[str], offered: Mapping[str, str], family: str) -> None:
    """Refuse limits that this suite and module cannot answer, before anything is measured.

    Args:
        limits: the demands.
        known: names of all figures that any probe measures.
        offered: figure -> empty, or why this module does not offer it.
        family: the module's, for the message.

    Raises:
        AssuranceError: an unknown figure (with the nearest names), the same figure twice, a figure that the module or
            the suite does not offer.
    """
    names = [limit.figure for limit in limits]
    for name in names:
        if names.count(name) > 1:
            raise AssuranceError(f"limits: figure {name} stands twice; give one limit a figure")
    known = set(known)
    for limit in limits:
        if limit.figure not in known:
            near = difflib.get_close_matches(limit.figure, sorted(known), n=3, cutoff=0.4)
            raise AssuranceError(f"limit on unknown figure '{limit.figure}'; nearest: {', '.join(near) or 'none'}")
        reason = offered.get(limit.figure, "the suite does not measure it: choose a larger suite or list its probe")
        if reason and not limit.optional:
            measured = ", ".join(sorted(name for name, why in offered.items() if not why))
            raise AssuranceError(f"limit on {limit.figure}: {reason}; the {family} module offers {measured}")


def judge(
    limits: Sequence[Limit],
    samples: Mapping[tuple[str, Split], Sample],
    figures: Mapping[tuple[str, Split], Figure],
    alpha: float = 0.05,
    looks: int = 1,
) -> list[Judgement]:
    """Judge every limit on what was measured so far.

    Args:
        limits: the demands.
        samples: per figure and split, for all that was measured; exact figures on the fresh split alone.
        figures: the same figures, those not measured included.
        alpha: chance of any wrong pass among the gates; also one minus the plain intervals' confidence.
        looks: how often the gates may be judged at most.
    """
    gates = [limit for limit in limits if limit.kind == "gate"]
    claims = {limit.figure: _claim(limit, samples, figures) for limit in limits}
    adjusted = holm({limit.figure: claims[limit.figure][0] for limit in gates if claims[limit.figure] is not None})
    level = alpha / looks
    judgements = []
    for limit in limits:
        p, p_fail = claims[limit.figure]
        figure = figures[limit.figure, "fresh"]
        if not figure.measured:
            judgements.append(Judgement(limit, "undefined", "undefined", 1.0, 1.0, None, figure.reason))
            continue
        p_holm = adjusted.get(limit.figure, p)
        raw: Ruling = "pass" if p <= alpha else "fail" if p_fail <= alpha else "uncertain"
        ruling: Ruling = "pass" if p_holm <= level else "fail" if p_fail <= level else "uncertain"
        judgements.append(Judgement(limit, raw, ruling, p, p_holm, deficit(figure, limit)))
    return judgements


def _claim(
    limit: Limit, samples: Mapping[tuple[str, Split], Sample], figures: Mapping[tuple[str, Split], Figure]
) -> tuple[float, float]:
    """p-values that the limit holds on every split, and that it fails on some."""
    splits: tuple[Split, ...] = ("fresh", "anchor")
    found = [samples[limit.figure, split] for split in splits if (limit.figure, split) in samples]
    if not found or not figures[limit.figure, "fresh"].measured:
        return 1.0, 1.0
    above = found[0].measure.direction == "up"
    holds = max(sample.p_value(limit.tau, above) for sample in found)
    fails = min(1.0, len(found) * min(_fails(sample, limit.tau, above) for sample in found))
    return holds, fails


def _fails(sample: Sample, tau: float, above: bool) -> float:
    if sample.measure.estimator == "exact":  # exactly at the threshold is a pass
        return 1.0 - sample.p_value(tau, above)
    return sample.p_value(tau, not above)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) adjusted p-values: a claim holds at family level alpha iff its adjusted value is at most alpha."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def overall(judgements: Iterable[Judgement]) -> Verdict:
    """``fail`` if a gate fails, ``pass`` if all pass, ``unjudged`` without gates, else ``inconclusive``."""
    gates = [judgement for judgement in judgements if judgement.limit.kind == "gate"]
    if not gates:
        return "unjudged"
    required = [one for one in gates if not (one.limit.optional and one.ruling == "undefined")]
    if any(judgement.ruling == "fail" for judgement in required):
        return "fail"
    return "pass" if required and all(one.ruling == "pass" for one in required) else "inconclusive"
