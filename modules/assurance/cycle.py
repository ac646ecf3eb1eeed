"""The alignment cycle: train to the current objectives, measure, decide, rewrite the objectives, go round again.

The driver holds no state of its own: where a cycle stands is read from its folder, so that a kill at any point costs at
most the step that was running, and going on gives the ledger that an uninterrupted cycle gives. What a round trains and
measures is done by a :class:`Launcher` (child commands of the command line), so launchers for many ranks and nodes work
unchanged.

    cycle/cycle.json                    what was declared before anything was trained
    cycle/ledger.jsonl                  every step with the hash of the last (:mod:`modules.assurance.ledger`)
    cycle/round_00/objectives.yaml      a config layer: the knobs' values of this round
    cycle/round_00/objectives.json      the same, with the rules' memory
    cycle/round_00/fit/...              the run
    cycle/round_00/trained.json         its checkpoint, once training has ended
    cycle/round_00/assurance/...        the report
    cycle/summary.html                  all rounds side by side
    cycle/tensorboard/                  the same as curves
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from modules.assurance.canonical import canonical_bytes
from modules.assurance.curves import write_curves
from modules.assurance.ledger import (
    ASSURANCE,
    LEDGER,
    OBJECTIVES,
    append,
    declared_payload,
    file_payload,
    report_payload,
    round_folder,
)
from modules.assurance.objectives import (
    ARMS,
    Arm,
    Knob,
    Objectives,
    Value,
    check_knobs,
    first_objectives,
    random_moves,
    to_layer,
    unchanged,
    update,
)
from modules.assurance.report import read
from modules.assurance.signature import SIGNATURE
from modules.assurance.subject import AssuranceError
from modules.assurance.suites import SuiteSettings
from modules.assurance.summary import summary_page
from modules.assurance.verdict import Limit
from modules.files import atomic_write, sha256_file, write_bytes
from modules.seeds import stream_seed

DECLARED, MEMORY, TRAINED, SUMMARY = "cycle.json", "objectives.json", "trained.json", "summary.html"
CURVES = "tensorboard"
PASSED, STALLED, EXHAUSTED = "passed", "stalled", "rounds exhausted"
EXIT_PASS, EXIT_FAIL, EXIT_INCONCLUSIVE = 0, 3, 4


@dataclass(frozen=True)
class AlignSettings:
    """How rounds follow each other.

    Args:
        max_rounds: most rounds, the first one counts.
        patience: rounds in a row without gain after which the cycle stops.
        min_gain: a gate's deficit must fall by more than this to count as gain.
        start: ``warm``: a round starts from the last one's weights with fresh optimisers; ``scratch``.
        arm: ``findings``: the report moves the knobs; ``fixed``: nothing moves, the same compute; ``random``: random
            moves within the same bounds. The last two are controls.
        stop: whether the cycle ends when all gates pass or when it stalls; ``false``: all rounds, for comparisons.
        seed: of training in every round, and of random moves.
        knobs: what the findings may move.

    Raises:
        AssuranceError: naming the setting.
    """

    max_rounds: int = 5
    patience: int = 2
    min_gain: float = 0.05
    start: Literal["warm", "scratch"] = "warm"
    arm: Arm = "findings"
    stop: bool = True
    seed: int = 1
    knobs: list[Knob] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, least in (("max_rounds", 1), ("patience", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise AssuranceError(f"align.{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.min_gain) and self.min_gain >= 0):
            raise AssuranceError(f"align.min_gain must be a number of at least 0, got {self.min_gain}")
        for name, choices in (("start", ("warm", "scratch")), ("arm", ARMS)):
            if getattr(self, name) not in choices:
                raise AssuranceError(f"align.{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")


class Launcher(Protocol):
    """Trains and measures, each in a process of its own."""

    def config(self) -> Mapping[str, Any]:
        """The resolved config of training, before any objectives.

        Raises:
            RuntimeError: a config that does not parse.
        """
        ...

    def fit(self, folder: Path, objectives: Path, seed: int, warm_start: Path | None) -> Path:
        """Train in ``folder`` (go on there if it was begun) and return the last checkpoint.

        Raises:
            RuntimeError: training failed.
        """
        ...

    def assure(self, folder: Path, objectives: Path, checkpoint: Path, round_number: int, parent: str) -> None:
        """Measure ``checkpoint`` and write the report into ``folder``.

        Raises:
            RuntimeError: measuring failed; a failed gate is no failure.
        """
        ...

    def digest(self, checkpoint: Path) -> str:
        """What identifies the trained model."""
        ...


@dataclass(frozen=True)
class Decision:
    """What became of a round: ``outcome`` is empty where the cycle goes on; ``alarms`` name overfitted figures."""

    outcome: str
    verdict: str
    deficits: Mapping[str, float]
    without_gain: int
    alarms: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        if self.outcome == PASSED or self.verdict == "pass":
            return EXIT_PASS
        return EXIT_INCONCLUSIVE if self.verdict == "inconclusive" else EXIT_FAIL


class Cycle:
    """One cycle in one folder.

    Args:
        folder: of the cycle; an unfinished cycle in it goes on.
        settings: how rounds follow each other.
        suite: what is measured.
        limits: what is demanded; at least one gate.
        launcher: trains and measures.
        say: gets a line at every step.
        about: what else is declared: names and plain values.
        starting: knob path -> value of round 0 in place of its own start, read from an objectives layer.

    Raises:
        AssuranceError: no gate; a knob driven by a figure without a limit.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: AlignSettings,
        suite: SuiteSettings,
        limits: Sequence[Limit],
        launcher: Launcher,
        say: Callable[[str], None] = print,
        about: Mapping[str, Any] | None = None,
        starting: Mapping[str, Value] | None = None,
    ) -> None:
        if not any(limit.kind == "gate" for limit in limits):
            raise AssuranceError("align: no limit is a gate, so the cycle could never end well: give one kind: gate")
        given = starting or {}
        knobs = [replace(knob, start=given[knob.path]) if knob.path in given else knob for knob in settings.knobs]
        settings = replace(settings, knobs=knobs)
        self.folder, self.settings, self.suite, self.limits = Path(folder), settings, suite, tuple(limits)
        self.launcher, self.say = launcher, say
        self.about = dict(about or {})

    @property
    def ledger(self) -> Path:
        return self.folder / LEDGER

    def run(self) -> int:
        """Go on to the end; returns 0 if all gates passed in the last round, 3 if one failed, 4 if one stayed open.

        Raises:
            AssuranceError: a folder that holds another cycle, or files that do not follow from its reports; knobs that
                do not fit the config.
            RuntimeError: training or measuring failed; the next run goes on there.
        """
        starts = self._declare()
        seeds = {"train": self.settings.seed, "assurance": self.suite.root_seed}
        knobs = [replace(knob, start=starts[knob.path]) for knob in self.settings.knobs]
        objectives = first_objectives(knobs, limits=self.limits, seeds=seeds)
        reports: list[dict[str, Any]] = []
        decisions: list[Decision] = []
        checkpoint: Path | None = None
        while True:
            number = objectives.round
            folder = round_folder(self.folder, number)
            layer = self._write_objectives(folder, objectives)
            checkpoint = self._train(folder, layer, number, checkpoint)
            append(self.ledger, "model", number, {"digest": self.launcher.digest(checkpoint)})
            reports.append(self._measure(folder, layer, checkpoint, number))
            append(self.ledger, "report", number, report_payload(folder / ASSURANCE))
            decisions.append(self._decide(reports, decisions))
            append(self.ledger, "decision", number, asdict(decisions[-1]) | {"arm": self.settings.arm})
            self._summarise(reports, decisions)
            self._tell(number, decisions[-1])
            if decisions[-1].outcome:
                return decisions[-1].exit_code
            objectives = self._next(objectives, reports[-1], sha256_file(folder / ASSURANCE / "report.json"))

    # -- the steps of a round -----------------------------------------------------------------------------------------
    def _declare(self) -> dict[str, Value]:
        """Write down what is demanded before anything is trained; returns the knobs' first values."""
        wanted = {
            "settings": {**asdict(self.settings), "knobs": [asdict(knob) for knob in self.settings.knobs]},
            "suite": asdict(self.suite),
            "limits": [asdict(limit) for limit in self.limits],
            **self.about,
        }
        path = self.folder / DECLARED
        if path.is_file():
            content = json.loads(path.read_bytes())
            starts = content.pop("starts")
            if canonical_bytes(content) != canonical_bytes(wanted, "cycle"):
                raise AssuranceError(
                    f"align: {path} was declared with other settings: go on with those, or give --out another folder"
                )
        else:
            resolved = self.launcher.config()
            check_knobs(self.settings.knobs, resolved, [limit.figure for limit in self.limits])
            starts = first_objectives(self.settings.knobs, resolved).knobs
            with atomic_write(path) as stream:
                write_bytes(stream, canonical_bytes({**wanted, "starts": starts}, "cycle"))
        append(self.ledger, "declared", 0, declared_payload(self.suite, self.limits, self.settings.knobs))
        return starts

    def _write_objectives(self, folder: Path, objectives: Objectives) -> Path:
        layer = folder / OBJECTIVES
        for path, content in (
            (folder / MEMORY, canonical_bytes(asdict(objectives), "objectives")),
            (layer, to_layer(objectives).encode()),
        ):
            if not path.is_file():
                with atomic_write(path) as stream:
                    write_bytes(stream, content)
            elif path.read_bytes() != content:
                raise AssuranceError(
                    f"align: {path} is not what the last report leads to: it was changed by hand; restore it, or run "
                    "its round by hand with fit and assure"
                )
        append(self.ledger, "objectives", objectives.round, file_payload(layer))
        return layer

    def _train(self, folder: Path, layer: Path, number: int, last: Path | None) -> Path:
        done = folder / TRAINED
        if done.is_file():
            checkpoint = self.folder / json.loads(done.read_text("utf-8"))["checkpoint"]
            if not checkpoint.is_file():
                raise AssuranceError(f"align: the checkpoint of round {number} is gone: {checkpoint}")
            return checkpoint
        self.say(f"round {number}: training")
        warm = last if self.settings.start == "warm" else None
        checkpoint = self.launcher.fit(folder, layer, round_seed(self.settings.seed, number), warm)
        relative = checkpoint.resolve().relative_to(self.folder.resolve())
        with atomic_write(done) as stream:
            write_bytes(stream, canonical_bytes({"checkpoint": relative.as_posix()}))
        return checkpoint

    def _measure(self, folder: Path, layer: Path, checkpoint: Path, number: int) -> dict[str, Any]:
        place = folder / ASSURANCE
        if not (place / SIGNATURE).is_file():
            before = round_folder(self.folder, number - 1) / ASSURANCE / "report.json"
            parent = sha256_file(before) if number else ""
            self.say(f"round {number}: measuring")
            self.launcher.assure(place, layer, checkpoint, number, parent)
        return read(place)

    def _decide(self, reports: Sequence[Mapping[str, Any]], before: Sequence[Decision]) -> Decision:
        verdict = reports[-1]["verdict"]
        deficits = gate_deficits(reports[-1])
        without_gain = 0
        if before:
            last = before[-1].deficits
            gained = any(last.get(name, 0.0) - value > self.settings.min_gain for name, value in deficits.items())
            without_gain = 0 if gained else before[-1].without_gain + 1
        outcome = ""
        if self.settings.stop and verdict == "pass":
            outcome = PASSED
        elif self.settings.stop and without_gain >= self.settings.patience:
            outcome = STALLED
        elif len(reports) >= self.settings.max_rounds:
            outcome = PASSED if verdict == "pass" else EXHAUSTED
        alarms = overfit_alarms(reports[-2], reports[-1]) if len(reports) > 1 else ()
        return Decision(outcome, verdict, deficits, without_gain, alarms)

    def _next(self, objectives: Objectives, report: Mapping[str, Any], sha: str) -> Objectives:
        if self.settings.arm == "fixed":
            return unchanged(objectives, sha)
        if self.settings.arm == "random":
            return random_moves(objectives, self.settings.knobs, stream_seed(self.settings.seed, objectives.round), sha)
        return update(objectives, report, self.settings.knobs, sha)

    def _summarise(self, reports: Sequence[Mapping[str, Any]], decisions: Sequence[Decision]) -> None:
        rounds = [
            {
                "report": report,
                "decision": asdict(decision),
                "knobs": json.loads((round_folder(self.folder, number) / MEMORY).read_text("utf-8"))["knobs"],
            }
            for number, (report, decision) in enumerate(zip(reports, decisions, strict=True))
        ]
        page = summary_page(rounds, title=str(self.about.get("experiment", "cycle")))
        with atomic_write(self.folder / SUMMARY) as stream:
            write_bytes(stream, page.encode())
        write_curves(self.folder / CURVES, [(one["report"], one["knobs"]) for one in rounds])

    def _tell(self, number: int, decision: Decision) -> None:
        short = ", ".join(f"{name} {value:.3g}" for name, value in decision.deficits.items())
        self.say(f"round {number}: {decision.verdict}; deficits: {short or 'none'}")
        for alarm in decision.alarms:
            self.say(f"round {number}: {alarm} gained more on fresh units than on the anchor: is it overfitted?")
        if decision.outcome:
            self.say(f"{decision.outcome} after {number + 1} rounds; summary: {self.folder / SUMMARY}")


def round_seed(seed: int, number: int) -> int:
    """Training seed of a round, for ``seed_everything`` (32 bits)."""
    return stream_seed(seed, number) % 2**32


def gate_deficits(report: Mapping[str, Any]) -> dict[str, float]:
    """Deficit of every gate that has one."""
    return {
        judged["figure"]: judged["deficit"]
        for judged in report["judgements"]
        if judged["kind"] == "gate" and judged["deficit"] is not None
    }


def overfit_alarms(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Gated figures whose gain on fresh units exceeds that on the anchor split by more than two standard errors."""

    def table(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(one["name"], one["split"]): one for one in report["figures"] if one["status"] == "measured"}

    old, new = table(before), table(after)
    found = []
    for name in gate_deficits(after):
        keys = [(name, split) for split in ("fresh", "anchor")]
        if not all(key in old and key in new for key in keys):
            continue
        sign = 1.0 if new[keys[0]]["direction"] == "up" else -1.0
        fresh, anchor = (sign * (new[key]["value"] - old[key]["value"]) for key in keys)
        error = math.sqrt(sum(side[key]["se"] ** 2 for side in (old, new) for key in keys))
        if fresh - anchor > 2.0 * error:
            found.append(name)
    return tuple(found)
