"""OpenSpiel's own way to play: ``rl_environment`` and an agent a seat, one game at a time, a network call a move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.networks.stacked_mlp import StackedMLP
from modules.optional import require


def as_module(network: StackedMLP, params: Mapping[str, Tensor]) -> torch.nn.Module:
    """The network as users of OpenSpiel write it: ``nn.Linear`` and ``nn.ReLU``."""
    layers: list[torch.nn.Module] = []
    for layer, (fan_in, fan_out) in enumerate(zip(network.widths[:-1], network.widths[1:], strict=True)):
        linear = torch.nn.Linear(fan_in, fan_out)
        linear.weight.data.copy_(params[f"weight_{layer}"][0].T)
        linear.bias.data.copy_(params[f"bias_{layer}"][0])
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def make_games(title: str, module: torch.nn.Module, seed: int = 0) -> Any:
    """A function ``games -> returns [games, players]`` that plays ``title`` with ``module`` in all seats.

    Args:
        title: the game, as OpenSpiel writes it; turn-based, with information-state tensors.
        module: information-state tensor -> one logit an action.
        seed: of actions and chance.
    """
    rl_environment = require("open_spiel.python.rl_environment", extra="games")
    rl_agent = require("open_spiel.python.rl_agent", extra="games")
    generator = np.random.default_rng(seed)

    class NetworkAgent(rl_agent.AbstractAgent):
        """Samples from the softmax over legal actions."""

        def __init__(self, player_id: int, num_actions: int) -> None:
            super().__init__(player_id)
            self.player, self.num_actions = player_id, num_actions

        @torch.no_grad()
        def step(self, time_step: Any, is_evaluation: bool = False) -> Any:
            if time_step.last():
                return None
            seen = torch.tensor(time_step.observations["info_state"][self.player], dtype=torch.float32)
            legal = time_step.observations["legal_actions"][self.player]
            chances = np.zeros(self.num_actions)
            chances[legal] = torch.softmax(module(seen)[legal], -1).double().numpy()
            return rl_agent.StepOutput(
                action=generator.choice(self.num_actions, p=chances / chances.sum()), probs=chances
            )

    environment = rl_environment.Environment(title, chance_event_sampler=rl_environment.ChanceEventSampler(seed=seed))
    actions = environment.action_spec()["num_actions"]
    agents = [NetworkAgent(player, actions) for player in range(environment.num_players)]

    def games(count: int) -> np.ndarray:
        returns = []
        for _ in range(count):
            time_step = environment.reset()
            while not time_step.last():
                chosen = agents[time_step.observations["current_player"]].step(time_step)
                time_step = environment.step([chosen.action])
            returns.append(time_step.rewards)
        return np.array(returns)

    return games
