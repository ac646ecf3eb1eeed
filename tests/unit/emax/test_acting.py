from __future__ import annotations

import math
from itertools import product

import pytest
import scipy.stats
import torch
from emax_batches import make_learner, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.contracts import ActingModule, ActsMultiAgent, LearnsFromReplay
from modules.emax import AgentNetwork, Ensemble, Explorer
from modules.emax.acting import (
    best_action,
    boltzmann_action,
    ensemble_moments,
    majority_vote,
    member_utilities,
    with_random,
)

# the sheet's two members: means tie, deviations differ
TWO = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
DRAWS = 20_000


def _uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _p_value(actions: torch.Tensor, probabilities: list[float]) -> float:
    """Of a chi-square test that ``actions`` come from ``probabilities``; impossible ones must not occur at all."""
    seen = torch.bincount(actions.flatten(), minlength=len(probabilities)).tolist()
    assert all(count == 0 for count, p in zip(seen, probabilities, strict=True) if p == 0.0)
    pairs = [(count, p * sum(seen)) for count, p in zip(seen, probabilities, strict=True) if p > 0.0]
    return float(scipy.stats.chisquare(*zip(*pairs, strict=True)).pvalue)


def test_moments_by_hand_in_population_form():
    mean, std = ensemble_moments(TWO)
    assert mean.tolist() == [2.0, 2.0]
    assert std.tolist() == [1.0, 2.0]


def test_one_member_has_deviation_zero():
    one = torch.randn(1, 7, 3, 4)
    mean, std = ensemble_moments(one)
    assert torch.equal(mean, one[0])
    assert torch.equal(std, torch.zeros(7, 3, 4))


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 30.0])
def test_ucb_by_hand_prefers_the_uncertain_action(beta):
    mean, std = ensemble_moments(TWO)
    for ties in ([0.9, 0.1], [0.1, 0.9]):
        assert int(best_action(mean + beta * std, None, torch.tensor(ties))) == 1
        # without a bonus it is a tie, and the drawn numbers decide
        assert int(best_action(mean, None, torch.tensor(ties))) == int(torch.tensor(ties).argmax())


def test_ties_are_broken_uniformly_among_available_maximisers():
    scores = torch.tensor([2.0, 1.0, 2.0, 2.0, 2.0]).expand(DRAWS, 5)
    legal = torch.tensor([True, True, True, False, True])
    assert _p_value(best_action(scores, legal, _uniform(DRAWS, 5)), [1 / 3, 0, 1 / 3, 0, 1 / 3]) > 1e-3


def test_random_actions_are_uniform_over_available_ones_at_rate_epsilon():
    greedy = torch.full((DRAWS,), 2)
    legal = torch.tensor([True, False, True, True])
    drawn = with_random(greedy, legal, 0.3, _uniform(DRAWS, seed=1), _uniform(DRAWS, 4, seed=2))
    assert _p_value(drawn, [0.1, 0.0, 0.8, 0.1]) > 1e-3
    assert torch.equal(with_random(greedy, legal, 0.0, _uniform(DRAWS), _uniform(DRAWS, 4)), greedy)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_boltzmann_draws_from_the_softmax_over_available_actions(temperature):
    scores, legal = torch.tensor([1.0, 0.0, -1.0, 3.0]), torch.tensor([True, True, True, False])
    drawn = boltzmann_action(scores.expand(DRAWS, 4), legal, temperature, _uniform(DRAWS, 4))
    weights = [math.exp(value / temperature) for value in (1.0, 0.0, -1.0)]
    assert _p_value(drawn, [*(w / sum(weights) for w in weights), 0.0]) > 1e-3


def _voters(choices: list[int], actions: int = 3) -> torch.Tensor:
    """Members that choose so, with utility 1 for the choice and 0 else."""
    return torch.nn.functional.one_hot(torch.tensor(choices), actions).float()


def test_vote_goes_to_the_most_members():
    action, share = majority_vote(_voters([2, 0, 2, 1, 2]))
    assert int(action) == 2
    assert float(share) == pytest.approx(0.6)


