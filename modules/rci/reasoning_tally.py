"""Counts of answered reasoning questions and the figures made of them; counts add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

from modules.assurance.paired import mcnemar_exact
from modules.rci.reasoning_modes import Answered, ReasoningMode
from modules.verification.voting import wilson_interval

FLIPS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")
FIELDS = (
    "items",
    "right",
    "answered",
    "calls",
    "extraction_calls",
    "prompt_tokens",
    "completion_tokens",
    *FLIPS,
    "any_right",
    "stopped_early",
    "only_mode",
    "only_other",
)


class ReasoningTally:
    """Counts of one mode on one set.

    ``FLIPS`` compare the first with the last round; ``any_right``: items with a right round or sample;
    ``only_mode``, ``only_other``: items that only this mode, or only the one it is tested against, got right.

    Args:
        rounds: RCI rounds of the mode; the counts hold the right answers after 0 .. ``rounds`` of them.
        counts: from :attr:`counts`, summed over ranks; zeros by default.
    """

    def __init__(self, rounds: int, counts: Sequence[float] | None = None) -> None:
        self.rounds = rounds
        self.counts = [0] * self.size(rounds) if counts is None else [round(count) for count in counts]
        if len(self.counts) != self.size(rounds):
            raise ValueError(f"ReasoningTally: {rounds} rounds want {self.size(rounds)} counts, got {len(self.counts)}")

    @staticmethod
    def size(rounds: int) -> int:
        return len(FIELDS) + rounds + 1

    def __getitem__(self, name: str) -> int:
        return self.counts[FIELDS.index(name)]

    def add(self, answered: Answered, other: Answered) -> None:
        """Count one item; ``other``: the same item in the mode that this one is tested against."""
        first, ok = answered.round_right(0), answered.ok
        seen = {
            "items": 1,
            "right": ok,
            "answered": answered.answer is not None,
            "calls": len(answered.calls),
            "extraction_calls": sum(call.extracts for call in answered.calls),
            "prompt_tokens": answered.prompt_tokens,
            "completion_tokens": answered.completion_tokens,
            FLIPS[2 * (not first) + (not ok)]: 1,
            "any_right": any(answered.right),
            "stopped_early": answered.stopped_by in ("oracle", "verifier", "unchanged"),
            "only_mode": ok and not other.ok,
            "only_other": other.ok and not ok,
        }
        for name, value in seen.items():
            self.counts[FIELDS.index(name)] += int(value)
        for number in range(self.rounds + 1):
            self.counts[len(FIELDS) + number] += answered.round_right(number)

    def metrics(self, mode: ReasoningMode, *, tested: bool = True) -> tuple[dict[str, float], dict[str, float]]:
        """Figures by name: the main ones, and the rest. Nothing without items.

        Main: ``accuracy``, ``calls`` an item and, if ``tested`` against another mode, ``mcnemar_p``. The rest: the
        95 % Wilson interval ``accuracy_low``, ``accuracy_high``, ``answered`` (share with an answer), tokens an item,
        items, and with rounds ``accuracy_round_<k>``, flip counts and ``any_round_right`` (share); with samples
        ``any_sample_right``. Where the label ends the rounds, every figure that rests on right answers carries
        ``oracle_stop`` in its name instead: it measures no self-correction.
        """
        items = self["items"]
        if not items:
            return {}, {}
        accuracy, oracle = ("accuracy_oracle_stop", "_oracle_stop") if mode.uses_label else ("accuracy", "")
        low, high = wilson_interval(self["right"], items)
        main = {accuracy: self["right"] / items, "calls": self["calls"] / items}
        if tested:
            main[f"mcnemar_p{oracle}"] = mcnemar_exact(self["only_mode"], self["only_other"])
        rest: dict[str, float] = {
            f"{accuracy}_low": low,
            f"{accuracy}_high": high,
            "answered": self["answered"] / items,
            "extraction_calls": self["extraction_calls"] / items,
            "prompt_tokens": self["prompt_tokens"] / items,
            "completion_tokens": self["completion_tokens"] / items,
            "items": items,
        }
        if tested:
            rest |= {f"{name}{oracle}": self[name] for name in ("only_mode", "only_other")}
        if self.rounds:
            rest |= {f"{name}{oracle}": self[name] for name in FLIPS}
            rest |= {
                f"{accuracy}_round_{number}": self.counts[len(FIELDS) + number] / items
                for number in range(self.rounds + 1)
            }
            rest |= {f"any_round_right{oracle}": self["any_right"] / items, "stopped_early": self["stopped_early"]}
        elif mode.samples > 1 or mode.retry > 1:
            rest |= {"any_sample_right": self["any_right"] / items, "stopped_early": self["stopped_early"]}
        return main, rest

    def summary(self, mode: ReasoningMode) -> str:
        """One line for the run's summary."""
        items = self["items"]
        low, high = wilson_interval(self["right"], items)
        line = f"{100 * self['right'] / items:.2f} % [{100 * low:.1f}, {100 * high:.1f}]"
        if mode.uses_label:
            line += " (oracle stop: uses the label)"
        tokens = self["prompt_tokens"] + self["completion_tokens"]
        line += f", {self['calls'] / items:.2f} calls and {tokens / items:,.0f} tokens an item"
        if self.rounds:
            line += f", flips r>r {self[FLIPS[0]]} r>w {self[FLIPS[1]]} w>r {self[FLIPS[2]]} w>w {self[FLIPS[3]]}"
        return line
