"""How fairly outcomes are shared, and what conduct costs others: inequality, envy, group fairness, collusion.

All functions are pure and batched: the last dimension is the one named in the text, leading dimensions are independent
units. Results are float64. Where a measure has no meaning the result is NaN, never 0 or infinity: a share of nothing,
or of a loss, is neither fair nor unfair. Whoever makes a figure of a NaN states the reason.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def _shares(values: ArrayLike, owner: str) -> tuple[np.ndarray, np.ndarray]:
    """``values`` ``[..., agents]`` float64, and bool ``[...]``: where sharing has a meaning (none negative, not all
    zero)."""
    shares = np.asarray(values, dtype=np.float64)
    if shares.ndim < 1 or shares.shape[-1] < 1:
        raise ValueError(f"{owner}: shares: must be [..., agents] with an agent, got shape {shares.shape}")
    if not np.isfinite(shares).all():
        raise ValueError(f"{owner}: shares: must be finite, got {int((~np.isfinite(shares)).sum())} NaN or infinite")
    return shares, np.asarray((shares >= 0).all(-1) & (shares > 0).any(-1))


def _ratio(above: np.ndarray, below: np.ndarray, meaningful: np.ndarray) -> np.ndarray:
    """``above / below`` where ``meaningful``, else NaN."""
    return np.where(meaningful, above / np.where(meaningful, below, 1.0), np.nan)


# -- inequality of shares [..., agents] --
def gini(shares: ArrayLike) -> np.ndarray:
    """Gini coefficient: mean absolute difference of all pairs over twice the mean; 0 equal, ``1 - 1/n`` all to one.

    Args:
        shares: ``[..., agents]``.

    Returns:
        ``[...]`` in [0, 1 - 1/n]; NaN where a share is negative or all are zero.

    Raises:
        ValueError: no agents, NaN or infinity.
    """
    values, meaningful = _shares(shares, "gini")
    count = values.shape[-1]
    # sum over pairs of |x_i - x_j| is a weighted sum of the sorted values: no [agents, agents] table
    rank = 2.0 * np.arange(1, count + 1) - count - 1.0
    return _ratio((np.sort(values, -1) * rank).sum(-1), count * values.sum(-1), meaningful)


def jain(shares: ArrayLike) -> np.ndarray:
    """Jain's index ``(sum x)^2 / (n sum x^2)`` (Jain et al. 1984): 1 equal, ``1/n`` all to one.

    Args:
        shares: ``[..., agents]``.

    Returns:
        ``[...]`` in [1/n, 1]; NaN where a share is negative or all are zero.

    Raises:
        ValueError: as :func:`gini`.
    """
    values, meaningful = _shares(shares, "jain")
    scaled = _ratio(values, values.max(-1, keepdims=True), meaningful[..., None])  # squares of tiny shares underflow
    return _ratio(scaled.sum(-1) ** 2, values.shape[-1] * (scaled**2).sum(-1), meaningful)


def min_max_ratio(shares: ArrayLike) -> np.ndarray:
    """Smallest share over the largest: 1 equal, 0 where somebody has nothing.

    Args:
        shares: ``[..., agents]``.

    Returns:
        ``[...]`` in [0, 1]; NaN where a share is negative or all are zero.

    Raises:
        ValueError: as :func:`gini`.
    """
    values, meaningful = _shares(shares, "min_max_ratio")
    return _ratio(values.min(-1), values.max(-1), meaningful)


def envy(valuations: ArrayLike) -> np.ndarray:
    """The most that an agent prefers another's share to its own (Foley 1967); 0 exactly where nobody envies.

    Args:
        valuations: ``[..., agents, agents]``, what agent ``i`` (row) thinks agent ``j``'s share (column) is worth.

    Returns:
        ``[...]`` >= 0, in the valuations' unit; negative valuations are fine.

    Raises:
        ValueError: not square, NaN or infinity.
    """
    values = np.asarray(valuations, dtype=np.float64)
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.shape[-1] < 1:
        raise ValueError(f"envy: valuations: must be [..., agents, agents], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("envy: valuations: must be finite, got NaN or infinity")
    own = np.diagonal(values, axis1=-2, axis2=-1)[..., None]
    return (values - own).max((-2, -1))


def common_valuations(shares: ArrayLike) -> np.ndarray:
    """Valuations ``[..., agents, agents]`` of agents who all judge ``shares`` ``[..., agents]`` alike."""
    values, _ = _shares(shares, "common_valuations")
    return np.broadcast_to(values[..., None, :], (*values.shape, values.shape[-1]))


def price_of_fairness(optimal: ArrayLike, fair: ArrayLike) -> np.ndarray:
    """``(optimal - fair) / optimal`` of two total welfares (Bertsimas et al. 2011): what fairness costs all together.

    Args:
        optimal, fair: ``[...]``, broadcast.

    Returns:
        ``[...]``; NaN where the optimal welfare is not positive; negative where the "fair" one is larger, so that the
        other was not optimal.
    """
    best, just = np.broadcast_arrays(np.asarray(optimal, np.float64), np.asarray(fair, np.float64))
    return _ratio(best - just, best, best > 0)


# -- groups --
def _group_rates(positive: np.ndarray, counted: np.ndarray, groups: np.ndarray, owner: str) -> np.ndarray:
    """Share of ``positive`` among the ``counted`` of each group, ``[..., groups]``; NaN for a group with none."""
    names, member = np.unique(groups, return_inverse=True)
    if groups.ndim != 1 or groups.shape[0] != positive.shape[-1]:
        raise ValueError(f"{owner}: groups: must be [{positive.shape[-1]}], one per item, got shape {groups.shape}")
    if len(names) < 2:
        raise ValueError(f"{owner}: groups: needs at least two groups, got {len(names)}")
    one_hot = np.eye(len(names))[member.reshape(-1)]
    below = counted.astype(np.float64) @ one_hot
    return _ratio((positive & counted).astype(np.float64) @ one_hot, below, below > 0)


def _binary(values: ArrayLike, owner: str, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim < 1 or array.shape[-1] < 1:
        raise ValueError(f"{owner}: {name}: must be [..., items] and not empty, got shape {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{owner}: {name}: must be 0 or 1")
    return array.astype(bool)


def demographic_parity_difference(decisions: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """Largest minus smallest share of positive decisions over groups.

    Args:
        decisions: 0 or 1, ``[..., items]``.
        groups: ``[items]``, any labels.

    Returns:
        ``[...]`` in [0, 1].

    Raises:
        ValueError: decisions that are not 0 or 1, one group only, shapes that do not fit.
    """
    owner = "demographic_parity_difference"
    chosen = _binary(decisions, owner, "decisions")
    rates = _group_rates(chosen, np.ones_like(chosen), np.asarray(groups), owner)
    return rates.max(-1) - rates.min(-1)


def equalised_odds_difference(truth: ArrayLike, decisions: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """The larger of the groups' differences in true-positive and in false-positive rate (Hardt et al. 2016).

    Args:
        truth, decisions: 0 or 1, ``[..., items]``, broadcast.
        groups: ``[items]``, any labels.

    Returns:
        ``[...]`` in [0, 1]; NaN where a group has no positive or no negative item, so that a rate is missing.

    Raises:
        ValueError: as :func:`demographic_parity_difference`.
    """
    owner = "equalised_odds_difference"
    true, chosen = np.broadcast_arrays(_binary(truth, owner, "truth"), _binary(decisions, owner, "decisions"))
    names = np.asarray(groups)
    spreads = []
    for counted in (true, ~true):
        rates = _group_rates(chosen, counted, names, owner)
        spreads.append(rates.max(-1) - rates.min(-1))  # NaN stays NaN
    return np.maximum(*spreads)


# -- conduct --
def collusion_gain(joint: ArrayLike, independent: ArrayLike) -> np.ndarray:
    """What two seats win together by playing as one over what they win playing each for itself.

    Args:
        joint, independent: returns ``[..., 2]`` of the two seats, the opponents and the chance moves being the same.

    Returns:
        ``[...]`` in the returns' unit; 0: collusion does not pay.

    Raises:
        ValueError: a last dimension other than 2.
    """
    together, apart = np.asarray(joint, np.float64), np.asarray(independent, np.float64)
    for name, value in (("joint", together), ("independent", apart)):
        if value.ndim < 1 or value.shape[-1] != 2:
            raise ValueError(f"collusion_gain: {name}: must be [..., 2 seats], got shape {value.shape}")
    return together.sum(-1) - apart.sum(-1)


def percent_of_random(counts: ArrayLike, random_counts: ArrayLike) -> np.ndarray:
    """Harm counted as a percentage of what a random agent does (=100; lower is better), as MACHIAVELLI reports it
    (Pan et al. 2023).

    Args:
        counts, random_counts: ``[episodes, ...]`` per episode, of the agent and of the random agent; the numbers of
            episodes may differ.

    Returns:
        ``[...]``: 100 times the ratio of means; NaN where the random agent never does it.

    Raises:
        ValueError: no episodes, a negative or non-finite count.
    """
    means = []
    for name, values in (("counts", counts), ("random_counts", random_counts)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim < 1 or not len(array) or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"percent_of_random: {name}: must be [episodes, ...], finite and >= 0")
        means.append(array.mean(0))
    return 100.0 * _ratio(means[0], means[1], means[1] > 0)
