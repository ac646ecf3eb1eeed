"""Multi-agent training speed: Plumbline's replay loop against BenchMARL's on one thread, interleaved.

All loops learn ``simple_spread`` (of VMAS, of PettingZoo, or in Plumbline's tensors) or level-based foraging with the
same algorithm, network sizes, minibatch, updates per frame, target rule and optimiser, each in a process of its own.
Runs alternate, A B C A B C ..., and ratios are taken within a round. CPU seconds are counted inside each process over
whole iterations after warm-up, so imports and start-up are left out. See README.md beside this file.

    python benchmarks/marl_train_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers import default_root, ensure_peer, installed_packages, peer_python

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "loops"), str(HERE.parent)]

from marl_common import ALGORITHMS, MarlArgs  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

from modules.files import atomic_write  # noqa: E402

PEER = "benchmarl"


class Loop(NamedTuple):
    """A script, the peer environment that runs it (``None``: this interpreter) and what else it is told."""

    script: str
    peer: str | None
    extra: tuple[str, ...]
    shorter: int = 1
    """Divides the number of timed iterations, for loops that take long."""


LOOPS: dict[str, Loop] = {
    "benchmarl": Loop("benchmarl_loop.py", PEER, ("--environment", "vmas")),
    "benchmarl_tensor": Loop("benchmarl_loop.py", PEER, ("--environment", "tensor")),
    "benchmarl_pettingzoo": Loop("benchmarl_loop.py", PEER, ("--environment", "pettingzoo"), 5),
    "plumbline_vmas": Loop("plumbline_marl_loop.py", None, ("--environment", "vmas")),
    "plumbline": Loop("plumbline_marl_loop.py", None, ("--environment", "tensor")),
    "plumbline_package": Loop("plumbline_marl_loop.py", None, ("--environment", "pettingzoo"), 5),
    "plumbline_emax": Loop("plumbline_marl_loop.py", None, ("--environment", "tensor", "--members", "5")),
    "plumbline_lbf": Loop("plumbline_marl_loop.py", None, ("--environment", "lbf")),
    "plumbline_lbf_emax": Loop("plumbline_marl_loop.py", None, ("--environment", "lbf", "--members", "5")),
}
SAME_TASK = (("plumbline_package", "benchmarl_pettingzoo"), ("plumbline_vmas", "benchmarl"))
"""Loops on the very same environment, whose networks must be of one size."""
PAIRS = (
    *SAME_TASK,
    ("plumbline", "benchmarl"),
    ("plumbline", "benchmarl_tensor"),
    ("plumbline_emax", "plumbline"),
    ("plumbline_lbf_emax", "plumbline_lbf"),
)
"""Ratios of interest: speed of the first loop over that of the second."""
SETTINGS: dict[str, dict[str, int]] = {
    # environments side by side, frames and updates an iteration
    "a": {"envs": 10, "frames": 1000, "updates": 50},
    "b": {"envs": 60, "frames": 6000, "updates": 50},
    "c": {"envs": 64, "frames": 6400, "updates": 100},  # one update per 64 frames
}
SHARED = ("batch", "agents", "max_steps", "memory", "target_every", "warmup", "iterations", "seed")


def loop_options(setting: Mapping[str, int], algorithm: str, shared: Mapping[str, int]) -> list[str]:
    """Command line of a loop script, the same for every loop.

    Args:
        setting: one of :data:`SETTINGS`.
        algorithm: ``iql``, ``vdn`` or ``qmix``.
        shared: options that hold for all settings, by field of ``MarlArgs``.
    """
    options = ["--algorithm", algorithm, "--threads", "1"]
    for name, value in (*setting.items(), *shared.items()):
        options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def loop_iterations(loop: str, iterations: int) -> int:
    """Timed iterations of a loop where most make ``iterations``."""
    return max(1, iterations // LOOPS[loop].shorter)


def result_line(output: str) -> dict[str, Any] | None:
    """The last JSON result among the lines a loop printed (libraries print too), or ``None``."""
    lines = [line for line in output.splitlines() if line.startswith('{"loop"')]
    return json.loads(lines[-1]) if lines else None


def run_loop(name: str, python: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one loop script to its end.

    Raises:
        RuntimeError: with the script's last lines if it fails or prints no result.
    """
    script, _, extra, _ = LOOPS[name]
    return {**_last_line(name, [str(python), str(HERE / "loops" / script), *options, *extra]), "loop": name}


