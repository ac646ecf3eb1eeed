"""Attack matrices of finished control runs side by side: what each attack leaves of each method's return.

Reads the ``attacks/attacks.json`` that the AttackMatrix callback left in every run's folder.

    python benchmarks/attack_matrices.py studies/grad_laptop --out benchmarks/results/grad_laptop/attacks.json
    python benchmarks/attack_matrices.py runs/integrator --per-step 20
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from marl_train_speed import command_of  # noqa: E402

from modules.files import write_json  # noqa: E402

Matrix = dict[str, dict[str, list[float]]]
"""Attack -> method -> one mean return a seed."""


def read_reports(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(task, method) -> reports, one a seed, in order of their folders; the newest run of each seed counts.

    A study's runs lie in ``<task>/<method>/seed-<n>/run-<k>``; other folders count as one task and one method.

    Raises:
        FileNotFoundError: no report in ``folder``.
    """
    newest: dict[Path, Path] = {}
    for path in sorted(folder.rglob("attacks/attacks.json")):
        run = path.parent.parent
        newest[run.parent if run.parent.name.startswith("seed-") else run] = path
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for place, path in newest.items():
        parts = place.parts
        key = (parts[-3], parts[-2]) if place.name.startswith("seed-") else ("", folder.name)
        found[key].append(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        raise FileNotFoundError(f"{folder}: no attacks/attacks.json in it: add callbacks.attacks.AttackMatrix")
    return dict(found)


def matrix_of(reports: dict[tuple[str, str], list[dict[str, Any]]], task: str) -> Matrix:
    """Of one task, with the rows ``natural`` and ``worst case`` at the end."""
    matrix: Matrix = defaultdict(dict)
    for (where, method), runs in reports.items():
        if where != task:
            continue
        for run in runs:
            for row in run["attacks"]:
                matrix[row["attack"]].setdefault(method, []).append(row["return_mean"])
        matrix["worst case"][method] = [run["worst_case"] for run in runs]
    worst = matrix.pop("worst case", {})
    return {**matrix, "worst case": worst}


def cell(values: Sequence[float]) -> str:
    """Mean and, of several seeds, its standard error."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    return f"{mean:.4g} ({statistics.stdev(values) / math.sqrt(len(values)):.2g})"


def table(matrix: Matrix) -> str:
    """As Markdown."""
    methods = sorted({method for row in matrix.values() for method in row})
    lines = [f"| attack | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for attack, row in matrix.items():
        lines.append(f"| {attack} | {' | '.join(cell(row[m]) if m in row else '-' for m in methods)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a study's folder, or an experiment's")
    parser.add_argument("--per-step", type=int, default=1, help="divide returns by this many steps")
    parser.add_argument("--out", type=Path, help="a JSON file of the same figures")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    args = parser.parse_args(argv)
    try:
        reports = read_reports(args.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    matrices: dict[str, Matrix] = {}
    for task in sorted({task for task, _ in reports}):
        matrix = matrix_of(reports, task)
        matrices[task] = {
            attack: {method: [value / args.per_step for value in values] for method, values in row.items()}
            for attack, row in matrix.items()
        }
        print(f"\n{task or args.folder.name}, mean return (standard error over seeds)\n{table(matrices[task])}")
    if args.out is not None:
        perturbation = {f"{task}/{method}": runs[0]["perturbation"] for (task, method), runs in reports.items()}
        write_json(
            args.out,
            {
                "command": command_of(Path(__file__).name, argv if argv is not None else sys.argv[1:]),
                "date": args.date,
                "perturbation": perturbation,
                "matrices": matrices,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
