"""The tensor warehouse by itself: TorchRL contract, exact snapshots, draws, and the errors it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from datamodules.envs.warehouse import DOWN, FORWARD, NOOP, RIGHT, TOGGLE, UP, Warehouse

LAYOUT = "x.x\n...\n.g."


CHANCES = torch.tensor([0.05, 0.5, 0.1, 0.1, 0.25])


def play(env: Warehouse, steps: int, seed: int = 0) -> torch.Tensor:
    """Random actions, mostly forward; what was observed and earned, in one row of numbers a step."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        actions = torch.multinomial(CHANCES, env.envs * env.num_agents, replacement=True, generator=generator)
        reward, terminated, truncated = env.advance(actions.view(env.envs, -1))
        over = terminated | truncated
        if bool(over.any()):
            env.restart(over.nonzero().squeeze(1))
        seen.append(torch.cat((env.observe()[0].flatten(), reward.flatten(), over.float())))
    return torch.stack(seen)


@pytest.mark.parametrize("options", [{}, {"agents": 3, "reward_type": "two_stage", "max_inactivity": 4}])
def test_specs(options: dict[str, Any]) -> None:
    check_env_specs(Warehouse(4, **options))


def test_snapshot_goes_on_exactly() -> None:
    env = Warehouse(16, layout=LAYOUT, agents=2, request_queue_size=1, episode_limit=20, reward_type="two_stage")
    play(env, 30)
    kept = env.snapshot()
    first = play(env, 60, seed=1)
    other = Warehouse(
        16, layout=LAYOUT, agents=2, request_queue_size=1, episode_limit=20, reward_type="two_stage", seed=9
    )
    other.restore(kept)
    assert torch.equal(play(other, 60, seed=1), first)
    assert first[:, -48:-16].sum() > 0  # deliveries, so that requests were drawn
    with pytest.raises(ValueError, match="snapshot: 'fields.pose' must be"):
        Warehouse(8).restore(kept)


def test_both_ways_of_stepping_are_equal() -> None:
    options: dict[str, Any] = {"layout": LAYOUT, "agents": 2, "request_queue_size": 1, "episode_limit": 37}
    one, two = Warehouse(32, seed=5, **options), Warehouse(32, seed=5, **options)
    td = one.reset()
    two.restart()
    generator = torch.Generator().manual_seed(0)
    earned = 0.0
    for _ in range(120):
        observation, legal, state = two.observe()
        assert torch.equal(td["agents", "observation"], observation)
        assert torch.equal(td["agents", "action_mask"], legal)
        assert torch.equal(td["state"], state)
        actions = torch.multinomial(CHANCES, 64, replacement=True, generator=generator).view(32, 2)
        td["agents", "action"] = actions
        out, td = one.step_and_maybe_reset(td)
        reward, terminated, truncated = two.advance(actions)
        assert torch.equal(out["next", "agents", "reward"].squeeze(-1), reward)
        assert torch.equal(out["next", "terminated"].squeeze(-1), terminated)
        assert torch.equal(out["next", "truncated"].squeeze(-1), truncated)
        assert torch.equal(out["next", "agents", "observation"], two.observe()[0])
        if bool(terminated.any()):
            two.restart(terminated.nonzero().squeeze(1))
        earned += float(reward.sum())
    assert earned > 0


def test_observing_rows_equals_observing_all() -> None:
    env = Warehouse(8, agents=4)
    play(env, 20)
    rows = torch.tensor([6, 1])
    for whole, part in zip(env.observe(), env.observe(rows), strict=True):
        assert torch.equal(whole[rows], part)


def test_observations_are_not_written_again() -> None:
    env = Warehouse(8, agents=4)
    seen = env.observe()[0]
    kept = seen.clone()
    play(env, 5)
    assert torch.equal(seen, kept)


def test_seed_decides_play() -> None:
    first = play(Warehouse(8, seed=3, episode_limit=10), 40)
    assert torch.equal(first, play(Warehouse(8, seed=3, episode_limit=10), 40))
    assert not torch.equal(first, play(Warehouse(8, seed=4, episode_limit=10), 40))


