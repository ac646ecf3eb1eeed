"""Tensor environments: clocks, rows, snapshots, dynamics, TorchRL's interface, and exact solutions of two games."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from torch import Tensor
from torchrl.envs import check_env_specs

from datamodules.envs.control.classic import CartPole, Pendulum
from datamodules.envs.control.games import (
    DoubleIntegrator,
    IntegratorGame,
    LQGame,
    integrator_agent,
    integrator_interval,
    integrator_value,
    lq_saddle,
)
from datamodules.envs.control.tasks import make_control_env

KINDS = {
    "integrator": (IntegratorGame, {}, 20),
    "integrator3": (IntegratorGame, {"dimension": 3}, 20),
    "lq": (LQGame, {}, 50),
    "double_integrator": (DoubleIntegrator, {}, 100),
    "pendulum": (Pendulum, {}, 200),
    "cartpole": (CartPole, {}, 500),
    "cartpole2": (CartPole, {"continuous": False}, 500),
}
F64 = {"dtype": torch.float64}


def uniforms(env, rows: int | None = None, seed: int = 0) -> Tensor:
    shape = (env.envs if rows is None else rows, env.reset_size)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def actions(env, steps: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, env.envs, env.action_size, generator=generator) * 3 - 1.5


def make(kind: str, envs: int = 5, **more):
    cls, settings, _ = KINDS[kind]
    env = cls(envs, **settings, **more)
    env.restart(uniforms(env))
    return env


def play(env, moves: Tensor) -> dict[str, Tensor]:
    rows = [(*env.advance(a), env.observe()) for a in moves]
    return dict(
        zip(("reward", "terminated", "truncated", "seen"), map(torch.stack, zip(*rows, strict=True)), strict=True)
    )


# -- what all of them do ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_specs_and_defaults(kind):
    env, limit = make(kind), KINDS[kind][2]
    spec = env.control_spec
    assert spec.episode_limit == limit
    assert spec.discrete == (kind == "cartpole2")
    assert env.observe().shape == (5, spec.observation_size)
    reward, terminated, truncated = env.advance(torch.zeros(5, spec.action_size))
    assert reward.shape == terminated.shape == truncated.shape == (5,)
    assert reward.dtype == env.observe().dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    bounds = {"double_integrator": (-1, 1), "pendulum": (-2, 2), "cartpole": (-1, 1), "cartpole2": (0, 1)}
    low, high = bounds.get(kind, (-math.inf, math.inf))
    assert spec.action_low == (low,) * spec.action_size
    assert spec.action_high == (high,) * spec.action_size


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_the_horizon_and_not_before(kind):
    env = make(kind, horizon=4)
    flags = play(env, torch.zeros(5, 5, env.action_size))
    assert flags["truncated"][:, 0].tolist() == [False, False, False, True, True]
    assert not flags["terminated"].any()


def test_a_fall_at_the_horizon_is_no_truncation():
    env = CartPole(2, horizon=1)
    env.restart(uniforms(env))
    env.fields["angle"][0] = 1.0
    _, terminated, truncated = env.advance(torch.zeros(2, 1))
    assert terminated.tolist() == [True, False]
    assert truncated.tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_observation_is_not_changed_by_what_follows(kind):
    env = make(kind)
    move = actions(env, 3)
    first = env.observe()
    some = env.observe(torch.tensor([3, 1]))
    kept, few, asked = first.clone(), some.clone(), move.clone()
    played = play(env, move)
    seen, rewards = played["seen"].clone(), played["reward"].clone()
    env.restart(uniforms(env, 2, 7), torch.tensor([0, 4]))
    env.restart(uniforms(env, seed=8))
    assert torch.equal(first, kept)
    assert torch.equal(some, few)
    assert torch.equal(few, kept[[3, 1]])
    assert torch.equal(move, asked)  # nor is the action
    assert torch.equal(played["seen"], seen)
    assert torch.equal(played["reward"], rewards)
    assert not torch.equal(seen[-1], kept)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_restarts_touch_their_rows_alone(kind):
    env, rows = make(kind), torch.tensor([3, 0])
    play(env, actions(env, 6))
    before = env.observe()
    env.restart(uniforms(env, 2, 9), rows)
    fresh = make(kind, 2)
    fresh.restart(uniforms(fresh, 2, 9))
    assert torch.equal(env.observe()[rows], fresh.observe())
    assert torch.equal(env.observe()[[1, 2, 4]], before[[1, 2, 4]])
    assert env.elapsed.tolist() == [0, 6, 6, 0, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snapshots_go_on_bitwise(kind, dtype):
    env = make(kind, dtype=dtype)
    moves = actions(env, 12).to(dtype)
    play(env, moves[:5])
    file = io.BytesIO()
    torch.save(env.snapshot(), file)
    rest = play(env, moves[5:])
    other = KINDS[kind][0](5, **KINDS[kind][1], dtype=dtype)  # never begun
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for _ in range(2):  # playing on leaves the snapshot as it is
        other.restore(saved)
        again = play(other, moves[5:])
        assert all(torch.equal(again[name], value) for name, value in rest.items())
    assert torch.equal(env.elapsed, other.elapsed)


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_does_not_depend_on_its_neighbours(kind):
    """Bitwise: ranks share out what one rank would do."""
    env = make(kind, 67)
    moves, start = actions(env, 30), uniforms(env)
    whole = play(env, moves)
    for rows in (slice(60, 67), slice(3, 4), slice(0, 33)):
        part = KINDS[kind][0](len(range(67)[rows]), **KINDS[kind][1])
        part.restart(start[rows])
        mine = play(part, moves[:, rows].contiguous())
        assert all(torch.equal(mine[name], value[:, rows]) for name, value in whole.items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_policy_do_not_enter_the_state(kind):
    env = make(kind)
    moves = actions(env, 2)
    reward, _, _ = env.advance(moves[0].requires_grad_(True))
    assert not reward.requires_grad
    assert not env.observe().requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_torchrl_specs(kind):
    check_env_specs(KINDS[kind][0](3, **KINDS[kind][1]))


@pytest.mark.parametrize("kind", KINDS)
def test_torchrl_rollout_equals_advance(kind):
    cls, settings, _ = KINDS[kind]
    env, other = (cls(5, **settings, horizon=8, seed=3) for _ in range(2))
    moves = iter(actions(env, 8))
    rollout = env.rollout(8, lambda td: td.set("action", next(moves)), break_when_any_done=False)
    other.restart(other._uniforms(5))
    assert torch.equal(rollout["observation"][:, 0], other.observe())
    mine = play(other, actions(other, 8))
    assert torch.equal(rollout["next", "observation"], mine["seen"].transpose(0, 1))
    for name in ("reward", "terminated", "truncated"):
        assert torch.equal(rollout["next", name].squeeze(-1), mine[name].t()), name
    assert rollout["next", "truncated"][:, -1].all()


@pytest.mark.parametrize("task", ["integrator", "lq", "double_integrator", "pendulum", "cartpole"])
def test_tasks_by_name(task):
    env = make_control_env(task, 2, options={"horizon": 7}, seed=1)
    assert (env.control_spec.task, env.episode_limit) == (task, 7)


# -- dynamics parameters ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["double_integrator", "pendulum", "cartpole", "cartpole2"])
def test_no_change_of_parameters_is_nominal_and_changes_act(kind):
    env, other = make(kind, **F64), make(kind, **F64)
    moves = actions(env, 10).double()
    none = torch.zeros(5, len(env.parameter_names), dtype=torch.float64)
    for a in moves:
        env.advance(a)
        other.advance(a, none)
    torch.testing.assert_close(env.observe(), other.observe(), rtol=1e-12, atol=1e-14)
    state = env.snapshot()
    for column in range(len(env.parameter_names)):
        change = none.clone()
        change[2, column] = 0.2
        env.restore(state), other.restore(state)
        for a in moves[:3]:
            env.advance(a)
            other.advance(a, change)
        moved = (env.observe() - other.observe()).abs().amax(1)
        assert moved[2] > 1e-6, env.parameter_names[column]
        assert moved[[0, 1, 3, 4]].max() < 1e-12


def test_parameters_mean_what_their_names_say():
    """A changed copy moves as an environment built with the changed value."""
    relative = {0: 0.5, 1: -0.25, 2: 0.125}
    for cls, names in (
        (DoubleIntegrator, ("mass", "friction")),
        (Pendulum, ("mass", "length", "gravity")),
        (CartPole, ("pole_mass", "half_length", "force")),
    ):
        env, other = cls(1, **F64), cls(1, **F64)
        change = torch.tensor([[relative[column] for column in range(len(names))]], dtype=torch.float64)
        for column, name in enumerate(names):
            setattr(other, name, getattr(env, name) * (1 + relative[column]))
        env.restart(uniforms(env)), other.restart(uniforms(env))
        for a in actions(env, 5).double():
            env.advance(a, change), other.advance(a)
        torch.testing.assert_close(env.observe(), other.observe(), rtol=1e-12, atol=1e-14)


def test_a_parameter_that_must_be_positive():
    env = make("cartpole", 3)
    change = torch.zeros(3, 3)
    change[1, 1] = -1.0
    with pytest.raises(
        ValueError, match="^CartPole: parameters: the relative change of pole_length must be > -1, got -1"
    ):
        env.advance(torch.zeros(3, 1), change)
    env.advance(torch.zeros(3, 1), change, torch.tensor([0, 2]))  # where it does not matter
    env.advance(torch.zeros(3, 1), change, torch.empty(0, dtype=torch.int64))
    change[1, 1] = math.nan
    with pytest.raises(ValueError, match="pole_length must be > -1, got nan"):
        env.advance(torch.zeros(3, 1), change)
    make("double_integrator", 3).advance(torch.zeros(3, 1), torch.tensor([[0.0, -1.0]] * 3))  # no friction


ERRORS = {
    "IntegratorGame: envs must be >= 1, got 0": lambda: IntegratorGame(0),
    "IntegratorGame: dimension must be >= 1, got 0": lambda: IntegratorGame(1, dimension=0),
    "LQGame: horizon must be >= 1, got 0": lambda: LQGame(1, horizon=0),
    "Pendulum: horizon must be >= 1, got -1": lambda: Pendulum(1, horizon=-1),
    "DoubleIntegrator: dt must be > 0 and finite, got 0.0": lambda: DoubleIntegrator(1, dt=0.0),
    "DoubleIntegrator: mass must be > 0 and finite, got nan": lambda: DoubleIntegrator(1, mass=math.nan),
    "DoubleIntegrator: friction must be >= 0 and finite, got -0.1": lambda: DoubleIntegrator(1, friction=-0.1),
    "lq_saddle: g2 must be > 0 and finite, got 0.0": lambda: lq_saddle(0.0),
    "lq_saddle: g2 must be > 0 and finite, got inf": lambda: lq_saddle(math.inf),
    "lq_saddle: g2: no convergence in 3 sweeps": lambda: lq_saddle(5.0, limit=3),
    "integrator_value: horizon must be >= 0, got -1": lambda: integrator_value(-1, 1.0, 0.2),
    "integrator_value: eps must be >= 0 and finite, got -1.0": lambda: integrator_value(1, -1.0, 0.2),
    "integrator_value: eps_bar must be >= 0, got nan": lambda: integrator_value(1, 1.0, math.nan),
    "integrator_value: first_step: one of zero, free, got 'one'": lambda: integrator_value(1, 1.0, 0.2, "one"),
    "integrator_agent: remaining must be >= 1, got 0": lambda: integrator_agent(torch.zeros(1), 0, 1.0, 0.2),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_culprit(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()


# -- dynamics written out ---------------------------------------------------------------------------------------------
def test_integrator_adds_up_and_its_largest_coordinate_costs():
    env = make("integrator3", 2, **F64)
    moves = actions(env, 6).double()
    played = play(env, moves)
    torch.testing.assert_close(played["seen"], moves.cumsum(0))
    torch.testing.assert_close(played["reward"], -moves.cumsum(0).abs().amax(-1))


def test_double_integrator_step():
    env = make("double_integrator", 4, **F64)
    x, v = env.observe().unbind(-1)
    for a in actions(env, 20).double()[..., 0]:
        force = a.clamp(-1, 1)
        reward, _, _ = env.advance(a.unsqueeze(-1))
        torch.testing.assert_close(reward, -(x**2 + 0.1 * v**2 + 0.01 * force**2))
        v = v + 0.1 * (force - 0.1 * v)
        x = x + 0.1 * v
        torch.testing.assert_close(env.observe(), torch.stack((x, v), -1))


def test_lq_step():
    env = make("lq", 4, **F64)
    a_matrix = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([0.005, 0.1], dtype=torch.float64)
    x = env.observe()
    for a in actions(env, 20).double():
        reward, _, _ = env.advance(a)
        torch.testing.assert_close(reward, -((x**2).sum(-1) + 0.1 * a[:, 0] ** 2))
        x = x @ a_matrix.T + a * b
        torch.testing.assert_close(env.observe(), x)


@pytest.mark.parametrize(("kind", "reach"), [("lq", 1.0), ("double_integrator", 1.0), ("cartpole", 0.05)])
def test_starts_fill_their_range(kind, reach):
    seen = make(kind, 4000).observe() / reach
    assert (seen.abs() <= 1.0 + 1e-6).all()
    assert (seen.amin(0) < -0.98).all()
    assert (seen.amax(0) > 0.98).all()
    assert (seen.mean(0).abs() < 0.1).all()


def test_pendulum_starts_anywhere():
    seen = make("pendulum", 4000).observe()
    assert seen[:, :2].mean(0).abs().max() < 0.05  # of the circle's points
    assert seen[:, 2].abs().max() <= 1
    assert seen[:, 2].std() == pytest.approx(1 / math.sqrt(3), abs=0.02)


# -- the integrator game's exact solution -----------------------------------------------------------------------------
def cost_of(agent, perturbations: Tensor) -> Tensor:
    """Cost ``[envs]`` of ``agent(x, p_prev, remaining) -> u`` in the environment, against perturbations ``[T, envs]``.

    The agent is handed ``p_prev`` as it finds it out itself, from what it saw and did.
    """
    steps, envs = perturbations.shape
    env = IntegratorGame(envs, horizon=steps, **F64)
    env.restart(uniforms(env))
    total, known = torch.zeros(envs, dtype=torch.float64), torch.zeros(envs, dtype=torch.float64)
    x = env.observe()[:, 0]
    for t in range(steps):
        u = agent(x, known, steps - t)
        reward, _, _ = env.advance((u + perturbations[t]).unsqueeze(-1))
        total -= reward
        after = env.observe()[:, 0]
        known = after - x - u
        x = after
    return total


def coin_tosses(steps: int, eps: float, eps_bar: float) -> Tensor:
    """All ``2 ** steps`` sequences of the optimal adversary, equally likely: ``[steps, 2 ** steps]``."""
    heads = torch.tensor(list(itertools.product((False, True), repeat=steps))).t()
    p, rows = torch.zeros(heads.shape[1], dtype=torch.float64), []
    for head in heads:
        low, high = integrator_interval(p, eps, eps_bar)
        p = torch.where(head, high, low)
        rows.append(p)
    return torch.stack(rows)


def drifts(steps: int, eps: float, eps_bar: float, envs: int = 2000) -> Tensor:
    """Random feasible sequences: anywhere in the interval, or at its ends."""
    generator = torch.Generator().manual_seed(4)
    p, rows = torch.zeros(envs, dtype=torch.float64), []
    for _ in range(steps):
        low, high = integrator_interval(p, eps, eps_bar)
        share = torch.rand(envs, dtype=torch.float64, generator=generator)
        share[: envs // 2] = (share[: envs // 2] * 3).floor() / 2
        p = low + share * (high - low)
        rows.append(p)
    return torch.stack(rows)


def optimal(eps: float, eps_bar: float):
    return lambda x, known, remaining: -x - integrator_agent(known, remaining, eps, eps_bar)


GAMES = [(1.0, 0.2), (1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (1.0, 0.3), (0.7, 0.41), (2.0, 0.001), (1.0, math.inf)]


TABLE = {
    0.2: {5: 1.00000, 10: 1.95937, 20: 3.81010},
    0.5: {5: 2.18750, 10: 4.20410, 20: 8.20049},
    1.0: {5: 3.56250, 10: 6.88867, 20: 13.55556},
    2.0: {1: 1.0, 7: 7.0},
    math.inf: {20: 20.0},
}


@pytest.mark.parametrize("eps_bar", TABLE)
def test_values_of_the_table(eps_bar):
    for horizon, value in TABLE[eps_bar].items():
        assert integrator_value(horizon, 1.0, eps_bar) == pytest.approx(value, abs=1e-5)
        assert integrator_value(horizon, 3.0, 3 * eps_bar) == pytest.approx(3 * value, abs=3e-5)  # scales


def test_values_at_the_edges():
    assert integrator_value(0, 1.0, 0.2) == integrator_value(0, 1.0, 0.2, "free") == 0
    assert integrator_value(9, 0.0, 0.2) == integrator_value(9, 1.0, 0.0) == 0
    assert integrator_value(9, 1.0, 0.0, "free") == 1.0
    assert integrator_value(9, 0.0, 0.0, "free") == 0.0
    assert integrator_value(21, 1.0, 0.2, "free") == pytest.approx(4.3704, abs=5e-5)
    assert integrator_value(6, 1.0, 1e-320) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("eps_bar", [0.2, 0.4, 0.5, 2 / 3, 1.0, 2.0])
def test_value_of_a_step_in_the_long_run(eps_bar):
    step = integrator_value(801, 1.0, eps_bar) - integrator_value(800, 1.0, eps_bar)
    assert step == pytest.approx(2 * eps_bar / (2 + eps_bar), abs=1e-9)


@pytest.mark.parametrize(("eps", "eps_bar"), GAMES)
def test_both_exact_policies_reach_the_value(eps, eps_bar):
    """Every toss of the coin costs the optimal agent the value: it is indifferent between the two ends."""
    value = integrator_value(10, eps, eps_bar)
    costs = cost_of(optimal(eps, eps_bar), coin_tosses(10, eps, eps_bar))
    torch.testing.assert_close(costs, torch.full_like(costs, value), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("eps", "eps_bar"), GAMES)
def test_no_adversary_gains_more_than_the_value(eps, eps_bar):
    costs = cost_of(optimal(eps, eps_bar), drifts(10, eps, eps_bar))
    value = integrator_value(10, eps, eps_bar)
    assert costs.max() <= value + 1e-12
    assert costs.min() < value - 1e-6


@pytest.mark.parametrize(("eps", "eps_bar"), GAMES)
def test_no_agent_pays_less_than_the_value_to_the_coin(eps, eps_bar):
    tosses, value = coin_tosses(10, eps, eps_bar), integrator_value(10, eps, eps_bar)
    for scale in (0.0, 1.0, 1.2):
        mean = float(cost_of(lambda x, known, remaining: -scale * x, tosses).mean())  # noqa: B023
        assert mean >= value - 1e-9
        assert scale or mean > value + 1e-9
    for share in (0.0, 0.5, 1.0):  # any guess within the interval costs the same on average

        def guess(x, known, remaining):
            low, high = integrator_interval(known, eps, eps_bar)
            return -x - torch.lerp(low, high, share)  # noqa: B023

        assert float(cost_of(guess, tosses).mean()) == pytest.approx(value, abs=1e-9)


def test_a_free_first_step():
    eps, eps_bar, steps = 1.0, 0.2, 9
    # after a free step at either end, which q = 0 expects
    first = torch.tensor([-eps, eps], dtype=torch.float64).repeat_interleave(256)
    heads = torch.tensor(list(itertools.product((False, True), repeat=steps - 1))).t().repeat(1, 2)
    p, rows = first, [first]
    for head in heads:
        p = torch.where(head, *reversed(integrator_interval(p, eps, eps_bar)))
        rows.append(p)

    def agent(x, known, remaining):
        return -x if remaining == steps else optimal(eps, eps_bar)(x, known, remaining)

    costs = cost_of(agent, torch.stack(rows))
    value = integrator_value(steps, eps, eps_bar, "free")
    torch.testing.assert_close(costs, torch.full_like(costs, value), rtol=0, atol=1e-12)


def recursion(p: float, steps: int, eps: float, eps_bar: float) -> float:
    if not steps:
        return 0.0
    low, high = max(-eps, p - eps_bar), min(eps, p + eps_bar)
    ahead = [recursion(end, steps - 1, eps, eps_bar) for end in (low, high)]
    return (high - low) / 2 + sum(ahead) / 2


@pytest.mark.parametrize(("eps", "eps_bar"), [*GAMES, (1.0, 2 / 3), (0.3, 0.1), (1.0, math.sqrt(0.5)), (1.0, 0.999)])
@pytest.mark.parametrize("remaining", [1, 2, 7])
def test_the_table_is_exact_off_its_places(eps, eps_bar, remaining):
    generator = torch.Generator().manual_seed(0)
    p = (torch.rand(40, dtype=torch.float64, generator=generator) * 2 - 1) * eps
    q = integrator_agent(p.view(8, 5), remaining, eps, eps_bar).view(40)
    for here, guess in zip(p.tolist(), q.tolist(), strict=True):
        low, high = max(-eps, here - eps_bar), min(eps, here + eps_bar)
        ahead = [recursion(end, remaining - 1, eps, eps_bar) for end in (low, high)]
        assert guess == pytest.approx((low + high + ahead[1] - ahead[0]) / 2, abs=1e-12)
        assert low - 1e-12 <= guess <= high + 1e-12


def test_the_agents_dtype_and_long_games():
    p = torch.linspace(-1.0, 1.0, 101)
    single = integrator_agent(p, 20, 1.0, 0.2)  # computed in double, then rounded
    assert torch.equal(single, integrator_agent(p.double(), 20, 1.0, 0.2).float())
    q = integrator_agent(p.double(), 500, 1.0, 0.2)
    torch.testing.assert_close(q, -integrator_agent(-p.double(), 500, 1.0, 0.2))  # symmetric


@pytest.mark.parametrize("eps_bar", [0.05, 0.2, 1.0])
def test_memoryless_dead_beat_pays_a_constant_bias_in_full(eps_bar):
    eps, steps = 1.0, 300
    bias = (torch.arange(1, steps + 1, dtype=torch.float64) * eps_bar).clamp_max(eps).unsqueeze(1)  # a feasible ramp
    ramp = float(bias.sum()) - steps * eps
    paid = float(cost_of(lambda x, known, remaining: -x, bias))
    assert paid == pytest.approx(steps * eps + ramp, abs=1e-9)
    over = float(cost_of(lambda x, known, remaining: -1.5 * x, bias))
    assert over / steps == pytest.approx(eps / 1.5, rel=0.05)  # so that eps is not the best a memoryless law can do
    exact = float(cost_of(optimal(eps, eps_bar), bias))
    assert exact <= integrator_value(steps, eps, eps_bar) + 1e-9
