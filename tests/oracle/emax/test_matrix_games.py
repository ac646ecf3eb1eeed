"""Closed forms of one-step matrix games (Claus & Boutilier 1998) under uniform joint play.

Independent learners' utilities are row and column means; VDN's sum is the additive least-squares fit,
``row + column - grand mean``. QMIX and the greedy joint actions that follow are checked as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emax_batches import adam, make_learner, update
from tensordict import TensorDict
from torch import Tensor

from datamodules.envs.matrix_games import CLIMBING, MatrixGame, penalty_table
from modules.contracts import MultiAgentSpec
from modules.emax import AgentNetwork, Ensemble, Explorer, Mixing, Target, ValueMARL

GAMES = {"climbing": CLIMBING, "penalty": penalty_table(-100.0)}
SPEC = MultiAgentSpec("matrix", 2, 3, 1, 2, 1, common_reward=True)


def _all_cells(table: Sequence[Sequence[float]], minibatches: int) -> TensorDict:
    """The nine joint actions with what the environment pays for them, once each."""
    env = MatrixGame(9, table)
    env.restart()
    action = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    before = env.observe()[0]
    reward, terminated, truncated = env.advance(action)
    assert bool(terminated.all())
    assert not bool(truncated.any())
    part = TensorDict(
        {
            "observation": torch.stack([before, env.observe()[0]], 1),
            "action": action.unsqueeze(1),
            "reward": reward.unsqueeze(1),
            "terminated": terminated.unsqueeze(1),
            "filled": torch.ones(9, 1, dtype=torch.bool),
        },
        [9],
    )
    return part.expand(minibatches, 9)  # pyright: ignore[reportReturnType]


def _trained(table: Sequence[Sequence[float]], steps: int = 1500, **settings: Any) -> ValueMARL:
    learner = make_learner(
        SPEC, network=AgentNetwork(hidden=32), learning_rate=1e-2, gamma=0.99, divergence_limit=None, **settings
    )
    optimizer = adam(learner)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    part = _all_cells(table, learner.minibatches)
    for number in range(steps):
        update(learner, optimizer, part, number)
        schedule.step()
    return learner


def _utilities(learner: ValueMARL) -> Tensor:
    """``[members, agents, actions]``."""
    return learner.agents.apply(learner.online.detach(), torch.ones(1, 2, 1))[:, 0]


def _greedy(learner: ValueMARL) -> list[int]:
    action, _ = learner.act(torch.ones(1, 2, 1), None, {}, torch.Generator(), None)
    return action[0].tolist()


EMAX: dict[str, Any] = {
    "ensemble": Ensemble(3),
    "explorer": Explorer(kind="ucb"),
    "target": Target("mean_online", double_q=False),
    "evaluator": "majority_vote",
}


@pytest.mark.parametrize("settings", [{}, EMAX], ids=["base", "emax"])
@pytest.mark.parametrize("game", GAMES)
def test_independent_learners_end_at_row_and_column_means(game, settings):
    table = torch.tensor(GAMES[game])
    learner = _trained(GAMES[game], mixing=Mixing("none"), **settings)
    means = torch.stack([table.mean(1), table.mean(0)])
    torch.testing.assert_close(_utilities(learner), means.expand(learner.members, 2, 3), rtol=0.0, atol=1e-2)
    numbers = {
        "climbing": ([-6.3333, -5.6667, 1.6667], [-6.3333, -7.6667, 3.6667], [2, 2], 5.0),
        "penalty": ([-30.0, 0.6667, -30.0], [-30.0, 0.6667, -30.0], [1, 1], 2.0),
    }
    rows, columns, joint, payoff = numbers[game]
    torch.testing.assert_close(means, torch.tensor([rows, columns]), rtol=0.0, atol=1e-4)
    assert _greedy(learner) == joint
    assert float(table[joint[0], joint[1]]) == payoff < float(table.max())


@pytest.mark.parametrize("settings", [{}, EMAX], ids=["base", "emax"])
@pytest.mark.parametrize("game", GAMES)
def test_vdn_ends_at_the_additive_least_squares_fit(game, settings):
    table = torch.tensor(GAMES[game])
    learner = _trained(GAMES[game], mixing=Mixing("vdn"), **settings)
    utilities = _utilities(learner)
    fit = utilities[:, 0].unsqueeze(2) + utilities[:, 1].unsqueeze(1)
    expected = table.mean(1, keepdim=True) + table.mean(0, keepdim=True) - table.mean()
    torch.testing.assert_close(fit, expected.expand_as(fit), rtol=0.0, atol=1e-2)
    if game == "climbing":
        assert float(table.mean()) == pytest.approx(-3.4444, abs=1e-4)
        assert float(expected[2, 2]) == pytest.approx(8.7778, abs=1e-4)
        assert float(expected[0, 0]) == pytest.approx(-9.2222, abs=1e-4)
        joint, payoff, optimum = [2, 2], 5.0, 11.0
    else:
        assert float(table.mean()) == pytest.approx(-19.7778, abs=1e-4)
        assert float(expected[1, 1]) == pytest.approx(21.1111, abs=1e-4)
        joint, payoff, optimum = [1, 1], 2.0, 10.0
    assert _greedy(learner) == joint
    assert float(table[joint[0], joint[1]]) == payoff
    assert float(table.max()) == optimum


def test_vdn_and_qmix_fit_an_additive_game_exactly():
    """Where payoffs are a sum, nothing is lost: both find every payoff and the optimum."""
    table = [[a + b for b in (0.0, 2.0, -1.0)] for a in (1.0, -3.0, 4.0)]
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    for mixing in ("vdn", "qmix"):
        learner = _trained(table, mixing=Mixing(mixing, embed=8, hypernet_hidden=16))
        utilities = _utilities(learner)
        chosen = torch.stack([utilities[:, 0, every[:, 0]], utilities[:, 1, every[:, 1]]], -1)
        state = torch.ones(1, 9, 2)
        joint = learner.mixer.mix(learner.online_mixer.detach(), chosen, state)
        torch.testing.assert_close(joint.view(3, 3), torch.tensor(table), rtol=0.0, atol=2e-2)
        assert _greedy(learner) == [2, 1]
