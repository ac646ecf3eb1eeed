"""The alignment cycle against the same compute with fixed objectives, over seeds: `python -m train align`, arm by arm.

Every arm trains and measures the same number of rounds (``align.stop: false``), from the same training seeds, on the
same units; only who moves the knobs differs. Arms of one seed run side by side, so that a busy machine touches them
alike; a killed study goes on, since every cycle does. See README.md beside this file.

    python benchmarks/cycle_study.py planted emax --seeds 3 --workers 2
    python benchmarks/cycle_study.py report planted emax
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from train_tokens import _own_versions, machine  # noqa: E402

from modules.assurance.ledger import entries  # noqa: E402
from modules.files import write_json  # noqa: E402

ARMS = ("findings", "fixed", "random")


def run_cycle(name: str, arm: str, seed: int, out: Path, extra: Sequence[str]) -> Path:
    """One cycle in ``out/<name>/<arm>-<seed>``, or going on there; its last line of output is printed."""
    folder = out / name / f"{arm}-{seed}"
    command = [
        sys.executable, "-m", "train", "align", "-c", f"cycle/{name}", f"--align.arm={arm}", f"--align.seed={seed}",
        "--align.stop=false", f"--out={folder}", *extra,
    ]  # fmt: skip
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3, 4):
        raise RuntimeError(f"{name} {arm} {seed}: exit code {done.returncode}: {(done.stderr or done.stdout)[-800:]}")
    print(f"{name} {arm} seed {seed}: {time.monotonic() - started:.0f} s, exit code {done.returncode}", flush=True)
    return folder


def cycle_rounds(folder: Path) -> list[dict[str, Any]]:
    """Per round: deficits, verdict, fresh and anchor values of the gated figures, knobs."""
    rounds = []
    decisions = [one for one in entries(folder / "ledger.jsonl") if one["kind"] == "decision"]
    for entry in decisions:
        place = folder / f"round_{entry['round']:02d}"
        report = json.loads((place / "assurance" / "report.json").read_text("utf-8"))
        gates = {one["figure"] for one in report["judgements"] if one["kind"] == "gate"}
        values = {
            f"{one['name']}@{one['split']}": one["value"]
            for one in report["figures"]
            if one["name"] in gates and one["status"] == "measured"
        }
        timing = json.loads((place / "assurance" / "timing.json").read_text("utf-8"))
        rounds.append(
            {
                "verdict": entry["payload"]["verdict"],
                "deficits": entry["payload"]["deficits"],
                "worst": max(entry["payload"]["deficits"].values(), default=0.0),
                "values": values,
                "knobs": json.loads((place / "objectives.json").read_text("utf-8"))["knobs"],
                "assurance_seconds": sum(timing["seconds"].values()),
            }
        )
    return rounds


def compare(runs: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Arms' worst-gate deficits in the first and last round, and the seeds where findings end below another arm."""
    table: dict[str, Any] = {}
    for arm, seeds in runs.items():
        first = [rounds[0]["worst"] for rounds in seeds.values()]
        last = [rounds[-1]["worst"] for rounds in seeds.values()]
        passed = [
            next((number for number, one in enumerate(rounds) if one["verdict"] == "pass"), None)
            for rounds in seeds.values()
        ]
        table[arm] = {
            "first": first,
            "last": last,
            "mean_first": statistics.fmean(first),
            "mean_last": statistics.fmean(last),
            "first_pass": passed,
        }
    for arm in set(runs) - {"findings"}:
        pairs = [
            (runs["findings"][s][-1]["worst"], runs[arm][s][-1]["worst"]) for s in runs["findings"] if s in runs[arm]
        ]
        table[arm]["findings_below"] = sum(a < b for a, b in pairs)
        table[arm]["pairs"] = len(pairs)
    return table


def markdown(results: dict[str, Any]) -> str:
    """One row a method."""
    lines = [
        "| cycle | arm | worst gate's deficit, round 0 | last round, by seed | first round that passes |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for arm, row in found["table"].items():
            last = ", ".join(f"{value:.2f}" for value in row["last"])
            passes = ", ".join("-" if one is None else str(one) for one in row["first_pass"])
            lines.append(f"| {name} | {arm} | {row['mean_first']:.2f} | {row['mean_last']:.2f} ({last}) | {passes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="+", help="cycle configs (configs/cycle/<name>.yaml); 'report' first: only tabulate"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=1, help="seeds that no gate was chosen by")
    parser.add_argument("--arms", nargs="+", default=["findings", "fixed"], choices=ARMS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/cycle_study"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cycles.json")
    parser.add_argument("--extra", nargs="*", default=[], help="further flags of align")
    given = parser.parse_args()
    names = [name for name in given.names if name != "report"]
    out = given.out.resolve()
    if "report" not in given.names:
        work = [
            (name, arm, seed)
            for name in names
            for seed in range(given.first_seed, given.first_seed + given.seeds)
            for arm in given.arms
        ]
        with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
            jobs = [pool.submit(run_cycle, name, arm, seed, out, given.extra) for name, arm, seed in work]
            for job in jobs:
                job.result()
    results: dict[str, Any] = json.loads(given.results.read_text("utf-8"))["cycles"] if given.results.is_file() else {}
    for name in names:
        runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for folder in sorted((out / name).glob("*-*")):
            arm, _, seed = folder.name.rpartition("-")
            runs.setdefault(arm, {})[int(seed)] = cycle_rounds(folder)
        results[name] = {
            "table": compare(runs),
            "runs": {arm: {str(s): r for s, r in one.items()} for arm, one in runs.items()},
        }
    write_json(
        given.results,
        {
            "command": "python benchmarks/cycle_study.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": _own_versions(),
            "cycles": results,
        },
    )
    print(markdown(results))


if __name__ == "__main__":
    main()
