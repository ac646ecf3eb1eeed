"""What modules that act for teams and their data meet in when a team is examined: whole episodes on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from tensordict import TensorDict

if TYPE_CHECKING:
    from modules.contracts import ActsMultiAgent, MultiAgentSpec


@dataclass(frozen=True)
class TeamChange:
    """What befalls a team for a whole episode.

    Args:
        missing: how many agents do not act by themselves, drawn anew for each episode.
        kind: what those do: ``idle`` nothing, ``random`` any available action.
        seat: the agent that is missing in every episode, in place of one drawn (``missing`` is then 1).
        noise: standard deviation of normal noise on every feature that agents observe, in units of the feature's own.
        stale: probability, for each agent and step, of seeing once more what it saw in the step before.

    Raises:
        ValueError: a value out of range.
    """

    missing: int = 0
    kind: Literal["idle", "random"] = "random"
    seat: int | None = None
    noise: float = 0.0
    stale: float = 0.0

    def __post_init__(self) -> None:
        if self.missing < 0 or self.noise < 0.0 or not 0.0 <= self.stale <= 1.0:
            raise ValueError(f"TeamChange: missing and noise must be >= 0 and stale in [0, 1], got {self}")
        if self.kind not in ("idle", "random") or (self.seat is not None and self.missing != 1):
            raise ValueError(f"TeamChange: kind must be idle or random, and a seat goes with missing 1, got {self}")


@runtime_checkable
class PlaysTeams(Protocol):
    """A datamodule of one multi-agent task that plays whole episodes on demand, apart from its training."""

    spec: MultiAgentSpec

    @property
    def reference_return(self) -> float | None:
        """Undiscounted team return of a very good team; ``None``: not known."""
        ...

    def team_episodes(self, actor: ActsMultiAgent, episodes: int, seed: int, trace: bool = False) -> TensorDict:
        """One episode in each of ``episodes`` copies, on this rank alone, without exploration.

        Equal seeds give equal starts, whoever acts. TensorDict ``[episodes]``: ``episode_return`` (of the team),
        ``agent_return`` ``[.., agents]``, ``episode_length`` int64. With ``trace`` also ``("trace", ...)``, over the
        steps of the longest episode: ``observation`` ``[.., steps + 1, agents, features]``, ``legal`` likewise (where
        the task restricts actions), ``state`` ``[.., steps + 1, features]`` (where the task has one of its own),
        ``action`` and ``reward`` ``[.., steps, agents]``, ``terminated``, ``truncated`` and ``running`` (the step
        belongs to the episode) ``[.., steps]`` bool.
        """
        ...
