"""Who learns against whom in an iteration, and what happens to the learners at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modules.contracts import PlanGame
from modules.population.exploitability import population_exploitability
from modules.population.meta_solvers import MetaSolver, rectified_weights, solve_symmetric
from modules.psd_psro.restricted import anytime_meta_strategy, cfr_plus


@dataclass
class Learner:
    """A response in training.

    Args:
        population: which population it belongs to; it plays that player's seat (seat 0 of a symmetric game).
        opponents: per population ``[members]`` float64, how often each member is met (its own entry is ignored in
            games whose players have a population each).
        member: the member that it replaces, or ``None``: it is appended.
        visible: members of its own population that it is to be different from: the first ``visible``.
        plans: opponents' plans per player ``[sequences]`` where they are no mixture of members, else ``None``.
        answer: ``[sequences]``, the response itself, where choosing the opponents has already found it.
    """

    population: int
    opponents: list[Tensor]
    member: int | None = None
    visible: int = 0
    plans: list[Tensor] | None = None
    answer: Tensor | None = None


@dataclass
class MetaGame:
    """What a scheme may look at when it chooses.

    Args:
        game: the game.
        payoffs: ``[players, members_0, ...]``, means of the payoff table, unknown cells 0.
        plans: per population ``[members, sequences]``.
        strategies: per population ``[members, ...]``.
        sigma: per population ``[members]``, the meta-strategies.
        response_sigma: per population ``[members]``, what responses are trained against.
        symmetric: one population plays all seats.
    """

    game: PlanGame
    payoffs: Tensor
    plans: list[Tensor]
    strategies: list[Tensor]
    sigma: list[Tensor]
    response_sigma: list[Tensor]
    symmetric: bool
    response_solver: MetaSolver


def solve(solver: MetaSolver, payoffs: Tensor, symmetric: bool) -> list[Tensor]:
    """Per population ``[members]``, the meta-game's solution."""
    return [solve_symmetric(solver, payoffs)] if symmetric else solver(payoffs)


def _padded(sigma: Tensor, size: int) -> Tensor:
    return torch.cat([sigma, sigma.new_zeros(size - sigma.shape[0])])


class Scheme:
    """One new learner per population and iteration, against the meta-strategy (PSRO; Lanctot et al. 2017)."""

    initial_members = 1

    def learners(self, meta: MetaGame) -> list[Learner]:
        return [
            Learner(population, list(meta.response_sigma), visible=len(plans))
            for population, plans in enumerate(meta.plans)
        ]

    def fresh(self, gains: Sequence[float]) -> bool:
        """Whether every population gets a fresh random member after an iteration.

        Args:
            gains: payoff of each learner against its opponents, in the order of :meth:`learners`.
        """
        return False

    def meta_strategies(self, meta: MetaGame) -> list[Tensor] | None:
        """The scheme's own solution of the meta-game, where it has one."""
        return None

    def plans(self, meta: MetaGame) -> list[Tensor] | None:
        """Per player ``[sequences]``, the solution's plans, where they are no mixture of members."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back :meth:`state_dict`."""


class Sequential(Scheme):
    """PSRO's scheme under its own name; with exact responses and a Nash solver it is Double Oracle (McMahan 2003).

    A meta-strategy leaves most members out, and a response to it alone may do anything in information states that only
    they lead to. With ``uniform_share`` some of the opponents are members drawn alike, as in a meta-strategy whose
    probabilities have a floor (Lanctot et al. 2017, section 3.2); the meta-strategy itself stays as it is.

    Args:
        uniform_share: share of a response's opponents that are drawn from all members alike; 0: Double Oracle, 1:
            fictitious self-play.
    """

    def __init__(self, uniform_share: float = 0.0) -> None:
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"Sequential: uniform_share must lie in [0, 1], got {uniform_share}")
        self.uniform_share = uniform_share

    def learners(self, meta: MetaGame) -> list[Learner]:
        found, share = super().learners(meta), self.uniform_share
        if share > 0:
            for learner in found:
                learner.opponents = [(1 - share) * sigma + share / len(sigma) for sigma in learner.opponents]
        return found


