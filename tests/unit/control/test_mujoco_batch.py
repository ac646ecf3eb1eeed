"""MuJoCo in batches, and Gymnasium's other tasks: starts, rows, snapshots, failures, parameters, errors."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("mujoco.batch", reason="needs mujoco >= 3.17")

from torchrl.envs import check_env_specs  # noqa: E402

from datamodules.envs.control.gym_fallback import GymnasiumEnv  # noqa: E402
from datamodules.envs.control.mujoco_batch import TASKS, MuJoCoEnv  # noqa: E402

KINDS = ["Hopper-v5", "InvertedDoublePendulum-v5", "Ant-v5"]  # state alone; derived numbers; persistent copies
SIZES = {
    "Hopper-v5": (11, 3),
    "HalfCheetah-v5": (17, 6),
    "Walker2d-v5": (17, 6),
    "Swimmer-v5": (8, 2),
    "InvertedPendulum-v5": (4, 1),
    "InvertedDoublePendulum-v5": (9, 1),
    "Ant-v5": (105, 8),
    "Ant-v5-lite": (27, 8),
    "Humanoid-v5": (348, 17),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def uniforms(env, seed: int = 0, rows: int | None = None) -> torch.Tensor:
    shape = (env.envs if rows is None else rows, env.reset_size)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def actions(env, steps: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(env.envs, env.action_size, generator=generator) * 2 - 1 for _ in range(steps)]


def make(task: str, envs: int = 4, **settings) -> MuJoCoEnv:
    env = MuJoCoEnv(envs, task=task, **settings)
    env.restart(uniforms(env))
    return env


def bits(env) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in env.fields.items()}


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_specs(task):
    env = MuJoCoEnv(2, task=task)
    spec = env.control_spec
    assert (spec.observation_size, spec.action_size) == SIZES[task]
    assert (spec.task, spec.episode_limit, spec.discrete) == (task, 1000, False)
    assert spec.parameters == ("mass", "friction", "gravity", "damping")
    assert len(spec.action_low) == len(spec.action_high) == spec.action_size
    env.restart(uniforms(env))
    seen = env.observe()
    assert seen.dtype == torch.float32
    assert seen.isfinite().all()


def test_torchrl_steps_as_the_plain_way_steps():
    env = MuJoCoEnv(3, task="Hopper-v5", seed=5)
    check_env_specs(env)
    env.set_seed(7)
    start = env.reset()
    plain = MuJoCoEnv(3, task="Hopper-v5")
    drawn = torch.Generator().manual_seed(int(env.generator.initial_seed()))
    plain.restart(torch.rand(3, plain.reset_size, generator=drawn, dtype=torch.float64))
    assert torch.equal(start["observation"], plain.observe())
    for action in actions(plain, 5):
        after = env.step(start.set("action", action))["next"]
        reward, terminated, truncated = plain.advance(action)
        assert torch.equal(after["observation"], plain.observe())
        assert torch.equal(after["reward"].squeeze(-1), reward)
        assert torch.equal(after["terminated"].squeeze(-1), terminated)
        assert torch.equal(after["truncated"].squeeze(-1), truncated)
        start = after


@pytest.mark.parametrize("task", [*KINDS, "Humanoid-v5"])  # the last observes inertia
def test_a_start_depends_on_its_numbers_alone(task):
    draws = uniforms(MuJoCoEnv(4, task=task))
    whole, parts = MuJoCoEnv(4, task=task), make(task)
    whole.restart(draws)
    for action in actions(parts, 7):
        parts.advance(action, torch.full((4, 4), 0.3))  # whatever happened before, parameters too
    for rows in (torch.tensor([3, 0]), torch.tensor([2]), torch.tensor([1])):
        parts.restart(draws[rows], rows)
    parts.restart(draws[:0], torch.zeros(0, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(bits(whole).values(), bits(parts).values(), strict=True))
    assert torch.equal(whole.observe(), parts.observe())
    assert torch.equal(whole.observe()[[2, 0]], parts.observe(torch.tensor([2, 0])))


@pytest.mark.parametrize("task", ["Hopper-v5", "HalfCheetah-v5"])
def test_the_outermost_starts_are_finite_and_bounded(task):
    env = MuJoCoEnv(2, task=task, dtype=torch.float64)
    env.restart(torch.full((2, env.reset_size), 0.5, dtype=torch.float64))
    middle = env.observe()
    ends = torch.stack([torch.zeros(env.reset_size), torch.full((env.reset_size,), 1.0 - 2.0**-53)]).double()
    ends[1] = 1.0 - 2.0**-53
    env.restart(ends)
    away = env.observe() - middle
    positions = env.model.nq - 1
    noise = TASKS[task].noise
    torch.testing.assert_close(away[:, :positions].abs(), torch.full((2, positions), noise).double())
    assert away.isfinite().all()
    assert (away[0] < 0).all()
    assert (away[1] > 0).all()
    if TASKS[task].normal:
        assert 8 * noise < away[:, positions:].abs().min() < away.abs().max() < 9 * noise


@pytest.mark.parametrize("task", KINDS)
def test_only_the_rows_asked_for_advance(task):
    whole, some = make(task), make(task)
    rows = torch.tensor([3, 1])
    for number, action in enumerate(actions(whole, 6)):
        before = bits(some)
        torn = action.clone()
        torn[[0, 2]] = math.nan  # what finished copies do is nobody's business
        expected, ends, _ = whole.advance(action)
        reward, terminated, _ = some.advance(torn, rows=rows)
        after = bits(some)
        kept = slice(0, 1 + whole.model.nq + whole.model.nv)
        assert torch.equal(after["state"][[0, 2], kept], before["state"][[0, 2], kept]), number
        assert torch.equal(after["state"][rows], whole.fields["state"][rows])
        assert torch.equal(reward[rows], expected[rows])
        assert torch.equal(terminated[rows], ends[rows])
        assert not reward[[0, 2]].any()
        assert not terminated[[0, 2]].any()
        assert torch.equal(some.observe(rows), whole.observe(rows))
    assert some.nan_resets == 0
    reward, terminated, _ = some.advance(torn, rows=torch.zeros(0, dtype=torch.int64))
    assert not reward.any()
    assert not terminated.any()


@pytest.mark.parametrize("task", KINDS)
def test_a_snapshot_goes_on_bitwise(task):
    env = make(task)
    moves = actions(env, 12)
    for action in moves[:5]:
        env.advance(action)
    file = io.BytesIO()
    torch.save(env.snapshot(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rewards = [env.advance(action)[0] for action in moves[5:]]
    fresh = MuJoCoEnv(4, task=task)
    for other in (env, fresh):
        other.restore(saved)
        assert torch.equal(other.observe(), other.observe())
        for action, reward in zip(moves[5:], rewards, strict=True):
            assert torch.equal(other.advance(action)[0], reward)
        assert torch.equal(other.elapsed, torch.full((4,), 12))
    assert all(torch.equal(a, b) for a, b in zip(bits(env).values(), bits(fresh).values(), strict=True))
    with pytest.raises(ValueError, match="the saved environments have fields"):
        MuJoCoEnv(3, task=task).restore(saved)


@pytest.mark.parametrize("task", KINDS)
def test_threads_change_nothing(task):
    one, two = make(task, 8), make(task, 8, threads=2)
    for action in actions(one, 6):
        assert torch.equal(one.advance(action)[0], two.advance(action)[0])
    assert all(torch.equal(a, b) for a, b in zip(bits(one).values(), bits(two).values(), strict=True))


def test_failed_simulations_end_and_rest(capfd, tmp_path):
    for task in ("Hopper-v5", "InvertedPendulum-v5", "Ant-v5"):
        env, sound = make(task, 6), make(task, 6)
        first, second = actions(env, 2)
        wild = first.clone()
        wild[0] = math.nan
        wild[5] = 1e30 if task != "InvertedPendulum-v5" else math.inf
        velocities = env.fields["state"][:, 1 + env.model.nq :]
        velocities[1, 0] = math.nan
        velocities[2, 0] = 1e300
        velocities[3, 0] = 3e10
        reward, terminated, _ = env.advance(wild)
        expected, ends, _ = sound.advance(first)
        failed = env.nan_resets
        assert failed == (4 if task == "InvertedPendulum-v5" else 5)  # its reward is blind to the size of actions
        assert torch.equal(terminated[:4], torch.ones(4, dtype=torch.bool))
        assert not reward[:4].any()
        assert torch.equal(reward[4], expected[4])
        assert torch.equal(env.fields["state"][4], sound.fields["state"][4])
        rest = MuJoCoEnv(6, task=task)
        assert torch.equal(env.observe()[:4], rest.observe()[:4])
        assert all(torch.equal(env.fields[name][:4], value[:4]) for name, value in rest.fields.items())
        env.advance(second)  # stands where it can go on
        assert env.nan_resets == failed
        env.restart(uniforms(env))
        sound.restart(uniforms(env))
        assert torch.equal(env.advance(second)[0], sound.advance(second)[0])
        assert env.nan_resets == failed
    out, err = capfd.readouterr()
    assert out == err == ""
    assert not list(tmp_path.iterdir())


def test_parameters_are_each_copys_own_and_undone():
    env, nominal = make("Hopper-v5"), make("Hopper-v5")
    moves = actions(env, 8)
    none = torch.zeros(4, 4)
    assert torch.equal(env.advance(moves[0], none)[0], nominal.advance(moves[0])[0])
    changes = none.clone()
    changes[1, 0], changes[2, 2] = 0.3, -0.5
    env.advance(moves[1], changes)
    nominal.advance(moves[1])
    same = (env.fields["state"] == nominal.fields["state"]).all(1)
    assert same.tolist() == [True, False, False, True]
    env.restore(nominal.snapshot())
    for action, parameters in zip(moves[2:], [None, none, None, none, None, none], strict=True):
        env.advance(action, parameters)
        nominal.advance(action)
    assert torch.equal(env.fields["state"], nominal.fields["state"])


def test_parameters_of_finished_copies_are_left_alone():
    env, all_rows = make("Hopper-v5"), make("Hopper-v5")
    changes = torch.full((4, 4), 0.1)
    torn = changes.clone()
    torn[0] = math.nan
    rows = torch.tensor([1, 2, 3])
    for action in actions(env, 4):
        assert torch.equal(env.advance(action, torn, rows)[0][1:], all_rows.advance(action, changes)[0][1:])


@pytest.mark.parametrize(("column", "value"), [(0, -1.0), (1, -1.5), (2, math.nan), (3, -1.01), (0, math.nan)])
def test_parameters_that_no_model_has(column, value):
    env = make("Hopper-v5")
    changes = torch.zeros(4, 4)
    changes[2, column] = value
    with pytest.raises(
        ValueError, match=f"MuJoCoEnv: parameters: the relative change of {env.parameter_names[column]}"
    ):
        env.advance(actions(env, 1)[0], changes)


def test_clocks():
    env = make("HalfCheetah-v5", 2, episode_limit=3)
    ends = [env.advance(action)[1:] for action in actions(env, 3)]
    assert [truncated.tolist() for _, truncated in ends] == [[False] * 2, [False] * 2, [True] * 2]
    assert not any(terminated.any() for terminated, _ in ends)
    env.restart(uniforms(env, rows=1), torch.tensor([1]))
    assert env.elapsed.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"task": "Hoper-v5"}, "MuJoCoEnv: task: one of Hopper-v5.*, got 'Hoper-v5'"),
        ({"device": "cuda"}, "MuJoCoEnv: device: MuJoCo simulates on the cpu, got cuda"),
        ({"dtype": torch.bfloat16}, "MuJoCoEnv: dtype: float32 or float64, got torch.bfloat16"),
        ({"threads": 0}, "MuJoCoEnv: threads and envs must be >= 1, got 0 and 8"),
        ({"envs": 0}, "MuJoCoEnv: threads and envs must be >= 1, got 1 and 0"),
    ],
)
def test_wrong_settings(settings, line):
    with pytest.raises(ValueError, match=line):
        MuJoCoEnv(**settings)


def test_wrong_actions():
    env = make("Hopper-v5")
    with pytest.raises(ValueError, match=r"MuJoCoEnv: action must be \(4, 3\), got \(1, 3\)"):
        env.advance(torch.zeros(1, 3))


def test_old_mujoco_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)
    with pytest.raises(ImportError, match=r"came with 3.17: pip install -U 'plumbline\[control\]'"):
        MuJoCoEnv(1, task="Hopper-v5")


# -- Gymnasium's other tasks ------------------------------------------------------------------------------------------
def seed_of(numbers: torch.Tensor) -> int:
    return int(numbers[0] * 2**16) * 2**15 + int(numbers[1] * 2**15)


@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1"])
def test_fallback_equals_gymnasium(task):
    env = GymnasiumEnv(3, task=task, dtype=torch.float64)
    limit = gymnasium.spec(task).max_episode_steps
    assert env.control_spec.episode_limit == limit
    assert env.control_spec.discrete == (task == "CartPole-v1")
    assert not env.exact_resume
    draws = uniforms(env)
    env.restart(draws)
    others = [gymnasium.make(task) for _ in range(3)]
    for place, other in enumerate(others):
        start, _ = other.reset(seed=seed_of(draws[place]))
        np.testing.assert_array_equal(env.observe()[place].numpy(), start)
    over = torch.zeros(3, dtype=torch.bool)
    ended = 0
    for action in actions(env, limit):
        reward, terminated, truncated = env.advance(2 * action)
        for place, other in enumerate(others):
            if over[place]:
                assert reward[place] == 0
                continue
            move = action[place].argmax().item() if env.discrete else 2 * action[place].numpy()
            observation, gain, end, cut, _ = other.step(move)
            np.testing.assert_array_equal(env.observe()[place].numpy(), observation)
            assert float(reward[place]) == float(gain)
            assert bool(terminated[place]) == end
            assert bool(truncated[place]) == cut
            over[place] = end or cut
            ended += over[place].item()
    assert ended == 3
    env.close()


def test_fallback_rows_and_restarts():
    env = GymnasiumEnv(3, task="CartPole-v1")
    draws = uniforms(env)
    env.restart(draws)
    start = env.observe()
    action = actions(env, 1)[0]
    reward, _, _ = env.advance(action, rows=torch.tensor([1]))
    assert reward.tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(env.observe()[[0, 2]], start[[0, 2]])
    assert not torch.equal(env.observe()[1], start[1])
    env.restart(draws[1:2], torch.tensor([1]))
    assert torch.equal(env.observe(), start)
    assert env.observe(torch.tensor([2])).shape == (1, 4)
    check_env_specs(GymnasiumEnv(2, task="Pendulum-v1"))


def test_fallback_restores_to_new_episodes():
    env, other = GymnasiumEnv(2, task="Pendulum-v1", seed=3), GymnasiumEnv(2, task="Pendulum-v1", seed=4)
    env.reset()
    env.advance(torch.zeros(2, 1))
    saved = env.snapshot()
    env.restore(saved)
    other.restore(saved)
    assert torch.equal(env.observe(), other.observe())
    assert env.elapsed.tolist() == [0, 0]
    assert torch.equal(env.advance(torch.ones(2, 1))[0], other.advance(torch.ones(2, 1))[0])


class Moody(gymnasium.Env):
    """Cuts an episode short after two steps, and fails where the action is large."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2, 2))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.full((2, 2), 0.5, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        fine = abs(action[0]) < 0.9
        return np.full((2, 2), 0.25 if fine else np.nan), 1.0, False, self.steps == 2, {}


