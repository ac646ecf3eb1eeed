"""Monotone mixing of agents' utilities into a joint value: VDN's sum and QMIX's state-dependent network."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


class SumMixer:
    """``Q_tot = sum_i Q_i`` (VDN; Sunehag et al. 2018). Has no parameters."""

    size = 0

    def init(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 0]``."""
        return torch.zeros(count, 0, device=generator.device)

    def mix(self, flat: Tensor, utilities: Tensor, state: Tensor | None) -> Tensor:
        """``utilities`` ``[..., agents]`` to ``[...]``; the rest is ignored."""
        return utilities.sum(-1)

    def slopes(self, flat: Tensor, utilities: Tensor, state: Tensor | None) -> Tensor:
        """``dQ_tot / dQ_i``, of the shape of ``utilities``: 1."""
        return torch.ones_like(utilities)


class QMixer:
    """QMIX (Rashid et al. 2018): ``Q_tot = ELU(q |W1(s)| + b1(s)) |W2(s)| + V(s)``, monotone in every utility.

    A pure function of one flat parameter ``[mixers, size]``: one mixer shared by all members, or one a member.

    Args:
        agents: utilities mixed.
        state_size: features of the global state.
        embed: width of the mixing layer.
        hypernet_hidden: width of the hypernetworks' hidden layer.
        hypernet_layers: 2 (Linear, ReLU, Linear) or 1 (Linear) for W1 and W2; V always has a hidden layer.

    Raises:
        ValueError: a width below 1, or another number of layers.
    """

    def __init__(
        self,
        agents: int,
        state_size: int,
        embed: int = 32,
        hypernet_hidden: int = 64,
        hypernet_layers: Literal[1, 2] = 2,
    ) -> None:
        if min(agents, state_size, embed, hypernet_hidden) < 1:
            raise ValueError(
                f"QMixer: agents, state_size, embed, hypernet_hidden must be >= 1, got {agents}, {state_size}, "
                f"{embed}, {hypernet_hidden}"
            )
        if hypernet_layers not in (1, 2):
            raise ValueError(f"QMixer: hypernet_layers: 1 or 2, got {hypernet_layers}")
        self.agents, self.embed, self.layers = agents, embed, hypernet_layers
        wide = hypernet_hidden
        # What all read from the state stands side by side in one matrix: hidden layers of W1 and W2 (or the weights
        # themselves), b1, and the hidden layer of V.
        heads = (wide, wide) if hypernet_layers == 2 else (embed * agents, embed)
        self._heads = (*heads, embed, embed)
        self.shapes: dict[str, tuple[int, ...]] = {
            "state_weight": (state_size, sum(self._heads)),
            "state_bias": (sum(self._heads),),
        }
        if hypernet_layers == 2:
            self.shapes |= {
                "w1_weight": (wide, embed * agents),
                "w1_bias": (embed * agents,),
                "w2_weight": (wide, embed),
                "w2_bias": (embed,),
            }
        self.shapes |= {"value_weight": (embed, 1), "value_bias": (1,)}
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.size = sum(self._sizes)

    def init(self, count: int, generator: torch.Generator) -> Tensor:
        """Fresh parameters ``[count, size]``, uniform in +-1/sqrt(fan-in) as ``nn.Linear`` starts."""
        parts, fan_in = [], 1
        for name, shape in self.shapes.items():
            fan_in = shape[0] if name.endswith("weight") else fan_in
            drawn = torch.rand(count, math.prod(shape), generator=generator, device=generator.device)
            parts.append((2.0 * drawn - 1.0) / math.sqrt(fan_in))
        return torch.cat(parts, dim=1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The layers' parameters ``[mixers, ...]`` as views of ``flat``; differentiable."""
        parts = flat.split(self._sizes, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def mix(self, flat: Tensor, utilities: Tensor, state: Tensor | None) -> Tensor:
        """Joint values ``[members, rows]``.

        Args:
            flat: ``[1, size]``, one mixer for all members, or ``[members, size]``.
            utilities: ``[members, rows, agents]``.
            state: ``[members, rows, features]``.
        """
        weights, bias, second, value = self._read(flat, state)
        hidden = self._hidden(utilities, weights, bias)
        mixed = (functional.elu(hidden) * second).sum(-1)
        return (mixed + value).view(utilities.shape[:2])

    def slopes(self, flat: Tensor, utilities: Tensor, state: Tensor | None) -> Tensor:
        """``dQ_tot / dQ_i = sum_e |W1(s)|_ie ELU'(hidden_e) |W2(s)|_e >= 0`` in closed form, shapes as in :meth:`mix`:
        ``[members, rows, agents]``."""
        weights, bias, second, _ = self._read(flat, state)
        hidden = self._hidden(utilities, weights, bias)
        steep = torch.where(hidden > 0, 1.0, hidden.clamp_max(0.0).exp()) * second
        return torch.bmm(weights, steep.unsqueeze(-1)).view_as(utilities)

    def _hidden(self, utilities: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        return torch.bmm(utilities.reshape(-1, 1, utilities.shape[-1]), weights).squeeze(1) + bias

    def _read(self, flat: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``|W1|`` ``[N, agents, embed]``, ``b1`` and ``|W2|`` ``[N, embed]`` and ``V`` ``[N]`` of ``N`` states."""
        assert state is not None
        params, mixers = self.views(flat), flat.shape[0]
        state = state.reshape(mixers, -1, state.shape[-1])
        read = torch.baddbmm(params["state_bias"].unsqueeze(1), state, params["state_weight"])
        first, second, bias, value = read.split(self._heads, dim=-1)
        if self.layers == 2:
            first = torch.baddbmm(params["w1_bias"].unsqueeze(1), first.relu(), params["w1_weight"])
            second = torch.baddbmm(params["w2_bias"].unsqueeze(1), second.relu(), params["w2_weight"])
        value = torch.baddbmm(params["value_bias"].unsqueeze(1), value.relu(), params["value_weight"])
        weights = first.abs().view(-1, self.agents, self.embed)
        return weights, bias.reshape(-1, self.embed), second.abs().reshape(-1, self.embed), value.reshape(-1)