@pytest.mark.parametrize("time_limit", ["terminated", "truncated"])
def test_time_limit(time_limit: Any) -> None:
    env = Warehouse(2, episode_limit=3, time_limit=time_limit)
    for step in range(3):
        _, terminated, truncated = env.advance(torch.zeros(2, 2, dtype=torch.int64))
        assert bool(terminated.all()) == (step == 2 and time_limit == "terminated")
        assert bool(truncated.all()) == (step == 2 and time_limit == "truncated")


def test_inactivity_terminates() -> None:
    env = Warehouse(2, max_inactivity=3)
    ends = [bool(env.advance(torch.zeros(2, 2, dtype=torch.int64))[1].all()) for _ in range(3)]
    assert ends == [False, False, True]
    env.restart()
    assert not bool(env.advance(torch.zeros(2, 2, dtype=torch.int64))[1].any())


def test_draws_are_uniform() -> None:
    """Counts of cells, directions and requests within five standard deviations of what uniform draws give."""
    envs = 8000
    state = Warehouse(envs, agents=3, seed=1).read_state()

    def close(count: torch.Tensor, draws: int, chance: float) -> bool:
        deviation = (draws * chance * (1 - chance)) ** 0.5
        return bool(((count - draws * chance).abs() < 5 * deviation).all())

    x, y, direction, load = state["agents"].unbind(2)
    cells = y * 10 + x
    for agent in range(3):
        assert close(cells[:, agent].bincount(minlength=110), envs, 1 / 110)
        assert close(direction[:, agent].bincount(minlength=4), envs, 1 / 4)
    assert not bool(((cells.sort(1).values.diff(dim=1)) == 0).any())
    assert not bool(load.any())
    assert bool((state["requested"].sum(1) == 3).all())
    shelves = state["requested"].shape[1]
    assert close(state["requested"].sum(0), envs, 3 / shelves)


def test_replaced_requests_are_uniform_and_never_requested_already() -> None:
    envs = 6000
    env = Warehouse(envs, agents=2, seed=2)
    state = env.read_state()
    state["agents"][:, 0] = torch.tensor([4, 9, DOWN, 1])
    state["agents"][:, 1] = torch.tensor([9, 0, UP, 0])
    state["shelves"][:, 0] = torch.tensor([4, 9])
    state["requested"].zero_()
    state["requested"][:, [0, 4]] = True
    env.write_state(state)
    reward, _, _ = env.advance(torch.tensor([[FORWARD, NOOP]]).expand(envs, 2))
    assert torch.equal(reward, torch.tensor([[1.0, 0.0]]).expand(envs, 2))
    requested = env.read_state()["requested"]
    assert bool((requested.sum(1) == 2).all())
    count = requested.sum(0)
    assert count[0] == 0
    assert count[4] == envs
    others = count[[n for n in range(env.shelves) if n not in (0, 4)]].float()
    chance = 1 / len(others)
    assert bool(((others - envs * chance).abs() < 5 * (envs * chance) ** 0.5).all())


@pytest.mark.parametrize(
    ("reward_type", "at_goal", "at_home"),
    [("individual", [1.0, 0.0], 0.0), ("global", [1.0, 1.0], 0.0), ("two_stage", [0.5, 0.0], 0.5)],
)
def test_rewards_of_one_delivery(reward_type: Any, at_goal: list[float], at_home: float) -> None:
    env = Warehouse(1, layout="x.x\n.g.", agents=2, request_queue_size=1, reward_type=reward_type)
    state = env.read_state()
    state["agents"][0] = torch.tensor([[0, 0, DOWN, 0], [2, 1, UP, 0]])
    state["requested"][0] = torch.tensor([True, False])
    env.write_state(state)
    left, right = 2, 3
    earned = [
        env.advance(torch.tensor([[action, NOOP]]))[0]
        for action in (TOGGLE, FORWARD, left, FORWARD, right, right, FORWARD, right, FORWARD, TOGGLE)
    ]
    total = torch.stack(earned)[:, 0]
    assert total[3].tolist() == at_goal
    assert total[9].tolist() == [at_home, 0.0]
    assert float(total.sum()) == sum(at_goal) + at_home
    assert env.read_state()["agents"][0, 0].tolist() == [0, 0, UP, 0]


