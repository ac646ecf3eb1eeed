"""Solvers of games in which a player is held to its population: XDO's restricted game and APSRO's inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from modules.contracts import PlanGame, TabularGame


@runtime_checkable
class HasCounterfactuals(Protocol):
    """A game in sequence form that gives values of actions, which CFR needs and payoff vectors alone do not tell."""

    def counterfactual_values(self, player: int, table: Tensor, payoff_vector: Tensor) -> Tensor:
        """``payoff_vector`` at (state, action) plus the values, under ``table``, of the own states that follow.

        Args:
            player: counted from 0.
            table: ``[states, actions]`` the player's behaviour.
            payoff_vector: ``[sequences]``.

        Returns:
            ``[states, actions]``, 0 at illegal actions.
        """
        ...


@runtime_checkable
class CounterfactualGame(TabularGame, HasCounterfactuals, Protocol):
    """What :func:`cfr_plus` takes."""


@dataclass
class AnytimeSolution:
    """What :func:`anytime_meta_strategy` returns, one entry per population.

    Args:
        mixtures: ``[k]`` float64, averaged meta-strategies.
        guarantees: scalars; the player's payoff with its mixture against a best response of the unrestricted opponent.
        gaps: scalars; how far the guarantee can at most be from the best that the population's mixtures can have.
        nashconv: scalar; sum over players of the best-response gains against the mixtures. It is the population
            exploitability up to the sum of gaps (twice the gap where one population serves both seats).
        opponents: plans ``[sequences of the opponent]``, the averaged best responses that hold all mixtures of the
            population to ``guarantee + gap``.
    """

    mixtures: list[Tensor]
    guarantees: list[Tensor]
    gaps: list[Tensor]
    nashconv: Tensor
    opponents: list[Tensor]


def _check_zero_sum(name: str, game: PlanGame) -> None:
    if game.num_players != 2 or not game.zero_sum:
        raise ValueError(
            f"{name}: game: must be a zero-sum game of two players, got {game.name} "
            f"({game.num_players} players, zero_sum={game.zero_sum})"
        )


def _positive(name: str, field: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {field}: must be above 0, got {value}")


def _match(regret: Tensor, uniform: Tensor) -> Tensor:
    """Regret matching: probabilities proportional to regrets (at least 0) in the last dimension, else ``uniform``."""
    total = regret.sum(-1, keepdim=True)
    return torch.where(total > 0, regret / torch.where(total > 0, total, 1.0), uniform)


def cfr_plus(
    game: CounterfactualGame,
    allowed: Sequence[Tensor],
    iterations: int = 1000,
    tolerance: float = 1e-4,
    check_every: int = 50,
) -> tuple[list[Tensor], Tensor]:
    """CFR+ (Tammelin 2014) on the game in which each state offers only its allowed actions (XDO).

    Alternating updates, regret matching+ in every state at once, plans averaged with linear weights (averaging plans is
    averaging behaviour weighted by own reach).

    Args:
        game: two-player zero-sum, in sequence form.
        allowed: per player ``[states, actions]`` bool; the union of the members' actions, for XDO.
        iterations: updates of both players at most.
        tolerance: the gap to stop at, in units of payoff.
        check_every: iterations between measurements of the gap.

    Returns:
        The players' average plans ``[sequences]``, and the gap, a scalar: the sum of what each player could still
        gain by a best response *within the restricted game*.

    Raises:
        ValueError: not two-player zero-sum; masks of the wrong shape; a state without a legal allowed action.
    """
    _check_zero_sum("cfr_plus", game)
    _positive("cfr_plus", "iterations", iterations)
    _positive("cfr_plus", "check_every", check_every)
    masks = []
    for player in range(2):
        legal, mask = game.legal(player), allowed[player]
        if mask.shape != legal.shape:
            raise ValueError(
                f"cfr_plus: allowed[{player}]: must be {tuple(legal.shape)} as legal(), got {tuple(mask.shape)}"
            )
        mask = mask & legal
        if not bool(mask.any(-1).all()):
            state = int((~mask.any(-1)).nonzero()[0])
            raise ValueError(
                f"cfr_plus: allowed[{player}]: must allow a legal action in every state, got none in {state}"
            )
        masks.append(mask)
    uniform = [mask.double() / mask.sum(-1, keepdim=True) for mask in masks]
    regrets = [torch.zeros_like(u) for u in uniform]
    plans = [game.plans(player, table) for player, table in enumerate(uniform)]
    tables, sums = list(uniform), [torch.zeros_like(plan) for plan in plans]
    best, best_gap = list(plans), restricted_gap(game, masks, plans)
    for step in range(1, iterations + 1):
        for player in range(2):
            vector = game.payoff_vector(player, plans)
            values = game.counterfactual_values(player, tables[player], vector)
            advantage = values - (values * tables[player]).sum(-1, keepdim=True)
            regrets[player] = (regrets[player] + advantage).clamp(min=0) * masks[player]
            tables[player] = _match(regrets[player], uniform[player])
            plans[player] = game.plans(player, tables[player])
            sums[player] = sums[player] + step * plans[player]
        if step % check_every == 0 or step == iterations:
            average = [total * (2 / (step * (step + 1))) for total in sums]
            gap = restricted_gap(game, masks, average)
            if gap < best_gap:
                best, best_gap = average, gap
            if best_gap <= tolerance:
                break
    return best, best_gap


def restricted_gap(game: CounterfactualGame, masks: Sequence[Tensor], plans: Sequence[Tensor]) -> Tensor:
    """Sum over players of what a best response within the masks would gain against the others' plans, a scalar."""
    gap = plans[0].new_zeros(())
    for player in range(2):
        vector = game.payoff_vector(player, plans)
        _, value = restricted_best_response(game, player, vector, masks[player])
        gap = gap + value - plans[player] @ vector
    return gap.clamp(min=0)


