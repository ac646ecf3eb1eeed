"""What adversaries may do in training, apart from evaluation's attacks; training that goes on from another run."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.control_data import ControlDataModule
from modules.baselines import ATLA, ActionRobust
from modules.contracts import RolloutRequest
from modules.control.learner import PPOLearner
from modules.control.module import ADVERSARY, AGENT
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.control.players import AdversarySettings
from modules.control.ppo_settings import PPOSettings
from modules.grad import GRAD

PPO = PPOSettings(epochs=1, minibatches=2)


def _data() -> ControlDataModule:
    data = ControlDataModule("pendulum", {"horizon": 10}, envs=8, frames_per_batch=160)
    data.setup("fit")
    return data


def _settings(share: float) -> PerturbationSettings:
    return PerturbationSettings(space="action", eps=0.6, eps_bar=0.12, train_share=share)


def _attached(module, data: ControlDataModule):
    module._attach(data.spec)
    for learner in (module.learner, module.opponent):
        if learner is not None:
            learner.begin((1,))
    return module


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_a_share_scales_both_budgets(norm):
    settings = PerturbationSettings(norm=norm, eps=0.5, eps_bar=0.125)
    half = PerturbationSet(settings, 3, share=0.5)
    assert half.eps.unique().tolist() == [0.25]
    assert half.eps_bar.unique().tolist() == [0.0625]
    whole = PerturbationSet(settings, 3)
    assert torch.equal(PerturbationSet(settings, 3, share=1.0).eps, whole.eps)
    assert PerturbationSet(settings, 3, share=0.0).empty


def test_settings_refuse_and_tell_shares():
    with pytest.raises(ValueError, match="train_share must be >= 0 and finite, got -0.1"):
        PerturbationSettings(train_share=-0.1)
    assert "train_share" not in _settings(1.0).fingerprint()
    assert _settings(0.5).fingerprint()["train_share"] == 0.5


@pytest.mark.parametrize("share", [0.5, 1.2])
def test_adversaries_in_training_have_their_share_and_attacks_all(share):
    data = _data()
    module = _attached(ATLA(_settings(share), AdversarySettings(init_std=9.0), ppo=PPO, total_frames=1600), data)
    batch = data.rollout(RolloutRequest(module.training_actor(AGENT), "agent", (1,), 0))
    largest = float(batch["perturbation"].abs().max())
    assert largest == pytest.approx(0.6 * share)  # outputs of standard deviation 9 reach the bounds
    assert float(module.budget().eps) == pytest.approx(0.6)


def test_without_a_share_all_turns_are_the_agents():
    data = _data()
    module = _attached(ATLA(_settings(0.0), ppo=PPO, total_frames=1600), data)
    assert module.opponent is None
    batch = data.rollout(RolloutRequest(module.training_actor(AGENT), "agent", (1,), 0))
    assert "perturbation" not in batch.keys()  # noqa: SIM118 - a TensorDict
    module.steps_done = 1
    assert module.turn == AGENT
    both = _attached(ATLA(_settings(0.5), ppo=PPO, total_frames=1600), data)
    both.steps_done = 1
    assert both.turn == ADVERSARY
    mixed = PerturbationSettings(space="action", train_share=0.0)
    assert _attached(ActionRobust(perturbation=mixed, ppo=PPO), data).opponent is not None  # its alpha is its budget


def test_grads_responses_and_payoffs_obey_the_share():
    module = _attached(GRAD(_settings(0.5)), _data())
    assert float(module.training_budget.eps) == pytest.approx(0.3)
    assert module.opponent is not None
    assert module.opponent.previous_scale == pytest.approx(1 / 0.3)  # adversaries see p as a share of what they have


def test_a_learner_takes_over_weights_and_statistics_alone():
    data = _data()
    one = _attached(ATLA(_settings(0.0), ppo=PPO, total_frames=1600), data).learner
    assert isinstance(one, PPOLearner)
    game = _attached(ATLA(_settings(0.0), ppo=PPO, total_frames=1600), data)
    game.learner = one
    for number in range(2):
        batch = data.rollout(RolloutRequest(game.training_actor(AGENT), "agent", (2,), number, 0.9))
        one.update(batch, (2, number), 9, 0, batch.numel())
    with torch.no_grad():
        one.policy.views(one.policy.flat)["policy"]["log_std"].fill_(-5.0)
    other = _attached(ATLA(_settings(0.0), ppo=PPO, total_frames=1600), data).learner
    assert isinstance(other, PPOLearner)
    other.updates = 7
    other.take_over(one.state_dict())
    mine, theirs = other.member(), one.member()
    assert mine.pop("policy.log_std").tolist() == [math.log(1.0)]  # explores as a fresh policy does
    theirs.pop("policy.log_std")
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    assert other.updates == 0
    assert not other.policy.optimiser.state
    assert one.policy.optimiser.state
    before = one.policy.flat.detach().clone()
    batch = data.rollout(RolloutRequest(game.training_actor(AGENT), "agent", (3,), 0, 0.9))
    other.update(batch, (3,), 9, 0, batch.numel())
    assert torch.equal(one.policy.flat, before)  # copies
