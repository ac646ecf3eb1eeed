"""The rules by which a report's findings move knobs.

A rule is a pure function of the knob's value, its memory and the driving figures' findings on fresh units. It never
leaves the bounds, a larger deficit never gives a smaller move, and without a deficit nothing moves, unless the knob
may relax. Moved values have 12 significant digits, so that a layer file holds them exactly.

| rule | move where a driving figure falls short by ``d`` (units of its limit's scale), ``g`` the gain |
|---|---|
| ``mult`` | ``u <- max(first, u min(1 + g d, max_ratio))``; down: ``u / min(1 + g d, max_ratio)`` |
| ``backoff`` | ``u <- u - g v``, ``v = d scale`` the violation in the figure's unit; ``direction: up`` adds it |
| ``kl_adapt`` | ``u <- u (1 + g e)``, ``e = clip(value / target - 1, 0, 0.2)`` (Ziegler et al. 2019, section 2.2) |
| ``exp_weights`` | ``q_j <- q_j exp(g loss_j) / Z``, each at least ``floor`` (Sagawa et al. 2020, algorithm 1) |
| ``widen`` | the failing side of ``[a, b]`` goes out by ``min(g d, max_ratio - 1) (b - a)`` |
| ``enqueue`` | training items that fall short join the pool ``item -> round`` |
| ``pid`` | ``u <- u + max(0, g d + ki sum(d) + kd (d - last d))`` |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modules.assurance.figures import rounded
from modules.assurance.knobs import Knob, Value
from modules.objectives.shift import exp_weights

Memory = dict[str, Any]
"""Of a rule, in JSON's types: ``calm`` (rounds passed with slack), ``integral``, ``last``, ``provenance``."""
KL_CLIP = 0.2


@dataclass(frozen=True)
class Finding:
    """What the fresh units say about one driving figure.

    ``sign``: +1 where more is better. ``bound``: the interval's pessimistic end. ``tau``, ``scale``: of its limit.
    """

    figure: str
    deficit: float
    tau: float
    scale: float
    sign: float
    value: float
    bound: float
    conditions: Mapping[str, float]

    @property
    def violation(self) -> float:
        """The deficit in the figure's unit."""
        return self.deficit * self.scale

    @property
    def surplus(self) -> float:
        """How far the pessimistic end clears the threshold, in units of the scale; below 0 where it does not."""
        return self.sign * (self.bound - self.tau) / self.scale

    def short(self, condition: str) -> float:
        """How far one condition's mean falls short of the threshold; at most 0 where it does not."""
        return self.sign * (self.tau - self.conditions[condition])


@dataclass(frozen=True)
class Origin:
    """Which report moves a knob: its round and its sha256."""

    round: int
    report: str


def move(
    knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], origin: Origin, whole: bool = True
) -> tuple[Value, Memory]:
    """The knob's next value and memory.

    Args:
        knob: with its rule.
        value: as :meth:`Knob.check` takes it.
        memory: of the rule; it is not changed.
        findings: one a figure that is defined, in any order.
        origin: for what joins a pool.
        whole: whether all driving figures are defined; else a round does not count towards relaxing.

    Raises:
        AssuranceError: a condition that the figure lacks, or a figure that the rule cannot read.
    """
    findings = sorted(findings, key=lambda one: one.figure)
    calm = memory.get("calm", 0)
    kept = {name: one for name, one in memory.items() if name != "calm"}
    if any(one.deficit > 0 for one in findings):
        return _RULES[knob.rule](knob, value, kept, findings, origin)
    if not knob.relax or not findings or not whole or any(one.surplus < knob.slack for one in findings):
        return value, kept
    if calm + 1 < knob.patience:
        return value, {**kept, "calm": calm + 1}
    return _relaxed(knob, value, findings), {}


def _largest(findings: Sequence[Finding]) -> float:
    return max(one.deficit for one in findings)


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return value


def _mult(knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin) -> tuple[Value, Memory]:
    u, factor = _number(value), knob.factor(_largest(findings))
    if knob.way == "down":
        return min(u, knob.clip(u / factor)), memory  # rounding must not turn a tiny move round
    return max(u, knob.clip(max(knob.first, u * factor))), memory


