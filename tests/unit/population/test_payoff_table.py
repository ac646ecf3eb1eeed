"""The payoff table: estimates, exact values, symmetry, ranks."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch

from modules.population.payoff_table import PayoffTable


def _table(*sizes: int, symmetric: bool = False) -> PayoffTable:
    table = PayoffTable(len(sizes), symmetric_zero_sum=symmetric)
    for player, size in enumerate(sizes[:1] if symmetric else sizes):
        table.grow(player, size)
    return table


def _games(table: PayoffTable, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.stack([torch.randint(0, k, (count,), generator=generator) for k in table.sizes], dim=1)
    returns = torch.randn(count, table.num_players, generator=generator, dtype=torch.float64)
    if table.symmetric_zero_sum:
        cells = cells[cells[:, 0] != cells[:, 1]]
        gain = returns[: len(cells), 0]
        returns = torch.stack([gain, -gain], dim=1)
    return cells, returns


def test_means_and_standard_errors_of_three_players_equal_a_loop_over_cells():
    table = _table(2, 3, 2)
    cells, returns = _games(table, 200)
    table.add(cells[:25], returns[:25])
    table.add(cells[25:], returns[25:])
    assert table.mean().shape == (3, 2, 3, 2)
    for cell in itertools.product(range(2), range(3), range(2)):
        own = returns[(cells == torch.tensor(cell)).all(dim=1)]
        assert len(own) >= 2
        assert torch.allclose(table.mean()[(slice(None), *cell)], own.mean(dim=0), atol=1e-14)
        error = own.std(dim=0) / math.sqrt(len(own))
        assert torch.allclose(table.standard_error()[(slice(None), *cell)], error, atol=1e-12)
        assert table.counts[cell] == len(own)


def test_means_and_errors_where_games_are_too_few():
    table = _table(1, 3)
    table.add(torch.tensor([[0, 1], [0, 2], [0, 2]]), torch.tensor([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]]))
    assert torch.equal(table.mean()[0, 0, 1:], torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert bool(table.mean()[:, 0, 0].isnan().all())
    assert torch.equal(table.standard_error()[0], torch.tensor([[torch.inf, torch.inf, 1.0]], dtype=torch.float64))


def test_missing_cells_are_those_with_too_few_games():
    table = _table(2, 2)
    assert table.missing().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    table.add(torch.tensor([[0, 1], [0, 1], [1, 1]]), torch.zeros(3, 2))
    table.set_exact(torch.tensor([[3.0, 4.0]]), torch.tensor([[0, 0]]))
    assert table.missing().tolist() == [[1, 0]]
    assert table.missing(min_count=2).tolist() == [[1, 0], [1, 1]]
    table.grow(1)
    assert table.missing(min_count=2).tolist() == [[0, 2], [1, 0], [1, 1], [1, 2]]


def test_growing_keeps_what_was_known():
    table = _table(2, 2)
    cells, returns = _games(table, 30)
    table.add(cells, returns)
    mean, error = table.mean(), table.standard_error()
    table.grow(0)
    table.grow(1, 2)
    assert table.sizes == (3, 4)
    assert torch.equal(table.mean()[:, :2, :2], mean)
    assert torch.equal(table.standard_error()[:, :2, :2], error)
    assert bool(table.mean()[:, 2].isnan().all())


def test_reset_forgets_one_member_of_one_player():
    table = _table(3, 2)
    table.set_exact(torch.rand(2, 3, 2, dtype=torch.float64))
    before = table.mean()
    table.reset(0, 1)
    assert table.missing().tolist() == [[1, 0], [1, 1]]
    assert torch.equal(table.mean()[:, [0, 2]], before[:, [0, 2]])
    assert bool(table.standard_error()[:, 1].isinf().all())


def test_exact_payoffs_have_no_error_and_replace_samples():
    table = _table(2, 2)
    table.add(torch.tensor([[0, 0], [0, 0]]), torch.tensor([[9.0, -9.0], [5.0, -5.0]]))
    payoffs = torch.randn(2, 2, 2, dtype=torch.float64)
    table.set_exact(payoffs)
    assert torch.equal(table.mean(), payoffs)
    assert torch.equal(table.standard_error(), torch.zeros(2, 2, 2, dtype=torch.float64))
    assert table.missing(min_count=1000).shape == (0, 2)
    with pytest.raises(ValueError, match=r"cell \(1, 0\): its payoff is exact already"):
        table.add(torch.tensor([[1, 0]]), torch.zeros(1, 2))


def test_a_symmetric_table_is_antisymmetric_bit_for_bit_and_needs_half_the_cells():
    table = _table(4, 4, symmetric=True)
    assert table.missing().tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    for seed in range(3):
        table.add(*_games(table, 200, seed))
    payoffs = table.mean()
    assert torch.equal(payoffs[0], -payoffs[0].T)
    assert torch.equal(payoffs[1], -payoffs[0])
    assert torch.equal(payoffs[0].diagonal(), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(table.standard_error()[0], table.standard_error()[0].T)
    assert torch.equal(table.standard_error()[0].diagonal(), torch.zeros(4, dtype=torch.float64))
    plain = _table(4, 4)
    for seed in range(3):
        cells, returns = _games(table, 200, seed)
        plain.add(cells, returns)
        plain.add(cells.flip(1), returns.flip(1))
    away = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(payoffs[:, away], plain.mean()[:, away], atol=1e-14)


def test_a_symmetric_table_grows_and_forgets_on_both_axes():
    table = _table(3, 3, symmetric=True)
    matrix = torch.tensor([[0.0, 1, -2], [-1, 0, 3], [2, -3, 0]], dtype=torch.float64)
    table.set_exact(torch.stack([matrix, -matrix]))
    table.grow(1)
    assert table.sizes == (4, 4)
    assert table.missing().tolist() == [[0, 3], [1, 3], [2, 3]]
    table.set_exact(torch.tensor([[5.0, -5.0]], dtype=torch.float64), torch.tensor([[3, 1]]))
    assert table.mean()[:, 1, 3].tolist() == [-5.0, 5.0]
    assert table.mean()[:, 3, 1].tolist() == [5.0, -5.0]
    table.reset(0, 1)
    assert table.missing().tolist() == [[0, 1], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert table.mean()[0, 0, 2] == -2


def test_ranks_that_share_games_agree_with_one_rank_that_has_them_all():
    whole, left, right = (_table(3, 3, symmetric=True) for _ in range(3))
    cells, returns = _games(whole, 100)
    whole.add(cells, returns)
    sent: list[torch.Tensor] = []
    right.add(cells[40:], returns[40:], reduce=lambda delta: sent.append(delta.clone()) or delta)
    assert sent[0].ndim == 1
    assert sent[0].dtype == torch.float64
    left.add(cells[:40], returns[:40], reduce=lambda delta: delta + sent[0])
    assert torch.allclose(left.mean(), whole.mean(), atol=1e-14)
    assert torch.allclose(left.standard_error(), whole.standard_error(), atol=1e-12)
    assert torch.equal(left.counts, whole.counts)
    idle = _table(3, 3, symmetric=True)  # a rank with no games still takes part
    idle.add(cells[:0], returns[:0], reduce=lambda delta: delta + sent[0])
    assert idle.digest() == right.digest()


def test_digests_agree_on_equal_means_only():
    table, other = _table(2, 2), _table(2, 2)
    cells, returns = _games(table, 20)
    table.add(cells, returns)
    other.add(cells, returns)
    assert table.digest() == other.digest()
    other.add(cells[:1], returns[:1] + 1e-9)
    assert table.digest() != other.digest()
    assert _table(1, 2).digest() != _table(2, 1).digest()
    zero, minus_zero = _table(1, 1), _table(1, 1)
    zero.set_exact(torch.zeros(2, 1, 1))
    minus_zero.set_exact(-torch.zeros(2, 1, 1))
    assert zero.digest() == minus_zero.digest()


def test_state_goes_through_a_weights_only_file():
    table = _table(3, 3, symmetric=True)
    table.add(*_games(table, 50))
    buffer = io.BytesIO()
    torch.save(table.state_dict(), buffer)
    buffer.seek(0)
    other = PayoffTable.from_state_dict(torch.load(buffer, weights_only=True))
    for copy in (table, other):
        copy.grow(0)
        copy.add(*_games(copy, 50, seed=1))
    assert torch.equal(table.mean(), other.mean())
    assert torch.equal(table.standard_error(), other.standard_error())
    with pytest.raises(ValueError, match="symmetric_zero_sum: must be False, the state has True"):
        PayoffTable(2).load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match="shapes must fit counts"):
        other.load_state_dict({**table.state_dict(), "exact": torch.zeros(2, 2, dtype=torch.bool)})


def test_games_that_do_not_fit_are_named_and_leave_the_table_alone():
    table = _table(2, 3)
    digest = table.digest()
    good, cells = torch.zeros(3, 2), torch.tensor([[0, 0], [1, 2], [0, 1]])
    bad = good.clone()
    bad[1, 0] = torch.nan
    for payoffs, where, message in [
        (bad, cells, r"PayoffTable: cell \(1, 2\): payoffs must be finite"),
        (good, cells + 1, r"PayoffTable: cell \(2, 3\): members must be in the table of sizes \(2, 3\)"),
        (good, cells - 1, r"PayoffTable: cell \(-1, -1\)"),
        (good[:2], cells, r"must both be \[cells, 2\], got \(3, 2\) and \(2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.add(where, payoffs)
    with pytest.raises(ValueError, match=r"payoffs: must be \(2, 2, 3\), got \(2, 3, 2\)"):
        table.set_exact(torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match=r"cell \(0, 0\): payoffs must be finite"):
        table.set_exact(torch.full((2, 2, 3), torch.inf))
    assert table.digest() == digest


def test_a_symmetric_table_refuses_payoffs_that_break_symmetry():
    table = _table(2, 2, symmetric=True)
    digest = table.digest()
    with pytest.raises(ValueError, match=r"antisymmetric and zero-sum in a symmetric game, got max \|M \+ M\^T\| = 2"):
        table.set_exact(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"cell \(0, 1\): payoffs must add up to 0"):
        table.add(torch.tensor([[0, 1]]), torch.tensor([[1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"cell \(1, 1\): its payoff is exact already"):
        table.add(torch.tensor([[1, 1]]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"cell \(1, 1\): a member against itself is worth 0"):
        table.set_exact(torch.tensor([[1.0, -1.0]]), torch.tensor([[1, 1]]))
    assert table.digest() == digest


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="num_players: must be >= 1, got 0"):
        PayoffTable(0)
    with pytest.raises(ValueError, match="symmetric_zero_sum: needs 2 players, got 3"):
        PayoffTable(3, symmetric_zero_sum=True)
    with pytest.raises(ValueError, match=r"player: must be in \[0, 2\), got 2"):
        PayoffTable(2).grow(2)
    with pytest.raises(ValueError, match="n: must be >= 1, got 0"):
        PayoffTable(2).grow(0, 0)
    with pytest.raises(IndexError, match=r"member: must be in \[0, 1\), got 1"):
        _table(1, 2).reset(0, 1)
