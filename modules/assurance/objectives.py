"""Objectives of a round, and what a report makes of them: pure functions, without files and clocks.

What may drive a knob: figures that its ``driven_by`` names and that have a limit, and of those the *fresh* units alone.
Neither anchor figures nor rulings, which both splits decide, are read. A figure that is undefined is never a pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from modules.assurance.canonical import digest
from modules.assurance.knobs import GAINS, Knob, Value, is_number
from modules.assurance.layer import layer_text, read_layer
from modules.assurance.rules import Finding, Memory, Origin, move, random_move
from modules.assurance.subject import AssuranceError
from modules.assurance.verdict import Limit
from modules.seeds import stream, text_seed

__all__ = [
    "ARMS", "GAINS", "Arm", "Knob", "Objectives", "check_knobs", "first_objectives", "random_moves", "read_layer",
    "to_layer", "unchanged", "update",
]  # fmt: skip

Arm = Literal["findings", "fixed", "random"]
ARMS: tuple[str, ...] = get_args(Arm)
"""``findings``: :func:`update`. Controls at the same compute: ``fixed``: :func:`unchanged`; ``random``:
:func:`random_moves`."""
LARGEST_DEFICIT = 1e9  # a larger one moves nothing further


@dataclass(frozen=True)
class Objectives:
    """What a round trains for.

    Args:
        round: of the cycle, from 0.
        parent: sha256 of the report that led here; empty in round 0.
        limits: what is demanded, as plain mappings.
        knobs: path -> value.
        state: path -> the rule's memory, where it has one.
        seeds: root seeds by name.
    """

    round: int = 0
    parent: str = ""
    limits: list[dict[str, Any]] = field(default_factory=list)
    knobs: dict[str, Value] = field(default_factory=dict)
    state: dict[str, Memory] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


def first_objectives(
    knobs: Sequence[Knob],
    config: Mapping[str, Any] | None = None,
    limits: Sequence[Limit] = (),
    seeds: Mapping[str, int] | None = None,
) -> Objectives:
    """Objectives of round 0: every knob at its start, or where it has none at its value in the resolved ``config``.

    Raises:
        AssuranceError: two knobs for one value; a knob without a start; a start that does not fit.
    """
    _check_paths(knobs)
    values = {knob.path: knob.check(_start(knob, config), "start") for knob in knobs}
    return Objectives(0, "", [asdict(limit) for limit in limits], values, {}, dict(seeds or {}))


def _start(knob: Knob, config: Mapping[str, Any] | None) -> Any:
    if knob.start is not None:
        return knob.start
    if config is not None:
        return _found(knob, config)
    if knob.rule == "enqueue":
        return {}
    raise knob.wrong("no start: give the value of round 0")


def _check_paths(knobs: Sequence[Knob]) -> None:
    paths = sorted(knob.path for knob in knobs)
    for index, path in enumerate(paths):
        for other in paths[index + 1 :]:
            if other == path:
                raise AssuranceError(f"knob {path} stands twice: give it one rule")
            if other.startswith(f"{path}."):
                raise AssuranceError(f"knob {other} lies within knob {path}: drop one of them")


def update(objectives: Objectives, report: Mapping[str, Any], knobs: Sequence[Knob], sha: str = "") -> Objectives:
    """The next round's objectives.

    Applying the report that led here once more changes nothing. Where nothing falls short, only round and parent
    change, and for a knob that may relax its memory.

    Args:
        objectives: of the round that was measured.
        report: ``judgements`` and ``figures`` are read, as :func:`modules.assurance.report.build` gives them.
        knobs: those of ``objectives``, in any order.
        sha: of the report's canonical bytes; empty: computed.

    Raises:
        AssuranceError: a driving figure without a limit, undefined, or not a number; knobs that are not those of
            ``objectives``; a value out of bounds.
    """
    _check_same(objectives, knobs)
    judgements = _by_name(report, "judgements", "figure")
    figures = _by_name(report, "figures", "name")
    findings = {knob.path: [_finding(knob, name, judgements, figures) for name in knob.driven_by] for knob in knobs}
    sha = sha or digest(report, "report")
    if sha == objectives.parent:
        return objectives
    origin = Origin(objectives.round, sha)
    values, state = dict(objectives.knobs), {}
    for knob in knobs:
        defined = [one for one in findings[knob.path] if one is not None]
        before, memory = knob.check(values[knob.path]), objectives.state.get(knob.path, {})
        after, memory = move(knob, before, memory, defined, origin, len(defined) == len(knob.driven_by))
        values[knob.path] = knob.check(after)
        if memory:
            state[knob.path] = memory
    return replace(objectives, round=objectives.round + 1, parent=sha, knobs=values, state=state)


def unchanged(objectives: Objectives, sha: str = "") -> Objectives:
    """The arm ``fixed``: only round and parent change."""
    if sha and sha == objectives.parent:
        return objectives
    return replace(objectives, round=objectives.round + 1, parent=sha)


def random_moves(objectives: Objectives, knobs: Sequence[Knob], seed: int, sha: str = "") -> Objectives:
    """The arm ``random``: every knob moves at random (:func:`modules.assurance.rules.random_move`).

    Raises:
        AssuranceError: knobs that are not those of ``objectives``.
    """
    _check_same(objectives, knobs)
    if sha and sha == objectives.parent:
        return objectives
    values = {}
    for knob in knobs:
        noise = stream(seed, objectives.round, text_seed(knob.path))
        before = knob.check(objectives.knobs[knob.path])
        values[knob.path] = knob.check(random_move(knob, before, objectives.round, noise))
    return replace(objectives, round=objectives.round + 1, parent=sha, knobs=values)


def _check_same(objectives: Objectives, knobs: Sequence[Knob]) -> None:
    _check_paths(knobs)
    given = {knob.path for knob in knobs}
    for path in sorted(given ^ set(objectives.knobs)):
        where = "have no value for it: start with first_objectives" if path in given else "hold it, but it has no rule"
        raise AssuranceError(f"knob {path}: the objectives {where}")


def _by_name(report: Mapping[str, Any], part: str, key: str) -> dict[str, Mapping[str, Any]]:
    """Entries on fresh units by figure; judgements have no split of their own."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in report[part]:
        if entry.get("split", "fresh") != "fresh":
            continue
        if entry[key] in found:
            raise AssuranceError(f"report: {part} hold the figure {entry[key]} twice")
        found[entry[key]] = entry
    return found


