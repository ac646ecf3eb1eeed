"""A multi-agent environment whose observations tell which episode and which step they are of."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv


class Counting(MultiAgentEnv):
    """Agents see ``(number drawn for the episode, steps so far)``; before step 2 nobody may take action 2.

    Every agent is paid the number of its action; an episode terminates with probability 0.2 a step if ``ends``, and is
    truncated at ``limit``. The state is the step count alone.
    """

    def __init__(self, envs: int, limit: int = 7, agents: int = 2, ends: bool = True, seed: int = 0) -> None:
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=3,
            observation_size=2,
            episode_limit=limit,
            state_size=1,
            seed=seed,
        )
        self.ends = ends
        self.fields = {"number": torch.zeros(envs), "steps": torch.zeros(envs)}

    def _draw(self, rows: Tensor) -> None:
        drawn = torch.randint(1, 1 << 20, (len(rows),), generator=self.generator)
        self.fields["number"][rows] = drawn.float()
        self.fields["steps"][rows] = 0.0

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        self.fields["steps"] += 1.0
        over = torch.rand(self.envs, generator=self.generator) < 0.2
        return actions.float(), over if self.ends else torch.zeros_like(over)

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        seen = torch.stack([self.fields["number"], self.fields["steps"]], -1)
        seen = seen if rows is None else seen[rows]
        return seen.unsqueeze(1).expand(-1, self.num_agents, -1).clone()

    def _legal(self, rows: Tensor | None = None) -> Tensor:
        steps = self.fields["steps"] if rows is None else self.fields["steps"][rows]
        legal = torch.ones(len(steps), self.num_agents, 3, dtype=torch.bool)
        legal[..., 2] = (steps >= 2).unsqueeze(1)
        return legal

    def _global_state(self, observation: Tensor, rows: Tensor | None = None) -> Tensor:
        return observation[:, 0, 1:].clone()
