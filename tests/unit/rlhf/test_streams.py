"""Rewards of tokens, and advantage streams, against plain loops."""

from __future__ import annotations

import pytest
import torch

from modules.rlhf.settings import Problem
from modules.rlhf.streams import advantage_streams, combined_scores, reward_streams, token_rewards

P, S, R, N = 3, 2, 5, 2


def _rollout(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(P, S, N, generator=generator)
    log_ratio = torch.randn(P, S, R, generator=generator)
    length = torch.randint(1, R + 1, (P, S), generator=generator)
    return scores, log_ratio, length


def test_components_are_paid_on_the_last_token_and_kl_on_every_one():
    scores, log_ratio, length = _rollout()
    rewards = token_rewards(scores, log_ratio, length, 0.3)
    for p in range(P):
        for s in range(S):
            for t in range(R):
                n = int(length[p, s])
                want = [float(x) for x in scores[p, s]] if t == n - 1 else [0.0] * N
                want.append(-0.3 * float(log_ratio[p, s, t]) if t < n else 0.0)
                torch.testing.assert_close(rewards[p, s, t], torch.tensor(want))


def test_one_stream_is_the_weighted_sum_of_all():
    scores, log_ratio, length = _rollout()
    problem = Problem("fixed", ("a", "b"), weights=(0.25, 2.0), single_stream=True)
    streams = token_rewards(scores, log_ratio, length, 0.1)
    want = 0.25 * streams[..., 0] + 2.0 * streams[..., 1] + streams[..., 2]
    torch.testing.assert_close(reward_streams(problem, scores, log_ratio, length, 0.1).squeeze(-1), want)


def test_ppo_sat_scores_the_squared_distance_of_each_episode():
    problem = Problem("fixed", ("a", "b"), weights=(1.0, 0.5), single_stream=True, saturating=True, targets=(0.2, 0.4))
    scores = torch.tensor([[0.2, 0.8], [0.5, 0.0]])
    torch.testing.assert_close(combined_scores(problem, scores), torch.tensor([0.0, -0.09 - 0.16]))


@pytest.mark.parametrize(("gamma", "lambda_"), [(0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_ends_at_each_response_and_ignores_padding(gamma, lambda_):
    scores, log_ratio, length = _rollout(1)
    rewards = token_rewards(scores, log_ratio, length, 0.2)
    values = torch.randn(P, S, R, N + 1, generator=torch.Generator().manual_seed(2))
    dirty = rewards.clone()
    for p in range(P):
        for s in range(S):
            dirty[p, s, int(length[p, s]) :] = 7.0  # what lies in the padding must not matter
    advantage, target = advantage_streams(dirty, values, length, "gae", gamma=gamma, lambda_=lambda_)
    for p in range(P):
        for s in range(S):
            n, carried = int(length[p, s]), torch.zeros(N + 1)
            for t in reversed(range(R)):
                if t >= n:
                    assert not advantage[p, s, t].any()
                    assert not target[p, s, t].any()
                    continue
                after = values[p, s, t + 1] if t + 1 < n else torch.zeros(N + 1)
                delta = rewards[p, s, t] + gamma * after - values[p, s, t]
                carried = delta + gamma * lambda_ * carried
                torch.testing.assert_close(advantage[p, s, t], carried)
                torch.testing.assert_close(target[p, s, t], carried + values[p, s, t])


def test_group_baselines_leave_the_response_out_or_not():
    scores, log_ratio, length = _rollout(3)
    rewards = token_rewards(scores, log_ratio, length, 0.2)
    total = rewards.sum(2)
    rloo, _ = advantage_streams(rewards, None, length, "group", gamma=1.0, lambda_=1.0)
    grpo, _ = advantage_streams(rewards, None, length, "group", gamma=1.0, lambda_=1.0, leave_one_out=False)
    torch.testing.assert_close(rloo[0, 0, 0], total[0, 0] - total[0, 1])
    torch.testing.assert_close(grpo[0, 0, 0], total[0, 0] - total[0].mean(0))
    assert not rloo[length.unsqueeze(-1) <= torch.arange(R)].any()


def test_batch_baseline_is_the_mean_return_to_go_at_each_position():
    scores, log_ratio, length = _rollout(4)
    rewards = token_rewards(scores, log_ratio, length, 0.2)
    advantage, target = advantage_streams(rewards, None, length, "batch", gamma=1.0, lambda_=1.0)
    flat, lengths = target.flatten(0, 1), length.flatten()
    for t in range(R):
        alive = lengths > t
        if alive.any():
            to_go = rewards.flatten(0, 1)[:, t:].sum(1)
            torch.testing.assert_close(flat[alive, t], to_go[alive])
            torch.testing.assert_close(
                advantage.flatten(0, 1)[alive, t], to_go[alive] - to_go[alive].mean(0), rtol=1e-4, atol=1e-5
            )


def test_batch_baseline_over_two_ranks_is_that_of_one():
    scores, log_ratio, length = _rollout(5)
    rewards = token_rewards(scores, log_ratio, length, 0.2)
    whole, _ = advantage_streams(rewards, None, length, "batch", gamma=1.0, lambda_=1.0)
    sums: list[torch.Tensor] = []
    parts = [slice(0, 1), slice(1, P)]

    def note(value: torch.Tensor) -> torch.Tensor:
        sums.append(value)
        return value

    for part in parts:
        advantage_streams(rewards[part], None, length[part], "batch", gamma=1.0, lambda_=1.0, reduce=note)
    total = sums[0] + sums[1]
    for part in parts:
        mine, _ = advantage_streams(
            rewards[part], None, length[part], "batch", gamma=1.0, lambda_=1.0, reduce=lambda _: total
        )
        torch.testing.assert_close(mine, whole[part])


def test_missing_values_and_single_responses_are_refused():
    rewards, length = torch.zeros(P, 1, R, N), torch.ones(P, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="gae needs values"):
        advantage_streams(rewards, None, length, "gae", gamma=1.0, lambda_=1.0)
    with pytest.raises(ValueError, match="at least 2 responses per prompt"):
        advantage_streams(rewards, None, length, "group", gamma=1.0, lambda_=1.0)
