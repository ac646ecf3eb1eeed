"""Speed of neural routing solvers: Plumbline's attention network against rl4co's on one thread, interleaved.

Both hold the same network with the same start weights, solve the same instances of the travelling salesman problem, and
make the same steps: POMO's and the attention model's training step, and greedy decoding. Each loop runs in a process of
its own; runs alternate, A B A B ..., and ratios are taken within a round. CPU seconds are counted over whole steps
after warm-up. POMO runs from 20 to 200 nodes, so the result also says how the cost of an instance grows. See README.md
beside this file.

    python benchmarks/routing_speed.py --rounds 3
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers import default_root, ensure_peer, installed_packages

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "loops"), str(HERE.parent)]

from marl_train_speed import command_of, result_line, write_record  # noqa: E402
from routing_common import RoutingArgs  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

PEER = "rl4co"
REFERENCE = "rl4co"
PHASES = ("train", "greedy")


class Loop(NamedTuple):
    """A script, and the peer environment that runs it (``None``: this interpreter)."""

    script: str
    peer: str | None


LOOPS: dict[str, Loop] = {
    # in this order within a round: the peer writes the start weights that ours reads
    "rl4co": Loop("rl4co_loop.py", PEER),
    "plumbline": Loop("plumbline_routing_loop.py", None),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "pomo20": {"method": "pomo", "nodes": 20, "batch": 64, "layers": 6, "warmup": 2, "steps": 8},
    "pomo50": {"method": "pomo", "nodes": 50, "batch": 32, "layers": 6, "warmup": 1, "steps": 4},
    "pomo100": {"method": "pomo", "nodes": 100, "batch": 8, "layers": 6, "warmup": 1, "steps": 3},
    "pomo200": {"method": "pomo", "nodes": 200, "batch": 2, "layers": 6, "warmup": 1, "steps": 3},
    "am20": {"method": "am", "nodes": 20, "batch": 512, "layers": 3, "warmup": 1, "steps": 4},
    "am50": {"method": "am", "nodes": 50, "batch": 256, "layers": 3, "warmup": 1, "steps": 3},
}
SAME_ROUTES, COST_DIFFERENCE, LIKELIHOOD_DIFFERENCE = 0.9, 1e-3, 2e-5
"""What float32 allows two implementations of one network to differ by. Greedy routes part where two logits are within
rounding of each other; most do not. Log-likelihoods sum over nodes: theirs is per node."""


def loop_options(setting: Mapping[str, Any], seed: int, probe: Path, profile: bool = False) -> list[str]:
    """Command line of a loop script, the same for every loop."""
    options = ["--threads", "1", "--seed", str(seed), "--probe", str(probe)]
    for name, value in setting.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return options + ["--profile"] * profile


def run_loop(name: str, python: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one loop script to its end.

    Raises:
        RuntimeError: with the script's last lines if it fails or prints no result.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(HERE / "loops" / LOOPS[name].script), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = result_line(done.stdout)
    if done.returncode or found is None:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"routing_speed: {name} failed (exit {done.returncode}):\n{tail}")
    return {**found, "loop": name}


def check_equal_work(results: Mapping[str, Mapping[str, Any]], setting: Mapping[str, Any]) -> None:
    """What the loops say of one round, held against each other.

    Raises:
        ValueError: loops differ in instances, routes or updates; in parameters by another number than the parts that
            only the peer has; or in what the same weights decode; or tours are too short or too long.
    """
    for key in ("method", "nodes", "batch", "rollouts", "updates"):
        found = {name: line[key] for name, line in results.items()}
        if len(set(found.values())) != 1:
            raise ValueError(f"routing_speed: loops differ in {key}: {found}")
    for phase in PHASES:
        found = {name: line[phase]["instances"] for name, line in results.items()}
        if len(set(found.values())) != 1:
            raise ValueError(f"routing_speed: loops differ in instances of {phase}: {found}")
    # an optimal tour of n uniform points is longer than 0.7 sqrt(n) on average, a random one 0.52 n long; untrained
    # networks may be somewhat worse than random
    low, high = 0.7 * math.sqrt(setting["nodes"]), 0.75 * setting["nodes"]
    for name, line in results.items():
        if not low < line["greedy_cost"] < high:
            raise ValueError(
                f"routing_speed: {name}'s greedy tours of {setting['nodes']} nodes are {line['greedy_cost']} long on "
                f"average, {low:.2f} to {high:.2f} expected"
            )
    if set(results) != set(LOOPS):
        return
    theirs, ours = results[REFERENCE], results["plumbline"]
    expected = RoutingArgs(**setting).extra_parameters()
    if theirs["parameters"] - ours["parameters"] != expected:
        raise ValueError(
            f"routing_speed: {theirs['parameters']} and {ours['parameters']} parameters: {expected} more are the "
            "peer's own"
        )
    probe = ours["probe"]
    if (
        probe["same_routes"] < SAME_ROUTES
        or probe["cost_difference"] > COST_DIFFERENCE
        or not probe["log_likelihood_difference"] <= LIKELIHOOD_DIFFERENCE * setting["nodes"]
    ):
        raise ValueError(f"routing_speed: the same weights decode differently: {probe}")
    if abs(theirs["greedy_cost"] / ours["greedy_cost"] - 1.0) > COST_DIFFERENCE:
        raise ValueError(
            f"routing_speed: greedy tours from the same weights are {theirs['greedy_cost']} and {ours['greedy_cost']} "
            "long on average"
        )


def spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def summarise(rounds: Sequence[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Per phase and loop the rate over the rounds, and its ratio to :data:`REFERENCE` within a round where that ran.

    Args:
        rounds: loop -> result line, per round. key: the rate, ``instances_per_cpu_s`` or ``instances_per_wall_s``.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for phase in PHASES:
        table[phase] = {}
        for loop in rounds[0]:
            row = spread([one[loop][phase][key] for one in rounds], 3)
            if REFERENCE in rounds[0] and loop != REFERENCE:
                ratios = [round(one[loop][phase][key] / one[REFERENCE][phase][key], 4) for one in rounds]
                row["ratio"] = spread(ratios, 4) | {"by_round": ratios}
            table[phase][loop] = row
    return table


def growth(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """How the CPU time of a POMO instance grows with its nodes, per phase and loop.

    Args:
        settings: found so far, by name.

    Returns:
        A row per number of nodes: ``nodes``, ``cpu_ms`` an instance (median over rounds), and but for the first
        ``exponent``: of nodes, from the row before to this one.
    """
    sizes = sorted(
        (found for found in settings.values() if found["setting"]["method"] == "pomo"),
        key=lambda found: found["setting"]["nodes"],
    )
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    for phase in PHASES:
        table[phase] = {}
        for found in sizes:
            for loop, row in found["instances_per_cpu_s"][phase].items():
                one = {"nodes": found["setting"]["nodes"], "cpu_ms": round(1e3 / row["median"], 3)}
                table[phase].setdefault(loop, []).append(one)
        for rows in table[phase].values():
            for before, after in itertools.pairwise(rows):
                steeper = math.log(after["cpu_ms"] / before["cpu_ms"]) / math.log(after["nodes"] / before["nodes"])
                after["exponent"] = round(steeper, 2)
    return table


def print_table(name: str, found: Mapping[str, Any]) -> None:
    setting = found["setting"]
    what = f"{setting['batch']} instances a step, {setting['layers']} layers"
    print(f"\n{name}: {what}; instances per CPU-second\n{'':<22}{'median':>10}{'min':>10}{'max':>10}{'ratio':>22}")
    for phase, table in found["instances_per_cpu_s"].items():
        for loop, row in table.items():
            ratio = ""
            if "ratio" in row:
                ratio = f"{row['ratio']['median']:.2f} [{row['ratio']['min']:.2f}, {row['ratio']['max']:.2f}]"
            rates = "".join(f"{row[key]:>10,.1f}" for key in ("median", "min", "max"))
            print(f"{phase:<10}{loop:<12}{rates}{ratio:>22}", flush=True)


def print_growth(table: Mapping[str, Any]) -> None:
    print("\nPOMO: CPU milliseconds an instance, and the exponent of nodes since the row before")
    for phase, loops in table.items():
        for loop, rows in loops.items():
            cells = [
                f"n={row['nodes']}: {row['cpu_ms']:.2f}" + (f" (^{row['exponent']:.2f})" if "exponent" in row else "")
                for row in rows
            ]
            print(f"{phase:<10}{loop:<12}{', '.join(cells)}", flush=True)


def compare(
    args: argparse.Namespace, setting: Mapping[str, Any], name: str, pythons: Mapping[str, Path]
) -> Iterator[list[dict[str, dict[str, Any]]]]:
    """Run the rounds of one setting; after each, the result lines of all so far.

    Raises:
        RuntimeError: a loop fails. ValueError: the loops did different work.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(1 if args.profile else args.rounds):
        results: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            options = loop_options(setting, args.seed + number, Path(folder) / "probe.pt", args.profile)
            for loop in (loop for loop in LOOPS if loop in args.loops):
                results[loop] = line = run_loop(loop, pythons[loop], options)
                if not args.profile:
                    rates = ", ".join(f"{phase} {line[phase]['instances_per_cpu_s']:,.1f}" for phase in PHASES)
                    cost = f"greedy tours {line['greedy_cost']:.3f}"
                    print(f"{name} round {number + 1} {loop}: {rates} instances/CPU-s; {cost}", flush=True)
        check_equal_work(results, setting)
        rounds.append(results)
        yield rounds


