"""Batched multi-particle environments (Lowe et al. 2017; Mordatch & Abbeel 2018), with the rules of mpe2 1.1.1.

Positions and velocities live in one tensor with the environments last, so that every operation of a step runs over
long contiguous rows; an observation is one difference of two gathers from that tensor.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv

TIME_STEP = 0.1
DAMPING = 0.25
CONTACT_FORCE = 100.0
CONTACT_MARGIN = 1e-3
ACTIONS = 5
"""Stay, left, right, down, up."""
COASTING = TIME_STEP / DAMPING
"""Seconds: a body left alone at velocity v comes to rest after v * COASTING (the sum of a geometric series)."""
_DIRECTIONS = ((0.0, -1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, -1.0, 1.0))  # x and y of each action

PREY_ACCELERATION, PREDATOR_ACCELERATION, DEFAULT_ACCELERATION = 4.0, 3.0, 5.0
_PREY_SPEED, _PREDATOR_SPEED = 1.3, 1.0


@functools.cache
def _directions(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pushes ``[2, actions]``, copied to the device once."""
    return torch.tensor(_DIRECTIONS, dtype=dtype, device=device)


def flee(prey: Tensor, prey_velocity: Tensor, predators: Tensor, predator_velocity: Tensor) -> Tensor:
    """Scripted prey: the action after which it would come to rest furthest from where the nearest predator would.

    Every body is taken to coast to rest after this step. The penalty that mpe2 gives prey for leaving the field
    (``max |coordinate| > 0.9``) counts against the distance. The lowest action wins a tie.

    Args:
        prey, prey_velocity: ``[2, prey, envs]``.
        predators, predator_velocity: ``[2, predators, envs]``.

    Returns:
        Actions ``[prey, envs]`` int64.
    """
    pushes = _directions(prey.dtype, prey.device).view(2, 1, ACTIONS, 1) * (PREY_ACCELERATION * TIME_STEP)
    rest = prey.unsqueeze(2) + COASTING * (prey_velocity.unsqueeze(2) + pushes)  # [2, prey, actions, envs]
    threat = predators + COASTING * predator_velocity
    offset = rest.unsqueeze(3) - threat[:, None, None]  # [2, prey, actions, predators, envs]
    distance = offset.square().sum(0).amin(2).sqrt()
    reach = rest.abs()
    outside = torch.where(reach < 1.0, (reach - 0.9) * 10.0, (2.0 * reach - 2.0).exp().clamp(max=10.0)).clamp(min=0.0)
    return (distance - outside.sum(0)).argmax(1)


def approach(adversary: Tensor, velocity: Tensor, agents: Tensor, landmarks: Tensor) -> Tensor:
    """Scripted adversary: heads for the landmark that any agent is nearest to, braking so as to rest on it.

    It never looks at the goal, which mpe2 hides from it. It pushes along the axis on which it would come to rest
    further off, and stays once that is within half of the 0.2 that one push carries it.

    Args:
        adversary, velocity: ``[2, adversaries, envs]``.
        agents: ``[2, agents, envs]``.
        landmarks: ``[2, landmarks, envs]``.

    Returns:
        Actions ``[adversaries, envs]`` int64.
    """
    nearest = (agents.unsqueeze(2) - landmarks.unsqueeze(1)).square().sum(0).amin(0).argmin(0)  # [envs]
    target = landmarks.gather(1, nearest.expand(2, 1, -1))
    offset = target - (adversary + COASTING * velocity)  # [2, adversaries, envs]
    vertical = offset[1].abs() > offset[0].abs()
    along = torch.where(vertical, offset[1], offset[0])
    action = 1 + 2 * vertical.long() + (along > 0).long()
    return action * (along.abs() > 0.5 * DEFAULT_ACCELERATION * TIME_STEP * COASTING).long()


