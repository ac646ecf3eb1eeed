"""StackedLSTM against torch.nn.LSTM, and its sequences against its steps."""

from __future__ import annotations

import torch
from torch import nn

from modules.networks.stacked_lstm import StackedLSTM


def _torch_lstm(params, number, inputs):
    """The LSTM of member ``number`` on ``inputs`` ``[rows, time, in]``, by torch."""
    hidden = params["weight_gates"].shape[1] // 2
    lstm = nn.LSTM(hidden, hidden, batch_first=True).double()
    weights = params["weight_gates"][number]
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(weights[:hidden].T)
        lstm.weight_hh_l0.copy_(weights[hidden:].T)
        lstm.bias_ih_l0.copy_(params["bias_gates"][number])
        lstm.bias_hh_l0.zero_()
        entered = torch.tanh(inputs @ params["weight_in"][number] + params["bias_in"][number])
        return lstm(entered)[0] @ params["weight_out"][number] + params["bias_out"][number]


def test_sequences_equal_torch_and_steps():
    generator = torch.Generator().manual_seed(0)
    net = StackedLSTM(3, 6, 2)
    params = {name: value.double() for name, value in net.init(2, generator).items()}
    inputs = torch.randn(2, 4, 7, 3, dtype=torch.float64, generator=generator)
    fresh = torch.zeros(4, 7, dtype=torch.bool)
    zero = torch.zeros(2, 4, net.state_size, dtype=torch.float64)
    outputs = net.sequence(params, inputs, fresh, zero)
    for member in range(2):
        torch.testing.assert_close(outputs[member], _torch_lstm(params, member, inputs[member]))
    fresh[1, 3] = fresh[2, 0] = fresh[2, 6] = True
    outputs, state, steps = net.sequence(params, inputs, fresh, zero + 0.3), zero + 0.3, []
    for t in range(7):
        state = state * (~fresh[:, t]).double().unsqueeze(-1)
        out, state = net.step(params, inputs[:, :, t], state)
        steps.append(out)
    torch.testing.assert_close(outputs, torch.stack(steps, 2))
