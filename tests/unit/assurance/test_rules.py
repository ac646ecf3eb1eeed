"""Each rule against values worked out by hand, and what a knob refuses."""

from __future__ import annotations

import math

import pytest
from assurance_findings import finding, report
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from modules.assurance.knobs import GAINS, Knob
from modules.assurance.objectives import first_objectives, update
from modules.assurance.subject import AssuranceError

BASE = {
    "mult": {"bounds": [0.0, 10.0], "start": 2.0},
    "backoff": {"bounds": [-10.0, 10.0], "start": 2.0},
    "kl_adapt": {"bounds": [0.0, 10.0], "start": 2.0, "driven_by": ["c.kl"]},
    "exp_weights": {"start": {"a": 0.5, "b": 0.5}},
    "widen": {"bounds": [0.0, 10.0], "start": [4.0, 6.0]},
    "enqueue": {"items": ["a", "b", "c"]},
    "pid": {"bounds": [0.0, 10.0], "start": 2.0},
}


def _knob(rule, /, **changed):
    return Knob(**({"path": "m.u", "rule": rule, "driven_by": ["r.x"]} | BASE[rule] | changed))


def _rounds(knob, *found):
    """Objectives after each of the reports (a list of findings each)."""
    objectives, seen = first_objectives([knob]), []
    for number, findings in enumerate(found, start=1):
        objectives = update(objectives, report(*findings), [knob], f"{number:064x}")
        seen.append(objectives)
    return seen


def _values(knob, *found):
    return [one.knobs["m.u"] for one in _rounds(knob, *found)]


def _x(deficit, **changed):
    return [finding("r.x", deficit, **changed)]


def _kl(deficit, value, **changed):
    return [finding("c.kl", deficit, direction="down", value=value, **changed)]


@pytest.mark.parametrize(
    ("changed", "deficit", "value"),
    [
        ({}, 0.4, 2.0 * (1 + 0.5 * 0.4)),
        ({"gain": 2.0}, 0.4, 2.0 * 1.8),
        ({"gain": 2.0, "max_ratio": 1.5}, 0.4, 3.0),
        ({"gain": 2.0}, 100.0, 10.0),
        ({"start": 0.0, "first": 0.1}, 3.0, 0.1),
        ({"start": 0.05, "first": 0.1}, 0.5, 0.1),
        ({"direction": "down"}, 0.5, 2.0 / 1.25),
        ({"direction": "down", "max_ratio": 1.1}, 0.5, 2.0 / 1.1),
        ({"direction": "down", "bounds": [1.5, 10.0]}, 50.0, 1.5),
        ({"bounds": [2.0, 2.0]}, 5.0, 2.0),
    ],
)
def test_mult(changed, deficit, value):
    assert _values(_knob("mult", **changed), _x(deficit)) == [pytest.approx(value, rel=1e-11)]


def test_mult_climbs_the_ladder_of_the_sheet():
    knob = _knob("mult", start=0.0, first=0.1, max_ratio=1.5, bounds=[0.0, 0.36])
    assert _values(knob, *[_x(20.0)] * 5) == [0.1, 0.15, 0.225, 0.3375, 0.36]


def test_the_largest_deficit_counts():
    knob = _knob("mult", driven_by=["r.x", "r.y"])
    assert _values(knob, [finding("r.x", 0.2), finding("r.y", 0.6)]) == [pytest.approx(2.6)]
    assert _values(knob, [finding("r.x", 0.6), finding("r.y", 0.0)]) == [pytest.approx(2.6)]


def test_backoff_takes_the_violation_in_the_figures_unit():
    found = [finding("c.cost", 3.0, direction="down", tau=25.0, scale=0.5)]  # 1.5 above the threshold
    assert _values(_knob("backoff", driven_by=["c.cost"]), found) == [0.5]
    assert _values(_knob("backoff", driven_by=["c.cost"], gain=0.1), found) == [pytest.approx(1.85)]
    assert _values(_knob("backoff", driven_by=["c.cost"], direction="up"), found) == [3.5]
    assert _values(_knob("backoff", driven_by=["c.cost"], bounds=[1.0, 9.0]), found) == [1.0]


