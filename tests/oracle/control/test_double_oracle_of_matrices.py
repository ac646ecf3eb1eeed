"""The double oracle (McMahan et al. 2003) with GRAD's parts, payoff table and meta-solver, on matrix games."""

from __future__ import annotations

import pytest
import torch

from modules.population.meta_solvers import NashLP, zero_sum_lp
from modules.population.payoff_table import PayoffTable


def _double_oracle(matrix: torch.Tensor) -> tuple[float, int, list[tuple[float, float]]]:
    """Rows and columns are inserted as best responses until neither is new: value, insertions, bounds of the value."""
    rows, columns = [0], [0]
    table = PayoffTable(2)
    table.grow(0)
    table.grow(1)
    bounds: list[tuple[float, float]] = []
    for _ in range(matrix.numel()):
        for i, j in table.missing().tolist():
            gain = matrix[rows[i], columns[j]]
            table.set_exact(torch.stack([gain, -gain]).unsqueeze(0), torch.tensor([[i, j]]))
        x, y = NashLP()(table.mean())
        full_x = torch.zeros(matrix.shape[0], dtype=torch.float64).index_add(0, torch.tensor(rows), x)
        full_y = torch.zeros(matrix.shape[1], dtype=torch.float64).index_add(0, torch.tensor(columns), y)
        best_row, best_column = int((matrix @ full_y).argmax()), int((full_x @ matrix).argmin())
        bounds.append((float((full_x @ matrix).min()), float((matrix @ full_y).max())))
        fresh = [(rows, best_row, 0), (columns, best_column, 1)]
        new = [(members, best, player) for members, best, player in fresh if best not in members]
        if not new:
            break
        for members, best, player in new:
            members.append(best)
            table.grow(player)
    return float(x @ table.mean()[0] @ y), len(rows) + len(columns), bounds


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_with_the_value_of_the_whole_game(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(20, 30, dtype=torch.float64, generator=generator)
    value, insertions, bounds = _double_oracle(matrix)
    whole = zero_sum_lp(matrix)[2]
    assert value == pytest.approx(whole, abs=1e-9)
    assert insertions <= 20 + 30
    assert all(low <= whole + 1e-9 and whole <= high + 1e-9 for low, high in bounds)
    assert bounds[-1][1] - bounds[-1][0] < 1e-9  # the last gap is closed
    best = [max(low for low, _ in bounds[: i + 1]) for i in range(len(bounds))]
    assert best == sorted(best)


@pytest.mark.parametrize(
    ("matrix", "value", "x"),
    [
        ([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], 0.0, [1 / 3, 1 / 3, 1 / 3]),
        ([[2.0, -1.0], [-1.0, 1.0]], 0.2, [0.4, 0.6]),
    ],
)
def test_small_games_equal_closed_forms(matrix, value, x):
    payoffs = torch.tensor(matrix, dtype=torch.float64)
    assert _double_oracle(payoffs)[0] == pytest.approx(value, abs=1e-9)
    mine, _, found = zero_sum_lp(payoffs)
    assert found == pytest.approx(value, abs=1e-9)
    assert mine.tolist() == pytest.approx(x, abs=1e-9)
