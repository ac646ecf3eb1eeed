"""How GRAD's population game is played."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PSROSettings:
    """The response-oracle loop of agents and adversaries.

    Args:
        epochs: after the first agent: a best response of each player, the missing payoffs, the meta-game.
        init_frames: environment steps of the first agent's training, over all ranks.
        br_frames: of an agent's best response.
        adversary_frames: of an adversary's best response; ``null``: as many as an agent's.
        eval_episodes: per cell of the payoff table, over all ranks.
        warm_start: a response starts from the ``latest`` member, from the member that does best against the
            opponents' mixture (``best_response_to_sigma``), or from ``scratch``.
        adversary_warm_start: the same for adversaries; ``null``: as agents. From ``scratch`` they differ more.
        response_std: a response's standard deviation is raised to this at its start, to explore; ``null``: not.
        initial_adversary: the first one: ``null`` does nothing, ``random`` is uniform noise.
        tolerance: the run ends once the empirical gap is below it; ``null``: all epochs.

    Raises:
        ValueError: an unknown choice, or a number out of range.
    """

    epochs: int = 20
    init_frames: int = 1_000_000
    br_frames: int = 250_000
    adversary_frames: int | None = None
    eval_episodes: int = 50
    warm_start: Literal["latest", "best_response_to_sigma", "scratch"] = "latest"
    adversary_warm_start: Literal["latest", "best_response_to_sigma", "scratch"] | None = None
    response_std: float | None = None
    initial_adversary: Literal["null", "random"] = "null"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        starts = ("latest", "best_response_to_sigma", "scratch")
        for field, value, choices in (
            ("warm_start", self.warm_start, starts),
            ("adversary_warm_start", self.adversary_warm_start or starts[0], starts),
            ("initial_adversary", self.initial_adversary, ("null", "random")),
        ):
            if value not in choices:
                raise ValueError(f"PSROSettings: {field}: one of {', '.join(choices)}, got {value!r}")
        for field, least in (("epochs", 0), ("init_frames", 1), ("br_frames", 1), ("eval_episodes", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"PSROSettings: {field} must be >= {least}, got {getattr(self, field)}")
        for field in ("adversary_frames", "response_std"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"PSROSettings: {field} must be > 0 or null, got {value}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"PSROSettings: tolerance must be >= 0 or null, got {self.tolerance}")