@pytest.mark.parametrize(
    ("value", "excess"),
    [(1.1, 0.1), (1.2, 0.2), (7.0, 0.2), (0.7, 0.0)],  # the last: only the interval's end falls short
)
def test_kl_adapt_is_the_proportional_controller(value, excess):
    """Ziegler et al. 2019, section 2.2: beta (1 + K clip(KL / KL* - 1, -0.2, 0.2)); the lower half only with relax."""
    assert _values(_knob("kl_adapt"), _kl(0.3, value)) == [pytest.approx(2.0 * (1 + 0.1 * excess), rel=1e-11)]
    assert _values(_knob("kl_adapt", target=0.5), _kl(0.3, value / 2)) == [pytest.approx(2.0 * (1 + 0.1 * excess))]
    assert _values(_knob("kl_adapt"), _kl(0.0, value, high=0.9)) == [2.0]


def test_kl_adapt_needs_a_figure_of_which_less_is_better():
    with pytest.raises(AssuranceError, match="knob m.u: rule kl_adapt needs a figure of which less is better"):
        _values(_knob("kl_adapt", driven_by=["r.x"]), _x(1.0))


WEIGHTS = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3).map(lambda raw: [one / sum(raw) for one in raw])
MEANS = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


@settings(deadline=None, max_examples=100)
@given(q=WEIGHTS, means=MEANS, gain=st.floats(0, 3), direction=st.sampled_from(["up", "down"]))
def test_exp_weights_is_the_formula(q, means, gain, direction):
    """``q_j exp(eta loss_j) / Z``; where more is better the loss is minus the mean."""
    names = ("c", "a", "b")
    knob = _knob("exp_weights", start=dict(zip(names, q, strict=True)), gain=gain, floor=0.0)
    found = finding("r.x", 1.0, direction=direction, conditions={**dict(zip(names, means, strict=True)), "clean": 99.0})
    (after,) = _values(knob, [found])
    losses = [-one if direction == "up" else one for one in means]
    raw = [share * math.exp(gain * loss) for share, loss in zip(q, losses, strict=True)]
    assert [after[name] for name in names] == pytest.approx([one / sum(raw) for one in raw], abs=1e-11)


def test_exp_weights_by_hand():
    conditions = {"uniform": 0.1, "cluster": 0.1 + math.log(3)}
    mapped = _knob("exp_weights", start={"u": 0.5, "k": 0.5}, gain=1.0, conditions={"u": "uniform", "k": "cluster"})
    gap = [finding("r.x", 1.0, direction="down", conditions=conditions)]
    assert _values(mapped, gap) == [{"u": pytest.approx(0.25), "k": pytest.approx(0.75)}]
    listed = _knob("exp_weights", start=[0.5, 0.5], gain=1.0, conditions=["cluster", "uniform"])
    assert _values(listed, gap) == [[pytest.approx(0.75), pytest.approx(0.25)]]
    floored = _knob("exp_weights", start=[0.5, 0.5], gain=50.0, conditions=["cluster", "uniform"])
    assert _values(floored, gap) == [[pytest.approx(0.98), 0.02]]
    raised = _knob("exp_weights", start=[1.0, 0.0], bounds=[0.1, 1.0], conditions=["cluster", "uniform"])
    assert _values(raised, gap) == [[pytest.approx(0.9), 0.1]]  # a family left out at the start comes in
    seventh = _knob("exp_weights", start=[0.5, 0.5], gain=50.0, floor=1 / 7, conditions=["cluster", "uniform"])
    assert _values(seventh, gap)[0][1] == 1 / 7  # rounding takes nothing off the floor
    passed = [finding("r.x", 0.0, direction="down", conditions=conditions)]
    assert _values(mapped, passed) == [{"u": 0.5, "k": 0.5}]


def test_equal_losses_move_no_weight():
    start = {"a": 1 / 3, "b": 1 / 6, "c": 0.5}
    assert _values(_knob("exp_weights", start=start), _x(5.0, conditions={"a": 0.3, "b": 0.3, "c": 0.3})) == [start]


