"""Meta-solvers against closed forms, OpenSpiel and general-purpose optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modules.population.alpha_rank import AlphaRank, log_fixation, log_stationary
from modules.population.meta_solvers import (
    FictitiousPlay,
    NashLP,
    ProjectedReplicator,
    RegretMatching,
    max_entropy_lp,
    meta_gap,
    solve_symmetric,
    zero_sum_lp,
)

optimize = pytest.importorskip("scipy.optimize")

ROCK_PAPER_SCISSORS = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _zero_sum(matrix: torch.Tensor) -> torch.Tensor:
    return torch.stack([matrix, -matrix])


@pytest.mark.parametrize("selection", ["vertex", "max_entropy"])
def test_nash_of_weighted_rock_paper_scissors_equals_closed_form(selection):
    # kernel of the antisymmetric matrix [[0, -c, b], [c, 0, -a], [-b, a, 0]] is (a, b, c)
    a, b, c = 1.0, 2.0, 5.0
    matrix = torch.tensor([[0, -c, b], [c, 0, -a], [-b, a, 0]], dtype=torch.float64)
    expected = torch.tensor([a, b, c], dtype=torch.float64) / (a + b + c)
    for mixture in [*NashLP(selection)(_zero_sum(matrix)), solve_symmetric(NashLP(selection), matrix)]:
        assert torch.allclose(mixture, expected, atol=1e-10)


def test_all_solvers_of_rock_paper_scissors_equal_uniform():
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    for solver in (NashLP(), ProjectedReplicator(iterations=100), AlphaRank(), RegretMatching()):
        for mixture in solver(_zero_sum(ROCK_PAPER_SCISSORS)):
            assert torch.allclose(mixture, third, atol=1e-9)


def test_nash_of_a_2x2_game_equals_closed_form():
    for seed in range(20):
        a, b, c, d = _random(4, seed=seed).tolist()
        if min(max(a, b), max(c, d)) < 0 or (a - c) * (d - b) <= 0 or (a - b) * (d - c) <= 0:
            a, b, c, d = abs(a) + 1, -abs(b), -abs(c), abs(d) + 1  # no saddle point
        matrix = torch.tensor([[a, b], [c, d]], dtype=torch.float64)
        x, y, value = zero_sum_lp(matrix)
        total = a + d - b - c
        assert x[0] == pytest.approx((d - c) / total, abs=1e-10)
        assert y[0] == pytest.approx((d - b) / total, abs=1e-10)
        assert value == pytest.approx((a * d - b * c) / total, abs=1e-10)


def test_a_dominant_member_takes_all_as_domination_says():
    matrix = _random(5, 4, seed=1)
    matrix[3] = matrix.max(dim=0).values + 0.5
    payoffs = _zero_sum(matrix)
    solvers = (NashLP(), NashLP("max_entropy"), AlphaRank(), RegretMatching(5000), FictitiousPlay(20_000))
    for solver in (*solvers, ProjectedReplicator(dt=0.01, floor=0.0)):
        assert solver(payoffs)[0][3] == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 3), (20, 30), (60, 60)])
def test_lp_value_is_minus_the_value_of_minus_the_transpose(shape):
    for scale, shift in ((1, 0), (1e-3, 0), (1e3, 5e3)):
        matrix = _random(*shape, seed=2) * scale + shift
        x, y, value = zero_sum_lp(matrix)
        assert zero_sum_lp(-matrix.T)[2] == pytest.approx(-value, abs=1e-9 * scale, rel=1e-12)
        gap = float((matrix @ y).max() - (x @ matrix).min())
        assert -1e-9 < gap / scale < 1e-9


def test_lp_value_equals_bounds_of_a_long_regret_matching():
    matrix = _random(12, 9, seed=3)
    x, y = RegretMatching(50_000, gap=1e-5)(_zero_sum(matrix))
    low, high = float((x @ matrix).min()), float((matrix @ y).max())
    assert high - low <= 1e-5
    assert low <= zero_sum_lp(matrix)[2] <= high


def test_largest_entropy_equals_slsqp_on_games_with_many_equilibria():
    generator = torch.Generator().manual_seed(4)
    many = 0
    for _ in range(25):
        rows, columns = torch.randint(2, 6, (2,), generator=generator).tolist()
        matrix = torch.randint(-1, 2, (rows, columns), generator=generator).double()
        mine = max_entropy_lp(matrix)
        _, _, value = zero_sum_lp(matrix)
        a = matrix.numpy()
        found = optimize.minimize(
            lambda x: float(np.sum(x * np.log(np.maximum(x, 1e-300)))),
            mine.numpy() * 0.5 + zero_sum_lp(matrix)[0].numpy() * 0.5,  # feasible: between two optima
            jac=lambda x: np.log(np.maximum(x, 1e-12)) + 1,
            bounds=[(0, 1)] * rows,
            constraints=[
                {"type": "eq", "fun": lambda x: x.sum() - 1},
                {"type": "ineq", "fun": lambda x, a=a, value=value: x @ a - value},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        entropy = float(-(mine * mine.clamp(min=1e-300).log()).sum())
        assert -1e-7 < entropy + found.fun < 1e-4  # SLSQP stops early at corners
        assert float((mine @ matrix).min()) >= value - 1e-8
        many += not torch.allclose(mine, zero_sum_lp(matrix)[0], atol=1e-6)
    assert many >= 5  # else the games above would not test the selection


def test_gaps_of_regret_matching_and_fictitious_play_fall_as_theory_says():
    for seed in range(5):
        matrix = _random(10, 10, seed=seed)
        payoffs = _zero_sum(matrix - matrix.T)
        spread = float(payoffs.max() - payoffs.min())
        for steps in (100, 1000, 10_000):
            regret = float(meta_gap(payoffs, RegretMatching(steps, gap=0.0)(payoffs)))
            assert regret <= 2 * spread * (10 / steps) ** 0.5  # regret bound of RM+: spread * sqrt(actions / T) each
        fictitious = [float(meta_gap(payoffs, FictitiousPlay(t)(payoffs))) for t in (100, 10_000)]
        assert fictitious[1] < 0.3 * fictitious[0]  # O(t^-1/2) would be 0.1


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 4), (3, 2, 3, 2)])
def test_projected_replicator_equals_open_spiel(shape):
    peer = pytest.importorskip("open_spiel.python.algorithms.projected_replicator_dynamics")
    payoffs = _random(*shape, seed=5)
    for floor in (1e-6, 0.08):
        mine = ProjectedReplicator(dt=0.01, floor=floor, iterations=500)(payoffs)
        theirs = peer.projected_replicator_dynamics(
            list(payoffs.numpy()), prd_iterations=500, prd_dt=0.01, prd_gamma=floor
        )
        for a, b in zip(mine, theirs, strict=True):
            assert np.allclose(a.numpy(), b, atol=1e-12)


@pytest.mark.parametrize(("alpha", "m"), [(0.1, 5), (1.0, 20), (5.0, 3), (100.0, 50)])
def test_alpha_rank_equals_open_spiel(alpha, m):
    peer = pytest.importorskip("open_spiel.python.egt.alpharank")
    # small payoffs: OpenSpiel's fixation probabilities underflow and its chain falls apart beyond
    scale = min(1.0, 4 / (alpha * m))
    matrix = _random(5, 5, seed=6) * scale
    pi = peer.compute([matrix.numpy()], m=m, alpha=alpha)[2]
    single = AlphaRank(alpha, m).symmetric(matrix)
    assert np.allclose(single.numpy(), pi, atol=1e-9)
    for sizes in ((3, 4), (2, 3, 2)):
        payoffs = _random(len(sizes), *sizes, seed=7) * scale
        pi = peer.compute(list(payoffs.numpy()), m=m, alpha=alpha)[2]
        solver = AlphaRank(alpha, m)
        assert np.allclose(solver.profiles(payoffs).flatten().numpy(), pi, atol=1e-9)
        joint = pi.reshape(sizes)
        for player, mixture in enumerate(solver(payoffs)):
            others = tuple(i for i in range(len(sizes)) if i != player)
            assert np.allclose(mixture.numpy(), joint.sum(axis=others), atol=1e-9)


def test_fixation_probability_equals_the_moran_product_formula():
    advantage = torch.tensor([-0.3, -1e-15, 0.0, 1e-13, 1e-3, 0.7], dtype=torch.float64)
    for alpha, m in ((1.0, 7), (10.0, 4)):
        sums = torch.stack([torch.exp(-alpha * advantage * level) for level in range(m)]).sum(dim=0)
        assert torch.allclose(log_fixation(advantage, alpha, m).exp(), 1 / sums, rtol=1e-12)
    lost = log_fixation(torch.tensor([-2.0], dtype=torch.float64), 100.0, 50)
    assert float(lost) == pytest.approx(-49 * 200)  # far below what a float64 holds


def test_stationary_distribution_equals_eigenvector_and_survives_tiny_rates():
    rates = torch.rand(7, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mine = log_stationary(rates.log()).exp()
    generator = rates.clone().fill_diagonal_(0)
    generator -= torch.diag(generator.sum(dim=1))
    assert float((mine @ generator).abs().max()) < 1e-14
    # two states: shares are in the ratio of the rates, here e^5000
    two = torch.tensor([[0.0, -5000.0], [-10_000.0, 0.0]], dtype=torch.float64)
    assert log_stationary(two).tolist() == pytest.approx([-5000.0, 0.0])
