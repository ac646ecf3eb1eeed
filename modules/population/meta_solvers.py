"""Meta-solvers: from the payoffs of all profiles of members to one mixture of members per player.

Pure functions of float64 payoffs ``[players, members_0, members_1, ...]`` and small classes that a config names by
``class_path``. All are deterministic. The iterative ones run on numpy arrays: their loops are sequential and their
vectors short, so that the cost is that of the calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modules.optional import require

TOLERANCE = 1e-6
"""By how much, relative to the larger of 1 and the payoffs, a game may fail to be constant-sum or antisymmetric."""

_EXACT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # the least that HiGHS takes


# -- the meta-game -----------------------------------------------------------------------------------------------------
def validate_payoffs(payoffs: Tensor, owner: str) -> Tensor:
    """``payoffs`` ``[players, members_0, ...]`` as a detached float64 tensor on the CPU.

    Raises:
        ValueError: wrong number of axes, a player without members, or payoffs that are not finite.
    """
    payoffs = payoffs.detach().to("cpu", torch.float64)
    if payoffs.ndim < 2 or payoffs.shape[0] != payoffs.ndim - 1:
        raise ValueError(
            f"{owner}: payoffs: must be [players, members_0, ...] with one axis per player, got {tuple(payoffs.shape)}"
        )
    if payoffs.numel() == 0:
        raise ValueError(f"{owner}: payoffs: every player needs a member, got sizes {tuple(payoffs.shape[1:])}")
    wrong = ~torch.isfinite(payoffs)
    if bool(wrong.any()):
        player, *cell = wrong.nonzero()[0].tolist()
        value = float(payoffs[(player, *cell)])
        raise ValueError(
            f"{owner}: payoffs: must be finite, got {value} for player {player} in cell {tuple(cell)}: "
            "estimate the payoff table's missing cells first"
        )
    return payoffs


def zero_sum_matrix(payoffs: Tensor, owner: str) -> Tensor:
    """``[members_0, members_1]``: player 0's payoffs in a two-player constant-sum game.

    Raises:
        ValueError: other than 2 players, or payoffs that do not add up to a constant.
    """
    payoffs = validate_payoffs(payoffs, owner)
    advice = "use AlphaRank or ProjectedReplicator (alpha_rank, prd)"
    if payoffs.shape[0] != 2:
        raise ValueError(f"{owner}: players: must be 2, got {payoffs.shape[0]}: {advice}")
    total = payoffs.sum(dim=0)
    apart = float(total.max() - total.min())
    if apart > TOLERANCE * max(1.0, float(payoffs.abs().max())):
        raise ValueError(f"{owner}: payoffs: must be zero-sum, got sums that differ by {apart:.3g}: {advice}")
    return payoffs[0]


def deviation_payoffs(payoffs: Tensor, strategies: Sequence[Tensor], player: int) -> Tensor:
    """``[members_player]``: payoff of each member of ``player`` against the others' mixtures ``[members_i]``."""
    values = payoffs[player]
    for other in range(len(strategies) - 1, -1, -1):
        if other != player:
            values = values.movedim(other, -1) @ strategies[other].to(values.dtype)
    return values


def meta_values(payoffs: Tensor, strategies: Sequence[Tensor]) -> Tensor:
    """``[players]``: expected payoffs of the meta-strategies."""
    values = [strategies[i] @ deviation_payoffs(payoffs, strategies, i) for i in range(len(strategies))]
    return torch.stack(values)


def meta_gap(payoffs: Tensor, strategies: Sequence[Tensor]) -> Tensor:
    """NashConv inside the meta-game: sum over players of best member's payoff minus own, a scalar >= 0."""
    best = torch.stack([deviation_payoffs(payoffs, strategies, i).max() for i in range(len(strategies))])
    return (best - meta_values(payoffs, strategies)).sum()


# -- linear programmes -------------------------------------------------------------------------------------------------
def _linprog(cost: np.ndarray, **problem):
    """scipy's HiGHS with the tightest tolerances; without presolve if that fails."""
    optimize = require("scipy.optimize", extra="games")
    for options in ({}, {"presolve": False}):
        result = optimize.linprog(cost, method="highs-ds", options={**_EXACT, **options}, **problem)
        if result.status == 0:
            return result
    raise RuntimeError(f"NashLP: linear programme: HiGHS found no optimum: {result.message}")


