"""What a config says of a value-based multi-agent learner, checked where it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


def check_least(owner: str, **limits: tuple[float, float]) -> None:
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{owner}: {name} must be >= {least:g}, got {value}")


def check_kinds(settings: object) -> None:
    """Literal fields against their alternatives: a misspelt one made in Python would pass for another."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            raise ValueError(
                f"{type(settings).__name__}: {name} must be one of {', '.join(map(str, get_args(hint)))}, "
                f"got '{getattr(settings, name)}'"
            )


@dataclass
class Ensemble:
    """Members of the ensemble and what keeps them apart.

    Args:
        size: K; 1 is the base algorithm.
        separate_batches: every member learns from a minibatch of its own.
        bootstrap_p: probability that a member ever learns from a stored item (Osband et al. 2016); 1: always.
        prior_scale: weight of a frozen random network added to each member (Osband et al. 2018); 0: none.
    """

    size: int = 1
    separate_batches: bool = True
    bootstrap_p: float = 1.0
    prior_scale: float = 0.0

    def __post_init__(self) -> None:
        check_least("Ensemble", size=(self.size, 1), prior_scale=(self.prior_scale, 0.0))
        if not 0.0 < self.bootstrap_p <= 1.0:
            raise ValueError(f"Ensemble: bootstrap_p must be in (0, 1], got {self.bootstrap_p}")


@dataclass
class Explorer:
    """How actions are chosen while training, each agent for itself.

    ``ucb`` takes ``argmax mean + beta * std`` over members (EMAX), ``epsilon_greedy`` the greatest mean,
    ``thompson_member`` the greatest utility of one member drawn per episode, ``boltzmann`` draws from the softmax of
    mean / temperature. Around each, a uniformly random available action is taken with probability epsilon, which
    falls linearly from ``epsilon_start`` to ``epsilon_finish`` over ``epsilon_frames`` environment frames.

    Args:
        kind: as above.
        beta: weight of the standard deviation (population form).
        epsilon_start, epsilon_finish: in [0, 1].
        epsilon_frames: environment frames over all ranks.
        temperature: in units of return.
    """

    kind: Literal["epsilon_greedy", "ucb", "thompson_member", "boltzmann"] = "epsilon_greedy"
    beta: float = 1.0
    epsilon_start: float = 1.0
    epsilon_finish: float = 0.05
    epsilon_frames: int = 50_000
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least("Explorer", beta=(self.beta, 0.0), epsilon_frames=(self.epsilon_frames, 1))
        for name in ("epsilon_start", "epsilon_finish"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"Explorer: {name} must be in [0, 1], got {getattr(self, name)}")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature) and math.isfinite(self.beta)):
            raise ValueError(
                f"Explorer: temperature must be > 0 and beta finite, got {self.temperature} and {self.beta}"
            )

    def epsilon(self, frames: int) -> float:
        """Probability of a random action after ``frames`` environment frames."""
        share = min(frames / self.epsilon_frames, 1.0)
        return self.epsilon_start + share * (self.epsilon_finish - self.epsilon_start)


@dataclass
class Target:
    """What the temporal-difference target bootstraps from.

    Args:
        kind: ``own_target``: each member's lagged copy (the base algorithms, K = 1); ``own_online``: each member
            itself; ``mean_online``: the ensemble average without target networks (Schaefer et al. 2025);
            ``mean_target``: the average of the lagged copies.
        reduce: for the mean kinds, the maximum of the averaged utilities, or the average of the members' maxima.
        double_q: choose the next action by the online networks (van Hasselt et al. 2016).
        update_every: optimiser steps between copies into the target networks.
        tau: share of the online parameters that a copy takes over; 1: a hard copy.
    """

    kind: Literal["mean_online", "mean_target", "own_online", "own_target"] = "own_target"
    reduce: Literal["max_of_mean", "mean_of_max"] = "max_of_mean"
    double_q: bool = True
    update_every: int = 200
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least("Target", update_every=(self.update_every, 1))
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"Target: tau must be in (0, 1], got {self.tau}")

    @property
    def lagged(self) -> bool:
        return self.kind.endswith("_target")


@dataclass
class Mixing:
    """How agents' utilities become a joint value.

    Args:
        kind: ``none`` (independent learners), ``vdn`` (sum) or ``qmix`` (monotone network of the state).
        per_member: QMIX's network of each member its own; else one for all.
        embed, hypernet_hidden, hypernet_layers: QMIX's widths and depth.
    """

    kind: Literal["none", "vdn", "qmix"] = "vdn"
    per_member: bool = False
    embed: int = 32
    hypernet_hidden: int = 64
    hypernet_layers: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least("Mixing", embed=(self.embed, 1), hypernet_hidden=(self.hypernet_hidden, 1))


@dataclass
class AgentNetwork:
    """Agents' networks; see :class:`~modules.networks.stacked_agents.StackedAgents`."""

    hidden: int = 64
    recurrent: bool = False
    share_agents: bool = True
    agent_id: bool = True
    output_gain: float = 1.0

    def __post_init__(self) -> None:
        check_least("AgentNetwork", hidden=(self.hidden, 1))
        if not self.output_gain > 0.0:
            raise ValueError(f"AgentNetwork: output_gain must be > 0, got {self.output_gain}")


@dataclass
class Reward:
    """What rewards a learner sees.

    Args:
        scalarise: the team's reward from the agents' (``sum`` or ``mean``; a common reward stays as it is); ``none``:
            each agent its own, for independent learners.
        norm: ``standardise`` subtracts the running mean and divides by the running deviation, ``scale`` only divides.
    """

    scalarise: Literal["sum", "mean", "none"] = "sum"
    norm: Literal["none", "scale", "standardise"] = "none"

    def __post_init__(self) -> None:
        check_kinds(self)


@dataclass
class Clip:
    """Clipping of gradients.

    Args:
        norm: greatest Euclidean norm; ``None``: no clipping.
        scope: ``member``: each member's gradient by itself, a shared mixer by itself; ``global``: all as one vector.
    """

    norm: float | None = 10.0
    scope: Literal["member", "global"] = "member"

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.norm is not None and not self.norm > 0.0:
            raise ValueError(f"Clip: norm must be > 0, got {self.norm}")