def restricted_best_response(
    game: CounterfactualGame, player: int, payoff_vector: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The table that maximises ``plan @ payoff_vector`` among those that use the mask's actions, and the maximum.

    Policy iteration: each sweep is greedy in all states at once, so it is exact after as many sweeps as a player has
    moves in a row. ``mask`` is ``[states, actions]`` bool; ties go to the first action.
    """
    table = mask.double() / mask.sum(-1, keepdim=True)
    for _ in range(len(mask) + 1):
        values = game.counterfactual_values(player, table, payoff_vector).masked_fill(~mask, -torch.inf)
        greedy = torch.nn.functional.one_hot(values.argmax(-1), mask.shape[1]).to(table.dtype)
        if torch.equal(greedy, table):
            break
        table = greedy
    return table, game.plans(player, table) @ payoff_vector


def anytime_meta_strategy(
    game: PlanGame,
    member_plans: Sequence[Tensor],
    rounds: int = 1000,
    tolerance: float = 0.0,
    check_every: int = 25,
) -> AnytimeSolution:
    """The population's least exploitable mixture by regret matching+ against best responses (APSRO).

    Each player's mixture is trained alone against an opponent who is not held to a population: the opponent best
    responds to the current mixture, the mixture's regrets are updated with the members' payoffs against that response.
    Run to convergence, a larger population is never more exploitable (McAleer et al. 2022).

    Args:
        game: two-player zero-sum.
        member_plans: per population ``[k, sequences]``; one entry alone in a symmetric game whose population serves
            both seats.
        rounds: updates at most, for each population.
        tolerance: gap to stop at, in units of payoff.
        check_every: rounds between measurements of the gap.

    Returns:
        :class:`AnytimeSolution`, of each population the averaged mixture with the best guarantee among those measured.

    Raises:
        ValueError: not two-player zero-sum; an empty population; one population in a game that is not symmetric.
    """
    _check_zero_sum("anytime_meta_strategy", game)
    _positive("anytime_meta_strategy", "rounds", rounds)
    _positive("anytime_meta_strategy", "check_every", check_every)
    if len(member_plans) != (1 if game.symmetric and len(member_plans) == 1 else 2):
        raise ValueError(
            f"anytime_meta_strategy: member_plans: must hold a population per player, or one in a symmetric game, "
            f"got {len(member_plans)} for {game.name}"
        )
    if any(members.ndim != 2 or not len(members) for members in member_plans):
        shapes = [tuple(members.shape) for members in member_plans]
        raise ValueError(f"anytime_meta_strategy: member_plans: must be [k, sequences], k > 0, got {shapes}")
    found = [_least_exploitable(game, p, m, rounds, tolerance, check_every) for p, m in enumerate(member_plans)]
    mixtures, guarantees, gaps, opponents = (list(column) for column in zip(*found, strict=True))
    nashconv = -torch.stack(guarantees * (2 // len(guarantees))).sum()
    return AnytimeSolution(mixtures, guarantees, gaps, nashconv.clamp(min=0), opponents)


def _least_exploitable(
    game: PlanGame, player: int, members: Tensor, rounds: int, tolerance: float, check_every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixture, guarantee and gap of one player's population, and the opponent that holds it there."""
    k = len(members)
    uniform = members.new_full((k,), 1 / k)

    def answer(mixture: Tensor) -> tuple[Tensor, Tensor]:
        """The opponent's best response to a mixture: the members' payoffs ``[k]`` against it, and its plan."""
        own = mixture @ members
        plans = [own, own]
        response, _ = game.best_response(1 - player, game.payoff_vector(1 - player, plans))
        plan = game.plans(1 - player, response)
        return members @ game.payoff_vector(player, [plan, plan]), plan

    payoffs, plan = answer(uniform)
    best, guarantee, bound, opponent = uniform, uniform @ payoffs, payoffs.amax(), plan
    if k == 1:
        return best, guarantee, torch.zeros_like(guarantee), plan
    regret, sigma = torch.zeros_like(uniform), uniform
    total, responses = torch.zeros_like(uniform), torch.zeros_like(plan)
    for step in range(1, rounds + 1):
        total, responses = total + step * sigma, responses + step * plan
        regret = (regret + payoffs - sigma @ payoffs).clamp(min=0)
        sigma = _match(regret, uniform)
        if step % check_every == 0 or step == rounds:
            weight = 2 / (step * (step + 1))
            average = total / total.sum()
            value = average @ answer(average)[0]
            best = torch.where(value > guarantee, average, best)
            guarantee = torch.maximum(guarantee, value)
            reply = responses * weight
            held = (members @ game.payoff_vector(player, [reply, reply])).amax()
            opponent = torch.where(held < bound, reply, opponent)
            bound = torch.minimum(bound, held)
            if bound - guarantee <= tolerance:
                break
        payoffs, plan = answer(sigma)
    return best, guarantee, (bound - guarantee).clamp(min=0), opponent
