"""The minibatch loss and its gradient against TorchRL's ClipPPOLoss on the same rows."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from modules.control.learner import PPOLearner, Rows
from modules.control.players import PlayerNetworks
from modules.control.ppo_settings import PPOSettings


class _Stacked(nn.Module):
    """A learner's network as an ordinary module on its flat weights."""

    def __init__(self, learner, body, name):
        super().__init__()
        self.flat = nn.Parameter(learner.flat.detach().clone())
        self.learner, self.body, self.name = learner, body, name

    def forward(self, features):
        params = self.learner.views(self.flat)[self.name]
        out = self.body.step(params, features.unsqueeze(0), None)[0][0]
        if self.name == "value":
            return out
        return out, params["log_std"].exp().expand_as(out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_losses_and_gradients_equal_torchrl():
    from torchrl.objectives import ClipPPOLoss

    torch.manual_seed(0)
    settings = PPOSettings(lr=1e-2, value_lr=1e-2, entropy=0.01, anneal=False)
    learner = PPOLearner(PlayerNetworks(4, 2, [8], False, 0.8, 4), settings, "agent")
    learner.begin((3,))
    n = 64
    rows = Rows(
        torch.randn(n, 4), torch.randn(n, 2), torch.randn(n) - 2.0, torch.randn(n), torch.randn(n), torch.zeros(n)
    )
    actor = _Stacked(learner.policy, learner.networks.policy, "policy")
    critic = _Stacked(learner.value, learner.networks.value, "value")
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(actor, ["features"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=_normal, return_log_prob=True
        ),
    )
    value = TensorDictModule(critic, ["features"], ["state_value"])
    loss = ClipPPOLoss(
        policy, value, clip_epsilon=0.2, entropy_bonus=True, entropy_coeff=0.01, critic_coeff=1.0,
        loss_critic_type="l2", normalize_advantage=False, functional=False,
    )  # fmt: skip
    batch = TensorDict(
        {
            "features": rows.features,
            "action": rows.action,
            "action_log_prob": rows.log_probability,
            "advantage": rows.advantage.unsqueeze(-1),
            "value_target": rows.target.unsqueeze(-1),
        },
        [n],
    )
    theirs = loss(batch)
    (theirs["loss_objective"] + theirs["loss_entropy"]).backward()
    (0.5 * theirs["loss_critic"]).backward()
    taken: dict[str, torch.Tensor] = {}
    for name, one in (("policy", learner.policy), ("value", learner.value)):
        original = one.optimiser.step

        def step(one=one, name=name, original=original):
            taken[name] = one.flat.grad.clone()
            original()

        one.optimiser.step = step
    parts = learner._step(rows, None, None, True)
    assert float(parts["policy_loss"]) == pytest.approx(float(theirs["loss_objective"]), abs=1e-5)
    assert float(parts["value_loss"]) == pytest.approx(0.5 * float(theirs["loss_critic"]), abs=1e-5)
    torch.testing.assert_close(taken["policy"], actor.flat.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(taken["value"], critic.flat.grad, atol=1e-5, rtol=1e-4)


def _normal(loc, scale):
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