def test_tied_votes_go_to_the_larger_mean():
    votes = _voters([0, 1, 1, 2, 2])
    for winner in (1, 2):
        utilities = votes.clone()
        utilities[1:3, 1] += winner == 1
        utilities[3:, 2] += winner == 2
        assert int(majority_vote(utilities)[0]) == winner
    # however large its mean, an action with fewer votes does not win
    utilities = votes.clone()
    utilities[0, 0] = 1000.0
    assert int(majority_vote(utilities)[0]) in (1, 2)


def test_votes_and_means_tied_go_to_the_lower_index():
    assert int(majority_vote(_voters([2, 2, 1, 1, 0]))[0]) == 1
    assert int(majority_vote(torch.zeros(4, 3))[0]) == 0


def test_masked_action_never_wins_a_vote_that_all_members_would_give_it():
    utilities = _voters([0, 0, 0, 0, 0]) + torch.tensor([0.0, 0.1, 0.2])
    action, share = majority_vote(utilities, torch.tensor([False, True, True]))
    assert int(action) == 2
    assert float(share) == 1.0


def test_member_utilities_reads_the_rows_member():
    utilities = torch.randn(4, 6, 2, 3)
    member = torch.tensor([0, 3, 1, 1, 2, 0])
    for row, chosen in enumerate(member.tolist()):
        assert torch.equal(member_utilities(utilities, member)[row], utilities[chosen, row])


KINDS = ("epsilon_greedy", "ucb", "thompson_member", "boltzmann")
EXPLORERS = [Explorer(kind=kind, epsilon_start=epsilon) for kind in KINDS for epsilon in (0.0, 0.5, 1.0)]
EVALUATORS = ("majority_vote", "greedy_mean", "greedy_member")
SPEC = make_spec(agents=3, actions=5, features=2, restricts_actions=True)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.lists(st.booleans(), min_size=4 * 3 * 5, max_size=4 * 3 * 5),
    seed=st.integers(0, 1000),
    explorer=st.sampled_from(EXPLORERS),
    evaluator=st.sampled_from(EVALUATORS),
    recurrent=st.booleans(),
    prior=st.sampled_from([0.0, 2.0]),
)
def test_no_explorer_or_evaluator_takes_an_unavailable_action(bits, seed, explorer, evaluator, recurrent, prior):
    legal = torch.tensor(bits).view(4, 3, 5)
    legal[0, 0] = False
    learner = make_learner(
        SPEC,
        seed,
        ensemble=Ensemble(3, prior_scale=prior),
        explorer=explorer,
        evaluator=evaluator,
        network=AgentNetwork(hidden=4, recurrent=recurrent),
    )
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(4, 3, 2, generator=generator)
    dead = ~legal.any(-1)
    for frames in (0, None):
        carry = learner.begin(observation, observation.flatten(1), generator, frames)
        for _ in range(2):
            action, carry = learner.act(observation, legal, carry, generator, frames)
            assert action.dtype == torch.int64
            assert action.shape == (4, 3)
            assert bool((legal.gather(-1, action.unsqueeze(-1)).squeeze(-1) | dead).all())
            assert bool((action[dead] == 0).all())


def test_epsilon_falls_linearly_and_stays():
    explorer = Explorer(epsilon_start=0.9, epsilon_finish=0.1, epsilon_frames=100)
    assert [explorer.epsilon(frames) for frames in (0, 50, 100, 10_000)] == pytest.approx([0.9, 0.5, 0.1, 0.1])


def test_no_bonus_acts_like_the_greedy_mean_and_evaluation_draws_nothing():
    """beta = 0: argmax of the mean; and with frames = None no random number is spent."""
    spec = make_spec()
    still = {"epsilon_start": 0.0, "epsilon_finish": 0.0}
    bold = make_learner(spec, ensemble=Ensemble(5), explorer=Explorer(kind="ucb", beta=0.0, **still))
    observation, generator = torch.randn(64, 3, 5), torch.Generator().manual_seed(0)
    utilities = bold.agents.apply(bold.online.detach(), observation)
    action, _ = bold.act(observation, None, {}, generator, 0)
    assert torch.equal(action, utilities.mean(0).argmax(-1))
    before = generator.get_state()
    bold.act(observation, None, {}, generator, None)
    assert torch.equal(generator.get_state(), before)


