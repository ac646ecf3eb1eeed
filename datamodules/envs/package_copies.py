"""One copy of each third-party environment, as :class:`~datamodules.envs.package_pool.Copy`. Packages are imported when
a copy is made, torch only where a scripted mover needs it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.envs.package_pool import Seen
from modules.optional import require

NO_LIMIT = 10**9
"""Given to a package as its time limit: the adapter counts steps itself, so a package's end is a true end."""


class TupleCopy:
    """A Gymnasium environment whose spaces are tuples over agents: lbforaging and rware.

    Args:
        module, name: of the environment's class; both are constants of this package, never a user's text.
        kwargs: of its constructor.
    """

    state_size = 0
    masked = False

    def __init__(self, module: str, name: str, kwargs: Mapping[str, Any]) -> None:
        self.env = getattr(require(module, extra="marl"), name)(**kwargs)
        self.num_agents = self.env.n_agents
        self.num_actions = int(self.env.action_space[0].n)
        self.observation_size = int(self.env.observation_space[0].shape[0])

    def reset(self, seed: int) -> Seen:
        """See :class:`Copy`."""
        for player in getattr(self.env, "players", ()):
            # lbforaging keeps players where the last episode left them until each is placed anew, and places nobody on
            # another: without this an episode would depend on the one before
            player.position = None
        return Seen(self.env.reset(seed=seed)[0])

    def step(self, actions: list[int]) -> tuple[Sequence[float], bool, Seen]:
        """See :class:`Copy`."""
        observation, reward, done, _, _ = self.env.step(actions)
        return reward, done, Seen(observation)

    def close(self) -> None:
        """See :class:`Copy`."""
        self.env.close()


def foraging(**kwargs: Any) -> TupleCopy:
    """A copy of lbforaging's environment."""
    return TupleCopy("lbforaging.foraging", "ForagingEnv", kwargs)


def warehouse(reward_type: str, **kwargs: Any) -> TupleCopy:
    """A copy of rware's environment; ``reward_type`` is a member of its ``RewardType`` in lower case."""
    kind = require("rware.warehouse", extra="marl").RewardType[reward_type.upper()]
    return TupleCopy("rware.warehouse", "Warehouse", {**kwargs, "reward_type": kind})


class ParticleCopy:
    """An mpe2 environment by its parallel API, some movers scripted as in :mod:`datamodules.envs.particles`.

    Args:
        scenario: ``spread``, ``tag`` or ``adversary``.
        kwargs: of the package's ``parallel_env``.
    """

    state_size = 0
    masked = False

    def __init__(self, scenario: str, kwargs: Mapping[str, Any]) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        module = {"spread": "simple_spread_v3", "tag": "simple_tag_v3", "adversary": "simple_adversary_v3"}[scenario]
        self.env = require(f"mpe2.{module}", extra="marl").parallel_env(**kwargs)
        self.scenario = scenario
        movers = self.env.possible_agents
        adversaries = [name for name in movers if name.startswith("adversary")]
        self.names = adversaries if scenario == "tag" else [name for name in movers if name not in adversaries]
        self.scripted = [name for name in movers if name not in self.names]
        self.num_agents = len(self.names)
        self.num_actions = int(self.env.action_space(self.names[0]).n)
        self.observation_size = int(self.env.observation_space(self.names[0]).shape[0])

    def reset(self, seed: int) -> Seen:
        """See :class:`Copy`."""
        return self._seen(self.env.reset(seed=seed)[0])

    def step(self, actions: list[int]) -> tuple[Sequence[float], bool, Seen]:
        """See :class:`Copy`."""
        joint = dict(zip(self.names, actions, strict=True))
        if self.scripted:
            joint.update(zip(self.scripted, self._script(), strict=True))
        seen, reward, terminated, _, _ = self.env.step(joint)
        return [reward[name] for name in self.names], terminated[self.names[0]], self._seen(seen)

    def close(self) -> None:
        """Nothing: mpe2's own close shuts pygame down for every other copy too."""

    def _seen(self, observations: Mapping[str, Any]) -> Seen:
        return Seen([observations[name] for name in self.names])

    def _script(self) -> list[int]:
        import torch

        from datamodules.envs import particles

        world = self.env.unwrapped.world

        def rows(bodies: Sequence[Any], what: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(body.state, what) for body in bodies], axis=1)).unsqueeze(-1)

        hunters = [mover for mover in world.agents if mover.adversary]
        good = [mover for mover in world.agents if not mover.adversary]
        if self.scenario == "tag":
            chosen = particles.flee(
                rows(good, "p_pos"), rows(good, "p_vel"), rows(hunters, "p_pos"), rows(hunters, "p_vel")
            )
        else:
            chosen = particles.approach(
                rows(hunters, "p_pos"), rows(hunters, "p_vel"), rows(good, "p_pos"), rows(world.landmarks, "p_pos")
            )
        return chosen.squeeze(-1).tolist()


class SmacCopy:
    """A StarCraft Multi-Agent Challenge map. The package takes no seed per episode, so episodes cannot be replayed.

    Args:
        map_name: of the map.
        kwargs: of ``StarCraft2Env``.

    Raises:
        ImportError: one line, if ``smac`` is missing.
    """

    masked = True

    def __init__(self, map_name: str, kwargs: Mapping[str, Any]) -> None:
        try:
            package = importlib.import_module("smac.env")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "smac":
                raise
            raise ImportError(
                "package 'smac' is needed here but not installed: see its README (oxwhirl/smac), which also says how "
                "to get StarCraft II and the maps"
            ) from None
        self.env = package.StarCraft2Env(map_name=map_name, **kwargs)
        info = self.env.get_env_info()
        self.num_agents, self.num_actions = int(info["n_agents"]), int(info["n_actions"])
        self.observation_size, self.state_size = int(info["obs_shape"]), int(info["state_shape"])
        self.episode_limit = int(info["episode_limit"])

    def reset(self, seed: int) -> Seen:
        """See :class:`Copy`; the seed goes unused."""
        self.env.reset()
        return self._seen()

    def step(self, actions: list[int]) -> tuple[Sequence[float], bool, Seen]:
        """See :class:`Copy`."""
        reward, terminated, info = self.env.step(actions)
        timed_out = bool(info.get("episode_limit", False))
        return [float(reward)] * self.num_agents, bool(terminated) and not timed_out, self._seen()

    def close(self) -> None:
        """See :class:`Copy`."""
        with contextlib.suppress(AttributeError):  # smac's close fails where no game was ever started
            self.env.close()

    def _seen(self) -> Seen:
        return Seen(self.env.get_obs(), self.env.get_avail_actions(), self.env.get_state())
