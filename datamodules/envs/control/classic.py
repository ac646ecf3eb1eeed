"""Pendulum, with gymnasium's dynamics and reward, in tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from datamodules.envs.control.base import ControlEnv


class Pendulum(ControlEnv):
    """Swing a pendulum up and hold it (gymnasium's Pendulum-v1)."""

    name = "pendulum"

    def __init__(
        self,
        envs: int,
        horizon: int = 200,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(
            envs,
            observation_size=3,
            action_size=1,
            low=-2.0,
            high=2.0,
            episode_limit=horizon,
            reset_size=2,
            parameters=("mass", "length", "gravity"),
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self.fields["state"] = torch.zeros(envs, 2, dtype=dtype, device=self.device)
        self._never = torch.zeros(envs, dtype=torch.bool, device=self.device)

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        drawn = (uniforms * 2.0 - 1.0) * torch.tensor([math.pi, 1.0], dtype=torch.float64, device=self.device)
        state = drawn.to(self.state_dtype)
        if rows is None:
            self.fields["state"] = state
        else:
            self.fields["state"] = self.fields["state"].index_copy(0, rows, state)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        angle, speed = self.fields["state"].unbind(1)
        torque = action[:, 0].clamp(-2.0, 2.0)
        wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(wrapped.square() + 0.1 * speed.square() + 0.001 * torque.square())
        pull, push = 15.0, 3.0
        if parameters is not None:
            mass, length, gravity = (1.0 + parameters).unbind(1)
            pull, push = 15.0 * gravity / length, 3.0 / (mass * length.square())
        speed = (speed + (pull * angle.sin() + push * torque) * 0.05).clamp(-8.0, 8.0)
        self.fields["state"] = torch.stack([angle + speed * 0.05, speed], 1)
        return reward, self._never

    def _look(self, rows: Tensor | None) -> Tensor:
        state = self.fields["state"] if rows is None else self.fields["state"][rows]
        return torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1]], 1)
