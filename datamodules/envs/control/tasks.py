"""Names of control tasks and what they stand for. A name is only ever looked up, never imported unless allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch

from datamodules.envs.control.base import ControlEnv

TENSOR = ("integrator", "lq", "double_integrator", "pendulum", "cartpole")
MUJOCO = (
    "mujoco/Hopper-v5",
    "mujoco/HalfCheetah-v5",
    "mujoco/Walker2d-v5",
    "mujoco/InvertedPendulum-v5",
    "mujoco/InvertedDoublePendulum-v5",
    "mujoco/Ant-v5",
    "mujoco/Ant-v5-lite",
    "mujoco/Humanoid-v5",
    "mujoco/Swimmer-v5",
)


def known_tasks() -> list[str]:
    """Every task id but those of ``gym/``, which gymnasium looks up."""
    return [*TENSOR, *MUJOCO]


def make_control_env(
    task: str,
    envs: int,
    *,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ControlEnv:
    """``envs`` copies of ``task``, in tensors where we have them so, else stepped one by one.

    Args:
        task: one of :func:`known_tasks`, or ``gym/<id>`` for any task of gymnasium with box-shaped spaces.
        envs: copies.
        options: arguments of the environment's constructor.
        device: of tensor environments.
        seed: of the numbers that TorchRL's ``reset`` draws.

    Raises:
        ValueError: an unknown name, with the nearest ones, or an option that the environment does not have.
    """
    kwargs: dict[str, Any] = {"seed": seed, **(options or {})}
    try:
        if task in TENSOR:
            if task in ("pendulum", "cartpole"):
                from datamodules.envs.control import classic as home
            else:
                from datamodules.envs.control import games as home
            classes = {
                "integrator": "IntegratorGame",
                "lq": "LQGame",
                "double_integrator": "DoubleIntegrator",
                "pendulum": "Pendulum",
                "cartpole": "CartPole",
            }
            return getattr(home, classes[task])(envs, device=device, **kwargs)
        if task in MUJOCO:
            from datamodules.envs.control.mujoco_batch import MuJoCoEnv

            return MuJoCoEnv(envs, task=task.removeprefix("mujoco/"), **kwargs)
        if task.startswith("gym/"):
            from datamodules.envs.control.gym_fallback import GymnasiumEnv

            return GymnasiumEnv(envs, task=task.removeprefix("gym/"), **kwargs)
    except TypeError as error:
        raise ValueError(f"make_control_env: options of {task}: {error}") from None
    near = difflib.get_close_matches(task, known_tasks(), 3, 0.4)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise ValueError(
        f"make_control_env: task: unknown '{task}'{hint}; known are {', '.join(known_tasks())}, and gym/<id> for others"
    )
