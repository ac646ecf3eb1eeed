"""The gradient of PPO's loss in closed form, for perceptrons: a third of what autograd takes on small minibatches.

Equal, up to rounding, to differentiating :func:`modules.objectives.ppo.clipped_surrogate` and
:func:`modules.objectives.ppo.value_loss` by autograd; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modules.control.policy import gaussian_log_probability
from modules.networks.products import fuses_tanh, linear_tanh, product

Params = Mapping[str, Tensor]


def forward(params: Params, layers: int, rows: Tensor) -> list[Tensor]:
    """Activations of a tanh perceptron (``weight_i`` ``[1, in, out]``): its input ``[n, in]``, hidden, its output."""
    tape = [rows]
    for layer in range(layers - 1):
        weight, bias = params[f"weight_{layer}"][0], params[f"bias_{layer}"][0]
        fused = fuses_tanh(rows, weight)
        rows = linear_tanh(rows, weight, bias) if fused else torch.addmm(bias, rows, weight).tanh_()
        tape.append(rows)
    last = layers - 1
    tape.append(torch.addmm(params[f"bias_{last}"][0], rows, params[f"weight_{last}"][0]))
    return tape


def backward(params: Params, layers: int, tape: list[Tensor], pull: Tensor, gradients: Params) -> None:
    """Write the gradients of ``(output * pull).sum()``, ``pull`` ``[n, out]``, into ``gradients``."""
    for layer in reversed(range(layers)):
        torch.mm(tape[layer].t(), pull, out=gradients[f"weight_{layer}"][0])
        torch.sum(pull, 0, out=gradients[f"bias_{layer}"][0])
        if layer:
            pull = product(pull, params[f"weight_{layer}"][0])
            pull = torch.ops.aten.tanh_backward(pull, tape[layer])


def policy_gradient(
    params: Params,
    layers: int,
    gradients: Params,
    features: Tensor,
    action: Tensor,
    old_log_probability: Tensor,
    advantage: Tensor,
    clip: float,
    entropy: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of the clipped surrogate's sum, less ``entropy * n`` times the entropy.

    Args:
        params, gradients: of one Gaussian policy, ``[1, ...]`` each, with ``log_std``; the latter are overwritten.
        layers: of its perceptron.
        features, action: ``[n, ...]``; old_log_probability, advantage: ``[n]``.
        clip, entropy: PPO's.

    Returns:
        log-ratio and loss of each row ``[n]``, for metrics.
    """
    tape = forward(params, layers, features)
    log_std = params["log_std"][0]
    deviation = (action - tape[-1]) * torch.exp(-log_std)
    log_ratio = gaussian_log_probability(action, tape[-1], log_std) - old_log_probability
    ratio = log_ratio.exp()
    gain = ratio * advantage
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip) * advantage
    # where the clipped term is smaller its gradient is 0: there the ratio lies outside, on the side that gains
    weight = torch.where(gain <= clipped, -gain, 0.0).unsqueeze(1)
    backward(params, layers, tape, weight * deviation * torch.exp(-log_std), gradients)
    torch.sum(weight * (deviation.square() - 1.0), 0, out=gradients["log_std"][0])
    if entropy:
        gradients["log_std"][0].sub_(entropy * len(features))
    return log_ratio, -torch.minimum(gain, clipped)


def value_gradient(
    params: Params,
    layers: int,
    gradients: Params,
    features: Tensor,
    target: Tensor,
    old_value: Tensor | None,
    clip: float | None,
) -> Tensor:
    """Gradient of half the squared errors' sum; :func:`modules.objectives.ppo.value_loss` says how clipped.

    Returns:
        the loss of each row ``[n]``.
    """
    tape = forward(params, layers, features)
    value = tape[-1][:, 0]
    error = value - target
    pull, loss = error, 0.5 * error.square()
    if clip is not None and old_value is not None:
        change = value - old_value
        other = old_value + change.clamp(-clip, clip) - target
        worse = other.square() > error.square()
        inside = change.abs() <= clip
        pull = torch.where(worse, torch.where(inside, other, 0.0), error)
        loss = torch.maximum(loss, 0.5 * other.square())
    backward(params, layers, tape, pull.unsqueeze(1), gradients)
    return loss
