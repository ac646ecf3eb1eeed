"""Partner drop-out: who is missing, what they do, what they are worth, and that training sees and uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting_env import Counting
from emax_batches import make_batch, make_learner, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from team_runs import Scripted, always, spec_of
from tensordict import TensorDict

from datamodules.envs.foraging import Foraging
from datamodules.rollout.episodes import EpisodeBuilder, steps_as_items
from datamodules.rollout.stream import CollectorStream, TensorStream
from modules.baselines import MAPPO
from modules.emax import MAVEN, AgentNetwork, Ensemble, Latent, Mixing, Target
from modules.emax.batch import check_batch
from modules.marl import PartnerDropout
from modules.marl.dropout import IDLE, PRESENT, RANDOM, followed_value, with_missing


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- who is missing --
@given(
    probability=st.floats(0.0, 0.99),
    agents=st.integers(2, 5),
    kind=st.sampled_from(["both", "idle", "random"]),
    idle=st.sampled_from([None, 0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_somebody_always_stays_and_kinds_are_kept(probability, agents, kind, idle, seed):
    found = PartnerDropout(probability, kind).draw(64, make_spec(agents, idle_action=idle), _draw(seed))
    assert found.shape == (64, agents)
    assert bool((found == PRESENT).any(-1).all())
    allowed = {PRESENT} | ({IDLE} if kind != "random" and idle is not None else set())
    allowed |= {RANDOM} if kind != "idle" or idle is None else set()
    assert set(found.flatten().tolist()) <= allowed


def test_agents_are_missing_as_often_as_told():
    found = PartnerDropout(0.3).draw(40_000, make_spec(4, idle_action=0), _draw())
    # all four coins below 0.3: the largest stays
    expected = 0.3 - 0.3**4 / 4
    assert float((found != PRESENT).float().mean()) == pytest.approx(expected, abs=0.005)
    assert float((found == IDLE).sum() / (found != PRESENT).sum()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("dropout", "spec", "said"),
    [
        (PartnerDropout(0.2), make_spec(1), "has one agent, and one always stays: set probability 0"),
        (PartnerDropout(0.2, "idle"), make_spec(2), "has no idle action: set kind: random"),
    ],
)
def test_tasks_without_the_kind_are_refused(dropout, spec, said):
    with pytest.raises(ValueError, match=said):
        make_learner(spec, dropout=dropout)


@pytest.mark.parametrize(("given_", "said"), [((1.0,), "must be in"), ((-0.1,), "must be in"), ((0.1, "no"), "kind")])
def test_settings_out_of_range(given_, said):
    with pytest.raises(ValueError, match=f"PartnerDropout: .*{said}"):
        PartnerDropout(*given_)


# -- what they do --
def test_what_missing_agents_do():
    action = torch.full((3000, 3), 2)
    absent = torch.tensor([PRESENT, IDLE, RANDOM]).expand(3000, 3)
    legal = torch.ones(3000, 3, 4, dtype=torch.bool)
    legal[..., 3] = False
    legal[:1000, :, 0] = False  # the idle action
    done = with_missing(action, absent, legal, 0, 4, _draw())
    assert set(done[:, 0].tolist()) == {2}
    assert set(done[1000:, 1].tolist()) == {0}
    assert set(done[:1000, 1].tolist()) == {1, 2}
    assert set(done[:1000, 2].tolist()) == {1, 2}
    assert torch.bincount(done[1000:, 2], minlength=4).tolist()[3] == 0
    assert torch.bincount(done[1000:, 2]).min() > 550
    assert bool((with_missing(action, absent, torch.zeros_like(legal), 0, 4, _draw())[:, 1:] == 0).all())
    free = with_missing(action, absent, None, None, 4, _draw())
    assert set(free[:, 1].tolist()) == {0, 1, 2, 3}


# -- what they are worth --
def test_values_follow_missing_agents_by_hand():
    values = torch.tensor([[4.0, 1.0, 7.0], [4.0, 1.0, 7.0], [4.0, 1.0, 7.0]])
    greedy, absent = values.amax(-1), torch.tensor([PRESENT, IDLE, RANDOM])
    assert followed_value(values, greedy, None, absent, 1).tolist() == [7.0, 1.0, 4.0]
    assert followed_value(values, greedy, None, absent, None).tolist() == [7.0, 4.0, 4.0]
    assert followed_value(values, greedy, None, None, 1) is greedy
    legal = torch.tensor([True, False, True])
    assert followed_value(values, greedy, legal, absent, 0).tolist() == [7.0, 4.0, 5.5]
    assert followed_value(values, greedy, legal, absent, 1).tolist() == [7.0, 5.5, 5.5]
    assert followed_value(values, greedy, torch.zeros(3, dtype=torch.bool), absent, 0).tolist()[1:] == [0.0, 0.0]


def _with_absent(batch: TensorDict, absent: list[int]) -> TensorDict:
    shape = (*batch.batch_size, len(absent))
    batch["carry_absent"] = torch.tensor(absent, dtype=torch.int8).expand(shape).clone()
    return batch


@pytest.mark.parametrize("kind", ["mean_online", "mean_target", "own_online", "own_target"])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_targets_of_a_team_with_missing_agents(kind, recurrent, separate):
    """VDN: reward plus gamma times the sum of what each agent goes on with, agent by agent."""
    spec = make_spec(idle_action=1, restricts_actions=True)
    learner = make_learner(
        spec,
        ensemble=Ensemble(2, separate_batches=separate),
        target=Target(kind=kind, double_q=False),
        network=AgentNetwork(hidden=8, recurrent=recurrent),
        dropout=PartnerDropout(0.5),
        gamma=0.5,
    )
    part = make_batch(spec, 2 if separate else 1, items=6, steps=3 if recurrent else 1)
    plain = make_learner(
        spec,
        ensemble=Ensemble(2, separate_batches=separate),
        target=Target(kind=kind, double_q=False),
        network=AgentNetwork(hidden=8, recurrent=recurrent),
        gamma=0.5,
    )
    everybody = learner.targets(_with_absent(part.clone(), [PRESENT] * 3))
    torch.testing.assert_close(everybody, plain.targets(part), rtol=0, atol=0)
    found = learner.targets(_with_absent(part.clone(), [PRESENT, IDLE, RANDOM]))
    rows = part.batch_size[0]
    seen = part["observation"]
    values = torch.stack([learner.utilities(learner.online.detach(), seen[b]) for b in range(rows)], 1)[:, :, :, 1:]
    legal = part["legal"][:, :, 1:]
    if kind.startswith("mean"):
        values = values.mean(0)
    else:
        values = torch.stack([values[k, k if separate else 0] for k in range(2)])
    legal = legal.expand(*values.shape)
    best = torch.where(legal, values, -torch.inf).amax(-1)
    mean = torch.where(legal, values, 0.0).sum(-1) / legal.sum(-1)
    still = torch.where(legal[..., 1], values[..., 1], mean)
    ahead = best[..., 0] + still[..., 1] + mean[..., 2]
    expected = part["reward"].sum(-1) + 0.5 * torch.where(part["terminated"], 0.0, ahead)
    torch.testing.assert_close(found.squeeze(-1), expected.expand_as(found.squeeze(-1)), rtol=1e-5, atol=1e-5)


def test_independent_learners_bootstrap_greedily():
    spec = make_spec(idle_action=1)
    learner = make_learner(spec, mixing=Mixing("none"), dropout=PartnerDropout(0.5))
    part = make_batch(spec)
    some, none = (learner.targets(_with_absent(part.clone(), absent)) for absent in ([1, 2, 0], [0, 0, 0]))
    assert torch.equal(some, none)


def test_a_batch_must_say_who_was_missing():
    spec = make_spec(idle_action=1)
    batch = make_batch(spec).unsqueeze(0)
    with pytest.raises(ValueError, match=r"'carry_absent' must be \[1, 1, 8, 3\], got nothing"):
        check_batch(batch, spec, 1, False, 1, False, dropout=True)
    batch["carry_absent"] = torch.zeros(1, 1, 8, 3, dtype=torch.int8)
    check_batch(batch, spec, 1, False, 1, False, dropout=True)


# -- training sees it --
def _learner(env: Any, dropout: PartnerDropout, kind: str = "vdn") -> Any:
    spec = spec_of(env)
    if kind == "mappo":
        learner = MAPPO(hidden=8, dropout=dropout)
    elif kind == "maven":
        learner = MAVEN(latent=Latent(3), network=AgentNetwork(hidden=8), dropout=dropout)
    else:
        return make_learner(spec, ensemble=Ensemble(3), network=AgentNetwork(hidden=8), dropout=dropout)
    learner.build(spec, _draw())
    return learner


def _foraging() -> Foraging:
    return Foraging(16, rows=5, columns=5, food=2, episode_limit=6, seed=3)


@pytest.mark.parametrize("kind", ["vdn", "maven", "mappo"])
def test_missing_agents_keep_their_part_for_whole_episodes(kind):
    """Both streams alike; an idle agent takes action 0 in all steps of its episode, and items of replay know it."""
    chunks = {}
    for name in ("tensor", "torchrl"):
        env = _foraging()
        learner = _learner(env, PartnerDropout(0.6), kind)
        carried = learner.carried
        assert carried[0] == "absent"
        stream: Any = TensorStream(env, learner, _draw(1))
        if name == "torchrl":
            stream = CollectorStream(env, learner.policy, _draw(1), 12, carried=carried)
        with torch.no_grad():
            chunks[name] = stream.collect(12, 0)
        stream.close()
    chunk = chunks["tensor"]
    for key in chunk.keys():  # noqa: SIM118 - a TensorDict
        assert torch.equal(chunk[key], chunks["torchrl"][key]), key
    absent, action, first = chunk["carry_absent"], chunk["action"], chunk["first"]
    assert bool((action[absent == IDLE] == 0).all())
    assert len(set(action[absent == RANDOM].tolist())) == 6
    same = (absent[:, 1:] == absent[:, :-1]).all(-1)
    assert bool(same[~first[:, 1:]].all())
    assert not bool(same[first[:, 1:]].all())
    assert set(absent.flatten().tolist()) == {PRESENT, IDLE, RANDOM}
    assert torch.equal(steps_as_items(chunk)["carry_absent"], absent.flatten(0, 1))
    episodes = EpisodeBuilder(16, 6).items(chunk)
    assert episodes is not None
    idle = episodes["carry_absent"].unsqueeze(1).expand_as(episodes["action"]) == IDLE
    assert bool((episodes["action"][idle & episodes["filled"].unsqueeze(-1)] == 0).all())


@pytest.mark.parametrize("kind", ["vdn", "maven", "mappo"])
def test_without_dropout_nothing_changes_and_evaluation_never_drops(kind):
    plain, zero, often = (_learner(_foraging(), PartnerDropout(p), kind) for p in (0.0, 0.0, 0.9))
    env = _foraging()
    env.restart()
    observation, _, state = env.observe()
    for frames in (0, None):
        results = []
        for learner in (plain, zero, often) if frames is None else (plain, zero):
            draw = _draw(4)
            carry = learner.begin(observation, state, draw, frames)
            assert "absent" not in carry
            results.append(learner.act(observation, None, carry, draw, frames)[0])
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_mappo_learns_from_what_present_agents_did_alone():
    env = _foraging()
    learner = _learner(env, PartnerDropout(0.5), "mappo")
    with torch.no_grad():
        rollout = learner.prepare_rollout(TensorStream(env, learner, _draw(1)).collect(12, 0)).flatten(0, 1)
    missing = rollout["present"] == 0
    assert 0 < int(missing.sum()) < missing.numel()
    changed = rollout.clone()
    changed["action"] = torch.where(missing, (changed["action"] + 1) % 6, changed["action"])
    changed["advantage"] = torch.where(missing, 100.0, changed["advantage"])
    for name in ("policy_loss", "entropy", "loss"):
        assert torch.equal(learner._loss(rollout)[name], learner._loss(changed)[name]), name
    changed["action"] = (rollout["action"] + 1) % 6
    assert not torch.equal(learner._loss(rollout)["policy_loss"], learner._loss(changed)["policy_loss"])


def test_a_scripted_team_carries_nothing():
    team = Scripted(always(0, 0))
    team.build(spec_of(Counting(1)), _draw())
    assert team.carried == ()
