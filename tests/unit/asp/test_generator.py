"""The generator's learner: what it learns, ranks, undefined rewards, clipping, state."""

from __future__ import annotations

import io

import pytest
import torch

from modules.asp.generator import GeneratorLearner, GeneratorSettings
from modules.networks.node_flow import NodeFlow


def noise(*shape, seed=1):
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed))


def learner(**options):
    torch.manual_seed(0)
    made = GeneratorLearner(GeneratorSettings(**{"lr": 1e-2, "batch_size": 64, **options}))
    made.reset(torch.Generator().manual_seed(3))
    return made


def test_a_generator_learns_what_is_rewarded():
    made = learner(lr=3e-3)
    rewards = []
    for step in range(80):
        u = noise(64, 8, seed=step)
        locs = made.coordinates(u, torch.Generator())
        reward = -(locs - torch.tensor([0.9, 0.1])).norm(dim=-1).mean(1)
        rewards.append(made.step(locs, u, reward)["reward"])
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > first + 0.15, (first, last)
    assert made.best_reward == max(rewards)
    stacked = {name: value.unsqueeze(0) for name, value in made.member().items()}
    u = noise(200, 8, seed=1000)
    best = made.member_coordinates(stacked, torch.zeros(200, dtype=torch.int64), u)
    assert float(-(best - torch.tensor([0.9, 0.1])).norm(dim=-1).mean()) > first + 0.1


@pytest.mark.parametrize("estimator", ["score", "official"])
def test_two_ranks_make_the_step_of_one(estimator):
    u = noise(8, 5)
    whole, half = (learner(estimator=estimator) for _ in range(2))
    with torch.no_grad():
        for made in (whole, half):
            for value in made.flow.parameters():
                value.add_(0.1)
    locs = whole.coordinates(u, torch.Generator())
    reward = locs[..., 0].mean(1)
    reward[2] = torch.nan
    state = half.state_dict()
    expected = whole.step(locs, u, reward)
    parts = (slice(0, 4), slice(4, 8))
    known: list[torch.Tensor] = []
    for call in range(2):  # first the sums of rewards, then, with these given, those of gradients
        mine: list[torch.Tensor] = []
        for part in parts:
            half.load_state_dict(state)
            calls: list[torch.Tensor] = []

            def all_sum(value, calls=calls):
                calls.append(value.clone())
                return known[len(calls) - 1] if len(calls) <= len(known) else value

            half.step(locs[part], u[part], reward[part], all_sum)
            mine.append(calls[call])
        known.append(mine[0] + mine[1])
    half.load_state_dict(state)
    sums = iter(known)
    assert half.step(locs[:4], u[:4], reward[:4], lambda value: next(sums)) == pytest.approx(expected, rel=1e-5)
    for ours, other in zip(half.flow.parameters(), whole.flow.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("squash", ["sigmoid", "minmax"])
def test_the_official_estimator_steps(squash):
    made = learner(estimator="official", squash=squash, baseline="none", reward="cost")
    u = noise(16, 5)
    locs = made.coordinates(u, torch.Generator())
    before = made.member_now()
    made.step(locs, u, locs[..., 1].mean(1))
    moved = [name for name, value in made.member_now().items() if not torch.equal(value, before[name])]
    assert moved


def test_the_official_estimator_goes_through_the_samples_with_the_sign_reversed():
    made = learner(estimator="official", baseline="none")
    with torch.no_grad():
        for value in made.flow.parameters():
            value.add_(0.1)
    u = noise(16, 5)
    locs = made.coordinates(u, torch.Generator())
    reward = locs[..., 1].mean(1)
    made.flow.requires_grad_(True)
    # the true log-density is -log |dx / dz|; theirs is + log |dx / dz|, so their loss is + reward * the true one
    loss = (reward * made.flow.log_prob(made.flow(u)).sum(-1)).mean()
    expected = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(
            made.flow.parameters(),
            torch.autograd.grad(loss, list(made.flow.parameters()), allow_unused=True),
            strict=True,
        )
    ]
    made.flow.requires_grad_(False)
    reduced: list[torch.Tensor] = []

    def all_sum(value):
        reduced.append(value.clone())
        return value

    made.step(locs, u, reward, all_sum)
    flat = torch.cat([gradient.flatten() for gradient in expected])
    assert float(flat.norm()) > 1e-3
    torch.testing.assert_close(reduced[1][:-1].float(), flat, rtol=1e-3, atol=1e-5)


