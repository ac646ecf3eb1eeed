"""Running a suite: which probes apply, on how many units, shared among ranks, until the gates are decided."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modules.assurance.figures import Figure, Measure, Sample, Split, column, missing
from modules.assurance.probe import EFFORTS, SUITES, Block, Effort, Probe, block_seed
from modules.assurance.probes import all_probes
from modules.assurance.subject import AssuranceError, Subject, untouched
from modules.assurance.verdict import Judgement, Limit, Verdict, check_limits, judge, overall
from modules.seeds import stream_seed, text_seed

SPLITS: tuple[Split, Split] = ("fresh", "anchor")
UNITS: Mapping[str, tuple[int, int]] = {"quick": (40, 40), "rice": (200, 3200), "deep": (400, 12800)}
"""Units of the first look, and of the last one, where the settings name none."""


@dataclass(frozen=True)
class SuiteSettings:
    """What is measured, and how long.

    Args:
        suite: ``quick``, ``rice``, ``deep``, or ``custom``: the probes named.
        probes: names, for ``custom``.
        n0: units of the first look; default: the suite's own.
        n_max: no figure takes more units; default: the suite's own.
        alpha: level of intervals and of the verdict.
        anchor_share: anchor units per unit of all.
        root_seed: of all units; not that of training.
        round: of the cycle, from which fresh units are drawn.
        effort: overrides of the suite's effort, e.g. ``{"restarts": 5}``.

    Raises:
        AssuranceError: naming the setting.
    """

    suite: str = "rice"
    probes: tuple[str, ...] = ()
    n0: int | None = None
    n_max: int | None = None
    alpha: float = 0.05
    anchor_share: float = 0.2
    root_seed: int = 20231030
    round: int = 0
    effort: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.suite not in (*SUITES, "custom"):
            raise AssuranceError(f"suite must be one of {', '.join(SUITES)}, custom, got '{self.suite}'")
        if (self.suite == "custom") != bool(self.probes):
            raise AssuranceError("suite: custom and a list of probes belong together: give both or neither")
        for name in ("n0", "n_max"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise AssuranceError(f"{name} must be at least 2, got {value}")
        if self.n0 is not None and self.n_max is not None and self.n0 > self.n_max:
            raise AssuranceError(f"n0 ({self.n0}) must not be larger than n_max ({self.n_max})")
        if not 0.0 < self.alpha < 1.0:
            raise AssuranceError(f"alpha must be in (0, 1), got {self.alpha}")
        if not 0.0 < self.anchor_share < 1.0:
            raise AssuranceError(f"anchor_share must be in (0, 1), got {self.anchor_share}")
        if self.round < 0 or self.root_seed < 0:
            raise AssuranceError(f"round and root_seed must not be negative, got {self.round}, {self.root_seed}")
        for name, value in self.effort.items():
            if name not in ("attack_steps", "restarts") or value < 1:
                raise AssuranceError(f"effort takes attack_steps and restarts of at least 1, got {name}: {value}")

    @property
    def level(self) -> str:
        """The suite whose effort and numbers of units apply."""
        return "rice" if self.suite == "custom" else self.suite

    def plan(self, probe: Probe) -> tuple[int, int]:
        """Fresh units of ``probe``'s first and last look."""
        first, last = UNITS[self.level]
        first = probe.units.get(self.level, first) if self.n0 is None else self.n0
        last = max(first, probe.limit.get(self.level, last) if self.n_max is None else self.n_max)
        last = min(last, probe.limit.get(self.level, last))
        return min(first, last), last

    @property
    def strength(self) -> Effort:
        return replace(EFFORTS[self.level], **self.effort)


@dataclass(frozen=True)
class Ranks:
    """This process among its equals; ``gather`` collects one object of every rank, in rank order, on all of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]


@dataclass
class SuiteResult:
    """All that a suite found.

    ``seconds`` per probe and ``looks`` taken are not part of what is signed; ``max_looks``, which sets the level of the
    rulings, is.
    """

    subject: Subject
    settings: SuiteSettings
    limits: tuple[Limit, ...]
    figures: dict[tuple[str, Split], Figure]
    samples: dict[tuple[str, Split], Sample]
    judgements: list[Judgement]
    verdict: Verdict
    seconds: dict[str, float]
    looks: int
    max_looks: int = 1

    @property
    def level(self) -> float:
        """Of every look's rulings: alpha shared among the looks."""
        return self.settings.alpha / self.max_looks

    def figure(self, name: str, split: Split = "fresh") -> Figure:
        return self.figures[name, split]


