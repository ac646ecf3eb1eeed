"""Many small recurrent networks of one shape, evaluated and trained as one: linear, LSTM, linear."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class StackedLSTM:
    """``L`` networks Linear -> tanh -> LSTM -> Linear as a pure function of their stacked parameters.

    ``weight`` ``[L, in, out]`` and ``bias`` ``[L, out]`` as in :class:`~modules.networks.stacked_mlp.StackedMLP`; gates
    in the order input, forget, cell, output (Hochreiter & Schmidhuber 1997; ``torch.nn.LSTM``'s), with one bias. The
    state ``[L, rows, 2 * hidden]`` is the hidden state and the cell, side by side; 0 at the start of an episode.

    Args:
        inputs, hidden, outputs: features.
        output_gain: factor on the last layer's initial weights.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, output_gain: float = 1.0) -> None:
        if min(inputs, hidden, outputs) < 1:
            raise ValueError(f"StackedLSTM: inputs, hidden, outputs must be >= 1, got {inputs}, {hidden}, {outputs}")
        self.inputs, self.hidden, self.outputs, self.output_gain = inputs, hidden, outputs, output_gain

    @property
    def state_size(self) -> int:
        return 2 * self.hidden

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one network."""
        hidden = self.hidden
        return {
            "weight_in": (self.inputs, hidden),
            "bias_in": (hidden,),
            "weight_gates": (2 * hidden, 4 * hidden),
            "bias_gates": (4 * hidden,),
            "weight_out": (hidden, self.outputs),
            "bias_out": (self.outputs,),
        }

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters ``[count, ...]``, uniform in +-1/sqrt(fan-in), the forget gate's bias raised by 1."""
        params = {}
        for name, shape in self.shapes.items():
            fan_in = self.inputs if name.endswith("_in") else self.hidden
            bound = 1.0 / math.sqrt(fan_in) * (self.output_gain if name.endswith("_out") else 1.0)
            drawn = torch.rand(count, *shape, generator=generator, device=generator.device)
            params[name] = (2.0 * drawn - 1.0) * bound
        params["bias_gates"][:, self.hidden : 2 * self.hidden] += 1.0
        return params

    def _enter(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """What inputs ``[L, rows, in]`` add to the gates, ``[L, rows, 4 * hidden]``."""
        entered = torch.tanh(torch.baddbmm(params["bias_in"].unsqueeze(1), inputs, params["weight_in"]))
        return torch.baddbmm(params["bias_gates"].unsqueeze(1), entered, params["weight_gates"][:, : self.hidden])

    def _advance(self, params: Mapping[str, Tensor], entered: Tensor, state: Tensor) -> Tensor:
        hidden, cell = state.split(self.hidden, -1)
        gates = torch.baddbmm(entered, hidden, params["weight_gates"][:, self.hidden :])
        enter, forget, new, leave = gates.chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.cat([torch.sigmoid(leave) * torch.tanh(cell), cell], -1)

    def _leave(self, params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return torch.baddbmm(params["bias_out"].unsqueeze(1), hidden, params["weight_out"])

    def step(self, params: Mapping[str, Tensor], inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: ``inputs`` ``[L, rows, in]``, ``state`` ``[L, rows, 2 * hidden]`` -> outputs, the new state."""
        state = self._advance(params, self._enter(params, inputs), state)
        return self._leave(params, state[..., : self.hidden]), state

    def sequence(self, params: Mapping[str, Tensor], inputs: Tensor, fresh: Tensor, state: Tensor) -> Tensor:
        """Outputs ``[L, rows, time, outputs]`` of whole sequences; equal to :meth:`step` after step.

        Args:
            inputs: ``[L, rows, time, in]``.
            fresh: bool ``[rows, time]``, steps before which the state is set to 0.
            state: ``[L, rows, 2 * hidden]``, before the first step.
        """
        count, rows, time = inputs.shape[:3]
        entered = self._enter(params, inputs.flatten(1, 2)).view(count, rows, time, -1)
        kept = (~fresh).to(inputs.dtype).unsqueeze(-1)
        hidden = []
        for t in range(time):
            state = self._advance(params, entered[:, :, t], state * kept[:, t])
            hidden.append(state[..., : self.hidden])
        stacked = torch.stack(hidden, 2).flatten(1, 2)
        return self._leave(params, stacked).view(count, rows, time, -1)
