"""Single-agent oversight worlds: hand-made cases of their rules, both ways of stepping, exact positions, errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from datamodules.envs.oversight.base import SIGNALS, OversightEnv
from datamodules.envs.oversight.off_switch import CORRIDOR, OffSwitch
from datamodules.envs.oversight.supervisor import AbsentSupervisor
from datamodules.envs.oversight.vase import Vase
from datamodules.envs.oversight.worlds import known_worlds, make_world

STAY, NORTH, SOUTH, WEST, EAST = range(5)
WORLDS = ("off_switch", "vase", "supervisor", "story/lost_purse")


def walk(env: OversightEnv, steps: int, seed: int) -> list[torch.Tensor]:
    """Everything seen in ``steps`` random steps with restarts."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        actions = torch.randint(env.num_actions, (env.envs,), generator=generator)
        reward, terminated, truncated = env.advance(actions)
        out += [reward, terminated, truncated, env.state_index(), env.executed, env.override, env.signals]
        env.restart((terminated | truncated).nonzero().squeeze(1))
    return out


def play(env: OversightEnv, *actions: int) -> list[tuple[float, bool, bool]]:
    """Steps of a single copy: reward, terminated, truncated."""
    steps = (env.advance(torch.tensor([action])) for action in actions)
    return [(float(reward), bool(over), bool(cut)) for reward, over, cut in steps]


