from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from emax_batches import make_batch, make_learner, make_spec
from torch import Tensor

from modules.emax import Mixing, Reward
from modules.emax.rewards import RewardScale


def _alone(value: Tensor) -> Tensor:
    return value


def _scale(columns: int, norm: Literal["none", "scale", "standardise"] = "standardise") -> RewardScale:
    scale = RewardScale(Reward(norm=norm))
    scale.build(columns)
    return scale


def _moments(scale: RewardScale) -> tuple[np.ndarray, np.ndarray]:
    count, mean, squares = (scale.get_buffer(name) for name in ("count", "mean", "squares"))
    return mean.numpy(), (squares / count).numpy()


def _batches(columns: int, sizes: tuple[int, ...] = (7, 1, 300, 32), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Rewards ``[minibatches, items, steps, columns]`` far from 0, and which steps are filled."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number, items in enumerate(sizes):
        reward = 50.0 + (3.0 + number) * torch.randn(2, items, 4, columns, generator=draw)
        filled = torch.rand(2, items, 4, generator=draw) < 0.7
        filled[0, 0, 0] = True
        made.append((reward, filled))
    return made


@pytest.mark.parametrize("columns", [1, 3])
def test_moments_of_all_batches_are_those_of_their_concatenation(columns):
    """Mean and variance as numpy has them, up to the prior of count 1e-4."""
    scale, batches = _scale(columns), _batches(columns)
    for reward, filled in batches:
        scale(reward, filled, _alone)
    everything = torch.cat([reward[filled] for reward, filled in batches]).double().numpy()
    mean, variance = _moments(scale)
    share = 1e-4 / (len(everything) + 1e-4)
    np.testing.assert_allclose(mean, (1 - share) * everything.mean(0), rtol=1e-9)
    # merging with the prior's mean 0 and variance 1
    prior = share * 1.0 + share * (1 - share) * everything.mean(0) ** 2
    np.testing.assert_allclose(variance, (1 - share) * everything.var(0) + prior, rtol=1e-9)
    np.testing.assert_allclose(variance, everything.var(0), rtol=2e-3)


@pytest.mark.parametrize("norm", ["scale", "standardise"])
def test_rewards_are_scaled_by_the_moments_that_include_them(norm):
    scale, (first, second, *_) = _scale(2, norm), _batches(2)
    scale(*first, _alone)
    out = scale(*second, _alone)
    mean, variance = (torch.from_numpy(value) for value in _moments(scale))
    centred = second[0] - mean if norm == "standardise" else second[0]
    torch.testing.assert_close(out, (centred / (variance.sqrt() + 1e-8)).float())
    assert out.dtype == torch.float32


def test_no_norm_changes_nothing():
    scale, (first, *_) = _scale(1, "none"), _batches(1)
    assert torch.equal(scale(*first, _alone), first[0])
    assert float(scale.get_buffer("count")) == 1e-4


def _ranks_of(pieces: list[tuple[Tensor, Tensor]]) -> list[RewardScale]:
    """What every rank holds after each merged its piece: sums over ranks are worked out first, then handed out."""
    sent: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        sent.append(value.clone())
        return value

    for piece in pieces:
        _scale(1)(*piece, record)

    def together(_: Tensor) -> Tensor:
        return torch.stack(sent).sum(0)

    ranks = [_scale(1) for _ in pieces]
    for scale, piece in zip(ranks, pieces, strict=True):
        scale(*piece, together)
    return ranks


def test_ranks_hold_what_one_process_holds():
    pieces = _batches(1, (5, 90, 17))
    ranks = _ranks_of(pieces)
    alone = _scale(1)
    reward, filled = (torch.cat([piece[i].flatten(0, 1) for piece in pieces]) for i in (0, 1))
    alone(reward, filled, _alone)
    for rank in ranks:
        for name in ("count", "mean", "squares"):
            torch.testing.assert_close(rank.get_buffer(name), alone.get_buffer(name), rtol=1e-12, atol=1e-12)
            assert torch.equal(rank.get_buffer(name), ranks[0].get_buffer(name))


def test_a_rank_without_a_filled_step_takes_part():
    pieces = _batches(1, (5, 9))
    pieces[1][1].fill_(False)
    for rank in _ranks_of(pieces):
        mean, variance = _moments(rank)
        seen = pieces[0][0][pieces[0][1]].double().numpy()
        np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-4)
        np.testing.assert_allclose(variance, seen.var(0), rtol=2e-2)


def test_constant_rewards_do_not_divide_by_nothing():
    scale = _scale(1)
    filled = torch.ones(1, 50, 4, dtype=torch.bool)
    for _ in range(3):
        out = scale(torch.full((1, 50, 4, 1), 0.0), filled, _alone)
    assert bool(out.isfinite().all())
    assert float(scale.get_buffer("squares")) >= 0.0


def test_moments_are_part_of_the_checkpoint():
    settings = {"reward": Reward(norm="standardise")}
    learner = make_learner(make_spec(), **settings)
    learner.losses(make_batch(make_spec()))
    other = make_learner(make_spec(), seed=1, **settings)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.rewards.get_buffer("mean"), learner.rewards.get_buffer("mean"))
    assert float(other.rewards.get_buffer("count")) == pytest.approx(8, abs=1e-3)


@pytest.mark.parametrize(
    ("scalarise", "common", "expected"),
    [
        ("sum", False, [6.0]),
        ("mean", False, [2.0]),
        ("none", False, [1.0, 2.0, 3.0]),
        ("sum", True, [1.0]),
        ("mean", True, [1.0]),
    ],
)
def test_team_reward_by_hand(scalarise, common, expected):
    """A reward that all share is the team's already: no sum makes it larger with more agents."""
    learner = make_learner(make_spec(common_reward=common), mixing=Mixing("none"), reward=Reward(scalarise))
    assert learner.team_reward(torch.tensor([1.0, 2.0, 3.0])).tolist() == expected