def test_a_missing_condition_is_named():
    with pytest.raises(AssuranceError, match="knob m.u: figure r.x has no condition 'b'; it has bb: mend"):
        _values(_knob("exp_weights"), _x(1.0, conditions={"a": 0.0, "bb": 0.0}))


@pytest.mark.parametrize(
    ("changed", "conditions", "value"),
    [
        ({}, {}, [4.0, 7.0]),
        ({"direction": "down"}, {}, [3.0, 6.0]),
        ({"direction": "both"}, {}, [3.0, 7.0]),
        ({"conditions": {"low": "light", "high": "heavy"}}, {"light": 0.2, "heavy": 1.4}, [3.0, 6.0]),
        ({"conditions": {"low": "light", "high": "heavy"}}, {"light": 1.2, "heavy": 0.4}, [4.0, 7.0]),
        ({"conditions": {"low": "light", "high": "heavy"}}, {"light": 0.2, "heavy": 0.4}, [3.0, 7.0]),
        ({"conditions": {"low": "light", "high": "heavy"}}, {"light": 1.3, "heavy": 1.1}, [4.0, 7.0]),
        ({"conditions": {"low": "light"}}, {"light": 0.9, "heavy": 0.1}, [3.0, 6.0]),
        ({"max_ratio": 1.2}, {}, [4.0, 6.4]),
        ({"bounds": [0.0, 6.5]}, {}, [4.0, 6.5]),
        ({"start": [5.0, 5.0], "first": 0.25}, {}, [5.0, 5.25]),
    ],
)
def test_widen(changed, conditions, value):
    """Deficit 1, gain 0.5, width 2: the failing side goes out by 1."""
    assert _values(_knob("widen", **changed), _x(1.0, conditions=conditions)) == [pytest.approx(value)]


def test_enqueue_takes_failing_training_items_and_no_others():
    knob = _knob("enqueue", bounds=[0.0, 2.0])
    first = _x(1.0, conditions={"a": 0.9, "b": 1.5, "held_out": -9.0})
    second = _x(1.0, conditions={"a": 0.1, "b": 0.8, "c": 0.2, "held_out": -9.0})
    after = _rounds(knob, first, second, second)
    assert [one.knobs["m.u"] for one in after] == [{"a": 0}, {"a": 0, "c": 1}, {"a": 0, "c": 1}]  # c is worse than b
    ids = after[-1].state["m.u"]["provenance"]
    assert ids == {"a": f"{'0' * 12}:r.x:a", "c": f"{'0' * 12}:r.x:c"}
    assert _values(knob, _x(0.0, conditions={"a": -5.0})) == [{}]
    both = _knob("enqueue", driven_by=["r.x", "r.y"])
    found = [finding("r.x", 1.0, conditions={"a": 0.0}), finding("r.y", 1.0, conditions={"b": 0.0, "c": 2.0})]
    assert _values(both, found) == [{"a": 0, "b": 0}]
    tied = [finding(name, 1.0, conditions={"a": 0.0}) for name in ("r.y", "r.x")]
    for driven_by in (["r.x", "r.y"], ["r.y", "r.x"]):
        after = _rounds(_knob("enqueue", driven_by=driven_by), tied)[0]
        assert after.state["m.u"]["provenance"]["a"].split(":")[1] == "r.x"


def test_pid_by_hand():
    knob = _knob("pid", gain=0.5, ki=0.1, kd=0.2)
    #  2 + .5 * 1 + .1 * 1;  + .5 * 2 + .1 * 3 + .2 * 1;  + .5 * .5 + .1 * 3.5 - .2 * 1.5;  nothing;  at the bound
    expected = [2.6, 4.1, 4.4, 4.4]
    after = _rounds(knob, _x(1.0), _x(2.0), _x(0.5), _x(0.0))
    assert [one.knobs["m.u"] for one in after] == pytest.approx(expected)
    assert after[-1].state == after[-2].state == {"m.u": {"integral": 3.5, "last": 0.5}}
    assert _values(_knob("pid", kd=9.0), _x(5.0), _x(0.1)) == [4.5, 4.5]  # a falling deficit takes nothing back
    assert _values(_knob("pid", direction="down"), _x(1.0)) == [1.5]
    stuck = _rounds(_knob("pid", ki=1.0), *[_x(5.0)] * 4)
    assert [one.state["m.u"]["integral"] for one in stuck] == [5.0, 10.0, 10.0, 10.0]  # no wind-up at the bound


