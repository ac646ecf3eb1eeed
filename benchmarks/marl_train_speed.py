"""Multi-agent training speed: Plumbline's replay loop against BenchMARL's on one thread, interleaved.

All loops learn VMAS ``simple_spread`` (or Plumbline's tensor environment of the same task) with the same algorithm,
network sizes, minibatch, updates per frame, target rule and optimiser, each in a process of its own. Runs alternate,
A B C A B C ..., and ratios are taken within a round. CPU seconds are counted inside each process over whole iterations
after warm-up, so imports and start-up are left out. See README.md beside this file.

    python benchmarks/marl_train_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import default_root, ensure_peer, installed_packages, peer_python

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "loops"), str(HERE.parent)]

from marl_common import ALGORITHMS, MarlArgs  # noqa: E402
from train_tokens import _own_versions, machine, summarise  # noqa: E402

from modules.files import atomic_write  # noqa: E402

PEER = "benchmarl"
LOOPS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    # loop -> (script, peer environment or None for this interpreter, extra arguments)
    "benchmarl": ("benchmarl_loop.py", PEER, ("--environment", "vmas")),
    "benchmarl_tensor": ("benchmarl_loop.py", PEER, ("--environment", "tensor")),
    "plumbline_vmas": ("plumbline_marl_loop.py", None, ("--environment", "vmas")),
    "plumbline": ("plumbline_marl_loop.py", None, ("--environment", "tensor")),
    "plumbline_emax": ("plumbline_marl_loop.py", None, ("--environment", "tensor", "--members", "5")),
}
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


def result_line(output: str) -> dict[str, Any] | None:
    """The last JSON result among the lines a loop printed (libraries print too), or ``None``."""
    lines = [line for line in output.splitlines() if line.startswith('{"loop"')]
    return json.loads(lines[-1]) if lines else None


def run_loop(name: str, python: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one loop script to its end.

    Raises:
        RuntimeError: with the script's last lines if it fails or prints no result.
    """
    script, _, extra = LOOPS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(python), str(HERE / "loops" / script), *options, *extra],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    found = result_line(done.stdout)
    if done.returncode or found is None:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"marl_train_speed: {name} failed (exit {done.returncode}):\n{tail}")
    return {**found, "loop": name}


def check_equal_work(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: ValueError if the loops of a round differ in frames or updates."""
    work = {name: (line["frames"], line["updates"]) for name, line in results.items()}
    if len(set(work.values())) != 1:
        raise ValueError(f"marl_train_speed: loops did different work (frames, updates): {work}")


def vmas_folder(root: Path) -> Path:
    """Folder of the peer's packages, of which our loop on VMAS uses ``vmas`` and what that needs.

    Raises:
        RuntimeError: if it is not there.
    """
    for folder in (peer_python(PEER, root).parent.parent).glob("[lL]ib/**/site-packages/vmas"):
        return folder.parent
    raise RuntimeError(f"marl_train_speed: no vmas in the environment of {PEER} under {root}; build it with peers.py")


def print_table(table: Mapping[str, Mapping[str, float]], title: str) -> None:
    print(f"\n{title}\n{'loop':<18}{'median':>10}{'min':>10}{'max':>10}{'ratio':>8}{'min':>8}{'max':>8}")
    for loop, row in table.items():
        print(
            f"{loop:<18}{row['median']:>10,.0f}{row['min']:>10,.0f}{row['max']:>10,.0f}"
            f"{row['ratio_median']:>8.2f}{row['ratio_min']:>8.2f}{row['ratio_max']:>8.2f}",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Multi-agent training speed against BenchMARL, interleaved.")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS), help="order of a round")
    parser.add_argument("--reference", default="benchmarl", help="loop that ratios divide by (default: benchmarl)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--algorithms", nargs="+", default=["vdn", "qmix"], choices=ALGORITHMS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    defaults = {name: getattr(MarlArgs, name) for name in SHARED} | {"iterations": 10}
    for name in SHARED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "marl_train_speed.json")
    return parser


def public_command(argv: Sequence[str]) -> str:
    """The command without the options that name folders of this machine."""
    kept, skip = [], False
    for word in argv:
        hidden = word in ("--root", "--out")
        if not skip and not hidden:
            kept.append(word)
        skip = hidden
    return " ".join(["python benchmarks/marl_train_speed.py", *kept])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.reference not in args.loops:
        print(f"marl_train_speed: --reference {args.reference} is not among --loops {args.loops}", file=sys.stderr)
        return 2
    shared = {name: getattr(args, name) for name in SHARED}
    record: dict[str, Any] = {
        "benchmark": "marl_train_speed",
        "command": public_command(argv),
        "date": args.date,
        "machine": machine(),
        "threads": 1,
        "reference": args.reference,
        "shared": shared,
        "comparisons": {},
    }
    try:
        python = ensure_peer(PEER, args.root)
        record["versions"] = {PEER: installed_packages(PEER, args.root), "plumbline": _own_versions()}
        vmas = ["--vmas-path", str(vmas_folder(args.root))]
        for setting in args.settings:
            for algorithm in args.algorithms:
                options = loop_options(SETTINGS[setting], algorithm, shared)
                rounds = []
                for number in range(args.rounds):
                    results = {}
                    for loop in args.loops:
                        theirs = LOOPS[loop][1] is not None
                        more = [] if theirs else vmas
                        results[loop] = run_loop(loop, python if theirs else Path(sys.executable), [*options, *more])
                        print(
                            f"{algorithm} {setting} round {number + 1} {loop}: "
                            f"{results[loop]['frames_per_cpu_s']:,.0f} frames/CPU-s",
                            flush=True,
                        )
                    check_equal_work(results)
                    rounds.append(results)
                found: dict[str, Any] = {"setting": SETTINGS[setting]}
                for key in ("frames_per_cpu_s", "frames_per_wall_s"):
                    found[key] = summarise(rounds, args.reference, key)
                title = f"{algorithm}, {SETTINGS[setting]}: frames per CPU-second (ratio to {args.reference})"
                print_table(found["frames_per_cpu_s"], title)
                found["ratios_by_round"] = {
                    loop: [
                        round(one[loop]["frames_per_cpu_s"] / one[args.reference]["frames_per_cpu_s"], 4)
                        for one in rounds
                    ]
                    for loop in args.loops
                }
                record["comparisons"][f"{algorithm}_{setting}"] = found | {"rounds": rounds}
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out, "w") as stream:
        stream.write(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
