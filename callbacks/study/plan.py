"""A study file, the runs that it means, and what is on disk of each of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from modules.files import atomic_write, canonical_digest, read_json_object, sha256_file, write_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
UNDERLYING = str(CONFIGS / "base.yaml")  # lies under every run, so its content is part of what a run means
STUDY_FILE = "study.yaml"
STATE_FILE = "state.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Algorithm:
    """Config layers and flags of the command line that make a run one of this algorithm."""

    layers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Config layers and flags that make a run one of this task, and the metric's values that count as 0 and as 1."""

    low: float
    high: float
    layers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What is run and how it is compared. A run's layers are base, task, algorithm; its flags follow in that order.

    Args:
        name: above the figures.
        tasks, algorithms: by name, which is a folder's name too.
        seeds: of ``--seed_everything``.
        base, flags: layers and flags of every run.
        metric: key in ``metrics.jsonl`` that is compared; higher is better.
        x: another key of the same rows that curves run along.
        baselines: algorithm to the algorithm that it is compared with.
    """

    name: str
    tasks: Mapping[str, Task]
    algorithms: Mapping[str, Algorithm]
    seeds: tuple[int, ...]
    base: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    metric: str = "val/return"
    x: str = "frames"
    baselines: Mapping[str, str] = field(default_factory=dict)


def _refuse(where: str, rule: str, value: object) -> ValueError:
    return ValueError(f"study: {where}: {rule}, got {value!r}")


def _checked(content: object, kind: type, where: str) -> dict[str, Any]:
    """``content`` as a mapping with keys of the dataclass ``kind`` only, all required ones there."""
    if not isinstance(content, dict):
        raise _refuse(where, "must be a mapping", content)
    known = [one.name for one in fields(kind)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"study: {where}: unknown key '{key}'; {hint}")
    for name in ("name", "tasks", "algorithms", "seeds", "low", "high"):
        if name in known and name not in content:
            raise ValueError(f"study: {where}: needs the key '{name}'")
    return content


def _words(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _refuse(where, "must be a list of texts", value)
    return tuple(value)


def _named(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise _refuse(where, "must be a mapping with at least one name", value)
    for name in value:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _refuse(where, "names must be letters, digits, '_', '-' and '.', as they name folders", name)
    return value


def _additions(part: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    return {key: _words(part[key], f"{where}.{key}") for key in ("layers", "flags") if key in part}


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refuse(where, "must be a number", value)
    return float(value)


def parse_study(content: object) -> Study:
    """A study from a study file's content.

    Raises:
        ValueError: an unknown or missing key or a wrong value; one line that names it.
    """
    top = _checked(content, Study, "the file")
    tasks: dict[str, Task] = {}
    for name, part in _named(top["tasks"], "tasks").items():
        where = f"tasks.{name}"
        part = _checked(part, Task, where)
        low, high = (_number(part[key], f"{where}.{key}") for key in ("low", "high"))
        if not low < high:
            raise _refuse(where, "low must be below high", (low, high))
        tasks[name] = Task(low, high, **_additions(part, where))
    algorithms: dict[str, Algorithm] = {}
    for name, part in _named(top["algorithms"], "algorithms").items():
        part = _checked({} if part is None else part, Algorithm, f"algorithms.{name}")
        algorithms[name] = Algorithm(**_additions(part, f"algorithms.{name}"))
    seeds = top["seeds"]
    if not isinstance(seeds, list) or not seeds or any(type(one) is not int or one < 0 for one in seeds):
        raise _refuse("seeds", "must be a list of whole numbers of 0 or more", seeds)
    if len(set(seeds)) < len(seeds):
        raise _refuse("seeds", "must not repeat", seeds)
    baselines = top.get("baselines") or {}
    if not isinstance(baselines, dict):
        raise _refuse("baselines", "must map an algorithm to the one it is compared with", baselines)
    for name in {*baselines, *baselines.values()}:
        if name not in algorithms:
            raise _refuse("baselines", f"must name algorithms ({', '.join(algorithms)})", name)
    texts = {key: top[key] for key in ("name", "metric", "x") if key in top}
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise _refuse(key, "must be a text", value)
    return Study(
        tasks=tasks,
        algorithms=algorithms,
        seeds=tuple(seeds),
        base=_words(top.get("base", []), "base"),
        flags=_words(top.get("flags", []), "flags"),
        baselines=baselines,
        **texts,
    )


def find_layer(name: str) -> Path:
    """The file that ``-c name`` means to ``python -m train``: a file, or a shipped config's name.

    Raises:
        FileNotFoundError: neither.
    """
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"study: config file '{name}' not found, neither here nor among the shipped configs")


def load_study(path: Path) -> tuple[Study, dict[str, Any]]:
    """A study and its file's content.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, or as :func:`parse_study`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"study: {path} is not valid YAML ({' '.join(str(error).split())[:160]})") from None
    return parse_study(content), content


