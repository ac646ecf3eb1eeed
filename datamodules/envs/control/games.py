"""Games with known values, in tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.envs.control.base import ControlEnv


class IntegratorGame(ControlEnv):
    """``x' = x + a``, cost ``|x'|``, from 0; the executed action ``a`` holds the disturbance."""

    name = "integrator"

    def __init__(
        self,
        envs: int,
        horizon: int = 20,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(
            envs,
            observation_size=1,
            action_size=1,
            low=-torch.inf,
            high=torch.inf,
            episode_limit=horizon,
            reset_size=0,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self.fields["x"] = torch.zeros(envs, 1, dtype=dtype, device=self.device)
        self._never = torch.zeros(envs, dtype=torch.bool, device=self.device)

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        if rows is None:
            self.fields["x"] = torch.zeros_like(self.fields["x"])
        else:
            self.fields["x"] = self.fields["x"].index_fill(0, rows, 0.0)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        self.fields["x"] = x = self.fields["x"] + action
        return -x[:, 0].abs(), self._never

    def _look(self, rows: Tensor | None) -> Tensor:
        x = self.fields["x"]
        return x if rows is None else x[rows]
