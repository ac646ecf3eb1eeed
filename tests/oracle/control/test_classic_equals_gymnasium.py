"""Pendulum and cart-pole in tensors against Gymnasium's, step by step; the LQ game's saddle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.envs.control.classic import CartPole, Pendulum
from datamodules.envs.control.games import LQGame, lq_saddle

COPIES, STEPS = 8, 200


def starts(env) -> torch.Tensor:
    shape = (env.envs, env.reset_size)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def state_of(env, row: int) -> np.ndarray:
    return np.array([float(value[row]) for value in env.fields.values()])


def close(mine, theirs, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(mine, dtype=np.float64), theirs, rtol=tolerance, atol=tolerance)


def originals(task: str, env) -> list:
    """Gymnasium's environments, in the states of ours."""
    gymnasium = pytest.importorskip("gymnasium")
    copies = [gymnasium.make(task, disable_env_checker=True).unwrapped for _ in range(env.envs)]
    for row, copy in enumerate(copies):
        copy.reset(seed=row)
        copy.state = state_of(env, row)
    return copies


@pytest.mark.parametrize("length", [1.0, 0.8])
def test_pendulum(length):
    env = Pendulum(COPIES, dtype=torch.float64)
    env.restart(starts(env))
    copies = originals("Pendulum-v1", env)
    change = None
    if length != 1.0:
        change = torch.tensor([[0.3, length - 1.0, -0.1]], dtype=torch.float64).expand(COPIES, 3)
        for copy in copies:
            copy.m, copy.l, copy.g = 1.3, length, 9.0
    generator = torch.Generator().manual_seed(1)
    turned = fast = 0.0
    for _ in range(STEPS):
        action = torch.rand(COPIES, 1, dtype=torch.float64, generator=generator) * 6 - 2  # also beyond the bounds
        reward, terminated, truncated = env.advance(action, change)
        seen = env.observe()
        for row, copy in enumerate(copies):
            their_seen, their_reward, their_terminated, _, _ = copy.step(action[row].numpy())
            close(state_of(env, row), copy.state, 1e-10)
            close(seen[row], their_seen, 1e-6)  # float32 there
            close(reward[row], their_reward, 1e-10)
            assert bool(terminated[row]) == their_terminated
        turned = max(turned, float(env.fields["angle"].abs().max()))
        fast = max(fast, float(env.fields["speed"].abs().max()))
    assert truncated.all()
    assert turned > 2 * np.pi  # whole turns were made
    assert fast == 8.0  # and the speed limit met


