"""Adapters of third-party packages: the keys of our own environments, the package's own numbers, exact positions."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from datamodules.envs import adapters, package_copies
from datamodules.envs.adapters import PackageForaging, PackageSmac, PackageTag, PackageWarehouse
from datamodules.envs.base import MultiAgentEnv
from datamodules.envs.package_pool import Seen
from datamodules.envs.tasks import make_env

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
for _package in ("lbforaging", "rware", "mpe2"):
    pytest.importorskip(_package, reason="extra marl")

TASKS = [
    "lbf/8x8-2p-2f-coop",
    "lbf/2s-8x8-3p-2f",
    "rware/tiny-2ag",
    "mpe/spread-3",
    "mpe/tag",
    "mpe/adversary",
]
SHORT = {"episode_limit": 12}


def play(env: MultiAgentEnv, steps: int, draws: torch.Generator) -> list[torch.Tensor]:
    """Everything that comes out of ``steps`` steps with available random actions, finished copies restarted."""
    out = []
    for _ in range(steps):
        legal = env.observe()[1]
        actions = (torch.rand(legal.shape, generator=draws) * legal).argmax(-1)
        reward, terminated, truncated = env.advance(actions)
        out += [reward, terminated, truncated, *env.observe()]
        rows = (terminated | truncated).nonzero().squeeze(1)
        if len(rows):
            env.restart(rows)
    return out


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_specs_equal_the_tensor_environments(task):
    ours, theirs = make_env(task, 3), make_env(task, 3, backend="package")
    for part in ("observation_spec", "action_spec", "reward_spec", "done_spec"):
        assert getattr(ours, part) == getattr(theirs, part), part
    for name in (
        "num_agents", "num_actions", "observation_size", "state_size", "episode_limit", "time_limit", "group_map",
        "common_reward", "restricts_actions", "own_state", "name",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    check_env_specs(theirs, break_when_any_done="both")
    first, second = ours.rollout(4, break_when_any_done=False), theirs.rollout(4, break_when_any_done=False)
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    assert {k: (v.shape, v.dtype) for k, v in first.items(True, True)} == {
        k: (v.shape, v.dtype) for k, v in second.items(True, True)
    }


def test_numbers_are_lbforagings():
    """Against the registered environment stepped by hand from the same seeds, whole episodes with their ends."""
    import gymnasium
    import lbforaging  # noqa: F401  registers the ids

    env = make_env("lbf/8x8-2p-2f", 1, backend="package", seed=4)
    generator = draws()
    for _ in range(4):
        env.restart()
        package = gymnasium.make("Foraging-8x8-2p-2f-v3", disable_env_checker=True).unwrapped
        seen, _ = package.reset(seed=int(env.fields["reset_seed"][0]))
        over = False
        while not over:
            assert np.array_equal(env.observe()[0][0].numpy(), np.stack(seen))
            actions = torch.randint(6, (1, 2), generator=generator)
            reward, terminated, truncated = env.advance(actions)
            seen, paid, over, _, _ = package.step(actions[0].tolist())
            assert reward[0].tolist() == pytest.approx(paid)
            assert (bool(terminated[0]), bool(truncated[0])) == (over, False)


def test_numbers_are_rwares():
    import gymnasium
    import rware  # noqa: F401  registers the ids

    env = make_env("rware/tiny-4ag-easy", 1, backend="package", seed=4)
    env.restart()
    package = gymnasium.make("rware-tiny-4ag-easy-v2", disable_env_checker=True).unwrapped
    seen, _ = package.reset(seed=int(env.fields["reset_seed"][0]))
    generator = draws()
    for step in range(500):
        assert np.array_equal(env.observe()[0][0].numpy(), np.stack(seen))
        actions = torch.randint(5, (1, 4), generator=generator)
        reward, terminated, _ = env.advance(actions)
        seen, paid, over, _, _ = package.step(actions[0].tolist())
        assert reward[0].tolist() == paid
        assert bool(terminated[0]) == over == (step == 499)


@pytest.mark.parametrize("task", ["mpe/tag", "mpe/adversary"])
def test_scripted_movers_act_as_in_the_tensor_environment(task):
    """A whole episode of the package with its own script, shadowed by the tensor environment from the same start."""
    package = make_env(task, 1, backend="package", seed=2)
    ours = make_env(task, 1, options={"dtype": "float64"})
    package.restart()
    world = package._pool.copies[0].env.unwrapped.world
    goal = [mark is world.agents[0].goal_a for mark in world.landmarks].index(True) if "adv" in task else None
    ours.place(
        torch.from_numpy(np.stack([[mover.state.p_pos for mover in world.agents]])),
        torch.zeros(1, ours.movers, 2),
        torch.from_numpy(np.stack([[mark.state.p_pos for mark in world.landmarks]])),
        None if goal is None else torch.tensor([goal]),
    )
    generator = draws()
    for _ in range(25):
        actions = torch.randint(5, (1, package.num_agents), generator=generator)
        paid, earned = package.advance(actions)[0], ours.advance(actions)[0]
        assert torch.allclose(paid, earned, atol=1e-4)
        assert torch.allclose(package.observe()[0], ours.observe()[0], atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_snapshot_is_played_again_exactly(task):
    env = make_env(task, 4, backend="package", seed=3, options=SHORT)
    env.restart()
    generator = draws()
    play(env, 17, generator)
    env.restart(torch.tensor([2]))  # copies at different steps
    play(env, 3, generator)
    kept, at = env.snapshot(), generator.get_state()
    wanted = play(env, 30, generator)
    other = make_env(task, 4, backend="package", seed=77, options=SHORT)
    other.restart()
    play(other, 5, draws(9))
    other.restore(kept)
    generator.set_state(at)
    assert equal(play(other, 30, generator), wanted)


@pytest.mark.parametrize("task", ["lbf/8x8-3p-2f", "mpe/tag"])
def test_workers_change_nothing(task):
    runs = []
    for workers in (0, 2):
        env = make_env(task, 5, backend="package", seed=8, options=SHORT, workers=workers)
        env.restart()
        generator = draws(1)
        first = play(env, 15, generator)
        kept = env.snapshot()
        second = play(env, 9, generator)
        env.restore(kept)
        runs.append((first, second, [*env.observe()]))
        env.close()
    for alone, split in zip(*runs, strict=True):
        assert equal(alone, split)


def test_closing_ends_the_workers():
    env = PackageForaging(4, rows=6, columns=6, agents=2, food=1, workers=2)
    processes = list(env._pool.processes)
    assert all(process.is_alive() for process in processes)
    env.close()
    env.close()  # once more does no harm
    assert [process.exitcode for process in processes] == [0, 0]
    with pytest.raises(RuntimeError, match="PackageForaging: its workers are closed"):
        env.restart()


def test_a_failing_worker_is_one_line_and_the_pool_stays_usable():
    env = PackageForaging(4, rows=6, columns=6, agents=2, food=1, workers=2, seed=1)
    env.restart()
    wrong = torch.zeros(4, 2, dtype=torch.int64)
    wrong[3, 0] = 77  # lbforaging's own error; step() would have refused it before
    with pytest.raises(RuntimeError, match=r"^PackageForaging: worker 1: ValueError: 77 is not a valid Action$"):
        env.advance(wrong)
    env.restart()
    env.advance(torch.zeros(4, 2, dtype=torch.int64))
    env.close()


def test_a_dead_worker_is_named():
    env = PackageForaging(4, rows=6, columns=6, agents=2, food=1, workers=2)
    env.restart()
    env._pool.processes[1].kill()
    with pytest.raises(RuntimeError, match=r"^PackageForaging: worker 1: died with exit code -9$"):
        env.advance(torch.zeros(4, 2, dtype=torch.int64))
    env.close()


def test_finished_copies_wait():
    env = make_env("mpe/spread-3", 2, backend="package", options={"episode_limit": 3})
    env.restart()
    actions = torch.zeros(2, 3, dtype=torch.int64)
    for _ in range(3):
        reward, _, truncated = env.advance(actions)
    assert bool(truncated.all())
    assert bool((reward != 0).all())
    before = env.observe()[0]
    env.restart(torch.tensor([0]))
    kept = env.snapshot()
    reward, _, truncated = env.advance(actions)
    assert truncated.tolist() == [False, True]
    assert (reward[0] != 0).all()
    assert (reward[1] == 0).all()
    assert torch.equal(env.observe()[0][1], before[1])
    env.restore(kept)
    assert torch.equal(env.observe()[0][1], before[1])


def test_an_early_end_is_no_time_limit():
    """A board emptied before the limit terminates, whatever the limit would be called."""
    env = PackageForaging(
        64, rows=5, columns=5, agents=2, food=1, max_food_level=1, seed=0, time_limit="truncated", episode_limit=50
    )
    env.restart()
    generator = draws()
    early = late = 0
    for step in range(50):
        reward, terminated, truncated = env.advance(torch.randint(6, (64, 2), generator=generator))
        assert not bool((terminated & truncated).any())
        assert bool((terminated[reward.sum(1) > 0.99]).all())
        early = int(terminated.sum())
        late = int(truncated.sum())
        assert step == 49 or late == 0
    assert early > 10
    assert early + late == 64


def test_a_forged_snapshot_is_refused():
    env = make_env("lbf/8x8-2p-2f", 2, backend="package", seed=1)
    env.restart()
    env.advance(torch.ones(2, 2, dtype=torch.int64))
    kept = env.snapshot()
    kept["fields.reset_seed"][1] += 1
    with pytest.raises(ValueError, match="PackageForaging: snapshot: played again"):
        env.restore(kept)
    other = make_env("lbf/8x8-2p-2f", 3, backend="package", seed=1)
    with pytest.raises(ValueError, match="another task or number of environments"):
        other.restore(env.snapshot())


def test_snapshots_load_as_weights_only(tmp_path):
    env = make_env("rware/tiny-2ag", 2, backend="package", options=SHORT)
    env.restart()
    play(env, 5, draws())
    torch.save(env.snapshot(), tmp_path / "position.pt")
    wanted = play(env, 10, draws(1))
    env.restore(torch.load(tmp_path / "position.pt", weights_only=True))
    assert equal(play(env, 10, draws(1)), wanted)


def test_an_episode_does_not_depend_on_the_one_before():
    """lbforaging itself remembers where players stood; the adapter makes it forget."""
    env = PackageForaging(1, rows=5, columns=5, agents=4, food=1, seed=6)
    copy = env._pool.copies[0]
    fresh = {seed: np.stack(PackageForaging(1, rows=5, columns=5, agents=4, food=1)._pool.copies[0].reset(seed)[0])
             for seed in range(40)}  # fmt: skip
    for seed, wanted in fresh.items():
        assert np.array_equal(np.stack(copy.reset(seed).observation), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackageTag(2, workers=3), "PackageTag: workers must be <= envs, got 3 for 2"),
        (lambda: PackageTag(2, workers=-1), "PackageTag: workers must be >= 0, got -1"),
        (lambda: PackageTag(0), "PackageTag: envs must be >= 1, got 0"),
        (
            lambda: PackageWarehouse(
                1, shelf_columns=3, column_height=8, shelf_rows=1, agents=2, request_queue_size=2, reward_type="all"
            ),
            "PackageWarehouse: reward_type: individual, global or two_stage, got 'all'",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lbforaging.foraging", None)
    monkeypatch.setitem(sys.modules, "lbforaging", None)
    with pytest.raises(ImportError, match=r"^package 'lbforaging.*' is needed here but not installed: pip install"):
        make_env("lbf/8x8-2p-2f", 1, backend="package")
    with pytest.raises(ImportError, match="^package 'smac' is needed here but not installed: see its README"):
        make_env("smac/3m", 1, backend="package")


# -- VMAS --------------------------------------------------------------------------------------------------------------
VMAS = ["simple_spread", "balance", "dispersion", "simple_world_comm", "wheel"]


@pytest.mark.parametrize("scenario", VMAS)
def test_vmas_goes_on_exactly(scenario):
    pytest.importorskip("vmas", reason="extra marl")
    env = make_env(f"vmas/{scenario}", 4, backend="package", seed=1, options=SHORT)
    assert env.exact_resume
    env.restart()
    generator = draws()
    play(env, 5, generator)
    env.restart(torch.tensor([1, 2]))
    play(env, 4, generator)
    kept, at = env.snapshot(), generator.get_state()
    wanted = play(env, 25, generator)
    other = make_env(f"vmas/{scenario}", 4, backend="package", seed=5, options=SHORT)
    other.restore(kept)
    generator.set_state(at)
    assert equal(play(other, 25, generator), wanted)


def test_vmas_has_our_keys_and_its_own_numbers():
    vmas = pytest.importorskip("vmas", reason="extra marl")
    env = make_env("vmas/simple_spread", 3, backend="package", seed=1)
    check_env_specs(env, break_when_any_done="both")
    ours, theirs = make_env("mpe/spread-3", 3).rollout(3), env.rollout(3)
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    env.restart()
    package = vmas.make_env("simple_spread", 3, continuous_actions=False)
    package.reset(seed=0)
    for mine, its in zip(env.world.world.entities, package.world.entities, strict=True):
        its.set_pos(mine.state.pos.clone(), batch_index=None)
    generator = draws()
    for _ in range(10):
        actions = torch.randint(env.num_actions, (3, 3), generator=generator)
        reward, terminated, _ = env.advance(actions)
        seen, paid, done, _ = package.step([part.unsqueeze(1) for part in actions.unbind(1)])
        assert torch.equal(env.observe()[0], torch.stack(seen, 1))
        assert torch.equal(reward, torch.stack(paid, 1))
        assert torch.equal(terminated, done)


def test_vmas_pads_agents_with_fewer_actions():
    pytest.importorskip("vmas", reason="extra marl")
    env = make_env("vmas/simple_speaker_listener", 2, backend="package")
    env.restart()
    _, legal, _ = env.observe()
    counts = [int(env.world.get_agent_action_space(agent).n) for agent in env.world.agents]
    assert env.restricts_actions
    assert legal.sum(-1).tolist() == [counts, counts]
    assert not env.exact_resume  # its agents point at landmarks, which a snapshot does not hold
    play(env, 3, draws())
    env.restore(env.snapshot())
    assert env.elapsed.tolist() == [0, 0]


def test_vmas_leaves_the_global_generators_alone():
    pytest.importorskip("vmas", reason="extra marl")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    env = make_env("vmas/simple_spread", 2, backend="package", seed=1)
    env.restart()
    env.advance(torch.zeros(2, 3, dtype=torch.int64))
    assert torch.equal(torch.rand(4), wanted)


def test_vmas_refuses_workers_and_files_it_does_not_list():
    pytest.importorskip("vmas", reason="extra marl")
    from datamodules.envs.vmas_adapter import PackageVmas

    with pytest.raises(ValueError, match="PackageVmas: workers must be 0"):
        make_env("vmas/simple_spread", 2, backend="package", workers=1)
    with pytest.raises(ValueError, match="PackageVmas: scenario: one of .*got '../make_env'"):
        PackageVmas(2, scenario="../make_env")


# -- SMAC, by a stand-in with its documented interface -----------------------------------------------------------------
class StandIn:
    """Two marines who can stop, or shoot if the step is even; the second dies after three steps."""

    def __init__(self, map_name: str, difficulty: str = "7") -> None:
        self.map_name, self.steps = map_name, 0

    def get_env_info(self) -> dict[str, int]:
        return {"n_agents": 2, "n_actions": 3, "obs_shape": 4, "state_shape": 5, "episode_limit": 6}

    def reset(self) -> None:
        self.steps = 0

    def get_obs(self) -> list[np.ndarray]:
        return [np.full(4, self.steps + agent / 2, np.float32) for agent in range(2)]

    def get_state(self) -> np.ndarray:
        return np.full(5, -self.steps, np.float32)

    def get_avail_actions(self) -> list[list[int]]:
        return [[0, 1, int(self.steps % 2 == 0)], [1, 0, 0] if self.steps >= 3 else [0, 1, 1]]

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, bool]]:
        allowed = self.get_avail_actions()
        assert all(row[action] for row, action in zip(allowed, actions, strict=True))
        self.steps += 1
        won = actions == [2, 0]
        return 0.5 * actions[0], won or self.steps >= 6, {} if won else {"episode_limit": self.steps >= 6}


@pytest.fixture
def smac(monkeypatch):
    module = types.ModuleType("smac.env")
    module.StarCraft2Env = StandIn
    monkeypatch.setitem(sys.modules, "smac", types.ModuleType("smac"))
    monkeypatch.setitem(sys.modules, "smac.env", module)


def test_smac_gives_its_masks_state_and_rewards(smac):
    env = make_env("smac/3m", 2, backend="package")
    assert isinstance(env, PackageSmac)
    assert (env.episode_limit, env.state_size, env.common_reward) == (6, 5, True)
    assert env.restricts_actions
    assert env.own_state
    first = env.reset()
    assert env.observation_spec.is_in(first.select(*env.observation_spec.keys()))
    env.restart()
    observation, legal, _ = env.observe()
    assert observation[0].tolist() == [[0.0] * 4, [0.5] * 4]
    assert legal[0].tolist() == [[False, True, True], [False, True, True]]
    reward, terminated, truncated = env.advance(torch.tensor([[2, 1], [1, 1]]))
    assert reward.tolist() == [[1.0, 1.0], [0.5, 0.5]]
    assert not bool((terminated | truncated).any())
    assert env.observe()[2].tolist() == [[-1.0] * 5] * 2
    for _ in range(3):
        env.advance(torch.tensor([[1, env.observe()[1][0, 1].int().argmax()]] * 2))
    assert env.observe()[1][0].tolist() == [[False, True, True], [True, False, False]]
    _, terminated, truncated = env.advance(torch.tensor([[2, 0], [1, 0]]))
    assert terminated.tolist() == [True, False]
    _, terminated, truncated = env.advance(torch.tensor([[1, 0], [1, 0]]))
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, True])


def test_smac_restores_to_new_episodes(smac):
    env = make_env("smac/3m", 2, backend="package")
    assert not env.exact_resume
    env.restart()
    env.advance(torch.ones(2, 2, dtype=torch.int64))
    env.restore(env.snapshot())
    assert env.elapsed.tolist() == [0, 0]
    assert env.observe()[2].tolist() == [[0.0] * 5] * 2


def test_a_copy_shows_what_it_says():
    """The pool's contract, by one copy: shapes as its attributes say."""
    copy = package_copies.ParticleCopy("adversary", {"N": 3})
    seen = copy.reset(1)
    assert isinstance(seen, Seen)
    assert np.shape(seen.observation) == (copy.num_agents, copy.observation_size) == (3, 14)
    assert len(copy.step([0, 1, 2])[0]) == 3
    assert adapters.PackageEnv.exact_resume
