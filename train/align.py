"""The verb ``align``: the alignment cycle, each training and each assurance a child command of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from modules.assurance.cycle import AlignSettings, Cycle
from modules.assurance.layer import read_layer
from modules.assurance.subject import AssuranceError
from modules.assurance.suites import SuiteSettings
from modules.assurance.verdict import Limit
from modules.files import write_json
from train.arguments import class_parameters
from train.children import Children
from train.errors import ConfigError, known_keys, one_line

_WAIT = 60.0  # seconds for a child that a killed driver left to end


class ChildFailed(RuntimeError):
    """A child command ended with an error; its last lines are above."""


@dataclass(frozen=True)
class AssureSettings:
    """What every round measures and demands; fields as those of the verb ``assure``."""

    suite: str = "rice"
    probes: list[str] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    n0: int | None = None
    n_max: int | None = None
    alpha: float = 0.05
    anchor_share: float = 0.2
    root_seed: int = 20231030
    effort: dict[str, int] = field(default_factory=dict)

    def settings(self) -> SuiteSettings:
        """The same without the limits, of round 0."""
        names = ("suite", "n0", "n_max", "alpha", "anchor_share", "root_seed", "effort")
        return SuiteSettings(probes=tuple(self.probes), **{name: getattr(self, name) for name in names})


def parser() -> ArgumentParser:
    """Arguments of ``align``."""

    class OneLine(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise ConfigError(one_line(message, known_keys(self), class_parameters)) from ex

    found = OneLine(
        prog="python -m train align",
        description="Train, measure, rewrite the objectives, go round again until the evidence suffices. Exit code 0: "
        "all gates pass; 3: a gate fails at the end (rounds exhausted or stalled); 4: a gate stays uncertain.",
        allow_abbrev=False,
    )
    found.add_argument("-c", "--config", action="config", help="A cycle's config; later ones go over earlier ones.")
    found.add_argument("--experiment", type=str, default="cycle", help="Name of the cycle's folder's parent.")
    found.add_argument("--runs", type=str, default="runs", help="Folder that holds all run folders.")
    found.add_argument(
        "--out", type=str | None, default=None, help="The cycle's folder; default: runs/experiment/cycle."
    )
    found.add_argument("--layers", type=list[str], default=[], help="Config files of fit and assure, in order.")
    found.add_argument(
        "--arguments", type=dict[str, Any], default={}, help="Further flags of fit and assure: dotted key to value."
    )
    found.add_argument("--fit_arguments", type=dict[str, Any], default={}, help="Further flags of fit alone.")
    found.add_argument(
        "--objectives",
        type=str | None,
        default=None,
        help="An objectives layer whose values round 0 starts from, of another cycle perhaps; this cycle's knobs only.",
    )
    found.add_argument("--assure", type=AssureSettings, default=AssureSettings(), help="What is measured and demanded.")
    found.add_argument("--align", type=AlignSettings, default=AlignSettings(), help="How rounds follow each other.")
    return found


def main(argv: Sequence[str]) -> int:
    """Run ``align`` with ``argv`` (what stands behind the verb) and return the exit code."""
    own = parser()
    config: Any = own.parse_args(list(argv))
    config = own.instantiate_classes(config)
    if not config.layers:
        raise ConfigError("align: no layers: name the config files of the method (layers: [planted/linear])")
    starting = read_layer(config.objectives, config.align.knobs) if config.objectives else None
    folder = Path(config.out or Path(config.runs) / config.experiment / "cycle")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock") as lock, contextlib.closing(Children([lock])) as children:
        launcher = ChildCommands(config.layers, config.arguments, config.fit_arguments, config.assure, children, folder)
        about = {
            "experiment": config.experiment,
            "layers": list(config.layers),
            "arguments": {key: str(value) for key, value in {**config.arguments, **config.fit_arguments}.items()},
        }
        suite, limits = config.assure.settings(), config.assure.limits
        return Cycle(folder, config.align, suite, limits, launcher, _say, about, starting).run()


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the cycle's folder; children hold it too, so a killed driver's child is waited for, not doubled.

    Raises:
        AssuranceError: another process still works there after a minute.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _WAIT
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise AssuranceError(
                        f"align: another process works in {path.parent}: wait for it or stop it"
                    ) from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


class ChildCommands:
    """A :class:`modules.assurance.cycle.Launcher` whose steps are ``python -m train fit`` and ``assure``.

    Args:
        layers: config files of both, in order.
        arguments, fit_arguments: further flags, of both and of ``fit`` alone.
        assure: what is measured.
        children: runs commands.
        scratch: folder for the log of what is no step.
    """

    def __init__(
        self,
        layers: Sequence[str],
        arguments: dict[str, Any],
        fit_arguments: dict[str, Any],
        assure: AssureSettings,
        children: Children,
        scratch: Path,
    ) -> None:
        self.layers, self.assure_settings, self.children, self.scratch = list(layers), assure, children, scratch
        self.arguments, self.fit_arguments = arguments, fit_arguments

    def config(self) -> dict[str, Any]:
        log = self.scratch / "config.log"
        log.unlink(missing_ok=True)
        command = [*self._command("fit", [], {**self.arguments, **self.fit_arguments}), "--print_config"]
        code = self.children.run(command, log)
        printed = log.read_text("utf-8", errors="replace")
        if code:
            said = printed.strip().splitlines()[-1:]
            raise AssuranceError(f"align: the layers do not parse: {' '.join(said).removeprefix('error: ')[:600]}")
        return yaml.safe_load(printed)

    def fit(self, folder: Path, objectives: Path, seed: int, warm_start: Path | None) -> Path:
        from callbacks.checkpoint import newest_whole_checkpoint

        run = folder / "fit" / "run-001"
        begun = newest_whole_checkpoint(run / "checkpoints")
        if begun is None and (folder / "fit").exists():
            shutil.rmtree(folder / "fit")  # killed before its first checkpoint: nothing to go on from
        flags = [f"--runs={folder}", "--experiment=fit", f"--seed_everything={seed}"]
        if begun is not None:
            flags.append("--ckpt_path=last")
        if warm_start is not None:
            flags.append(f"--warm_start={warm_start}")
        self._run("fit", objectives, {**self.arguments, **self.fit_arguments}, flags, (0,))
        checkpoint = newest_whole_checkpoint(run / "checkpoints")
        if checkpoint is None:
            raise ChildFailed(f"align: training left no checkpoint in {run / 'checkpoints'}: is checkpointing off?")
        return checkpoint

    def assure(self, folder: Path, objectives: Path, checkpoint: Path, round_number: int, parent: str) -> None:
        given = asdict(self.assure_settings)
        layer = folder.with_name("assure.yaml")
        content = {name: value for name, value in given.items() if value not in (None, [], {})}
        write_json(layer, {**content, "round": round_number, "parent": parent})  # JSON is YAML
        flags = [
            f"--runs={folder.parent}",
            "--experiment=assure_runs",
            f"--ckpt_path={checkpoint}",
            f"--out={folder}",
            f"--objectives={objectives}",
        ]
        self._run("assure", objectives, self.arguments, ["-c", str(layer), *flags], (0, 3, 4))

    def digest(self, checkpoint: Path) -> str:
        from train.assuring import checkpoint_digest

        return checkpoint_digest(checkpoint)

    def _command(self, verb: str, objectives: list[Path], arguments: dict[str, Any]) -> list[str]:
        layers = [part for layer in (*self.layers, *map(str, objectives)) for part in ("-c", layer)]
        flags = [f"--{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in arguments.items()]
        return [verb, *layers, *flags, "--trainer.enable_progress_bar=false"]

    def _run(
        self, verb: str, objectives: Path, arguments: dict[str, Any], flags: list[str], fine: tuple[int, ...]
    ) -> None:
        log = objectives.parent / f"{verb}.log"
        code = self.children.run([*self._command(verb, [objectives], arguments), *flags], log)
        if code not in fine:
            tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            raise ChildFailed(f"align: {verb} ended with exit code {code}: {' '.join(tail)[:400]} (all of it: {log})")