def test_observation_by_hand() -> None:
    env = Warehouse(1, layout="x.x\n.g.", agents=2, request_queue_size=1)
    state = env.read_state()
    state["agents"][0] = torch.tensor([[0, 0, RIGHT, 1], [1, 1, UP, 0]])
    state["requested"][0] = torch.tensor([False, True])
    env.write_state(state)
    first = env.observe()[0][0, 0]
    assert first[:8].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]  # x, y, carries, direction, highway
    nothing = [0, 1, 0, 0, 0, 0, 0]
    window = first[8:].view(9, 7).tolist()
    assert window[:4] == [nothing] * 4
    assert window[4] == [1, 0, 0, 0, 1, 1, 0]
    assert window[5:8] == [nothing] * 3
    assert window[8] == [1, 1, 0, 0, 0, 0, 0]
    second = env.observe()[0][0, 1]
    assert second[8:].view(9, 7)[2].tolist() == [0, 1, 0, 0, 0, 1, 1]


def test_state_is_read_as_written() -> None:
    env, other = Warehouse(16, agents=4, seed=0), Warehouse(16, agents=4, seed=1)
    play(env, 50)
    other.write_state(env.read_state())
    for name, value in env.fields.items():
        assert torch.equal(other.fields[name], value), name
    assert torch.equal(other.elapsed, env.elapsed)


def _off_grid(state: dict[str, torch.Tensor]) -> None:
    state["agents"][0, 0, 0] = 10


def _crowded(state: dict[str, torch.Tensor]) -> None:
    state["agents"][0, 1, :2] = state["agents"][0, 0, :2]


def _stray_load(state: dict[str, torch.Tensor]) -> None:
    state["agents"][0, 0] = torch.tensor([0, 0, UP, 1])


def _two_shelves(state: dict[str, torch.Tensor]) -> None:
    state["shelves"][0, 1] = state["shelves"][0, 0]


def _no_requests(state: dict[str, torch.Tensor]) -> None:
    state["requested"].zero_()


def _part(state: dict[str, torch.Tensor]) -> None:
    del state["elapsed"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_off_grid, r"x of agents must be in \[0, 10\)"),
        (_crowded, "two robots in one cell"),
        (_stray_load, "a carried shelf must be where its robot is"),
        (_two_shelves, "two shelves in one cell"),
        (_no_requests, "'requested' must mark 2 shelves"),
        (_part, "'elapsed' must be .* got nothing"),
    ],
)
def test_impossible_states_are_refused(spoil: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    env = Warehouse(3, seed=4)
    state = env.read_state()
    spoil(state)
    with pytest.raises(ValueError, match=f"Warehouse: state: {message}"):
        env.write_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shelf_columns": 2}, "shelf_columns must be odd"),
        ({"column_height": 0}, "column_height and shelf_rows"),
        ({"agents": 0}, r"agents must be in \[1, 110\]"),
        ({"agents": 111}, r"agents must be in \[1, 110\], one a cell"),
        ({"request_queue_size": 0}, "request_queue_size must be in"),
        ({"layout": "xg", "agents": 1}, "request_queue_size must be in"),
        ({"sensor_range": 0}, "sensor_range must be >= 1"),
        ({"max_inactivity": 0}, "max_inactivity must be >= 1"),
        ({"reward_type": "shared"}, "reward_type: individual, global or two_stage"),
        ({"layout": "x.x\n..."}, "needs a goal"),
        ({"layout": "x.x\n.g"}, "lines of equal length"),
        ({"layout": "x.y\n.g."}, "made of 'x', '.' and 'g'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Warehouse: .*{message}"):
        Warehouse(1, **options)


def test_bad_actions_are_refused() -> None:
    env = Warehouse(2)
    td = env.reset()
    with pytest.raises(ValueError, match=r"Warehouse: action must be int64 in \[0, 5\)"):
        env.check_actions(torch.full((2, 2), 5))
    with pytest.raises(ValueError, match=r"Warehouse: action must be \[2, 2\]"):
        env.check_actions(torch.zeros(2, 3, dtype=torch.int64))
    assert td["agents", "observation"].shape == (2, 2, 71)
