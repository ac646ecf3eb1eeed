"""What every batched environment must do: go on exactly from a snapshot, and step alike with and without TorchRL."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.envs.base import MultiAgentEnv


def walk(env: MultiAgentEnv, steps: int, seed: int) -> list[Tensor]:
    """Everything seen in ``steps`` random steps with restarts."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        actions = torch.randint(env.num_actions, (env.envs, env.num_agents), generator=generator)
        reward, terminated, truncated = env.advance(actions)
        out += [reward, terminated, truncated, *env.observe()]
        env.restart((terminated | truncated).nonzero().squeeze(1))
    return out


def assert_snapshot_goes_on_exactly(make: Callable[[int, int], MultiAgentEnv]) -> None:
    """From a snapshot on disk, a deep copy and a pickled one; ``make(envs, seed)``."""
    env = make(9, 5)
    env.restart()
    walk(env, 60, seed=1)
    file = io.BytesIO()
    torch.save(env.snapshot(), file)
    file.seek(0)
    copies = [make(9, 99), copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    copies[0].restore(torch.load(file, weights_only=True))
    expected = walk(env, 60, seed=2)
    for other in copies:
        got = walk(other, 60, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def assert_torchrl_steps_as_without_tensordicts(make: Callable[[int, int], MultiAgentEnv]) -> None:
    """The same actions from the same seed, 120 steps with restarts; ``make(envs, seed)``."""
    ours, theirs = (make(7, 8) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    ours.restart()
    current = theirs.reset()
    for _ in range(120):
        seen = ours.observe()
        for value, key in zip(seen, (("agents", "observation"), ("agents", "action_mask"), "state"), strict=True):
            assert torch.equal(value, current[key])
        actions = torch.randint(ours.num_actions, (7, ours.num_agents), generator=generator)
        reward, terminated, truncated = ours.advance(actions)
        last = ours.observe()[0]
        ours.restart((terminated | truncated).nonzero().squeeze(1))
        stepped, current = theirs.step_and_maybe_reset(current.set(("agents", "action"), actions))
        after = stepped["next"]
        assert torch.equal(after["agents", "reward"].squeeze(-1), reward)
        assert torch.equal(after["terminated"].squeeze(-1), terminated)
        assert torch.equal(after["truncated"].squeeze(-1), truncated)
        assert torch.equal(after["agents", "observation"], last)
