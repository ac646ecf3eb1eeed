"""The search for thresholds within a run: when a vertex is scored, and what its cache takes for known."""

from __future__ import annotations

import pytest
import torch

from modules.rlhf.multipliers import Multipliers
from modules.rlhf.search import ThresholdSearch
from modules.rlhf.settings import ConstraintSpec, NelderMeadSpec, Problem

RANGES = {"a": ConstraintSpec(init=0.085, max=0.11), "b": ConstraintSpec(init=0.40, max=0.50)}


def _search(**options) -> tuple[ThresholdSearch, Multipliers]:
    problem = Problem("kl", ("a", "b"), ("eq", "eq"), (0.1, 0.45), search=True)
    search = ThresholdSearch(NelderMeadSpec(**options), problem, RANGES)
    multipliers = Multipliers(["a", "b"], ["eq", "eq"], [0.1, 0.45])
    search.begin(multipliers)
    return search, multipliers


def test_a_vertex_is_scored_when_reached_or_when_patience_is_over():
    search, multipliers = _search(patience=3)
    first = multipliers.thresholds.clone()
    far = torch.zeros(2, dtype=torch.float64)
    search.observe(far, 0.5, multipliers)
    search.observe(far, 0.5, multipliers)
    assert search.simplex_method.evaluations == 0
    assert multipliers.thresholds.equal(first)
    search.observe(far, 0.5, multipliers)
    assert (search.simplex_method.evaluations, search.reached) == (1, 0)
    assert not multipliers.thresholds.equal(first)
    search.observe(multipliers.thresholds * 1.04, 0.6, multipliers)  # within 5 per cent
    assert (search.simplex_method.evaluations, search.reached) == (2, 1)


@pytest.mark.parametrize(("tolerance", "longer"), [(5e-3, False), (2e-4, True)])
def test_a_fine_cache_searches_narrow_ranges(tolerance, longer):
    search, multipliers = _search(patience=1, std_tolerance=1e-4, cache_tolerance=tolerance)
    for _ in range(60):
        theta = multipliers.thresholds
        score = -float((theta[0] - 0.1).square() * 1e3 + (theta[1] - 0.46).square() * 10)
        search.observe(torch.zeros(2, dtype=torch.float64), score, multipliers)
    assert (search.simplex_method.evaluations > 15) == longer


def test_state_goes_with_the_state_dict():
    search, multipliers = _search(patience=2)
    for number in range(5):
        search.observe(torch.zeros(2, dtype=torch.float64), 0.1 * number, multipliers)
    other, others = _search(patience=2)
    other.load_state_dict(search.state_dict())
    others.load_state_dict(multipliers.state_dict())
    for number in range(6):
        for one, mine in ((search, multipliers), (other, others)):
            one.observe(torch.zeros(2, dtype=torch.float64), 0.3 - 0.05 * number, mine)
        assert multipliers.thresholds.equal(others.thresholds)
        assert search.figures() == other.figures()


def test_a_score_that_is_no_number_is_refused():
    search, multipliers = _search()
    with pytest.raises(ValueError, match="the evaluation score is nan"):
        search.observe(torch.zeros(2, dtype=torch.float64), float("nan"), multipliers)
