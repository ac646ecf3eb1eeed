"""Budgets over more than a million steps with restarts, counted from what was recorded and not by the projection."""

from __future__ import annotations

import pytest
import torch

from datamodules.envs.control.classic import Pendulum
from datamodules.rollout.control import ControlStream
from modules.contracts import RolloutRequest
from modules.control.actor import Agent, GameActor
from modules.control.adversary import LearnedAttacker
from modules.control.attackers import HeuristicAttacker
from modules.control.learner import PPOLearner
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.control.players import AdversarySettings, adversary_networks, agent_networks
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("kind", ["random", "direct", "temporal_delta"])
@pytest.mark.parametrize("first_step", ["free", "zero"])
def test_no_violation(norm, kind, first_step):
    """4,096 copies with episodes of 7 steps, 50 steps each: 204,800 steps a case, 2.4 million in all."""
    settings = PerturbationSettings("state", norm, 0.3, 0.05, True, first_step)
    env = Pendulum(4096, horizon=7)
    spec = env.control_spec
    budget = PerturbationSet(settings, 3)
    networks = agent_networks(spec, MemorySettings(), (8,), 1.0)
    learner = PPOLearner(networks, PPOSettings(), "agent")
    learner.begin((1,))
    if kind == "random":
        attacker = HeuristicAttacker("random", budget)
    else:
        adversary = AdversarySettings(kind=kind, hidden=(8,), init_std=3.0)
        rival = PPOLearner(adversary_networks(spec, adversary, settings), PPOSettings(), "adversary")
        rival.begin((2,))
        attacker = LearnedAttacker(rival.networks, rival.stacked(), torch.ones(1), adversary, budget, sampled=True)
    agent = Agent(networks, learner.stacked(), torch.ones(1), MemorySettings(), sampled=True)
    stream = ControlStream(env, 0, 4096)
    actor = GameActor(spec, agent, attacker, budget, "state", learner="agent")
    with torch.no_grad():
        chunk = stream.collect(RolloutRequest(actor, "probe", (5,), 0), 50)
    p, fresh = chunk["perturbation"].double(), chunk["fresh"]
    before = torch.cat([torch.zeros_like(p[:, :1]), p[:, :-1]], 1).masked_fill(fresh.unsqueeze(-1), 0.0)
    order = torch.inf if norm == "inf" else 2
    size, leap = p.norm(order, dim=-1), (p - before).norm(order, dim=-1)
    assert int(fresh.sum()) == 4096 * 8
    assert float(size.max()) <= 0.3 + 1e-6
    bound = torch.full_like(leap, 0.05)
    if first_step == "free":
        bound[fresh] = 0.3
    assert float((leap - bound).max()) <= 1e-6
    assert float(size.max()) > 0.9 * (0.3 if first_step == "free" or kind != "random" else 0.15)  # it is used
