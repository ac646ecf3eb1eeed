"""Diversity terms of the response objective: policy-space diversity and the metrics it is compared with.

A term is a :meth:`Diversity.measure` of a plan, in its own units and differentiable. What a response maximises is
``payoff + weight(t) * measure``; :meth:`Diversity.bonus` and :meth:`Diversity.terminal_bonus` are that second summand
for exact oracles (a vector added to the payoff vector) and for learners from episodes (a reward at their end).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modules.contracts import PlanGame
from modules.psd_psro.hull import HullKind, hull_distance, smooth


@dataclass
class DiversityContext:
    """What a diversity term may look at while one response of ``player`` is trained.

    Args:
        game: the game.
        player: whose response it is, counted from 0.
        member_plans: ``[k, sequences]`` of the player's own population, ``k > 0``.
        sigma: ``[k]`` the player's own meta-strategy.
        opponent_plans: ``[m, sequences']`` of the other player's population (two-player games).
        opponent_sigma: ``[m]`` the other's meta-strategy.
        current: ``[sequences]`` the plan to improve: where the measure is linearised, or what a new strategy is mixed
            into at ``rate``.
        iteration: iteration of the population loop, from 0, for schedules.
        rate: in ``(0, 1]``, the share of a new pure strategy in the normal-form response (the published code's).
        generator: tosses :attr:`coin`, once per context; ``None``: no coin, terms with several parts add them.
        coin: outcome, where it was tossed before.
        payoff_columns: ``[sequences, m]``, the player's payoff vectors against ``m`` opponents; derived from
            ``opponent_plans`` if left out (games of three or more players must give it).
        reach: ``[sequences]``, ``game.reach(player)`` (others at random) if left out.

    Raises:
        ValueError: empty population, or sizes that do not fit together.
    """

    game: PlanGame
    player: int
    member_plans: Tensor
    sigma: Tensor
    opponent_plans: Tensor
    opponent_sigma: Tensor
    current: Tensor
    iteration: int = 0
    rate: float = 1.0
    generator: torch.Generator | None = None
    coin: bool | None = None
    payoff_columns: Tensor | None = None
    reach: Tensor | None = None

    def __post_init__(self) -> None:
        if self.member_plans.ndim != 2 or not len(self.member_plans):
            raise ValueError(
                f"DiversityContext: member_plans: must be [k, sequences], k > 0, got {tuple(self.member_plans.shape)}"
            )
        if self.sigma.shape != self.member_plans.shape[:1] or self.current.shape != self.member_plans.shape[1:]:
            raise ValueError(
                f"DiversityContext: sigma, current: must fit member_plans {tuple(self.member_plans.shape)}, "
                f"got {tuple(self.sigma.shape)}, {tuple(self.current.shape)}"
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"DiversityContext: rate: must lie in (0, 1], got {self.rate}")
        if self.generator is not None and self.coin is None:
            draw = torch.rand((), generator=self.generator, device=self.generator.device, dtype=torch.float64)
            self.coin = bool(draw < 0.5)

    @cached_property
    def weights(self) -> Tensor:
        """``[sequences]``: reach."""
        return self.game.reach(self.player) if self.reach is None else self.reach

    @cached_property
    def one_state(self) -> bool:
        """Whether plans are probability vectors over pure strategies (a normal-form game)."""
        shape = self.game.strategy_shape(self.player)
        return len(shape) == 2 and shape[0] == 1 and bool((self.weights == 1).all())

    @cached_property
    def base(self) -> Tensor:
        """``[sequences]``: what plans are smoothed with: ones, or the plan of uniformly random play in a tree."""
        if self.one_state:
            return torch.ones_like(self.current)
        try:
            uniform = self.game.strategy_of(self.player, torch.zeros_like(self.current))
        except ValueError:  # a continuous game: entries are features, not probabilities of play
            return torch.ones_like(self.current)
        return self.game.plans(self.player, uniform)

    @cached_property
    def columns(self) -> Tensor:
        """``V`` ``[sequences, m]``, so that ``plan @ V`` are the payoffs against each of the opponents."""
        if self.payoff_columns is not None:
            return self.payoff_columns
        if self.game.num_players != 2:
            raise ValueError(
                f"DiversityContext: payoff_columns: must be given in games of {self.game.num_players} players, got None"
            )
        if self.one_state:
            pure = torch.eye(len(self.current), dtype=self.current.dtype, device=self.current.device)
            pair = [pure, self.opponent_plans] if self.player == 0 else [self.opponent_plans, pure]
            table = self.game.payoffs(pair)[self.player]
            return table if self.player == 0 else table.T
        pairs = [(plan, plan) for plan in self.opponent_plans]  # the player's own entry is ignored
        return torch.stack([self.game.payoff_vector(self.player, pair) for pair in pairs], -1)

    @cached_property
    def member_rows(self) -> Tensor:
        """``[k, m]`` payoffs of the members against the opponents."""
        return self.member_plans @ self.columns

    def smooth(self, plan: Tensor, eps: float) -> Tensor:
        return smooth(plan, eps, self.weights, self.base)


class Schedule:
    """A weight by iteration."""

    def __call__(self, iteration: int) -> float:
        raise NotImplementedError


class Constant(Schedule):
    """The same weight always."""

    def __init__(self, value: float) -> None:
        self.value = _at_least_0("Constant: value", value)

    def __call__(self, iteration: int) -> float:
        return self.value


class Sigmoid(Schedule):
    """``s = height / (1 + exp(-rate (t - midpoint)))``, growing with iterations (the published code's).

    Args:
        height: limit.
        rate: steepness, per iteration.
        midpoint: iteration of half the height.
        relative: give ``s / (1 - s)``, which makes ``payoff + weight * measure`` proportional to
            ``(1 - s) payoff + s * measure``; ``height`` must then be below 1.
        scale: multiplies the result.
    """

    def __init__(
        self,
        height: float = 0.7,
        rate: float = 0.25,
        midpoint: float = 25.0,
        relative: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.height = _at_least_0("Sigmoid: height", height)
        self.scale = _at_least_0("Sigmoid: scale", scale)
        if relative and height >= 1:
            raise ValueError(f"Sigmoid: height: must be below 1 where relative, got {height}")
        self.rate, self.midpoint, self.relative = rate, midpoint, relative

    def __call__(self, iteration: int) -> float:
        value = self.height * 0.5 * (1 + math.tanh(0.5 * self.rate * (iteration - self.midpoint)))
        return self.scale * (value / (1 - value) if self.relative else value)


class Anneal(Schedule):
    """From ``value`` at iteration 0 linearly to 0 at iteration ``iterations``, and 0 from there on."""

    def __init__(self, value: float, iterations: int) -> None:
        self.value = _at_least_0("Anneal: value", value)
        if iterations < 1:
            raise ValueError(f"Anneal: iterations: must be at least 1, got {iterations}")
        self.iterations = iterations

    def __call__(self, iteration: int) -> float:
        return self.value * max(0.0, 1 - iteration / self.iterations)


def _at_least_0(field: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{field}: must be at least 0, got {value}")
    return float(value)


class Diversity:
    """A term added to what a response maximises.

    Args:
        weight: lambda, at least 0, constant or by iteration; payoff per unit of the measure.
        max_bonus: largest size of the weighted bonus of one episode, in units of payoff.
    """

    def __init__(self, weight: float | Schedule = 0.0, max_bonus: float = math.inf) -> None:
        name = type(self).__name__
        if not isinstance(weight, Schedule):
            _at_least_0(f"{name}: weight", weight)
        self.schedule = weight if isinstance(weight, Schedule) else Constant(weight)
        if not max_bonus > 0:
            raise ValueError(f"{name}: max_bonus: must be above 0, got {max_bonus}")
        self.max_bonus = max_bonus

    def weight_at(self, iteration: int) -> float:
        return self.schedule(iteration)

    def measure(self, plan: Tensor, context: DiversityContext) -> Tensor:
        """Diversity of ``plan`` ``[sequences]``, unweighted: a scalar, differentiable in the plan."""
        raise NotImplementedError

    def scan(self, context: DiversityContext) -> Tensor:
        """Measure of the candidate of each pure strategy ``[sequences]`` (normal-form games)."""
        pure = torch.eye(len(context.current), dtype=context.current.dtype, device=context.current.device)
        return torch.stack([self.measure(candidate, context) for candidate in self.candidates(pure, context)])

    def candidates(self, pure: Tensor, context: DiversityContext) -> Tensor:
        """Plans whose measure is taken for pure strategies ``[n, sequences]``."""
        return pure

    def bonus(self, context: DiversityContext) -> Tensor:
        """What an exact oracle adds to its payoff vector: ``[sequences]``, weighted, within ``max_bonus``.

        Normal-form games: the exact weighted measure of every pure candidate. Others: the linearised measure at
        ``context.current``, reach times :meth:`terminal_bonus`. Exactly 0 where the weight is 0.
        """
        weight = self.weight_at(context.iteration)
        if weight == 0:
            return torch.zeros_like(context.current)
        if context.one_state:
            return (weight * self.scan(context)).clamp(-self.max_bonus, self.max_bonus)
        return context.weights * self.terminal_bonus(context, context.current)

    def terminal_bonus(self, context: DiversityContext, plan: Tensor) -> Tensor:
        """Reward at the end of an episode, by the player's last own sequence: ``[sequences]``, weighted, clamped.

        The measure is linearised at ``plan`` ``[sequences]``; the expectation of the bonus over the play of a plan
        ``q`` is ``weight * (measure(plan) + gradient @ (q - plan))``. 0 where reach is 0.
        """
        weight = self.weight_at(context.iteration)
        if weight == 0:
            return torch.zeros_like(context.current)
        reach = context.weights
        with torch.enable_grad():
            point = plan.detach().clone().requires_grad_()
            value = self.measure(point, context)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, point)
            else:  # a measure that does not depend on the plan
                gradient = torch.zeros_like(point)
        point, value = point.detach(), value.detach()
        # Plans of play have sum(reach * plan) = 1, so the constant of the tangent can be paid per episode.
        plays = ((reach * point).sum() - 1).abs() < 1e-6
        constant = torch.where(plays, value - gradient @ point, 0.0)
        density = torch.where(reach > 0, gradient / torch.where(reach > 0, reach, 1.0) + constant, 0.0)
        return (weight * density).clamp(-self.max_bonus, self.max_bonus)


class NoDiversity(Diversity):
    """Plain PSRO: nothing is added."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def measure(self, plan: Tensor, context: DiversityContext) -> Tensor:
        return plan.new_zeros(())


class PolicySpaceDiversity(Diversity):
    """Distance to the policy hull of the player's own members (Yao et al. 2023, eq. 6).

    Args:
        weight: lambda.
        max_bonus: bound on an episode's bonus.
        hull_distance: ``"mixture"``: to the hull; ``"vertices"``: to the nearest member, as in the paper's code.
        eps: both plans are smoothed with it first (members that never play an action would be infinitely far).
        iterations: bound on EM steps.
        tolerance: duality gap to stop at, in nats.
        scan_tolerance: the same for the scan of all pure strategies against the hull.
    """

    def __init__(
        self,
        weight: float | Schedule = 0.01,
        max_bonus: float = math.inf,
        hull_distance: HullKind = "mixture",
        eps: float = 1e-3,
        iterations: int = 2000,
        tolerance: float = 1e-8,
        scan_tolerance: float = 1e-3,
    ) -> None:
        super().__init__(weight, max_bonus)
        if hull_distance not in ("mixture", "vertices"):
            raise ValueError(
                f"PolicySpaceDiversity: hull_distance: must be 'mixture' or 'vertices', got {hull_distance!r}"
            )
        if not 0 < eps < math.inf:
            raise ValueError(f"PolicySpaceDiversity: eps: must be above 0, got {eps}")
        self.kind: HullKind = hull_distance
        self.eps, self.iterations = eps, iterations
        self.tolerance, self.scan_tolerance = tolerance, scan_tolerance

    def measure(self, plan: Tensor, context: DiversityContext) -> Tensor:
        members = context.smooth(context.member_plans, self.eps)
        own = context.smooth(plan, self.eps)
        return hull_distance(own, members, context.weights, self.kind, self.iterations, self.tolerance).value

    def scan(self, context: DiversityContext) -> Tensor:
        """Every pure strategy's distance. To members: their common terms taken out, O(n) a member."""
        members = context.smooth(context.member_plans, self.eps)
        n = members.shape[1]
        if self.kind == "vertices":
            low, high = self.eps / (1 + n * self.eps), (1 + self.eps) / (1 + n * self.eps)
            log_members = members.log()
            entropy = high * math.log(high) + (n - 1) * low * math.log(low)
            return (entropy - low * log_members.sum(-1, keepdim=True) - (high - low) * log_members).amin(0)
        pure = torch.eye(n, dtype=members.dtype, device=members.device)
        own = context.smooth(pure, self.eps)
        return hull_distance(
            own, members, context.weights, "mixture", self.iterations, self.scan_tolerance, newton=False
        ).value


class ExpectedCardinality(Diversity):
    """Expected cardinality of a determinantal point process: ``Tr(I - (L + I)^-1)``, ``L = M M^T``.

    Rows of ``M`` are the payoffs of the members and, last, of the candidate (Perez-Nieves et al. 2021).

    Args:
        weight: lambda.
        max_bonus: bound on an episode's bonus.
        normalise: scale the rows to length 1 first.
        square: the candidate is also an opponent: ``M`` gets its column. Only in symmetric zero-sum games whose
            opponents are the members, and not together with ``normalise``.
    """

    def __init__(
        self,
        weight: float | Schedule = 0.01,
        max_bonus: float = math.inf,
        normalise: bool = False,
        square: bool = False,
    ) -> None:
        super().__init__(weight, max_bonus)
        if normalise and square:
            raise ValueError("ExpectedCardinality: square: cannot be used together with normalise, got both true")
        self.normalise, self.square = normalise, square

    def candidates(self, pure: Tensor, context: DiversityContext) -> Tensor:
        return (1 - context.rate) * context.current + context.rate * pure

    def measure(self, plan: Tensor, context: DiversityContext) -> Tensor:
        members, row = self._rows(context.member_rows, context), self._rows(plan @ context.columns, context)
        table = torch.cat([members, row[None]])
        if self.square:
            table = torch.cat([table, torch.cat([-row, row.new_zeros(1)])[:, None]], -1)
        return expected_cardinality(table @ table.T)

    def scan(self, context: DiversityContext) -> Tensor:
        """All candidates by one inverse, bordered by each candidate's row: O(k^2) a candidate."""
        members = self._rows(context.member_rows, context)
        new = context.current @ context.columns * (1 - context.rate) + context.rate * context.columns
        new = self._rows(new, context)
        k = len(members)
        eye = torch.eye(k, dtype=members.dtype, device=members.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(members @ members.T + eye))
        border = members @ new.T  # [k, n]
        solved, trace = inverse @ border, inverse.trace()
        if self.square:  # members' payoffs against the candidate are minus its own: L + I grows by new new^T first
            column = inverse @ new.T
            scale = 1 + (new.T * column).sum(0)
            trace = trace - column.square().sum(0) / scale
            solved = solved - column * ((column * border).sum(0) / scale)
        schur = 1 + new.square().sum(-1) - (border * solved).sum(0)
        return k + 1 - (trace + (solved.square().sum(0) + 1) / schur)

    def _rows(self, rows: Tensor, context: DiversityContext) -> Tensor:
        if self.square and not (
            context.game.symmetric and context.game.zero_sum and context.columns.shape[1] == len(context.member_plans)
        ):
            raise ValueError(
                f"ExpectedCardinality: square: needs a symmetric zero-sum game whose opponents are the members, "
                f"got {context.game.name} with {len(context.member_plans)} members, "
                f"{context.columns.shape[1]} opponents"
            )
        return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12) if self.normalise else rows


def expected_cardinality(kernel: Tensor) -> Tensor:
    """``Tr(I - (L + I)^-1)``, the sum of ``x / (1 + x)`` over the eigenvalues, of ``L`` ``[..., k, k]``: ``[...]``."""
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return kernel.shape[-1] - torch.linalg.inv(kernel + eye).diagonal(dim1=-2, dim2=-1).sum(-1)


class BehaviourResponseDiversity(Diversity):
    """Behavioural and response diversity (Liu et al. 2021).

    Behavioural: ``2 H(m) - H(e) - H(q)``, twice the Jensen-Shannon divergence of the candidate ``e`` from the
    population's mixture ``q``, ``m`` their mean. Response: a lower bound on the squared distance of the candidate's
    payoff row to the convex hull of the members' rows. With a coin in the context one of the two is used, else the sum.
    In normal-form games the behavioural part looks at the pure strategy, the response part at the one mixed in at rate.

    Args:
        weight: lambda, over both.
        max_bonus: bound on an episode's bonus.
        behaviour: coefficients of the behavioural part in successive spans of iterations.
        spans: last iteration of every span but the final one; one less than coefficients.
        response: coefficient of the response part.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        max_bonus: float = math.inf,
        behaviour: Sequence[float] = (500.0, 100.0, 50.0),
        spans: Sequence[int] = (75, 150),
        response: float = 1.0,
    ) -> None:
        super().__init__(weight, max_bonus)
        if len(behaviour) != len(spans) + 1 or list(spans) != sorted(spans):
            raise ValueError(
                f"BehaviourResponseDiversity: spans: must increase and be one less than behaviour, "
                f"got {list(spans)} for {list(behaviour)}"
            )
        self.behaviour = [_at_least_0("BehaviourResponseDiversity: behaviour", value) for value in behaviour]
        self.spans = list(spans)
        self.response = _at_least_0("BehaviourResponseDiversity: response", response)

    def coefficients(self, context: DiversityContext) -> tuple[float, float]:
        """Of the behavioural and of the response part, after the coin."""
        behaviour = self.behaviour[sum(context.iteration > last for last in self.spans)]
        return (0.0 if context.coin is False else behaviour), (0.0 if context.coin is True else self.response)

    def candidates(self, pure: Tensor, context: DiversityContext) -> Tensor:
        return (1 - context.rate) * context.current + context.rate * pure

    def measure(self, plan: Tensor, context: DiversityContext) -> Tensor:
        behaviour, response = self.coefficients(context)
        total = plan.sum() * 0.0
        if behaviour:
            mixture = context.sigma @ context.member_plans
            total = total + behaviour * 2 * jensen_shannon(plan, mixture, context.weights)
        if response:
            total = total + response * response_distance(plan @ context.columns, context.member_rows)
        return total

    def scan(self, context: DiversityContext) -> Tensor:
        behaviour, response = self.coefficients(context)
        total = torch.zeros_like(context.current)
        if behaviour:
            q = context.sigma @ context.member_plans
            q = q / q.sum()
            half = -torch.special.xlogy(q / 2, q / 2)
            whole = half.sum() - half - torch.special.xlogy((1 + q) / 2, (1 + q) / 2)  # entropy of (e_a + q) / 2
            total = total + behaviour * (2 * whole + torch.special.xlogy(q, q).sum())
        if response:
            rows = context.current @ context.columns * (1 - context.rate) + context.rate * context.columns
            total = total + response * response_distance(rows, context.member_rows)
        return total


def jensen_shannon(plan: Tensor, other: Tensor, reach: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in ``[0, ln 2]``, of two plans ``[..., sequences]`` weighted by reach and normalised.

    Logarithms of entries below 1e-12 are cut there, which keeps the derivative finite.
    """
    p, q = plan * reach, other * reach
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    log_mean = ((p + q) / 2).clamp(min=1e-12).log()
    return 0.5 * (p * (p.clamp(min=1e-12).log() - log_mean) + q * (q.clamp(min=1e-12).log() - log_mean)).sum(-1)


def response_distance(row: Tensor, rows: Tensor) -> Tensor:
    """Lower bound on the squared distance of a payoff row to the convex hull of others (Liu et al. 2021, theorem 3).

    With ``A`` the old rows as columns and ``k`` of them:
    ``sigma_min(A)^2 / k * (1 - 1^T A^+ b)^2 + |(I - A A^+) b|^2``; ``sigma_min`` is 0 where the columns are dependent.

    Args:
        row: ``b`` ``[..., m]``, differentiable.
        rows: ``[k, m]``, no gradient is passed to them.

    Returns:
        ``[...]``.
    """
    u, s, vh = torch.linalg.svd(rows.detach().T, full_matrices=False)
    k, m = rows.shape
    kept = s > s.amax() * max(k, m) * torch.finfo(s.dtype).eps
    inside = row @ u * kept
    solution = inside / torch.where(kept, s, 1.0) @ vh
    smallest = s[-1] * (kept.all() & (k <= m))
    outside = (row - inside @ u.T).square().sum(-1)
    return smallest.square() / k * (1 - solution.sum(-1)).square() + outside