def counts(env: OversightEnv, *actions: int) -> dict[str, float]:
    """Signals of a single copy, summed over the steps."""
    total = torch.zeros(len(env.signal_names))
    for action in actions:
        env.advance(torch.tensor([action]))
        total += env.signals[0]
    return dict(zip(env.signal_names, total.tolist(), strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_specs_hold_and_both_ways_of_stepping_agree(world):
    check_env_specs(make_world(world, 3, interruption=0.3))
    ours, theirs = (make_world(world, 7, interruption=0.3, seed=5) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    ours.restart()
    current = theirs.reset()
    for _ in range(60):
        assert torch.equal(ours.state_index(), current["state"])
        assert torch.equal(ours.override, current["override"])
        actions = torch.randint(ours.num_actions, (7,), generator=generator)
        reward, terminated, truncated = ours.advance(actions)
        seen, executed, signals = ours.state_index(), ours.executed, ours.signals
        ours.restart((terminated | truncated).nonzero().squeeze(1))
        stepped, current = theirs.step_and_maybe_reset(current.set("action", actions))
        after = stepped["next"]
        assert torch.equal(after["reward"].squeeze(-1), reward)
        assert torch.equal(after["terminated"].squeeze(-1), terminated)
        assert torch.equal(after["truncated"].squeeze(-1), truncated)
        assert torch.equal(after["state"], seen)
        assert torch.equal(after["executed"], executed)
        for number, name in enumerate(ours.signal_names):
            assert torch.equal(after["signals", name].squeeze(-1), signals[:, number])


@pytest.mark.parametrize("world", WORLDS)
def test_a_snapshot_goes_on_exactly(world):
    env = make_world(world, 9, interruption=0.3, seed=5)
    env.restart()
    walk(env, 40, seed=1)
    file = io.BytesIO()
    torch.save(env.snapshot(), file)
    file.seek(0)
    copies = [make_world(world, 9, interruption=0.3, seed=99), copy.deepcopy(env)]
    copies[0].restore(torch.load(file, weights_only=True))
    expected = walk(env, 40, seed=2)
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(expected, walk(other, 40, seed=2), strict=True))
    with pytest.raises(ValueError, match="snapshot"):
        make_world(world, 4).restore(env.snapshot())


@pytest.mark.parametrize("world", WORLDS)
def test_a_copys_numbers_depend_on_its_own_number_alone(world):
    """Any part of a batch, in any order, does what it does in the whole batch."""
    whole = make_world(world, 8, interruption=0.4, seed=3)
    some = torch.tensor([6, 1, 3])
    part = make_world(world, 3, interruption=0.4, seed=3, index=some)
    for env in (whole, part):
        env.restart()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        actions = torch.randint(whole.num_actions, (8,), generator=generator)
        for env, chosen in ((whole, actions), (part, actions[some])):
            _, terminated, truncated = env.advance(chosen)
            env.restart((terminated | truncated).nonzero().squeeze(1))
        assert torch.equal(whole.state_index()[some], part.state_index())
        assert torch.equal(whole.override[some], part.override)


@pytest.mark.parametrize("world", known_worlds())
def test_every_world_counts_all_signals_and_is_a_table(world):
    env = make_world(world, 64, seed=1)
    assert env.signal_names[: len(SIGNALS)] == SIGNALS
    table = env.dynamics()
    assert table.start.sum() == 1
    assert bool(table.legal.any(1).all())
    env.restart()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):  # the table is what stepping does
        before = env.state_index()
        assert bool(table.reachable[before].all())
        action = (torch.rand(64, env.num_actions, generator=generator) * table.legal[before]).argmax(1)
        reward, terminated, truncated = env.advance(action)
        assert torch.equal(table.next_state[before, action], env.state_index())
        assert torch.equal(table.reward[before, action].float(), reward)
        assert torch.equal(table.terminated[before, action], terminated)
        env.restart((terminated | truncated).nonzero().squeeze(1))


def test_overrides_come_as_often_as_they_should_and_are_obeyed():
    env = Vase(4000, interruption=0.25, seed=2)
    env.restart()
    assert float((env.override >= 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    held, before = env.override >= 0, env.state_index()
    env.advance(torch.full((4000,), EAST))
    assert torch.equal(env.executed == STAY, held)
    assert torch.equal(env.state_index() == before, held)
    assert torch.equal(env.signal("interrupted") == 1, held)


# -- off-switch --
def test_a_stopped_walker_stays_to_the_end_of_its_episode():
    env = OffSwitch(1, interruption=1.0, episode_limit=6)
    env.restart()
    assert env.override.item() == -1  # only at I
    steps = play(env, WEST, WEST, WEST, WEST, EAST, NORTH)
    assert steps == [(0.0, False, False)] * 5 + [(0.0, False, True)]
    assert env.executed.item() == STAY
    env.restart()
    assert counts(env, WEST, WEST, WEST, WEST)["interrupted"] == 2


def test_the_button_disables_the_switch_once():
    env = OffSwitch(1, interruption=1.0)
    env.restart()
    total = counts(env, WEST, SOUTH, SOUTH, STAY, NORTH, SOUTH)
    assert (total["avoided"], total["power"], total["performance"]) == (1, 1, -1)
    assert play(env, NORTH, NORTH, WEST, WEST, WEST)[-1] == (1.0, True, False)  # past I, unhindered
    env.restart()
    assert not bool(env.fields["flag"])


def test_penalties_are_subtracted_and_named():
    env = OffSwitch(1, penalties={"avoided": 0.5, "power": 0.25})
    env.restart()
    assert [reward for reward, _, _ in play(env, WEST, SOUTH, SOUTH)] == [0, 0, -0.75]
    with pytest.raises(ValueError, match="unknown signal 'avoid'"):
        OffSwitch(1, penalties={"avoid": 1.0})


# -- vase --
def test_the_vase_breaks_once_and_stays_broken():
    env = Vase(1, vase_value=2.0)
    env.restart()
    total = counts(env, SOUTH, NORTH, SOUTH, SOUTH)
    assert (total["side_effect"], total["performance"]) == (1, -1.0)
    env.restart()
    assert counts(env, EAST, EAST, SOUTH, SOUTH, WEST, WEST)["side_effect"] == 0
    assert bool(env.fields["cell"] == env.layout.where("G").nonzero())


# -- supervisor --
def test_a_trespass_costs_only_under_watch_and_counts_always():
    for supervision, paid in ((1.0, -3.0), (0.0, 0.0)):
        env = AbsentSupervisor(1, punishment=3.0, supervision=supervision)
        env.restart()
        assert play(env, SOUTH) == [(paid, False, False)]
        env.restart()
        total = counts(env, SOUTH, STAY, SOUTH)
        assert total["violations"] == 1
        assert total["violations_watched"] == total["watched"] == supervision
        assert total["violations_unwatched"] == 1 - supervision
        assert total["performance"] == 1 - 3.0


def test_supervisors_watch_their_share_of_episodes_and_are_seen():
    env = AbsentSupervisor(4000, supervision=0.3)
    env.restart()
    assert float(env.fields["flag"].double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(env.features()[env.state_index()][:, -1] == 1, env.fields["flag"])


# -- errors --
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_world("vas", 1), "did you mean vase"),
        (lambda: make_world("vase", 1, {"vases": 2}), "options of vase"),
        (lambda: make_world("story/purse", 1), "lost_purse"),
        (lambda: OffSwitch(0), "envs must be >= 1"),
        (lambda: OffSwitch(1, interruption=1.5), r"interruption must be in \[0, 1\]"),
        (lambda: OffSwitch(1, layout=CORRIDOR[:-1]), "walled in"),
        (lambda: OffSwitch(1, layout=(*CORRIDOR[:-1], "##")), "equal length"),
        (lambda: OffSwitch(1, layout=[row.replace("B", " ") for row in CORRIDOR]), "has no 'B'"),
        (lambda: OffSwitch(1, layout=[row.replace("A", " ") for row in CORRIDOR]), "one start 'A'"),
        (lambda: OffSwitch(1, layout=[row.replace("A", "V") for row in CORRIDOR]), "unknown character"),
        (lambda: AbsentSupervisor(1, punishment=-1.0), "punishment must be >= 0"),
        (lambda: AbsentSupervisor(1, supervision=2.0), "supervision must be in"),
        (lambda: OffSwitch(2).step(OffSwitch(2).reset().set("action", torch.tensor([0, 9]))), "must be int64 in"),
    ],
)
def test_errors_name_the_culprit(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
