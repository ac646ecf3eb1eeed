from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from emax_batches import make_batch, make_learner, make_spec
from tensordict import TensorDict

from modules.emax import AgentNetwork, Clip, Ensemble, Explorer, Mixing, Reward, Target, ValueMARL
from modules.emax.batch import check_batch

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "field", "value", "says"),
    [
        (Ensemble, "size", 0, "must be >= 1"),
        (Ensemble, "size", -3, "must be >= 1"),
        (Ensemble, "bootstrap_p", 0.0, r"must be in \(0, 1\]"),
        (Ensemble, "bootstrap_p", 1.1, r"must be in \(0, 1\]"),
        (Ensemble, "bootstrap_p", NAN, r"must be in \(0, 1\]"),
        (Ensemble, "prior_scale", -0.5, "must be >= 0"),
        (Ensemble, "prior_scale", NAN, "must be >= 0"),
        (Explorer, "beta", -0.1, "must be >= 0"),
        (Explorer, "beta", NAN, "must be >= 0"),
        (Explorer, "beta", math.inf, "beta finite"),
        (Explorer, "epsilon_start", 1.5, r"must be in \[0, 1\]"),
        (Explorer, "epsilon_finish", -0.1, r"must be in \[0, 1\]"),
        (Explorer, "epsilon_finish", NAN, r"must be in \[0, 1\]"),
        (Explorer, "epsilon_frames", 0, "must be >= 1"),
        (Explorer, "temperature", 0.0, "must be > 0"),
        (Explorer, "temperature", math.inf, "must be > 0"),
        (Explorer, "kind", "greedy", "must be one of epsilon_greedy, ucb"),
        (Target, "update_every", 0, "must be >= 1"),
        (Target, "tau", 0.0, r"must be in \(0, 1\]"),
        (Target, "tau", 1.5, r"must be in \(0, 1\]"),
        (Target, "tau", NAN, r"must be in \(0, 1\]"),
        (Target, "kind", "single_target", "must be one of mean_online"),
        (Target, "reduce", "mean", "must be one of max_of_mean, mean_of_max"),
        (Mixing, "kind", "sum", "must be one of none, vdn, qmix"),
        (Mixing, "embed", 0, "must be >= 1"),
        (Mixing, "hypernet_hidden", 0, "must be >= 1"),
        (Mixing, "hypernet_layers", 3, "must be one of 1, 2"),
        (AgentNetwork, "hidden", 0, "must be >= 1"),
        (AgentNetwork, "output_gain", 0.0, "must be > 0"),
        (Reward, "scalarise", "max", "must be one of sum, mean, none"),
        (Reward, "norm", "clip", "must be one of none, scale, standardise"),
        (Clip, "norm", 0.0, "must be > 0"),
        (Clip, "norm", NAN, "must be > 0"),
        (Clip, "scope", "all", "must be one of member, global"),
    ],
)
def test_bad_setting_is_named_with_its_value(settings, field, value, says):
    with pytest.raises(ValueError, match=rf"^{settings.__name__}: .*{says}") as raised:
        settings(**{field: value})
    assert field in str(raised.value)
    assert str(value) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gamma", -0.1),
        ("gamma", 1.1),
        ("gamma", NAN),
        ("learning_rate", 0.0),
        ("adam_eps", NAN),
        ("divergence_limit", 1.0),
        ("evaluator", "vote"),
    ],
)
def test_bad_argument_is_named_with_its_value(field, value):
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"^ValueMARL: .*{field}.* must be .*got .*{value}"):
        ValueMARL(**arguments)


@pytest.mark.parametrize("kind", ["vdn", "qmix"])
def test_joint_values_need_a_common_reward(kind):
    with pytest.raises(
        ValueError, match=rf"^ValueMARL: {kind} needs a common reward: set reward.scalarise to sum or mean"
    ):
        ValueMARL(mixing=Mixing(kind), reward=Reward("none"))
    ValueMARL(mixing=Mixing("none"), reward=Reward("none"))


def _checked(part: TensorDict, **changes: Any) -> None:
    spec = make_spec(restricts_actions=True, own_state=True, state_size=7)
    settings = {"minibatches": 2, "sequences": True, "members": 3, "masked": True, **changes}
    check_batch(part.unsqueeze(0), spec, **settings)


def _part() -> TensorDict:
    return make_batch(make_spec(restricts_actions=True, own_state=True, state_size=7), 2, 8, 5, members=3)


