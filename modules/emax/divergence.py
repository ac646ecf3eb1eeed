"""When values have left what rewards allow."""

from __future__ import annotations


class DivergenceError(RuntimeError):
    """Training has left the range of values that rewards allow, or is no longer finite."""


def check_size(size: float, largest: float, gamma: float, limit: float) -> None:
    """Hold a mean absolute target against the greatest return that rewards so far allow.

    Args:
        size: the mean absolute target.
        largest: absolute reward seen; 0: none yet, and nothing is checked.
        gamma: discount, below 1.
        limit: how many times ``largest / (1 - gamma)`` the target may be.

    Raises:
        DivergenceError: it is more.
    """
    bound = largest / (1.0 - gamma)
    if largest > 0.0 and size > limit * bound:
        raise DivergenceError(
            f"ValueMARL: mean |target| is {size:.3g}, over {limit:g} times the greatest return that rewards so far "
            f"allow ({bound:.3g}): resume with target.kind: mean_target (or a lower learning_rate), or raise "
            "divergence_limit"
        )
