"""Items for replay out of chunks of experience: single steps, or whole episodes put together as they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

_SEEN = ("observation", "legal", "state")  # what is known at each step and, as next_..., after it
_DONE = ("action", "reward", "terminated")
_CARRY = "carry_"  # prefix of what the actor carried when it acted; an item has it of its first step


def steps_as_items(chunk: TensorDict) -> TensorDict:
    """Every step of ``chunk`` ``[envs, steps]`` as an item: ``observation`` ``[items, 2, ...]`` (before and after),
    ``action``, ``reward`` and ``terminated`` ``[items, 1, ...]``, ``carry_<name>`` ``[items, ...]``."""
    flat = cast(TensorDict, chunk.flatten(0, 1))
    items: dict[str, Tensor] = {}
    for name in _SEEN:
        if name in flat.keys():  # noqa: SIM118 - a TensorDict
            items[name] = torch.stack([flat[name], flat[f"next_{name}"]], 1)
    for name in _DONE:
        items[name] = flat[name].unsqueeze(1)
    for name in _carried(flat):
        items[name] = flat[name]
    return TensorDict(items, [len(flat)])


def _carried(chunk: TensorDict) -> list[str]:
    return [name for name in map(str, chunk.keys()) if name.startswith(_CARRY)]


class EpisodeBuilder:
    """Puts steps together into whole episodes, padded to ``length`` steps; unfinished ones wait for the next chunk.

    Args:
        envs: parallel environments, each with an episode in the making.
        length: greatest number of steps of an episode.
    """

    def __init__(self, envs: int, length: int) -> None:
        self.envs, self.length = envs, length
        self._parts: dict[str, Tensor] = {}
        self._carry: dict[str, Tensor] = {}
        self._filled = torch.zeros(envs, dtype=torch.int64)

    def _begin(self, chunk: TensorDict) -> None:
        for name in (*_SEEN, *_DONE):
            if name in chunk.keys():  # noqa: SIM118 - a TensorDict
                like: Tensor = chunk[name]
                room = self.length + (name in _SEEN)
                self._parts[name] = torch.zeros(self.envs, room, *like.shape[2:], dtype=like.dtype)
        for name in _carried(chunk):
            self._carry[name] = torch.zeros(self.envs, *chunk[name].shape[2:], dtype=chunk[name].dtype)

    def items(self, chunk: TensorDict) -> TensorDict | None:
        """Episodes that end within ``chunk`` ``[envs, steps]``, or ``None``.

        Keys as in :func:`steps_as_items` with ``length`` steps, zeros behind the end, and ``filled``
        ``[items, length]`` bool: steps of the episode, the last one included.

        Raises:
            ValueError: an episode longer than ``length``.
        """
        if not self._parts:
            self._begin(chunk)
        envs = torch.arange(self.envs)
        finished: list[dict[str, Tensor]] = []
        for step in range(chunk.batch_size[1]):
            at = self._filled
            if bool((at >= self.length).any()):
                raise ValueError(f"EpisodeBuilder: length must cover whole episodes, one is longer than {self.length}")
            for name, part in self._parts.items():
                part[envs, at] = chunk[name][:, step].cpu()
            for name in _SEEN:
                if name in self._parts:
                    self._parts[name][envs, at + 1] = chunk[f"next_{name}"][:, step].cpu()
            if self._carry:
                fresh = (at == 0).nonzero().squeeze(1)
                for name, part in self._carry.items():
                    part[fresh] = chunk[name][:, step].cpu()[fresh]
            self._filled = at + 1
            rows = (chunk["terminated"][:, step] | chunk["truncated"][:, step]).cpu().nonzero().squeeze(1)
            if len(rows):
                episode = {name: part[rows] for name, part in (*self._parts.items(), *self._carry.items())}
                episode["filled"] = torch.arange(self.length) < self._filled[rows].unsqueeze(1)
                finished.append(episode)
                for part in self._parts.values():
                    part[rows] = 0
                self._filled[rows] = 0
        if not finished:
            return None
        together = {name: torch.cat([one[name] for one in finished]) for name in finished[0]}
        return TensorDict(together, [len(together["filled"])])

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": {name: part.clone() for name, part in self._parts.items()},
            "carry": {name: part.clone() for name, part in self._carry.items()},
            "filled": self._filled.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parts = {name: part.clone() for name, part in state["parts"].items()}
        self._carry = {name: part.clone() for name, part in state["carry"].items()}
        self._filled = state["filled"].clone()