@pytest.mark.parametrize(
    ("field", "shape", "wanted"),
    [
        ("observation", (5, 3, 5), [1, 2, 8, 6, 3, 5]),  # without the step after the last
        ("observation", (6, 3, 4), [1, 2, 8, 6, 3, 5]),
        ("legal", (6, 3, 5), [1, 2, 8, 6, 3, 4]),
        ("legal", (5, 3, 4), [1, 2, 8, 6, 3, 4]),
        ("state", (6, 15), [1, 2, 8, 6, 7]),
        ("reward", (5,), [1, 2, 8, 5, 3]),
        ("reward", (5, 1), [1, 2, 8, 5, 3]),
        ("terminated", (5, 1), [1, 2, 8, 5]),
        ("filled", (6,), [1, 2, 8, 5]),
        ("member_mask", (2,), [1, 2, 8, 3]),
    ],
)
def test_wrong_shape_is_named_with_the_right_one(field, shape, wanted):
    part = _part()
    _checked(part)
    part[field] = torch.zeros(2, 8, *shape)
    got = [1, 2, 8, *shape]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        _checked(part)
    assert str(raised.value) == f"ValueMARL: batch: '{field}' must be {wanted}, got {got}"


@pytest.mark.parametrize("field", ["observation", "legal", "state", "reward", "terminated", "filled", "member_mask"])
def test_missing_field_is_named(field):
    part = _part()
    del part[field]
    with pytest.raises(ValueError, match=rf"^ValueMARL: batch: '{field}' must be \[.*\], got nothing$"):
        _checked(part)


@pytest.mark.parametrize("value", [-1, 4])
def test_action_out_of_range_is_named(value):
    part = _part()
    part["action"][1, 3, 2, 0] = value
    low, high = min(value, 0), max(value, 3)
    with pytest.raises(ValueError, match=rf"^ValueMARL: batch: 'action' must be in \[0, 4\), got \[{low}, {high}\]$"):
        _checked(part)


def test_action_of_another_shape_is_named():
    part = _part()
    part["action"] = part["action"].unsqueeze(-1)
    with pytest.raises(
        ValueError, match=r"'action' must be \[updates, minibatches, items, steps, agents\], got \[1, 2"
    ):
        _checked(part)
    part = _part()
    part["action"] = part["action"][..., :2].clone()
    with pytest.raises(ValueError, match=r"'action' must be \[1, 2, 8, 5, 3\], got \[1, 2, 8, 5, 2\]"):
        _checked(part)


def test_another_number_of_minibatches_or_of_steps_is_named():
    with pytest.raises(ValueError, match=r"'action' must be \[1, 3, 8, 5, 3\], got \[1, 2, 8, 5, 3\]"):
        _checked(_part(), minibatches=3)
    with pytest.raises(ValueError, match=r"'action' must be \[1, 2, 8, 1, 3\], got \[1, 2, 8, 5, 3\]"):
        _checked(_part(), sequences=False)  # feed-forward learners take single steps


def test_the_first_batch_of_a_learner_is_checked():
    spec = make_spec(restricts_actions=True)
    learner = make_learner(spec)
    part = make_batch(spec)
    part["legal"] = part["legal"][..., :2].clone()
    with pytest.raises(ValueError, match="ValueMARL: batch: 'legal' must be"):
        learner.training_step(part.unsqueeze(0), 0)


def test_checkpoint_of_another_task_is_refused_by_the_field_that_differs():
    spec = make_spec()
    learner, checkpoint = make_learner(spec), {}
    learner.on_save_checkpoint(checkpoint)
    learner.on_load_checkpoint(checkpoint)
    for field, value in (("num_agents", 2), ("num_actions", 6), ("observation_size", 9), ("state_size", 1)):
        other = make_learner(dataclasses.replace(spec, **{field: value}))
        with pytest.raises(ValueError, match=rf"^ValueMARL: the checkpoint is of task test with {field} "):
            other.on_load_checkpoint(checkpoint)


def test_a_learner_is_built_from_its_checkpoint_alone():
    learner, checkpoint = make_learner(make_spec(), mixing=Mixing("qmix")), {}
    learner.on_save_checkpoint(checkpoint)
    fresh = ValueMARL(mixing=Mixing("qmix"))
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(learner.state_dict())
    assert torch.equal(fresh.online, learner.online)
    assert fresh.spec == learner.spec
