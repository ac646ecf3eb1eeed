from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from modules.rlhf.nelder_mead import NelderMead, random_simplex

FIRST = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
SKEWED = [[0.2, 0.1], [0.9, 0.3], [0.4, 0.8]]


def bowl(point: Tensor) -> float:
    x, y = point.tolist()
    return (x - 0.3) ** 2 + 2 * (y - 0.55) ** 2 + 0.3 * x * y


def ripple(point: Tensor) -> float:
    """Many local minima: simplices expand, contract and shrink."""
    return bowl(point) + float((37 * point).sin().sum() + (61 * point[0] * point[1]).cos())


def search_from(first: list[list[float]] | Tensor = FIRST, **options) -> NelderMead:
    return NelderMead(first, **{"tolerance": 0.0, "cache_tolerance": -1.0, **options})


def play(search: NelderMead, function, count: int) -> list[list[float]]:
    asked = []
    for _ in range(count):
        asked.append(search.ask().tolist())
        search.tell(function(search.ask()))
    return asked


# Told values are chosen, so that each rule can be followed on paper: best (0, 0), worst (0, 1), centroid (1/2, 0).
@pytest.mark.parametrize(
    ("told", "phases", "asked", "last"),
    [
        ([1.5], ["reflect", "reflect"], [(1.0, -1.0)], (1.0, -1.0)),
        ([0.5, 0.2], ["reflect", "expand", "reflect"], [(1.0, -1.0), (1.5, -2.0)], (1.5, -2.0)),
        ([0.5, 0.5], ["reflect", "expand", "reflect"], [(1.0, -1.0), (1.5, -2.0)], (1.0, -1.0)),
        ([2.5, 2.5], ["reflect", "outside", "reflect"], [(1.0, -1.0), (0.75, -0.5)], (0.75, -0.5)),
        ([3.5, 2.9], ["reflect", "inside", "reflect"], [(1.0, -1.0), (0.25, 0.5)], (0.25, 0.5)),
        ([3.5, 3.0], ["reflect", "inside", "shrink"], [(1.0, -1.0), (0.25, 0.5)], None),
        ([2.5, 2.6], ["reflect", "outside", "shrink"], [(1.0, -1.0), (0.75, -0.5)], None),
    ],
    ids=["reflect", "expand", "expand-no-better", "outside", "inside", "shrink-inside", "shrink-outside"],
)
def test_moves_by_hand(told, phases, asked, last):
    search = search_from()
    for value in (1.0, 2.0, 3.0):
        assert search.phase == "initial"
        search.tell(value)
    seen, points = [search.phase], []
    for value in told:
        points.append(tuple(search.ask().tolist()))
        search.tell(value)
        seen.append(search.phase)
    assert seen == phases
    assert points == asked
    if last is None:
        assert search.simplex.tolist() == [[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]]
        assert search.ask().tolist() == [0.5, 0.0]
    else:
        assert list(last) in search.simplex.tolist()
        assert search.iterations == 1


def test_inside_mode_never_contracts_outside():
    search = search_from(contraction="inside")
    for value in (1.0, 2.0, 3.0, 2.5):
        search.tell(value)
    assert search.phase == "inside"
    assert search.ask().tolist() == [0.25, 0.5]
    search.tell(2.9)  # better than the worst is enough, worse than the reflected point or not
    assert search.phase == "reflect"


@pytest.mark.parametrize("function", [bowl, ripple])
@pytest.mark.parametrize("options", [{}, {"cache_tolerance": 5e-3, "cache_ttl": 9}], ids=["plain", "cached"])
def test_resuming_at_every_point_gives_the_same_sequence(function, options):
    count = 40
    whole = search_from(SKEWED, **options)
    asked = play(whole, function, count)
    phases = set()
    for stop in range(count):
        search = search_from(SKEWED, **options)
        play(search, function, stop)
        phases.add(search.phase)
        file = io.BytesIO()
        torch.save(search.state_dict(), file)
        file.seek(0)
        resumed = search_from(SKEWED, **options)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert play(resumed, function, count - stop) == asked[stop:]
        assert resumed.best[0].tolist() == whole.best[0].tolist()
        assert resumed.evaluations == count
    if function is ripple and not options:
        assert phases >= {"initial", "reflect", "inside", "shrink"}


def test_a_state_is_a_copy():
    search = search_from()
    play(search, bowl, 5)
    state = search.state_dict()
    before = state["simplex"].clone()
    play(search, bowl, 5)
    assert torch.equal(state["simplex"], before)