def chosen_probes(settings: SuiteSettings) -> list[Probe]:
    """The suite's probes, in a fixed order.

    Raises:
        AssuranceError: an unknown probe, with the nearest names.
    """
    known = all_probes()
    if settings.suite != "custom":
        return [probe for probe in known.values() if settings.suite in probe.suites]
    for name in settings.probes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise AssuranceError(f"unknown probe '{name}'; nearest: {', '.join(near) or ', '.join(known)}")
    return [known[name] for name in dict.fromkeys(settings.probes)]


def run_suite(
    subject: Subject, settings: SuiteSettings, limits: Sequence[Limit] = (), ranks: Ranks | None = None
) -> SuiteResult:
    """Measure, judge, and measure more where a gate is uncertain.

    Every rank calls this; every rank returns the same. The subject's weights, modes, gradients and random states are as
    before.

    Raises:
        AssuranceError: limits that do not fit suite and subject; a probe that changed the model; nothing applies.
        ValueError: values of a probe that are no values, naming the figure.
    """
    ranks = ranks or Ranks()
    probes = chosen_probes(settings)
    applicable = [probe for probe in probes if not subject.lacks(probe.needs)]
    offered = _offered(probes, subject)
    every = {measure.name for probe in all_probes().values() for measure in probe.measures}
    check_limits(limits, every, offered, subject.family)
    if not applicable:
        raise AssuranceError(f"no probe of suite '{settings.suite}' applies to the {subject.family} module")
    plans = {probe.name: settings.plan(probe) for probe in applicable}
    looks = 1 + max(max(0, math.ceil(math.log2(last / first))) for first, last in plans.values())
    gated = {limit.figure for limit in limits if limit.kind == "gate"}
    gatherers = {probe.name: _Gatherer(probe, subject, settings) for probe in applicable}
    targets = {name: first for name, (first, _) in plans.items()}
    taken = 0
    with untouched(subject.model):
        while True:
            taken += 1
            _measure(list(gatherers.values()), targets, ranks)
            figures, samples = _collect(probes, gatherers, subject, settings)
            judgements = judge(limits, samples, figures, settings.alpha, looks)
            uncertain = {one.limit.figure for one in judgements if one.ruling == "uncertain"} & gated
            growing = [
                probe.name
                for probe in applicable
                if uncertain & {measure.name for measure in probe.measures}
                and targets[probe.name] < plans[probe.name][1]
                and not gatherers[probe.name].exhausted
            ]
            if not growing:
                break
            for name in growing:
                targets[name] = min(2 * targets[name], plans[name][1])
    seconds = {name: gatherer.seconds for name, gatherer in gatherers.items()}
    return SuiteResult(
        subject, settings, tuple(limits), figures, samples, judgements, overall(judgements), seconds, taken, looks
    )


def _offered(probes: Sequence[Probe], subject: Subject) -> dict[str, str]:
    """Figure of the suite -> why the subject does not offer it, empty where it does."""
    offered: dict[str, str] = {}
    for probe in probes:
        lacking = subject.lacks(probe.needs)
        reason = f"it needs {', '.join(lacking)}, which the {subject.family} module does not offer" if lacking else ""
        for measure in probe.measures:
            if measure.name not in offered or not reason:  # another probe may measure it
                offered[measure.name] = reason
    return offered


