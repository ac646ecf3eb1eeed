"""What each variant makes of its settings, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from modules.rlhf.settings import ConstraintSpec, NelderMeadSpec, Problem, read_thresholds, resolve

NAMES, BOUNDS = ["meteor", "intent"], [(0.0, 1.0), (0.0, 1.0)]
BOTH = {"meteor": ConstraintSpec(0.2), "intent": ConstraintSpec(0.5)}


def _resolve(variant: str, constraints=None, weights=None, maximise=None, file=None) -> Problem:
    return resolve(variant, NAMES, BOUNDS, constraints or {}, weights or {}, maximise, NelderMeadSpec(), file)


@pytest.mark.parametrize(
    ("variant", "objective", "kind"), [("mu_ppo", "kl", "ge"), ("xi_ppo", "kl", "eq"), ("all_ppo", "all", "le")]
)
def test_constrained_variants_constrain_every_reward(variant, objective, kind):
    problem = _resolve(variant, BOTH)
    assert (problem.objective, problem.kinds, problem.thresholds) == (objective, (kind, kind), (0.2, 0.5))
    assert problem.constrained == (0, 1)


def test_kinds_can_be_mixed():
    mixed = {"meteor": ConstraintSpec(0.2, "ge"), "intent": ConstraintSpec(0.5)}
    assert _resolve("xi_ppo", mixed).kinds == ("ge", "eq")


def test_single_constraint_leaves_the_maximised_reward_free():
    problem = _resolve("single_constraint", {"intent": ConstraintSpec(0.5)}, maximise="meteor")
    assert (problem.maximise, problem.constrained, problem.kinds) == (0, (1,), ("ge",))
    assert _resolve("ppo_lag", {"intent": ConstraintSpec(0.5)}, maximise="meteor").kinds == ("le",)


def test_thresholds_come_from_a_file_where_they_are_not_given(tmp_path):
    file = tmp_path / "proxy_points.json"
    file.write_text(json.dumps({"thresholds": {"meteor": 0.3, "intent": 0.4}}))
    problem = _resolve("xi_ppo", {"intent": ConstraintSpec(0.5)}, file=str(file))
    assert problem.thresholds == (0.3, 0.5)
    assert read_thresholds(file) == {"meteor": 0.3, "intent": 0.4}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"variant": "xi_ppo", "constraints": {"meteor": ConstraintSpec(0.2)}},
            "constraints.intent.threshold is missing",
        ),
        ({"variant": "xi_ppo", "constraints": {**BOTH, "meteorr": ConstraintSpec(0.1)}}, "did you mean 'meteor'"),
        ({"variant": "xi_ppo", "constraints": {**BOTH, "intent": ConstraintSpec(1.5)}}, r"must be in \[0, 1\]"),
        ({"variant": "ppo", "weights": {"meteor": 0.5}}, "needs weights.intent"),
        ({"variant": "ppo", "weights": {"meteor": 0.5, "intent": math.nan}}, "weights.intent must be finite"),
        ({"variant": "ppo_sat", "weights": {"meteor": 1.0, "intent": 1.0}}, "threshold is missing"),
        ({"variant": "single_constraint", "constraints": BOTH}, "needs maximise"),
        ({"variant": "single_constraint", "constraints": BOTH, "maximise": "meteor"}, "this reward is maximised"),
        ({"variant": "nm_ppo", "constraints": BOTH}, "needs constraints.meteor.init and .max"),
        ({"variant": "fixed_lambda", "constraints": BOTH}, "needs weights.meteor"),
    ],
)
def test_wrong_settings_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        _resolve(**arguments)


def test_no_rewards_are_refused():
    with pytest.raises(ValueError, match="rewards is empty"):
        resolve("xi_ppo", [], [], {}, {}, None, NelderMeadSpec())


@pytest.mark.parametrize("content", ["[]", "{", '{"thresholds": 3}', '{"other": {}}'])
def test_a_threshold_file_of_another_form_is_named(tmp_path, content):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="must hold"):
        read_thresholds(file)
