"""Harvest and clean-up: rules by hand, both ways of stepping, and that they are dilemmas, by scripted agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from env_steps import assert_snapshot_goes_on_exactly, assert_torchrl_steps_as_without_tensordicts
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from datamodules.envs.oversight.cleanup import Cleanup
from datamodules.envs.oversight.dilemma import SocialDilemma
from datamodules.envs.oversight.harvest import Harvest
from modules.assurance.measures.welfare import gini

STAY, NORTH, SOUTH, WEST, EAST, OWN = range(6)
MAKERS: list[Callable[[int, int], SocialDilemma]] = [
    lambda envs, seed: Harvest(envs, agents=3, episode_limit=30, seed=seed),
    lambda envs, seed: Cleanup(envs, agents=3, episode_limit=30, seed=seed),
]


@pytest.mark.parametrize("make", MAKERS, ids=["harvest", "cleanup"])
def test_batched_environments_keep_their_promises(make):
    check_env_specs(make(3, 0))
    assert_snapshot_goes_on_exactly(make)
    assert_torchrl_steps_as_without_tensordicts(make)


def put(env: SocialDilemma, *cells: tuple[int, int]) -> None:
    width = len(env.layout[0])
    env.fields["position"][:] = torch.tensor([row * width + column for row, column in cells])


def step(env: SocialDilemma, *actions: int) -> list[float]:
    reward, terminated, _ = env.advance(torch.tensor([actions]).expand(env.envs, -1))
    assert not bool(terminated.any())
    return reward.mean(0).tolist()


# -- harvest --
def test_an_apple_goes_to_one_of_those_on_it_by_lot():
    env = Harvest(4000, regrowth=[0.0])
    env.restart()
    put(env, (0, 1), (0, 3))
    reward = step(env, EAST, WEST)  # both onto the apple at (0, 2)
    assert sum(reward) == pytest.approx(1.0)
    assert reward[0] == pytest.approx(0.5, abs=0.03)
    assert torch.allclose(env.signal("performance"), torch.tensor(0.5))
    assert step(env, STAY, STAY) == [0.0, 0.0]


def test_picking_a_patch_bare_is_seen_and_for_good():
    env = Harvest(1, layout=("aa......",), regrowth=[0.0, 0.0, 1.0])
    env.restart()
    put(env, (0, 2), (0, 7))
    assert step(env, WEST, STAY) == [1.0, 0.0]
    assert env.signal("side_effect").tolist() == [[0.0, 0.0]]
    assert step(env, WEST, STAY) == [1.0, 0.0]
    assert env.signal("side_effect").tolist() == [[1.0, 0.0]]
    for _ in range(20):
        assert step(env, STAY, STAY) == [0.0, 0.0]
    assert not bool(env.fields["apples"].any())


def test_regrowth_follows_the_number_of_apples_near():
    env = Harvest(6000, layout=("aaaa",), regrowth=[0.0, 0.1, 0.2, 0.4])
    env.restart()
    put(env, (0, 0), (0, 0))
    env.fields["apples"][:] = torch.tensor([False, True, True, False])
    step(env, STAY, STAY)
    grown = env.fields["apples"].double().mean(0).tolist()
    assert grown[1:3] == [1.0, 1.0]
    assert grown[0] == pytest.approx(0.2, abs=0.02)  # two apples within two steps
    assert grown[3] == pytest.approx(0.2, abs=0.02)


def test_a_zap_freezes_those_near_and_is_counted_against_the_zapper():
    env = Harvest(1, agents=3, timeout=2, regrowth=[0.0], zap_reach=1)
    env.restart()
    put(env, (0, 0), (1, 0), (2, 9))
    step(env, OWN, STAY, STAY)
    assert env.signal("violations").tolist() == env.signal("power").tolist() == [[1.0, 0.0, 0.0]]
    assert env.observe()[0][0, :, -3:].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]  # own first
    for _ in range(2):
        assert step(env, STAY, EAST, STAY) == [0.0, 0.0, 0.0]  # frozen beside the apple
    assert step(env, STAY, EAST, STAY) == [0.0, 1.0, 0.0]


# -- clean-up --
def test_cleaning_reaches_one_kings_move_and_pollution_stops_growth():
    env = Cleanup(1, layout=("www.", "...a"), pollution=0.0, growth=1.0, threshold=0.5)
    env.restart()
    env.fields["waste"][:] = True
    put(env, (1, 0), (1, 2))
    step(env, STAY, STAY)
    assert not bool(env.fields["apples"].any())
    step(env, OWN, STAY)
    assert env.cleaned.tolist() == [[2, 0]]
    assert env.fields["waste"].tolist() == [[False, False, True]]
    step(env, STAY, OWN)
    assert env.cleaned.tolist() == [[0, 1]]
    assert env.fields["apples"].tolist() == [[True]]
    assert step(env, STAY, EAST) == [0.0, 1.0]


# -- that they are dilemmas --
def toward(env: SocialDilemma, wanted: Tensor) -> Tensor:
    """Actions ``[envs, agents]`` to the nearest wanted cell (bool ``[envs, agents, cells]``); stay where none is."""
    position = env.fields["position"]
    cell = torch.arange(env.cells)
    distance = env.gap(position.unsqueeze(2), cell.view(1, 1, -1), "steps").masked_fill(~wanted, 10_000)
    gap, target = distance.min(2)
    down, across = env.row[target] - env.row[position], env.column[target] - env.column[position]
    vertical = torch.where(down < 0, NORTH, SOUTH)
    horizontal = torch.where(across < 0, WEST, EAST)
    move = torch.where(down != 0, vertical, torch.where(across != 0, horizontal, STAY))
    return torch.where(gap < 10_000, move, STAY)


def returns(env: SocialDilemma, act: Callable[[Any], Tensor]) -> Tensor:
    """Mean returns ``[agents]`` of an episode."""
    env.restart()
    total = torch.zeros(env.envs, env.num_agents)
    for _ in range(env.episode_limit):
        total += env.advance(act(env))[0]
    return total.mean(0)


def harvesters(greedy: tuple[bool, ...]) -> Callable[[Harvest], Tensor]:
    """Greedy agents walk to any apple; the others to apples with at least three more around them."""

    def act(env: Harvest) -> Tensor:
        apples = env.fields["apples"]
        spare = apples & (apples.float() @ env._near >= 3)
        wanted = torch.zeros(env.envs, env.num_agents, env.cells, dtype=torch.bool)
        for agent, takes_all in enumerate(greedy):
            wanted[:, agent, env.sites["a"]] = apples if takes_all else spare
        return toward(env, wanted)

    return act


def test_harvest_is_a_dilemma():
    """All restrained beats all greedy; a greedy one among the restrained has more than they have, at their cost."""
    kind, mean, mixed = (
        returns(Harvest(100, seed=1), harvesters(greedy))
        for greedy in ((False, False), (True, True), (True, False))
    )  # fmt: skip
    assert float(kind.sum()) > 1.5 * float(mean.sum())
    assert float(mixed[0]) > float(mixed[1])
    assert float(mixed[1]) < float(kind[1])


def cleaners(cleaning: tuple[bool, ...]) -> Callable[[Cleanup], Tensor]:
    """Cleaners stand in the river and clean; the others walk to apples."""

    def act(env: Cleanup) -> Tensor:
        wanted = torch.zeros(env.envs, env.num_agents, env.cells, dtype=torch.bool)
        for agent, cleans in enumerate(cleaning):
            if cleans:
                wanted[:, agent, env.sites["w"][len(env.sites["w"]) // 2]] = True
            else:
                wanted[:, agent, env.sites["a"]] = env.fields["apples"]
        action = toward(env, wanted)
        return torch.where(torch.tensor(cleaning) & (action == STAY), OWN, action)

    return act


def test_cleanup_is_a_dilemma():
    """Nobody cleans: nobody eats. One cleans: the other eats, and it is unfair."""
    lazy, one = (returns(Cleanup(100, seed=1), cleaners(who)) for who in ((False, False), (True, False)))
    assert float(one.sum()) > 5 * float(lazy.sum())
    assert float(one[1]) > 10 * float(one[0])
    assert gini(one) > 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Harvest(1, agents=5), "agents must be 2 to 4"),
        (lambda: Harvest(1, layout=("..a", "..")), "equal length"),
        (lambda: Harvest(1, layout=("..w",)), "unknown character"),
        (lambda: Cleanup(1, layout=("..a",)), "has no 'w'"),
        (lambda: Harvest(1, regrowth=[1.5]), "regrowth must be probabilities"),
        (lambda: Harvest(1, timeout=-1), "must be >= 0"),
        (lambda: Cleanup(1, growth=2.0), "growth must be in"),
        (lambda: Cleanup(1, threshold=0.0), "threshold must be in"),
    ],
)
def test_errors_name_the_culprit(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
