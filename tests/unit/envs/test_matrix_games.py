"""Matrix games and what all batched environments share: specs, both ways to step, snapshots, time limits, refusals."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from datamodules.envs.matrix_games import CLIMBING, MatrixGame, penalty_table


def test_payoffs_are_read_by_both_agents_actions():
    game = MatrixGame(9)
    game.restart()
    actions = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    reward, terminated, truncated = game.advance(actions)
    assert torch.equal(reward[:, 0].view(3, 3), torch.tensor(CLIMBING))
    assert torch.equal(reward[:, 0], reward[:, 1])
    assert bool(terminated.all())
    assert not bool(truncated.any())


def test_penalty_and_three_agents():
    assert penalty_table(-100.0)[0] == (-100.0, 0.0, 10.0)
    table = torch.arange(8.0).view(2, 2, 2)
    game = MatrixGame(1, payoffs=table.tolist(), rounds=2)
    game.restart()
    reward, terminated, _ = game.advance(torch.tensor([[1, 0, 1]]))
    assert reward.tolist() == [[5.0, 5.0, 5.0]]
    assert not bool(terminated.any())
    assert bool(game.advance(torch.tensor([[1, 1, 1]]))[1].all())


def test_specs_and_torchrl_steps():
    game = MatrixGame(4, rounds=3)
    check_env_specs(game)
    rollout = game.rollout(7, break_when_any_done=False)
    assert rollout["is_init"].squeeze(-1)[0].tolist() == [True, False, False] * 2 + [True]
    assert rollout["next", "done"].squeeze(-1)[0].tolist() == [False, False, True] * 2 + [False]
    assert rollout["state"].shape == (4, 7, 2)


def test_snapshot_is_exact_and_refuses_another_batch():
    game = MatrixGame(4, rounds=3)
    game.restart()
    game.advance(torch.zeros(4, 2, dtype=torch.int64))
    kept = game.snapshot()
    drawn = torch.rand(3, generator=game.generator)
    game.advance(torch.zeros(4, 2, dtype=torch.int64))
    game.restore(kept)
    assert game.elapsed.tolist() == [1] * 4
    assert torch.equal(drawn, torch.rand(3, generator=game.generator))


@pytest.mark.parametrize(
    ("payoffs", "says"),
    [
        ([[1.0, 2.0], [3.0]], "full table"),
        ([[1.0, 2.0]], "equal sides"),
        ([1.0, 2.0], "equal sides"),
        ([[1.0, float("nan")], [0.0, 0.0]], "finite"),
    ],
)
def test_wrong_tables_are_refused(payoffs, says):
    with pytest.raises(ValueError, match=f"MatrixGame: payoffs: .*{says}"):
        MatrixGame(1, payoffs=payoffs)


def test_wrong_actions_and_counts_are_refused():
    game = MatrixGame(2)
    state = game.reset()
    for actions, says in (
        (torch.tensor([[0, 3], [0, 0]]), r"int64 in \[0, 3\), got torch.int64 in \[0, 3\]"),
        (torch.zeros(2, 2), "got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), "got torch.int32"),
    ):
        with pytest.raises(ValueError, match=says):
            game.step(state.clone().set(("agents", "action"), actions))
    with pytest.raises(ValueError, match=r"action must be \[2, 2\], got \[2\]"):
        game.check_actions(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="MatrixGame: envs must be >= 1, got 0"):
        MatrixGame(0)