class Pipeline(Scheme):
    """P-PSRO (McAleer et al. 2020): the last ``learners`` members train at once, each against those below it.

    Learner ``l`` meets the meta-strategy of the fixed members and the active ones below it. When the lowest learner's
    payoff no longer grows it is fixed and a fresh one joins at the top. One learner is PSRO.

    Args:
        learners: active members.
        plateau: relative gain of the lowest learner's payoff below which it is fixed.
        offset: added to payoffs so that relative gains have a meaning; 1 for payoffs in [-1, 1].
    """

    def __init__(self, learners: int = 2, plateau: float = 0.03, offset: float = 1.0) -> None:
        if learners < 1:
            raise ValueError(f"Pipeline: learners must be >= 1, got {learners}")
        self.count = learners
        self.plateau = plateau
        self.offset = offset
        self.initial_members = 1 + learners
        self.previous = 0.1

    def learners(self, meta: MetaGame) -> list[Learner]:
        found = []
        for level in range(self.count):
            index = [len(plans) - self.count + level for plans in meta.plans]
            below = meta.payoffs[(slice(None), *(slice(index[p % len(index)]) for p in range(meta.payoffs.ndim - 1)))]
            sigma = solve(meta.response_solver, below, meta.symmetric)
            for population in range(len(meta.plans)):
                opponents = [_padded(s, len(meta.plans[p])) for p, s in enumerate(sigma)]
                found.append(Learner(population, opponents, member=index[population], visible=index[population]))
        return found

    def fresh(self, gains: Sequence[float]) -> bool:
        populations = len(gains) // self.count
        lowest = sum(gains[:populations]) / populations + self.offset
        plateaued = lowest / self.previous - 1 < self.plateau if self.previous > 0 else lowest <= self.previous
        self.previous = lowest
        return plateaued

    def state_dict(self) -> dict[str, Any]:
        return {"previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.previous = float(state["previous"])


class Rectified(Scheme):
    """PSRO_rN (Balduzzi et al. 2019): a learner for each member in the meta-strategy's support, against whom it beats.

    Args:
        threshold: smallest meta-strategy probability that earns a learner.
        limit: most learners per population and iteration, those with most mass; 0: no limit.
    """

    def __init__(self, threshold: float = 0.01, limit: int = 0) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"Rectified: threshold must lie in [0, 1), got {threshold}")
        self.threshold = threshold
        self.limit = limit

    def learners(self, meta: MetaGame) -> list[Learner]:
        if meta.payoffs.shape[0] != 2:
            raise ValueError(f"Rectified: games of two players only, got {meta.payoffs.shape[0]}")
        found = []
        for population, plans in enumerate(meta.plans):
            rows = meta.payoffs[0] if population == 0 else meta.payoffs[1].T
            own = meta.response_sigma[population]
            other = meta.response_sigma[-1 - population]
            chosen = (own > self.threshold).nonzero().flatten()
            if self.limit and len(chosen) > self.limit:
                chosen = own.topk(self.limit).indices.sort().values
            for member in chosen.tolist():
                opponents = [torch.zeros_like(sigma) for sigma in meta.response_sigma]
                opponents[-1 - population] = rectified_weights(rows, other, member)
                found.append(Learner(population, opponents, visible=len(plans)))
        return found


class Anytime(Scheme):
    """Anytime PSRO (McAleer et al. 2022): the meta-strategy is the population's least exploitable mixture.

    It is found against the full game and not against the other population, so that a larger population is never more
    exploitable. The opponent that it is found against is the response: it is what the other population lacks, while a
    pure best response to the mixture found may already lie in that population's hull.

    Args:
        solver: ``"exact"``: cutting planes to 1e-10; ``"regret"``: the paper's regret minimisation.
        rounds: rounds of regret minimisation.
    """

    def __init__(self, solver: Literal["exact", "regret"] = "exact", rounds: int = 1000) -> None:
        if solver not in ("exact", "regret"):
            raise ValueError(f"Anytime: solver must be 'exact' or 'regret', got '{solver}'")
        if rounds < 1:
            raise ValueError(f"Anytime: rounds must be >= 1, got {rounds}")
        self.solver = solver
        self.rounds = rounds
        self._sizes: list[int] = []  # of the populations that the solution below is of; members are only ever added
        self._mixtures: list[Tensor] = []
        self._opponents: list[Tensor] = []
        self._cuts: list[Tensor] | None = None

    def _solve(self, meta: MetaGame) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [len(plans) for plans in meta.plans]
        if sizes != self._sizes:
            if self.solver == "exact":
                exact = population_exploitability(meta.game, meta.plans, cuts=self._cuts)
                self._mixtures, self._opponents, self._cuts = exact.mixtures, exact.opponents, exact.cuts
            else:
                found = anytime_meta_strategy(meta.game, meta.plans, self.rounds)
                self._mixtures, self._opponents = found.mixtures, found.opponents
            self._sizes = sizes
        return self._mixtures, self._opponents

    def meta_strategies(self, meta: MetaGame) -> list[Tensor]:
        return self._solve(meta)[0]

    def learners(self, meta: MetaGame) -> list[Learner]:
        mixtures, opponents = self._solve(meta)
        return [
            Learner(population, list(mixtures), visible=len(plans), answer=opponents[-1 - population])
            for population, plans in enumerate(meta.plans)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "sizes": list(self._sizes),
            "mixtures": list(self._mixtures),
            "opponents": list(self._opponents),
            "cuts": self._cuts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sizes, self._cuts = list(state["sizes"]), state["cuts"]
        self._mixtures, self._opponents = list(state["mixtures"]), list(state["opponents"])


class ExtensiveFormOracle(Scheme):
    """XDO (McAleer et al. 2021): mixes members' actions in every information state, not whole members.

    The restricted game allows, in each information state, the actions that some member takes there; CFR+ solves it and
    responses are trained against its solution.

    Args:
        iterations: CFR+ iterations at most.
        tolerance: gap of the restricted game at which CFR+ stops.
    """

    def __init__(self, iterations: int = 2000, tolerance: float = 1e-4) -> None:
        if iterations < 1:
            raise ValueError(f"ExtensiveFormOracle: iterations must be >= 1, got {iterations}")
        self.iterations = iterations
        self.tolerance = tolerance
        self._known: tuple[list[Tensor], list[Tensor]] | None = None  # members' plans and the solution of their game

    def plans(self, meta: MetaGame) -> list[Tensor]:
        known = self._known
        if known is not None and all(a is b for a, b in zip(known[0], meta.plans, strict=True)):
            return known[1]  # asked for twice an iteration: to measure it and to respond to it
        if meta.symmetric or meta.strategies[0].ndim != 3:
            raise ValueError(f"ExtensiveFormOracle: needs a population per player in tables, got {meta.game.name}")
        allowed = [(tables > 0).any(0) for tables in meta.strategies]
        plans, _ = cfr_plus(meta.game, allowed, self.iterations, self.tolerance)  # pyright: ignore[reportArgumentType]
        self._known = (list(meta.plans), list(plans))
        return list(plans)

    def learners(self, meta: MetaGame) -> list[Learner]:
        found = super().learners(meta)
        plans = self.plans(meta)
        for learner in found:
            learner.plans = plans
        return found
