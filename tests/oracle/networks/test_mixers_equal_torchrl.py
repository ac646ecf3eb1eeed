"""Our mixers and our loss against TorchRL's QMixer, VDNMixer and QMixerLoss, with the same weights."""

from __future__ import annotations

import pytest
import torch
from emax_batches import make_batch, make_learner, make_spec, sequential, with_ids
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import QMixer as TorchRLQMixer
from torchrl.modules import QValueModule, SafeSequential, VDNMixer
from torchrl.objectives import QMixerLoss, ValueEstimators

from modules.contracts import MultiAgentSpec
from modules.emax import Mixing, Target, ValueMARL
from modules.networks.mixers import QMixer, SumMixer


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _theirs(mixer: QMixer, flat: Tensor, state_size: int) -> TorchRLQMixer:
    """TorchRL's mixer with the weights of ours, ``flat`` ``[1, size]``."""
    theirs = TorchRLQMixer((state_size,), mixer.embed, mixer.agents, "cpu")
    params = {name: value[0].detach() for name, value in mixer.views(flat).items()}
    weights, biases = params["state_weight"].split(mixer._heads, 1), params["state_bias"].split(mixer._heads)
    layers = (theirs.hyper_w_1, theirs.hyper_w_final, theirs.hyper_b_1, theirs.V[0])
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        theirs.V[2].weight.copy_(params["value_weight"].T)
        theirs.V[2].bias.copy_(params["value_bias"])
    return theirs


def test_qmix_equals_torchrl_in_value_and_gradient():
    mixer = QMixer(4, 10, embed=16, hypernet_layers=1)
    flat = mixer.init(1, _draw())
    theirs = _theirs(mixer, flat, 10)
    utilities = torch.randn(1, 64, 4, generator=_draw(1), requires_grad=True)
    state = torch.randn(1, 64, 10, generator=_draw(2))
    ours = mixer.mix(flat, utilities, state)[0]
    expected = theirs(utilities[0].unsqueeze(-1), state[0]).squeeze(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for_ours, for_theirs = (torch.autograd.grad(y.square().sum(), utilities)[0] for y in (ours, expected))
    torch.testing.assert_close(for_ours, for_theirs, rtol=1e-5, atol=1e-5)


def test_vdn_equals_torchrl():
    utilities = torch.randn(3, 64, 4, generator=_draw())
    theirs = VDNMixer(4, "cpu")(utilities.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(SumMixer().mix(torch.zeros(1, 0), utilities, None), theirs)


class _WithIds(nn.Module):
    """The agents' network as TorchRL wants it: ``[..., agents, features]`` to ``[..., agents, actions]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(with_ids(observation))


def _their_loss(learner: ValueMARL, spec: MultiAgentSpec) -> QMixerLoss:
    local = SafeSequential(
        TensorDictModule(
            _WithIds(sequential(learner, 0)), in_keys=[("agents", "observation")], out_keys=[("agents", "action_value")]
        ),
        QValueModule(
            action_value_key=("agents", "action_value"),
            out_keys=[("agents", "action"), ("agents", "action_value"), ("agents", "chosen_action_value")],
            action_space="categorical",
        ),
    )
    qmix = isinstance(learner.mixer, QMixer)
    mixer = TensorDictModule(
        _theirs(learner.mixer, learner.online_mixer, spec.state_size)
        if isinstance(learner.mixer, QMixer)
        else VDNMixer(spec.num_agents, "cpu"),
        in_keys=[("agents", "chosen_action_value"), *(["state"] if qmix else [])],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(local, mixer, action_space="categorical", delay_value=True)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=learner.gamma)
    return loss


def _their_batch(part: TensorDict, spec: MultiAgentSpec) -> TensorDict:
    items = part.batch_size[1]

    def at(step: int) -> dict[str, object]:
        seen = part["observation"][0, :, step]
        state = part["state"][0, :, step] if spec.own_state else seen.flatten(1)
        return {"agents": TensorDict({"observation": seen}, [items, spec.num_agents]), "state": state}

    now, after = at(0), at(1)
    after["reward"] = part["reward"][0, :, 0].sum(-1, keepdim=True)
    after["terminated"] = after["done"] = part["terminated"][0]
    whole = TensorDict({**now, "next": TensorDict(after, [items])}, [items])
    whole["agents", "action"] = part["action"][0, :, 0]
    return whole


@pytest.mark.filterwarnings("ignore:No target network updater has been associated with this loss module:UserWarning")
@pytest.mark.parametrize("own_state", [False, True])
@pytest.mark.parametrize("mixing", ["vdn", "qmix"])
@pytest.mark.parametrize("kind", ["own_target", "mean_target"])
def test_one_member_has_the_loss_and_gradient_of_torchrl(mixing, own_state, kind):
    """K = 1, no double Q, target networks equal to the online ones, single steps."""
    spec = make_spec(own_state=own_state, state_size=7) if own_state else make_spec()
    learner = make_learner(
        spec, target=Target(kind=kind, double_q=False), mixing=Mixing(mixing, embed=16, hypernet_layers=1), gamma=0.9
    )
    part = make_batch(spec, items=128)
    assert bool(part["terminated"].any())
    theirs = _their_loss(learner, spec)
    ours = learner.losses(part)[0].sum()
    expected = theirs(_their_batch(part, spec))["loss"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    ours.backward()
    expected.backward()
    assert learner.online.grad is not None
    views = learner.agents.views(learner.online.grad)
    params = theirs.local_value_network_params
    for layer in range(3):
        weight = params["module", "0", "module", "net", str(2 * layer), "weight"].grad
        torch.testing.assert_close(views[f"weight_{layer}"][0].T, weight, rtol=1e-5, atol=1e-6)
    if mixing == "qmix":
        assert learner.online_mixer.grad is not None
        mine = learner.mixer.views(learner.online_mixer.grad)  # pyright: ignore[reportAttributeAccessIssue]
        weight = theirs.mixer_network_params["module", "V", "2", "weight"].grad
        torch.testing.assert_close(mine["value_weight"][0].T, weight, rtol=1e-5, atol=1e-6)
        weight = theirs.mixer_network_params["module", "hyper_w_1", "weight"].grad
        torch.testing.assert_close(mine["state_weight"][0, :, : 16 * 3].T, weight, rtol=1e-5, atol=1e-6)