def test_a_remembered_value_is_not_asked_for_again():
    wide = 10.0  # every later point is near a told one
    search = search_from(cache_tolerance=wide)
    play(search, bowl, 1)
    assert search.phase != "initial"  # the other two vertices were answered from memory
    assert search.evaluations == 1
    exact = search_from(cache_tolerance=5e-3)
    asked = play(exact, ripple, 30)
    distances = torch.cdist(torch.tensor(asked), torch.tensor(asked), p=math.inf).fill_diagonal_(1.0)
    assert float(distances.min()) > 5e-3 or exact.converged
    assert exact.evaluations == 30


def test_old_values_are_forgotten():
    def second_evaluation(ttl: int | None) -> str:
        search = search_from([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], cache_tolerance=5e-3, cache_ttl=ttl)
        search.tell(1.0)
        search.tell(2.0)
        return search.phase

    assert second_evaluation(None) == "reflect"  # the third vertex is the first one
    assert second_evaluation(2) == "reflect"
    assert second_evaluation(1) == "initial"


def test_points_stay_within_bounds():
    search = search_from(bounds=[(0.1, 0.9), (0.0, 0.5)])
    asked = torch.tensor(play(search, lambda point: -float(point.sum()), 40), dtype=torch.float64)
    assert (asked[:, 0] >= 0.1).all()
    assert (asked[:, 0] <= 0.9).all()
    assert (asked[:, 1] <= 0.5).all()
    assert search.best[0].tolist() == pytest.approx([0.9, 0.5])


def test_convergence_is_the_deviation_of_known_values():
    search = search_from(tolerance=0.01)
    for value in (1.0, 1.001):
        search.tell(value)
        assert not search.converged
    search.tell(1.002)
    assert search.converged
    assert search.best[1] == 1.0
    assert search.best[0].tolist() == [0.0, 0.0]


def test_a_search_with_a_cache_finds_the_minimum():
    search = NelderMead(FIRST, tolerance=1e-4)
    while not search.converged and search.evaluations < 100:
        search.tell(bowl(search.ask()))
    exact = search_from(tolerance=1e-12)
    while not exact.converged:
        exact.tell(bowl(exact.ask()))
    assert search.best[1] == pytest.approx(exact.best[1], abs=1e-3)
    assert search.evaluations < 60


def test_first_simplices_are_within_their_ranges_and_follow_the_seed():
    simplex = random_simplex([0.201, 0.43], [0.248, 0.25], seed=3)
    assert simplex.shape == (3, 2)
    assert ((simplex[:, 0] >= 0.201) & (simplex[:, 0] <= 0.248)).all()
    assert ((simplex[:, 1] >= 0.25) & (simplex[:, 1] <= 0.43)).all()
    assert torch.equal(simplex, random_simplex([0.201, 0.43], [0.248, 0.25], seed=3))
    assert not torch.equal(simplex, random_simplex([0.201, 0.43], [0.248, 0.25], seed=4))
    many = torch.cat([random_simplex([0.0], [1.0], seed=seed).flatten() for seed in range(200)])
    assert float(many.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(many.std()) == pytest.approx(12**-0.5, abs=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": [[0.0, 1.0]]}, "nelder_mead.simplex"),
        ({"first": [[0.0, math.nan], [0.0, 1.0], [1.0, 0.0]]}, "finite"),
        ({"gamma": 0.5}, "nelder_mead.gamma"),
        ({"rho": 1.0}, "nelder_mead.rho"),
        ({"contraction": "outside"}, "nelder_mead.contraction"),
        ({"bounds": [(0.0, 1.0)]}, "nelder_mead.bounds"),
        ({"bounds": [(0.0, 1.0), (1.0, 1.0)]}, "nelder_mead.bounds"),
        ({"cache_ttl": 0}, "nelder_mead.cache_ttl"),
        ({"tolerance": -1.0}, "nelder_mead.tolerance"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search_from(**options)


def test_bad_values_ranges_and_states_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        search_from().tell(math.nan)
    with pytest.raises(ValueError, match="init"):
        random_simplex([0.1], [0.1], seed=0)
    with pytest.raises(ValueError, match="one number per constraint"):
        random_simplex([0.1], [0.2, 0.3], seed=0)
    with pytest.raises(ValueError, match="keep the constraints"):
        search_from().load_state_dict(search_from([[0.0], [1.0]]).state_dict())
