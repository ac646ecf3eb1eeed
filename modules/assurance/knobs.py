"""Knobs: config values that findings may move, and the values that their rules can work on."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modules.assurance.figures import NAME, rounded
from modules.assurance.subject import AssuranceError

Value = float | list[float] | dict[str, float]

GAINS: Mapping[str, float] = {
    "mult": 0.5,
    "backoff": 1.0,
    "kl_adapt": 0.1,
    "exp_weights": 0.1,
    "widen": 0.5,
    "enqueue": 1.0,
    "pid": 0.5,
}
"""All rules, with the gain of a knob that names none (sheet, section 2.5; ``enqueue`` has no use for one)."""
RELAXING = ("mult", "backoff", "kl_adapt", "pid")
SINGLE = ("kl_adapt", "exp_weights", "widen")  # rules that read more of a figure than its deficit: one figure each
BOUNDED = ("mult", "backoff", "kl_adapt", "widen", "pid")
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class Knob:
    """A config value that findings may move.

    Args:
        path: dotted, as in a config (``model.init_args.eps``).
        rule: one of :data:`GAINS`; see :mod:`modules.assurance.rules`.
        driven_by: figures that have a limit (a gate or a watch); the largest deficit counts.
        bounds: ``[lo, hi]`` that the value never leaves (``widen``: both ends; ``enqueue``: ``hi`` is the most items;
            ``exp_weights``: none needed, ``lo`` raises the floor).
        start: value of round 0: a number; ``exp_weights``: a mapping or list of weights with sum 1; ``widen``:
            ``[a, b]``; ``enqueue``: a pool, by default an empty one. ``null``: the config's own value.
        gain: step size; ``null``: the rule's own.
        first: first step away from 0 (``mult``, ``kl_adapt``), first width of a range of width 0 (``widen``).
        max_ratio: largest factor of one move (``mult``, ``widen``); ``null``: no cap.
        direction: where a deficit pushes; ``null``: down for ``backoff``, else up. ``widen`` without conditions: which
            end goes out, ``both`` for both.
        target: of ``kl_adapt``: KL*; ``null``: the limit's threshold.
        floor: of ``exp_weights``: least weight.
        conditions: ``exp_weights``: the figure's condition of each weight: name -> condition (default: equal names)
            or, for a list of weights, a list. ``widen``: ``{low: condition, high: condition}`` beyond each end.
        items: of ``enqueue``: ids of the training split, which are conditions of the figure. No other one is added.
        ki, kd: of ``pid``.
        relax: whether the knob goes back once all its figures passed with ``slack`` for ``patience`` rounds in a row.
        slack: distance of the interval's pessimistic end from the threshold, in units of the limit's scale.
        patience: rounds.
        skip: leave the knob alone where a figure is undefined, in place of an error; it never counts as a pass.
        allow_interpretability: let figures ``i.*`` drive it; optimising them invites Goodhart's law.

    Raises:
        AssuranceError: naming the knob and the setting.
    """

    path: str
    rule: str
    driven_by: list[str]
    bounds: list[float] | None = None
    start: float | list[float] | dict[str, float] | None = None
    gain: float | None = None
    first: float = 0.0
    max_ratio: float | None = None
    direction: Literal["up", "down", "both"] | None = None
    target: float | None = None
    floor: float = 0.02
    conditions: list[str] | dict[str, str] | None = None
    items: list[str] = field(default_factory=list)
    ki: float = 0.0
    kd: float = 0.0
    relax: bool = False
    slack: float = 1.0
    patience: int = 2
    skip: bool = False
    allow_interpretability: bool = False

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path) or "class_path" in self.path.split("."):
            raise AssuranceError(
                f"knob '{self.path}': path must be the dotted name of a plain value, like model.init_args.eps"
            )
        if self.rule not in GAINS:
            near = difflib.get_close_matches(self.rule, GAINS, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(GAINS)}"
            raise self.wrong(f"unknown rule '{self.rule}'; {hint}")
        self._check_figures()
        self._check_numbers()
        if self.start is not None:
            self.check(self.start, "start")

    def wrong(self, what: str) -> AssuranceError:
        """An error that names this knob."""
        return AssuranceError(f"knob {self.path}: {what}")

    def _check_figures(self) -> None:
        if not self.driven_by or len(set(self.driven_by)) < len(self.driven_by):
            raise self.wrong("driven_by must name at least one figure, and none twice")
        if self.rule in SINGLE and len(self.driven_by) > 1:
            raise self.wrong(f"rule {self.rule} reads one figure: name one in driven_by")
        for name in self.driven_by:
            if not NAME.fullmatch(name):
                raise self.wrong(f"driven_by: '{name}' is no figure's name, which reads like r.worst_return")
            if name.startswith("i.") and not self.allow_interpretability:
                raise self.wrong(
                    f"{name} is an interpretability figure, which drives nothing by default: name another one or set "
                    "allow_interpretability: true"
                )
        if (self.rule == "enqueue") != bool(self.items):
            raise self.wrong("items and rule enqueue belong together: items are the ids of the training split")
        if self.conditions is not None and self.rule not in ("exp_weights", "widen"):
            raise self.wrong("conditions are for the rules exp_weights and widen: leave them out")
        if self.rule == "widen" and self.conditions is not None:
            sides = set(self.conditions) if isinstance(self.conditions, dict) else set()
            if not sides or sides - {"low", "high"}:
                raise self.wrong("conditions of rule widen must read {low: condition, high: condition}")

    def _check_numbers(self) -> None:
        if self.bounds is None and self.rule in BOUNDED:
            raise self.wrong(f"rule {self.rule} needs bounds: [lo, hi]")
        if self.bounds is not None:
            if len(self.bounds) != 2 or not all(map(is_number, self.bounds)):
                raise self.wrong(f"bounds must be two numbers [lo, hi], got {self.bounds}")
            if self.bounds[0] > self.bounds[1]:
                raise self.wrong(f"bounds [{self.bounds[0]:g}, {self.bounds[1]:g}] are empty: swap lo and hi")
            if self.rule in ("mult", "kl_adapt", "enqueue") and self.bounds[0] < 0:
                raise self.wrong(f"rule {self.rule} takes values of at least 0: raise the lower bound")
            if self.rule == "exp_weights" and self.bounds[1] < 1:
                raise self.wrong("weights have no upper bound of their own: let bounds end at 1 or leave them out")
            if self.rule in ("mult", "kl_adapt") and self.first > self.bounds[1]:
                raise self.wrong(f"first ({self.first:g}) lies above the upper bound {self.bounds[1]:g}")
        for name in ("gain", "first", "floor", "ki", "kd"):
            number = getattr(self, name)
            if number is not None and not (is_number(number) and number >= 0):
                raise self.wrong(f"{name} must be a number of at least 0, got {number}; see direction for its sign")
        if self.max_ratio is not None and not (is_number(self.max_ratio) and self.max_ratio > 1):
            raise self.wrong(f"max_ratio must be above 1, got {self.max_ratio}")
        if self.target is not None and not (is_number(self.target) and self.target > 0):
            raise self.wrong(f"target must be above 0, got {self.target}")
        if not (is_number(self.slack) and self.slack > 0) or self.patience < 1:
            raise self.wrong(f"slack must be above 0 and patience at least 1, got {self.slack}, {self.patience}")
        if self.direction not in (None, "up", "down") and (self.direction, self.rule) != ("both", "widen"):
            raise self.wrong(f"direction must be up or down (widen: or both), got '{self.direction}'")
        if self.direction == "down" and self.rule == "kl_adapt":
            raise self.wrong("rule kl_adapt raises its coefficient: leave direction out")
        if self.relax and self.rule not in RELAXING:
            raise self.wrong(f"relax is for the rules {', '.join(RELAXING)}: a {self.rule} knob never goes back")

    @property
    def step(self) -> float:
        """The gain."""
        return GAINS[self.rule] if self.gain is None else self.gain

    @property
    def way(self) -> str:
        """``up``, ``down`` or ``both``."""
        return self.direction or ("down" if self.rule == "backoff" else "up")

    @property
    def least(self) -> float:
        """Floor of the weights."""
        return max(self.floor, self.bounds[0] if self.bounds else 0.0)

    def factor(self, amount: float) -> float:
        """``min(1 + gain amount, max_ratio)``."""
        raw = 1.0 + self.step * amount
        return raw if self.max_ratio is None else min(raw, self.max_ratio)

    @property
    def budget(self) -> float:
        """Relative size of the largest usual move: ``max_ratio - 1``, or the gain where there is no cap."""
        return self.step if self.max_ratio is None else self.max_ratio - 1.0

    def clip(self, number: float) -> float:
        assert self.bounds is not None
        return float(min(max(rounded(number), self.bounds[0]), self.bounds[1]))

    def check(self, value: Any, what: str = "value") -> Value:
        """``value`` if the rule can work on it, as floats; a pool's rounds stay whole numbers.

        Raises:
            AssuranceError: another shape, not finite, out of bounds; the message begins with the knob and ``what``.
        """
        if self.rule == "exp_weights":
            return self._check_weights(value, what)
        if self.rule == "enqueue":
            if not isinstance(value, Mapping) or not all(map(is_number, value.values())):
                raise self.wrong(f"{what} must be a pool, a mapping of items to numbers, got {short(value)}")
            if unknown := [item for item in value if item not in self.items]:
                raise self.wrong(f"{what} holds '{unknown[0]}', which is not among its items (the training split)")
            if self.bounds is not None and len(value) > self.bounds[1]:
                raise self.wrong(f"{what} holds {len(value)} items, more than the upper bound {self.bounds[1]:g}")
            return dict(value)
        assert self.bounds is not None
        low, high = self.bounds
        if self.rule == "widen":
            if not isinstance(value, Sequence) or len(value) != 2 or not all(map(is_number, value)):
                raise self.wrong(f"{what} must be a range [a, b], got {short(value)}")
            if not low <= value[0] <= value[1] <= high:
                raise self.wrong(f"{what} {short(value)} must be ordered and within the bounds [{low:g}, {high:g}]")
            return [float(end) for end in value]
        if not is_number(value):
            raise self.wrong(f"{what} must be a finite number, got {short(value)}")
        if not low <= value <= high:
            raise self.wrong(f"{what} {value:g} lies outside the bounds [{low:g}, {high:g}]")
        if value == 0 and self.first == 0 and self.rule in ("mult", "kl_adapt") and self.way == "up" and high > 0:
            raise self.wrong(f"{what} is 0, which no factor moves: give `first`, the first step away from 0")
        return float(value)

    def _check_weights(self, value: Any, what: str) -> Value:
        weights: list[Any] = []
        if isinstance(value, Mapping | list | tuple):
            weights = list(value.values() if isinstance(value, Mapping) else value)
        if not weights or not all(is_number(one) and one >= 0 for one in weights):
            raise self.wrong(f"{what} must be a mapping or list of weights of at least 0, got {short(value)}")
        if not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
            raise self.wrong(f"{what}: the weights' sum is {math.fsum(weights):g}: divide them by it")
        if self.least * len(weights) > 1 + 1e-9:
            raise self.wrong(f"{len(weights)} weights of at least {self.least:g} exceed 1: lower the floor")
        if isinstance(value, Mapping):
            if isinstance(self.conditions, list):
                raise self.wrong("the weights have names: conditions must be a mapping of those names to conditions")
            if unknown := [name for name in self.conditions or {} if name not in value]:
                raise self.wrong(f"conditions: no weight is named '{unknown[0]}'; they are {', '.join(value)}")
            if isinstance(self.start, Mapping) and set(value) != set(self.start):
                raise self.wrong(f"{what} must weigh what start weighs: {', '.join(self.start)}")
            return {name: float(one) for name, one in value.items()}
        if not isinstance(self.conditions, list) or len(self.conditions) != len(weights):
            raise self.wrong(f"{what} is a list: give conditions: a list of {len(weights)} conditions of the figure")
        return [float(one) for one in weights]


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def short(value: Any) -> str:
    """``value`` for a message, at most 60 characters."""
    try:
        text = " ".join((value if isinstance(value, str) else repr(value)).split())
    except ValueError:  # a whole number of too many digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
