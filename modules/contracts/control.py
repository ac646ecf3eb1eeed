"""What modules of continuous control, their data and callbacks meet in: the task, actors, rollouts, attack reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tensordict import TensorDict
from torch import Tensor

Carry = dict[str, Tensor]
"""What an actor remembers between steps: tensors ``[envs, ...]``."""


@dataclass(frozen=True)
class ControlSpec:
    """What a module must know of a control task before it can build networks.

    ``action_low``, ``action_high``: bounds that executed actions are clipped to, infinite where there are none.
    ``parameters``: names of the dynamics parameters that can be perturbed. ``discrete``: the task has finitely many
    actions, and ``action_size`` counts them. ``safe``: (coordinate of the observation, least, greatest): all of them
    hold in the task's safe set, which must not be left once the state was in it for ``settle`` steps on end; empty:
    none is known. ``fails``: an episode that terminates has failed.
    """

    task: str
    observation_size: int
    action_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    episode_limit: int
    parameters: tuple[str, ...] = ()
    discrete: bool = False
    safe: tuple[tuple[int, float, float], ...] = ()
    settle: int = 1
    fails: bool = False


@dataclass
class ControlStep:
    """What an actor does in one step of all environments.

    Args:
        action: ``[envs, action_size]``, executed as it is.
        parameters: ``[envs, parameters]``, each the relative change of a dynamics parameter, 0 for none; or ``None``.
        carry: for the next step.
        record: kept in the rollout, each ``[envs, ...]``.
    """

    action: Tensor
    parameters: Tensor | None
    carry: Carry
    record: Mapping[str, Tensor] = field(default_factory=dict)


class ControlActor(Protocol):
    """Acts in many environments at once, for one request. Its random numbers are handed to it, so that equal calls in
    order give equal results.

    ``noise_parts``: standard normal numbers that each of its players takes per environment and step; a player's do not
    depend on how many the others take. ``draws``: uniform numbers in [0, 1) that it takes per environment and episode.
    """

    noise_parts: tuple[int, ...]
    draws: int

    def begin(self, envs: int) -> Carry:
        """The carry before any step."""
        ...

    def act(
        self, observation: Tensor, carry: Carry, fresh: Tensor | None, draw: Tensor, noise: Tensor, group: Tensor | None
    ) -> ControlStep:
        """One step.

        Args:
            observation: ``[envs, observation_size]``, the true one.
            carry: as :meth:`begin` or the step before gave it.
            fresh: bool ``[envs]``, environments whose episode begins here; ``None``: none.
            draw: ``[envs, draws]``, the episode's numbers.
            noise: ``[envs, sum(noise_parts)]``, part after part.
            group: int64 ``[envs]`` in evaluation, the group that the episode belongs to; ``None`` in training.
        """
        ...


@dataclass(frozen=True)
class RolloutRequest:
    """Steps of environments that go on from request to request.

    Args:
        actor: acts.
        stream: names the environments; each name has its own.
        key: where it is new, the stream's environments start afresh. Random numbers depend on the run's seed, the key,
            the chunk's number and the environment alone.
        number: of the chunk within the key, from 0.
        gamma: also record ``discounted_return``, the sum of an episode's rewards so far, each discounted by its age;
            ``None``: do not.
        seed: in place of the run's; this rank then steps all environments by itself, and nothing of them is kept in
            checkpoints.
    """

    actor: ControlActor
    stream: str
    key: tuple[int, ...]
    number: int
    gamma: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class EpisodesRequest:
    """Whole episodes, one in each copy of the environment.

    Args:
        actor: acts.
        groups: kinds of episodes (a cell of a payoff table each).
        episodes: per group, over all ranks. Episode ``i`` of every group begins alike and draws the same numbers.
        key: as in :class:`RolloutRequest`.
        trace: keep ``trace`` episodes of the first group step by step.
        seed: in place of the run's; this rank then plays all episodes by itself.
    """

    actor: ControlActor
    groups: int
    episodes: int
    key: tuple[int, ...]
    trace: int = 0
    seed: int | None = None


@runtime_checkable
class ProvidesRollouts(Protocol):
    """A datamodule of control environments. ``envs`` and ``frames_per_batch`` count over all ranks."""

    spec: ControlSpec
    envs: int
    frames_per_batch: int

    def rollout(self, request: RolloutRequest) -> TensorDict:
        """This rank's environments, ``[envs / ranks, steps]``.

        Keys: ``observation``, ``next_observation`` (of the same episode, also at its end) ``[.., observation_size]``,
        ``reward``, ``terminated``, ``truncated``, ``fresh`` (an episode's first step) ``[..]``, ``return_so_far`` (of
        the episode, undiscounted) float64, what the actor recorded, and ``discounted_return`` if asked for. The first
        row is environment ``rank * envs / ranks``.
        """
        ...

    def episodes(self, request: EpisodesRequest) -> TensorDict:
        """This rank's share ``[groups, episodes / ranks]``: ``episode_return`` float64, ``episode_length`` int64,
        and for every key of the actor's record that begins with ``max_`` the largest value of the episode.

        With ``trace``, ``("trace", ...)`` of the first group: everything recorded, ``observation`` (before the step),
        ``executed`` (the action), ``reward`` and ``running`` ``[groups, episodes / ranks, steps, ...]`` (rows beyond
        ``trace`` and other groups hold zeros).
        """
        ...


@runtime_checkable
class ScalesReturns(Protocol):
    """A datamodule of a control task that knows what a good return is."""

    reference_return: float | None
    """Of a very good policy, undisturbed; ``None``: play :meth:`reference_action`, where there is one."""

    def reference_action(self, observation: Tensor) -> Tensor | None:
        """Actions ``[rows, action_size]`` of a hand-made controller for ``observation`` ``[rows, observation_size]``;
        ``None``: the task has none."""
        ...


@runtime_checkable
class RequestsRollouts(Protocol):
    """A module that says which rollout its next training step needs.

    The batch is the rollout, or an empty TensorDict where the request is ``None``. ``total_steps``: training steps of
    the whole run.
    """

    total_steps: int

    def rollout_request(self) -> RolloutRequest | None: ...


@runtime_checkable
class EvaluatesAttacks(Protocol):
    """A module that evaluates itself attack by attack: one batch of evaluation data each, an index alone."""

    def evaluation_names(self, stage: str) -> Sequence[str]:
        """What is evaluated in ``val`` or ``test``, in order."""
        ...


@runtime_checkable
class ReportsAttacks(Protocol):
    """A module that shows its last evaluation under attacks, for files and figures."""

    def attack_report(self) -> Mapping[str, Any]:
        """Plain values: ``attacks`` (rows with ``attack``, its full name, ``name``, ``coupled``, ``episodes``,
        ``return_mean``, ``return_std``, ``return_se``, ``length_mean``, ``linf``, ``step_linf``, ``runs`` tried,
        ``frames`` spent), ``stage``, ``task``, ``natural``, ``worst_case``,
        ``worst_attack``, ``perturbation`` (its settings), ``flags`` (lines), and ``traces``: name ->
        perturbation ``[steps, size]`` of one episode."""
        ...
