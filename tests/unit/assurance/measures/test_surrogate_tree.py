"""Surrogate trees: planted rules, exhaustive search, held-out groups, text, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.assurance.measures import surrogate_tree as module
from modules.assurance.measures.surrogate_tree import fit_tree, surrogate_tree

RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.random((400, 3))
RULE = np.where(INPUTS[:, 1] <= 0.5, "left", np.where(INPUTS[:, 0] <= 0.3, "right", "stay"))


def test_a_planted_rule_is_found():
    found = surrogate_tree(INPUTS, RULE, kind="classification")
    assert found.fidelity > 0.97
    assert found.baseline == pytest.approx(0.5, abs=0.08)
    assert found.held_out == 120
    assert found.tree.feature[0] == 1
    assert found.tree.threshold[0] == pytest.approx(0.5, abs=0.02)
    assert found.tree.leaves == 3  # pure leaves are not split further
    assert found.tree.samples[0] == 280


def test_text_of_a_tree():
    tree = fit_tree([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], [4, 4, 4, 9], kind="classification")
    assert tree.render() == "x0 <= 2.5\n  -> 4 (100%, n=3)\nx0 > 2.5\n  -> 9 (100%, n=1)"
    named = tree.render(["speed", "mass"], ["brake", "go"])
    assert named == "speed <= 2.5\n  -> brake (100%, n=3)\nspeed > 2.5\n  -> go (100%, n=1)"
    flat = fit_tree([[0.0], [1.0]], [[1.0, 2.0], [2.0, 4.0]], kind="regression", depth=0)
    assert flat.render() == "-> y0 = 1.5, y1 = 3 (n=2)"
    with pytest.raises(ValueError, match="outputs: must be 2 names"):
        tree.render(outputs=["go"])
    with pytest.raises(ValueError, match="looks at input 1, got 1 names"):
        fit_tree([[0.0, 0.0], [0.0, 1.0]], [0, 1], kind="classification").render(["speed"])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=n, max_size=n),
            st.lists(st.integers(-5, 5), min_size=n, max_size=n),
        )
    ),
    st.integers(1, 3),
)
def test_a_split_is_the_best_of_all(data, min_leaf):
    x, y = np.array(data[0], dtype=np.float64), np.array(data[1], dtype=np.float64)

    def error(values: np.ndarray) -> float:
        return float(np.square(values - values.mean()).sum())

    best = error(y)
    for feature in range(2):
        for cut in np.unique(x[:, feature])[:-1]:
            low, high = y[x[:, feature] <= cut], y[x[:, feature] > cut]
            if min(len(low), len(high)) >= min_leaf:
                best = min(best, error(low) + error(high))
    tree = fit_tree(x, y, kind="regression", depth=1, min_leaf=min_leaf)
    assert np.square(y - tree.predict(x)[:, 0]).sum() == pytest.approx(best, abs=1e-9)
    assert tree.samples[tree.feature < 0].min() >= min(min_leaf, len(x))
    assert tree.samples[tree.feature < 0].sum() == len(x)


def test_depth_bounds_the_tree_and_deeper_never_fits_worse():
    y = np.sin(9 * INPUTS[:, 0]) + INPUTS[:, 2]
    errors = []
    for depth in range(5):
        tree = fit_tree(INPUTS, y, kind="regression", depth=depth)
        assert tree.leaves == 2**depth
        errors.append(np.square(tree.predict(INPUTS)[:, 0] - y).sum())
    assert errors == sorted(errors, reverse=True)


def test_regression_fidelity_is_one_less_the_unexplained_share():
    y = np.stack([2.0 * (INPUTS[:, 0] > 0.5), np.full(400, 3.0)], 1)
    found = surrogate_tree(INPUTS, y, kind="regression", depth=2)
    assert found.fidelity > 0.95
    assert found.baseline == pytest.approx(0.0, abs=0.05)
    noise = surrogate_tree(INPUTS, RANDOM.normal(size=400), kind="regression")
    assert noise.fidelity < 0.2  # and below 0 as a rule: the tree has learned noise


def test_groups_of_features_change_nothing(monkeypatch):
    whole = fit_tree(INPUTS, RULE, kind="classification", min_leaf=3)
    monkeypatch.setattr(module, "_CELLS", 1)  # a feature at a time
    apart = fit_tree(INPUTS, RULE, kind="classification", min_leaf=3)
    np.testing.assert_array_equal(whole.feature, apart.feature)
    np.testing.assert_array_equal(whole.threshold, apart.threshold)


def test_neighbouring_floats_are_split_between():
    low = 1.0
    high = np.nextafter(low, 2.0)
    tree = fit_tree([[low], [high]], [0, 1], kind="classification")
    assert tree.predict([[low], [high]]).tolist() == [0, 1]


def test_a_group_is_held_out_whole():
    """Each episode has an action of its own and a feature that names it: only leaks between its steps could help."""
    episode = np.repeat(np.arange(40), 10)
    inputs, action = episode[:, None] / 40, RANDOM.integers(0, 2, 40)[episode]
    leaking = surrogate_tree(inputs, action, kind="classification", depth=30)
    honest = surrogate_tree(inputs, action, kind="classification", depth=30, groups=episode)
    assert leaking.fidelity == 1.0
    assert honest.fidelity < 0.9
    assert honest.held_out == 120


def test_seed_draws_the_split():
    one, again, other = (surrogate_tree(INPUTS, RULE, kind="classification", seed=s, depth=1) for s in (0, 0, 1))
    assert one.fidelity == again.fidelity
    assert one.tree.threshold[0] == again.tree.threshold[0]
    assert one.baseline != other.baseline


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_policy_that_always_does_the_same_has_no_fidelity(kind):
    found = surrogate_tree(INPUTS, np.zeros(400), kind=kind)
    assert math.isnan(found.fidelity)
    assert math.isnan(found.baseline)
    assert found.tree.leaves == 1


def test_constant_inputs_give_a_leaf():
    assert fit_tree(np.ones((4, 2)), [0, 1, 0, 1], kind="classification").leaves == 1


@pytest.mark.parametrize(
    ("inputs", "outputs", "options", "message"),
    [
        (np.zeros((0, 2)), [], {}, "inputs: must be"),
        (np.zeros(3), [0, 1, 0], {}, "inputs: must be"),
        (np.zeros((3, 1)), [0, 1], {}, r"outputs: must be \[3\]"),
        (np.zeros((2, 1)), [[0, 1], [1, 0]], {}, "one label a sample"),
        (np.full((2, 1), math.nan), [0, 1], {}, "must be finite"),
        (np.zeros((2, 1)), [0.0, math.nan], {}, "must be finite"),
        (np.zeros((2, 1)), [0.0, math.inf], {"kind": "regression"}, "must be finite"),
        (np.zeros((2, 1)), [0, 1], {"kind": "ranking"}, "kind: must be"),
        (np.zeros((2, 1)), [0, 1], {"depth": -1}, "depth >= 0"),
        (np.zeros((2, 1)), [0, 1], {"min_leaf": 0}, "min_leaf >= 1"),
    ],
)
def test_fit_refuses(inputs, outputs, options, message):
    with pytest.raises(ValueError, match=message):
        fit_tree(inputs, outputs, **{"kind": "classification", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 1.0}, "both sides"),
        ({"groups": np.zeros(400)}, "both sides"),
        ({"groups": np.zeros(3)}, r"groups: must be \[400\]"),
    ],
)
def test_surrogate_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        surrogate_tree(INPUTS, RULE, kind="classification", **options)
