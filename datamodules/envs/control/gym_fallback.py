"""Any task of Gymnasium whose observations are boxes: copies stepped one after the other."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.envs.control.base import ControlEnv
from modules.contracts.control import ControlSpec
from modules.optional import require


class GymnasiumEnv(ControlEnv):
    """``envs`` copies of ``gymnasium.make(task)``, stepped one after the other.

    Observations and actions are flattened. Actions are executed as they are, in the dtype of the task. A task with
    finitely many actions takes ``[envs, actions]`` and executes the index of the largest number (:attr:`discrete`).
    An episode's seed is made of its two uniform numbers, so that equal numbers give equal episodes.

    A copy that has ended is not stepped until it is restarted: it has reward 0. A copy whose observation or reward is
    not finite terminates with reward 0 and an observation of zeros, and is counted in :attr:`nan_resets`.

    States cannot be read out of Gymnasium: :meth:`restore` begins new episodes.

    Args:
        envs: copies.
        task: an id that Gymnasium knows.
        episode_limit: steps; ``None``: the task's own, or 1000 where it has none.
        allow_import: allow ids ``module:Name``, which import ``module``, that is, run its code.
        options: further arguments of ``gymnasium.make``.
        device: ``cpu``.
        dtype: of observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: an unknown id, an id that imports code, a space that is not supported, another device, a count
            below 1.
        ImportError: Gymnasium is missing.
    """

    exact_resume = False
    how = "gymnasium, copies one by one: slower, and a resumed run starts new episodes"

    def __init__(
        self,
        envs: int,
        *,
        task: str,
        episode_limit: int | None = None,
        allow_import: bool = False,
        options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        gymnasium = require("gymnasium", extra="control")
        if torch.device(device).type != "cpu":
            raise ValueError(f"GymnasiumEnv: device: Gymnasium's tasks run on the cpu, got {device}")
        if envs < 1:
            raise ValueError(f"GymnasiumEnv: envs must be >= 1, got {envs}")
        if ":" in task:
            if not allow_import:
                raise ValueError(f"GymnasiumEnv: task: {task!r} imports code: set allow_import to true if you trust it")
        elif task not in gymnasium.registry:
            near = difflib.get_close_matches(task, gymnasium.registry, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see gymnasium.pprint_registry()"
            raise ValueError(f"GymnasiumEnv: task: Gymnasium has no {task!r}: {hint}")
        settings = {"max_episode_steps": -1, "disable_env_checker": True} | dict(options or {})
        copies = [gymnasium.make(task, **settings)]  # clocks are ours, so that Gymnasium gets none
        seen, actions = copies[0].observation_space, copies[0].action_space
        boxed = isinstance(actions, gymnasium.spaces.Box) and np.issubdtype(actions.dtype, np.floating)
        discrete = isinstance(actions, gymnasium.spaces.Discrete)
        if not isinstance(seen, gymnasium.spaces.Box) or not (boxed or discrete):
            copies[0].close()
            raise ValueError(
                f"GymnasiumEnv: task: needs observations in a Box and actions in a Box of floats or Discrete, "
                f"{task} has {seen} and {actions}"
            )
        # the registered limit: a made environment tells the limit that it was made with
        limit = gymnasium.registry[task.split(":")[-1]].max_episode_steps or 1000
        self.name, self.discrete = task, discrete
        super().__init__(
            envs,
            observation_size=math.prod(seen.shape),
            action_size=int(actions.n) if discrete else math.prod(actions.shape),
            low=0.0 if discrete else tuple(actions.low.ravel().tolist()),
            high=1.0 if discrete else tuple(actions.high.ravel().tolist()),
            episode_limit=limit if episode_limit is None else episode_limit,
            reset_size=2,
            dtype=dtype,
            seed=seed,
        )
        copies += [gymnasium.make(task, **settings) for _ in range(envs - 1)]
        self.copies, self._space = copies, actions
        self.nan_resets = 0
        self._seen, self._over = np.zeros((envs, self.observation_size)), np.ones(envs, dtype=bool)
        self._cut = np.zeros(envs, dtype=bool)
        self._show()

    @property
    def control_spec(self) -> ControlSpec:
        return replace(super().control_spec, discrete=self.discrete)

    # -- ControlEnv ---------------------------------------------------------------------------------------------------
    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        places = range(self.envs) if rows is None else rows.tolist()
        for place, (first, second) in zip(places, uniforms.tolist(), strict=True):
            # 31 bits, which every task takes for a seed
            observation, _ = self.copies[place].reset(seed=int(first * 2**16) << 15 | int(second * 2**15))
            self._over[place] = not self._see(place, observation)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if action.shape != (self.envs, self.action_size):
            raise ValueError(f"GymnasiumEnv: action must be {(self.envs, self.action_size)}, got {tuple(action.shape)}")
        reward, terminated = np.zeros(self.envs), self._over.copy()
        self._cut[:] = False
        if self.discrete:
            controls: Any = action.argmax(1).numpy() + self._space.start
        else:
            controls = action.detach().numpy().astype(self._space.dtype).reshape(self.envs, *self._space.shape)
        for place in range(self.envs) if rows is None else rows.tolist():
            if self._over[place]:
                continue
            observation, gain, ended, cut, _ = self.copies[place].step(controls[place])
            if self._see(place, observation) and math.isfinite(gain):
                reward[place] = gain
            else:
                self._seen[place] = 0.0
                self.nan_resets += 1
                ended = True
            terminated[place] = ended
            self._cut[place] = cut and not ended
            self._over[place] = ended or cut
        return torch.from_numpy(reward).to(self.state_dtype), torch.from_numpy(terminated)

    def advance(
        self, action: Tensor, parameters: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        reward, terminated, truncated = super().advance(action, parameters, rows)
        return reward, terminated, truncated | torch.from_numpy(self._cut)  # some tasks cut episodes short themselves

    def _look(self, rows: Tensor | None) -> Tensor:
        seen = self.fields["observation"]
        return (seen if rows is None else seen[rows]).to(self.state_dtype, copy=True)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._show()
        self.restart(self._uniforms(self.envs))

    def close(self, *, raise_if_closed: bool = True) -> None:
        for copy in self.copies:
            copy.close()
        super().close(raise_if_closed=raise_if_closed)

    def _show(self) -> None:
        """Fields in the memory that steps write."""
        self.fields = {"observation": torch.from_numpy(self._seen), "over": torch.from_numpy(self._over)}

    def _see(self, place: int, observation: Any) -> bool:
        """Keep an observation; whether it is finite."""
        flat = np.asarray(observation, dtype=np.float64).ravel()
        fine = bool(np.isfinite(flat).all())
        self._seen[place] = flat if fine else 0.0
        return fine
