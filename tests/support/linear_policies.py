"""Control subjects whose policy is a known linear law, without a trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.control_data import ControlDataModule
from modules.assurance.subject import Subject
from modules.control.evaluation import RobustEvaluation
from modules.control.perturbation import PerturbationSettings
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.suite import AttackSettings

SMALL = 1e-3  # tanh(SMALL x) / SMALL is x to six digits

INTEGRATOR = PerturbationSettings(
    space="action", eps=1.0, eps_bar=0.2, first_step="zero", clip_executed=False, coupled=True
)
BOUNDED = PerturbationSettings(space="action", eps=0.3, eps_bar=0.06)


class LinearPolicies(RobustEvaluation):
    """Agents ``u = K x + b`` of a task.

    Args:
        data: set up.
        laws: ``K`` ``[members, actions, observation]``.
        bias: ``b`` ``[members, actions]``.
        steep: factor inside the tanh, over the small one that makes it linear.
    """

    def __init__(
        self,
        data: ControlDataModule,
        laws: Tensor,
        bias: Tensor | None = None,
        perturbation: PerturbationSettings = BOUNDED,
        memory: MemorySettings | None = None,
        **attacks: Any,
    ) -> None:
        self._own_data = data
        settings = AttackSettings(steps=2, sarsa_steps=2, ppo=PPOSettings(epochs=1, minibatches=2), **attacks)
        size = laws.shape[-1]
        super().__init__(perturbation, settings, memory or MemorySettings(), (size,), 0.5)
        self.laws, self.bias = laws, bias
        self._attach(data.spec)

    @property
    def data(self) -> ControlDataModule:
        return self._own_data

    def build(self, spec) -> None:
        self.params: dict[str, Tensor] = {}

    def deployed(self) -> tuple[dict[str, Tensor], Tensor]:
        members, size = len(self.laws), self.laws.shape[-1]
        generator = torch.Generator().manual_seed(0)
        params: dict[str, Tensor] = {}
        for name, network in (("policy", self.networks.policy), ("value", self.networks.value)):
            params |= {f"{name}.{key}": value for key, value in network.init(members, generator).items()}
        params |= {"mean": torch.zeros(members, size), "std": torch.ones(members, size), "active": torch.ones(members)}
        if self.memory.kind != "lstm":
            weight = torch.zeros_like(params["policy.weight_0"])
            weight[:, :size] = SMALL * torch.eye(size)
            params["policy.weight_0"] = weight
            params["policy.weight_1"] = self.laws.transpose(1, 2) / SMALL
            params["policy.bias_1"] = torch.zeros(members, self.laws.shape[1]) if self.bias is None else self.bias
        return params, torch.full((members,), 1.0 / members, dtype=torch.float64)


def control_data(task: str, **options: Any) -> ControlDataModule:
    """Eight environments of a task, set up."""
    data = ControlDataModule(task, options, envs=8, frames_per_batch=64)
    data.setup("test")
    return data


def linear_subject(task: str, law: list[list[float]], options: dict[str, Any] | None = None, **others: Any) -> Subject:
    """The subject of one agent ``u = K x + b``."""
    module = LinearPolicies(control_data(task, **(options or {})), torch.tensor(law).unsqueeze(0), **others)
    return module.assurance_subject()
