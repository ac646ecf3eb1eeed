"""Scenarios of VMAS behind the keys of :class:`MultiAgentEnv`; VMAS is batched itself, but its state is spread out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv
from modules.optional import require

_WORLD = "world."
_INEXACT = ("ball_passage", "sampling", "simple_reference", "simple_speaker_listener")
_SCALARS = {bool: torch.bool, int: torch.int64, float: torch.float64}


class PackageVmas(MultiAgentEnv):
    """A scenario of vmas 1.5.2 with discrete actions.

    Agents with fewer features or actions than others are padded: with zeros, and with actions that are not available.
    VMAS draws from Python's, numpy's and torch's global generators; it is seeded from ``self.generator`` before every
    call, so trajectories depend on ``seed`` and actions alone.

    A snapshot holds every tensor and number that hangs on the scenario. Four scenarios keep more than those
    (``exact_resume`` is false): restoring them starts new episodes in all copies.

    Args:
        envs: copies in the batch.
        scenario: file name of a scenario in ``vmas.scenarios`` or its folder of particle environments.
        scenario_options: keyword arguments of the scenario, such as ``n_agents``.
        episode_limit: steps after which an episode ends; VMAS has no limit of its own.
        time_limit, device, seed: as in :class:`MultiAgentEnv`.
        workers: 0; there is nothing to split.

    Raises:
        ValueError: for a scenario that VMAS does not list, or workers.
        ImportError: one line, if ``vmas`` is missing.
    """

    name = "vmas"

    def __init__(
        self,
        envs: int,
        *,
        scenario: str,
        scenario_options: Mapping[str, Any] | None = None,
        episode_limit: int = 100,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        workers: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        package = require("vmas", extra="vmas")
        listed = [*package.scenarios, *package.mpe_scenarios]
        if scenario not in listed:  # the package would look for any file of that name and run it
            raise ValueError(f"PackageVmas: scenario: one of {', '.join(listed)}, got '{scenario}'")
        if workers:
            raise ValueError(f"PackageVmas: workers must be 0, VMAS steps all copies at once, got {workers}")
        if envs < 1:
            raise ValueError(f"PackageVmas: envs must be >= 1, got {envs}")
        world = package.make_env(
            scenario, envs, device=str(device), continuous_actions=False, seed=seed % 2**32, **(scenario_options or {})
        )
        widths = [_flat(part).shape[1] for part in world.get_from_scenario(True, False, False, False)[0]]
        counts = [int(world.get_agent_action_space(agent).n) for agent in world.agents]
        super().__init__(
            envs,
            num_agents=len(widths),
            num_actions=max(counts),
            observation_size=max(widths),
            episode_limit=episode_limit,
            time_limit=time_limit,
            device=device,
            seed=seed,
        )
        self.exact_resume = scenario not in _INEXACT
        self.world = world
        place = self.device
        self._available = torch.arange(max(counts), device=place) < torch.tensor(counts, device=place).unsqueeze(1)
        self._padded = len(set(counts)) > 1
        self.fields = {
            "observation": torch.zeros(envs, len(widths), max(widths), device=place),
            "ended": torch.zeros(envs, dtype=torch.bool, device=place),
        }

    @property
    def restricts_actions(self) -> bool:
        """Whether some agent has fewer actions than others."""
        return self._padded

    def _reseed(self) -> None:
        seed = int(torch.randint(2**31, (1,), generator=self.generator, device=self.device))
        # What the package's seed() does to the states that it draws from: seed() itself reseeds torch's global
        # generators, which formats a traceback where CUDA is not in use and took a third of a step.
        self.world.vmas_random_state[:] = [
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed).get_state(),  # noqa: NPY002 - the kind of state that the package keeps
            random.Random(seed).getstate(),
        ]

    def _keep(self, parts: list[Any]) -> None:
        for agent, part in enumerate(parts):
            flat = _flat(part)
            self.fields["observation"][:, agent, : flat.shape[1]] = flat

    def _draw(self, rows: Tensor) -> None:
        self._reseed()
        if len(rows) == self.envs:
            self._keep(self.world.reset())
        else:
            for row in rows.tolist():  # VMAS resets all or one
                self.world.reset_at(row, return_observations=False)
            self._keep(self.world.get_from_scenario(True, False, False, False)[0])
        self.fields["ended"][rows] = False

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        self._reseed()
        ended = self.fields["ended"]
        seen, rewards, done, _ = self.world.step(list(actions.unsqueeze(-1).unbind(1)))
        self._keep(seen)
        reward = torch.stack([part.flatten() for part in rewards], 1).float().masked_fill_(ended.unsqueeze(1), 0.0)
        ended |= done
        return reward, ended.clone()

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        observation = self.fields["observation"]
        return observation.clone() if rows is None else observation[rows]

    def _legal(self, rows: Tensor | None = None) -> Tensor:
        return self._available.expand(self.envs if rows is None else len(rows), -1, -1).clone()

    # -- exact position -----------------------------------------------------------------------------------------------
    def snapshot(self) -> dict[str, Tensor]:
        """As in :class:`MultiAgentEnv`; with ``exact_resume`` also the scenario's tensors and numbers by path."""
        if not self.exact_resume:
            return super().snapshot()
        world = {
            _WORLD + path: torch.tensor(value, dtype=_SCALARS[type(value)])
            if type(value) in _SCALARS
            else value.detach().clone()
            for path, value in _leaves(self.world.scenario)
        }
        world[f"{_WORLD}steps"] = self.world.steps.clone()
        return {**super().snapshot(), **world}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """As in :class:`MultiAgentEnv`; without ``exact_resume``, starts new episodes.

        Raises:
            ValueError: if the snapshot is of another environment or batch.
        """
        super().restore(state)
        if not self.exact_resume:
            self.restart()
            return
        self.world.step([torch.zeros(self.envs, 1, device=self.device)] * self.num_agents)  # makes what steps keep
        world = {path.removeprefix(_WORLD): value for path, value in state.items() if path.startswith(_WORLD)}
        self.world.steps = world.pop("steps").to(self.device, copy=True)
        for path, value in world.items():
            holder: Any = self.world.scenario
            *way, last = path.split("/")
            for name in way:
                holder = dict(_items(holder))[name]
            current = dict(_items(holder)).get(last)
            number = type(current) in _SCALARS  # item() gives back the kind of number that was stored
            _set(holder, last, value.item() if number else value.to(self.device, copy=True))