def test_ucb_follows_its_formula():
    spec = make_spec()
    explorer = Explorer(kind="ucb", beta=2.5, epsilon_start=0.0, epsilon_finish=0.0)
    learner = make_learner(spec, ensemble=Ensemble(5), explorer=explorer)
    observation = torch.randn(256, 3, 5, generator=torch.Generator().manual_seed(3))
    utilities = learner.agents.apply(learner.online.detach(), observation)
    bonus = utilities.mean(0) + 2.5 * utilities.std(0, correction=0)
    action, _ = learner.act(observation, None, {}, torch.Generator(), 0)
    assert torch.equal(action, bonus.argmax(-1))
    assert not torch.equal(action, utilities.mean(0).argmax(-1))


def test_thompson_follows_the_member_of_the_episode():
    spec = make_spec()
    explorer = Explorer(kind="thompson_member", epsilon_start=0.0, epsilon_finish=0.0)
    learner = make_learner(spec, ensemble=Ensemble(4), explorer=explorer)
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(4000, 3, 5, generator=generator)
    carry = learner.begin(observation, observation.flatten(1), generator, 0)
    assert _p_value(carry["member"], [0.25] * 4) > 1e-3
    action, after = learner.act(observation, None, carry, generator, 0)
    assert torch.equal(after["member"], carry["member"])
    greedy = learner.agents.apply(learner.online.detach(), observation).argmax(-1)
    assert torch.equal(action, greedy[carry["member"], torch.arange(4000)])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_evaluators_by_hand(evaluator):
    learner = make_learner(make_spec(), ensemble=Ensemble(5), evaluator=evaluator)
    observation = torch.randn(128, 3, 5, generator=torch.Generator().manual_seed(4))
    utilities = learner.agents.apply(learner.online.detach(), observation)
    votes = utilities.argmax(-1)
    action, _ = learner.act(observation, None, {}, torch.Generator(), None)
    if evaluator == "greedy_member":
        assert torch.equal(action, votes[0])
    elif evaluator == "greedy_mean":
        assert torch.equal(action, utilities.mean(0).argmax(-1))
    else:
        for row, agent in product(range(128), range(3)):
            counts = torch.bincount(votes[:, row, agent], minlength=4)
            tied = (counts == counts.max()).nonzero().squeeze(1)
            assert int(action[row, agent]) == int(tied[utilities.mean(0)[row, agent, tied].argmax()])


def test_frozen_prior_is_part_of_what_acts():
    ensemble = Ensemble(3, prior_scale=5.0)
    still = Explorer(kind="ucb", epsilon_start=0.0, epsilon_finish=0.0)
    learner = make_learner(make_spec(), ensemble=ensemble, explorer=still)
    assert "prior" not in dict(learner.named_parameters())
    observation = torch.randn(32, 3, 5)
    whole = learner.utilities(learner.online.detach(), observation.unsqueeze(1)).squeeze(2)
    online = learner.agents.apply(learner.online.detach(), observation)
    prior = learner.agents.apply(learner.get_buffer("prior"), observation)
    torch.testing.assert_close(whole, online + 5.0 * prior)
    action, _ = learner.act(observation, None, {}, torch.Generator(), None)
    assert torch.equal(action, whole.mean(0).argmax(-1))


def test_learner_offers_what_data_ask_for():
    learner = make_learner(make_spec(), ensemble=Ensemble(5, separate_batches=True, bootstrap_p=0.5))
    assert isinstance(learner, LearnsFromReplay)
    assert isinstance(learner, ActsMultiAgent)
    assert isinstance(learner, ActingModule)
    assert (learner.minibatches, learner.members, learner.sequences, learner.bootstrap_p) == (5, 5, False, 0.5)
    assert make_learner(make_spec(), ensemble=Ensemble(5, separate_batches=False)).minibatches == 1


def test_members_differ_from_the_start():
    learner = make_learner(make_spec(), ensemble=Ensemble(5, prior_scale=1.0))
    for weights in (learner.online, learner.get_buffer("prior")):
        assert len({tuple(row) for row in weights.detach().tolist()}) == 5
    assert not torch.equal(learner.online, learner.get_buffer("prior"))