class ParticleEnv(MultiAgentEnv):
    """Physics shared by the scenarios: discs of mass 1 that are pushed, damped and repel each other on contact.

    Bodies are the ``movers`` in mpe2's order and then the landmarks, which do not move. ``controlled`` movers are the
    agents; the others act by a script.

    A subclass gives :meth:`_reward`, the layout of observations by :meth:`_layout` and, if some movers are scripted,
    :meth:`_scripted`.

    Args:
        envs: copies in the batch.
        movers: bodies that move.
        landmarks: bodies that do not.
        controlled: the agents among the movers, consecutive.
        sizes: radius of each mover, then of each landmark.
        accelerations: of each mover per unit of push.
        max_speeds: of each mover, or ``None``: unlimited.
        colliding: how many of the bodies, from the first, collide with movers; 0: none do.
        landmark_range: landmarks start uniformly within plus or minus this; movers within 1.
        with_goal: whether a goal is drawn among the landmarks.
        episode_limit: steps of an episode.
        time_limit: see :class:`MultiAgentEnv`; mpe2 truncates.
        dtype: of positions and velocities; observations and rewards are float32 in any case.
        device, seed: as in :class:`MultiAgentEnv`.
    """

    idle_action = 0

    def __init__(
        self,
        envs: int,
        *,
        movers: int,
        landmarks: int,
        controlled: range,
        sizes: Sequence[float],
        accelerations: Sequence[float],
        max_speeds: Sequence[float] | None,
        colliding: int,
        landmark_range: float = 1.0,
        with_goal: bool = False,
        episode_limit: int = 25,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        dtype: Literal["float32", "float64"] = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"{type(self).__name__}: dtype: float32 or float64, got '{dtype}'")
        self.movers, self.landmarks, self.bodies = movers, landmarks, movers + landmarks
        self._goal_at = 2 * (self.bodies + movers)  # then two columns of the goal, then one of zeros
        zero = self._goal_at + 2 * with_goal
        plus, minus = self._columns(controlled, zero)
        super().__init__(
            envs,
            num_agents=len(controlled),
            num_actions=ACTIONS,
            observation_size=len(plus) // len(controlled),
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        self.controlled = slice(controlled.start, controlled.stop)
        self.scripted = movers - len(controlled)
        self.colliding, self.landmark_range, self.with_goal = colliding, landmark_range, with_goal
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        place = {"device": self.device, "dtype": self.dtype}

        # [columns, envs]: x of every body, y of every body, x and y of movers' velocities, the goal, zeros
        self._columns_first = torch.zeros(zero + 1, envs, **place)
        self.fields["physics"] = self._columns_first.t()
        if with_goal:
            self.fields["goal"] = torch.zeros(envs, dtype=torch.int64, device=self.device)
        self._position = self._columns_first[: 2 * self.bodies].view(2, self.bodies, envs)
        self._velocity = self._columns_first[2 * self.bodies : self._goal_at].view(2, movers, envs)
        self._plus = torch.tensor(plus, device=self.device)
        self._minus = torch.tensor(minus, device=self.device)

        pushes = _directions(self.dtype, self.device).unsqueeze(1) * torch.tensor(accelerations, **place).unsqueeze(1)
        self._push = pushes.flatten(1)  # [2, movers * actions]
        self._push_start = (torch.arange(movers, device=self.device) * ACTIONS).unsqueeze(1)
        self._max_speed = None if max_speeds is None else torch.tensor(max_speeds, **place).unsqueeze(1)
        radius = torch.tensor(sizes, **place)
        contact = radius[:movers, None] + radius[None, :]
        self._contact = contact.unsqueeze(-1)  # [movers, bodies, 1]: distance at which they touch
        oneself = torch.eye(movers, colliding, **place).unsqueeze(-1) if colliding else None
        self._not_oneself = None if oneself is None else CONTACT_FORCE * CONTACT_MARGIN * (1.0 - oneself)
        self._tiny = torch.finfo(self.dtype).tiny

    # -- what a scenario writes ---------------------------------------------------------------------------------------
    @abstractmethod
    def _layout(self, mover: int) -> list[tuple[str, int]]:
        """What ``mover`` observes, in order, as pairs of x and y: ``(what, of whom)`` with what one of ``velocity`` and
        ``position`` (of a mover), ``body`` (a body's position relative to the observer), ``goal`` (likewise) and
        ``zero``."""

    @abstractmethod
    def _reward(self) -> Tensor:
        """Rewards ``[envs, agents]`` float32 for the present positions."""

    def _scripted(self) -> Tensor:
        """Actions ``[scripted, envs]`` int64 of the movers without a policy."""
        raise NotImplementedError

    # -- layout of columns --------------------------------------------------------------------------------------------
    def _columns(self, controlled: range, zero: int) -> tuple[list[int], list[int]]:
        """Columns whose difference is the observations of all agents, side by side."""
        plus, minus = [], []
        for mover in controlled:
            for what, whom in self._layout(mover):
                for axis in (0, 1):
                    here = axis * self.bodies + mover
                    first, second = {
                        "velocity": (2 * self.bodies + axis * self.movers + whom, zero),
                        "position": (axis * self.bodies + whom, zero),
                        "body": (axis * self.bodies + whom, here),
                        "goal": (self._goal_at + axis, here),
                        "zero": (zero, zero),
                    }[what]
                    plus.append(first)
                    minus.append(second)
        return plus, minus

    def _others(self, mover: int) -> list[int]:
        return [other for other in range(self.movers) if other != mover]

    # -- state --------------------------------------------------------------------------------------------------------
    def place(self, position: Tensor, velocity: Tensor, landmarks: Tensor, goal: Tensor | None = None) -> None:
        """Put all copies into given states.

        Args:
            position, velocity: ``[envs, movers, 2]``.
            landmarks: ``[envs, landmarks, 2]``.
            goal: ``[envs]`` int64, index of a landmark; only for scenarios with a goal.
        """
        self._position[:, : self.movers] = position.permute(2, 1, 0).to(self.dtype)
        self._position[:, self.movers :] = landmarks.permute(2, 1, 0).to(self.dtype)
        self._velocity.copy_(velocity.permute(2, 1, 0))
        if goal is not None:
            self.fields["goal"].copy_(goal)
            self._mark_goal()

    def _mark_goal(self) -> None:
        chosen = (self.movers + self.fields["goal"]).expand(2, 1, -1)
        self._columns_first[self._goal_at : self._goal_at + 2] = self._position.gather(1, chosen).squeeze(1)

    def _draw(self, rows: Tensor) -> None:
        place = {"device": self.device, "dtype": self.dtype}
        fresh = torch.rand(2, self.bodies, len(rows), generator=self.generator, **place).mul_(2.0).sub_(1.0)
        fresh[:, self.movers :] *= self.landmark_range
        self._position[:, :, rows] = fresh
        self._velocity[:, :, rows] = 0.0
        if self.with_goal:
            self.fields["goal"][rows] = torch.randint(
                self.landmarks, (len(rows),), generator=self.generator, device=self.device
            )
            self._mark_goal()

    # -- dynamics -----------------------------------------------------------------------------------------------------
    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        joint = actions.t()
        if self.scripted:
            parts = (joint, self._scripted()) if self.controlled.start == 0 else (self._scripted(), joint)
            joint = torch.cat(parts)
        self.move(joint)
        return self._reward(), torch.zeros(self.envs, dtype=torch.bool, device=self.device)

    def move(self, joint: Tensor) -> None:
        """One step of physics under the actions ``[movers, envs]`` int64 of all movers, in mpe2's order."""
        velocity, movers = self._velocity, self.movers
        force = self._push.index_select(1, (joint + self._push_start).flatten()).view(2, movers, self.envs)
        if self._not_oneself is not None:
            offset, distance = self._distances(self.colliding)
            depth = torch.nn.functional.softplus((self._contact[:, : self.colliding] - distance) / CONTACT_MARGIN)
            strength = depth * self._not_oneself / distance.clamp_(min=self._tiny)
            force += (offset * strength).sum(2)
        self._position[:, :movers].add_(velocity, alpha=TIME_STEP)
        velocity.mul_(1.0 - DAMPING).add_(force, alpha=TIME_STEP)
        if self._max_speed is not None:
            velocity.mul_((self._max_speed / velocity.square().sum(0).sqrt()).clamp_(max=1.0))

    def _distances(self, bodies: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Offsets ``[2, movers, bodies, envs]`` from and distances to the bodies from ``start`` up to ``bodies``."""
        offset = self._position[:, : self.movers].unsqueeze(2) - self._position[:, start:bodies].unsqueeze(1)
        return offset, offset.square().sum(0).sqrt()

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        columns = self._columns_first if rows is None else self._columns_first.index_select(1, rows)
        seen = columns.index_select(0, self._plus).sub_(columns.index_select(0, self._minus))
        return seen.t().to(torch.float32).contiguous().view(-1, self.num_agents, self.observation_size)

    def _shared(self, reward: Tensor) -> Tensor:
        """A reward ``[envs]`` for every agent: ``[envs, agents]`` float32."""
        return reward.to(torch.float32).unsqueeze(1).repeat(1, self.num_agents)


class Spread(ParticleEnv):
    """Cover every landmark without collisions (``simple_spread_v3``).

    An agent observes its velocity and position, the landmarks and the other agents relative to itself, and zeros where
    mpe2 has the silent agents' messages: ``6 * agents`` features.

    Its reward is ``(1 - local_ratio)`` times minus the sum over landmarks of the distance of the nearest agent, plus
    ``local_ratio`` times minus the number of agents that it touches.

    Args:
        envs: copies in the batch.
        agents: agents, and as many landmarks.
        local_ratio: in [0, 1]; at 0 all agents get the same reward.
        episode_limit, time_limit, dtype, device, seed: as in :class:`ParticleEnv`.

    Raises:
        ValueError: for fewer than one agent or a ratio outside [0, 1].
    """

    name = "mpe/spread"

    def __init__(
        self,
        envs: int,
        *,
        agents: int = 3,
        local_ratio: float = 0.5,
        episode_limit: int = 25,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        dtype: Literal["float32", "float64"] = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        _at_least(self, 1, agents=agents)
        if not 0.0 <= local_ratio <= 1.0:
            raise ValueError(f"Spread: local_ratio: in [0, 1], got {local_ratio}")
        self.local_ratio = local_ratio
        super().__init__(
            envs,
            movers=agents,
            landmarks=agents,
            controlled=range(agents),
            sizes=[0.15] * agents + [0.05] * agents,
            accelerations=[DEFAULT_ACCELERATION] * agents,
            max_speeds=None,
            colliding=agents,
            episode_limit=episode_limit,
            time_limit=time_limit,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        self.common_reward = local_ratio == 0.0

    def _layout(self, mover: int) -> list[tuple[str, int]]:
        others = self._others(mover)
        return [
            ("velocity", mover),
            ("position", mover),
            *(("body", self.movers + landmark) for landmark in range(self.landmarks)),
            *(("body", other) for other in others),
            *(("zero", other) for other in others),
        ]

    def _reward(self) -> Tensor:
        _, distance = self._distances(self.bodies)
        uncovered = distance[:, self.movers :].amin(0).sum(0)  # [envs]
        if self.common_reward:
            return self._shared(-uncovered)
        touching = (distance[:, : self.movers] < self._contact[:, : self.movers]).sum(1) - 1  # oneself is no contact
        reward = touching.to(self.dtype).mul_(-self.local_ratio).sub_(uncovered, alpha=1.0 - self.local_ratio)
        return reward.t().to(torch.float32).contiguous()


class Tag(ParticleEnv):
    """Predators, the agents, chase faster prey that flees by :func:`flee` (``simple_tag_v3`` with scripted prey).

    A predator observes its velocity and position, the obstacles and the other movers relative to itself, and the
    preys' velocities. Every predator gets 10 for each pair of predator and prey that touch.

    Args:
        envs: copies in the batch.
        predators, prey: movers of each kind.
        obstacles: landmarks that movers bounce off.
        episode_limit, time_limit, dtype, device, seed: as in :class:`ParticleEnv`.

    Raises:
        ValueError: for fewer than one predator or prey, or a negative number of obstacles.
    """

    name = "mpe/tag"
    common_reward = True

    def __init__(
        self,
        envs: int,
        *,
        predators: int = 3,
        prey: int = 1,
        obstacles: int = 2,
        episode_limit: int = 25,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        dtype: Literal["float32", "float64"] = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        _at_least(self, 1, predators=predators, prey=prey)
        _at_least(self, 0, obstacles=obstacles)
        self.predators = predators
        super().__init__(
            envs,
            movers=predators + prey,
            landmarks=obstacles,
            controlled=range(predators),
            sizes=[0.075] * predators + [0.05] * prey + [0.2] * obstacles,
            accelerations=[PREDATOR_ACCELERATION] * predators + [PREY_ACCELERATION] * prey,
            max_speeds=[_PREDATOR_SPEED] * predators + [_PREY_SPEED] * prey,
            colliding=predators + prey + obstacles,
            landmark_range=0.9,
            episode_limit=episode_limit,
            time_limit=time_limit,
            dtype=dtype,
            device=device,
            seed=seed,
        )

    def _layout(self, mover: int) -> list[tuple[str, int]]:
        return [
            ("velocity", mover),
            ("position", mover),
            *(("body", self.movers + obstacle) for obstacle in range(self.landmarks)),
            *(("body", other) for other in self._others(mover)),
            *(("velocity", prey) for prey in range(self.predators, self.movers)),
        ]

    def _scripted(self) -> Tensor:
        bodies, speeds, predators, movers = self._position, self._velocity, self.predators, self.movers
        return flee(bodies[:, predators:movers], speeds[:, predators:], bodies[:, :predators], speeds[:, :predators])

    def _reward(self) -> Tensor:
        _, distance = self._distances(self.movers, self.predators)
        touch = distance[: self.predators] < self._contact[: self.predators, self.predators : self.movers]
        return self._shared(touch.sum((0, 1)) * 10.0)


class Adversary(ParticleEnv):
    """Agents reach the goal landmark while an adversary, scripted by :func:`approach`, guesses which one it is
    (``simple_adversary_v3``).

    An agent observes the goal, the landmarks and the other movers relative to itself. Every agent gets the adversary's
    distance from the goal minus that of the nearest agent.

    Args:
        envs: copies in the batch.
        agents: agents, and as many landmarks; one adversary besides.
        episode_limit, time_limit, dtype, device, seed: as in :class:`ParticleEnv`.

    Raises:
        ValueError: for fewer than one agent.
    """

    name = "mpe/adversary"
    common_reward = True

    def __init__(
        self,
        envs: int,
        *,
        agents: int = 2,
        episode_limit: int = 25,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        dtype: Literal["float32", "float64"] = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        _at_least(self, 1, agents=agents)
        super().__init__(
            envs,
            movers=agents + 1,
            landmarks=agents,
            controlled=range(1, agents + 1),
            sizes=[0.15] * (agents + 1) + [0.08] * agents,
            accelerations=[DEFAULT_ACCELERATION] * (agents + 1),
            max_speeds=None,
            colliding=0,
            with_goal=True,
            episode_limit=episode_limit,
            time_limit=time_limit,
            dtype=dtype,
            device=device,
            seed=seed,
        )

    def _layout(self, mover: int) -> list[tuple[str, int]]:
        return [
            ("goal", 0),
            *(("body", self.movers + landmark) for landmark in range(self.landmarks)),
            *(("body", other) for other in self._others(mover)),
        ]

    def _scripted(self) -> Tensor:
        bodies, movers = self._position, self.movers
        return approach(bodies[:, :1], self._velocity[:, :1], bodies[:, 1:movers], bodies[:, movers:])

    def _reward(self) -> Tensor:
        goal = self._columns_first[self._goal_at : self._goal_at + 2].unsqueeze(1)
        distance = (self._position[:, : self.movers] - goal).square().sum(0).sqrt()  # [movers, envs]
        return self._shared(distance[0] - distance[1:].amin(0))


def _at_least(env: object, least: int, **counts: int) -> None:
    for field, value in counts.items():
        if value < least:
            raise ValueError(f"{type(env).__name__}: {field} must be >= {least}, got {value}")