def test_pendulum_in_float32_stays_near_for_an_episode():
    env, exact = Pendulum(COPIES), Pendulum(COPIES, dtype=torch.float64)
    env.restart(starts(env)), exact.restart(starts(env))
    for t in range(50):  # chaos grows after that
        action = torch.full((COPIES, 1), 2.0 * (-1) ** (t // 7))
        one, _, _ = env.advance(action)
        two, _, _ = exact.advance(action.double())
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(env.observe().double(), exact.observe(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_cartpole(continuous, changed):
    env = CartPole(COPIES, continuous=continuous, dtype=torch.float64)
    env.restart(starts(env))
    copies = originals("CartPole-v1", env)
    change = None
    if changed:
        change = torch.tensor([[0.5, -0.2, 0.25]], dtype=torch.float64).expand(COPIES, 3)
        for copy in copies:
            copy.masspole, copy.length, copy.force_mag = 0.15, 0.4, 12.5
            copy.total_mass, copy.polemass_length = copy.masspole + copy.masscart, copy.masspole * copy.length
    generator = torch.Generator().manual_seed(1)
    falls = 0
    for _ in range(STEPS):
        if continuous:
            action = torch.rand(COPIES, 1, dtype=torch.float64, generator=generator) * 4 - 2  # also beyond the bounds
            pushes = action[:, 0].clamp(-1, 1).numpy()
        else:
            right = torch.randint(0, 2, (COPIES,), generator=generator)
            action = torch.nn.functional.one_hot(right, 2).double()
        reward, terminated, truncated = env.advance(action, change)
        for row, copy in enumerate(copies):
            if continuous:  # Gymnasium only pushes fully: the force is set to what is asked for
                full = 12.5 if changed else 10.0
                copy.force_mag = full * pushes[row]
                seen, their_reward, their_terminated, _, _ = copy.step(1)
            else:
                seen, their_reward, their_terminated, _, _ = copy.step(int(right[row]))
            close(state_of(env, row), copy.state, 1e-10)
            close(env.observe()[row], seen, 1e-6)  # float32 there
            assert float(reward[row]) == their_reward == 1.0
            assert bool(terminated[row]) == their_terminated
        assert not truncated.any()
        done = terminated.nonzero().squeeze(1)
        falls += len(done)
        if len(done):
            env.restart(torch.rand(len(done), 4, dtype=torch.float64, generator=generator), done)
            for row in done.tolist():
                copies[row].reset()
                copies[row].state = state_of(env, row)
    assert falls > COPIES


@pytest.mark.parametrize("start", [[2.39, 1.0, 0, 0], [-2.39, -1.0, 0, 0], [0, 0, 0.209, 0.3], [0, 0, -0.209, -0.3]])
def test_cartpole_ends_at_the_original_thresholds(start):
    """Approach each threshold in small steps: both must say the same every time."""
    env = CartPole(1, dtype=torch.float64)
    (copy,) = originals("CartPole-v1", env)
    verdicts = []
    for slower in np.linspace(0.0, 1.0, 201):
        state = np.array(start, dtype=np.float64)
        state[[1, 3]] *= slower
        for field, value in zip(env.fields.values(), state, strict=True):
            field.fill_(value)
        copy.reset(seed=0)
        copy.state, copy.force_mag = state, 0.0
        _, terminated, _ = env.advance(torch.zeros(1, 1))
        _, _, theirs, _, _ = copy.step(1)
        verdicts.append(theirs)
        assert bool(terminated) == theirs
    assert len(set(verdicts)) == 2


def test_starts_are_distributed_as_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium")
    stats = pytest.importorskip("scipy.stats")
    for task, env in (("Pendulum-v1", Pendulum(500, dtype=torch.float64)), ("CartPole-v1", CartPole(500))):
        env.restart(starts(env))
        copy = gymnasium.make(task, disable_env_checker=True).unwrapped
        theirs = []
        for seed in range(500):
            copy.reset(seed=seed)
            theirs.append(copy.state)
        for column, value in enumerate(env.fields.values()):
            assert stats.ks_2samp(value.numpy(), np.array(theirs)[:, column]).pvalue > 1e-3


# -- the LQ game's saddle ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("g2", "u", "w"),
    [(1.0, [2.7482, 3.6959], [0.2748, 0.3696]), (5.0, [2.6162, 3.4905], None), (1e12, [2.5857, 3.4434], None)],
)
def test_saddle_of_the_sheet(g2, u, w):
    cost, k_u, k_w = lq_saddle(g2)
    torch.testing.assert_close(-k_u[0], torch.tensor(u, dtype=torch.float64), rtol=0, atol=6e-5)
    if w is not None:
        torch.testing.assert_close(k_w[0], torch.tensor(w, dtype=torch.float64), rtol=0, atol=6e-5)
        expected = torch.tensor([[13.4485, 3.3706], [3.3706, 4.8644]], dtype=torch.float64)
        torch.testing.assert_close(cost, expected, rtol=0, atol=6e-5)


def saddle_cost(
    g2: float, k_u: torch.Tensor, k_w: torch.Tensor, start: torch.Tensor, steps: int = 3000
) -> torch.Tensor:
    """Cost ``[envs]`` of linear laws in the environment, with ``u`` charged for and ``w`` paid for."""
    env = LQGame(len(start), horizon=steps, dtype=torch.float64)
    env.restart((start + 1) / 2)
    total = torch.zeros(len(start), dtype=torch.float64)
    for _ in range(steps):
        x = env.observe()
        u, w = x @ k_u.T, x @ k_w.T
        reward, _, _ = env.advance(u + w)
        total += (-reward.unsqueeze(1) - 0.1 * (u + w) ** 2 + 0.1 * u**2 - g2 * w**2).squeeze(1)
    return total


@pytest.mark.parametrize("g2", [1.0, 5.0])
def test_saddle_in_the_environment(g2):
    start = starts(LQGame(6)) * 2 - 1
    cost, k_u, k_w = lq_saddle(g2)
    value = ((start @ cost) * start).sum(1)
    torch.testing.assert_close(saddle_cost(g2, k_u, k_w, start), value, rtol=1e-10, atol=0)
    for delta in ([[0.1, 0.0]], [[0.0, -0.1]], [[-0.05, 0.1]]):
        change = torch.tensor(delta, dtype=torch.float64)
        assert (saddle_cost(g2, k_u + change, k_w, start, 1000) > value).all()  # the agent minimises
        assert (saddle_cost(g2, k_u, k_w + change, start, 1000) < value).all()  # the adversary maximises


def test_no_saddle_where_the_adversary_is_too_strong():
    for g2 in (1e-6, 0.01, 0.02):
        with pytest.raises(ValueError, match="lq_saddle: g2: adversary budget too large: no saddle"):
            lq_saddle(g2)
    cost, _, _ = lq_saddle(1.0)
    b = torch.tensor([0.005, 0.1], dtype=torch.float64)
    assert float(b @ cost @ b) < 1.0


@pytest.mark.parametrize("g2", [0.2, 1.0, 5.0, 100.0, 1e9])
def test_saddle_equals_scipys(g2):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.005, 0.005], [0.1, 0.1]])
    weights = np.diag([0.1, -g2])
    expected = linalg.solve_discrete_are(a, b, np.eye(2), weights)
    gain = -np.linalg.solve(weights + b.T @ expected @ b, b.T @ expected @ a)
    cost, k_u, k_w = lq_saddle(g2)
    close(cost, expected, 1e-10)
    close(k_u, gain[:1], 1e-10)
    close(k_w, gain[1:], 1e-10)


def test_the_boundary_of_no_saddle():
    """Just above the least budget price there is a saddle that SciPy finds too; just below, neither has one."""
    linalg = pytest.importorskip("scipy.linalg")
    low, high = 0.02, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        try:
            lq_saddle(middle)
            high = middle
        except ValueError as error:
            assert "no saddle" in str(error)  # noqa: PT017
            low = middle
    a, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.005, 0.005], [0.1, 0.1]])
    above = 1.01 * high
    expected = linalg.solve_discrete_are(a, b, np.eye(2), np.diag([0.1, -above]))
    close(lq_saddle(above)[0], expected, 1e-8)
    assert above > b[:, 1] @ expected @ b[:, 1]
    below = 0.99 * low
    try:
        found = linalg.solve_discrete_are(a, b, np.eye(2), np.diag([0.1, -below]))
    except (np.linalg.LinAlgError, ValueError):
        return
    assert below <= b[:, 1] @ found @ b[:, 1]
