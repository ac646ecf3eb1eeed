"""Response oracles: exact, by gradient, and neural, all with the diversity term of the config.

An oracle trains all learners of an iteration at once, one update a step. It never decides who plays whom: the scheme
does (:mod:`modules.psd_psro.schemes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PlanGame, PlayRequest, TabularGame
from modules.objectives.ppo import masked_log_softmax
from modules.psd_psro.diversity import Diversity, DiversityContext
from modules.psd_psro.schemes import Learner
from modules.seeds import stream

INITIAL, PLAY, UPDATE, EVALUATE, GATE, COIN = range(6)
"""What random streams are for: second key of :func:`modules.seeds.stream`, after the run's seed."""


@dataclass
class Task:
    """What an oracle is told of one learner.

    Args:
        learner: who plays whom.
        player: the seat that its payoffs are counted in.
        vector: ``[sequences]``, its payoff vector against its opponents.
        context: for the diversity term.
        start: ``[*strategy_shape]`` strategy to go on from.
        key: identifies the learner within the iteration, for random streams.
    """

    learner: Learner
    player: int
    vector: Tensor
    context: DiversityContext
    start: Tensor
    key: int


@dataclass
class Round:
    """What is common to the learners of an iteration.

    Args:
        game: the game.
        iteration: from 0.
        seed: the run's.
        members: per population, the members' tensors, each ``[members, ...]``.
    """

    game: PlanGame
    iteration: int
    seed: int
    members: Sequence[Mapping[str, Tensor]]


