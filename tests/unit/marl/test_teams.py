"""Actors around a team: who is missing, what it sees, what it may do, with whom it plays; and warm starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emax_batches import make_learner, make_spec
from team_runs import Scripted, always, spec_of

from datamodules.envs.tasks import make_env
from modules.contracts import MultiAgentSpec, TeamChange
from modules.emax import Ensemble, Mixing
from modules.marl.teams import ChangedTeam, MaskedTeam, MixedTeam

ROWS, AGENTS = 400, 3
SPEC = make_spec(AGENTS, 4, 2, idle_action=0)


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Remembers:
    """Takes action 3 for ever and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def begin(self, observation, state, generator, frames):
        return {"steps": torch.zeros(len(observation))}

    def act(self, observation, legal, carry, generator, frames):
        self.seen.append(observation)
        return torch.full(observation.shape[:2], 3), {"steps": carry["steps"] + 1}


def _play(team: Any, steps: int = 4, seed: int = 0, legal: torch.Tensor | None = None) -> torch.Tensor:
    """Actions ``[rows, steps, agents]`` over observations that count up from 0."""
    draw, seen = _draw(seed), torch.zeros(ROWS, AGENTS, 2)
    carry, actions = team.begin(seen, torch.zeros(ROWS, 1), draw, None), []
    for step in range(steps):
        action, carry = team.act(seen + step, legal, carry, draw, None)
        actions.append(action)
    return torch.stack(actions, 1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_agents_as_told_are_missing_for_the_whole_episode(count):
    idle = _play(ChangedTeam(_Remembers(), TeamChange(count, "idle"), SPEC))
    missing = idle == 0
    assert bool((missing.sum(-1) == count).all())
    assert bool((missing == missing[:, :1]).all())
    assert bool((idle[~missing] == 3).all())
    shares = missing[:, 0].float().mean(0)
    assert float(shares.min()) > count / 3 - 0.1
    random = _play(ChangedTeam(_Remembers(), TeamChange(count, "random"), SPEC))
    assert bool((random[~missing] == 3).all())  # the same agents
    assert torch.bincount(random[missing]).min() > random[missing].numel() / 4 * 0.8


def test_a_seat_is_missing_where_one_is_named():
    found = _play(ChangedTeam(_Remembers(), TeamChange(1, "idle", seat=1), SPEC))
    assert bool((found == torch.tensor([3, 0, 3])).all())


def test_perception_is_disturbed_as_told():
    actor = _Remembers()
    _play(ChangedTeam(actor, TeamChange(stale=1.0), SPEC))
    assert [float(seen.mean()) for seen in actor.seen] == [0.0, 0.0, 1.0, 2.0]
    actor = _Remembers()
    _play(ChangedTeam(actor, TeamChange(stale=0.3), SPEC), steps=2)
    assert float((actor.seen[1] == 0).float().mean()) == pytest.approx(0.3, abs=0.05)
    actor = _Remembers()
    _play(ChangedTeam(actor, TeamChange(noise=0.5), SPEC, torch.tensor([1.0, 4.0])), steps=1)
    assert actor.seen[0].flatten(0, 1).std(0).tolist() == pytest.approx([0.5, 2.0], rel=0.1)
    actor = _Remembers()
    _play(ChangedTeam(actor, TeamChange(), SPEC))
    assert all(bool((seen == step).all()) for step, seen in enumerate(actor.seen))


@pytest.mark.parametrize(
    "changes", [{"missing": -1}, {"stale": 1.5}, {"noise": -1.0}, {"seat": 0}, {"missing": 1, "kind": "asleep"}]
)
def test_changes_out_of_range(changes):
    with pytest.raises(ValueError, match="TeamChange: "):
        TeamChange(**changes)


def test_more_missing_than_there_are():
    with pytest.raises(ValueError, match="the team has 3 agents, got 4"):
        ChangedTeam(_Remembers(), TeamChange(4), SPEC)


def test_a_person_prescribes_actions_by_the_mask():
    seen: list[torch.Tensor] = []

    def rule(observation, legal):
        seen.append(legal)
        return legal.float().argmax(-1)

    team = Scripted(rule)
    team.build(SPEC, _draw())
    legal = torch.ones(ROWS, AGENTS, 4, dtype=torch.bool)
    legal[:, 1, 0] = False
    masked = MaskedTeam(team, SPEC, 1, 0.25)
    actions = _play(masked, steps=5, legal=legal)
    told = torch.stack(masked.overrides, 1)
    assert bool((told[:, 0] >= 0).all())
    assert float((told[:, 1:] >= 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    assert set(told.flatten().tolist()) == {-1, 1, 2, 3}
    assert torch.equal(actions[..., 1][told >= 0], told[told >= 0])
    for step, mask in enumerate(seen):
        assert bool((mask[:, [0, 2]]).all())
        assert torch.equal(mask[:, 1].sum(-1) == 1, told[:, step] >= 0)


def test_random_masks_leave_something_of_what_there_was():
    masked = MaskedTeam(_Remembers(), SPEC, None, 0.5)  # type: ignore[arg-type]
    legal = torch.rand(ROWS, AGENTS, 4, generator=_draw()) < 0.5
    _play(masked, legal=legal)
    masks = torch.stack(masked.masks, 1)
    assert not bool((masks & ~legal.unsqueeze(1)).any())
    assert torch.equal(masks.any(-1), legal.any(-1).unsqueeze(1).expand(-1, 4, -1))
    assert bool((masks != legal.unsqueeze(1)).any())


@pytest.mark.parametrize("host", [None, 0])
def test_strangers_sit_in_one_seat_or_all_others(host):
    policies: list[Any] = []
    for action in range(3):
        policy = Scripted(always(*[action] * AGENTS))
        policy.build(SPEC, _draw())
        policies.append(policy)
    cross = _play(MixedTeam(policies, True, host))
    alone = _play(MixedTeam(policies, False, host))
    assert bool((alone == alone[:, :1, :1]).all())
    assert set(alone.flatten().tolist()) == ({0, 1, 2} if host is None else {0})
    assert bool((cross == cross[:, :1]).all())
    own = cross[:, 0] == alone[:, 0, :1]
    assert bool((own.sum(-1) == 1).all())  # the drawn policy sits in one seat, another in the rest
    others = cross[:, 0][~own].view(ROWS, 2)
    assert bool((others[:, 0] == others[:, 1]).all())
    assert set(own.float().argmax(-1).tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        MixedTeam(policies[:1], True)


def test_a_warm_start_takes_over_networks_and_refuses_another_task():
    settings = {"ensemble": Ensemble(2), "mixing": Mixing("qmix")}
    old, new = (make_learner(make_spec(), seed, **settings) for seed in (1, 2))
    spec = vars(make_spec())
    assert not torch.equal(old.online, new.online)
    new.warm_start({"state_dict": old.state_dict(), "multi_agent_spec": spec})
    for name, value in old.state_dict().items():
        assert torch.equal(value, new.state_dict()[name]), name
    before = {key: value for key, value in spec.items() if key != "idle_action"}  # as older checkpoints have it
    new.warm_start({"state_dict": old.state_dict(), "multi_agent_spec": before})
    other = vars(MultiAgentSpec("other", 4, 4, 5, 20, 6))
    with pytest.raises(ValueError, match="is of task other with num_agents 4, test has 3"):
        new.warm_start({"state_dict": old.state_dict(), "multi_agent_spec": other})
    with pytest.raises(RuntimeError, match="size mismatch"):
        new.warm_start({"state_dict": make_learner(make_spec()).state_dict()})


@pytest.mark.parametrize(
    ("task", "idle"), [("lbf/5x5-2p-1f", 0), ("rware/tiny-2ag", 0), ("bpush/4x4-2ag", 0), ("mpe/tag", 0)]
)
def test_the_idle_action_does_nothing(task, idle):
    env: Any = make_env(task, 8)
    assert spec_of(env).idle_action == idle
    env.restart()
    before = env.observe()[0]
    env.advance(torch.full((8, env.num_agents), idle))
    if task != "mpe/tag":  # there the prey moves
        assert torch.equal(env.observe()[0], before)


def test_tasks_without_an_idle_action_say_so():
    assert spec_of(make_env("matrix/climbing", 1)).idle_action is None  # type: ignore[arg-type]
    assert spec_of(make_env("bpush/4x4-2ag", 1, options={"noop": False})).idle_action is None  # type: ignore[arg-type]