class _Gatherer:
    """A probe's values so far, block by block."""

    def __init__(self, probe: Probe, subject: Subject, settings: SuiteSettings) -> None:
        self.probe, self.subject, self.settings = probe, subject, settings
        self.blocks: dict[tuple[Split, int], dict[str, Any]] = {}
        self.seconds = 0.0

    def due(self, target: int) -> list[Block]:
        """Blocks up to ``target`` fresh units that were not measured yet."""
        if self.probe.exact:
            wanted: dict[Split, int] = {"fresh": 1}
            size = 1
        else:
            share = self.settings.anchor_share
            wanted = {"fresh": target, "anchor": max(2, round(target * share / (1.0 - share)))}
            size = self.probe.block
        blocks = []
        for split, units in wanted.items():
            for index in range(math.ceil(units / size)):
                if (split, index) not in self.blocks:
                    start = index * size
                    # whole blocks only: a later look must not change what an earlier one measured
                    seed = block_seed(self.settings.root_seed, self.settings.round, self.probe.name, split, index)
                    blocks.append(Block(index, start, size, split, seed, self.settings.strength))
        return blocks

    def run(self, block: Block) -> dict[str, Any]:
        mode = torch.enable_grad() if self.probe.autograd else torch.inference_mode()
        with mode:
            found = dict(self.probe.run(self.subject, block))
        names = {measure.name for measure in self.probe.measures}
        if unknown := sorted(set(found) - names):
            raise AssuranceError(f"probe {self.probe.name} measured {unknown[0]}, which it does not declare")
        return {name: _plain(value) for name, value in found.items()}

    @property
    def exhausted(self) -> bool:
        """The source gave fewer fresh units than the last block asked for."""
        last = max((key for key in self.blocks if key[0] == "fresh"), default=None)
        if last is None or self.probe.exact:
            return self.probe.exact
        lengths = [
            _length(self.blocks[last][measure.name])
            for measure in self.probe.measures
            if measure.estimator != "exact" and not isinstance(self.blocks[last].get(measure.name, ""), str)
        ]
        return not lengths or max(lengths) < self.probe.block

    def sample(self, measure: Measure, split: Split) -> Sample | str:
        """The values of one figure on one split, or why there are none."""
        exact = measure.estimator == "exact"
        parts = [
            found[measure.name]
            for (of, index), found in sorted(self.blocks.items())
            if of == ("fresh" if exact else split) and measure.name in found and not (exact and index)
        ]
        for part in parts:
            if isinstance(part, str):
                return part
        parts = [part for part in parts if _length(part)]
        if not parts:
            return "the source has no unit of this split"
        first = parts[0]
        names = tuple(first) if isinstance(first, dict) else ()
        if any((tuple(part) if isinstance(part, dict) else ()) != names for part in parts):
            return f"conditions differ between blocks of probe {self.probe.name}"
        values = (
            np.stack([np.concatenate([part[name] for part in parts]) for name in names], axis=1)
            if names
            else column(np.concatenate(parts))
        )
        baselines = (self.probe.baselines(self.subject) if self.probe.baselines else {}).get(measure.name, {})
        seed = stream_seed(self.settings.root_seed, self.settings.round, text_seed(f"bootstrap {measure.name} {split}"))
        return Sample(measure, values, names, seed, baselines)


def _plain(value: Any) -> Any:
    """Values as float64 arrays, ready to be gathered."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    return np.atleast_1d(np.asarray(value, dtype=np.float64))


def _length(value: Any) -> int:
    return min((len(one) for one in value.values()), default=0) if isinstance(value, dict) else len(value)


def _measure(gatherers: Sequence[_Gatherer], targets: Mapping[str, int], ranks: Ranks) -> None:
    """Measure all blocks that are due, every rank its share, and give every rank all of them."""
    work = [(gatherer, block) for gatherer in gatherers for block in gatherer.due(targets[gatherer.probe.name])]
    mine: dict[int, tuple[dict[str, Any] | str, float]] = {}
    failure: Exception | None = None
    for number in range(ranks.rank, len(work), ranks.world):
        gatherer, block = work[number]
        started = time.perf_counter()
        try:
            mine[number] = (gatherer.run(block), time.perf_counter() - started)
        except Exception as error:  # the other ranks wait for an answer: they get this one, and stop too
            mine[number] = (f"{type(error).__name__}: {error}", 0.0)
            failure = error
            break
    parts = ranks.gather(mine)
    if failure is not None:
        raise failure
    for part in parts:
        for number, (found, seconds) in part.items():
            gatherer, block = work[number]
            if isinstance(found, str):
                raise AssuranceError(f"probe {gatherer.probe.name} failed on another rank: {found}")
            gatherer.blocks[block.split, block.index] = found
            gatherer.seconds += seconds


def _collect(
    probes: Sequence[Probe], gatherers: Mapping[str, _Gatherer], subject: Subject, settings: SuiteSettings
) -> tuple[dict[tuple[str, Split], Figure], dict[tuple[str, Split], Sample]]:
    figures: dict[tuple[str, Split], Figure] = {}
    samples: dict[tuple[str, Split], Sample] = {}
    for probe in probes:
        lacking = subject.lacks(probe.needs)
        for measure in probe.measures:
            for split in SPLITS if measure.estimator != "exact" else SPLITS[:1]:
                key = (measure.name, split)
                if lacking:
                    figures.setdefault(key, missing(measure, split, "not_applicable", f"needs {', '.join(lacking)}"))
                    continue
                if key in samples:
                    raise AssuranceError(f"figure {measure.name} is measured by two probes of this suite")
                found = gatherers[probe.name].sample(measure, split)
                if isinstance(found, str):
                    figures[key] = missing(measure, split, "undefined", found)
                else:
                    figures[key] = found.figure(split, 1.0 - settings.alpha)
                    if figures[key].measured:
                        samples[key] = found
    return figures, samples