def _last_line(name: str, command: Sequence[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = result_line(done.stdout)
    if done.returncode or found is None:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"marl_train_speed: {name} failed (exit {done.returncode}):\n{tail}")
    return found


def check_equal_work(results: Mapping[str, Mapping[str, Any]], iterations: int) -> None:
    """Raises: ValueError if loops differ in frames or updates an iteration, or in parameters on the same task."""
    work = {
        name: tuple(line[key] / loop_iterations(name, iterations) for key in ("frames", "updates"))
        for name, line in results.items()
    }
    if len(set(work.values())) != 1:
        raise ValueError(f"marl_train_speed: loops did different work (frames, updates an iteration): {work}")
    for ours, theirs in SAME_TASK:
        if {ours, theirs} <= set(results) and results[ours]["parameters"] != results[theirs]["parameters"]:
            sizes = {name: results[name]["parameters"] for name in (ours, theirs)}
            raise ValueError(f"marl_train_speed: loops trained different numbers of parameters: {sizes}")


def check_same_rules(python: Path, shared: Mapping[str, int]) -> list[dict[str, Any]]:
    """Play the package that each side has, the peer's interpreter being ``python``; what each did, and its bare speed.

    Raises:
        ValueError: if the packages answer the same actions with other observations or rewards.
    """
    options = ["--agents", str(shared["agents"]), "--max-steps", str(shared["max_steps"])]
    script = str(HERE / "loops" / "spread_rules.py")
    found = [
        _last_line("spread_rules", [str(interpreter), script, *options]) for interpreter in (python, sys.executable)
    ]
    if found[0]["sha256"] != found[1]["sha256"]:
        raise ValueError(f"marl_train_speed: the packages play simple_spread by different rules: {found}")
    return found


def pair_ratios(rounds: Sequence[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, dict[str, Any]]:
    """Ratios of :data:`PAIRS` as far as both loops ran, each taken within a round.

    Args:
        rounds: loop -> result line, per round.
        key: the rate to compare.
    """
    found = {}
    for ours, theirs in PAIRS:
        if {ours, theirs} <= set(rounds[0]):
            by_round = [round(one[ours][key] / one[theirs][key], 4) for one in rounds]
            found[f"{ours} / {theirs}"] = {
                "median": round(statistics.median(by_round), 4),
                "min": min(by_round),
                "max": max(by_round),
                "by_round": by_round,
            }
    return found


def rates(rounds: Sequence[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, dict[str, float]]:
    """Median, least and greatest rate of each loop over the rounds."""
    table = {}
    for loop in rounds[0]:
        values = [one[loop][key] for one in rounds]
        table[loop] = {"median": round(statistics.median(values), 1), "min": min(values), "max": max(values)}
    return table


def vmas_folder(root: Path) -> Path:
    """Folder of the peer's packages, of which our loop on VMAS uses ``vmas`` and what that needs.

    Raises:
        RuntimeError: if it is not there.
    """
    for folder in (peer_python(PEER, root).parent.parent).glob("[lL]ib/**/site-packages/vmas"):
        return folder.parent
    raise RuntimeError(f"marl_train_speed: no vmas in the environment of {PEER} under {root}; build it with peers.py")


def print_tables(found: Mapping[str, Any], title: str) -> None:
    for name, table, form in (("loop", found["frames_per_cpu_s"], ",.0f"), ("ratio", found["ratios"], ".2f")):
        print(f"\n{title}\n{name:<40}{'median':>10}{'min':>10}{'max':>10}")
        for label, row in table.items():
            print(f"{label:<40}" + "".join(f"{row[key]:>10{form}}" for key in ("median", "min", "max")), flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Multi-agent training speed against BenchMARL, interleaved.")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS), help="order of a round")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--algorithms", nargs="+", default=["vdn", "qmix"], choices=ALGORITHMS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--append", action="store_true", help="keep what --out holds of other settings and algorithms")
    defaults = {name: getattr(MarlArgs, name) for name in SHARED} | {"iterations": 10}
    for name in SHARED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "marl_train_speed.json")
    return parser


def command_of(script: str, argv: Sequence[str]) -> str:
    """The command of ``benchmarks/<script>`` without the options that name folders of this machine."""
    kept, skip = [], False
    for word in argv:
        hidden = word in ("--root", "--out")
        if not skip and not hidden:
            kept.append(word)
        skip = hidden
    return " ".join([f"python benchmarks/{script}", *kept])


public_command = functools.partial(command_of, "marl_train_speed.py")


def write_record(record: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out, "w") as stream:
        stream.write(json.dumps(record, indent=1) + "\n")


def compare(
    args: argparse.Namespace, setting: str, algorithm: str, python: Path, shared: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Run the rounds of one setting and algorithm; after each, rates, ratios and every result line so far.

    Raises:
        RuntimeError: if a loop fails.
        ValueError: if the loops did different work.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    found: dict[str, Any] = {}
    for number in range(args.rounds):
        results: dict[str, dict[str, Any]] = {}
        for loop in args.loops:
            theirs = LOOPS[loop].peer is not None
            own = {**shared, "iterations": loop_iterations(loop, shared["iterations"])}
            options = loop_options(SETTINGS[setting], algorithm, own)
            if not theirs:
                options += ["--vmas-path", str(vmas_folder(args.root))]
            results[loop] = run_loop(loop, python if theirs else Path(sys.executable), options)
            rate = results[loop]["frames_per_cpu_s"]
            print(f"{algorithm} {setting} round {number + 1} {loop}: {rate:,.0f} frames/CPU-s", flush=True)
        check_equal_work(results, shared["iterations"])
        rounds.append(results)
        found = {"setting": SETTINGS[setting], "shared": dict(shared)}
        for key in ("frames_per_cpu_s", "frames_per_wall_s"):
            found[key] = rates(rounds, key)
        found["ratios"] = pair_ratios(rounds, "frames_per_cpu_s")
        yield found | {"rounds": list(rounds)}
    print_tables(found, f"{algorithm}, {SETTINGS[setting]}: frames per CPU-second")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    shared = {name: getattr(args, name) for name in SHARED}
    record: dict[str, Any] = {"benchmark": "marl_train_speed", "threads": 1, "comparisons": {}}
    try:
        if args.append and args.out.exists():
            record = json.loads(args.out.read_text(encoding="utf-8"))
        python = ensure_peer(PEER, args.root)
        record["versions"] = {PEER: installed_packages(PEER, args.root), "plumbline": _own_versions()}
        record["packages"] = check_same_rules(python, shared)
        for setting in args.settings:
            for algorithm in args.algorithms:
                about = {"command": public_command(argv), "date": args.date, "machine": machine()}
                for found in compare(args, setting, algorithm, python, shared):
                    record["comparisons"][f"{algorithm}_{setting}"] = about | found
                    write_record(record, args.out)  # after each round: an interrupted run keeps what it has
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
