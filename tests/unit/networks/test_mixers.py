from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from modules.networks.mixers import QMixer, SumMixer


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mixer(layers: int, agents: int = 3, state: int = 6) -> QMixer:
    return QMixer(agents, state, embed=8, hypernet_hidden=12, hypernet_layers=layers)  # pyright: ignore


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mixers", [1, 5])
def test_joint_value_never_falls_with_a_utility(layers, mixers):
    """Gradients at 1000 random utilities and states, for weights ten times as large as at the start."""
    mixer = _mixer(layers)
    flat = 10.0 * mixer.init(mixers, _draw())
    utilities = (5.0 * torch.randn(5, 200, 3, generator=_draw(1))).requires_grad_()
    state = torch.randn(5, 200, 6, generator=_draw(2))
    (slope,) = torch.autograd.grad(mixer.mix(flat, utilities, state).sum(), utilities)
    assert float(slope.min()) >= 0.0
    assert float(slope.max()) > 0.0
    assert float((slope > 0).float().mean()) > 0.9  # ELU is flat far below 0


def _joint(mixer: QMixer | SumMixer, flat: Tensor, utilities: Tensor, state: Tensor) -> Tensor:
    """Joint values ``[members, rows, actions, actions, actions]`` of all joint actions of three agents."""
    members, rows, _, actions = utilities.shape
    every = torch.tensor(list(product(range(actions), repeat=3)))  # [64, 3]
    chosen = torch.stack([utilities[:, :, agent, every[:, agent]] for agent in range(3)], -1)
    seen = state.unsqueeze(2).expand(-1, -1, len(every), -1)
    mixed = mixer.mix(flat, chosen.flatten(1, 2), seen.flatten(1, 2))
    return mixed.view(members, rows, *[actions] * 3)


@pytest.mark.parametrize("kind", ["vdn", "qmix-1", "qmix-2"])
@pytest.mark.parametrize("mixers", [1, 4])
def test_greedy_joint_action_is_made_of_greedy_actions(kind, mixers):
    """Individual-global-max, by enumeration of all 64 joint actions of three agents with four actions."""
    mixer = SumMixer() if kind == "vdn" else _mixer(int(kind[-1]))
    flat = 3.0 * mixer.init(mixers, _draw(3))
    utilities = torch.randn(4, 50, 3, 4, generator=_draw(4))
    state = torch.randn(4, 50, 6, generator=_draw(5))
    joint = _joint(mixer, flat, utilities, state)
    best = joint.flatten(2).argmax(-1)
    greedy = utilities.argmax(-1)
    assert torch.equal(best, greedy[..., 0] * 16 + greedy[..., 1] * 4 + greedy[..., 2])
    torch.testing.assert_close(joint.flatten(2).amax(-1), mixer.mix(flat, utilities.amax(-1), state))


@pytest.mark.parametrize("layers", [1, 2])
def test_constant_weights_make_it_proportional_to_the_sum(layers):
    """First weights 0.5, second 2, no biases, embedding 8: Q_tot = 8 * 0.5 * 2 * sum where ELU is linear."""
    mixer = _mixer(layers)
    flat = torch.zeros(1, mixer.size)
    views = mixer.views(flat)
    if layers == 1:
        wide, embed = 3 * 8, 8
        views["state_bias"][0, :wide] = 0.5
        views["state_bias"][0, wide : wide + embed] = -2.0  # its size counts, not its sign
    else:
        views["w1_bias"][0] = -0.5
        views["w2_bias"][0] = 2.0
    utilities = torch.rand(1, 100, 3, generator=_draw())
    state = torch.randn(1, 100, 6, generator=_draw(1))
    total = SumMixer().mix(torch.zeros(1, 0), utilities, None)
    torch.testing.assert_close(mixer.mix(flat, utilities, state), 8.0 * total)


def test_sum_by_hand():
    utilities = torch.tensor([[[1.0, 2.0, -4.0], [0.5, 0.0, 0.0]]])
    assert SumMixer().mix(torch.zeros(1, 0), utilities, None).tolist() == [[-1.0, 0.5]]
    assert SumMixer().init(4, _draw()).shape == (4, 0)


def _by_layers(mixer: QMixer, flat: Tensor, utilities: Tensor, state: Tensor) -> Tensor:
    """One row by the paper's formula: ``utilities`` ``[agents]``, ``state`` ``[features]``, ``flat`` ``[1, size]``."""
    params = {name: value[0] for name, value in mixer.views(flat).items()}
    read = state @ params["state_weight"] + params["state_bias"]
    first, second, bias, value = read.split(mixer._heads)
    if mixer.layers == 2:
        first = first.relu() @ params["w1_weight"] + params["w1_bias"]
        second = second.relu() @ params["w2_weight"] + params["w2_bias"]
    hidden = torch.nn.functional.elu(utilities @ first.abs().view(mixer.agents, mixer.embed) + bias)
    return hidden @ second.abs() + (value.relu() @ params["value_weight"] + params["value_bias"])[0]


@pytest.mark.parametrize(("layers", "mixers"), list(product((1, 2), (1, 4))))
def test_batched_mixing_equals_the_formula_row_by_row(layers, mixers):
    mixer = _mixer(layers)
    flat = mixer.init(mixers, _draw())
    utilities = torch.randn(4, 5, 3, generator=_draw(1))
    state = torch.randn(4, 5, 6, generator=_draw(2))
    mixed = mixer.mix(flat, utilities, state)
    assert mixed.shape == (4, 5)
    for member, row in product(range(4), range(5)):
        own = flat[member : member + 1] if mixers > 1 else flat
        expected = _by_layers(mixer, own, utilities[member, row], state[member, row])
        torch.testing.assert_close(mixed[member, row], expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_mixers_are_drawn_apart_and_in_torch_range(layers):
    mixer = QMixer(5, 40, 32, 64, layers)
    flat = mixer.init(3, _draw())
    assert flat.shape == (3, mixer.size)
    assert len({tuple(row) for row in flat.tolist()}) == 3
    fan_in = {"state": 40, "w1": 64, "w2": 64, "value": 32}
    for name, value in mixer.views(flat).items():
        bound = fan_in[name.split("_")[0]] ** -0.5
        assert float(value.abs().max()) <= bound, name
        if value.numel() > 500:
            assert float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.1), name


@pytest.mark.parametrize("field", ["agents", "state_size", "embed", "hypernet_hidden"])
def test_widths_below_one_are_named(field):
    arguments = {"agents": 2, "state_size": 3, "embed": 4, "hypernet_hidden": 5, field: 0}
    with pytest.raises(ValueError, match=rf"QMixer: .*{field}.* must be >= 1, got .*0"):
        QMixer(**arguments)
    with pytest.raises(ValueError, match="QMixer: hypernet_layers: 1 or 2, got 3"):
        QMixer(2, 3, hypernet_layers=3)  # pyright: ignore[reportArgumentType]
