from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from modules.networks.stacked_mlp import StackedLearners, StackedMLP


def _separate(mlp: StackedMLP, params: dict[str, torch.Tensor], index: int, activation: type[nn.Module]):
    """The same network out of torch's own layers."""
    layers: list[nn.Module] = []
    for layer in range(mlp.layers):
        linear = nn.Linear(*params[f"weight_{layer}"].shape[1:])
        linear.weight.data.copy_(params[f"weight_{layer}"][index].detach().T)
        linear.bias.data.copy_(params[f"bias_{layer}"][index].detach())
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("activation", "module"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("silu", nn.SiLU)])
@pytest.mark.parametrize("own_inputs", [False, True])
def test_equals_separate_sequentials_in_value_and_gradient(activation, module, own_inputs):
    generator = torch.Generator().manual_seed(0)
    mlp = StackedMLP(5, [7, 6], 3, activation)
    params = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in mlp.init(4, generator).items()}
    params = {key: value.requires_grad_() for key, value in params.items()}
    inputs = torch.randn((4, 9, 5) if own_inputs else (9, 5), generator=generator)
    outputs = mlp.apply(params, inputs)
    assert outputs.shape == (4, 9, 3)
    outputs.square().sum().backward()
    for index in range(4):
        network = _separate(mlp, params, index, module)
        expected = network(inputs[index] if own_inputs else inputs)
        torch.testing.assert_close(outputs[index], expected, rtol=1e-5, atol=1e-6)
        expected.square().sum().backward()
        first, last = network[0], network[-1]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        assert first.weight.grad is not None
        torch.testing.assert_close(params["weight_0"].grad[index].T, first.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(params["bias_2"].grad[index], last.bias.grad, rtol=1e-4, atol=1e-5)


def test_orthogonal_weights_keep_lengths_up_to_the_gain():
    params = StackedMLP(6, [6, 4], 9, "relu", output_gain=0.5).init(3, torch.Generator().manual_seed(1))
    square, tall, wide = params["weight_0"], params["weight_1"], params["weight_2"]
    torch.testing.assert_close(square.mT @ square, 2 * torch.eye(6).expand(3, 6, 6), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tall.mT @ tall, 2 * torch.eye(4).expand(3, 4, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide @ wide.mT, 0.25 * torch.eye(4).expand(3, 4, 4), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(square[0], square[1])
    assert all((params[f"bias_{layer}"] == 0).all() for layer in range(3))


def test_kaiming_has_the_scale_of_torch_linear():
    params = StackedMLP(64, [], 256, init="kaiming").init(2, torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    reference = nn.Linear(64, 256)
    assert params["weight_0"].abs().max() <= 1 / 8
    assert params["bias_0"].abs().max() <= 1 / 8
    assert params["weight_0"].std() == pytest.approx(reference.weight.std().item(), rel=0.02)


def test_the_same_generator_gives_the_same_networks():
    mlp = StackedMLP(3, [4], 2)
    one, two = (mlp.init(2, torch.Generator().manual_seed(5)) for _ in range(2))
    other = mlp.init(2, torch.Generator().manual_seed(6))
    assert all(torch.equal(one[key], two[key]) for key in mlp.shapes)
    assert not torch.equal(one["weight_0"], other["weight_0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": [0]}, "at least 1"),
        ({"hidden": [4], "activation": "step"}, "one of relu"),
        ({"hidden": [4], "init": "zeros"}, "orthogonal or kaiming"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StackedMLP(inputs=3, outputs=2, **arguments)


def _learners(max_grad_norm=None, count=3):
    learners = StackedLearners({"a": StackedMLP(4, [5], 2), "b": StackedMLP(4, [], 1)}, 1e-2, max_grad_norm)
    learners.begin(learners.fresh(count, torch.Generator().manual_seed(0)))
    return learners


def _loss(learners, inputs, scale=1.0):
    views = learners.views(learners.flat)
    a = learners.networks["a"].apply(views["a"], inputs)
    b = learners.networks["b"].apply(views["b"], inputs)
    return scale * (a.square().mean((1, 2)) + (b - 1).square().mean((1, 2)))


def test_params_round_trip_and_missing_ones_are_named():
    learners = _learners()
    params = learners.params()
    assert torch.equal(learners.flatten(params), learners.flat.detach())
    assert params["a.weight_0"].shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"needs 'b\.bias_0'"):
        learners.flatten({key: value for key, value in params.items() if key != "b.bias_0"})
    with pytest.raises(ValueError, match=r"'a\.bias_1' must be \(3, 2\), got \(3, 7\)"):
        learners.flatten({**params, "a.bias_1": torch.zeros(3, 7)})


def test_steps_equal_adam_and_clip_of_separate_learners():
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    learners = _learners(max_grad_norm=0.05)
    separate = [{k: nn.Parameter(v[i].clone()) for k, v in learners.params().items()} for i in range(3)]
    optimisers = [torch.optim.Adam(params.values(), lr=1e-2, eps=1e-5) for params in separate]
    rows = torch.tensor([8, 8, 8])
    for _ in range(5):
        learners.step(_loss(learners, inputs), rows)
        for params, optimiser in zip(separate, optimisers, strict=True):
            hidden = torch.relu(inputs @ params["a.weight_0"] + params["a.bias_0"])
            a = hidden @ params["a.weight_1"] + params["a.bias_1"]
            b = inputs @ params["b.weight_0"] + params["b.bias_0"]
            optimiser.zero_grad()
            (a.square().mean() + (b - 1).square().mean()).backward()
            for network in "ab":
                own = [value for key, value in params.items() if key.startswith(network)]
                nn.utils.clip_grad_norm_(own, 0.05)
            optimiser.step()
    for key, value in learners.params().items():
        for index in range(3):
            torch.testing.assert_close(value[index], separate[index][key].detach(), rtol=1e-4, atol=1e-5)


def test_reduced_steps_weigh_ranks_by_their_rows():
    """Two ranks with 6 and 2 rows, reduced by sum or by mean, equal one rank with 8."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    whole = _learners()
    whole_metrics = whole.step(_loss(whole, inputs), torch.full((3,), 8), {"m": torch.full((3,), 3.0)})
    for divisor in (1.0, 2.0):
        packs: list[torch.Tensor] = []

        def record(flat, packs=packs):
            packs.append(flat)
            return flat

        ranks = [(inputs[:6], 6, 1.0), (inputs[6:], 2, 9.0)]
        for part, size, metric in ranks:
            probe = _learners()
            probe.step(_loss(probe, part), torch.full((3,), size), {"m": torch.full((3,), metric)}, record)
        joined = sum(packs) / divisor
        for part, size, metric in ranks:
            rank = _learners()
            metrics = rank.step(
                _loss(rank, part), torch.full((3,), size), {"m": torch.full((3,), metric)}, lambda _, j=joined: j
            )
            torch.testing.assert_close(rank.flat, whole.flat, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(metrics["m"], whole_metrics["m"])  # (6 * 1 + 2 * 9) / 8
            torch.testing.assert_close(metrics["gradient_norm"], whole_metrics["gradient_norm"], rtol=1e-4, atol=1e-6)


def test_a_learner_without_rows_stays_where_it_is():
    learners = _learners()
    before = learners.flat.detach().clone()
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    learners.step(_loss(learners, inputs), torch.tensor([8, 0, 8]))
    assert torch.equal(learners.flat.detach()[1], before[1])
    assert not torch.equal(learners.flat.detach()[0], before[0])


@pytest.mark.parametrize("by_copy", [False, True])
def test_state_or_deep_copy_goes_on_bitwise(by_copy):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    rows = torch.full((3,), 8)
    learners = _learners()
    learners.step(_loss(learners, inputs), rows)
    if by_copy:
        other = copy.deepcopy(learners)
    else:
        file = io.BytesIO()
        torch.save(learners.state_dict(), file)
        file.seek(0)
        other = _learners(count=1)
        other.load_state_dict(torch.load(file, weights_only=True))
    for each in (learners, other):
        each.step(_loss(each, inputs), rows)
    assert torch.equal(learners.flat, other.flat)
    with pytest.raises(ValueError, match="must be"):
        other.load_state_dict({"flat": torch.zeros(3, 4), "adam": {}})