@pytest.mark.parametrize(
    ("rule", "changed", "value"),
    [
        ("mult", {"slack": 1.0}, 2.0 / 1.5),
        ("mult", {"max_ratio": 1.25}, 1.6),
        ("mult", {"direction": "down"}, 3.0),
        ("mult", {"bounds": [1.9, 10.0]}, 1.9),
        ("backoff", {"slack": 2.0}, 4.0),
        ("backoff", {"direction": "up"}, 1.0),
        ("pid", {"gain": 0.25}, 1.75),
    ],
)
def test_relaxing_takes_patience_and_slack(rule, changed, value):
    wide, narrow = _x(0.0, low=1.0 + changed.get("slack", 1.0)), _x(0.0, low=1.9)
    assert _values(_knob(rule, **changed), *[wide] * 5) == [2.0] * 5  # not unless it is asked for
    knob = _knob(rule, relax=True, patience=3, **changed)
    assert _values(knob, narrow, wide, wide, narrow, wide, wide)[-1] == 2.0  # the row was broken
    after = _rounds(knob, wide, wide, wide, wide)
    assert [one.knobs["m.u"] for one in after] == pytest.approx([2.0, 2.0, value, value])
    assert [one.state for one in after] == [{"m.u": {"calm": 1}}, {"m.u": {"calm": 2}}, {}, {"m.u": {"calm": 1}}]
    assert "calm" not in _rounds(knob, wide, wide, _x(1.0))[-1].state.get("m.u", {})


def test_kl_adapt_relaxes_by_the_lower_half_of_its_formula():
    knob = _knob("kl_adapt", relax=True, patience=1, slack=0.05)
    assert _values(knob, _kl(0.0, 0.85, high=0.9)) == [pytest.approx(2.0 * (1 - 0.1 * 0.15))]
    assert _values(knob, _kl(0.0, 0.1, high=0.9)) == [pytest.approx(2.0 * 0.98)]


def test_all_driving_figures_must_pass_with_slack():
    knob = _knob("mult", driven_by=["r.x", "r.y"], relax=True, patience=1)
    wide = finding("r.x", 0.0, low=5.0)
    assert _values(knob, [wide, finding("r.y", 0.0, low=1.5)]) == [2.0]
    assert _values(knob, [wide, finding("r.y", 0.0, low=5.0)]) == [pytest.approx(2.0 / 1.5)]


