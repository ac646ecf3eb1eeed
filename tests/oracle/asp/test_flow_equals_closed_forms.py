"""The generator's flow: inverse, Jacobian, normalisation, uniformity, and the score-function gradient."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from modules.asp.generator import GeneratorLearner, GeneratorSettings
from modules.networks.node_flow import NodeFlow, flow_members


def shaken(seed=0, scale=0.6, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    flow = NodeFlow(**options).to(dtype)
    with torch.no_grad():
        for value in flow.parameters():
            value.add_(scale * torch.randn_like(value))
    return flow


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_inverse_gives_the_noise_back():
    flow, u = shaken(scale=0.2), noise(500)
    points, log_det = flow.transform(u)
    back, density = flow.inverse(points)
    inside = ((points > 1e-5) & (points < 1 - 1e-5)).all(-1)
    assert inside.sum() > 300
    torch.testing.assert_close(back[inside], u[inside], rtol=0, atol=1e-5)
    torch.testing.assert_close(density[inside], -log_det[inside], rtol=0, atol=1e-4)


def test_log_determinant_equals_autograds_jacobian():
    flow = shaken(scale=0.3)
    for u in noise(12, seed=4) * 0.8 + 0.1:
        jacobian = torch.autograd.functional.jacobian(flow, u)
        torch.testing.assert_close(flow.transform(u)[1], torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    flow = shaken(scale=0.1)
    # on a grid of logits: near the sides the density may grow without bound
    z = torch.linspace(-13.5, 13.5, 400, dtype=torch.float64)
    slope = torch.sigmoid(z) * torch.sigmoid(-z) * (z[1] - z[0])
    grid = torch.cartesian_prod(torch.sigmoid(z), torch.sigmoid(z))
    density = flow.log_prob(grid).exp().detach()
    assert float(density.log().std()) > 0.1
    assert float((density * (slope.unsqueeze(1) * slope).flatten()).sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_new_flow_is_exactly_uniform():
    flow = NodeFlow().double()
    u = noise(4000)
    points = flow(u).detach()
    torch.testing.assert_close(points, u.clamp(1e-6, 1 - 1e-6), rtol=0, atol=1e-12)
    assert float(flow.log_prob(points).detach().abs().max()) < 1e-12
    for axis in (0, 1):
        assert stats.kstest(points[:, axis].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_nothing_overflows_at_the_sides_in_float32(edge):
    flow = shaken(scale=3.0, dtype=torch.float32)
    points = flow(torch.full((3, 2), edge))
    assert ((points > 0) & (points < 1)).all()
    assert flow.log_prob(points).isfinite().all()
    assert flow.log_prob(torch.full((3, 2), edge)).isfinite().all()


def test_members_are_applied_by_number():
    flows = [shaken(seed, dtype=torch.float32) for seed in range(3)]
    stacked = {name: torch.stack([flow.state_dict()[name] for flow in flows]) for name in flows[0].state_dict()}
    u, numbers = noise(7, 5, dtype=torch.float32), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    points = flow_members(NodeFlow(), stacked, numbers, u)
    for index, number in enumerate(numbers.tolist()):
        torch.testing.assert_close(points[index], flows[number](u[index]).detach())


def test_minmax_is_in_the_square_and_has_no_density():
    flow = shaken(squash="minmax")
    points = flow(noise(30, 4)).detach()
    assert float(points.min()) == 0.0
    assert float(points.max()) == 1.0
    with pytest.raises(ValueError, match="minmax has no density"):
        flow.log_prob(points)


def learner(**options):
    torch.manual_seed(0)
    made = GeneratorLearner(GeneratorSettings(**{"lr": 1e-2, "batch_size": 64, **options}))
    made.reset(torch.Generator().manual_seed(3))
    return made


def test_score_function_gradient_is_that_of_the_expected_reward():
    """With reward = mean x over nodes, d E[reward] is the path gradient of the mean of f(u): both on the same points."""
    flow = shaken(scale=0.1)
    u = noise(60_000, 1, seed=8)
    path = torch.autograd.grad(flow(u)[..., 0].mean(), list(flow.parameters()), allow_unused=True)
    points = flow(u).detach()
    reward = points[..., 0].mean(1)
    score = torch.autograd.grad(((reward - reward.mean()) * flow.log_prob(points).sum(-1)).mean(), list(flow.parameters()))
    pairs = [(a, b) for a, b in zip(path, score, strict=True) if a is not None]
    left = torch.cat([a.flatten() for a, _ in pairs])
    right = torch.cat([b.flatten() for _, b in pairs])
    assert float(torch.cosine_similarity(left, right, dim=0)) > 0.99
    assert float((left - right).norm() / left.norm()) < 0.12  # 60,000 samples


def test_a_generator_learns_what_is_rewarded():
    made = learner(lr=3e-3)
    rewards = []
    for step in range(80):
        u = noise(64, 8, seed=step, dtype=torch.float32)
        locs = made.coordinates(u, torch.Generator())
        reward = -(locs - torch.tensor([0.9, 0.1])).norm(dim=-1).mean(1)
        rewards.append(made.step(locs, u, reward)["reward"])
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > first + 0.15, (first, last)
    assert made.best_reward == max(rewards)
    stacked = {name: value.unsqueeze(0) for name, value in made.member().items()}
    u = noise(200, 8, seed=1000, dtype=torch.float32)
    best = made.member_coordinates(stacked, torch.zeros(200, dtype=torch.int64), u)
    assert float(-(best - torch.tensor([0.9, 0.1])).norm(dim=-1).mean()) > first + 0.1


@pytest.mark.parametrize("estimator", ["score", "official"])
def test_two_ranks_make_the_step_of_one(estimator):
    u = noise(8, 5, dtype=torch.float32)
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
    u = noise(16, 5, dtype=torch.float32)
    locs = made.coordinates(u, torch.Generator())
    before = made.member_now()
    made.step(locs, u, locs[..., 1].mean(1))
    moved = [name for name, value in made.member_now().items() if not torch.equal(value, before[name])]
    assert moved


def test_state_round_trip_goes_on_bitwise():
    first = learner()
    for step in range(3):
        u = noise(16, 5, seed=step, dtype=torch.float32)
        locs = first.coordinates(u, torch.Generator())
        first.step(locs, u, locs[..., 1].mean(1))
    second = learner()
    second.load_state_dict(first.state_dict())
    for made in (first, second):
        u = noise(16, 5, seed=9, dtype=torch.float32)
        locs = made.coordinates(u, torch.Generator())
        made.step(locs, u, locs[..., 1].mean(1))
    for mine, other in zip(first.flow.parameters(), second.flow.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match=r"keep generator\.layers"):
        learner(hidden=8).load_state_dict(first.state_dict())


def test_rewards_that_are_none_are_refused():
    made = learner()
    u = noise(4, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="no instance of the batch has a reward"):
        made.step(u, u, torch.full((4,), torch.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
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
