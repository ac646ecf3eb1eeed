"""Third-party multi-agent packages behind the keys of :class:`MultiAgentEnv`, so that nothing downstream sees which
backend it is given. Far slower than the tensor environments: for comparison, and for what only a package has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.envs import package_copies
from datamodules.envs.base import MultiAgentEnv
from datamodules.envs.package_pool import Copy, Frames, LocalPool, WorkerPool

TimeLimit = Literal["terminated", "truncated"]


class PackageEnv(MultiAgentEnv):
    """``envs`` copies of a package's environment, stepped one by one, in this process or in ``workers`` others.

    The seed of every episode is drawn from ``self.generator``, so trajectories depend on ``seed`` and actions alone
    and not on the number of workers. A snapshot holds each copy's seed and its actions since the reset;
    :meth:`restore` plays them again. Finished copies are not stepped until :meth:`restart`.

    Args:
        envs: copies in the batch.
        factory: makes one copy; picklable where there are workers.
        episode_limit: steps after which an episode ends.
        time_limit, device, seed: as in :class:`MultiAgentEnv`; the package steps on the processor.
        workers: processes that the copies are split over; 0: this one.

    Raises:
        ValueError: a count out of range; more workers than copies.
        ImportError: one line, if the package is missing.
        RuntimeError: one line, when a worker fails.
    """

    name = "package"

    def __init__(
        self,
        envs: int,
        factory: Callable[[], Copy],
        *,
        episode_limit: int,
        time_limit: TimeLimit = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if workers < 0:
            raise ValueError(f"{type(self).__name__}: workers must be >= 0, got {workers}")
        probe = factory()
        probe.close()
        super().__init__(
            envs,
            num_agents=probe.num_agents,
            num_actions=probe.num_actions,
            observation_size=probe.observation_size,
            episode_limit=episode_limit,
            time_limit=time_limit,
            state_size=probe.state_size or None,
            device=device,
            seed=seed,
        )
        self._has_state, self._masked = probe.state_size > 0, probe.masked
        agents = self.num_agents
        self.fields = {  # on the processor, where the package is
            "observation": torch.zeros(envs, agents, self.observation_size),
            "reset_seed": torch.full((envs,), -1, dtype=torch.int64),
            "steps": torch.zeros(envs, dtype=torch.int64),
            "ended": torch.zeros(envs, dtype=torch.bool),
        }
        if self.exact_resume:  # one more row than an episode has steps takes what finished copies are told
            self.fields["actions"] = torch.zeros(envs, episode_limit + 1, agents, dtype=torch.int16)
        if self._masked:
            self.fields["legal"] = torch.ones(envs, agents, self.num_actions, dtype=torch.bool)
        if self._has_state:
            self.fields["state"] = torch.zeros(envs, self.state_size)
        self._pool = WorkerPool(factory, envs, workers, type(self).__name__) if workers else LocalPool(factory, envs)

    @property
    def restricts_actions(self) -> bool:
        """Whether available actions vary."""
        return self._masked

    @property
    def own_state(self) -> bool:
        """Whether ``state`` is more than the agents' observations side by side."""
        return self._has_state

    def _keep(self, frames: Frames) -> None:
        self.fields["observation"].copy_(torch.from_numpy(frames.observation))
        if self._masked:
            self.fields["legal"].copy_(torch.from_numpy(frames.legal))
        if self._has_state:
            self.fields["state"].copy_(torch.from_numpy(frames.state))

    def _draw(self, rows: Tensor) -> None:
        seeds = torch.randint(2**31, (len(rows),), generator=self.generator, device=self.device).cpu()
        rows = rows.cpu()
        self.fields["reset_seed"][rows] = seeds
        self.fields["steps"][rows] = 0
        self.fields["ended"][rows] = False
        self._keep(self._pool.reset(rows.tolist(), seeds.tolist()))

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        actions, steps, ended = actions.cpu(), self.fields["steps"], self.fields["ended"]
        live = ~ended & (steps < self.episode_limit)
        reward, terminated, frames = self._pool.step(actions.numpy(), live.numpy())
        if self.exact_resume:
            at = steps.view(-1, 1, 1).expand(-1, 1, self.num_agents)
            self.fields["actions"].scatter_(1, at, actions.to(torch.int16).unsqueeze(1))
        steps += live
        ended |= torch.from_numpy(terminated)
        self._keep(frames)
        return torch.from_numpy(reward).to(self.device, copy=True), ended.to(self.device, copy=True)

    def _part(self, field: str, rows: Tensor | None) -> Tensor:
        value = self.fields[field]
        return (value.clone() if rows is None else value[rows.cpu()]).to(self.device)

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        return self._part("observation", rows)

    def _legal(self, rows: Tensor | None = None) -> Tensor:
        return self._part("legal", rows) if self._masked else super()._legal(rows)

    def _global_state(self, observation: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._part("state", rows) if self._has_state else super()._global_state(observation, rows)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`snapshot` was taken, by playing its episodes again up to there; without
        ``exact_resume``: start new ones.

        Raises:
            ValueError: if the snapshot is of another environment or batch, or the package plays it differently.
        """
        super().restore(state)
        if not self.exact_resume:
            self.restart()
            return
        rows = [row for row, seed in enumerate(self.fields["reset_seed"].tolist()) if seed >= 0]
        actions = self.fields["actions"].long().numpy()
        steps = self.fields["steps"].tolist()
        frames = self._pool.replay(
            rows, self.fields["reset_seed"][rows].tolist(), [actions[row, : steps[row]] for row in rows]
        )
        wanted = self.fields["observation"].numpy()
        if not np.array_equal(frames.observation[rows], wanted[rows]):
            raise ValueError(
                f"{type(self).__name__}: snapshot: played again, its episodes lead to other observations: it was taken "
                "with other options or another version of the package"
            )

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close all copies and end the workers."""
        pool = self.__dict__.get("_pool")  # none if the constructor failed
        if pool is not None:
            pool.close()
        super().close(raise_if_closed=raise_if_closed)


class PackageForaging(PackageEnv):
    """Level-based foraging by lbforaging 2.0.0.

    Args:
        envs: copies in the batch.
        rows, columns: of the field.
        agents: players.
        food: items at the start.
        sight: cells that a player sees in every direction; ``None``: the whole field.
        coop: whether every item needs all players (the three weakest, if there are more).
        min_agent_level, max_agent_level: bounds of players' levels.
        max_food_level: of every item; ``None``: the sum of the three lowest player levels.
        penalty: subtracted for loading in vain.
        normalise_reward: whether an episode's rewards sum to at most 1.
        episode_limit, time_limit, workers, device, seed: as in :class:`PackageEnv`; the package terminates.
    """

    name = "foraging"
    idle_action = 0

    def __init__(
        self,
        envs: int,
        *,
        rows: int,
        columns: int,
        agents: int,
        food: int,
        sight: int | None = None,
        coop: bool = False,
        min_agent_level: int = 1,
        max_agent_level: int = 2,
        max_food_level: int | None = None,
        penalty: float = 0.0,
        normalise_reward: bool = True,
        episode_limit: int = 50,
        time_limit: TimeLimit = "terminated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        factory = partial(
            package_copies.foraging,
            players=agents,
            min_player_level=min_agent_level,
            max_player_level=max_agent_level,
            min_food_level=1,
            max_food_level=max_food_level,
            field_size=(rows, columns),
            max_num_food=food,
            sight=max(rows, columns) if sight is None else sight,
            max_episode_steps=package_copies.NO_LIMIT,
            force_coop=coop,
            normalize_reward=normalise_reward,
            penalty=penalty,
        )
        super().__init__(
            envs,
            factory,
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )
        self.best_return = 1.0 if normalise_reward else None


class PackageWarehouse(PackageEnv):
    """Multi-robot warehouse by rware 2.0.0.

    Args:
        envs: copies in the batch.
        shelf_columns, column_height, shelf_rows: of the layout, as in the package.
        agents: robots.
        request_queue_size: shelves requested at any time.
        sensor_range: cells that a robot sees in every direction.
        max_inactivity: steps without a delivery that terminate an episode; ``None``: never.
        reward_type: who is paid for a delivery.
        episode_limit, time_limit, workers, device, seed: as in :class:`PackageEnv`; the package terminates.

    Raises:
        ValueError: for an unknown ``reward_type``.
    """

    name = "rware"
    idle_action = 0

    def __init__(
        self,
        envs: int,
        *,
        shelf_columns: int,
        column_height: int,
        shelf_rows: int,
        agents: int,
        request_queue_size: int,
        sensor_range: int = 1,
        max_inactivity: int | None = None,
        reward_type: Literal["individual", "global", "two_stage"] = "individual",
        episode_limit: int = 500,
        time_limit: TimeLimit = "terminated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if reward_type not in ("individual", "global", "two_stage"):
            raise ValueError(
                f"{type(self).__name__}: reward_type: individual, global or two_stage, got '{reward_type}'"
            )
        self.common_reward = reward_type == "global"
        factory = partial(
            package_copies.warehouse,
            shelf_columns=shelf_columns,
            column_height=column_height,
            shelf_rows=shelf_rows,
            n_agents=agents,
            msg_bits=0,
            sensor_range=sensor_range,
            request_queue_size=request_queue_size,
            max_inactivity_steps=max_inactivity,
            max_steps=package_copies.NO_LIMIT,
            reward_type=reward_type,
        )
        super().__init__(
            envs,
            factory,
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )


class PackageSpread(PackageEnv):
    """``simple_spread_v3`` of mpe2 1.1.1.

    Args:
        envs: copies in the batch.
        agents: agents, and as many landmarks.
        local_ratio: weight of an agent's own collisions against the common term.
        episode_limit, time_limit, workers, device, seed: as in :class:`PackageEnv`; the package truncates.
    """

    name = "mpe/spread"
    idle_action = 0

    def __init__(
        self,
        envs: int,
        *,
        agents: int = 3,
        local_ratio: float = 0.5,
        episode_limit: int = 25,
        time_limit: TimeLimit = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.common_reward = local_ratio == 0.0
        kwargs = {"N": agents, "local_ratio": local_ratio, "max_cycles": package_copies.NO_LIMIT}
        super().__init__(
            envs,
            partial(package_copies.ParticleCopy, "spread", kwargs),
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )


class PackageTag(PackageEnv):
    """``simple_tag_v3`` of mpe2 1.1.1, the prey scripted as in :class:`~datamodules.envs.particles.Tag`.

    Args:
        envs: copies in the batch.
        predators, prey, obstacles: bodies of each kind.
        episode_limit, time_limit, workers, device, seed: as in :class:`PackageEnv`; the package truncates.
    """

    name = "mpe/tag"
    idle_action = 0
    common_reward = True

    def __init__(
        self,
        envs: int,
        *,
        predators: int = 3,
        prey: int = 1,
        obstacles: int = 2,
        episode_limit: int = 25,
        time_limit: TimeLimit = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        kwargs = {
            "num_adversaries": predators,
            "num_good": prey,
            "num_obstacles": obstacles,
            "max_cycles": package_copies.NO_LIMIT,
        }
        super().__init__(
            envs,
            partial(package_copies.ParticleCopy, "tag", kwargs),
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )


class PackageAdversary(PackageEnv):
    """``simple_adversary_v3`` of mpe2 1.1.1, the adversary scripted as in
    :class:`~datamodules.envs.particles.Adversary`.

    Args:
        envs: copies in the batch.
        agents: agents, and as many landmarks; one adversary besides.
        episode_limit, time_limit, workers, device, seed: as in :class:`PackageEnv`; the package truncates.
    """

    name = "mpe/adversary"
    idle_action = 0
    common_reward = True

    def __init__(
        self,
        envs: int,
        *,
        agents: int = 2,
        episode_limit: int = 25,
        time_limit: TimeLimit = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        kwargs = {"N": agents, "max_cycles": package_copies.NO_LIMIT}
        super().__init__(
            envs,
            partial(package_copies.ParticleCopy, "adversary", kwargs),
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )


class PackageSmac(PackageEnv):
    """A map of the StarCraft Multi-Agent Challenge, by ``smac`` and an installed StarCraft II.

    The state and the available actions are the package's. It takes no seed per episode and cannot be put back, so
    :meth:`restore` starts new episodes (``exact_resume`` is false). Written against the package's documented
    interface and tested with a stand-in for it, not with the game.

    Args:
        envs: copies in the batch.
        map_name: of the map.
        difficulty: of the built-in opponent, "1" (very easy) to "A" (cheating).
        episode_limit: steps; ``None``: the map's own.
        time_limit, workers, device, seed: as in :class:`PackageEnv`.
    """

    name = "smac"
    idle_action = 1  # stop; 0 is for the dead
    common_reward = True
    exact_resume = False

    def __init__(
        self,
        envs: int,
        *,
        map_name: str,
        difficulty: str = "7",
        episode_limit: int | None = None,
        time_limit: TimeLimit = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        kwargs: dict[str, Any] = {"difficulty": difficulty}
        factory = partial(package_copies.SmacCopy, map_name, kwargs)
        if episode_limit is None:
            probe = factory()
            episode_limit = probe.episode_limit
            probe.close()
        super().__init__(
            envs,
            factory,
            episode_limit=episode_limit,
            time_limit=time_limit,
            workers=workers,
            device=device,
            seed=seed,
        )