def _backoff(knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin) -> tuple[Value, Memory]:
    return _pushed(knob, _number(value), knob.step * max(one.violation for one in findings)), memory


def _pushed(knob: Knob, u: float, amount: float) -> float:
    """``u`` by ``amount`` along the knob's way, never back: a falling deficit relaxes nothing, nor does rounding."""
    return min(u, knob.clip(u - amount)) if knob.way == "down" else max(u, knob.clip(u + amount))


def _kl_adapt(knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin) -> tuple[Value, Memory]:
    u, excess = _number(value), min(_kl_excess(knob, findings[0]), KL_CLIP)
    return max(u, knob.clip(max(knob.first, u * (1.0 + knob.step * excess)))), memory  # never down: see _relaxed


def _kl_excess(knob: Knob, finding: Finding) -> float:
    """``KL / KL* - 1``."""
    target = finding.tau if knob.target is None else knob.target
    if finding.sign > 0 or target <= 0:
        raise knob.wrong(f"rule kl_adapt needs a figure of which less is better and a target above 0: {finding.figure}")
    return finding.value / target - 1.0


def _exp_weights(
    knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin
) -> tuple[Value, Memory]:
    finding = findings[0]
    if isinstance(value, dict):
        names = sorted(value)  # sums in a fixed order
        given = knob.conditions if isinstance(knob.conditions, dict) else {}
        found = [given.get(name, name) for name in names]
        q = [value[name] for name in names]
    else:
        names = []
        assert isinstance(value, list)
        assert isinstance(knob.conditions, list)
        found, q = knob.conditions, value
    losses = [-finding.sign * _condition(knob, finding, condition) for condition in found]
    new = _stepped(knob, q, losses)
    return (dict(zip(names, new, strict=True)) if names else new), memory


def _stepped(knob: Knob, q: Sequence[float], losses: Sequence[float]) -> list[float]:
    old, worth = (torch.tensor(list(one), dtype=torch.float64) for one in (q, losses))
    new = exp_weights(old, worth, knob.step, knob.least)
    return list(q) if torch.equal(new, old) else [max(rounded(one), knob.least) for one in new.tolist()]


def _condition(knob: Knob, finding: Finding, name: str) -> float:
    if name not in finding.conditions:
        near = difflib.get_close_matches(name, finding.conditions, n=3, cutoff=0.4)
        among = ", ".join(near or sorted(finding.conditions)) or "none"
        raise knob.wrong(f"figure {finding.figure} has no condition '{name}'; it has {among}: mend conditions")
    return finding.conditions[name]


def _widen(knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin) -> tuple[Value, Memory]:
    assert isinstance(value, list)
    low, high = value
    growth = (knob.factor(findings[0].deficit) - 1.0) * (high - low) if high > low else knob.first
    sides = _failing_sides(knob, findings[0])
    if "low" in sides:
        low = min(low, knob.clip(low - growth))
    if "high" in sides:
        high = max(high, knob.clip(high + growth))
    return [low, high], memory


def _failing_sides(knob: Knob, finding: Finding) -> set[str]:
    """Sides whose condition's mean falls short; the worse one where only the interval does."""
    if not isinstance(knob.conditions, dict):
        return {"up": {"high"}, "down": {"low"}, "both": {"low", "high"}}[knob.way]
    for condition in knob.conditions.values():
        _condition(knob, finding, condition)
    short = {side: finding.short(condition) for side, condition in knob.conditions.items()}
    return {side for side, one in short.items() if one > 0} or {
        side for side, one in short.items() if one == max(short.values())
    }