def _finding(
    knob: Knob, name: str, judgements: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, Any]]
) -> Finding | None:
    """What drives ``knob``; ``None`` where the figure is undefined and the knob says skip."""
    if name not in judgements or name not in figures:
        near = difflib.get_close_matches(name, judgements, n=3, cutoff=0.4)
        among = f"the nearest with one: {', '.join(near)}" if near else "kind: watch suffices"
        raise knob.wrong(f"the report has no limit on its driving figure {name}: set one; {among}")
    judged, figure = judgements[name], figures[name]
    sign = 1.0 if judged["direction"] == "up" else -1.0
    lack, value, bound = judged["deficit"], figure["value"], figure["low" if sign > 0 else "high"]
    odd = [one for one in (lack, value, bound, *figure["conditions"].values()) if not is_number(one)]
    if figure["status"] != "measured" or odd or lack < 0:
        if knob.skip:
            return None
        why = figure.get("reason") or judged.get("reason") or f"it holds {odd[0] if odd else lack}"
        why = " ".join(str(why).split())[:200]
        raise knob.wrong(f"its driving figure {name} is undefined ({why}): mend the suite or set skip: true")
    return Finding(
        figure=name,
        deficit=min(float(lack), LARGEST_DEFICIT),
        tau=float(judged["tau"]),
        scale=float(judged["scale"]),
        sign=sign,
        value=float(value),
        bound=float(bound),
        conditions={condition: float(mean) for condition, mean in figure["conditions"].items()},
    )


def to_layer(objectives: Objectives) -> str:
    """The config layer of these objectives: nothing but the knobs' values, canonical YAML.

    Raises:
        AssuranceError: a parent that is no sha256.
    """
    return layer_text(objectives.knobs, objectives.round, objectives.parent)


def check_knobs(knobs: Sequence[Knob], config: Mapping[str, Any], known_figures: Iterable[str]) -> None:
    """Refuse knobs that do not fit a config or its limits, before anything is trained.

    Args:
        knobs: their own settings were checked when they were made.
        config: the resolved one, nested.
        known_figures: those that have a limit.

    Raises:
        AssuranceError: a path that the config lacks or whose value is an object, with the nearest path; a value that
            the rule cannot work on; a driving figure that is unknown, with the nearest ones.
    """
    _check_paths(knobs)
    known = sorted(set(known_figures))
    for knob in knobs:
        found = _found(knob, config)
        knob.check(
            found if knob.start is None else knob.start, "start" if knob.start is not None else "the config's value"
        )
        for name in knob.driven_by:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                raise knob.wrong(
                    f"driven by '{name}', on which there is no limit; nearest: {', '.join(near) or 'none'}"
                )


def _found(knob: Knob, config: Mapping[str, Any]) -> Any:
    """The config's value at the knob's path."""
    value: Any = config
    for part in knob.path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = difflib.get_close_matches(knob.path, sorted(_leaves(config)), n=1, cutoff=0.4)
            raise knob.wrong(
                "the config has no such key" + (f"; did you mean '{near[0]}'?" if near else ": mend the path")
            )
        value = value[part]
    if isinstance(value, Mapping) and "class_path" in value:
        raise knob.wrong("the config holds an object there: name one of its init_args")
    return value


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
            if all(map(is_number, value.values())):
                yield path  # weights: a knob as a whole
        elif key != "class_path":
            yield path
