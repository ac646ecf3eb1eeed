"""Rollouts of batched control environments: streams that go on from chunk to chunk, and whole episodes.

All random numbers are functions of the run's seed, a key, and an environment's or episode's number over all ranks, so
that ranks share out what one rank would do, and nothing of a generator needs to be kept in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.envs.control.base import ControlEnv
from modules.contracts.control import Carry, ControlActor, EpisodesRequest, RolloutRequest
from modules.seeds import global_seed, stream, stream_seed

_STARTS, _DRAWS, _NOISE = 81, 82, 83  # what random numbers are for


def _mixed(value: Tensor) -> Tensor:
    """A 64-bit finaliser (MurmurHash3's constants) of int64 numbers; products wrap."""
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        value = (value ^ ((value >> 33) & 0x7FFFFFFF)) * factor
    return value ^ ((value >> 33) & 0x7FFFFFFF)


def counter_uniforms(seed: int, index: Tensor, episode: Tensor, count: int) -> Tensor:
    """``[rows, count]`` float64 in [0, 1): a hash of ``seed`` and of rows' ``index`` and ``episode`` (int64)."""
    column = torch.arange(1, count + 1, device=index.device)
    row = _mixed(index * 0x1F123BB5 + _mixed(episode + seed))
    word = _mixed(row.unsqueeze(1) + column * 0x5851F42D4C957F2D)
    return ((word >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


class ControlStream:
    """Environments that an actor steps chunk by chunk; see :class:`~modules.contracts.control.RolloutRequest`.

    Args:
        env: this rank's environments.
        first: number of the first of them over all ranks.
        total: environments over all ranks.
        device: where the actor lives.
    """

    def __init__(self, env: ControlEnv, first: int, total: int, device: torch.device | str = "cpu") -> None:
        self.env, self.total = env, total
        self.device = torch.device(device)
        self.index = torch.arange(first, first + env.envs, device=env.device)
        self.first = first
        self.key: tuple[int, ...] | None = None
        self._seed: int | None = None
        self._carry: Carry = {}
        self._seen = torch.empty(0)
        self._fresh: Tensor | None = None
        self._episode = torch.zeros_like(self.index)
        self._draw = torch.empty(0)
        self._discounted = torch.zeros(env.envs, dtype=torch.float64, device=self.device)
        self._totals = self._discounted.clone()

    def _start(self, actor: ControlActor) -> None:
        self._episode.zero_()
        self._discounted, self._totals = self._discounted * 0.0, self._totals * 0.0
        self._begin_rows(actor, None)
        self._seen = self.env.observe()
        self._carry = actor.begin(self.env.envs)
        self._fresh = torch.ones(self.env.envs, dtype=torch.bool, device=self.device)

    def _begin_rows(self, actor: ControlActor, rows: Tensor | None) -> None:
        """New episodes in ``rows`` (``None``: all)."""
        index, episode = (self.index, self._episode) if rows is None else (self.index[rows], self._episode[rows])
        assert self.key is not None
        root = global_seed() if self._seed is None else self._seed
        starts = stream_seed(root, _STARTS, *self.key)
        self.env.restart(counter_uniforms(starts, index, episode, self.env.reset_size), rows)
        if actor.draws:
            draws = counter_uniforms(stream_seed(root, _DRAWS, *self.key), index, episode, actor.draws)
            draws = draws.to(self.device)
            self._draw = draws if rows is None else self._draw.index_copy(0, rows.to(self.device), draws)

    def collect(self, request: RolloutRequest, steps: int) -> TensorDict:
        """The next ``steps`` steps of every environment, ``[envs, steps]``."""
        env, actor = self.env, request.actor
        root = global_seed() if request.seed is None else request.seed
        if self.key != request.key or self._seed != request.seed:
            self.key, self._seed = tuple(request.key), request.seed
            self._start(actor)
        key = (_NOISE, *request.key, request.number)
        parts = [
            torch.randn(steps, self.total, size, generator=stream(root, *key, n))
            for n, size in enumerate(actor.noise_parts)
            if size
        ]
        drawn = torch.cat(parts, -1) if parts else torch.empty(steps, self.total, 0)
        noise = drawn[:, self.first : self.first + env.envs].to(self.device)
        moved = env.device != self.device
        never = torch.zeros(env.envs, dtype=torch.bool, device=self.device)
        lists: dict[str, list[Tensor]] = {}
        for t in range(steps):
            seen = self._seen.to(self.device) if moved else self._seen
            step = actor.act(seen, self._carry, self._fresh, self._draw, noise[t], None)
            self._carry = step.carry
            action, parameters = step.action, step.parameters
            if moved:
                action = action.to(env.device)
                parameters = None if parameters is None else parameters.to(env.device)
            reward, terminated, truncated = env.advance(action, parameters)
            after = env.observe()
            row = {
                "observation": self._seen,
                "next_observation": after,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "fresh": never if self._fresh is None else self._fresh,
                **step.record,
            }
            for name, value in row.items():
                lists.setdefault(name, []).append(value)
            done = terminated | truncated
            if bool(done.any()):
                after = self._restarted(actor, done, after)
                self._fresh = done.to(self.device)
            else:
                self._fresh = None
            self._seen = after
        chunk = {name: torch.stack(values, 1).to(self.device) for name, values in lists.items()}
        self._totals, chunk["return_so_far"] = _running_sums(self._totals, chunk, 1.0)
        if request.gamma is not None:
            self._discounted, chunk["discounted_return"] = _running_sums(self._discounted, chunk, request.gamma)
        if not bool(chunk["next_observation"].isfinite().all() & chunk["reward"].isfinite().all()):
            raise ValueError(f"{env.name}: an observation or reward is not finite: the simulation has become unstable")
        return TensorDict(chunk, [env.envs, steps])

    def _restarted(self, actor: ControlActor, done: Tensor, after: Tensor) -> Tensor:
        """Begin new episodes where they are ``done``; what is seen then."""
        self._episode += done
        if bool(done.all()):
            self._begin_rows(actor, None)
            return self.env.observe()
        rows = done.nonzero().squeeze(1)
        self._begin_rows(actor, rows)
        return after.index_copy(0, rows, self.env.observe(rows))

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "key": list(self.key or ()),
            "env": self.env.snapshot(),
            "carry": {name: value.clone() for name, value in self._carry.items()},
            "seen": self._seen.clone(),
            "fresh": None if self._fresh is None else self._fresh.clone(),
            "episode": self._episode.clone(),
            "draw": self._draw.clone(),
            "discounted": self._discounted.clone(),
            "totals": self._totals.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly; where the environments cannot, the next chunk starts new episodes."""
        if not self.env.exact_resume:
            return
        self.env.restore(state["env"])
        place, device = self.env.device, self.device
        self.key = tuple(state["key"])
        self._carry = {name: value.to(device) for name, value in state["carry"].items()}
        self._seen = state["seen"].to(place)
        self._fresh = None if state["fresh"] is None else state["fresh"].to(device)
        self._episode = state["episode"].to(place)
        self._draw = state["draw"].to(device)
        self._discounted, self._totals = state["discounted"].to(device), state["totals"].to(device)


def _running_sums(before: Tensor, chunk: Mapping[str, Tensor], gamma: float) -> tuple[Tensor, Tensor]:
    """``R <- gamma * R + r``, from 0 at an episode's first step: the last ``[envs]`` and all ``[envs, steps]``."""
    factors = (gamma * (~chunk["fresh"]).double()).unbind(1)
    total, sums = before, []
    for factor, reward in zip(factors, chunk["reward"].double().unbind(1), strict=True):
        total = torch.addcmul(reward, total, factor)
        sums.append(total)
    return total, torch.stack(sums, 1)


def play_episodes(
    env: ControlEnv, request: EpisodesRequest, rank: int, world: int, device: torch.device | str = "cpu"
) -> TensorDict:
    """One episode in each copy of ``env`` (``groups * episodes / world`` of them); see
    :class:`~modules.contracts.control.EpisodesRequest` and :class:`~modules.contracts.control.ProvidesRollouts`."""
    actor, groups, episodes = request.actor, request.groups, request.episodes
    if request.seed is not None:
        rank, world = 0, 1
    root = global_seed() if request.seed is None else request.seed
    share = episodes // world
    place, device = env.device, torch.device(device)
    number = torch.arange(rank * share, (rank + 1) * share, device=place).repeat(groups)
    zero = torch.zeros_like(number)
    starts = stream_seed(root, _STARTS, *request.key)
    env.restart(counter_uniforms(starts, number, zero, env.reset_size))
    draw = counter_uniforms(stream_seed(root, _DRAWS, *request.key), number, zero, actor.draws).to(device)
    generators = [stream(root, _NOISE, *request.key, n) for n in range(len(actor.noise_parts))]
    group = torch.arange(groups, device=device).repeat_interleave(share)
    carry, fresh = actor.begin(env.envs), torch.ones(env.envs, dtype=torch.bool, device=device)
    total = torch.zeros(env.envs, dtype=torch.float64, device=place)
    length = torch.zeros(env.envs, dtype=torch.int64, device=place)
    running = torch.ones(env.envs, dtype=torch.bool, device=place)
    rows: Tensor | None = None
    largest: dict[str, Tensor] = {}
    traced: dict[str, list[Tensor]] = {}
    seen = env.observe()
    for t in range(env.episode_limit):
        pieces = [torch.randn(episodes, n, generator=g) for n, g in zip(actor.noise_parts, generators, strict=True)]
        drawn = torch.cat(pieces, -1)
        noise = drawn[rank * share : (rank + 1) * share].repeat(groups, 1).to(device)
        step = actor.act(seen.to(device), carry, fresh if t == 0 else None, draw, noise, group)
        carry = step.carry
        parameters = None if step.parameters is None else step.parameters.to(place)
        reward, terminated, truncated = env.advance(step.action.to(place), parameters, rows)
        total += torch.where(running, reward.double(), 0.0)
        length += running
        for name, value in step.record.items():
            if name.startswith("max_"):
                value = torch.where(running.to(device), value, 0.0)
                largest[name] = value if name not in largest else torch.maximum(largest[name], value)
        if request.trace:
            kept = min(request.trace, share)
            row = {**step.record, "reward": reward, "running": running, "observation": seen, "executed": step.action}
            for name, value in row.items():
                traced.setdefault(name, []).append(value[:kept].to(device, copy=True))
        running &= ~(terminated | truncated)
        if not bool(running.any()):
            break
        if bool((terminated | truncated).any()):
            rows = running.nonzero().squeeze(1)
        seen = env.observe()
    values: dict[str, Any] = {"episode_return": total, "episode_length": length, **largest}
    result = TensorDict({k: v.to(device).view(groups, share) for k, v in values.items()}, [groups, share])
    if request.trace:
        kept = min(request.trace, share)
        trace = {}
        for name, steps in traced.items():
            stacked = torch.stack(steps, 1)
            room = stacked.new_zeros(groups, share, *stacked.shape[1:])
            room[0, :kept] = stacked
            trace[name] = room
        result["trace"] = TensorDict(trace, [groups, share])
    return result