public_command = functools.partial(command_of, "routing_speed.py")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed of routing solvers against rl4co, interleaved.")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--steps", type=int, help="timed training steps of every setting (default: its own)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; counted up by one a round")
    parser.add_argument("--profile", action="store_true", help="one profiled run a loop, op groups; no timing")
    parser.add_argument("--append", action="store_true", help="keep what --out holds of other settings")
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routing_speed.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    record: dict[str, Any] = {"benchmark": "routing_speed", "threads": 1, "settings": {}}
    try:
        if args.append and args.out.exists():
            record = json.loads(args.out.read_text(encoding="utf-8"))
        peers = {peer for loop in args.loops if (peer := LOOPS[loop].peer) is not None}
        built = {peer: ensure_peer(peer, args.root) for peer in peers}
        pythons = {loop: built.get(LOOPS[loop].peer or "", Path(sys.executable)) for loop in args.loops}
        versions = {peer: installed_packages(peer, args.root) for peer in peers} | {"plumbline": _own_versions()}
        record["versions"] = versions
        for name in args.settings:
            setting = SETTINGS[name] | ({} if args.steps is None else {"steps": args.steps})
            found: dict[str, Any] = {
                "command": public_command(argv), "date": args.date, "machine": machine(), "setting": setting,
            }  # fmt: skip
            for rounds in compare(args, setting, name, pythons):
                if args.profile:
                    continue
                for key in ("instances_per_cpu_s", "instances_per_wall_s"):
                    found[key] = summarise(rounds, key)
                found["rounds"] = rounds
                record["settings"][name] = found
                record["growth"] = growth(record["settings"])
                write_record(record, args.out)  # after each round: an interrupted run keeps what it has
            if args.profile:
                print_profiles(name, rounds[0])
            else:
                print_table(name, found)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if not args.profile:
        print_growth(record["growth"])
        print(f"\nwritten: {args.out}")
    return 0


def print_profiles(name: str, lines: Mapping[str, Mapping[str, Any]]) -> None:
    for loop, line in lines.items():
        for phase in PHASES:
            print(f"\n{name} {loop} {phase}: seconds a step by op group (torch.profiler, self time)")
            for group, seconds in line[phase]["profile_s_per_step"].items():
                print(f"{group:<40}{seconds:>10.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