def _enqueue(
    knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], origin: Origin
) -> tuple[Value, Memory]:
    assert isinstance(value, dict)
    worst: dict[str, tuple[float, str]] = {}
    for finding in findings:
        for item in set(knob.items) & set(finding.conditions):
            short = finding.short(item) / finding.scale
            if short > 0 and item not in value and short > worst.get(item, (0.0, ""))[0]:
                worst[item] = (short, finding.figure)
    room = len(knob.items) if knob.bounds is None else int(knob.bounds[1])
    taken = sorted(worst, key=lambda item: (-worst[item][0], item))[: max(0, room - len(value))]
    pool = {**value, **dict.fromkeys(taken, origin.round)}
    ids = {item: f"{origin.report[:12]}:{worst[item][1]}:{item}" for item in taken}
    provenance = {**memory.get("provenance", {}), **ids}
    return pool, ({**memory, "provenance": provenance} if provenance else memory)


def _pid(knob: Knob, value: Value, memory: Memory, findings: Sequence[Finding], _: Origin) -> tuple[Value, Memory]:
    u, deficit = _number(value), _largest(findings)
    assert knob.bounds is not None
    end = knob.bounds[0] if knob.way == "down" else knob.bounds[1]
    integral = memory.get("integral", 0.0) + (deficit if u != end else 0.0)  # no wind-up at the bound
    change = deficit - memory.get("last", deficit)
    amount = knob.step * deficit + knob.ki * integral + knob.kd * change
    return _pushed(knob, u, amount), {**memory, "integral": rounded(integral), "last": rounded(deficit)}


def _relaxed(knob: Knob, value: Value, findings: Sequence[Finding]) -> float:
    """One move back, as large as a deficit of ``slack`` would have made."""
    u = _number(value)
    if knob.rule == "kl_adapt":
        return min(u, knob.clip(u * (1.0 + knob.step * min(max(_kl_excess(knob, findings[0]), -KL_CLIP), 0.0))))
    if knob.rule == "mult":
        factor = knob.factor(knob.slack)
        return knob.clip(u * factor if knob.way == "down" else u / factor)
    unit = min(one.scale for one in findings) if knob.rule == "backoff" else 1.0
    amount = knob.step * knob.slack * unit
    return knob.clip(u + amount if knob.way == "down" else u - amount)


Rule = Callable[[Knob, Value, Memory, Sequence[Finding], Origin], tuple[Value, Memory]]
_RULES: Mapping[str, Rule] = {
    "mult": _mult,
    "backoff": _backoff,
    "kl_adapt": _kl_adapt,
    "exp_weights": _exp_weights,
    "widen": _widen,
    "enqueue": _enqueue,
    "pid": _pid,
}


def random_move(knob: Knob, value: Value, round_number: int, noise: torch.Generator) -> Value:
    """A move that no finding drives, either way and within the bounds.

    At most as large as the rule's largest one (``max_ratio``), or as that of a deficit of 1 where it has no cap.
    """

    def uniform(low: float = -1.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=noise, dtype=torch.float64))

    if isinstance(value, dict) and knob.rule == "enqueue":
        left = [item for item in sorted(knob.items) if item not in value]
        full = not left or (knob.bounds is not None and len(value) >= knob.bounds[1])
        if full or uniform() < 0:
            return value
        return {**value, left[int(uniform(0, len(left)))]: round_number}
    if knob.rule == "exp_weights":
        names = sorted(value) if isinstance(value, dict) else []
        q = [value[name] for name in names] if isinstance(value, dict) else value
        assert isinstance(q, list)
        new = _stepped(knob, q, torch.randn(len(q), generator=noise, dtype=torch.float64).tolist())
        return dict(zip(names, new, strict=True)) if names else new
    if isinstance(value, list):
        low, high = value
        size = knob.budget * (high - low) if high > low else knob.first
        return sorted((knob.clip(low + size * uniform()), knob.clip(high + size * uniform())))
    u = _number(value)
    if knob.rule in ("mult", "kl_adapt") and u == 0:
        return knob.clip(max(0.0, knob.first * uniform()))
    if knob.rule == "mult":
        return knob.clip(u * (1.0 + knob.budget) ** uniform())
    if knob.rule == "kl_adapt":
        return knob.clip(u * (1.0 + knob.step * KL_CLIP * uniform()))
    return knob.clip(u + knob.step * uniform())
