"""Oracles one by one: large scales, customers without a prize, instances with many equal nodes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from datamodules.routing.oracles import References
from datamodules.routing.oracles.heuristics import improve
from datamodules.routing.problems import make_problem


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_tours_of_grid_points_many_of_them_equal(points):
    problem = make_problem("tsp")
    batch = TensorDict({"locs": torch.tensor(points).float().unsqueeze(0)}, [1])
    optimum = References("exact").costs(problem, batch)
    torch.testing.assert_close(References("elkai").costs(problem, batch), optimum)
    for oracle in ("two_opt", "ruin_recreate(5)", "nearest_insertion", "farthest_insertion", "random_insertion"):
        assert float(References(oracle).costs(problem, batch)) >= float(optimum) - 1e-9


def test_local_search_ends_at_any_scale():
    """Distances of 1e9 between points far from the origin are off by 1e-6: moves that gain nothing seem to gain."""
    found = []
    for scale in (1e-6, 1.0, 1e9):
        points = (np.random.default_rng(0).random((60, 2)) + 10.0) * scale
        tour = improve(np.linalg.norm(points[:, None] - points[None], axis=-1), list(range(60)))
        found.append(float(np.linalg.norm(points[tour] - points[np.roll(tour, -1)], axis=-1).sum()) / scale)
    assert max(found) - min(found) < 1e-6


def test_customers_without_a_prize_are_visited_where_all_must_be():
    """All prizes together are too little; the last customer lies far away and brings and costs nothing."""
    locs = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [0.1, 0.1], [0.0, 0.1], [1.0, 1.0]]])
    fields = {"prize": torch.full((1, 4), 0.3), "real_prize": torch.tensor([[0.3, 0.3, 0.3, 0.0]])}
    batch = TensorDict({"locs": locs, **fields, "penalty": torch.tensor([[0.2, 0.2, 0.2, 0.0]])}, [1])
    problem = make_problem("spctsp")
    optimum = References("exact").costs(problem, batch)
    for oracle in ("ortools(50)", "ruin_recreate(100)", "prize_collecting(100)"):
        torch.testing.assert_close(References(oracle).costs(problem, batch), optimum, rtol=0, atol=1e-6)
