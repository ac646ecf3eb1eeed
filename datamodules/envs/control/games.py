"""Linear control games in tensors, and the exact solutions that are known for two of them.

A disturbance of actions is added by the caller: an environment is handed the executed action. float64 serves
comparisons with the exact solutions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.envs.control.base import ControlEnv


class TensorEnv(ControlEnv):
    """A task whose state is a few numbers for each copy, each a field ``[envs]``; observed as they are.

    Actions and parameters are taken without their gradients: states are changed in place.

    Args:
        envs: copies.
        state: names of the numbers.
        horizon: steps of an episode.
        low, high: bounds of every coordinate of an action.
        positive: the dynamics parameters that must stay above 0, of ``parameters``.
        others: see :class:`~datamodules.envs.control.base.ControlEnv`.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(
        self,
        envs: int,
        *,
        state: Sequence[str],
        horizon: int,
        action_size: int = 1,
        observation_size: int | None = None,
        reset_size: int | None = None,
        low: float = -math.inf,
        high: float = math.inf,
        parameters: tuple[str, ...] = (),
        positive: tuple[str, ...] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"{type(self).__name__}: horizon must be >= 1, got {horizon}")
        super().__init__(
            envs,
            observation_size=len(state) if observation_size is None else observation_size,
            action_size=action_size,
            low=low,
            high=high,
            episode_limit=horizon,
            reset_size=len(state) if reset_size is None else reset_size,
            parameters=parameters,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self._positive = [parameters.index(name) for name in positive]
        self.fields = {name: torch.zeros(envs, dtype=dtype, device=self.device) for name in state}

    def _put(self, start: Tensor, rows: Tensor | None) -> None:
        """Set the state to ``start`` ``[rows, len(state)]``."""
        start = start.to(self.device, self.state_dtype)
        for column, field in enumerate(self.fields.values()):
            if rows is None:
                field.copy_(start[:, column])
            else:
                field[rows] = start[:, column]

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        self._put(uniforms * 2.0 - 1.0, rows)

    def _look(self, rows: Tensor | None) -> Tensor:
        state = torch.stack(tuple(self.fields.values()), -1)
        return state if rows is None else state[rows]

    def _scalar(self, action: Tensor) -> Tensor:
        """``[envs, 1]`` to ``[envs]`` in the states' dtype; may share the caller's memory."""
        return action.detach().to(self.state_dtype).squeeze(-1)

    def _factors(self, parameters: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """``1 + change`` of each parameter, ``[envs]``.

        Raises:
            ValueError: a change, in ``rows``, of -1 or less where the parameter must stay above 0, or not a number.
        """
        changes = parameters.detach().to(self.state_dtype)
        watched = changes if rows is None else changes[rows]
        for column in self._positive:
            least = float(watched[:, column].min()) if len(watched) else 0.0
            if not least > -1:
                raise ValueError(
                    f"{type(self).__name__}: parameters: the relative change of {self.parameter_names[column]} must be "
                    f"> -1, got {least:g}"
                )
        return (changes + 1.0).unbind(-1)

    def _never(self) -> Tensor:
        return torch.zeros(self.envs, dtype=torch.bool, device=self.device)


class IntegratorGame(TensorEnv):
    """``x' = x + a`` from ``x = 0``, reward ``-|x'|`` (of the largest coordinate), never terminated.

    With executed actions ``a = u + p``, ``|p| <= eps``, consecutive ``p`` at most ``eps_bar`` apart and 0 before the
    first, its value is :func:`integrator_value`. Observations are ``x`` ``[envs, dimension]``; actions are not bounded.
    The safe set is ``|x| <= 2``.

    Args:
        envs: copies.
        dimension: coordinates of the state and of actions.
        horizon: steps of an episode.
        start: episodes begin uniformly within ``[-start, start]`` in every coordinate, in place of 0: doing nothing is
            then no good.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: a count below 1, a negative ``start``.
    """

    name = "integrator"

    def __init__(
        self,
        envs: int,
        *,
        dimension: int = 1,
        horizon: int = 20,
        start: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if dimension < 1:
            raise ValueError(f"IntegratorGame: dimension must be >= 1, got {dimension}")
        if not 0 <= start < math.inf:
            raise ValueError(f"IntegratorGame: start must be >= 0 and finite, got {start}")
        super().__init__(
            envs,
            state=(),
            horizon=horizon,
            action_size=dimension,
            observation_size=dimension,
            reset_size=dimension if start else 0,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self.start = start
        self.fields = {"x": torch.zeros(envs, dimension, dtype=dtype, device=self.device)}
        self.safe = tuple((coordinate, -2.0, 2.0) for coordinate in range(dimension))

    def _begin(self, uniforms: Tensor, rows: Tensor | None) -> None:
        x = 0.0
        if self.start:
            x = ((uniforms * 2.0 - 1.0) * self.start).to(self.device, self.state_dtype)
        self.fields["x"][slice(None) if rows is None else rows] = x

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        size = self.fields["x"].add_(action.detach()).abs()
        size = size.squeeze(-1) if self.action_size == 1 else size.amax(-1)
        return size.neg_(), self._never()

    def _look(self, rows: Tensor | None) -> Tensor:
        x = self.fields["x"]
        return x.clone() if rows is None else x[rows]

    @property
    def best_return(self) -> float:
        return 0.0

    def reference_action(self, observation: Tensor) -> Tensor:
        """``u = -x``, optimal where nothing disturbs."""
        return -observation


class LQGame(TensorEnv):
    """``x' = A x + B a``, ``A = [[1, .1], [0, 1]]``, ``B = [.005, .1]``; reward ``-(x'x + 0.1 a^2)``, ``x`` before it.

    ``x`` is a position and a velocity, uniform in [-1, 1]^2 at the start; observed as it is. Disturbances enter as
    actions do, so that the executed action ``a = u + w`` is charged for; :func:`lq_saddle` solves the game that charges
    ``u`` alone and pays for ``w``. Actions are not bounded. The safe set is ``|position| <= 2``.

    Args:
        envs: copies.
        horizon: steps of an episode.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: a count below 1.
    """

    name = "lq"
    safe = ((0, -2.0, 2.0),)

    def __init__(
        self,
        envs: int,
        *,
        horizon: int = 50,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(envs, state=("position", "velocity"), horizon=horizon, device=device, dtype=dtype, seed=seed)

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        position, velocity = self.fields.values()
        push = self._scalar(action)
        reward = position.square().add_(velocity.square()).add_(push.square().mul_(_R)).neg_()
        # entry by entry and not as a matrix product, whose rounding depends on how many copies there are
        position.add_(velocity * _A[0][1]).add_(push * _B[0])
        velocity.add_(push * _B[1])
        return reward, self._never()

    def reference_action(self, observation: Tensor) -> Tensor:
        """The linear law that is optimal without end and without disturbance."""
        return observation @ linear_law(_A, _B, (1.0, 1.0), _R).to(observation)


class DoubleIntegrator(TensorEnv):
    """A mass pushed along a line against friction: ``v' = v + dt (a - friction v) / mass``, ``x' = x + dt v'``.

    Reward ``-(x^2 + 0.1 v^2 + 0.01 a^2)`` of the state before the step, ``a`` being the action clipped to [-1, 1].
    Observations are ``[x, v]``, uniform in [-1, 1]^2 at the start. Dynamics parameters: ``mass``, ``friction``. The
    safe set is ``|x| <= 2``: a wall that full braking always avoids.

    Args:
        envs: copies.
        horizon: steps of an episode.
        dt: seconds of a step.
        mass: kg, nominal.
        friction: N s / m, nominal.
        device: where states live.
        dtype: of states, observations and rewards.
        seed: of TorchRL's ``reset``.

    Raises:
        ValueError: a count below 1, ``dt`` or ``mass`` not above 0, ``friction`` below 0.
    """

    name = "double_integrator"
    safe = ((0, -2.0, 2.0),)

    def __init__(
        self,
        envs: int,
        *,
        horizon: int = 100,
        dt: float = 0.1,
        mass: float = 1.0,
        friction: float = 0.1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        for field, value in (("dt", dt), ("mass", mass)):
            if not 0 < value < math.inf:
                raise ValueError(f"DoubleIntegrator: {field} must be > 0 and finite, got {value}")
        if not 0 <= friction < math.inf:
            raise ValueError(f"DoubleIntegrator: friction must be >= 0 and finite, got {friction}")
        super().__init__(
            envs,
            state=("position", "velocity"),
            horizon=horizon,
            low=-1.0,
            high=1.0,
            parameters=("mass", "friction"),
            positive=("mass",),
            device=device,
            dtype=dtype,
            seed=seed,
        )
        self.dt, self.mass, self.friction = dt, mass, friction

    def _step_all(self, action: Tensor, parameters: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        position, velocity = self.fields.values()
        mass, friction = self.mass, self.friction
        if parameters is not None:
            factors = self._factors(parameters, rows)
            mass, friction = mass * factors[0], friction * factors[1]
        force = self._scalar(action).clamp(-1.0, 1.0)
        reward = position.square().add_(velocity.square().mul_(0.1)).add_(force.square().mul_(0.01)).neg_()
        velocity.add_(force.sub_(velocity * friction).mul_(self.dt / mass))
        position.add_(velocity * self.dt)
        return reward, self._never()

    def reference_action(self, observation: Tensor) -> Tensor:
        """The linear law that is optimal without end and without bounds, clipped to them."""
        brake, push = 1.0 - self.dt * self.friction / self.mass, self.dt / self.mass
        a = ((1.0, self.dt * brake), (0.0, brake))
        law = linear_law(a, (self.dt * push, push), (1.0, 0.1), 0.01)
        return (observation @ law.to(observation)).clamp(-1.0, 1.0)


@functools.lru_cache(maxsize=16)
def linear_law(
    a: tuple[tuple[float, float], tuple[float, float]],
    b: tuple[float, float],
    q: tuple[float, float],
    r: float,
) -> Tensor:
    """``K`` float64 ``[2, 1]``: ``u = K'x`` minimises the endless sum of ``q_1 x_1^2 + q_2 x_2^2 + r u^2``.

    The next state is ``A x + B u``. By value iteration of the Riccati equation.

    Args:
        a, b: of the dynamics.
        q, r: weights of the cost, > 0.
    """
    step, push = torch.tensor(a, dtype=torch.float64), torch.tensor([b], dtype=torch.float64).t()
    weight = torch.diag(torch.tensor(q, dtype=torch.float64))
    cost, law = weight.clone(), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(10_000):
        law = -(push.t() @ cost @ step) / (r + push.t() @ cost @ push)
        after = weight + step.t() @ cost @ (step + push @ law)
        change, cost = float((after - cost).abs().max()), after
        if change <= 1e-12 * float(cost.abs().max()):
            break
    return law.t()


# -- the linear-quadratic game ----------------------------------------------------------------------------------------
_A = ((1.0, 0.1), (0.0, 1.0))
_B = (0.005, 0.1)
_R = 0.1


def lq_saddle(g2: float, tolerance: float = 1e-14, limit: int = 200_000) -> tuple[Tensor, Tensor, Tensor]:
    """The saddle point of :class:`LQGame` with cost ``x'x + 0.1 u^2 - g2 w^2`` a step, for ever.

    ``x' = A x + B (u + w)``; the agent chooses ``u``, the adversary ``w``.

    Value iteration of the game's Riccati equation from ``P = 0``: the costs of ever longer games, which only grow.

    Args:
        g2: what a disturbance pays for its square.
        tolerance: stop when a sweep changes ``P`` by no more than this, relative to its largest entry.
        limit: sweeps.

    Returns:
        float64 ``P [2, 2]``, ``K_u [1, 2]``, ``K_w [1, 2]``: the cost from ``x`` is ``x'Px`` under ``u = K_u x`` and
        ``w = K_w x``.

    Raises:
        ValueError: ``g2`` not above 0 or not finite, or no more than ``B'PB`` at a sweep: ``w`` then gains without
            bound. Also if the sweeps do not converge: ``g2`` is too near that boundary.
    """
    if not 0 < g2 < math.inf:
        raise ValueError(f"lq_saddle: g2 must be > 0 and finite, got {g2}")
    a = torch.tensor(_A, dtype=torch.float64)
    b = torch.tensor([_B, _B], dtype=torch.float64).t()  # of [u, w]
    weights = torch.diag(torch.tensor([_R, -g2], dtype=torch.float64))
    cost = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(limit):
        seen = b.t() @ cost @ b
        if g2 <= float(seen[1, 1]):
            raise ValueError(
                f"lq_saddle: g2: adversary budget too large: no saddle: must exceed B'PB = {float(seen[1, 1]):.6g}, "
                f"got {g2}"
            )
        gain = -torch.linalg.solve(weights + seen, b.t() @ cost @ a)
        after = torch.eye(2, dtype=torch.float64) + a.t() @ cost @ (a + b @ gain)
        after = (after + after.t()) / 2  # rounding would tilt it
        change, cost = float((after - cost).abs().max()), after
        if change <= tolerance * float(cost.abs().max()):
            return cost, gain[:1], gain[1:]
    raise ValueError(f"lq_saddle: g2: no convergence in {limit} sweeps, raise g2 (too near no saddle), got {g2}")


# -- the integrator game ----------------------------------------------------------------------------------------------
def _check_budgets(who: str, eps: float, eps_bar: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"{who}: eps must be >= 0 and finite, got {eps}")
    if not eps_bar >= 0:
        raise ValueError(f"{who}: eps_bar must be >= 0, got {eps_bar}")


def _sweeps(horizon: int, eps: float, eps_bar: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Places ``[n]`` between which ``V_0 .. V_horizon`` are linear, and each of the values there in turn.

    ``V_t(p)`` is the value of ``t`` perturbations that follow ``p``. It is piecewise linear and bends at most at
    ``+-(eps - k eps_bar)``, ``k <= t``: there a bound of the feasible interval begins to bind ``k`` steps on, and steps
    of ``eps_bar`` carry these places into each other. So interpolation between them is exact.
    """
    count = 1 if eps_bar == 0 else int(min(horizon, 2 * eps / eps_bar)) + 1
    edge = torch.tensor([eps - k * eps_bar if k else eps for k in range(count)], dtype=torch.float64)
    places = torch.cat((edge, -edge)).clamp(-eps, eps).sort().values
    apart = places.diff() > 1e-12 * eps  # the two families may meet, up to rounding
    places = torch.cat((places[:1], places[1:][apart]))
    low, high = (places - eps_bar).clamp_min(-eps), (places + eps_bar).clamp_max(eps)
    values = torch.zeros_like(places)
    yield places, values
    for _ in range(horizon):
        values = (high - low + _between(low, places, values) + _between(high, places, values)) / 2
        yield places, values


@functools.lru_cache(maxsize=16)
def _integrator_table(horizon: int, eps: float, eps_bar: float) -> tuple[Tensor, Tensor]:
    """Places ``[n]`` and values ``[horizon + 1, n]``, see :func:`_sweeps`."""
    sweeps = list(_sweeps(horizon, eps, eps_bar))
    return sweeps[0][0], torch.stack([values for _, values in sweeps])


def _between(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of ``values`` ``[n]`` at increasing ``places`` ``[n]``, constant beyond them; float64."""
    if len(places) == 1:
        return values.expand_as(at)
    right = torch.searchsorted(places, at.contiguous()).clamp(1, len(places) - 1)
    left = right - 1
    share = ((at - places[left]) / (places[right] - places[left])).clamp(0.0, 1.0)
    return values[left] + share * (values[right] - values[left])


def integrator_value(horizon: int, eps: float, eps_bar: float, first_step: Literal["zero", "free"] = "zero") -> float:
    """The cost of :class:`IntegratorGame` under optimal play of both sides, over ``horizon`` perturbations.

    The agent sees all states and actions, hence the perturbation before. With ``[lo, hi]`` feasible after ``p``:
    ``V_t(p) = (hi - lo) / 2 + (V_{t-1}(lo) + V_{t-1}(hi)) / 2``, ``V_0 = 0``: the adversary tosses a fair coin between
    ``lo`` and ``hi``, the agent answers with :func:`integrator_agent`. The long-run cost of a step is ``2 eps eps_bar /
    (2 eps + eps_bar)`` if ``2 eps / eps_bar`` is whole.

    Args:
        horizon: perturbations.
        eps: largest perturbation.
        eps_bar: largest change of it in a step; ``2 eps`` or more: not coupled.
        first_step: ``zero``: the first one is coupled to 0; ``free``: it is anywhere within ``eps``.

    Raises:
        ValueError: a negative horizon or budget, or an unknown ``first_step``.
    """
    _check_budgets("integrator_value", eps, eps_bar)
    if horizon < 0:
        raise ValueError(f"integrator_value: horizon must be >= 0, got {horizon}")
    if first_step not in ("zero", "free"):
        raise ValueError(f"integrator_value: first_step: one of zero, free, got {first_step!r}")
    if horizon == 0:
        return 0.0
    *_, (places, values) = _sweeps(horizon - (first_step == "free"), float(eps), float(eps_bar))
    if first_step == "free":  # [lo, hi] is [-eps, eps]
        return float(eps + (values[0] + values[-1]) / 2)
    return float(_between(torch.zeros(1, dtype=torch.float64), places, values))


def integrator_interval(p_prev: Tensor, eps: float, eps_bar: float) -> tuple[Tensor, Tensor]:
    """Least and greatest feasible perturbation after ``p_prev`` (any shape, within ``eps``)."""
    _check_budgets("integrator_interval", eps, eps_bar)
    return (p_prev - eps_bar).clamp_min(-eps), (p_prev + eps_bar).clamp_max(eps)


def integrator_agent(p_prev: Tensor, remaining: int, eps: float, eps_bar: float) -> Tensor:
    """The perturbation ``q`` to expect: ``u = -x - q`` is the optimal action of :class:`IntegratorGame`.

    ``q = (lo + hi + V_{t-1}(hi) - V_{t-1}(lo)) / 2`` makes both ends cost the same, now and later. Where the first step
    is free, ``q`` is 0 there.

    Args:
        p_prev: perturbation before, any shape, within ``eps``; 0 before the first.
        remaining: perturbations to come, ``t``, the one now included.
        eps, eps_bar: as in :func:`integrator_value`.

    Returns:
        ``q`` in the shape and dtype of ``p_prev``; computed in float64.

    Raises:
        ValueError: nothing remaining, or a negative budget.
    """
    if remaining < 1:
        raise ValueError(f"integrator_agent: remaining must be >= 1, got {remaining}")
    low, high = integrator_interval(p_prev.double(), eps, eps_bar)
    # one table serves all steps of a game
    places, values = _integrator_table(1 << max(5, (remaining - 1).bit_length()), float(eps), float(eps_bar))
    places, ahead = places.to(p_prev.device), values[remaining - 1].to(p_prev.device)
    return ((low + high + _between(high, places, ahead) - _between(low, places, ahead)) / 2).to(p_prev.dtype)