@dataclass(frozen=True)
class Run:
    """One cell of the grid.

    Args:
        folder: ``<study>/<task>/<algorithm>/seed-<n>``; its run folders are ``run-001`` and so on.
        arguments: of ``python -m train``.
        digest: identity of what the arguments mean: contents of the layers, flags and seed.
    """

    task: str
    algorithm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    digest: str

    def __str__(self) -> str:
        return f"{self.task} {self.algorithm} seed {self.seed}"


def plan_runs(study: Study, out: Path) -> list[Run]:
    """All runs, seed by seed: a study that is cut short has whole seeds, and a slower hour touches all algorithms.

    Raises:
        FileNotFoundError: a layer that is no file and no shipped config.
    """
    contents: dict[str, str] = {}

    def content(layer: str) -> str:
        if layer not in contents:
            contents[layer] = sha256_file(find_layer(layer))
        return contents[layer]

    runs = []
    for seed in study.seeds:
        for task_name, task in study.tasks.items():
            for name, algorithm in study.algorithms.items():
                layers = [*study.base, *task.layers, *algorithm.layers]
                flags = [*study.flags, *task.flags, *algorithm.flags, f"--seed_everything={seed}"]
                parent = out / task_name / name
                folder = parent / f"seed-{seed}"
                place = [f"--runs={parent}", f"--experiment={folder.name}"]
                arguments = ["fit", *(word for layer in layers for word in ("-c", layer)), *flags, *place]
                digest = canonical_digest([[content(layer) for layer in (UNDERLYING, *layers)], flags])
                runs.append(Run(task_name, name, seed, folder, tuple(arguments), digest))
    return runs


# -- what is on disk --
def read_state(run: Run) -> dict[str, Any]:
    """What ``state.json`` says of a run; empty if it was never started, or with other settings than today's."""
    path = run.folder / STATE_FILE
    state = read_json_object(path, "study") if path.is_file() else {}
    return state if state.get("digest") == run.digest else {}


def write_state(run: Run, state: str, **more: Any) -> None:
    """Replace a run's ``state.json``: ``started``, ``done`` or ``failed``; whole at every instant."""
    write_json(run.folder / STATE_FILE, {"state": state, "digest": run.digest, **more})


def attempts(run: Run) -> list[Path]:
    """The run's run folders, oldest first."""
    found = {int(m[1]): p for p in run.folder.glob("run-*") if (m := re.fullmatch(r"run-(\d+)", p.name))}
    return [found[number] for number in sorted(found)]


def save_study(content: Mapping[str, Any], out: Path) -> None:
    """Keep the study file's content in the study's folder, for the report."""
    with atomic_write(out / STUDY_FILE, "w") as stream:
        yaml.safe_dump(dict(content), stream, sort_keys=False)


def selected(runs: Sequence[Run], tasks: Sequence[str], algorithms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of some tasks, algorithms and seeds; an empty list means all.

    Raises:
        ValueError: a name or seed that no run has.
    """
    kept = list(runs)
    for key, wanted in (("task", tasks), ("algorithm", algorithms), ("seed", seeds)):
        there = {getattr(run, key): None for run in runs}
        for one in wanted:
            if one not in there:
                raise ValueError(f"study: --{key}s: must be among {', '.join(map(str, there))}, got {one}")
        kept = [run for run in kept if not wanted or getattr(run, key) in wanted]
    return kept
