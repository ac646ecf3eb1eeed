"""Normal-form games made in process, without data: the matrix games of the PSRO literature and small bimatrix games.

Random ones are drawn by ``numpy.random.default_rng(seed)`` in float64, so that a seed means the same game everywhere.
``[n, n]`` tables hold what the row strategy wins from the column strategy.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from datamodules.games.normal_form import NormalFormGame, from_antisymmetric, from_bimatrix


def rock_paper_scissors() -> NormalFormGame:
    """Rock, paper, scissors, in this order: win 1, lose 1; value 0, the only equilibrium is uniform."""
    return _symmetric(np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]), "rock_paper_scissors")


def disc(n: int = 300, seed: int = 0) -> NormalFormGame:
    """Points uniform in the unit disc; payoff is the cross product ``x_0 y_1 - x_1 y_0`` (Balduzzi et al. 2019).

    Purely cyclic: nothing is better than everything, and strength is the distance from the centre.
    """
    generator = _generator("disc", n, seed)
    radius, angle = np.sqrt(generator.random(n)), 2 * np.pi * generator.random(n)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    return _symmetric(np.outer(x, y) - np.outer(y, x), f"disc(n={n}, seed={seed})")


def elo(n: int = 300, seed: int = 0) -> NormalFormGame:
    """Win probabilities of standard-normal ratings ``r``, antisymmetrised: ``2 sigmoid(r_a - r_b) - 1``; transitive."""
    return _symmetric(_elo(_generator("elo", n, seed), n), f"elo(n={n}, seed={seed})")


def elo_plus_noise(n: int = 300, seed: int = 0, noise: float = 0.5) -> NormalFormGame:
    """:func:`elo` of the same seed plus ``noise (W - W^T) / 2`` with standard-normal ``W`` (Czarnecki et al. 2020)."""
    generator = _generator("elo_plus_noise", n, seed)
    if not (np.isfinite(noise) and noise >= 0):
        raise ValueError(f"elo_plus_noise: noise: must be finite and >= 0, got {noise}")
    table = _elo(generator, n)
    w = generator.standard_normal((n, n))
    return _symmetric(table + noise * (w - w.T) / 2, f"elo_plus_noise(n={n}, seed={seed}, noise={noise})")


def transitive(n: int = 300, seed: int = 0) -> NormalFormGame:
    """Rating differences ``r_a - r_b`` of standard-normal ratings, divided by the largest."""
    ratings = _generator("transitive", n, seed).standard_normal(n)
    return _symmetric(_normalised(ratings[:, None] - ratings[None, :]), f"transitive(n={n}, seed={seed})")


def triangular(n: int = 300) -> NormalFormGame:
    """Every strategy beats all before it by 1 (a triangle of ones): self-play's best case; the last is the answer."""
    _check_size("triangular", n)
    order = np.arange(n)
    return _symmetric(np.sign(order[:, None] - order[None, :]), f"triangular(n={n})")


def random_game_of_skill(n: int = 300, seed: int = 0) -> NormalFormGame:
    """``(W - W^T)/2 + s 1^T - 1 s^T``, divided by its largest absolute entry (Czarnecki et al. 2020).

    ``W`` ``[n, n]`` is drawn first, then ``s`` ``[n]``, both standard normal. It stands in for AlphaStar888 (PSD-PSRO,
    NeurIPS 2023, section 4) where that table is not at hand.
    """
    generator = _generator("random_game_of_skill", n, seed)
    w = generator.standard_normal((n, n))
    s = generator.standard_normal(n)
    table = (w - w.T) / 2 + (s[:, None] - s[None, :])  # in this order rounding keeps it exactly antisymmetric
    return _symmetric(_normalised(table), f"random_game_of_skill(n={n}, seed={seed})")


def blotto_splits(coins: int, fields: int) -> np.ndarray:
    """All ways ``[splits, fields]`` to place ``coins`` on ``fields``, lexicographic: first ``(0, ..., coins)``."""
    bars = np.array(list(itertools.combinations(range(coins + fields - 1), fields - 1)), dtype=np.int64)
    edges = np.pad(bars.reshape(-1, fields - 1), ((0, 0), (1, 1)), constant_values=(-1, coins + fields - 1))
    return np.diff(edges, axis=1) - 1


def blotto(coins: int = 10, fields: int = 4, max_strategies: int = 5_000) -> NormalFormGame:
    """Colonel Blotto: fields won minus fields lost, divided by the largest absolute entry.

    10 coins on 4 fields make 286 pure strategies, 5 on 4 make 56, 10 on 3 make 66, 10 on 5 make 1001.
    """
    for field, value, least in (("coins", coins, 1), ("fields", fields, 2)):
        if value < least:
            raise ValueError(f"blotto: {field}: must be >= {least}, got {value}")
    count = 1
    for k in range(1, fields):
        count = count * (coins + k) // k
        if count > max_strategies:
            raise ValueError(
                f"blotto: coins, fields: {coins}, {fields} make more than max_strategies={max_strategies} pure "
                "strategies: take fewer, or raise max_strategies"
            )
    splits = blotto_splits(coins, fields)
    table = np.zeros((len(splits), len(splits)))
    for field in range(fields):  # a field at a time: a [splits, splits, fields] block would not be small
        table += np.sign(splits[:, None, field] - splits[None, :, field])
    return _symmetric(_normalised(table), f"blotto(coins={coins}, fields={fields})")


def prisoners_dilemma() -> NormalFormGame:
    """Cooperate, defect: defecting dominates, both cooperating is better for both; general-sum, symmetric."""
    row = torch.tensor([[5.0, 0.0], [10.0, 1.0]])
    return from_bimatrix(row, row.T, "prisoners_dilemma")


def battle_of_sexes() -> NormalFormGame:
    """Two players who want to meet, each at the own place: 3 and 2 there, 0 apart; mixed equilibrium (3/5, 2/5)."""
    return from_bimatrix(
        torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), "battle_of_sexes"
    )


def chicken() -> NormalFormGame:
    """Dare, swerve: both daring is worst; two asymmetric pure equilibria and a mixed one (1/2, 1/2); symmetric."""
    row = torch.tensor([[0.0, 4.0], [1.0, 3.0]])
    return from_bimatrix(row, row.T, "chicken")


def _check_size(name: str, n: int) -> None:
    if n < 2:
        raise ValueError(f"{name}: n: must be >= 2, got {n}")


def _generator(name: str, n: int, seed: int) -> np.random.Generator:
    _check_size(name, n)
    if seed < 0:
        raise ValueError(f"{name}: seed: must be >= 0, got {seed}")
    return np.random.default_rng(seed)


def _elo(generator: np.random.Generator, n: int) -> np.ndarray:
    ratings = generator.standard_normal(n)
    return np.tanh((ratings[:, None] - ratings[None, :]) / 2)  # = 2 sigmoid - 1


def _normalised(table: np.ndarray) -> np.ndarray:
    largest = np.abs(table).max()
    return table / largest if largest > 0 else table


def _symmetric(table: np.ndarray, name: str) -> NormalFormGame:
    return from_antisymmetric(torch.from_numpy(table.astype(np.float64)), name)
