"""Hull distances: what they must be by definition."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from modules.psd_psro.hull import divergence, hull_distance, sampled_hull, smooth, smooth_table, state_action_bonus


def _simplex(generator: torch.Generator, *shape: int, power: float = 1.0) -> Tensor:
    draws = torch.empty(*shape, dtype=torch.float64).exponential_(generator=generator) ** power
    return draws / draws.sum(-1, keepdim=True)


@pytest.fixture
def draws() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_divergence_counts_zeros_as_the_definition_says():
    reach = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    plan = torch.tensor([0.25, 0.0, 1.5, 0.7], dtype=torch.float64)
    other = torch.tensor([0.5, 0.25, 0.5, 0.0], dtype=torch.float64)
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(3.0)
    assert float(divergence(plan, other, reach)) == pytest.approx(wanted, abs=1e-15)
    assert divergence(other, plan, reach) == torch.inf  # `plan` never plays sequence 1


def test_divergence_gradient_is_finite_at_zero_entries():
    plan = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    divergence(plan, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)).backward()
    assert plan.grad is not None
    assert plan.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", ["mixture", "vertices"])
def test_a_member_is_at_distance_0(draws, kind):
    members, reach = _simplex(draws, 5, 12), torch.ones(12, dtype=torch.float64)
    found = hull_distance(members, members, reach, kind)
    assert found.value.abs().max() < 1e-9
    assert found.sigma.shape == (5, 5)


def test_an_interior_mixture_is_in_the_hull_and_at_no_vertex(draws):
    members, reach = _simplex(draws, 4, 9), torch.ones(9, dtype=torch.float64)
    inside = _simplex(draws, 6, 4) @ members
    assert hull_distance(inside, members, reach, "mixture").value.abs().max() < 1e-9
    assert hull_distance(inside, members, reach, "vertices").value.min() > 1e-3


def test_the_hull_is_never_farther_than_its_vertices_and_never_negative(draws):
    members, plans = _simplex(draws, 6, 20, power=3), _simplex(draws, 10, 20, power=3)
    reach = torch.ones(20, dtype=torch.float64)
    hull, vertices = (hull_distance(plans, members, reach, kind).value for kind in ("mixture", "vertices"))
    assert (hull > 0).all()
    assert (hull < vertices - 1e-4).any()
    assert (hull <= vertices + 1e-9).all()


@pytest.mark.parametrize("kind", ["mixture", "vertices"])
def test_another_member_never_adds_distance_and_a_duplicate_changes_nothing(draws, kind):
    members, plans = _simplex(draws, 8, 15, power=2), _simplex(draws, 5, 15, power=2)
    reach = torch.ones(15, dtype=torch.float64)
    values = torch.stack([hull_distance(plans, members[:k], reach, kind).value for k in range(1, 9)])
    assert (values.diff(dim=0) <= 1e-9).all()
    assert (values.diff(dim=0) < -1e-3).any()
    doubled = hull_distance(plans, torch.cat([members, members[:3]]), reach, kind).value
    torch.testing.assert_close(doubled, values[-1], rtol=0, atol=1e-9)


def test_learners_solved_together_equal_learners_solved_alone(draws):
    members, plans = _simplex(draws, 7, 30, power=3), _simplex(draws, 4, 30, power=3)
    reach = torch.rand(30, dtype=torch.float64, generator=draws)
    together = hull_distance(plans, members, reach)
    alone = torch.stack([hull_distance(plan, members, reach).value for plan in plans])
    assert together.gap.max() <= 1e-9
    torch.testing.assert_close(together.value, alone, rtol=0, atol=1e-9)


def test_newton_and_plain_em_agree_and_em_alone_certifies_its_gap(draws):
    members, plan = _simplex(draws, 5, 10, power=2), _simplex(draws, 10, power=2)
    reach = torch.ones(10, dtype=torch.float64)
    exact = hull_distance(plan, members, reach)
    slow = hull_distance(plan, members, reach, iterations=50, newton=False)
    assert exact.gap <= 1e-10 < slow.gap
    assert 0 <= float(slow.value - exact.value) <= float(slow.gap)


def test_what_no_member_plays_is_infinitely_far_until_smoothed():
    members = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    plan = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    reach = torch.ones(3, dtype=torch.float64)
    for kind in ("mixture", "vertices"):
        assert hull_distance(plan, members, reach, kind).value == torch.inf
    near = hull_distance(smooth(plan, 1e-3), smooth(members, 1e-3), reach)
    assert 0 < near.value < 5
    torch.testing.assert_close(near.sigma, torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixture", "vertices"])
def test_gradcheck(draws, kind):
    members, reach = _simplex(draws, 4, 8), torch.rand(8, dtype=torch.float64, generator=draws) + 0.1
    plan = _simplex(draws, 8).requires_grad_()

    def value(p: Tensor) -> Tensor:
        return hull_distance(p, members, reach, kind, tolerance=1e-14).value

    assert torch.autograd.gradcheck(value, (plan,), eps=1e-4, atol=1e-5, rtol=1e-4)


def test_smoothing_keeps_mixtures_in_the_hull_and_behaviour_smoothing_is_legal(draws):
    members, base = _simplex(draws, 3, 6), _simplex(draws, 6)
    sigma = _simplex(draws, 3)
    torch.testing.assert_close(sigma @ smooth(members, 0.2, base=base), smooth(sigma @ members, 0.2, base=base))
    torch.testing.assert_close(smooth(members, 1e-3), (members + 1e-3) / (1 + 6e-3))
    legal = torch.tensor([[True, True, False]])
    table = smooth_table(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), legal, 0.2)
    torch.testing.assert_close(table, torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64))


def test_sampled_hull_tends_to_the_exact_distance(draws):
    members, plan = _simplex(draws, 3, 6, power=2), _simplex(draws, 6, power=2)
    reach = torch.ones(6, dtype=torch.float64)
    episodes = torch.multinomial(plan, 20_000, replacement=True, generator=draws)
    own, others = plan.log()[episodes], members.log()[:, episodes]
    for kind in ("mixture", "vertices"):
        exact = hull_distance(plan, members, reach, kind)
        bonus, sigma = sampled_hull(own, others, kind)
        error = bonus.std() / math.sqrt(len(bonus))
        assert abs(float(bonus.mean() - exact.value)) < 4 * float(error)
        torch.testing.assert_close(sigma, exact.sigma, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["mixture", "vertices"])
def test_sampled_hull_of_two_ranks_equals_one_rank_with_all_episodes(draws, kind):
    members, plan = _simplex(draws, 5, 8, power=2), _simplex(draws, 8, power=2)
    episodes = torch.multinomial(plan, 300, replacement=True, generator=draws)
    own, others = plan.log()[episodes], members.log()[:, episodes]
    whole = sampled_hull(own, others, kind)
    barrier, shares = threading.Barrier(2, timeout=20), [torch.zeros(0)] * 2

    def rank(index: int) -> tuple[Tensor, Tensor]:
        def reduce(value: Tensor) -> Tensor:
            shares[index] = value
            barrier.wait()
            total = shares[0] + shares[1]
            barrier.wait()
            return total

        part = slice(0, 70) if index == 0 else slice(70, 300)
        return sampled_hull(own[part], others[:, part], kind, reduce=reduce)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][1], whole[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]]), whole[0], rtol=0, atol=1e-5)
    assert (sampled_hull(own[:70], others[:, :70], kind)[1] - whole[1]).abs().max() > 1e-3 or kind == "vertices"


def test_sampled_hull_differentiates_the_learner_only_and_takes_impossible_histories():
    own = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    bonus, sigma = sampled_hull(own, others)
    torch.testing.assert_close(sigma, torch.tensor([0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(bonus.detach(), torch.full((2,), math.log(2), dtype=torch.float64))
    bonus.sum().backward()
    assert own.grad is not None
    assert own.grad.tolist() == [1.0, 1.0]


def test_state_action_bonus_equals_the_definition(draws):
    states, actions, episodes = 40, 4, 5
    logits = torch.randn(states, actions, generator=draws, dtype=torch.float64)
    members = torch.randn(3, states, actions, generator=draws, dtype=torch.float64)
    legal = torch.rand(states, actions, generator=draws) < 0.7
    legal[:, 0] = True
    episode = torch.arange(states) % episodes
    found = state_action_bonus(logits.requires_grad_(), members, legal, episode, episodes)

    wanted = torch.zeros(3, states, dtype=torch.float64)
    for k in range(3):
        for s in range(states):
            p, q = (values[s][legal[s]].softmax(-1) for values in (logits.detach(), members[k]))
            wanted[k, s] = (p * (p / q).log()).sum()
    nearest = int(wanted.sum(1).argmin())
    assert int(found.nearest) == nearest
    torch.testing.assert_close(found.sums, wanted.sum(1))
    torch.testing.assert_close(found.bonus, torch.stack([wanted[nearest, e::episodes].sum() for e in range(episodes)]))
    torch.testing.assert_close(found.direct.detach(), wanted[nearest].mean())
    assert not found.bonus.requires_grad
    found.direct.backward()
    assert logits.grad is not None
    assert (logits.grad[~legal] == 0).all()
    assert logits.grad.abs().sum() > 0


def test_state_action_bonus_chooses_by_the_sums_of_all_ranks():
    """Member 0 is nearest on this rank's state, member 1 over both ranks' states."""
    logits, legal = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    members = torch.tensor([[[0.1, 0.0]], [[0.5, 0.0]]])
    episode = torch.zeros(1, dtype=torch.int64)
    assert int(state_action_bonus(logits, members, legal, episode, 1).nearest) == 0
    elsewhere = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    found = state_action_bonus(logits, members, legal, episode, 1, reduce=lambda sums: sums + elsewhere)
    assert int(found.nearest) == 1
    torch.testing.assert_close(found.direct * 2, found.bonus[0])  # two states in all


def test_state_action_bonus_with_deterministic_members_needs_eps():
    logits, legal = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    members = torch.tensor([[[0.0, -math.inf]]])
    episode = torch.zeros(1, dtype=torch.int64)
    assert state_action_bonus(logits, members, legal, episode, 1).bonus[0] == torch.inf
    smoothed = state_action_bonus(logits, members, legal, episode, 1, eps=0.1).bonus[0]
    assert float(smoothed) == pytest.approx(0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda one: hull_distance(one[0], one, one[0], "edges"), "kind"),  # pyright: ignore
        (lambda one: hull_distance(one[0], one[:0], one[0]), "member_plans"),
        (lambda one: hull_distance(one[0, :2], one, one[0]), "must have 3 sequences"),
        (lambda one: smooth(one, -1.0), "eps"),
        (lambda one: smooth_table(one, one > 0, 2.0), "eps"),
        (lambda one: sampled_hull(one[0], one[:, :2]), "member_log_likelihood"),
        (lambda one: sampled_hull(one[0], one[:0]), "at least one member"),
        (lambda one: state_action_bonus(one, one, one > 0, one[0], 1), "member_logits"),
    ],
)
def test_errors_name_the_field(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.full((2, 3), 1 / 3, dtype=torch.float64))
