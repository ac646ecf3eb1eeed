from __future__ import annotations

import pytest
import torch

from modules.objectives.td import (
    boltzmann_log_policy,
    double_q_target,
    epsilon_greedy_policy,
    greedy_actions,
    masked_max,
    q_learning_target,
    td_loss,
)

Q = torch.tensor([[1.0, 9.0, 2.0], [-3.0, -1.0, -2.0], [4.0, 5.0, 6.0]])
LEGAL = torch.tensor([[True, False, True], [True, False, True], [False, False, False]])


def test_illegal_actions_never_enter_the_maximum():
    assert masked_max(Q, LEGAL).tolist() == [2.0, -2.0, 0.0]
    assert masked_max(Q).tolist() == [9.0, -1.0, 6.0]
    assert greedy_actions(Q, LEGAL)[:2].tolist() == [2, 2]
    assert greedy_actions(torch.zeros(1, 3), torch.tensor([[False, True, True]])).tolist() == [1]


def test_q_learning_target_by_hand():
    reward, terminated = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([False, True, False])
    assert q_learning_target(reward, Q, terminated, 0.5, LEGAL).tolist() == [2.0, 1.0, 1.0]


def test_terminated_rows_may_hold_anything():
    q = torch.full((1, 2), float("nan"))
    assert q_learning_target(torch.ones(1), q, torch.tensor([True])).tolist() == [1.0]


def test_double_q_values_the_online_choice_among_legal_actions():
    online = torch.tensor([[3.0, 99.0, 0.0], [0.0, 99.0, 1.0], [0.0, 0.0, 1.0]])
    found = double_q_target(torch.zeros(3), Q, online, torch.zeros(3, dtype=torch.bool), 1.0, LEGAL)
    assert found.tolist() == [1.0, -2.0, 0.0]
    single = q_learning_target(torch.zeros(3), Q, torch.zeros(3, dtype=torch.bool), 1.0, LEGAL)
    assert double_q_target(torch.zeros(3), Q, Q, torch.zeros(3, dtype=torch.bool), 1.0, LEGAL).equal(single)


def test_targets_pass_no_gradient():
    q = Q.clone().requires_grad_()
    assert not q_learning_target(torch.zeros(3), q, torch.zeros(3, dtype=torch.bool)).requires_grad


def test_losses_of_taken_actions():
    q = torch.tensor([[0.0, 7.0], [3.0, 0.0]], requires_grad=True)
    action, target = torch.tensor([0, 0]), torch.tensor([0.5, 0.0])
    assert td_loss(q, action, target, "mse").tolist() == [0.125, 4.5]
    huber = td_loss(q, action, target, "huber", delta=1.0)
    assert huber.tolist() == [0.125, 2.5]
    huber.sum().backward()
    assert q.grad is not None
    assert q.grad.tolist() == [[-0.5, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="huber or mse"):
        td_loss(q, action, target, "mae")


def test_boltzmann_policy_is_the_legal_softmax_at_a_temperature():
    policy = boltzmann_log_policy(Q, LEGAL, 0.5).exp()
    expected = torch.softmax(torch.tensor([2.0, 4.0]), 0)
    torch.testing.assert_close(policy[0, [0, 2]], expected)
    assert (policy[~LEGAL] == 0).all()
    cold = boltzmann_log_policy(Q, LEGAL, 1e-3).exp()
    assert cold[0].tolist() == [0.0, 0.0, 1.0]


def test_epsilon_greedy_spreads_over_legal_actions_only():
    policy = epsilon_greedy_policy(Q, LEGAL, 0.1)
    torch.testing.assert_close(policy[0], torch.tensor([0.05, 0.0, 0.95]))
    assert policy.sum(-1).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert (policy[~LEGAL] == 0).all()