@pytest.mark.parametrize(
    ("rule", "changed", "message"),
    [
        ("mult", {"rule": "mul"}, "unknown rule 'mul'; did you mean 'mult'"),
        ("mult", {"rule": "zzz"}, "unknown rule 'zzz'; choose one of mult, backoff"),
        ("mult", {"path": "model.class_path"}, "path must be the dotted name of a plain value"),
        ("mult", {"path": "model.${oc.env:HOME}"}, "path must be the dotted name"),
        ("mult", {"bounds": [1.0, 0.0]}, r"bounds \[1, 0\] are empty: swap"),
        ("mult", {"bounds": [0.0, math.inf]}, "bounds must be two numbers"),
        ("mult", {"bounds": None}, "rule mult needs bounds"),
        ("mult", {"bounds": [-1.0, 1.0]}, "takes values of at least 0"),
        ("mult", {"start": 11.0}, "start 11 lies outside the bounds"),
        ("mult", {"start": True}, "start must be a finite number"),
        ("mult", {"start": [1.0]}, r"start must be a finite number, got \[1.0\]"),
        ("mult", {"start": 0.0}, "give `first`"),
        ("mult", {"first": 11.0}, "first .* lies above the upper bound"),
        ("mult", {"gain": -1.0}, "gain must be a number of at least 0.*see direction"),
        ("mult", {"gain": math.nan}, "gain must be"),
        ("mult", {"max_ratio": 1.0}, "max_ratio must be above 1"),
        ("mult", {"direction": "both"}, "direction must be up or down"),
        ("mult", {"driven_by": []}, "driven_by must name at least one figure"),
        ("mult", {"driven_by": ["x"]}, "'x' is no figure's name"),
        ("mult", {"driven_by": ["i.lens_kl"]}, "i.lens_kl is an interpretability figure.*allow_interpretability: true"),
        ("mult", {"conditions": ["a"]}, "conditions are for the rules"),
        ("mult", {"items": ["a"]}, "items and rule enqueue belong together"),
        ("mult", {"relax": True, "patience": 0}, "patience at least 1"),
        ("widen", {"relax": True}, "a widen knob never goes back"),
        ("widen", {"start": [6.0, 4.0]}, "must be ordered and within the bounds"),
        ("widen", {"conditions": {"left": "a"}}, "must read {low: condition, high: condition}"),
        ("widen", {"driven_by": ["r.x", "r.y"]}, "reads one figure"),
        ("kl_adapt", {"direction": "down"}, "leave direction out"),
        ("kl_adapt", {"target": 0.0}, "target must be above 0"),
        ("enqueue", {"items": []}, "items and rule enqueue belong together"),
        ("enqueue", {"start": {"held_out": 0.0}}, "'held_out', which is not among its items"),
        ("exp_weights", {"start": {"a": 1.0, "b": 1.0}}, "the weights' sum is 2"),
        ("exp_weights", {"start": {"a": 1.5, "b": -0.5}}, "weights of at least 0"),
        ("exp_weights", {"start": {}}, "weights of at least 0"),
        ("exp_weights", {"start": [0.5, 0.5]}, "give conditions: a list of 2"),
        ("exp_weights", {"conditions": {"c": "x"}}, "no weight is named 'c'; they are a, b"),
        ("exp_weights", {"conditions": ["a", "b"]}, "the weights have names"),
        ("exp_weights", {"floor": 0.6}, "2 weights of at least 0.6 exceed 1"),
        ("exp_weights", {"bounds": [0.0, 0.5]}, "no upper bound of their own"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(rule, changed, message):
    with pytest.raises(AssuranceError, match=message) as caught:
        _knob(rule, **changed)
    assert str(caught.value).startswith("knob ")
    assert "\n" not in str(caught.value)


def test_interpretability_drives_only_by_name():
    assert _values(
        _knob("mult", driven_by=["i.lens_kl"], allow_interpretability=True), [finding("i.lens_kl", 1.0)]
    ) == [3.0]


def test_knobs_come_from_a_config():
    parser = ArgumentParser()
    parser.add_argument("--knobs", type=list[Knob])
    text = [
        "{path: m.a, rule: mult, driven_by: [r.x], bounds: [0, 1], start: 0, first: 0.1}",
        "{path: m.b, rule: exp_weights, driven_by: [r.x], start: {p: 0.5, q: 0.5}, conditions: {p: x}}",
        "{path: m.c, rule: exp_weights, driven_by: [r.x], start: [0.5, 0.5], conditions: [x, y]}",
        "{path: m.d, rule: widen, driven_by: [r.x], bounds: [0, 9], start: [1, 2], direction: both}",
        "{path: m.e, rule: enqueue, driven_by: [r.x], items: [p, q]}",
    ]
    knobs = parser.instantiate_classes(parser.parse_args([f"--knobs=[{', '.join(text)}]"])).knobs
    assert first_objectives(knobs).knobs == {
        "m.a": 0.0, "m.b": {"p": 0.5, "q": 0.5}, "m.c": [0.5, 0.5], "m.d": [1.0, 2.0], "m.e": {},
    }  # fmt: skip
    assert {knob.rule: knob.step for knob in knobs} == {
        rule: GAINS[rule] for rule in ("mult", "exp_weights", "widen", "enqueue")
    }