def _flat(observation: Any) -> Tensor:
    """An agent's observation, which may be a dictionary, as ``[envs, features]``."""
    parts = observation.values() if isinstance(observation, Mapping) else [observation]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _items(holder: Any) -> list[tuple[str, Any]]:
    """What ``holder`` holds: attributes and text keys by name, the rest by place, for keys can be any object."""
    if isinstance(holder, dict):
        return [(key if isinstance(key, str) else str(at), value) for at, (key, value) in enumerate(holder.items())]
    if isinstance(holder, list | tuple):
        return [(str(at), value) for at, value in enumerate(holder)]
    return list(vars(holder).items())


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name if name in holder else list(holder)[int(name)]] = value
    elif isinstance(holder, list):
        holder[int(name)] = value
    else:
        vars(holder)[name] = value


def _leaves(root: Any) -> Iterator[tuple[str, Any]]:
    """Path and value of every tensor and number below ``root``, each holder met once, in a fixed order."""
    met: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, holder = stack.pop()
        if id(holder) in met:
            continue
        met.add(id(holder))
        for name, value in _items(holder):
            if isinstance(value, Tensor) or type(value) in _SCALARS:
                if not isinstance(holder, tuple):  # what cannot be assigned cannot have changed
                    yield path + name, value
            elif isinstance(value, dict | list | tuple) or _belongs(value):
                stack.append((f"{path}{name}/", value))


def _belongs(value: Any) -> bool:
    """Whether an object is VMAS's own: of its modules, or of a scenario file, which VMAS loads under no name."""
    module = type(value).__module__
    return hasattr(value, "__dict__") and not isinstance(value, type) and (module.startswith("vmas.") or module == "")
