"""One-step common-payoff matrix games: climbing and penalty (Claus & Boutilier 1998), or any table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv

CLIMBING = ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0))


def penalty_table(k: float) -> tuple[tuple[float, ...], ...]:
    """The penalty game with penalty ``k`` <= 0 (Claus & Boutilier 1998, figure 3)."""
    return ((k, 0.0, 10.0), (0.0, 2.0, 0.0), (10.0, 0.0, k))


class MatrixGame(MultiAgentEnv):
    """A matrix game with one payoff for all, played ``rounds`` times an episode.

    The observation is the constant 1, so that a policy can only learn what to play.

    Args:
        envs: games side by side.
        payoffs: nested lists, one level an agent, ``payoffs[a_0][a_1]...``; all sides equally long.
        rounds: plays per episode; the last one terminates it.
        device, seed: as in :class:`MultiAgentEnv`.

    Raises:
        ValueError: fewer than two agents, sides of unequal length, or a payoff that is not finite.
    """

    name = "matrix"
    common_reward = True

    def __init__(
        self,
        envs: int,
        payoffs: Sequence[Sequence[float]] = CLIMBING,
        rounds: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        try:
            table = torch.tensor(payoffs, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"MatrixGame: payoffs: must be a full table of numbers ({error})") from None
        if table.ndim < 2 or len(set(table.shape)) != 1:
            raise ValueError(f"MatrixGame: payoffs: needs equal sides, one per agent, got {list(table.shape)}")
        if not bool(table.isfinite().all()):
            raise ValueError("MatrixGame: payoffs: must be finite")
        agents, actions = table.ndim, table.shape[0]
        super().__init__(
            envs,
            num_agents=agents,
            num_actions=actions,
            observation_size=1,
            episode_limit=rounds,
            time_limit="terminated",
            device=device,
            seed=seed,
        )
        self.payoffs = table.to(self.device)
        self.best_return = rounds * float(table.max())
        self._strides = torch.tensor([actions ** (agents - 1 - i) for i in range(agents)], device=self.device)

    def _draw(self, rows: Tensor) -> None:
        """There is nothing to draw."""

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        payoff = self.payoffs.flatten()[(actions * self._strides).sum(-1)]
        reward = payoff.unsqueeze(1).expand(self.envs, self.num_agents).clone()
        return reward, torch.zeros(self.envs, dtype=torch.bool, device=self.device)

    def _observe(self, rows: Tensor | None = None) -> Tensor:
        count = self.envs if rows is None else len(rows)
        return torch.ones(count, self.num_agents, 1, device=self.device)
