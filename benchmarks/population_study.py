"""Methods of population games compared over seeds: every run is ``train.main`` on a shipped experiment and its layers.

A study is an experiment, the layers that turn it into each method, the name of the variable that chooses the game (if
seeds mean games) and what is common to all runs. Runs go one after another in this process, seed by seed and, within a
seed, method by method, so that a busy or slowing machine touches all methods alike. Exploitability is exact, so the
figures do not depend on the machine. See README.md beside this file.

    python benchmarks/population_study.py skill --seeds 10 --iterations 100
    python benchmarks/population_study.py skill --tune
    python benchmarks/population_study.py leduc --seeds 3 --iterations 20
    python benchmarks/population_study.py nmm --seeds 5
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

import train  # noqa: E402
from modules.files import atomic_write  # noqa: E402

NASHCONV, PE = "meta/nashconv", "meta/population_exploitability"
METRICS = {"nashconv": NASHCONV, "population_exploitability": PE}
SMALLEST = 1e-12
"""Values below are taken as this in ratios: exploitability is 0 up to rounding there."""


@dataclass(frozen=True)
class Method:
    """Config layers over the study's experiment, and settings laid over them (a config file's content)."""

    layers: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        experiment: config of all runs.
        methods: by name, in the order of the tables.
        iterations: of the population loop.
        seeds: how many.
        game_variable: the config's variable that is set to the seed, so that each seed is another game.
        references: methods that ratios are taken to.
        grid: for ``--tune``: method -> (settings of each weight, settings of each gate). Weights are tried at the
            experiment's gate first, then gates at the best weight: the same budget for every method.
    """

    experiment: str
    methods: Mapping[str, Method]
    iterations: int
    seeds: int
    game_variable: str | None = None
    references: tuple[str, ...] = ("pipeline", "psro")
    grid: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=dict)


def diversity(**arguments: Any) -> dict[str, Any]:
    """Settings of the diversity term that the layers chose."""
    return {"model": {"init_args": {"diversity": {"init_args": arguments}}}}


def gate(probability: float) -> dict[str, Any]:
    """Settings of the share of steps that use the diversity term."""
    return {"model": {"init_args": {"oracle": {"init_args": {"diversity_probability": probability}}}}}


def _variants(folder: str, names: Sequence[str]) -> dict[str, Method]:
    return {name: Method((f"psd_psro/{folder}/{name}",)) for name in names}


def _grid(weights: Sequence[float], gates: Sequence[float] = (1.0, 0.5, 0.2)) -> tuple[dict[str, Any], dict[str, Any]]:
    return {f"weight {w:g}": diversity(weight=w) for w in weights}, {f"gate {g:g}": gate(g) for g in gates}


def rate(share: float) -> dict[str, Any]:
    """Settings of the share of the best response in a step without diversity."""
    return {"model": {"init_args": {"oracle": {"init_args": {"rate": share}}}}}


CONTROLS = {
    # the pipeline with the steps of the methods with a diversity term (larger behind the gate), but without the term
    "pipeline_same_steps": Method(settings=diversity(weight=1e-12)),
    "double_oracle": Method(("psd_psro/variant/double_oracle",)),
}
"""What the sizes of the steps do by themselves."""

RANDOM_START = {"model": {"init_args": {"init": "random"}}}

