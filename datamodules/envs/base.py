"""What every batched multi-agent environment shares: state in tensors, time limits, partial resets, snapshots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

GROUP = "agents"
"""Name of the one group of agents in TorchRL keys."""


class MultiAgentEnv(EnvBase):
    """``envs`` copies of a multi-agent environment with discrete actions, stepped as one.

    A subclass keeps the whole state of its environments in ``self.fields`` (name to tensor ``[envs, ...]``, made before
    or after ``super().__init__``, filled by :meth:`_draw`) and draws random numbers from ``self.generator`` alone, so
    that :meth:`snapshot` is exact. It implements :meth:`_draw`, :meth:`_advance`, :meth:`_observe` and, where actions
    can be unavailable or a global state exists, :meth:`_legal` and :meth:`_global_state`.

    There are two ways to step, equal by test: TorchRL's (``reset``, ``step``, ``rollout``, collectors) and, without
    TensorDicts, :meth:`restart`, :meth:`advance` and :meth:`observe`.

    TorchRL keys, batch size ``[envs]``, agents as in ``self.group_map``:

    - ``("agents", "observation")`` ``[envs, agents, features]`` float32;
    - ``("agents", "action_mask")`` ``[envs, agents, actions]`` bool: available actions;
    - ``("agents", "action")`` ``[envs, agents]`` int64;
    - ``("agents", "reward")`` ``[envs, agents, 1]`` float32: each agent's own;
    - ``state`` ``[envs, state_features]`` float32: for centralised training; agents' observations side by side unless
      the environment has a state of its own;
    - ``is_init`` ``[envs, 1]`` bool: the first step of an episode;
    - ``done``, ``terminated``, ``truncated`` ``[envs, 1]`` bool.

    Args:
        envs: copies in the batch.
        num_agents, num_actions: of every copy.
        observation_size: features of an agent's observation.
        episode_limit: steps after which an episode ends.
        time_limit: whether reaching the limit terminates an episode (its value beyond is 0) or truncates it
            (bootstrap).
        state_size: features of the global state; ``None``: ``num_agents * observation_size``.
        device: where states live and are stepped.
        seed: of the generator.

    Raises:
        ValueError: a count below 1; from stepping, actions of another shape or out of range.
    """

    name = "environment"
    common_reward = False
    """Whether all agents always get the same reward."""
    idle_action: int | None = None
    """The action of doing nothing, where there is one."""
    best_return: float | None = None
    """No undiscounted team return is greater, and a very good team nearly reaches it; ``None``: not known."""
    exact_resume = True
    """Whether :meth:`restore` goes on exactly; else it starts new episodes."""

    def __init__(
        self,
        envs: int,
        *,
        num_agents: int,
        num_actions: int,
        observation_size: int,
        episode_limit: int,
        time_limit: Literal["terminated", "truncated"] = "truncated",
        state_size: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        for field, value in (
            ("envs", envs),
            ("num_agents", num_agents),
            ("num_actions", num_actions),
            ("observation_size", observation_size),
            ("episode_limit", episode_limit),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {field} must be >= 1, got {value}")
        if time_limit not in ("terminated", "truncated"):
            raise ValueError(f"{type(self).__name__}: time_limit: terminated or truncated, got '{time_limit}'")
        super().__init__(device=torch.device(device), batch_size=(envs,))
        self.envs = envs
        self.num_agents, self.num_actions = num_agents, num_actions
        self.observation_size = observation_size
        self.state_size = num_agents * observation_size if state_size is None else state_size
        self.episode_limit = episode_limit
        self.time_limit = time_limit
        self.group_map = {GROUP: [f"agent_{i}" for i in range(num_agents)]}
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.fields: dict[str, Tensor] = {}
        self.elapsed = torch.zeros(envs, dtype=torch.int64, device=self.device)
        self._all_legal = torch.ones(envs, num_agents, num_actions, dtype=torch.bool, device=self.device)
        self._make_specs()

    def _make_specs(self) -> None:
        place, actions = self.device, self.num_actions
        each, every = torch.Size([self.envs]), torch.Size([self.envs, self.num_agents])
        single = torch.Size([self.envs, 1])
        self.observation_spec = Composite(
            {
                GROUP: Composite(
                    observation=Unbounded(
                        torch.Size([*every, self.observation_size]), dtype=torch.float32, device=place
                    ),
                    action_mask=Binary(actions, torch.Size([*every, actions]), dtype=torch.bool, device=place),
                    shape=every,
                ),
                "state": Unbounded(torch.Size([*each, self.state_size]), dtype=torch.float32, device=place),
                "is_init": Categorical(2, single, dtype=torch.bool, device=place),
            },
            shape=each,
        )
        self.action_spec = Composite(
            {GROUP: Composite(action=Categorical(actions, every, dtype=torch.int64, device=place), shape=every)},
            shape=each,
        )
        self.reward_spec = Composite(
            {GROUP: Composite(reward=Unbounded(torch.Size([*every, 1]), device=place), shape=every)}, shape=each
        )
        flag = Categorical(2, single, dtype=torch.bool, device=place)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=each)

    @property
    def restricts_actions(self) -> bool:
        """Whether available actions vary."""
        return type(self)._legal is not MultiAgentEnv._legal

    @property
    def own_state(self) -> bool:
        """Whether ``state`` is more than the agents' observations side by side."""
        return type(self)._global_state is not MultiAgentEnv._global_state

    # -- what a subclass writes ---------------------------------------------------------------------------------------
    @abstractmethod
    def _draw(self, rows: Tensor) -> None:
        """Put fresh initial states into ``self.fields`` at ``rows`` ``[R]`` int64; nothing else changes."""

    @abstractmethod
    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Step all copies with ``actions`` ``[envs, agents]``: rewards ``[envs, agents]`` float32 and whether the
        episode terminated ``[envs]`` bool. The time limit is not its business."""

    @abstractmethod
    def _observe(self, rows: Tensor | None = None) -> Tensor:
        """Observations ``[envs or R, agents, features]`` float32 of all copies or of ``rows`` ``[R]``."""

    def _legal(self, rows: Tensor | None = None) -> Tensor:
        """Available actions ``[envs or R, agents, actions]`` bool; all of them unless overridden."""
        return self._all_legal if rows is None else self._all_legal[: len(rows)]

    def _global_state(self, observation: Tensor, rows: Tensor | None = None) -> Tensor:
        """Global state ``[envs or R, state_features]``; ``observation`` is what :meth:`_observe` gave."""
        return observation.flatten(1)

    # -- stepping without TensorDicts ---------------------------------------------------------------------------------
    def restart(self, rows: Tensor | None = None) -> None:
        """Start new episodes in all copies, or in ``rows`` ``[R]`` int64."""
        rows = torch.arange(self.envs, device=self.device) if rows is None else rows
        self._draw(rows)
        self.elapsed[rows] = 0

    def advance(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step all copies.

        Args:
            actions: int64 ``[envs, agents]``.

        Returns:
            Rewards ``[envs, agents]``; terminated and truncated, ``[envs]`` bool. Finished copies wait for
            :meth:`restart`.
        """
        reward, terminated = self._advance(actions)
        self.elapsed += 1
        over = self.elapsed >= self.episode_limit
        if self.time_limit == "terminated":
            terminated = terminated | over
            return reward, terminated, torch.zeros_like(over)
        return reward, terminated, over & ~terminated

    def observe(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Observation, available actions and global state of all copies, or of ``rows``; shapes as in the class."""
        observation = self._observe(rows)
        return observation, self._legal(rows), self._global_state(observation, rows)

    def check_actions(self, actions: Tensor) -> None:
        """Raises: ValueError: for another shape or an action out of range."""
        if actions.shape != (self.envs, self.num_agents):
            raise ValueError(
                f"{type(self).__name__}: action must be [{self.envs}, {self.num_agents}], got {list(actions.shape)}"
            )
        if actions.dtype != torch.int64 or bool(((actions < 0) | (actions >= self.num_actions)).any()):
            raise ValueError(
                f"{type(self).__name__}: action must be int64 in [0, {self.num_actions}), got {actions.dtype} in "
                f"[{int(actions.min())}, {int(actions.max())}]"
            )

    # -- exact position -----------------------------------------------------------------------------------------------
    def snapshot(self) -> dict[str, Tensor]:
        """Everything that decides how the batch goes on; loadable by ``torch.load(weights_only=True)``."""
        return {
            **{f"fields.{name}": value.clone() for name, value in self.fields.items()},
            "elapsed": self.elapsed.clone(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where :meth:`snapshot` was taken.

        Raises:
            ValueError: if the snapshot is of another environment or batch.
        """
        wanted = {f"fields.{name}": value for name, value in self.fields.items()}
        for name, value in wanted.items():
            if name not in state or state[name].shape != value.shape:
                got = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"{type(self).__name__}: snapshot: '{name}' must be {list(value.shape)}, got {got}: it is of "
                    "another task or number of environments"
                )
        for name in self.fields:
            self.fields[name].copy_(state[f"fields.{name}"])
        self.elapsed.copy_(state["elapsed"])
        self.generator.set_state(state["generator"].cpu())

    # -- TorchRL ------------------------------------------------------------------------------------------------------
    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        chosen = tensordict.get("_reset", None) if tensordict is not None else None
        self.restart(None if chosen is None else chosen.reshape(self.envs).nonzero().squeeze(1))
        flag = torch.zeros(self.envs, 1, dtype=torch.bool, device=self.device)
        return self._seen(flag, flag.clone(), first=True)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict[GROUP, "action"]
        self.check_actions(actions)
        reward, terminated, truncated = self.advance(actions)
        seen = self._seen(terminated.unsqueeze(1), truncated.unsqueeze(1))
        return seen.set((GROUP, "reward"), reward.unsqueeze(-1))

    def _seen(self, terminated: Tensor, truncated: Tensor, first: bool = False) -> TensorDict:
        observation, legal, state = self.observe()
        place = self.device
        agents = TensorDict(
            {"observation": observation, "action_mask": legal.clone()}, [self.envs, self.num_agents], device=place
        )
        return TensorDict(
            {
                GROUP: agents,
                "state": state,
                "is_init": torch.full_like(terminated, first),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            [self.envs],
            device=place,
        )