class Oracle:
    """Base: ``begin`` once an iteration, ``step`` :attr:`steps` times, ``responses`` at the end."""

    steps = 1

    def begin(self, tasks: list[Task], turn: Round, resume: bool = False) -> None:
        """Set learners up. ``resume``: state is loaded right after, so nothing needs to be drawn."""
        self.tasks, self.turn = tasks, turn

    def play_request(self, step: int) -> PlayRequest | None:
        """Episodes needed for update ``step``."""
        return None

    def step(self, batch: TensorDict, step: int, diversity: Diversity) -> dict[str, Tensor]:
        """One update of all learners; returns metrics, scalars."""
        raise NotImplementedError

    def responses(self) -> list[dict[str, Tensor]]:
        """Per learner the member's tensors; ``strategy`` is always among them."""
        raise NotImplementedError

    def initial(self, game: PlanGame, player: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``count`` random members to start a population from, ``[count, ...]`` each."""
        return {"strategy": game.random_strategies(player, count, generator)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`; ``begin(..., resume=True)`` comes first."""


class ExactResponse(Oracle):
    """The best response itself, or a step of given size towards it (the published code's, for matrices).

    With a diversity term the response maximises ``payoff + lambda * diversity``: in a normal-form game over all pure
    strategies exactly. In a tree the policy-space term is convex in the plan, so the maximum is a pure strategy:
    linearising at the last response and responding again (the convex-concave procedure, Yuille and Rangarajan 2003)
    climbs monotonically to a fixed point. Pure strategies outside the hull are mostly fixed points themselves, so it
    sets out from mixtures of uniformly random play with the plain best response, whose gradient points away from what
    members play; the best of all that was found is taken.

    Args:
        rate: share of the best response in the new strategy, the rest is the learner's strategy before; 1: all.
        diversity_rate: the same in steps that use the diversity term; ``None``: ``rate``.
        diversity_probability: share of steps that use it, the others respond to payoffs alone.
        rounds: best responses per start at most, in trees with a diversity term.
        starts: shares of uniformly random play in the points to set out from, in trees with a diversity term.
    """

    def __init__(
        self,
        rate: float = 1.0,
        diversity_rate: float | None = None,
        diversity_probability: float = 1.0,
        rounds: int = 5,
        starts: Sequence[float] = (1.0, 0.5),
    ) -> None:
        for name, value in (("rate", rate), ("diversity_rate", diversity_rate)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"ExactResponse: {name} must lie in (0, 1], got {value}")
        if not 0 <= diversity_probability <= 1:
            raise ValueError(f"ExactResponse: diversity_probability must lie in [0, 1], got {diversity_probability}")
        if rounds < 1:
            raise ValueError(f"ExactResponse: rounds must be >= 1, got {rounds}")
        self.rate = rate
        self.diversity_rate = rate if diversity_rate is None else diversity_rate
        self.diversity_probability = diversity_probability
        if not starts or not all(0 < share <= 1 for share in starts):
            raise ValueError(f"ExactResponse: starts must be shares in (0, 1], got {list(starts)}")
        self.rounds = rounds
        self.starts = tuple(starts)
        self.found: list[Tensor] = []

    def begin(self, tasks: list[Task], turn: Round, resume: bool = False) -> None:
        super().begin(tasks, turn, resume)
        self.found = []

    def step(self, batch: TensorDict, step: int, diversity: Diversity) -> dict[str, Tensor]:
        self.found = []
        bonuses = []
        for task in self.tasks:
            gate = torch.rand((), generator=stream(self.turn.seed, GATE, self.turn.iteration, task.key))
            weight = diversity.weight_at(self.turn.iteration)
            diverse = weight > 0 and bool(gate < self.diversity_probability)
            task.context.rate = self.diversity_rate if diverse else self.rate
            best, bonus = self._diverse(task, diversity) if diverse else self._plain(task)
            self.found.append(self._mixed(task, best, task.context.rate))
            bonuses.append(bonus)
        return {"oracle/bonus": torch.stack(bonuses).mean()}

    def _plain(self, task: Task) -> tuple[Tensor, Tensor]:
        if task.learner.answer is not None:
            return self.turn.game.strategy_of(task.player, task.learner.answer), task.vector.new_zeros(())
        best, _ = self.turn.game.best_response(task.player, task.vector)
        return best, task.vector.new_zeros(())

    def _diverse(self, task: Task, diversity: Diversity) -> tuple[Tensor, Tensor]:
        game, context = self.turn.game, task.context
        if context.one_state:
            bonus = diversity.bonus(context)
            best, _ = game.best_response(task.player, task.vector + bonus)
            return best, game.plans(task.player, best) @ bonus
        weight = diversity.weight_at(self.turn.iteration)
        best, _ = self._plain(task)
        plan = game.plans(task.player, best)
        measure = diversity.measure(plan, context).detach()
        value = plan @ task.vector + weight * measure
        pure, even = plan, context.base
        for share in self.starts:
            point = share * even + (1 - share) * pure
            reached = value.new_full((), -torch.inf)
            for _ in range(self.rounds):
                context.current = point
                other, _ = game.best_response(task.player, task.vector + diversity.bonus(context))
                point = game.plans(task.player, other)
                other_measure = diversity.measure(point, context).detach()
                other_value = point @ task.vector + weight * other_measure
                if bool(other_value > value):
                    best, value, measure = other, other_value, other_measure
                if not bool(other_value > reached + 1e-12):  # a convex objective never loses by a step: a fixed point
                    break
                reached = other_value
        return best, weight * measure

    def _mixed(self, task: Task, best: Tensor, rate: float) -> Tensor:
        if rate == 1.0:
            return best
        game = self.turn.game
        plans = game.plans(task.player, torch.stack([best, task.start]))
        return game.strategy_of(task.player, rate * plans[0] + (1 - rate) * plans[1])

    def responses(self) -> list[dict[str, Tensor]]:
        return [{"strategy": strategy} for strategy in self.found]

    def state_dict(self) -> dict[str, Any]:
        return {"found": list(self.found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = list(state["found"])


class GradientResponse(Oracle):
    """Adam on the learner's own strategy: the point of a continuous game, or the logits of a table.

    The objective, ``payoff + lambda * diversity``, is exact, so there is no sampling noise.

    Args:
        updates: gradient steps an iteration.
        learning_rate: Adam's.
    """

    def __init__(self, updates: int = 5, learning_rate: float = 0.1) -> None:
        if updates < 1:
            raise ValueError(f"GradientResponse: updates must be >= 1, got {updates}")
        if not learning_rate > 0:
            raise ValueError(f"GradientResponse: learning_rate must be > 0, got {learning_rate}")
        self.steps = updates
        self.learning_rate = learning_rate
        self.parameters: list[Tensor] = []
        self.optimiser: torch.optim.Adam | None = None

    def begin(self, tasks: list[Task], turn: Round, resume: bool = False) -> None:
        super().begin(tasks, turn, resume)
        self.parameters = [self._to_parameters(task).requires_grad_() for task in tasks]
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.learning_rate)

    def _legal(self, task: Task) -> Tensor | None:
        return self.turn.game.legal(task.player) if isinstance(self.turn.game, TabularGame) else None

    def _to_parameters(self, task: Task) -> Tensor:
        if self._legal(task) is None:
            return task.start.detach().clone()
        return task.start.detach().clamp(min=1e-3).log()  # a pure start keeps a gradient

    def _strategy(self, task: Task, parameters: Tensor) -> Tensor:
        legal = self._legal(task)
        return parameters if legal is None else masked_log_softmax(parameters, legal).exp() * legal

    def step(self, batch: TensorDict, step: int, diversity: Diversity) -> dict[str, Tensor]:
        assert self.optimiser is not None
        self.optimiser.zero_grad()
        values, bonuses = [], []
        weight = diversity.weight_at(self.turn.iteration)
        for task, parameters in zip(self.tasks, self.parameters, strict=True):
            plan = self.turn.game.plans(task.player, self._strategy(task, parameters))
            value = plan @ task.vector
            bonus = value.new_zeros(())
            if weight > 0:
                measure = diversity.measure(plan, task.context)
                bonus = (weight * measure).clamp(-diversity.max_bonus, diversity.max_bonus)
            (-value - bonus).backward()
            values.append(value.detach())
            bonuses.append(bonus.detach())
        self.optimiser.step()
        return {"oracle/return": torch.stack(values).mean(), "oracle/bonus": torch.stack(bonuses).mean()}

    @torch.no_grad()
    def responses(self) -> list[dict[str, Tensor]]:
        return [
            {"strategy": self._strategy(task, parameters).detach()}
            for task, parameters in zip(self.tasks, self.parameters, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        assert self.optimiser is not None
        return {
            "parameters": [parameters.detach().clone() for parameters in self.parameters],
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self.optimiser is not None
        with torch.no_grad():
            for mine, saved in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
