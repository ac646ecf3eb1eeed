"""Gaussian policies and critics as pure functions of stacked parameters, with or without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.networks.stacked_lstm import StackedLSTM
from modules.networks.stacked_mlp import StackedMLP

Params = Mapping[str, Tensor]
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class MemorySettings:
    """What a policy sees of the past.

    Args:
        kind: ``none``; ``stack``: the last ``k`` observations and actions beside the present one; ``lstm``: an LSTM.
        k: of a stack, >= 1.
        history: of an LSTM, steps through which gradients flow.

    Raises:
        ValueError: an unknown kind, or a number below 1.
    """

    kind: Literal["none", "stack", "lstm"] = "none"
    k: int = 1
    history: int = 100

    def __post_init__(self) -> None:
        if self.kind not in ("none", "stack", "lstm"):
            raise ValueError(f"MemorySettings: kind: none, stack or lstm, got {self.kind!r}")
        for field in ("k", "history"):
            if getattr(self, field) < 1:
                raise ValueError(f"MemorySettings: {field} must be >= 1, got {getattr(self, field)}")

    def features(self, observation_size: int, action_size: int) -> int:
        """Inputs of a policy's network."""
        past = self.k * (observation_size + action_size) if self.kind == "stack" else 0
        return observation_size + past

    def remembered(self, memory: Tensor, seen: Tensor, action: Tensor) -> Tensor:
        """What a stack holds one step later: ``memory`` ``[rows, k * (seen + action)]``, the newest first."""
        newest = torch.cat([seen, action], -1)
        return newest if self.k == 1 else torch.cat([newest, memory[..., : -newest.shape[-1]]], -1)


class Body:
    """A network with or without memory; one interface for both.

    Args:
        inputs, outputs: features.
        hidden: widths of hidden layers; an LSTM has the last of them.
        recurrent: an LSTM.
        output_gain: of the last layer's initial weights.
    """

    def __init__(self, inputs: int, hidden: list[int], outputs: int, recurrent: bool, output_gain: float) -> None:
        self.recurrent, self.outputs = recurrent, outputs
        self.mlp = StackedMLP(inputs, hidden, outputs, "tanh", "orthogonal", output_gain)
        self.lstm = StackedLSTM(inputs, hidden[-1], outputs, output_gain) if recurrent else None

    @property
    def state_size(self) -> int:
        return self.lstm.state_size if self.lstm is not None else 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.lstm.shapes if self.lstm is not None else self.mlp.shapes

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.lstm is not None:
            return self.lstm.init(count, generator)
        params = self.mlp.init(count, generator)
        # gain sqrt(2) in hidden layers, as in the reference code of this line of work; StackedMLP's tanh has 5/3
        for layer in range(self.mlp.layers - 1):
            params[f"weight_{layer}"] *= math.sqrt(2.0) * 3.0 / 5.0
        return params

    def step(self, params: Params, features: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Outputs ``[L, rows, outputs]`` of ``features`` ``[L, rows, inputs]``, and the state after."""
        if self.lstm is None:
            return self.mlp.apply(params, features), None
        assert state is not None
        return self.lstm.step(params, features, state)


class GaussianPolicy(Body):
    """A :class:`Body` whose outputs are means, and a standard deviation that depends on no observation.

    Actions are not squashed. Parameters beside the body's: ``log_std`` ``[L, outputs]``.

    Args:
        init_std: standard deviation at the start.
    """

    def __init__(self, inputs: int, hidden: list[int], outputs: int, recurrent: bool, init_std: float) -> None:
        super().__init__(inputs, hidden, outputs, recurrent, output_gain=0.01)
        self.init_std = init_std

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes, "log_std": (self.outputs,)}

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        start = torch.full((count, self.outputs), math.log(self.init_std), device=generator.device)
        return {**super().init(count, generator), "log_std": start}


def gaussian_log_probability(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """``[...]`` of ``action`` ``[..., size]`` under independent normal distributions."""
    scaled = (action - mean) * torch.exp(-log_std)
    return -0.5 * scaled.square().sum(-1) - log_std.sum(-1) - 0.5 * _LOG_2PI * action.shape[-1]


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """``[...]`` in nats, of standard deviations ``exp(log_std)`` ``[..., size]``."""
    return log_std.sum(-1) + 0.5 * (1.0 + _LOG_2PI) * log_std.shape[-1]


class Grouping:
    """Rows sorted by member into a padded batch, so that each row is evaluated by its own member in one product.

    Args:
        member: int64 ``[rows]``.
    """

    def __init__(self, member: Tensor) -> None:
        order = member.argsort(stable=True)
        self.present, counts = member[order].unique_consecutive(return_counts=True)
        widest = int(counts.max())
        place = torch.arange(len(member), device=member.device)
        starts = counts.cumsum(0) - counts
        group = torch.arange(len(counts), device=member.device).repeat_interleave(counts)
        slot = group * widest + (place - starts[group])
        self.source = torch.zeros(len(counts) * widest, dtype=torch.int64, device=member.device)
        self.source[slot] = order  # padding repeats row 0
        self.target = torch.empty_like(order)
        self.target[order] = slot
        self.shape = (len(counts), widest)

    def spread(self, rows: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[members present, widest, ...]``."""
        return rows[self.source].view(*self.shape, *rows.shape[1:])

    def collect(self, spread: Tensor) -> Tensor:
        """Back again."""
        return spread.flatten(0, 1)[self.target]

    def params(self, params: Params) -> dict[str, Tensor]:
        """Parameters of the members present."""
        return {name: value[self.present] for name, value in params.items()}


class PolicySet:
    """Members of a population, each acting in rows of its own.

    Args:
        body: the network that all members share the shape of.
        params: ``[members, ...]`` each.
    """

    def __init__(self, body: Body, params: Params) -> None:
        self.body = body
        self.all = params
        self.members = next(iter(params.values())).shape[0]
        self._grouping: Grouping | None = None
        self._params: Params = params

    def assign(self, member: Tensor) -> None:
        """From now on row ``i`` belongs to ``member[i]``."""
        if self.members > 1:
            self._grouping = Grouping(member)
            self._params = self._grouping.params(self.all)

    def step(self, features: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Outputs ``[rows, outputs]`` of ``features`` ``[rows, inputs]``, and the state after."""
        grouping = self._grouping
        if grouping is None:
            before = None if state is None else state.unsqueeze(0)
            outputs, after = self.body.step(self._params, features.unsqueeze(0), before)
            return outputs.squeeze(0), None if after is None else after.squeeze(0)
        before = None if state is None else grouping.spread(state)
        outputs, after = self.body.step(self._params, grouping.spread(features), before)
        return grouping.collect(outputs), None if after is None else grouping.collect(after)

    def rows_of(self, values: Tensor, member: Tensor) -> Tensor:
        """``values`` ``[members, ...]`` of each row's member: ``[rows, ...]``, or ``[1, ...]`` with a single one."""
        return values[member] if self.members > 1 else values