def test_state_round_trip_goes_on_bitwise():
    first = learner()
    for step in range(3):
        u = noise(16, 5, seed=step)
        locs = first.coordinates(u, torch.Generator())
        first.step(locs, u, locs[..., 1].mean(1))
    second = learner()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for made in (first, second):
        u = noise(16, 5, seed=9)
        locs = made.coordinates(u, torch.Generator())
        made.step(locs, u, locs[..., 1].mean(1))
    for mine, other in zip(first.flow.parameters(), second.flow.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match=r"keep generator\.layers"):
        learner(hidden=8).load_state_dict(first.state_dict())


def test_rewards_that_are_none_are_refused():
    made = learner()
    u = noise(4, 5)
    with pytest.raises(ValueError, match="no instance of the batch has a reward"):
        made.step(u, u, torch.full((4,), torch.nan))


def test_undefined_gaps_are_left_out_and_counted():
    u = noise(6, 5)
    reward = u[..., 0].mean(1)
    some = reward.clone()
    some[[1, 4]] = torch.tensor([torch.nan, torch.inf])  # a gap of 0 / 0 and of 1 / 0
    first, second = learner(), learner()
    kept = torch.tensor([0, 2, 3, 5])
    assert first.step(u, u, some) == pytest.approx(second.step(u[kept], u[kept], reward[kept]) | {"left_out": 2.0})
    for mine, other in zip(first.flow.parameters(), second.flow.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_that_are_not_finite_and_other_shapes_are_refused():
    made = learner()
    u = noise(4, 5)
    bad = u.clone()
    bad[0, 0, 0] = torch.nan
    before = made.member_now()
    with pytest.raises(ValueError, match="gradient is nan"):
        made.step(bad, u, u[..., 0].mean(1))
    assert all(torch.equal(value, before[name]) for name, value in made.member_now().items())
    with pytest.raises(ValueError, match=r"reward \[b\], got \(4, 5, 2\), \(4, 5, 2\) and \(3,\)"):
        made.step(u, u, torch.rand(3))


def test_the_whole_gradient_is_clipped(monkeypatch):
    u = noise(16, 5)
    taken, norms = [], []
    for limit in (None, 1e-3):
        made = learner(max_grad_norm=limit)
        parameters = list(made.flow.parameters())
        keep = lambda these=parameters: taken.append(torch.cat([p.grad.flatten() for p in these]))  # noqa: E731
        monkeypatch.setattr(made.optimizer, "step", keep)
        norms.append(made.step(u, u, u[..., 0].mean(1))["grad_norm"])
    assert norms[0] == norms[1] > 1e-2  # reported as it was, far above the limit
    assert float(taken[0].norm()) == pytest.approx(norms[0])
    assert float(taken[1].norm()) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(taken[1] / taken[1].norm(), taken[0] / taken[0].norm())


def test_a_reset_is_uniform_repeatable_and_leaves_the_global_stream_alone():
    made = learner()
    u = noise(16, 5)
    made.step(u, u, u[..., 0].mean(1))
    assert float(made.flow.log_prob(u).abs().max()) > 0
    global_state = torch.get_rng_state()
    weights = []
    for seed in (5, 5, 6):
        made.reset(torch.Generator().manual_seed(seed))
        weights.append(made.member())
        assert made.flow.log_prob(u).unique().tolist() == [0.0]
        assert made.best_reward == -float("inf")
        assert not made.optimizer.state
    assert torch.equal(torch.get_rng_state(), global_state)
    first, again, other = (torch.cat([value.flatten() for value in member.values()]) for member in weights)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_kept_weights_are_those_that_made_the_best_batch():
    made = learner()
    u = noise(16, 5)
    kept = []
    for level in (1.0, 3.0, 2.0):
        kept.append(made.member_now())
        made.step(u, u, level + u[..., 0].mean(1))
    assert all(torch.equal(value, kept[1][name]) for name, value in made.member().items())
    assert not all(torch.equal(value, kept[2][name]) for name, value in made.member().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
        ({"weight_decay": float("nan")}, "weight_decay must be >= 0 and finite, got nan"),
        ({"reward": "gain"}, "reward must be one of gap, gap_proxy, cost, got 'gain'"),
        ({"squash": "minmax"}, "minmax has no density to score"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or null"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratorSettings(**options)
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        NodeFlow(hidden=0)
