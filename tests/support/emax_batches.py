"""Learners without a Trainer, random batches for them, and the same networks out of torch's own layers."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from modules.contracts import MultiAgentSpec
from modules.emax import ValueMARL


def make_spec(agents: int = 3, actions: int = 4, features: int = 5, **changes: Any) -> MultiAgentSpec:
    state = changes.pop("state_size", agents * features)
    return MultiAgentSpec("test", agents, actions, features, state, changes.pop("episode_limit", 6), **changes)


def make_learner(spec: MultiAgentSpec, seed: int = 0, **settings: Any) -> ValueMARL:
    """A built ValueMARL, its weights drawn from ``seed``."""
    learner = ValueMARL(**settings)
    learner.build(spec, torch.Generator().manual_seed(seed))
    return learner


def make_batch(
    spec: MultiAgentSpec, minibatches: int = 1, items: int = 8, steps: int = 1, seed: int = 0, members: int = 0
) -> TensorDict:
    """One update's part ``[minibatches, items]``: normal observations and rewards, 20 % terminated, and from the second
    item on a random number of steps filled. Masks leave at least one action."""
    draw = torch.Generator().manual_seed(seed)
    lead = (minibatches, items)
    tensors: dict[str, Tensor] = {
        "observation": torch.randn(*lead, steps + 1, spec.num_agents, spec.observation_size, generator=draw),
        "action": torch.randint(spec.num_actions, (*lead, steps, spec.num_agents), generator=draw),
        "terminated": torch.rand(*lead, steps, generator=draw) < 0.2,
    }
    reward = torch.randn(*lead, steps, spec.num_agents, generator=draw)
    tensors["reward"] = reward[..., :1].expand_as(reward).clone() if spec.common_reward else reward
    if spec.restricts_actions:
        legal = torch.rand(*lead, steps + 1, spec.num_agents, spec.num_actions, generator=draw) < 0.6
        some = torch.randint(spec.num_actions, (*lead, steps + 1, spec.num_agents, 1), generator=draw)
        tensors["legal"] = legal.scatter(-1, some, True)
    if spec.own_state:
        tensors["state"] = torch.randn(*lead, steps + 1, spec.state_size, generator=draw)
    length = torch.randint(1, steps + 1, lead, generator=draw)
    length[:, 0] = steps
    tensors["filled"] = torch.arange(steps) < length.unsqueeze(-1)
    if members:
        tensors["member_mask"] = torch.rand(*lead, members, generator=draw) < 0.5
    return TensorDict(tensors, list(lead))


def adam(learner: ValueMARL) -> torch.optim.Adam:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=learner.learning_rate, eps=learner.adam_eps)


def update(learner: ValueMARL, optimizer: torch.optim.Optimizer, part: TensorDict, number: int = 0) -> Tensor:
    """One optimiser update as in ``ValueMARL.training_step``; each member's loss."""
    learner._update_targets(number)
    losses = learner.losses(part)[0]
    optimizer.zero_grad()
    losses.sum().backward()
    learner.clip_gradients_of_members()
    optimizer.step()
    return losses.detach()


def sequential(learner: ValueMARL, member: int, agent: int = 0, flat: Tensor | None = None) -> nn.Sequential:
    """A feed-forward network of ``member`` (and of ``agent``, where agents share none) as ``nn.Sequential``."""
    agents = learner.agents
    params = agents.views((learner.online if flat is None else flat).detach())
    row = member * agents.copies + agent
    layers: list[nn.Module] = []
    for layer in range(3):
        weight, bias = params[f"weight_{layer}"][row], params[f"bias_{layer}"][row]
        linear = nn.Linear(*weight.shape)
        linear.weight.data.copy_(weight.T)
        linear.bias.data.copy_(bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_ids(observation: Tensor) -> Tensor:
    """``[..., agents, features]`` with each agent's one-hot number behind."""
    agents = observation.shape[-2]
    return torch.cat([observation, torch.eye(agents).expand(*observation.shape[:-1], agents)], -1)