class Worded(Moody):
    observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)})


@pytest.fixture
def _registered():
    gymnasium.register("Moody-v0", entry_point=Moody)
    gymnasium.register("Worded-v0", entry_point=Worded)
    yield
    del gymnasium.registry["Moody-v0"], gymnasium.registry["Worded-v0"]


@pytest.mark.usefixtures("_registered")
def test_fallback_tasks_that_fail_or_cut_short():
    env = GymnasiumEnv(2, task="Moody-v0")
    assert env.control_spec.episode_limit == 1000
    assert env.observation_size == 4
    env.restart(uniforms(env))
    reward, terminated, truncated = env.advance(torch.tensor([[0.0], [1.0]]))
    assert (reward.tolist(), terminated.tolist(), truncated.any().item()) == ([1.0, 0.0], [False, True], False)
    assert env.observe()[1].tolist() == [0.0] * 4
    assert env.nan_resets == 1
    reward, terminated, truncated = env.advance(torch.zeros(2, 1))
    assert reward.tolist() == [1.0, 0.0]
    assert truncated.tolist() == [True, False]
    assert env.nan_resets == 1


@pytest.mark.usefixtures("_registered")
def test_fallback_errors(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="GymnasiumEnv: task: Gymnasium has no 'CartPole-v11': did you mean CartPole-v1"
    ):
        GymnasiumEnv(1, task="CartPole-v11")
    with pytest.raises(ValueError, match="needs observations in a Box .* Worded-v0 has Dict"):
        GymnasiumEnv(1, task="Worded-v0")
    with pytest.raises(ValueError, match="GymnasiumEnv: envs must be >= 1, got 0"):
        GymnasiumEnv(0, task="CartPole-v1")
    with pytest.raises(ValueError, match="device: Gymnasium's tasks run on the cpu, got cuda"):
        GymnasiumEnv(1, task="CartPole-v1", device="cuda")
    (tmp_path / "brought_along.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'brought_along:Moody-v0' imports code: set allow_import to true"):
        GymnasiumEnv(1, task="brought_along:Moody-v0")
    assert "brought_along" not in sys.modules
    assert GymnasiumEnv(1, task="brought_along:Moody-v0", allow_import=True).observation_size == 4
    assert sys.modules.pop("brought_along").LOADED
