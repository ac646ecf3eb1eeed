"""Gymnasium's pendulum and cart-pole in tensors, equal to the originals step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from datamodules.envs.control.games import TensorEnv


class Pendulum(TensorEnv):
    """Gymnasium's ``Pendulum-v1``: swing a pendulum up with a torque in [-2, 2], clipped; never terminated.

    Observations are ``[cos, sin, angular velocity]``, the angle 0 being upright. An episode begins at a uniform angle,
    with a uniform angular velocity in [-1, 1]. Dynamics parameters: ``mass``, ``length``, ``gravity``. The safe set is
    within 60 degrees of upright, once it was there for half a second.

    Args:
        envs: copies.
        horizon: steps of an episode.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: a count below 1.
    """

    name = "pendulum"
    safe, settle = ((0, 0.5, 1.0),), 10
    gravity, mass, length = 10.0, 1.0, 1.0
    max_torque, max_speed, dt = 2.0, 8.0, 0.05

    def __init__(
        self,
        envs: int,
        *,
        horizon: int = 200,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(
            envs,
            state=("angle", "speed"),
            horizon=horizon,
            observation_size=3,
            low=-self.max_torque,
            high=self.max_torque,
            parameters=("mass", "length", "gravity"),
            positive=("mass", "length"),
            device=device,
            dtype=dtype,
            seed=seed,
        )

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        self._put((uniforms * 2.0 - 1.0) * uniforms.new_tensor([math.pi, 1.0]), rows)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        angle, speed = self.fields.values()
        mass, length, gravity = self.mass, self.length, self.gravity
        if parameters is not None:
            factors = self._factors(parameters, rows)
            mass, length, gravity = mass * factors[0], length * factors[1], gravity * factors[2]
        torque = self._scalar(action).clamp(-self.max_torque, self.max_torque)
        upright = angle.add(math.pi).remainder_(2 * math.pi).sub_(math.pi)  # the angle in [-pi, pi)
        reward = upright.square_().add_(speed.square().mul_(0.1)).add_(torque.square().mul_(0.001)).neg_()
        pull = angle.sin().mul_(gravity * (1.5 * self.dt) / length)
        speed.add_(pull).add_(torque.mul_(3.0 * self.dt / (mass * length**2))).clamp_(-self.max_speed, self.max_speed)
        angle.add_(speed * self.dt)
        return reward, self._never()

    def _look(self, rows: Tensor | None) -> Tensor:
        angle, speed = self.fields.values()
        if rows is not None:
            angle, speed = angle[rows], speed[rows]
        return torch.stack((angle.cos(), angle.sin(), speed), -1)

    def reference_action(self, observation: Tensor) -> Tensor:
        """Energy pumping (Astrom and Furuta 2000) until a linear law can hold the pendulum up."""
        cos, sin, speed = observation.unbind(-1)
        angle = torch.atan2(sin, cos)
        inertia = self.mass * self.length**2 / 3.0
        # energy relative to rest upright
        energy = 0.5 * inertia * speed.square() + self.mass * self.gravity * self.length / 2.0 * (cos - 1.0)
        pump = torch.where(energy < 0, self.max_torque, -self.max_torque) * torch.where(speed >= 0, 1.0, -1.0)
        hold = -(10.0 * angle + 2.0 * speed)
        near = (angle + 0.4 * speed).abs() < 0.4
        torque = torch.where(near, hold, pump)
        return torque.clamp(-self.max_torque, self.max_torque).unsqueeze(-1)


class CartPole(TensorEnv):
    """Gymnasium's ``CartPole-v1``: balance a pole on a cart; reward 1 a step, terminated when it falls or leaves.

    Observations are ``[position, velocity, angle, angular velocity]``, each uniform in [-0.05, 0.05] at the start.
    Dynamics parameters: ``pole_mass``, ``pole_length``, ``force``. A copy that has ended moves on, and earns, until it
    is restarted: what it says means nothing.

    Args:
        envs: copies.
        continuous: the force is 10 N times the action, clipped to [-1, 1]. Else actions are one-hot, ``[envs, 2]``: the
            larger entry pushes left (first) or right by 10 N, as in the original.
        horizon: steps of an episode.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: a count below 1.
    """

    name = "cartpole"
    fails = True
    gravity, cart_mass, pole_mass, half_length = 9.8, 1.0, 0.1, 0.5
    force, dt = 10.0, 0.02
    max_position, max_angle = 2.4, math.radians(12)

    def __init__(
        self,
        envs: int,
        *,
        continuous: bool = True,
        horizon: int = 500,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.discrete = not continuous
        super().__init__(
            envs,
            state=("position", "velocity", "angle", "turn"),
            horizon=horizon,
            action_size=1 if continuous else 2,
            low=-1.0 if continuous else 0.0,
            high=1.0,
            parameters=("pole_mass", "pole_length", "force"),
            positive=("pole_mass", "pole_length"),
            device=device,
            dtype=dtype,
            seed=seed,
        )

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        self._put(uniforms * 0.1 - 0.05, rows)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        position, velocity, angle, turn = self.fields.values()
        pole, length, strength = self.pole_mass, self.half_length, self.force
        if parameters is not None:
            factors = self._factors(parameters, rows)
            pole, length, strength = pole * factors[0], length * factors[1], strength * factors[2]
        total = pole + self.cart_mass
        lever = pole / total * length
        if self.discrete:
            push = (action[:, 1] > action[:, 0]).to(self.state_dtype).mul_(2.0).sub_(1.0)
        else:
            push = self._scalar(action).clamp(-1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        inertia = (cos.square().mul_(pole / total).neg_().add_(4.0 / 3.0)).mul_(length)
        thrust = push.mul_(strength / total).add_(turn.square().mul_(sin).mul_(lever))
        spin = sin.mul_(self.gravity).sub_(cos * thrust).div_(inertia)  # angular acceleration
        pace = thrust.sub_(cos.mul_(spin).mul_(lever))  # acceleration of the cart
        position.add_(velocity * self.dt)
        velocity.add_(pace.mul_(self.dt))
        angle.add_(turn * self.dt)
        turn.add_(spin.mul_(self.dt))
        fallen = (position.abs() > self.max_position).logical_or_(angle.abs() > self.max_angle)
        return torch.ones_like(position), fallen

    @property
    def best_return(self) -> float:
        return float(self.episode_limit)
