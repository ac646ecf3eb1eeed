"""What every batched control environment shares: clocks, partial restarts, snapshots, TorchRL's interface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from modules.contracts.control import ControlSpec


class ControlEnv(EnvBase):
    """``envs`` copies of a continuous-control task, stepped as one.

    A subclass implements :meth:`_begin`, :meth:`_step_all` and :meth:`_look`, and keeps whatever changes over time in
    ``self.fields`` (name to tensor ``[envs, ...]``). It draws no random numbers of its own: an episode's start is made
    of uniform numbers that it is handed, so that equal numbers give equal episodes.

    Two ways to step, equal by test: TorchRL's (``reset``, ``step``, ``rollout``, collectors; keys ``observation``,
    ``action``, ``reward``, ``done``, ``terminated``, ``truncated``) and, without TensorDicts, :meth:`restart`,
    :meth:`observe` and :meth:`advance`.

    Args:
        envs: copies.
        observation_size, action_size: features of an observation, coordinates of an action.
        low, high: bounds of the actions, a number or one for each coordinate; infinite: none.
        episode_limit: steps after which an episode is truncated.
        reset_size: uniform numbers that an episode's start is made of.
        parameters: names of the dynamics parameters that :meth:`advance` can change.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of the numbers that TorchRL's ``reset`` draws.

    Raises:
        ValueError: a count below 1.
    """

    name = "control"
    how = "tensors, all copies in one step"
    """How copies are stepped, for the log."""
    exact_resume = True
    """Whether :meth:`restore` goes on exactly; else it starts new episodes."""
    discrete = False
    """Whether actions are finitely many, given one-hot."""
    safe: tuple[tuple[int, float, float], ...] = ()
    """The safe set, see :class:`~modules.contracts.control.ControlSpec`."""
    settle = 1
    """Steps in the safe set after which it must not be left."""
    fails = False
    """Whether an episode that terminates has failed."""

    def __init__(
        self,
        envs: int,
        *,
        observation_size: int,
        action_size: int,
        low: float | tuple[float, ...],
        high: float | tuple[float, ...],
        episode_limit: int,
        reset_size: int,
        parameters: tuple[str, ...] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        for field, value in (
            ("envs", envs),
            ("observation_size", observation_size),
            ("action_size", action_size),
            ("episode_limit", episode_limit),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {field} must be >= 1, got {value}")
        super().__init__(device=torch.device(device), batch_size=(envs,))
        self.envs, self.state_dtype = envs, dtype
        self.observation_size, self.action_size = observation_size, action_size
        self.episode_limit, self.reset_size, self.parameter_names = episode_limit, reset_size, parameters
        place = self.device
        self.low = torch.as_tensor(low, dtype=dtype, device=place).expand(action_size)
        self.high = torch.as_tensor(high, dtype=dtype, device=place).expand(action_size)
        self.generator = torch.Generator(device=place)
        self.generator.manual_seed(seed)
        self.fields: dict[str, Tensor] = {}
        self.elapsed = torch.zeros(envs, dtype=torch.int64, device=place)
        self._make_specs()

    @property
    def control_spec(self) -> ControlSpec:
        return ControlSpec(
            task=self.name,
            observation_size=self.observation_size,
            action_size=self.action_size,
            action_low=tuple(self.low.tolist()),
            action_high=tuple(self.high.tolist()),
            episode_limit=self.episode_limit,
            parameters=self.parameter_names,
            discrete=self.discrete,
            safe=self.safe,
            settle=self.settle,
            fails=self.fails,
        )

    @property
    def best_return(self) -> float | None:
        """Of an undisturbed episode under optimal control; ``None``: not known."""
        return None

    def reference_action(self, observation: Tensor) -> Tensor | None:
        """See :class:`~modules.contracts.ScalesReturns`."""
        return None

    # -- what a subclass writes ---------------------------------------------------------------------------------------
    @abstractmethod
    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        """Put fresh states into :attr:`fields` at ``rows`` (``None``: everywhere).

        Args:
            uniforms: ``[rows, reset_size]`` float64 in [0, 1), all that a start may depend on.
        """

    @abstractmethod
    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Advance the states by one step under ``action`` ``[envs, action_size]``, as it is, unclipped.

        Args:
            parameters: ``[envs, len(parameters)]``, relative changes: a parameter is ``nominal * (1 + change)``.
            rows: copies that must advance (the others may do anything); ``None``: all.

        Returns:
            reward ``[envs]``, terminated ``[envs]`` bool.
        """

    @abstractmethod
    def _look(self, rows: Tensor | None) -> Tensor:
        """Observations ``[rows, observation_size]``: a new tensor that later steps do not change."""

    # -- without TensorDicts ------------------------------------------------------------------------------------------
    def restart(self, uniforms: Tensor, rows: Tensor | None = None) -> None:
        """Begin new episodes in copies ``rows`` (``None``: all), from ``uniforms`` ``[rows, reset_size]`` float64."""
        if rows is None:
            self.elapsed.zero_()
        else:
            self.elapsed[rows] = 0
        self._begin(uniforms, rows)

    def observe(self, rows: Tensor | None = None) -> Tensor:
        """``[envs or rows, observation_size]``, a tensor that later steps do not change."""
        return self._look(rows)

    def advance(
        self, action: Tensor, parameters: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step: reward ``[envs]``, terminated and truncated ``[envs]`` bool. Done copies wait for a restart.

        Args:
            action: ``[envs, action_size]``, executed as it is.
            parameters: ``[envs, parameters]``, relative changes; ``None``: nominal.
            rows: copies whose results matter; ``None``: all.
        """
        reward, terminated = self._step_all(action, parameters, rows)
        self.elapsed += 1
        return reward, terminated, (self.elapsed >= self.episode_limit) & ~terminated

    def snapshot(self) -> dict[str, Any]:
        """The whole state, loadable by ``torch.load(weights_only=True)``."""
        return {
            "fields": {name: value.clone() for name, value in self.fields.items()},
            "elapsed": self.elapsed.clone(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`snapshot` was taken.

        Raises:
            ValueError: it was taken of another number of environments, or of another kind.
        """
        mine = {name: tuple(value.shape) for name, value in self.fields.items()}
        theirs = {name: tuple(value.shape) for name, value in state["fields"].items()}
        if mine != theirs:
            raise ValueError(f"{type(self).__name__}: the saved environments have fields {theirs}, these have {mine}")
        for name, value in state["fields"].items():
            self.fields[name] = value.to(self.device, copy=True)
        self.elapsed = state["elapsed"].to(self.device, copy=True)
        self.generator.set_state(state["generator"].cpu())

    # -- TorchRL ------------------------------------------------------------------------------------------------------
    def _make_specs(self) -> None:
        each, place, dtype = (self.envs,), self.device, self.state_dtype
        seen = Unbounded(torch.Size([*each, self.observation_size]), dtype=dtype, device=place)
        self.observation_spec = Composite(observation=seen, shape=each)
        shape = torch.Size([*each, self.action_size])
        if bool(self.low.isfinite().all() and self.high.isfinite().all()):
            low, high = self.low.expand(shape), self.high.expand(shape)
            self.action_spec = Bounded(low, high, shape, dtype=dtype, device=place)
        else:
            self.action_spec = Unbounded(shape, dtype=dtype, device=place)
        self.reward_spec = Unbounded(torch.Size([*each, 1]), dtype=dtype, device=place)
        flag = Categorical(2, torch.Size([*each, 1]), dtype=torch.bool, device=place)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=each)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def _uniforms(self, count: int) -> Tensor:
        shape = (count, self.reset_size)
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self.restart(self._uniforms(self.envs))
        else:
            rows = mask.reshape(self.envs).nonzero().squeeze(1)
            if len(rows):
                self.restart(self._uniforms(len(rows)), rows)
        off = torch.zeros(self.envs, 1, dtype=torch.bool, device=self.device)
        values = {"observation": self.observe(), "done": off, "terminated": off.clone(), "truncated": off.clone()}
        return TensorDict(values, [self.envs], device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        if action.shape != (self.envs, self.action_size):
            raise ValueError(
                f"{type(self).__name__}: action must be {(self.envs, self.action_size)}, got {tuple(action.shape)}"
            )
        reward, terminated, truncated = self.advance(action)
        return TensorDict(
            {
                "observation": self.observe(),
                "reward": reward.unsqueeze(-1),
                "done": (terminated | truncated).unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
                "truncated": truncated.unsqueeze(-1),
            },
            [self.envs],
            device=self.device,
        )
