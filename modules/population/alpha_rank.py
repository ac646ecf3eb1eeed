"""Alpha-rank: long-run shares of strategies under mutation and selection (Omidshafiei et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modules.population.meta_solvers import MetaSolver, validate_payoffs


def log_fixation(advantage: Tensor, alpha: float, m: int) -> Tensor:
    """Log-probability that one mutant takes over a population of ``m`` (Fermi process).

    rho = (1 - e^-u) / (1 - e^-mu), u = alpha * advantage, and 1/m at u = 0. In logarithms nothing overflows for large
    ``alpha``, nor do small probabilities become 0 and cut the chain in pieces.

    Args:
        advantage: any shape, mutant's payoff minus resident's.
        alpha: selection intensity per unit of payoff.
        m: population size.
    """
    u = alpha * advantage
    size = u.abs()
    safe = size.clamp(min=1e-12)  # at u -> 0 the ratio is 1/m + O(u): the clamp costs less than rounding does
    ratio = torch.log(-torch.expm1(-safe)) - torch.log(-torch.expm1(-m * safe))
    ratio = torch.where(size < 1e-12, torch.full_like(u, -math.log(m)), ratio)
    return ratio - (m - 1) * (-u).clamp(min=0)


def log_stationary(log_rates: Tensor) -> Tensor:
    """Log of the stationary distribution ``[n]`` of an irreducible chain, from log transition rates ``[n, n]``.

    Elimination of states one by one (Grassmann, Taksar and Heyman 1985): sums, products and quotients of positive
    numbers only, so that it loses no digits and runs in logarithms over any range of rates. O(n^3 / 3).

    Args:
        log_rates: ``[n, n]`` float64, from row to column, -inf where there is no transition; the diagonal is ignored.
    """
    rates = log_rates.clone()
    n = rates.shape[0]
    rates.fill_diagonal_(-torch.inf)
    for state in range(n - 1, 0, -1):
        leave = torch.logsumexp(rates[state, :state], dim=0)
        rates[:state, state] -= leave
        through = rates[:state, state, None] + rates[None, state, :state]
        rates[:state, :state] = torch.logaddexp(rates[:state, :state], through)
    weights = torch.zeros(n, dtype=rates.dtype)
    for state in range(1, n):
        weights[state] = torch.logsumexp(weights[:state] + rates[:state, state], dim=0)
    return weights - torch.logsumexp(weights, dim=0)


class AlphaRank(MetaSolver):
    """Shares of members in the stationary distribution of the mutation-selection chain; any number of players.

    Several populations: the chain runs over profiles, a step changes one player's member, and the mixtures are the
    marginals. Symmetric games (:meth:`symmetric`): one population, local selection (a mutant meets residents).

    Args:
        alpha: selection intensity per unit of payoff, > 0; large values rank by who beats whom.
        m: individuals in a population, >= 2.
        max_profiles: largest chain; memory is its square times 8 bytes, time its cube.

    Raises:
        ValueError: an argument out of range; at the call, more profiles than ``max_profiles``.
    """

    def __init__(self, alpha: float = 100.0, m: int = 50, max_profiles: int = 2048) -> None:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"AlphaRank: alpha: must be finite and > 0, got {alpha}")
        if m < 2:
            raise ValueError(f"AlphaRank: m: must be >= 2, got {m}")
        if max_profiles < 1:
            raise ValueError(f"AlphaRank: max_profiles: must be >= 1, got {max_profiles}")
        self.alpha, self.m, self.max_profiles = alpha, m, max_profiles

    def __call__(self, payoffs: Tensor) -> list[Tensor]:
        joint = self.profiles(payoffs)
        players = range(joint.ndim)
        return [joint.sum(dim=[j for j in players if j != i]) if joint.ndim > 1 else joint for i in players]

    def profiles(self, payoffs: Tensor) -> Tensor:
        """Stationary distribution ``[members_0, members_1, ...]`` over profiles.

        Raises:
            ValueError: more profiles than ``max_profiles``, or payoffs that :func:`validate_payoffs` refuses.
        """
        payoffs = validate_payoffs(payoffs, "AlphaRank")
        sizes = payoffs.shape[1:]
        count = math.prod(sizes)
        self._check_size(count)
        index = torch.arange(count).reshape(sizes)
        rates = torch.full((count, count), -torch.inf, dtype=torch.float64)
        for player, k in enumerate(sizes):
            here = index.movedim(player, -1).reshape(-1, k)  # rows: the others' profile; columns: own member
            value = payoffs[player].movedim(player, -1).reshape(-1, k)
            rows, columns = here[:, :, None].expand(-1, k, k), here[:, None, :].expand(-1, k, k)
            rates[rows, columns] = log_fixation(value[:, None, :] - value[:, :, None], self.alpha, self.m)
        return log_stationary(rates).exp().reshape(sizes)

    def symmetric(self, matrix: Tensor) -> Tensor:
        matrix = validate_payoffs(torch.stack([matrix, matrix.T]), "AlphaRank")[0]
        self._check_size(matrix.shape[0])
        # from resident s to mutant r: the mutant gets M[r, s], the resident M[s, r]
        return log_stationary(log_fixation(matrix.T - matrix, self.alpha, self.m)).exp()

    def _check_size(self, count: int) -> None:
        if count > self.max_profiles:
            raise ValueError(
                f"AlphaRank: payoffs: at most max_profiles = {self.max_profiles} profiles, got {count}: raise it "
                "or choose another meta-solver"
            )
