"""Evaluation episodes: fixed starts, no exploration, one episode of every copy."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv
from modules.contracts import ActsMultiAgent


def team_return(reward: Tensor, common: bool) -> Tensor:
    """``[..]`` from agents' rewards ``[.., agents]``: their sum, or the one that all share."""
    return reward[..., 0] if common else reward.sum(-1)


@torch.no_grad()
def play_episodes(
    env: MultiAgentEnv, actor: ActsMultiAgent, seed: int, device: torch.device | str = "cpu", trace: bool = False
) -> TensorDict:
    """One episode of every copy of ``env``, all from their start.

    Args:
        env: copies; their generator is seeded with ``seed``, so that the same starts come again.
        actor: acts without exploring.
        seed: of the environments and of the actor.
        device: where the actor's networks live.
        trace: also keep every step.

    Returns:
        TensorDict ``[envs]``: ``episode_return`` (undiscounted, of the team), ``agent_return`` ``[.., agents]`` and
        ``episode_length`` int64; with ``trace`` also ``("trace", ...)`` (:class:`~modules.contracts.PlaysTeams`).
    """
    env.generator.manual_seed(seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    env.restart()
    observation, legal, state = env.observe()
    carry = actor.begin(observation.to(device), state.to(device), generator, None)
    total = torch.zeros(env.envs, env.num_agents, device=env.device)
    length = torch.zeros(env.envs, dtype=torch.int64, device=env.device)
    running = torch.ones(env.envs, dtype=torch.bool, device=env.device)
    steps: list[dict[str, Tensor]] = []
    for _ in range(env.episode_limit):
        seen = legal.to(device) if env.restricts_actions else None
        action, carry = actor.act(observation.to(device), seen, carry, generator, None)
        action = action.to(env.device)
        row = _seen(env, observation, legal, state)
        reward, terminated, truncated = env.advance(action)
        total += reward * running.unsqueeze(1)
        length += running
        if trace:
            row |= {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
            steps.append({**row, "running": running})
        running = running & ~(terminated | truncated)
        if trace or bool(running.any()):
            observation, legal, state = env.observe()
        if not bool(running.any()):
            break
    values = {
        "episode_return": team_return(total, env.common_reward),
        "agent_return": total,
        "episode_length": length,
    }
    result = TensorDict(values, [env.envs])
    if trace:
        last = _seen(env, observation, legal, state)  # after the last step
        for name, value in steps[0].items():
            rows = [value, *(step[name] for step in steps[1:]), *([last[name]] if name in last else [])]
            result["trace", name] = torch.stack(rows, 1)
    return result


def _seen(env: MultiAgentEnv, observation: Tensor, legal: Tensor, state: Tensor) -> dict[str, Tensor]:
    """What is known in a step, without what follows from the rest."""
    return {
        "observation": observation,
        **({"legal": legal} if env.restricts_actions else {}),
        **({"state": state} if env.own_state else {}),
    }