STUDIES = {
    "skill": Study(
        "psd_psro/skill300",
        {
            **_variants("variant", ("self_play", "rectified", "psro", "pipeline", "dpp", "bd_rd")),
            "psd": Method(),
            "psd_mixture": Method(settings=diversity(hull_distance="mixture")),
            "psd_tuned": Method(settings=diversity(weight=3e-4)),
            **CONTROLS,
            "rectified_rate_1": Method(("psd_psro/variant/rectified",), rate(1.0)),
        },
        iterations=100,
        seeds=10,
        game_variable="game_seed",
        references=("pipeline", "psro", "pipeline_same_steps"),
        grid={
            "dpp": _grid((0.15, 1.5, 15.0, 150.0, 1e6)),
            "bd_rd": _grid((1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
            "psd": _grid((3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        },
    ),
    "blotto": Study(
        "psd_psro/blotto",
        {
            **_variants("variant", ("psro", "pipeline", "dpp", "bd_rd")),
            "psd": Method(),
            "psd_mixture": Method(settings=diversity(hull_distance="mixture")),
            **CONTROLS,
        },
        iterations=100,
        seeds=5,
        references=("pipeline", "pipeline_same_steps"),
    ),
    "leduc": Study(
        "psd_psro/leduc_neural",
        {**_variants("neural", ("psro", "pipeline", "dpp", "bd_rd")), "psd": Method()},
        iterations=20,
        seeds=3,
    ),
    "leduc_exact": Study(
        "psd_psro/leduc",
        {
            "double_oracle": Method(settings=RANDOM_START),
            "psd": Method(("psd_psro/variant/psd",), RANDOM_START),
            "psd_mixture": Method(
                ("psd_psro/variant/psd",),
                {"model": {"init_args": {"init": "random", "diversity": {"init_args": {"hull_distance": "mixture"}}}}},
            ),
        },
        iterations=60,
        seeds=10,
        references=("double_oracle",),
    ),
    "nmm": Study(
        "psd_psro/nmm",
        {**_variants("nmm", ("psro", "pipeline", "dpp", "bd_rd")), "psd": Method()},
        iterations=50,
        seeds=5,
    ),
}


# -- one run --
def marks_of(iterations: int, every: int) -> list[int]:
    """Iterations that are recorded: every ``every``-th and the last."""
    return sorted({*range(every, iterations + 1, every), iterations})


def common_settings(study: Study, seed: int, iterations: int, every: int) -> dict[str, Any]:
    """The layer over all others of one run: seeds, length, and what does not touch the figures left out."""
    settings: dict[str, Any] = {
        "seed_everything": seed,
        "model": {"init_args": {"population_exploitability_every": every}},
        "trainer": {
            "max_epochs": iterations,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [],
        },
        "checkpoint": {"every_n_steps": 1_000_000},
    }
    if study.game_variable is not None:
        settings["vars"] = {study.game_variable: seed}
    return settings


def read_run(folder: Path, marks: Sequence[int]) -> dict[str, Any]:
    """A run's figures from its ``metrics.jsonl``.

    Args:
        folder: the run folder.
        marks: iterations to read exploitability at.

    Returns:
        ``nashconv`` and ``population_exploitability``: iteration (as text) -> value; ``members``, ``episodes`` and
        ``frames`` at the last of them.

    Raises:
        ValueError: an iteration is missing, or a value in it.
    """
    rows = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if NASHCONV in row:
            rows[int(row["iteration"])] = row
    found: dict[str, Any] = {name: {} for name in METRICS}
    for mark in marks:
        for name, key in METRICS.items():
            if rows.get(mark, {}).get(key) is None:
                raise ValueError(f"population_study: {folder.name}: metrics.jsonl needs '{key}' at iteration {mark}")
            found[name][str(mark)] = rows[mark][key]
    last = rows[marks[-1]]
    return {
        **found,
        **{key: last[f"meta/{key}"] for key in ("members",)},
        **{k: last[k] for k in ("episodes", "frames")},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Standard streams kept back."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def run_once(
    study: Study, name: str, method: Method, seed: int, iterations: int, every: int, work: Path
) -> tuple[dict[str, Any], Path]:
    """Train one method with one seed.

    Returns:
        The figures (:func:`read_run`, with ``wall_s`` and ``cpu_s``), and the run folder, under ``work``.

    Raises:
        RuntimeError: the training failed; with the last lines that it printed.
    """
    arguments = ["fit", "-c", study.experiment]
    for layer in method.layers:
        arguments += ["-c", layer]
    for part, settings in (("method", method.settings), ("common", common_settings(study, seed, iterations, every))):
        if settings:
            path = work / f"{part}.yaml"
            path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
            arguments += ["-c", str(path)]
    arguments += ["--runs", str(work / "runs"), "--experiment", name]
    wall, cpu = time.perf_counter(), time.process_time()
    with _quiet() as text:
        code = train.main(arguments)
    if code:
        tail = "\n".join(text.getvalue().strip().splitlines()[-12:])
        raise RuntimeError(f"population_study: {name}, seed {seed}: training failed (exit {code}):\n{tail}")
    folder = max((work / "runs" / name).glob("run-*"), key=lambda path: int(path.name.removeprefix("run-")))
    figures = read_run(folder, marks_of(iterations, every))
    return {
        "seed": seed,
        **figures,
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }, folder


# -- statistics --
def paired_ratio(
    values: Sequence[float] | np.ndarray, reference: Sequence[float], resamples: int = 10_000
) -> dict[str, Any]:
    """Geometric mean over seeds of ``values / reference``, pair by pair, with a 95% bootstrap interval over pairs.

    Args:
        values, reference: ``[seeds]``, at least 0, the same seeds in the same order.
        resamples: draws of the percentile bootstrap (Efron 1979); the generator's seed is fixed.

    Returns:
        ``ratio``, ``low``, ``high``; ``wins``: pairs in which ``values`` is the smaller one; ``pairs``.

    Raises:
        ValueError: unequal lengths, or none.
    """
    if len(values) != len(reference) or not len(values):
        raise ValueError(f"paired_ratio: needs pairs, got {len(values)} values and {len(reference)} references")
    mine, theirs = (np.maximum(np.asarray(one, dtype=np.float64), SMALLEST) for one in (values, reference))
    logs = np.log(mine) - np.log(theirs)
    draws = np.random.default_rng(0).integers(len(logs), size=(resamples, len(logs)))
    low, high = np.quantile(logs[draws].mean(1), [0.025, 0.975])
    return {
        "ratio": math.exp(logs.mean()),
        "low": math.exp(low),
        "high": math.exp(high),
        "wins": int((logs < 0).sum()),
        "pairs": len(logs),
    }


def geometric_mean(values: Sequence[float] | np.ndarray) -> float:
    return math.exp(np.log(np.maximum(values, SMALLEST)).mean())


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]], references: Sequence[str]) -> dict[str, Any]:
    """Per method and metric: mean, standard error (NaN as None for one seed), median and geometric mean of the last
    iteration, means by iteration, and ratios to the reference methods.

    Args:
        runs: method -> the figures of its seeds, the same seeds in the same order for all.
        references: methods to divide by; those that did not run are left out.
    """
    table: dict[str, Any] = {}
    for name, seeds in runs.items():
        row: dict[str, Any] = {}
        for metric in METRICS:
            marks = list(seeds[0][metric])
            by_mark = np.array([[run[metric][mark] for mark in marks] for run in seeds], dtype=np.float64)
            final = by_mark[:, -1]
            row[metric] = {
                "mean": float(final.mean()),
                "standard_error": float(final.std(ddof=1) / math.sqrt(len(final))) if len(final) > 1 else None,
                "median": float(np.median(final)),
                "geometric_mean": geometric_mean(final),
                "mean_by_iteration": dict(zip(marks, by_mark.mean(0).tolist(), strict=True)),
            }
            for other in references:
                if other in runs and other != name:
                    row[metric][f"against_{other}"] = paired_ratio(
                        final, [run[metric][marks[-1]] for run in runs[other]]
                    )
        for key in ("members", "episodes", "frames", "cpu_s"):
            row[key] = float(np.mean([run[key] for run in seeds]))
        table[name] = row
    return table


def print_table(summary: Mapping[str, Any], references: Sequence[str]) -> None:
    shown = [name for name in references if name in summary]
    print(f"\n{'method':<22}{'NashConv (s.e.)':>20}{'PE (s.e.)':>20}" + "".join(f"{'x ' + r:>26}" for r in shown))
    for name, row in summary.items():
        cells = "".join(f"{row[m]['mean']:>11.4f} ({row[m]['standard_error'] or math.nan:.4f})" for m in METRICS)
        for other in shown:
            one = row["nashconv"].get(f"against_{other}")
            text = (
                f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}] {one['wins']}/{one['pairs']}" if one else "-"
            )
            cells += f"{text:>26}"
        print(f"{name:<22}{cells}")


