"""Robust Sarsa (Zhang et al. 2020, section 3.5): an action-value function of a fixed policy, smooth in the action."""

from __future__ import annotations

from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.control.bounds import interval_bounds
from modules.control.normaliser import Reduce
from modules.networks.stacked_mlp import StackedLearners, StackedMLP
from modules.objectives.ppo import minibatch_of


def whole_transitions(batch: TensorDict) -> Tensor:
    """bool ``[envs, steps]``: steps whose successor stands in the rollout, or that terminated and so have none."""
    terminated, truncated = cast(Tensor, batch["terminated"]), cast(Tensor, batch["truncated"])
    whole = terminated | ~truncated
    whole[:, -1] = terminated[:, -1]
    return whole


class RobustSarsa:
    """``Q(s, a)`` learned by SARSA, with a penalty on how far it can change within a ball around the action.

    Args:
        observation_size, action_size: inputs.
        hidden: widths.
        lr: Adam's.
        action_eps: radius of the ball around the action, in the environment's units.
        weight: of the penalty, which is the width of the interval bounds of Q.
        gamma: discount.
        generator: draws the first weights.
        device: where it lives.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generator: torch.Generator,
        hidden: tuple[int, ...] = (64, 64),
        lr: float = 1e-3,
        action_eps: float = 0.05,
        weight: float = 0.1,
        gamma: float = 0.99,
        device: torch.device | str = "cpu",
    ) -> None:
        self.net = StackedMLP(observation_size + action_size, list(hidden), 1, "tanh")
        self.learner = StackedLearners({"q": self.net}, lr)
        self.learner.begin(self.learner.fresh(1, generator).to(device))
        self.action_eps, self.weight, self.gamma = action_eps, weight, gamma
        self.scale = 1.0

    def __call__(self, clean: Tensor, action: Tensor) -> Tensor:
        """``[rows]``; differentiable in both arguments."""
        params = self.learner.views(self.learner.flat.detach())["q"]
        return self.net.apply(params, torch.cat([clean, action], -1).unsqueeze(0))[0, :, 0]

    def learn(
        self, batch: TensorDict, reduce: Reduce | None, epochs: int = 2, minibatches: int = 8, seed: int = 0
    ) -> float:
        """One rollout ``[envs, steps]`` with ``features`` (its first columns the observation seen) and ``action``.

        Returns:
            The last minibatch's squared error, over all ranks.
        """
        size = self.net.widths[0] - batch["action"].shape[-1]
        inputs = torch.cat([batch["features"][..., :size], batch["action"]], -1)
        reward = cast(Tensor, batch["reward"]).float() * self.scale
        terminated, usable = cast(Tensor, batch["terminated"]), whole_transitions(batch)
        rows = inputs.flatten(0, 1)
        following = torch.cat([inputs[:, 1:], inputs[:, -1:]], 1).flatten(0, 1)
        flat_reward, flat_end, flat_use = reward.flatten(), terminated.flatten(), usable.flatten()
        error = torch.zeros(1)
        for epoch in range(epochs):
            part = minibatch_of(torch.arange(len(rows)), seed, epoch, minibatches).to(rows.device)
            for number in range(minibatches):
                chosen = (part == number) & flat_use
                params = self.learner.views(self.learner.flat)["q"]
                with torch.no_grad():
                    ahead = self.net.apply(params, following[chosen].unsqueeze(0))[0, :, 0]
                    target = flat_reward[chosen] + self.gamma * ahead * (~flat_end[chosen])
                mine = rows[chosen]
                loss = (self.net.apply(params, mine.unsqueeze(0))[0, :, 0] - target).square()
                reach = torch.zeros_like(mine)
                reach[:, size:] = self.action_eps
                low, high = interval_bounds(self.net, params, (mine - reach).unsqueeze(0), (mine + reach).unsqueeze(0))
                count = torch.tensor([float(len(mine))], device=rows.device)
                whole = (loss + self.weight * (high - low)[0, :, 0]).sum() / count.clamp_min(1.0)
                shown = self.learner.step(
                    whole, count, {"error": loss.detach().sum().reshape(1) / count.clamp_min(1.0)}, reduce
                )
                error = shown["error"]
        return float(error)
