"""Writes ``rliable.json``: scores and what rliable makes of them. Needs an environment with rliable, not Plumbline's.

pip install rliable==1.2.0 'pandas<3' 'numpy>=2,<3'       # rliable wants arch<8, arch 7 fails on pandas 3
python tests/oracle/assurance/record_rliable.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rliable import library, metrics  # pyright: ignore[reportMissingImports]

REPLICATES = 20_000
TAUS = [0.1, 0.3, 0.5, 0.7, 0.9]
AGGREGATES = {
    "iqm": metrics.aggregate_iqm,
    "mean": metrics.aggregate_mean,
    "median": metrics.aggregate_median,
    "optimality_gap": metrics.aggregate_optimality_gap,
}


def _interval(scores, function) -> dict:
    estimate, ends = library.get_interval_estimates({"it": scores}, function, reps=REPLICATES)
    low, high = ends["it"]
    return {"estimate": np.ravel(estimate["it"]).tolist(), "low": low.tolist(), "high": high.tolist()}


def case(x: np.ndarray, y: np.ndarray) -> dict:
    """rliable's answers on scores ``x`` ``[runs, tasks]`` and a baseline's ``y``."""
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "aggregates": {name: _interval(x, lambda s, of=of: np.array([of(s)])) for name, of in AGGREGATES.items()},
        "iqm_difference": _interval(
            [x, y], lambda a, b: np.array([metrics.aggregate_iqm(a) - metrics.aggregate_iqm(b)])
        ),
        "probability_of_improvement": _interval(
            [x, y], lambda a, b: np.array([metrics.probability_of_improvement(a, b)])
        ),
        "profile": _interval(x, lambda s: library.score_distributions(s, TAUS)),
    }


def main() -> None:
    np.random.seed(0)  # noqa: NPY002  (rliable draws from the global generator)
    generator = np.random.default_rng(0)
    cases = {
        "three_tasks": case(generator.random((5, 3)), generator.random((4, 3))),
        "suite": case(generator.beta(2, 1, (10, 21)), generator.beta(1, 1, (10, 21))),
        "skewed": case(generator.exponential(0.5, (6, 4)), generator.exponential(0.4, (8, 4))),
        # steps of a tenth: many ties
        "ties": case(generator.integers(0, 11, (5, 6)) / 10, generator.integers(0, 11, (5, 6)) / 10),
    }
    content = {
        "made_by": "tests/oracle/assurance/record_rliable.py",
        "versions": {name: version(name) for name in ("rliable", "arch", "numpy", "scipy")},
        "replicates": REPLICATES,
        "taus": TAUS,
        "cases": cases,
    }
    Path(__file__).with_name("rliable.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
