"""Meta-solvers: arguments, errors, symmetries and the helpers around them."""

from __future__ import annotations

import math

import pytest
import torch

from modules.population.alpha_rank import AlphaRank
from modules.population.meta_solvers import (
    FictitiousPlay,
    Last,
    MetaSolver,
    NashLP,
    ProjectedReplicator,
    RegretMatching,
    SoftmaxPayoff,
    Uniform,
    deviation_payoffs,
    meta_gap,
    meta_values,
    project_simplex,
    rectified_weights,
    solve_symmetric,
)

pytest.importorskip("scipy")

ROCK_PAPER_SCISSORS = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)
ANY_NUMBER = [
    FictitiousPlay(200),
    ProjectedReplicator(dt=0.01, iterations=300),
    AlphaRank(5.0),
    Uniform(),
    Last(),
    SoftmaxPayoff(),
]
ZERO_SUM = [NashLP(), NashLP("max_entropy"), RegretMatching(500)]
_name = lambda solver: "_".join(map(str, [type(solver).__name__, *vars(solver).values()]))  # noqa: E731


def _zero_sum(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.stack([matrix, -matrix])


def _antisymmetric(size: int, seed: int = 0) -> torch.Tensor:
    matrix = _zero_sum(size, size, seed)[0]
    return matrix - matrix.T


@pytest.mark.parametrize("solver", [*ANY_NUMBER, *ZERO_SUM], ids=_name)
def test_mixtures_are_float64_distributions_and_always_the_same(solver: MetaSolver):
    payoffs = _zero_sum(4, 6)
    mixtures = solver(payoffs)
    for mixture, size in zip(mixtures, (4, 6), strict=True):
        assert mixture.shape == (size,)
        assert mixture.dtype == torch.float64
        assert bool((mixture >= 0).all())
        assert float(mixture.sum()) == pytest.approx(1, abs=1e-12)
    again = solver(payoffs.clone())
    assert all(torch.equal(a, b) for a, b in zip(mixtures, again, strict=True))


@pytest.mark.parametrize("solver", ANY_NUMBER, ids=_name)
def test_three_players_get_three_mixtures_and_one_member_gets_all(solver: MetaSolver):
    payoffs = torch.randn(3, 2, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second, third = solver(payoffs)
    assert (first.shape, third.shape) == ((2,), (3,))
    assert second.tolist() == [pytest.approx(1.0)]
    assert float(third.sum()) == pytest.approx(1)


@pytest.mark.parametrize("solver", [s for s in [*ANY_NUMBER, *ZERO_SUM] if not isinstance(s, Last)], ids=_name)
def test_renaming_members_renames_their_shares(solver: MetaSolver):
    payoffs = _zero_sum(4, 5)
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 3])
    x, y = solver(payoffs)
    x2, y2 = solver(payoffs[:, rows][:, :, columns])
    assert torch.allclose(x2, x[rows], atol=1e-8)
    assert torch.allclose(y2, y[columns], atol=1e-8)


