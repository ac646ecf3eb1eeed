"""Endless streams of experience from a batch of environments, with an exact position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from datamodules.envs.base import GROUP, MultiAgentEnv
from modules.contracts import ActsMultiAgent, StoresCarry


class Stream(Protocol):
    """What collects: both kinds below give the same data for the same seeds."""

    def collect(self, steps: int, frames: int) -> TensorDict: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorStream:
    """Steps a :class:`MultiAgentEnv` without TensorDicts in between; episodes go on from one chunk to the next.

    A chunk is a TensorDict ``[envs, steps]``: ``observation`` ``[.., agents, features]``, ``legal`` (only where the
    environment restricts actions), ``state`` (only where it has one of its own), each also as ``next_...`` (of the same
    episode, also at its end), ``action`` ``[.., agents]``, ``reward`` ``[.., agents]``, ``terminated``, ``truncated``
    and ``first`` (of an episode) ``[..]`` bool; and ``carry_<name>`` ``[.., ...]`` for what the actor ``carried``
    (:class:`~modules.contracts.StoresCarry`), as it was when acting.

    Args:
        env: the environments.
        actor: chooses actions.
        generator: random numbers of the actor.
        device: where the actor's networks live.
    """

    def __init__(
        self, env: MultiAgentEnv, actor: ActsMultiAgent, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> None:
        self.env, self.actor, self.generator = env, actor, generator
        self.device = torch.device(device)
        self.carried = actor.carried if isinstance(actor, StoresCarry) else ()
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._carry: dict[str, Tensor] | None = None
        self._first = torch.ones(env.envs, dtype=torch.bool, device=env.device)
        self._fresh = self._first.nonzero().squeeze(1)  # copies in whose episodes nobody has acted yet

    def _start(self) -> None:
        self.env.restart()
        self._seen = self.env.observe()
        self._carry = None
        self._first = torch.ones_like(self._first)
        self._fresh = self._first.nonzero().squeeze(1)

    def _begin(self, frames: int) -> None:
        """Let the actor begin the fresh episodes, just before it acts in them: its weights may have changed since the
        episodes before ended."""
        assert self._seen is not None
        rows, carry, (observation, _, state) = self._fresh, self._carry, self._seen
        if carry is None or len(rows) == self.env.envs:
            self._carry = self.actor.begin(self._moved(observation), self._moved(state), self.generator, frames)
        elif carry and len(rows):
            begun = self.actor.begin(self._moved(observation[rows]), self._moved(state[rows]), self.generator, frames)
            place = self._moved(rows)
            self._carry = {name: value.index_copy(0, place, begun[name]) for name, value in carry.items()}

    def _moved(self, value: Tensor) -> Tensor:
        return value if value.device == self.device else value.to(self.device)

    def collect(self, steps: int, frames: int) -> TensorDict:
        """The next ``steps`` steps of every environment.

        Args:
            steps: per environment.
            frames: environment steps before this chunk, over all ranks.
        """
        env = self.env
        if self._seen is None:
            self._start()
        assert self._seen is not None
        rows: list[dict[str, Tensor]] = []
        restricts, own_state = env.restricts_actions, env.own_state
        for _ in range(steps):
            observation, legal, state = self._seen
            self._begin(frames)
            carry = self._carry or {}
            seen = self._moved(legal) if restricts else None
            action, self._carry = self.actor.act(self._moved(observation), seen, carry, self.generator, frames)
            action = action if action.device == env.device else action.to(env.device)
            reward, terminated, truncated = env.advance(action)
            after = env.observe()
            row = {
                "observation": observation,
                "next_observation": after[0],
                "action": action,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "first": self._first,
            }
            if restricts:
                row["legal"], row["next_legal"] = legal, after[1]
            if own_state:
                row["state"], row["next_state"] = state, after[2]
            for name in self.carried:
                row[f"carry_{name}"] = carry[name].to(env.device)
            rows.append(row)
            self._first = terminated | truncated
            self._seen = self._restarted(after)
        chunk = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        return TensorDict(chunk, [env.envs, steps])

    def _restarted(self, seen: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What is seen next: ``seen``, with fresh episodes where the last ones are done."""
        self._fresh = rows = self._first.nonzero().squeeze(1)
        if len(rows) == 0:
            return seen
        env = self.env
        env.restart(rows)
        if len(rows) == env.envs:
            return env.observe()
        fresh = env.observe(rows)
        return cast(
            tuple[Tensor, Tensor, Tensor],
            tuple(old.index_copy(0, rows, new) for old, new in zip(seen, fresh, strict=True)),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "env": self.env.snapshot(),
            "generator": self.generator.get_state(),
            "begun": self._seen is not None,
            "seen": [value.clone() for value in self._seen or ()],
            "carry": {name: value.clone() for name, value in (self._carry or {}).items()},
            "first": self._first.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.env.restore(state["env"])
        self.generator.set_state(state["generator"].cpu())
        self._seen = None
        if state["begun"] and self.env.exact_resume:
            place = self.env.device
            self._seen = cast(tuple[Tensor, Tensor, Tensor], tuple(value.to(place) for value in state["seen"]))
            self._carry = {name: value.to(self.device) for name, value in state["carry"].items()}
            self._first = state["first"].to(place)
            self._fresh = self._first.nonzero().squeeze(1)

    def close(self) -> None:
        self.env.close(raise_if_closed=False)


class CollectorStream:
    """The same chunks from TorchRL's ``Collector``, for any ``EnvBase`` with the keys of :class:`MultiAgentEnv`.

    Args:
        env: the environments; ``transforms`` of TorchRL around a :class:`MultiAgentEnv` included.
        policy: reads and writes TorchRL's keys; its ``generator`` and ``frames`` are set before each chunk.
        generator: random numbers of the policy.
        steps: of every chunk.
        device: where the policy's networks live.
        carried: entries of the policy's carry that chunks shall have.
    """

    def __init__(
        self,
        env: MultiAgentEnv,
        policy: TensorDictModuleBase,
        generator: torch.Generator,
        steps: int,
        device: torch.device | str = "cpu",
        carried: tuple[str, ...] = (),
    ) -> None:
        from torchrl.collectors import Collector  # slow to import, and most runs do without

        self.env, self.policy, self.generator, self.steps = env, cast(Any, policy), generator, steps
        self.policy.generator, self.policy.frames = generator, 0
        self.carried = carried
        self._collector = Collector(
            env,
            policy,
            frames_per_batch=env.envs * steps,
            total_frames=-1,
            policy_device=device,
            env_device=env.device,
            storing_device=env.device,
            auto_register_policy_transforms=False,
            trust_policy=True,
            track_traj_ids=False,
            use_buffers=False,
        )

    def collect(self, steps: int, frames: int) -> TensorDict:
        if steps != self.steps:
            raise ValueError(f"CollectorStream: steps must be {self.steps} as the collector was made, got {steps}")
        self.policy.frames = frames
        data = cast(Any, self._collector.rollout())
        agents, after = data[GROUP], data["next"]
        chunk = {
            "observation": agents["observation"],
            "next_observation": after[GROUP, "observation"],
            "action": agents["action"],
            "reward": after[GROUP, "reward"].squeeze(-1),
            "terminated": after["terminated"].squeeze(-1),
            "truncated": after["truncated"].squeeze(-1),
            "first": data["is_init"].squeeze(-1),
        }
        if self.env.restricts_actions:
            chunk["legal"], chunk["next_legal"] = agents["action_mask"], after[GROUP, "action_mask"]
        if self.env.own_state:
            chunk["state"], chunk["next_state"] = data["state"], after["state"]
        for name in self.carried:
            chunk[f"carry_{name}"] = data["carried", name].to(self.env.device)
        return TensorDict(chunk, list(data.batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {
            "env": self.env.snapshot(),
            "generator": self.generator.get_state(),
            # TorchRL's own state_dict leaves out where in its episodes the collector stands
            "carrier": self._collector._carrier.clone().to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.env.restore(state["env"])
        self.generator.set_state(state["generator"].cpu())
        if self.env.exact_resume:
            self._collector._carrier.update(TensorDict.from_dict(state["carrier"], batch_size=self.env.batch_size))

    def close(self) -> None:
        self._collector.shutdown()
