"""Our probes and trees against scikit-learn 1.9.1, whose answers stand in ``sklearn.json`` (``record_sklearn.py``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.assurance.measures.concept_probe import fit_logistic
from modules.assurance.measures.surrogate_tree import fit_tree

SKLEARN = json.loads(Path(__file__).with_name("sklearn.json").read_text(encoding="utf-8"))


def test_logistic_regressions_equal_sklearn():
    for case in SKLEARN["logistic"]:
        x, y = torch.tensor(case["x"]), torch.tensor(case["y"])
        trained = torch.arange(len(x)) < case["train"]
        classes = int(y.max()) + 1
        # a second problem beside it, on other rows and labels, must change nothing
        scores = fit_logistic(
            x, torch.stack([y, y.flip(0)]), torch.stack([trained, ~trained]), classes=classes, l2=case["l2"]
        )
        theirs = torch.tensor(case["probabilities"], dtype=torch.float64)
        torch.testing.assert_close(scores[0].softmax(-1), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", SKLEARN["trees"], ids=lambda case: case["kind"])
def test_trees_equal_sklearn(case):
    x, y, count = np.array(case["x"]), np.array(case["y"]), case["train"]
    tree = fit_tree(x[:count], y[:count], kind=case["kind"], depth=4, min_leaf=5)
    inner = tree.feature >= 0
    np.testing.assert_allclose(np.sort(tree.threshold[inner]), case["thresholds"], atol=1e-12)
    said = tree.predict(x[count:])
    np.testing.assert_allclose(said, case["predictions"], atol=1e-12)
    held_out = y[count:]
    ours = (
        (said == held_out).mean()
        if case["kind"] == "classification"
        else np.mean(1 - np.square(said - held_out).sum(0) / np.square(held_out - held_out.mean(0)).sum(0))
    )
    assert ours == pytest.approx(case["score"], abs=1e-12)
    assert case["score"] > 0.4  # there was something to learn