@pytest.mark.parametrize("solver", [*ANY_NUMBER, *ZERO_SUM], ids=_name)
def test_constants_added_to_payoffs_change_nothing(solver: MetaSolver):
    payoffs = _zero_sum(4, 5, seed=2)
    shift = torch.tensor([3.0, -5.0], dtype=torch.float64)[:, None, None]
    for a, b in zip(solver(payoffs), solver(payoffs + shift), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("solver", [s for s in [*ANY_NUMBER, *ZERO_SUM] if not isinstance(s, Last)], ids=_name)
def test_a_symmetric_game_gets_one_mixture_and_rock_paper_scissors_the_uniform_one(solver: MetaSolver):
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert torch.allclose(solve_symmetric(solver, ROCK_PAPER_SCISSORS), third, atol=5e-2)
    matrix = _antisymmetric(5, seed=3)
    both = torch.stack([matrix, -matrix])
    one = solve_symmetric(solver, both)
    assert torch.equal(one, solve_symmetric(solver, matrix))
    # a mixture of the two players' mixtures is no easier to exploit than they are
    if isinstance(solver, (NashLP, RegretMatching, FictitiousPlay)):
        assert float(meta_gap(both, [one, one])) <= float(meta_gap(both, solver(both))) + 1e-9


def test_one_member_is_the_whole_meta_strategy_of_a_symmetric_game():
    for solver in [*ANY_NUMBER, *ZERO_SUM]:
        assert solve_symmetric(solver, torch.zeros(1, 1)).tolist() == [pytest.approx(1.0)]


def test_deviation_payoffs_and_the_gap_equal_sums_over_profiles():
    generator = torch.Generator().manual_seed(4)
    payoffs = torch.randn(3, 2, 3, 4, generator=generator, dtype=torch.float64)
    mixtures = [torch.rand(k, generator=generator, dtype=torch.float64) for k in (2, 3, 4)]
    mixtures = [m / m.sum() for m in mixtures]
    a, b, c = mixtures
    assert torch.allclose(deviation_payoffs(payoffs, mixtures, 0), torch.einsum("abc,b,c->a", payoffs[0], b, c))
    assert torch.allclose(deviation_payoffs(payoffs, mixtures, 1), torch.einsum("abc,a,c->b", payoffs[1], a, c))
    values = torch.einsum("iabc,a,b,c->i", payoffs, a, b, c)
    assert torch.allclose(meta_values(payoffs, mixtures), values)
    best = torch.stack([deviation_payoffs(payoffs, mixtures, i).max() for i in range(3)])
    assert float(meta_gap(payoffs, mixtures)) == pytest.approx(float((best - values).sum()))


def test_the_largest_entropy_shares_equally_among_duplicates_and_a_vertex_need_not():
    doubled = ROCK_PAPER_SCISSORS[[0, 0, 1, 2]][:, [0, 0, 1, 2]]
    share = solve_symmetric(NashLP("max_entropy"), doubled)
    assert torch.allclose(share, torch.tensor([1 / 6, 1 / 6, 1 / 3, 1 / 3], dtype=torch.float64), atol=1e-9)
    vertex = solve_symmetric(NashLP(), doubled)
    assert int((vertex > 1e-9).sum()) == 3
    assert float((doubled @ vertex).max()) < 1e-12


def test_all_payoffs_equal_leave_the_largest_entropy_uniform():
    assert torch.equal(NashLP("max_entropy")(torch.zeros(2, 3, 4))[1], torch.full((4,), 0.25, dtype=torch.float64))
    assert [float(m.sum()) for m in NashLP()(torch.zeros(2, 3, 4))] == [1.0, 1.0]


def test_softmax_goes_from_the_best_member_to_uniform_and_last_is_the_last():
    payoffs = _zero_sum(4, 3, seed=5)
    mean = payoffs[0].mean(dim=1)
    assert torch.allclose(SoftmaxPayoff(0.5)(payoffs)[0], torch.softmax(2 * mean, dim=0))
    assert int(SoftmaxPayoff(1e-4)(payoffs)[0].argmax()) == int(mean.argmax())
    assert Last()(payoffs)[0].tolist() == [0, 0, 0, 1]
    assert Uniform()(payoffs)[1].tolist() == [1 / 3] * 3


def test_rectified_opponents_are_those_that_the_member_does_not_lose_to():
    sigma = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    assert rectified_weights(ROCK_PAPER_SCISSORS, sigma, 0).tolist() == pytest.approx([0.5 / 0.8, 0, 0.3 / 0.8])
    assert rectified_weights(ROCK_PAPER_SCISSORS, sigma, 2).tolist() == pytest.approx([0, 0.4, 0.6])
    with pytest.raises(ValueError, match="member 0 loses to every opponent that sigma plays"):
        rectified_weights(torch.tensor([[-1.0, 1.0]]), torch.tensor([1.0, 0.0]), 0)


def test_the_replicator_keeps_to_its_floor_and_long_runs_at_negative_payoffs_stay_distributions():
    matrix = torch.tensor([[-8.0, -9.0], [-9.0, -10.0]], dtype=torch.float64)
    x, _ = ProjectedReplicator(dt=0.05, floor=0.1, iterations=4000)(torch.stack([matrix, matrix.T]))
    assert x[1] == pytest.approx(0.1, abs=3e-3)
    assert float(x.sum()) == pytest.approx(1, abs=1e-12)
    x, _ = ProjectedReplicator(dt=0.05, floor=0.9, iterations=10)(torch.stack([matrix, matrix.T]))
    assert x.tolist() == [0.5, 0.5]  # no room above the floor


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_the_projection_is_the_nearest_point(floor):
    generator = torch.Generator().manual_seed(6)
    corners = floor + (1 - 5 * floor) * torch.eye(5, dtype=torch.float64)
    for _ in range(20):
        point = torch.randn(5, generator=generator, dtype=torch.float64)
        near = torch.from_numpy(project_simplex(point.numpy(), floor))
        assert float(near.sum()) == pytest.approx(1)
        assert float(near.min()) >= floor - 1e-15
        # nearest point of a convex set: no corner lies on the other side of the plane through it
        assert float(((corners - near) @ (point - near)).max()) < 1e-12


def test_play_stops_early_when_its_gap_is_reached():
    matrix = _antisymmetric(6, seed=7)
    payoffs = torch.stack([matrix, -matrix])
    for solver_class, target in ((RegretMatching, 1e-3), (FictitiousPlay, 5e-2)):
        long = solver_class(100_000, gap=target)(payoffs)
        assert float(meta_gap(payoffs, long)) <= target + 1e-12
        assert float(meta_gap(payoffs, solver_class(50, gap=target)(payoffs))) > target
    first = FictitiousPlay(1, init="first")(payoffs)[0]
    reply = int(payoffs[0, :, 0].argmax())
    assert first[reply] == pytest.approx(0.5)
    assert first[0] == pytest.approx(0.5)


def test_alpha_rank_keeps_its_head_at_any_intensity():
    matrix = _antisymmetric(4, seed=8)
    for alpha in (1e-6, 1e2, 1e6):
        share = solve_symmetric(AlphaRank(alpha), matrix)
        assert bool(torch.isfinite(share).all())
        assert float(share.sum()) == pytest.approx(1)
    assert torch.allclose(solve_symmetric(AlphaRank(1e-9), matrix), torch.full((4,), 0.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most max_profiles = 10 profiles, got 16"):
        AlphaRank(max_profiles=10)(torch.stack([matrix, -matrix]))


@pytest.mark.parametrize(
    ("payoffs", "message"),
    [
        (torch.zeros(2, 3), r"payoffs: must be \[players, members_0, ...\] with one axis per player, got \(2, 3\)"),
        (torch.zeros(2, 0, 3), r"every player needs a member, got sizes \(0, 3\)"),
        (torch.full((2, 1, 2), torch.nan), r"must be finite, got nan for player 0 in cell \(0, 0\)"),
        (torch.full((2, 1, 2), torch.inf), "must be finite, got inf"),
    ],
)
@pytest.mark.parametrize("solver", [*ANY_NUMBER, *ZERO_SUM], ids=_name)
def test_payoffs_that_are_none_are_refused_by_name(solver: MetaSolver, payoffs, message):
    with pytest.raises(ValueError, match=f"{type(solver).__name__}: .*{message}"):
        solver(payoffs)


@pytest.mark.parametrize("solver", ZERO_SUM, ids=_name)
def test_general_sum_games_are_sent_to_other_solvers(solver: MetaSolver):
    with pytest.raises(ValueError, match="must be zero-sum, got sums that differ by 1: use AlphaRank or Projected"):
        solver(torch.eye(2).expand(2, 2, 2) / 2)
    with pytest.raises(ValueError, match=r"players: must be 2, got 3: use AlphaRank"):
        solver(torch.zeros(3, 2, 2, 2))


def test_a_symmetric_game_must_be_one():
    for payoffs in (torch.zeros(2, 2, 3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="NashLP: payoff matrix must be square and antisymmetric, got"):
            solve_symmetric(NashLP(), payoffs)
    with pytest.raises(ValueError, match=r"square and antisymmetric \(max \|M\+M\^T\| = 2\)"):
        solve_symmetric(Uniform(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="must be finite, got nan"):
        solve_symmetric(Uniform(), torch.full((2, 2), math.nan))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NashLP("best"), "NashLP: selection: must be vertex or max_entropy, got 'best'"),
        (lambda: RegretMatching(0), "RegretMatching: iterations: must be > 0, got 0"),
        (lambda: RegretMatching(gap=-1.0), "RegretMatching: gap: must be >= 0, got -1.0"),
        (lambda: FictitiousPlay(init="last"), "FictitiousPlay: init: must be uniform or first, got 'last'"),
        (lambda: FictitiousPlay(check_every=0), "FictitiousPlay: check_every: must be > 0, got 0"),
        (lambda: ProjectedReplicator(dt=0.0), "ProjectedReplicator: dt: must be > 0, got 0.0"),
        (lambda: ProjectedReplicator(floor=-0.1), "ProjectedReplicator: floor: must be >= 0, got -0.1"),
        (lambda: SoftmaxPayoff(0.0), "SoftmaxPayoff: temperature: must be > 0, got 0.0"),
        (lambda: AlphaRank(math.inf), "AlphaRank: alpha: must be finite and > 0, got inf"),
        (lambda: AlphaRank(m=1), "AlphaRank: m: must be >= 2, got 1"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
