"""Solvers of the study ``configs/asp/study_laptop.yaml`` side by side: generated sets as they are and boxed, TSPLIB.

For every finished run: mean gap over the study's held-out sets with the solver seeing instances as they are and scaled
to the unit square (``normalize: unit_box``, what a fair comparison of a solver that suffers from scale needs), and over
TSPLIB instances of up to 100 nodes (scaled). Greedy from every node, no augmentation.

    python benchmarks/asp_laptop.py studies/asp_laptop --tsplib <folder of .tsp files> --optima <its optima.csv>
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402

from datamodules.routing_data import EvalSet, RoutingDataModule  # noqa: E402
from datamodules.routing_lib_data import RoutingLibDataModule  # noqa: E402
from modules.files import write_json  # noqa: E402
from modules.routing.evaluation import optimality_gap  # noqa: E402
from modules.routing.solver import Decoding, RoutingSolver  # noqa: E402
from modules.routing.trained import load_solver  # noqa: E402

SIZES = [10, 20, 30]
DISTRIBUTIONS = ("uniform", "mixture_file", "gaussian_mixture", "cluster", "explosion")


def mean_gap(solver: RoutingSolver, data: Any, batches: Iterable[Any], normalize: str) -> float:
    """Mean gap in percent over the instances of ``batches``."""
    gaps = []
    for batch in batches:
        cost = solver.solve(data.problem, batch, Decoding(starts=True, normalize=normalize))[1]
        gaps.append(optimality_gap(cost, batch["reference"])[batch["index"] >= 0])
    return float(torch.cat(gaps).mean())


def evaluate(folder: Path, generated: RoutingDataModule, library: RoutingLibDataModule) -> dict[str, float]:
    """Figures of one run."""
    solver = load_solver(folder)
    figures: dict[str, float] = {}
    for normalize in ("none", "unit_box"):
        sets = {
            name: mean_gap(solver, generated, [generated.held_out(name)], normalize)
            for name in generated.evaluation_sets
        }
        figures[f"generated ({normalize})"] = statistics.fmean(sets.values())
        for distribution in DISTRIBUTIONS:
            own = [gap for name, gap in sets.items() if name.startswith(f"{distribution}/")]
            figures[f"{distribution} ({normalize})"] = statistics.fmean(own)
    loaders = library.test_dataloader()
    batches = [batch for loader in (loaders if isinstance(loaders, list) else [loaders]) for batch in loader]
    figures["tsplib, n <= 100"] = mean_gap(solver, library, batches, "none")  # its reader has scaled them
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--tsplib", required=True)
    parser.add_argument("--optima", required=True)
    parser.add_argument("--references", default="runs/references")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "asp_laptop" / "solvers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {name: EvalSet(sizes=SIZES, count=100) for name in DISTRIBUTIONS}
    generated = RoutingDataModule("tsp", eval_sets=sets, cache_dir=options.references)
    library = RoutingLibDataModule("tsp", [options.tsplib], options.optima, max_size=100)
    library.setup("test")
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for checkpoint in sorted(options.study.glob("*/*/seed-*/run-*/checkpoints/last.ckpt")):
        folder = checkpoint.parents[1]
        task, algorithm, seed = folder.parts[-4:-1]
        runs.setdefault(f"{task} {algorithm}", {})[seed] = evaluate(folder, generated, library)
        print(task, algorithm, seed, flush=True)
    table = {}
    for name, seeds in sorted(runs.items()):
        table[name] = {
            key: {
                "mean": statistics.fmean(one[key] for one in seeds.values()),
                "standard_error": statistics.stdev(one[key] for one in seeds.values()) / len(seeds) ** 0.5
                if len(seeds) > 1
                else None,
            }
            for key in next(iter(seeds.values()))
        }
        row = ", ".join(f"{key} {value['mean']:.2f}" for key, value in table[name].items())
        print(f"{name} ({len(seeds)} seeds): {row}")
    record = {
        "made": {
            "command": "python benchmarks/asp_laptop.py studies/asp_laptop --tsplib ... --optima ...",
            "machine": "2 shared cores, AMD EPYC",
            "date": datetime.date.today().isoformat(),
        },
        "unit": "mean gap in percent",
        "table": table,
        "runs": runs,
    }
    write_json(options.out, json.loads(json.dumps(record)))


if __name__ == "__main__":
    main()