# -- studies --
def run_study(
    study: Study, methods: Mapping[str, Method], seeds: Sequence[int], iterations: int, every: int, work: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[Path]]]:
    """All methods with all seeds: figures and run folders by method."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    folders: dict[str, list[Path]] = {name: [] for name in methods}
    for seed in seeds:
        for name, method in methods.items():
            figures, folder = run_once(study, name, method, seed, iterations, every, work)
            runs[name].append(figures)
            folders[name].append(folder)
            last = {metric: list(figures[metric].values())[-1] for metric in METRICS}
            shown = ", ".join(f"{metric} {value:.5f}" for metric, value in last.items())
            print(f"seed {seed} {name}: {shown}, {figures['cpu_s']:.1f} CPU s", flush=True)
    return runs, folders


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings laid over each other, later ones win."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(total.get(key), Mapping)
            total[key] = merged(total[key], value) if both else value
    return total


def tune(study: Study, names: Sequence[str], seeds: Sequence[int], iterations: int, work: Path) -> dict[str, Any]:
    """Weights at the experiment's gate, then gates at the best weight; by the geometric mean of the last NashConv."""
    report: dict[str, Any] = {}
    for name in names:
        weights, gates = study.grid[name]
        base, tried, best = study.methods[name], {}, ("", {})
        for stage in (weights, gates):
            start = best
            options = {f"{start[0]}, {k}" if start[0] else k: merged(start[1], v) for k, v in stage.items()}
            methods = {
                f"{name} {label}": Method(base.layers, merged(base.settings, settings))
                for label, settings in options.items()
            }
            runs, _ = run_study(study, methods, seeds, iterations, iterations, work)
            for label in options:
                final = [list(run["nashconv"].values())[-1] for run in runs[f"{name} {label}"]]
                tried[label] = {"geometric_mean": geometric_mean(final), "nashconv": final}
            label = min(options, key=lambda one: tried[one]["geometric_mean"])
            if not best[0] or tried[label]["geometric_mean"] < tried[best[0]]["geometric_mean"]:
                best = (label, options[label])
        report[name] = {"best": best[0], "settings": best[1], "tried": tried}
        print(f"{name}: best {best[0]}: {tried[best[0]]['geometric_mean']:.5f}", flush=True)
    return report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Methods of population games compared over seeds.")
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--seeds", type=int, help="how many (default: the study's; 4 for --tune)")
    parser.add_argument("--first-seed", type=int, help="default: 0; 100 for --tune, so that tuning sees other games")
    parser.add_argument("--iterations", type=int, help="default: the study's")
    parser.add_argument("--every", type=int, default=25, help="iterations between recorded figures")
    parser.add_argument("--methods", nargs="+", help="some of the study's methods (default: all)")
    parser.add_argument("--tune", action="store_true", help="try weights and gates instead of comparing methods")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--work", type=Path, help="folder to keep the run folders in (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="result file (default: results/population_<study>[_tuning].json)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    study = STUDIES[args.study]
    known = study.grid if args.tune else study.methods
    names = args.methods or list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        print(f"population_study: --methods: some of {', '.join(known) or '(none)'}, got {unknown}", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(args.threads)
    first = args.first_seed if args.first_seed is not None else 100 if args.tune else 0
    seeds = list(range(first, first + (args.seeds or (4 if args.tune else study.seeds))))
    iterations = args.iterations or study.iterations
    out = args.out or HERE / "results" / f"population_{args.study}{'_tuning' * args.tune}.json"
    record: dict[str, Any] = {
        "benchmark": "population_study",
        "command": _public_command(argv),
        "date": args.date,
        "machine": machine(),
        "versions": _own_versions(),
        "experiment": study.experiment,
        "iterations": iterations,
        "seeds": seeds,
    }
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        work = work.resolve()
        out = out.resolve()
        home = Path.cwd()
        stack.callback(os.chdir, home)
        os.chdir(work)  # whatever a run writes beside its folder stays here
        try:
            if args.tune:
                record["tuning"] = tune(study, names, seeds, iterations, work)
            else:
                methods = {name: study.methods[name] for name in names}
                runs, folders = run_study(study, methods, seeds, iterations, args.every, work)
                record["methods"] = {
                    name: {"layers": list(m.layers), "settings": dict(m.settings)} for name, m in methods.items()
                }
                record["summary"] = summarise(runs, study.references)
                record["runs"] = runs
                print_table(record["summary"], study.references)
                _draw(folders, out.with_suffix(".png"), f"{study.experiment}, {len(seeds)} seeds")
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    with atomic_write(out, "w") as stream:
        stream.write(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {out}")
    return 0


def _draw(folders: Mapping[str, Sequence[Path]], out: Path, title: str) -> None:
    from callbacks.compare import compare_runs

    compare_runs(folders, NASHCONV, out, x="iteration", log_scale=True, title=title)


def _public_command(argv: list[str]) -> str:
    """The command without the options that name folders of this machine."""
    kept, skip = [], False
    for word in argv:
        if not skip and word not in ("--work", "--out"):
            kept.append(word)
        skip = word in ("--work", "--out")
    return " ".join(["python benchmarks/population_study.py", *kept])


if __name__ == "__main__":
    sys.exit(main())
