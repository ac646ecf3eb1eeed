"""Comparison of two methods that were tried on the same items."""

from __future__ import annotations

import math


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: are two methods right equally often on the same items?

    Items that both or neither got right say nothing; of the others, each falls to either side with probability 1/2
    under the null hypothesis, so the p-value is that of a sign test: ``min(1, 2 P(X <= min(b, c)))`` with
    ``X ~ Binomial(b + c, 1/2)`` (McNemar 1947). Exact at any count.

    Args:
        only_first: items that only the first method got right.
        only_second: items that only the second method got right.

    Raises:
        ValueError: a negative count.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"mcnemar_exact: counts must be >= 0, got {only_first} and {only_second}")
    total, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(least + 1))
    return min(1.0, 2 * tail / 2**total)
