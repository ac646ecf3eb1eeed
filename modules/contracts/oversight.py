"""What learners and the data of oversight worlds meet in: the world, its dynamics, steps and evaluation episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tensordict import TensorDict
from torch import Tensor


@dataclass(frozen=True)
class OversightSpec:
    """What a learner must know of an oversight world.

    Environments are ``[arms, learners, copies]``, flattened in this order; a *group* is an arm's learner. All arms see
    the same random numbers and differ only in how often a human override replaces the action.

    Args:
        world: its name.
        num_states, num_actions, observation_size, episode_limit: of the world.
        arms: probability of an override, per step at which one is possible; one entry an arm.
        learners: independent learners in each arm.
        copies: environments of a learner, over all ranks.
        signals: names of what is counted beside the reward and hidden from the learner.
    """

    world: str
    num_states: int
    num_actions: int
    observation_size: int
    episode_limit: int
    arms: tuple[float, ...]
    learners: int
    copies: int
    signals: tuple[str, ...]

    @property
    def groups(self) -> int:
        return len(self.arms) * self.learners


@dataclass(frozen=True)
class OversightDynamics:
    """A world as a table: what is undisturbed and deterministic.

    Args:
        next_state: int64 ``[states, actions]``.
        reward: ``[states, actions]`` float64.
        terminated: bool ``[states, actions]``, no value beyond.
        legal: bool ``[states, actions]``.
        start: ``[states]`` float64, probability that an episode begins there.
        interruptible: bool ``[states]``, an override may be in force.
        reachable: bool ``[states]``, by legal actions from a start, before the end.
        features: ``[states, observation_size]`` float32, what a function approximator sees.
    """

    next_state: Tensor
    reward: Tensor
    terminated: Tensor
    legal: Tensor
    start: Tensor
    interruptible: Tensor
    reachable: Tensor
    features: Tensor


@runtime_checkable
class ActsOnStates(Protocol):
    """A learner that acts by the number of the state."""

    def act(self, state: Tensor, draws: Tensor) -> Tensor:
        """Intended actions int64 ``[groups, copies]``.

        Args:
            state: int64 ``[groups, copies]``, copies of this rank.
            draws: ``[groups, copies]`` float64 in [0, 1), all randomness that it may use.
        """
        ...


@runtime_checkable
class ProvidesOversight(Protocol):
    """A datamodule of an oversight world.

    A training batch is a TensorDict ``[groups, copies, steps]`` of this rank's copies: ``state``, ``executed`` (the
    action that the world took), ``next_state`` (of the same episode, also at its end), ``next_executed`` and
    ``next_intended`` (the action that follows, with and without the override) int64; ``reward`` float32;
    ``terminated`` and ``next_overridden`` (an override is in force in the next state) bool.
    """

    spec: OversightSpec
    dynamics: OversightDynamics
    batches: int
    evaluation_episodes: int

    def episodes(self, policies: Tensor, interruption: Sequence[float], episodes: int, seed: int) -> TensorDict:
        """Episodes of given policies, the same on every rank.

        Args:
            policies: ``[policies, states, actions]``, distributions.
            interruption: probability of an override, for each policy.
            episodes: of each policy; episode ``i`` of all policies begins alike and draws the same numbers.
            seed: of all random numbers.

        Returns:
            TensorDict ``[policies]``: ``episode_return`` (without penalties), ``performance`` and every other signal
            summed over the episode ``[.., episodes]`` float64; ``episode_length``, ``overrides`` and ``obeyed`` (steps
            under an override, and those that executed it) ``[.., episodes]`` int64; ``visits`` ``[.., states]``
            float64, steps that began in a state with no override in force.
        """
        ...
