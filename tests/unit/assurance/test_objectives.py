"""What a report makes of the objectives (oracle group 9 of the method's sheet).

Nothing where all pass, the same for the same, the same in any order, within bounds, more for more, and never a pass for
what is undefined.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from assurance_findings import finding, report
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.assurance.canonical import canonical_bytes, digest
from modules.assurance.figures import Measure, Sample
from modules.assurance.knobs import Knob
from modules.assurance.objectives import (
    ARMS,
    check_knobs,
    first_objectives,
    random_moves,
    to_layer,
    unchanged,
    update,
)
from modules.assurance.subject import AssuranceError
from modules.assurance.verdict import Limit, judge

SHA = "a" * 64
PARTS = {"a": 0.25, "b": 0.25, "c": 0.5}
KNOBS = [
    Knob("m.mult", "mult", ["r.x"], [0.0, 4.0], start=0.5, first=0.1),
    Knob("m.fall", "mult", ["r.x", "c.y"], [0.0, 4.0], start=3.0, direction="down"),
    Knob("m.backoff", "backoff", ["c.y"], [-2.0, 2.0], start=1.0),
    Knob("m.beta", "kl_adapt", ["c.y"], [0.0, 10.0], start=1.0, first=0.01),
    Knob("d.mixture", "exp_weights", ["r.x"], start=PARTS, gain=2.0),
    Knob("d.range", "widen", ["r.x"], [0.0, 10.0], start=[4.0, 5.0], conditions={"low": "a", "high": "b"}),
    Knob("d.pool", "enqueue", ["r.x"], items=["a", "c"]),
    Knob("m.pid", "pid", ["r.x", "c.y"], [0.0, 5.0], start=0.0, gain=0.2, ki=0.1, kd=0.3),
]
X = st.tuples(st.floats(0, 1e6), st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
Y = st.tuples(st.floats(0, 1e6), st.floats(0, 50))


def _report(x, y):
    return report(
        finding("r.x", x[0], conditions={"a": x[1], "b": x[2], "c": x[3]}),
        finding("c.y", y[0], direction="down", value=y[1]),
    )


PASSING = report(
    finding("r.x", 0.0, value=9.0, low=8.0, conditions={"a": -9.0, "b": 9.0, "c": 9.0}),
    finding("c.y", 0.0, direction="down", value=0.1, high=0.2),
)


def test_where_all_pass_only_round_and_parent_change():
    start = first_objectives(KNOBS, limits=[Limit("r.x", 1.0)], seeds={"root": 3})
    moved = update(start, _report((2.0, 0.1, 0.2, 0.3), (1.0, 3.0)), KNOBS, SHA)
    for before in (start, moved):
        after = update(before, PASSING, KNOBS, "b" * 64)
        assert canonical_bytes({**asdict(after), "round": before.round, "parent": before.parent}) == canonical_bytes(
            asdict(before)
        )
        assert (after.round, after.parent) == (before.round + 1, "b" * 64)
        assert to_layer(after).split("\n", 1)[1] == to_layer(before).split("\n", 1)[1]


@settings(deadline=None, max_examples=100)
@given(x=X, y=Y)
def test_update_is_pure_and_a_report_counts_once(x, y):
    start, found = first_objectives(KNOBS), _report(x, y)
    kept, shown = copy.deepcopy(start), copy.deepcopy(found)
    after = update(start, found, KNOBS)
    assert update(start, found, KNOBS) == after
    assert (start, found) == (kept, shown)
    assert after.parent == digest(found)
    assert update(after, found, KNOBS) == after
    assert update(after, found, KNOBS, after.parent) is after


@settings(deadline=None, max_examples=100)
@given(x=X, y=Y, seed=st.integers(0, 2**31))
def test_order_of_figures_and_knobs_is_nothing(x, y, seed):
    shuffle = np.random.default_rng(seed).permutation
    found = _report(x, y)
    mixed = {part: [entries[index] for index in shuffle(len(entries))] for part, entries in found.items()}
    for entry in mixed["figures"]:
        entry["conditions"] = dict(reversed(entry["conditions"].items()))
    knobs = [KNOBS[index] for index in shuffle(len(KNOBS))]
    knobs = [replace(knob, driven_by=knob.driven_by[::-1]) for knob in knobs]
    one = update(first_objectives(KNOBS), found, KNOBS, SHA)
    assert canonical_bytes(asdict(update(first_objectives(knobs), mixed, knobs, SHA))) == canonical_bytes(asdict(one))


def _within(objectives):
    for knob in KNOBS:
        value = objectives.knobs[knob.path]
        assert knob.check(value) == value  # refuses what is out of bounds, NaN, or no weights
    assert min(objectives.knobs["d.mixture"].values()) >= 0.02
    assert set(objectives.knobs["d.pool"]) <= {"a", "c"}


@settings(deadline=None, max_examples=100)
@given(rounds=st.lists(st.tuples(X, Y), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_bounds_hold_round_after_round(rounds, seed):
    found = drawn = first_objectives(KNOBS)
    for number, (x, y) in enumerate(rounds):
        found = update(found, _report(x, y), KNOBS, f"{number:064x}")
        drawn = random_moves(drawn, KNOBS, seed, f"{number:064x}")
        _within(found)
        _within(drawn)
    assert found.round == drawn.round == len(rounds)


def _size(before, after):
    """How far each knob went, as a vector."""
    sizes = [abs(after[path] - before[path]) for path in ("m.mult", "m.fall", "m.backoff", "m.beta", "m.pid")]
    sizes.append(sum(abs(after["d.mixture"][name] - share) for name, share in before["d.mixture"].items()))
    sizes += [abs(new - old) for new, old in zip(after["d.range"], before["d.range"], strict=True)]
    return np.array([*sizes, len(after["d.pool"])])


@settings(deadline=None, max_examples=300)
@given(x=X, y=Y, more_x=st.floats(0, 100), more_y=st.floats(0, 100))
def test_a_larger_deficit_never_gives_a_smaller_move(x, y, more_x, more_y):
    start = first_objectives(KNOBS)
    small = update(start, _report(x, y), KNOBS, SHA)
    large = update(start, _report((x[0] + more_x, *x[1:]), (y[0] + more_y, y[1])), KNOBS, SHA)
    assert (_size(start.knobs, large.knobs) >= _size(start.knobs, small.knobs)).all()


def test_anchor_figures_and_rulings_change_nothing():
    found = _report((2.0, 0.1, 0.2, 0.3), (1.0, 3.0))
    other = copy.deepcopy(found)
    for entry in other["figures"]:
        if entry["split"] == "anchor":
            entry |= {"value": -77.0, "low": -80.0, "high": -70.0, "conditions": {"a": 1e9, "c": -1e9}}
    for entry in other["judgements"]:
        entry |= {"ruling": "pass", "raw": "pass"}
    assert update(first_objectives(KNOBS), other, KNOBS, SHA) == update(first_objectives(KNOBS), found, KNOBS, SHA)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("field", ["deficit", "value", "low"])
def test_an_undefined_figure_is_an_error_or_skipped_but_never_a_pass(field, value):
    knob = Knob("m.u", "mult", ["r.x"], [0.0, 4.0], start=1.0, relax=True, patience=2)
    found = report(finding("r.x", 0.0, value=9.0, low=8.0))
    calm = update(first_objectives([knob]), found, [knob], SHA)
    assert calm.state["m.u"] == {"calm": 1}
    broken = copy.deepcopy(found)
    entry = broken["judgements"][0] if field == "deficit" else broken["figures"][0]
    entry[field] = value
    with pytest.raises(
        AssuranceError, match=r"knob m.u: its driving figure r.x is undefined \(it holds .*\).*skip: true"
    ):
        update(calm, broken, [knob], "b" * 64)
    skipping = replace(knob, skip=True)
    after = update(calm, broken, [skipping], "b" * 64)
    assert after.knobs == calm.knobs
    assert after.state == {}  # it ends the row of passed rounds


def test_a_figure_that_does_not_apply_says_why():
    found = report(finding("r.x", None, status="not_applicable", reason="needs\nlogits", value=None, low=None))
    with pytest.raises(AssuranceError, match=r"r.x is undefined \(needs logits\)"):
        update(first_objectives(KNOBS[:1]), found, KNOBS[:1])


def test_skipping_one_of_two_figures_leaves_the_other_in_charge():
    knob = Knob("m.u", "mult", ["r.x", "r.y"], [0.0, 4.0], start=1.0, skip=True, relax=True, patience=1)
    undefined = finding("r.y", None, status="undefined", value=None, low=None)
    short = update(first_objectives([knob]), report(finding("r.x", 1.0), undefined), [knob])
    assert short.knobs == {"m.u": 1.5}
    passed = update(first_objectives([knob]), report(finding("r.x", 0.0, low=99.0), undefined), [knob])
    assert passed.knobs == {"m.u": 1.0}  # half a pass relaxes nothing


def test_only_named_figures_drive():
    found = report(finding("r.x", 0.0, low=9.0), finding("u.other", 50.0))
    assert update(first_objectives(KNOBS[:1]), found, KNOBS[:1]).knobs == {"m.mult": 0.5}
    with pytest.raises(AssuranceError, match="no limit on its driving figure r.x: set one; the nearest .*: r.xx"):
        update(first_objectives(KNOBS[:1]), report(finding("r.xx", 0.0)), KNOBS[:1])
    with pytest.raises(AssuranceError, match="judgements hold the figure r.x twice"):
        update(first_objectives(KNOBS[:1]), report(finding("r.x", 0.0), finding("r.x", 0.0)), KNOBS[:1])


def test_deficits_of_a_real_judgement_drive():
    """Through the estimators and the judge: 60 of 100 against 0.9."""
    measure = Measure("r.x", "share", "up", "proportion")
    sample = Sample(measure, np.array([1.0] * 60 + [0.0] * 40)[:, None])
    limit = Limit("r.x", 0.9, scale=0.1)
    figure = sample.figure("fresh")
    judged = judge([limit], {("r.x", "fresh"): sample}, {("r.x", "fresh"): figure})[0]
    entry = {**asdict(judged), **asdict(limit), "figure": "r.x", "direction": figure.direction}
    knob = Knob("m.u", "mult", ["r.x"], [0.0, 9.0], start=1.0)
    after = update(first_objectives([knob]), {"figures": [asdict(figure)], "judgements": [entry]}, [knob], SHA)
    assert after.knobs["m.u"] == pytest.approx(1 + 0.5 * (0.9 - 0.497206) / 0.1, abs=1e-4)  # Clopper-Pearson's low end


def test_random_moves_are_seeded_by_knob_and_leave_the_memory_alone():
    start = update(first_objectives(KNOBS), _report((2.0, 0.1, 0.2, 0.3), (1.0, 3.0)), KNOBS, SHA)
    first, second = (random_moves(start, KNOBS, seed, "b" * 64) for seed in (1, 2))
    assert random_moves(start, KNOBS[::-1], 1, "b" * 64) == first
    assert first.knobs != second.knobs
    assert first.state == start.state
    assert random_moves(first, KNOBS, 1, "b" * 64) is first


def test_random_moves_keep_to_the_rules_budget():
    knobs = [
        Knob("m.capped", "mult", ["r.x"], [0.0, 99.0], start=1.0, max_ratio=1.5),
        Knob("m.free", "mult", ["r.x"], [0.0, 99.0], start=1.0, gain=0.2),
        Knob("m.zero", "mult", ["r.x"], [0.0, 99.0], start=0.0, first=0.1),
        Knob("m.range", "widen", ["r.x"], [-9.0, 9.0], start=[0.0, 1.0], max_ratio=1.25),
        Knob("m.beta", "kl_adapt", ["c.y"], [0.0, 99.0], start=1.0),
    ]
    drawn = [random_moves(first_objectives(knobs), knobs, seed).knobs for seed in range(300)]
    for path, low, high in (
        ("m.capped", 1 / 1.5, 1.5),
        ("m.free", 1 / 1.2, 1.2),
        ("m.zero", 0.0, 0.1),
        ("m.beta", 0.98, 1.02),
    ):
        values = [one[path] for one in drawn]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    ends = np.array([one["m.range"] for one in drawn])
    assert np.abs(ends - [0.0, 1.0]).max() <= 0.25
    assert np.abs(ends - [0.0, 1.0]).max() > 0.24


def test_fixed_changes_round_and_parent_alone():
    start = first_objectives(KNOBS)
    assert unchanged(start, SHA) == replace(start, round=1, parent=SHA)
    assert unchanged(unchanged(start, SHA), SHA) == unchanged(start, SHA)
    assert ARMS == ("findings", "fixed", "random")


CONFIG = {
    "model": {
        "class_path": "a.B",
        "init_args": {"eps": 0.0, "objective": {"class_path": "a.C", "init_args": {"eta": 9.0}}},
    },
    "data": {"init_args": {"mixture": {"easy": 0.5, "hard": 0.5}, "range": [1.0, 2.0], "name": "x"}},
}


def _eps(**changed):
    return Knob(
        **(
            {"path": "model.init_args.eps", "rule": "mult", "driven_by": ["r.x"], "bounds": [0.0, 1.0], "first": 0.1}
            | changed
        )
    )


def test_knobs_that_fit_take_their_start_from_the_config():
    knobs = [
        _eps(),
        Knob("data.init_args.mixture", "exp_weights", ["r.x"]),
        Knob("data.init_args.range", "widen", ["r.x"], [0.0, 4.0]),
    ]
    check_knobs(knobs, CONFIG, ["r.x", "u.y"])
    assert first_objectives(knobs, CONFIG).knobs == {
        "model.init_args.eps": 0.0,
        "data.init_args.mixture": {"easy": 0.5, "hard": 0.5},
        "data.init_args.range": [1.0, 2.0],
    }
    with pytest.raises(AssuranceError, match="knob model.init_args.eps: no start"):
        first_objectives(knobs[:1])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ([_eps(path="model.init_args.epz")], "no such key; did you mean 'model.init_args.eps'"),
        ([_eps(path="data.init_args.mixtur")], "did you mean 'data.init_args.mixture'"),
        ([_eps(path="model.init_args.objective")], "holds an object there"),
        ([_eps(path="model.init_args.objective.init_args.eta")], "the config's value 9 lies outside the bounds"),
        ([_eps(path="data.init_args.name")], "the config's value must be a finite number, got x"),
        ([_eps(first=0.0)], "which no factor moves: give `first`"),
        ([_eps(driven_by=["r.xy"])], "'r.xy', on which there is no limit; nearest: r.x"),
        ([_eps(), _eps()], "stands twice"),
        ([_eps(path="data.init_args.mixture"), _eps(path="data.init_args.mixture.easy")], "lies within knob"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_in_one_line(knobs, message):
    with pytest.raises(AssuranceError, match=message) as caught:
        check_knobs(knobs, CONFIG, ["r.x", "u.usefulness"])
    assert "\n" not in str(caught.value)


def test_objectives_and_knobs_must_belong_together():
    start = first_objectives(KNOBS[:1])
    with pytest.raises(AssuranceError, match="knob m.fall: the objectives have no value for it"):
        update(start, PASSING, KNOBS[:2])
    with pytest.raises(AssuranceError, match="knob m.mult: the objectives hold it, but it has no rule"):
        random_moves(start, [], 1)
    with pytest.raises(AssuranceError, match="knob m.mult: value 7 lies outside the bounds"):
        update(replace(start, knobs={"m.mult": 7.0}), PASSING, KNOBS[:1])
