"""Limits, Holm's correction, looks: uncertain and undefined are never a pass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modules.assurance.figures import Measure, Sample, column, missing
from modules.assurance.subject import AssuranceError
from modules.assurance.verdict import Limit, check_limits, deficit, holm, judge, overall

UP = Measure("u.share", "share", "up", "proportion")
DOWN = Measure("c.broken", "violations", "down", "proportion")
EXACT = Measure("c.whole", "whole", "up", "exact")


def _ruling(measure, fresh, anchor, limit, looks=1, others=()):
    samples = {(measure.name, "fresh"): Sample(measure, column(fresh))}
    if anchor is not None:
        samples[measure.name, "anchor"] = Sample(measure, column(anchor))
    for name, p_like in others:
        extra = Measure(name, name, "up", "proportion")
        samples[name, "fresh"] = Sample(extra, column(p_like))
    figures = {key: sample.figure(key[1]) for key, sample in samples.items()}
    limits = [limit, *(Limit(name, 0.8) for name, _ in others)]
    return judge(limits, samples, figures, looks=looks)[0]


def _hits(successes, total):
    return [1.0] * successes + [0.0] * (total - successes)


@pytest.mark.parametrize(
    ("fresh", "anchor", "ruling"),
    [
        (_hits(99, 100), _hits(50, 50), "pass"),
        (_hits(60, 100), _hits(50, 50), "fail"),
        (_hits(84, 100), _hits(50, 50), "uncertain"),
        (_hits(99, 100), _hits(41, 50), "uncertain"),  # the anchor split must hold too
        (_hits(99, 100), _hits(20, 50), "fail"),
    ],
)
def test_a_gate_needs_both_splits(fresh, anchor, ruling):
    assert _ruling(UP, fresh, anchor, Limit("u.share", 0.8)).ruling == ruling


def test_less_is_better_mirrors():
    assert _ruling(DOWN, _hits(0, 300), _hits(0, 300), Limit("c.broken", 0.02)).ruling == "pass"
    assert _ruling(DOWN, _hits(90, 300), _hits(90, 300), Limit("c.broken", 0.02)).ruling == "fail"
    few = _ruling(DOWN, _hits(0, 50), _hits(0, 50), Limit("c.broken", 0.02))
    assert few.ruling == "uncertain"  # no violation among 50 says only: less than 7 %
    assert few.deficit == pytest.approx(1 - 0.025 ** (1 / 50) - 0.02)


def test_repeated_looks_are_paid_for():
    fresh, anchor = _hits(89, 100), _hits(89, 100)
    assert _ruling(UP, fresh, anchor, Limit("u.share", 0.8)).ruling == "pass"
    looked = _ruling(UP, fresh, anchor, Limit("u.share", 0.8), looks=5)
    assert (looked.raw, looked.ruling) == ("pass", "uncertain")


def test_other_gates_are_paid_for():
    alone = _ruling(UP, _hits(89, 100), None, Limit("u.share", 0.8))
    crowd = [(f"u.other_{i}", _hits(89, 100)) for i in range(4)]
    among = _ruling(UP, _hits(89, 100), None, Limit("u.share", 0.8), others=crowd)
    assert (alone.ruling, among.raw, among.ruling) == ("pass", "pass", "uncertain")


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_exact_figures_pass_at_the_threshold_and_fail_below_it():
    assert _ruling(EXACT, [1.0], None, Limit("c.whole", 1.0)).ruling == "pass"
    assert _ruling(EXACT, [0.5], None, Limit("c.whole", 1.0)).ruling == "fail"


def test_an_undefined_figure_never_passes():
    figures = {("u.share", "fresh"): missing(UP, "fresh", "undefined", "denominator is 0")}
    judged = judge([Limit("u.share", 0.0)], {}, figures)
    assert (judged[0].ruling, judged[0].deficit, judged[0].reason) == ("undefined", None, "denominator is 0")
    assert overall(judged) == "inconclusive"
    assert overall(judge([Limit("u.share", 0.0, optional=True)], {}, figures)) == "inconclusive"


def test_overall():
    def one(kind, successes):
        return _ruling(UP, _hits(successes, 100), None, Limit("u.share", 0.8, kind=kind))

    assert overall([]) == "unjudged"
    assert overall([one("watch", 10)]) == "unjudged"
    assert overall([one("gate", 99), one("watch", 10)]) == "pass"
    assert overall([one("gate", 99), one("gate", 84)]) == "inconclusive"
    assert overall([one("gate", 84), one("gate", 10)]) == "fail"


def test_deficit_is_measured_from_the_pessimistic_end():
    sample = Sample(UP, column(_hits(84, 100)))
    limit = Limit("u.share", 0.8, scale=0.1)
    assert deficit(sample.figure("fresh"), limit) == pytest.approx((0.8 - sample.interval()[0]) / 0.1)
    assert deficit(Sample(UP, column(_hits(100, 100))).figure("fresh"), limit) == 0.0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ([Limit("r.worst_retrun", 1.0)], r"unknown figure 'r\.worst_retrun'; nearest: r\.worst_return"),
        ([Limit("u.share", 1.0), Limit("u.share", 0.5)], "stands twice"),
        ([Limit("r.nashconv", 0.1)], "r.nashconv: it needs best_response.*the teams module offers u.share"),
        ([Limit("r.elsewhere", 0.1)], "the suite does not measure it"),
    ],
)
def test_limits_that_do_not_fit_are_refused(limits, message):
    known = ["u.share", "r.worst_return", "r.nashconv", "r.elsewhere"]
    offered = {"u.share": "", "r.nashconv": "it needs best_response"}
    with pytest.raises(AssuranceError, match=message):
        check_limits(limits, known, offered, "teams")


@pytest.mark.parametrize("wrong", [{"tau": math.nan}, {"tau": 1.0, "scale": 0.0}, {"tau": 1.0, "kind": "gates"}])
def test_malformed_limits_are_refused(wrong):
    with pytest.raises(AssuranceError, match=r"limit on u\.share"):
        Limit("u.share", **wrong)


@pytest.mark.parametrize(
    ("measure", "values", "message"),
    [
        (UP, [[0.5]], "must be 0 or 1"),
        (UP, [[math.nan]], "NaN or infinite"),
        (EXACT, [[1.0], [1.0]], "one value"),
        (UP, np.zeros((0, 1)), "not empty"),
    ],
)
def test_values_that_are_none_are_refused(measure, values, message):
    with pytest.raises(ValueError, match=message):
        Sample(measure, np.asarray(values))
