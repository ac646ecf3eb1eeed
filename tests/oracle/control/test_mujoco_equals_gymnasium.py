"""Our batched MuJoCo tasks against Gymnasium's, one environment at a time, from the same states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")
mujoco = pytest.importorskip("mujoco")
pytest.importorskip("mujoco.batch", reason="needs mujoco >= 3.17")

from datamodules.envs.control.mujoco_batch import TASKS, MuJoCoEnv  # noqa: E402

ENVS = 3
LITE = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Gymnasium lets MuJoCo write its log into the working directory


def theirs(task: str) -> Any:
    made = gymnasium.make(task.removesuffix("-lite"), **(LITE if task.endswith("-lite") else {})).unwrapped
    made.reset(seed=0)
    return made


def ours(task: str, seed: int = 0) -> MuJoCoEnv:
    env = MuJoCoEnv(ENVS, task=task, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    env.restart(torch.rand(ENVS, env.reset_size, dtype=torch.float64, generator=generator))
    return env


def motion(env: MuJoCoEnv, place: int) -> tuple[np.ndarray, np.ndarray]:
    nq, nv = env.model.nq, env.model.nv
    row = env.fields["state"][place].numpy()
    return row[1 : 1 + nq].copy(), row[1 + nq : 1 + nq + nv].copy()


def begin_alike(env: MuJoCoEnv, other: Any, place: int) -> None:
    mujoco.mj_resetData(other.model, other.data)
    other.set_state(*motion(env, place))


def compare(env: MuJoCoEnv, others: list[Any], steps: int, parameters: torch.Tensor | None = None) -> dict[str, float]:
    """Largest differences over ``steps`` steps of random actions, beyond the bounds too."""
    generator = torch.Generator().manual_seed(1)
    worst = dict.fromkeys(("state", "observation", "reward", "ends"), 0.0)
    moved, ends = 0.0, 0
    for _ in range(steps):
        action = torch.rand(ENVS, env.action_size, dtype=torch.float64, generator=generator)
        action = 1.5 * (env.low + (env.high - env.low) * action)
        reward, terminated, _ = env.advance(action, parameters)
        seen = env.observe()
        for place, other in enumerate(others):
            observation, gain, ended, _, _ = other.step(action[place].numpy())
            positions, velocities = motion(env, place)
            assert np.isfinite(observation).all()
            state = max(np.abs(positions - other.data.qpos).max(), np.abs(velocities - other.data.qvel).max())
            worst["state"] = max(worst["state"], float(state))
            worst["observation"] = max(worst["observation"], float(np.abs(seen[place].numpy() - observation).max()))
            worst["reward"] = max(worst["reward"], abs(float(reward[place]) - float(gain)))
            worst["ends"] += bool(ended) != bool(terminated[place])
            moved, ends = max(moved, float(np.abs(velocities).max())), ends + bool(ended)
    assert moved > 0.1  # something happened
    return worst


@pytest.mark.parametrize("task", TASKS)
def test_steps_equal_gymnasiums(task):
    env = ours(task)
    others = [theirs(task) for _ in range(ENVS)]
    assert others[0].observation_space.shape == (env.observation_size,)
    np.testing.assert_array_equal(others[0].action_space.low, env.low.numpy().astype(np.float32))
    np.testing.assert_array_equal(others[0].action_space.high, env.high.numpy().astype(np.float32))
    for place, other in enumerate(others):
        begin_alike(env, other, place)
        np.testing.assert_allclose(env.observe()[place].numpy(), other._get_obs(), rtol=0, atol=1e-14)
    worst = compare(env, others, 100)
    assert worst["ends"] == 0
    # measured: 0 throughout; sines and sums of several rows at once may round otherwise elsewhere
    assert worst["state"] == 0, worst
    assert worst["observation"] <= 1e-14, worst
    assert worst["reward"] < 1e-9, worst
    assert env.nan_resets == 0


@pytest.mark.parametrize("task", [name for name, rules in TASKS.items() if rules.height or rules.balance])
def test_one_step_is_gymnasiums_on_all_sides_of_every_bound(task):
    count, rules, other = 300, TASKS[task], theirs(task)
    env = MuJoCoEnv(count, task=task, dtype=torch.float64)
    draw = np.random.default_rng(3)
    positions = np.tile(other.init_qpos, (count, 1)) + draw.uniform(-0.01, 0.01, (count, env.model.nq))
    velocities = draw.standard_normal((count, env.model.nv)) * 10 ** draw.uniform(-2, 0, (count, 1))
    if rules.height:
        low, high = rules.height
        half = slice(0, count // 2)
        positions[half, rules.height_at] = draw.uniform(low - 0.05, min(high, low + 1.0) + 0.05, count // 2)
        velocities[half] *= 1e-2
        if rules.contact:  # some fall hard
            velocities[:50, 2] = draw.uniform(-15.0, 0.0, 50)
        if rules.angle:
            positions[count // 2 : 3 * count // 4, 2] = draw.uniform(
                1.3 * rules.angle[0], 1.3 * rules.angle[1], count // 4
            )
        if rules.states:  # along the ground, where it does no other harm
            velocities[3 * count // 4 :, 0] = draw.uniform(0.8, 1.2, count // 4) * rules.states
    else:
        positions[:, 1] = draw.uniform(-0.4, 0.4, count) * (5 if rules.balance == "double" else 1)
    nq, nv = env.model.nq, env.model.nv
    env.fields["state"][:, 1 : 1 + nq] = torch.from_numpy(positions)
    env.fields["state"][:, 1 + nq : 1 + nq + nv] = torch.from_numpy(velocities)
    env._simulations.forward()
    env._keep_derived(None, begin=True)
    reward, terminated, _ = env.advance(torch.zeros(count, env.action_size))
    seen = env.observe()
    ends, contacts = [], []
    for place in range(count):
        mujoco.mj_resetData(other.model, other.data)
        other.set_state(positions[place], velocities[place])
        observation, gain, end, _, info = other.step(np.zeros(env.action_size))
        np.testing.assert_allclose(seen[place].numpy(), observation, rtol=0, atol=1e-14)
        assert float(reward[place]) == pytest.approx(float(gain), rel=1e-12, abs=1e-12)
        ends.append(bool(end))
        contacts.append(-info.get("reward_contact", 0.0))
    assert ends == terminated.tolist()
    assert 0.02 * count < sum(ends) < 0.98 * count
    assert rules.contact_most == np.inf or contacts.count(rules.contact_most) > 2
    assert env.nan_resets == 0


@pytest.mark.parametrize("task", TASKS)
def test_starts_are_gymnasiums(task):
    other = theirs(task)
    nq, nv = other.model.nq, other.model.nv
    env = MuJoCoEnv(2, task=task, dtype=torch.float64)
    for seed in range(3):
        other.reset(seed=seed)
        draw, _ = gymnasium.utils.seeding.np_random(seed)
        uniforms = torch.rand(2, env.reset_size, dtype=torch.float64)
        uniforms[1, :nq] = torch.from_numpy(draw.random(nq))
        if TASKS[task].normal:
            uniforms[1, nq:] = torch.special.ndtr(torch.from_numpy(draw.standard_normal(nv)))
        else:
            uniforms[1, nq:] = torch.from_numpy(draw.random(nv))
        env.restart(uniforms)
        positions, velocities = motion(env, 1)
        np.testing.assert_array_equal(positions, other.data.qpos)
        np.testing.assert_allclose(velocities, other.data.qvel, rtol=1e-9, atol=1e-13 if TASKS[task].normal else 0)
        np.testing.assert_allclose(env.observe()[1].numpy(), other._get_obs(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("task", ["Hopper-v5", "Ant-v5", "InvertedDoublePendulum-v5"])
def test_episode_limits_are_gymnasiums(task):
    assert MuJoCoEnv(1, task=task).episode_limit == gymnasium.spec(task).max_episode_steps


def change_mass(model: Any, factor: float) -> None:
    model.body_mass *= factor
    model.body_inertia *= factor
    mujoco.mj_setConst(model, mujoco.MjData(model))


def change_friction(model: Any, factor: float) -> None:
    model.geom_friction *= factor


def change_gravity(model: Any, factor: float) -> None:
    model.opt.gravity *= factor


def change_damping(model: Any, factor: float) -> None:
    model.dof_damping *= factor


CHANGES = {"mass": change_mass, "friction": change_friction, "gravity": change_gravity, "damping": change_damping}


@pytest.mark.parametrize("task", ["Hopper-v5", "HalfCheetah-v5", "Ant-v5"])
@pytest.mark.parametrize("name", CHANGES)
def test_parameters_change_what_a_changed_model_changes(task, name):
    env = ours(task, seed=2)
    changes = torch.zeros(ENVS, 4, dtype=torch.float64)
    changes[:, env.parameter_names.index(name)] = torch.tensor([-0.25, 0.0, 0.5], dtype=torch.float64)
    others = [theirs(task) for _ in range(ENVS)]
    for place, other in enumerate(others):
        begin_alike(env, other, place)  # starts are the nominal model's, the warm start with them
        factor = 1.0 + float(changes[place, env.parameter_names.index(name)])
        if factor != 1.0:
            CHANGES[name](other.model, factor)
    worst = compare(env, others, 40, changes)
    assert worst["ends"] == 0
    assert worst["state"] < 1e-9, worst
    assert worst["observation"] < 1e-8, worst
    assert worst["reward"] < 1e-7, worst
    nominal = ours(task, seed=2)
    assert compare(nominal, others, 40)["state"] > 1e-3  # the change shows