def _simplex(weights: np.ndarray) -> np.ndarray:
    weights = np.clip(weights, 0.0, None)
    return weights / weights.sum()


def zero_sum_lp(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """Optimal mixtures of the zero-sum matrix game ``[rows, columns]`` (payoffs of rows), and its value.

    max v subject to x^T M >= v in every column, x in the simplex; the dual gives the columns' mixture. A vertex of the
    set of optima, always the same for the same matrix and scipy.

    Returns:
        row mixture ``[rows]``, column mixture ``[columns]`` (float64), value = x^T M y.

    Raises:
        ImportError: scipy is missing.
        RuntimeError: HiGHS failed.
    """
    payoffs = matrix.detach().to("cpu", torch.float64).numpy()
    rows, columns = payoffs.shape
    centre = (payoffs.max() + payoffs.min()) / 2
    scale = (payoffs.max() - payoffs.min()) / 2 or 1.0  # solved on [-1, 1]: HiGHS's tolerances are absolute
    scaled = (payoffs - centre) / scale
    result = _linprog(
        np.append(np.zeros(rows), -1.0),
        A_ub=np.hstack([-scaled.T, np.ones((columns, 1))]),
        b_ub=np.zeros(columns),
        A_eq=np.append(np.ones(rows), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * rows + [(None, None)],
    )
    x, y = _simplex(result.x[:-1]), _simplex(-result.ineqlin.marginals)
    return torch.from_numpy(x), torch.from_numpy(y), float(x @ payoffs @ y)


def max_entropy_lp(matrix: Tensor, iterations: int = 200) -> Tensor:
    """The optimal row mixture ``[rows]`` of largest entropy: it treats duplicate and equivalent members alike.

    One more linear programme finds which members and which columns' slack are positive in some optimum; what is left
    is max entropy under tight and slack linear constraints, whose dual (x proportional to exp(A lambda)) is solved by
    L-BFGS and finished by Newton's method on the constraints that bind. Precision about 1e-9 in the value.

    Raises:
        ImportError: scipy is missing.
        RuntimeError: HiGHS failed.
    """
    optimize = require("scipy.optimize", extra="games")
    vertex, _, value = zero_sum_lp(matrix)
    payoffs = matrix.detach().to("cpu", torch.float64).numpy()
    spread = payoffs.max() - payoffs.min()
    if spread == 0:
        return torch.full_like(vertex, 1 / len(vertex))
    slack = (payoffs - value) / spread  # x is optimal where x @ slack >= 0
    rows, columns = slack.shape
    # over the cone of optima z = s x: maximise the number of positive z_i and (z @ slack)_j, each counted up to 1
    parts = np.hstack([np.eye(rows), slack])
    try:
        found = _linprog(
            np.append(np.zeros(rows), -np.ones(rows + columns)),
            A_ub=np.vstack(
                [
                    np.hstack([-slack.T, np.zeros((columns, rows + columns))]),
                    np.hstack([-parts.T, np.eye(rows + columns)]),
                ]
            ),
            b_ub=np.zeros(rows + 2 * columns),
            bounds=[(0, 1e7)] * rows + [(0, 1)] * (rows + columns),  # bounded, or HiGHS may call the cone unbounded
        ).x[rows:]
    except RuntimeError:  # ill-conditioned, as at the end
        return vertex
    support, loose = found[:rows] > 0.5, found[rows:] > 0.5
    a = slack[support]

    def mixture(multipliers: np.ndarray) -> np.ndarray:
        logits = a @ multipliers
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def dual(multipliers: np.ndarray) -> tuple[float, np.ndarray]:
        logits = a @ multipliers
        top = logits.max()
        return top + np.log(np.exp(logits - top).sum()), mixture(multipliers) @ a

    bounds = [(0, None) if free else (None, None) for free in loose]
    settings = {"maxiter": 50 * iterations, "ftol": 1e-15, "gtol": 1e-10}
    guess = optimize.minimize(dual, np.zeros(columns), jac=True, method="L-BFGS-B", bounds=bounds, options=settings).x
    binding = ~loose | (guess > 1e-7)
    guess = np.where(binding, guess, 0.0)
    for _ in range(iterations):
        x = mixture(guess)
        residual = x @ a[:, binding]
        if np.abs(residual).max(initial=0.0) < 1e-13:
            break
        centred = a[:, binding] - residual
        guess[binding] -= np.linalg.pinv((centred * x[:, None]).T @ centred, rcond=1e-10, hermitian=True) @ residual
    full = np.zeros(rows)
    full[support] = mixture(guess)
    missed = -float((full @ slack).min()) * spread
    if not missed < 1e-8 * max(
        1.0, spread
    ):  # ill-conditioned: an exact vertex is worth more than a spread-out near miss
        return vertex
    return torch.from_numpy(full)


# -- solvers that configs name -----------------------------------------------------------------------------------------
class MetaSolver(ABC):
    """``solver(payoffs [players, members_0, ...])`` -> a mixture ``[members_i]`` of each player, float64."""

    @abstractmethod
    def __call__(self, payoffs: Tensor) -> list[Tensor]: ...

    def symmetric(self, matrix: Tensor) -> Tensor:
        """One mixture ``[members]`` for both players of the symmetric game with row payoffs ``matrix``.

        The mean of the two players' mixtures. Its gap in a zero-sum game is no larger than theirs together.
        """
        row, column = self(torch.stack([matrix, matrix.T]))
        return (row + column) / 2


def solve_symmetric(solver: MetaSolver, payoffs: Tensor) -> Tensor:
    """The mixture ``[members]`` of the one population of a symmetric zero-sum game.

    Args:
        solver: any meta-solver.
        payoffs: ``[2, members, members]``, or the rows' ``[members, members]``.

    Raises:
        ValueError: payoffs that are not square and antisymmetric, or not finite.
    """
    matrix = payoffs if payoffs.ndim == 2 else payoffs[0]
    owner = type(solver).__name__
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{owner}: payoff matrix must be square and antisymmetric, got {tuple(payoffs.shape)}")
    matrix = validate_payoffs(torch.stack([matrix, matrix.T]), owner)[0]
    apart = float((matrix + matrix.T).abs().max())
    if apart > TOLERANCE * max(1.0, float(matrix.abs().max())):
        raise ValueError(f"{owner}: payoff matrix must be square and antisymmetric (max |M+M^T| = {apart:.3g})")
    return solver.symmetric((matrix - matrix.T) / 2)


class NashLP(MetaSolver):
    """Exact Nash equilibrium of a two-player zero-sum meta-game by linear programming (scipy, HiGHS).

    Args:
        selection: where equilibria are many, ``"vertex"`` (the simplex method's) or ``"max_entropy"``.

    Raises:
        ValueError: unknown selection; at the call, a game that is not two-player zero-sum.
    """

    def __init__(self, selection: str = "vertex") -> None:
        if selection not in ("vertex", "max_entropy"):
            raise ValueError(f"NashLP: selection: must be vertex or max_entropy, got {selection!r}")
        self.selection = selection

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        matrix = zero_sum_matrix(payoffs, "NashLP")
        if self.selection == "max_entropy":
            return [max_entropy_lp(matrix), max_entropy_lp(-matrix.T)]
        return list(zero_sum_lp(matrix)[:2])

    def symmetric(self, matrix: Tensor) -> Tensor:
        return max_entropy_lp(matrix) if self.selection == "max_entropy" else zero_sum_lp(matrix)[0]


class RegretMatching(MetaSolver):
    """RM+, alternating, linearly averaged (Tammelin et al. 2015), for zero-sum tables too large for an LP.

    Args:
        iterations: most updates of each player, >= 1.
        gap: stop when the averages' duality gap (NashConv in the meta-game) is at most this, >= 0.
        check_every: updates between looks at the gap.

    Raises:
        ValueError: an argument out of range; at the call, a game that is not two-player zero-sum.
    """

    def __init__(self, iterations: int = 10_000, gap: float = 1e-4, check_every: int = 50) -> None:
        _check_positive("RegretMatching", iterations=iterations, check_every=check_every)
        _check_not_negative("RegretMatching", gap=gap)
        self.iterations, self.gap, self.check_every = iterations, gap, check_every

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        matrix = zero_sum_matrix(payoffs, "RegretMatching").numpy()
        transposed = np.ascontiguousarray(matrix.T)
        rows, columns = matrix.shape
        x, y = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
        row_regret, column_regret = np.zeros(rows), np.zeros(columns)
        row_sum, column_sum = np.zeros(rows), np.zeros(columns)
        for step in range(1, self.iterations + 1):
            values = matrix @ y
            row_regret = np.maximum(row_regret + values - x @ values, 0.0)
            x = _match(row_regret)
            values = -(transposed @ x)
            column_regret = np.maximum(column_regret + values - y @ values, 0.0)
            y = _match(column_regret)
            row_sum += step * x
            column_sum += step * y
            if step % self.check_every == 0:
                best = (matrix @ column_sum).max() - (transposed @ row_sum).min()
                if best <= self.gap * step * (step + 1) / 2:
                    break
        return [torch.from_numpy(_simplex(row_sum)), torch.from_numpy(_simplex(column_sum))]


class FictitiousPlay(MetaSolver):
    """Fictitious play (Brown 1951), simultaneous, any number of players: best replies to the others' averages.

    Keeps averages and their payoffs only, so an update of two players costs O(members). Ties go to the first member.

    Args:
        iterations: most updates, >= 1.
        gap: stop when NashConv in the meta-game is at most this, >= 0 (it need not fall for general-sum games).
        init: ``"uniform"`` or ``"first"``: the strategy that stands for the first play.
        check_every: updates between looks at the gap.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, iterations: int = 1000, gap: float = 0.0, init: str = "uniform", check_every: int = 50) -> None:
        _check_positive("FictitiousPlay", iterations=iterations, check_every=check_every)
        _check_not_negative("FictitiousPlay", gap=gap)
        if init not in ("uniform", "first"):
            raise ValueError(f"FictitiousPlay: init: must be uniform or first, got {init!r}")
        self.iterations, self.gap, self.init, self.check_every = iterations, gap, init, check_every

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        payoffs = validate_payoffs(payoffs, "FictitiousPlay")
        sizes = payoffs.shape[1:]
        plays = [np.full(k, 1 / k) if self.init == "uniform" else np.eye(k)[0] for k in sizes]
        tables = payoffs.numpy()
        two = len(sizes) == 2
        # sums over past plays of each member's payoff: for two players a column is added, else they are recomputed
        totals = [_deviation(tables[i], plays, i) for i in range(len(sizes))]
        columns = [np.ascontiguousarray(tables[0].T), tables[1]] if two else []
        for step in range(1, self.iterations + 1):
            if step % self.check_every == 0 and sum(
                v.max() - p @ v / step for p, v in zip(plays, totals, strict=True)
            ) <= self.gap * (step if two else 1):
                break
            replies = [int(v.argmax()) for v in totals]
            for play, reply in zip(plays, replies, strict=True):
                play[reply] += 1.0
            if two:
                totals[0] += columns[0][replies[1]]
                totals[1] += columns[1][replies[0]]
            else:
                totals = [_deviation(tables[i], [p / p.sum() for p in plays], i) for i in range(len(sizes))]
        return [torch.from_numpy(_simplex(play)) for play in plays]


class ProjectedReplicator(MetaSolver):
    """Projected replicator dynamics (Lanctot et al. 2017, section 3.1), averaged over the run; any number of players.

    x <- projection of x + dt * x * (payoffs - x . payoffs) onto the simplex with every entry >= ``floor``.

    Args:
        dt: step size per unit of payoff, > 0.
        floor: least probability of a member (gamma in the paper), >= 0; lowered to 1 / members where it would not fit.
        iterations: steps, >= 1; 50,000 take about a second.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dt: float = 1e-3, floor: float = 1e-6, iterations: int = 50_000) -> None:
        _check_positive("ProjectedReplicator", dt=dt, iterations=iterations)
        _check_not_negative("ProjectedReplicator", floor=floor)
        self.dt, self.floor, self.iterations = dt, floor, iterations

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        tables = validate_payoffs(payoffs, "ProjectedReplicator").numpy()
        sizes = tables.shape[1:]
        plays = [np.full(k, 1 / k) for k in sizes]
        sums = [play.copy() for play in plays]
        floors = [min(self.floor, 1 / k) for k in sizes]
        players = range(len(sizes))
        for _ in range(self.iterations):
            values = [_deviation(tables[i], plays, i) for i in players]
            for i in players:
                play = plays[i]
                play = play + self.dt * play * (values[i] - play @ values[i])
                play += (1 - play.sum()) / len(play)  # rounding errors of the sum would grow where payoffs are < 0
                if play.min() < floors[i]:  # else the projection is the identity
                    play = project_simplex(play, floors[i])
                plays[i] = play
                sums[i] += play
        return [torch.from_numpy(_simplex(total)) for total in sums]


class Uniform(MetaSolver):
    """All members alike: with best responses as oracle this is fictitious self-play; any number of players."""

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        sizes = validate_payoffs(payoffs, "Uniform").shape[1:]
        return [torch.full((k,), 1 / k, dtype=torch.float64) for k in sizes]


class Last(MetaSolver):
    """The newest member alone: self-play; any number of players."""

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        sizes = validate_payoffs(payoffs, "Last").shape[1:]
        return [torch.eye(k, dtype=torch.float64)[-1].clone() for k in sizes]


class SoftmaxPayoff(MetaSolver):
    """Softmax of a member's mean payoff over all profiles of the others ("exponential"); any number of players.

    Args:
        temperature: in units of payoff, > 0; towards 0 it picks the best member, towards infinity it is uniform.

    Raises:
        ValueError: temperature <= 0.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        _check_positive("SoftmaxPayoff", temperature=temperature)
        self.temperature = temperature

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        payoffs = validate_payoffs(payoffs, "SoftmaxPayoff")
        uniform = Uniform()(payoffs)
        return [
            torch.softmax(deviation_payoffs(payoffs, uniform, i) / self.temperature, dim=0) for i in range(len(uniform))
        ]


def rectified_weights(payoffs: Tensor, sigma: Tensor, j: int) -> Tensor:
    """Opponents ``[opponents]`` for the learner of member ``j`` in PSRO_rN (Balduzzi et al. 2019, algorithm 4).

    Those that ``j`` does not lose to, in proportion to their mass in the meta-strategy.

    Args:
        payoffs: ``[members, opponents]``, of the learner's population.
        sigma: ``[opponents]``, the opponents' meta-strategy.
        j: the member.

    Raises:
        ValueError: ``j`` loses to every opponent in the support of ``sigma``.
    """
    weights = torch.where(payoffs[j] >= 0, sigma, torch.zeros_like(sigma)).to(torch.float64)
    total = weights.sum()
    if not bool(total > 0):
        raise ValueError(
            f"rectified_weights: j: member {j} loses to every opponent that sigma plays: train members of sigma only"
        )
    return weights / total


# -- parts -------------------------------------------------------------------------------------------------------------
def project_simplex(point: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """Nearest point of the simplex with every entry >= ``floor`` (``floor * len(point) <= 1``), by sorting."""
    free = 1 - floor * len(point)
    ordered = np.sort(point - floor)[::-1]
    shifts = (np.cumsum(ordered) - free) / np.arange(1, len(point) + 1)
    last = np.flatnonzero(ordered - shifts >= 0)[-1]
    return np.maximum(point - floor - shifts[last], 0.0) + floor


def _match(regret: np.ndarray) -> np.ndarray:
    total = regret.sum()
    return regret / total if total > 0 else np.full(len(regret), 1 / len(regret))


def _deviation(table: np.ndarray, strategies: Sequence[np.ndarray], player: int) -> np.ndarray:
    """As :func:`deviation_payoffs`, of one player's payoffs ``[members_0, ...]``."""
    if table.ndim == 2:
        return table @ strategies[1] if player == 0 else strategies[0] @ table
    for other in range(len(strategies) - 1, -1, -1):
        if other != player:
            table = np.tensordot(table, strategies[other], axes=([other], [0]))
    return table


def _check_positive(owner: str, **values: float) -> None:
    for field, value in values.items():
        if not value > 0:
            raise ValueError(f"{owner}: {field}: must be > 0, got {value}")


def _check_not_negative(owner: str, **values: float) -> None:
    for field, value in values.items():
        if not value >= 0:
            raise ValueError(f"{owner}: {field}: must be >= 0, got {value}")
