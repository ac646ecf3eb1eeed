"""Writes ``sklearn.json``: data and what scikit-learn makes of it. Needs an environment with scikit-learn.

pip install scikit-learn==1.9.1
python tests/oracle/assurance/record_sklearn.py

Inputs are multiples of 1/64, which scikit-learn's float32 trees hold exactly.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor  # pyright: ignore[reportMissingImports]


def _inputs(generator: np.random.Generator, rows: int, features: int) -> np.ndarray:
    return np.round(generator.normal(size=(rows, features)) * 64) / 64


def logistic(generator: np.random.Generator, classes: int, rows: int = 120, features: int = 4) -> dict:
    """Probabilities of all rows of a fit to the first three quarters, scaled to variance 1 there."""
    x, l2 = _inputs(generator, rows, features) * [1, 8, 1, 0.25], 0.01
    y = (x @ generator.normal(size=(features, classes)) + generator.normal(size=(rows, classes))).argmax(1)
    count = rows * 3 // 4
    scaled = (x - x[:count].mean(0)) / x[:count].std(0)
    strength = (2 if classes == 2 else 1) / (l2 * count)
    model = LogisticRegression(C=strength, tol=1e-12, max_iter=10_000).fit(scaled[:count], y[:count])
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "train": count,
        "l2": l2,
        "probabilities": model.predict_proba(scaled).tolist(),
    }


def tree(generator: np.random.Generator, kind: str, rows: int = 260, features: int = 4) -> dict:
    """Predictions of depth-4 trees, fitted to the first 200 rows, on the rest; thresholds sorted."""
    x = _inputs(generator, rows, features)
    noise = generator.normal(size=(rows, 2))
    score = np.stack([x[:, 0] * x[:, 1] + x[:, 2], np.sin(2 * x[:, 0])], 1) + 0.1 * noise
    if kind == "classification":
        y, make = np.digitize(score[:, 0], [-0.7, 0.7]), DecisionTreeClassifier
    else:
        y, make = np.round(score * 64) / 64, DecisionTreeRegressor
    model = make(max_depth=4, min_samples_leaf=5, random_state=0).fit(x[:200], y[:200])
    return {
        "kind": kind,
        "x": x.tolist(),
        "y": y.tolist(),
        "train": 200,
        "predictions": model.predict(x[200:]).tolist(),
        "thresholds": sorted(model.tree_.threshold[model.tree_.feature >= 0].tolist()),
        "score": model.score(x[200:], y[200:]),
    }


def main() -> None:
    generator = np.random.default_rng(0)
    content = {
        "made_by": "tests/oracle/assurance/record_sklearn.py",
        "versions": {name: version(name) for name in ("scikit-learn", "numpy", "scipy")},
        "logistic": [logistic(generator, 2), logistic(generator, 4)],
        "trees": [tree(generator, "classification"), tree(generator, "regression")],
    }
    Path(__file__).with_name("sklearn.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
