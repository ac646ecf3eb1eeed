"""Teams without a Trainer: environments that play on demand, scripted teams, and their subjects."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from datamodules.envs.base import MultiAgentEnv
from datamodules.rollout.evaluation import play_episodes
from modules.assurance.subject import Subject
from modules.contracts import ActsMultiAgent, MultiAgentSpec
from modules.marl import MultiAgentModule


def spec_of(env: MultiAgentEnv) -> MultiAgentSpec:
    return MultiAgentSpec(
        env.name, env.num_agents, env.num_actions, env.observation_size, env.state_size, env.episode_limit,
        env.own_state, env.restricts_actions, env.common_reward, env.idle_action,
    )  # fmt: skip


class Playing:
    """A :class:`~modules.contracts.PlaysTeams` of what ``make(envs)`` makes; counts the episodes played."""

    def __init__(self, make: Callable[[int], MultiAgentEnv], reference: float | None = None) -> None:
        self.make, self.reference_return, self.played = make, reference, 0
        self.spec = spec_of(make(1))

    def team_episodes(self, actor: ActsMultiAgent, episodes: int, seed: int, trace: bool = False) -> TensorDict:
        self.played += episodes
        return play_episodes(self.make(episodes), actor, seed, trace=trace)


class Scripted(MultiAgentModule):
    """A team that does what ``rule(observation, legal)`` says, ``[rows, agents]``."""

    def __init__(self, rule: Callable[[Tensor, Tensor | None], Tensor], partners: Any = None) -> None:
        super().__init__(partners=partners)
        self.rule = rule
        self.weight = nn.Parameter(torch.ones(()))

    def build(self, spec: MultiAgentSpec, generator: torch.Generator) -> None:
        self.spec = spec

    def begin(self, observation, state, generator, frames) -> dict[str, Tensor]:
        return {}

    def act(self, observation, legal, carry, generator, frames) -> tuple[Tensor, dict[str, Tensor]]:
        return self.rule(observation, legal), carry

    def answers(self, observation: Tensor, state: Tensor) -> Tensor:
        return self.weight * observation


def always(*actions: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A rule: agent i takes the i-th action, deaf to masks."""
    return lambda observation, legal: torch.tensor(actions).expand(observation.shape[:2]).clone()


def subject_with(module: MultiAgentModule, data: Playing) -> Subject:
    """The subject of ``module`` in a run on ``data``."""
    if module.spec is None:
        module.build(data.spec, torch.Generator().manual_seed(0))
    module.trainer = SimpleNamespace(datamodule=data, world_size=1)  # type: ignore[assignment]
    return module.assurance_subject()
