"""Neural response oracles on games that are played from tables: PPO or DQN learners against opponents' mixtures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import PlanGame, PlayRequest, TabularGame
from modules.population.neural import NeuralResponse
from modules.psd_psro.diversity import Diversity, PolicySpaceDiversity
from modules.psd_psro.hull import state_action_bonus
from modules.psd_psro.oracles import INITIAL, PLAY, UPDATE, Oracle, Round, Task
from modules.seeds import stream


@runtime_checkable
class PlayedGame(TabularGame, Protocol):
    """A :class:`TabularGame` whose moves can be found in its plans.

    ``seats`` lists, for a population, the (player, first state) pairs that its table covers: one seat, or both of a
    symmetrised game.
    """

    def sequence_of(self, player: int, state: Tensor, action: Tensor) -> Tensor:
        """Sequence after ``action`` in ``state``; 0, the empty one, where ``state`` is -1."""
        ...

    def seats(self, population: int) -> list[tuple[int, int]]: ...

    def num_states(self, player: int) -> int:
        """Information states of the seat ``player``."""
        ...


class NeuralOracle(Oracle):
    """Trains a network per learner from sampled episodes; the member it becomes is the network and its table.

    Episodes are gathered from all ranks before the update, in the order of their streams: every rank takes the same
    step, and any number of ranks trains the same weights. What is shared out is the play.

    The diversity term is added to the terminal return of each episode. ``bonus: exact`` linearises the measure at the
    learner's policy, exactly, and pays each episode by its last own move; ``state_action`` is the paper's estimate from
    visited states, which also serves as a direct loss.

    Args:
        response: the learner, PPO or DQN.
        updates: updates (one batch of episodes each) an iteration.
        episodes: episodes per learner and update, over all ranks; a multiple of the datamodule's streams.
        init: weights to start from: ``fresh``, ``previous`` (the newest member's), or ``nash_sample`` (a member drawn
            from the meta-strategy). Active members of a pipeline always go on from their own.
        bonus: how the diversity term is estimated.
        direct_loss: with ``state_action``, also follow the gradient of the divergence (step 5).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        response: NeuralResponse,
        updates: int = 100,
        episodes: int = 1024,
        init: Literal["fresh", "previous", "nash_sample"] = "fresh",
        bonus: Literal["exact", "state_action"] = "exact",
        direct_loss: bool = False,
    ) -> None:
        if updates < 1:
            raise ValueError(f"NeuralOracle: updates must be >= 1, got {updates}")
        if episodes < 1:
            raise ValueError(f"NeuralOracle: episodes must be >= 1, got {episodes}")
        if direct_loss and bonus != "state_action":
            raise ValueError("NeuralOracle: direct_loss needs bonus: state_action, got bonus: exact")
        self.response = response
        self.steps = updates
        self.episodes = episodes
        self.init = init
        self.bonus = bonus
        self.direct_loss = direct_loss
        self.stacks: dict[int, NeuralResponse] = {}
        self._tables: dict[int, Tensor] = {}

    # -- setting up ---------------------------------------------------------------------------------------------------
    @staticmethod
    def _played(game: PlanGame) -> PlayedGame:
        if not isinstance(game, PlayedGame):
            raise ValueError(f"NeuralOracle: {game.name} has no information states to play: use ExactResponse")
        return game

    def initial(self, game: PlanGame, player: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        played = self._played(game)
        stack = copy.deepcopy(self.response)
        stack.start(played.observations(player), played.legal(player), count, generator)
        return self._member(stack)

    @staticmethod
    def _member(stack: NeuralResponse) -> dict[str, Tensor]:
        params = {f"params.{name}": value for name, value in stack.params().items()}
        return {"strategy": stack.tables().double(), **params}

    def begin(self, tasks: list[Task], turn: Round, resume: bool = False) -> None:
        super().begin(tasks, turn, resume)
        game = self._played(turn.game)
        self.by_population: dict[int, list[Task]] = {}
        for task in tasks:
            self.by_population.setdefault(task.learner.population, []).append(task)
        self.tasks = [task for group in self.by_population.values() for task in group]
        if any(task.learner.plans is not None for task in tasks):
            raise ValueError(
                "NeuralOracle: plays against members only; mixtures in information states (XDO) need ExactResponse"
            )
        self._tables = {}
        for population, group in self.by_population.items():
            player = group[0].player
            stack = self.stacks.setdefault(population, copy.deepcopy(self.response))
            if resume:
                stack.bind(game.observations(player), game.legal(player))
                continue
            generator = stream(turn.seed, INITIAL, turn.iteration, population)
            stack.start(
                game.observations(player), game.legal(player), len(group), generator, self._weights(group, population)
            )

    def _weights(self, group: list[Task], population: int) -> dict[str, Tensor] | None:
        """Weights to go on from, ``None``: fresh ones."""
        members = self.turn.members[population]
        count = len(members["strategy"])
        if all(task.learner.member is not None for task in group):
            chosen = [int(task.learner.member) for task in group]  # pyright: ignore[reportArgumentType]
        elif self.init == "previous":
            chosen = [count - 1 for _ in group]
        elif self.init == "nash_sample":
            generator = stream(self.turn.seed, INITIAL, self.turn.iteration, population, 1)
            chosen = torch.multinomial(
                group[0].context.sigma, len(group), replacement=True, generator=generator
            ).tolist()
        else:
            return None
        return {name.removeprefix("params."): members[name][chosen] for name in members if name.startswith("params.")}

    # -- playing ------------------------------------------------------------------------------------------------------
    def play_request(self, step: int) -> PlayRequest:
        """Groups: for each learner one per seat that its population takes."""
        game = self._played(self.turn.game)
        for population, stack in self.stacks.items():
            if population not in self._tables:
                self._tables[population] = stack.tables()
        populations = len(self.turn.members)
        seats = {p: game.seats(p) for p in range(populations)}
        population_of = {player: (p, first) for p in seats for player, first in seats[p]}
        sizes = [len(members["strategy"]) for members in self.turn.members]
        tables = []
        for player in range(game.num_players):
            population, first = population_of[player]
            rows = slice(first, first + self._states(player))
            parts = [self.turn.members[population]["strategy"][:, rows].float()]
            if population in self._tables:
                parts.append(self._tables[population][:, rows])
            tables.append(torch.cat(parts))
        weights: list[list[Tensor]] = [[] for _ in range(game.num_players)]
        for population, group in self.by_population.items():
            for index, task in enumerate(group):
                for seat, _ in seats[population]:
                    for player in range(game.num_players):
                        row = torch.zeros(len(tables[player]), dtype=torch.float64)
                        other = population_of[player][0]
                        if player == seat:
                            row[sizes[population] + index] = 1.0
                        else:
                            row[: sizes[other]] = task.learner.opponents[other]
                        weights[player].append(row)
        shares = max(len(seats[p]) for p in seats)
        return PlayRequest(
            tables,
            [torch.stack(rows) for rows in weights],
            self.episodes // shares,
            (PLAY, self.turn.iteration, step),
        )

    def _states(self, player: int) -> int:
        return int(self.turn.game.num_states(player))  # pyright: ignore[reportAttributeAccessIssue]

    # -- learning -----------------------------------------------------------------------------------------------------
    def step(self, batch: TensorDict, step: int, diversity: Diversity) -> dict[str, Tensor]:
        game = self._played(self.turn.game)
        order = batch["group"].argsort(stable=True)
        groups = batch[order].reshape(-1, int((batch["group"] == 0).sum()))  # [groups, episodes]
        weight = diversity.weight_at(self.turn.iteration)
        metrics: dict[str, list[Tensor]] = {}
        first = 0
        for population, group in self.by_population.items():
            stack, seats = self.stacks[population], game.seats(population)
            block = groups[first : first + len(group) * len(seats)].reshape(len(group), len(seats), -1)
            first += len(group) * len(seats)
            by_seat: Any = TensorDict.stack([own_moves(block[:, i], *seat) for i, seat in enumerate(seats)], 1)
            rows: TensorDict = by_seat.reshape(len(group), -1)  # [learners, episodes of all seats, own moves]
            bonus = torch.zeros_like(rows["episode_return"])
            if weight > 0:
                bonus = self._bonus(group, population, rows, diversity, weight)
                if self.direct_loss:
                    self._set_direct_loss(stack, group, population, weight, diversity)
            metrics.setdefault("oracle/return", []).append(rows["episode_return"].mean())
            metrics.setdefault("oracle/bonus", []).append(bonus.mean())
            moves = rows["state"].shape[-1]
            flat = {key: rows[key].reshape(len(group), -1) for key in ("state", "action", "probability", "next_state")}
            total = (rows["episode_return"] + bonus).unsqueeze(-1).expand(-1, -1, moves)
            learnt = stack.update(
                TensorDict(
                    {
                        **flat,
                        "episode_return": total.reshape(len(group), -1).float(),
                        "valid": flat["state"] >= 0,
                    },
                    batch_size=flat["state"].shape,
                ),
                seed=stream(self.turn.seed, UPDATE, self.turn.iteration, step, population).initial_seed() % 2**31,
            )
            for key, value in learnt.items():
                metrics.setdefault(f"oracle/{key}", []).append(value.mean())
        self._tables = {}
        return {key: torch.stack([value.double() for value in values]).mean() for key, values in metrics.items()}

    def _bonus(
        self, group: list[Task], population: int, rows: TensorDict, diversity: Diversity, weight: float
    ) -> Tensor:
        """``[learners, episodes]`` added to each episode's return."""
        game = self._played(self.turn.game)
        tables = self._tables[population].double()
        found = []
        for index, task in enumerate(group):
            state, action = rows["state"][index], rows["action"][index]
            if self.bonus == "exact":
                plan = game.plans(task.player, tables[index])
                by_sequence = diversity.terminal_bonus(task.context, plan)
                last = (state >= 0).sum(-1, keepdim=True) - 1
                at = last.clamp(min=0)
                final = torch.where(last >= 0, state.gather(-1, at), -1).squeeze(-1)
                sequence = game.sequence_of(task.player, final, action.gather(-1, at).squeeze(-1))
                found.append(by_sequence[sequence])
            else:
                found.append(weight * self._state_action(task, population, tables[index], state, diversity)[0])
        return torch.stack(found)

    def _state_action(
        self, task: Task, population: int, table: Tensor, state: Tensor, diversity: Diversity
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(diversity, PolicySpaceDiversity):
            raise ValueError(
                f"NeuralOracle: bonus: state_action estimates PolicySpaceDiversity only, got {type(diversity).__name__}"
            )
        members = self.turn.members[population]["strategy"][: task.learner.visible]
        game = self._played(self.turn.game)
        episode, _ = (state >= 0).nonzero(as_tuple=True)
        visited = state[state >= 0]
        result = state_action_bonus(
            table[visited].log(),
            members[:, visited].log(),
            game.legal(task.player)[visited],
            episode,
            state.shape[0],
            eps=diversity.eps,
        )
        return result.bonus.clamp(max=diversity.max_bonus), result.nearest

    def _set_direct_loss(
        self, stack: NeuralResponse, group: list[Task], population: int, weight: float, diversity: Diversity
    ) -> None:
        members = self.turn.members[population]["strategy"]
        assert isinstance(diversity, PolicySpaceDiversity)
        eps = diversity.eps
        legal = self._played(self.turn.game).legal(group[0].player)
        uniform = legal / legal.sum(-1, keepdim=True)
        visible = min(task.learner.visible for task in group)
        others = ((1 - eps) * members[:visible] + eps * uniform).float().clamp(min=1e-30).log()

        def loss(log_policy: Tensor, rows: TensorDict) -> Tensor:
            """-lambda * mean over visited states of KL to the member that is nearest on them."""
            valid = rows["valid"]
            counts = torch.zeros(log_policy.shape[:2]).scatter_add_(1, rows["state"], valid.float())
            policy = torch.where(legal, log_policy.exp(), 0.0)
            own = torch.where(legal, log_policy, 0.0)
            kl = (policy.unsqueeze(1) * (own.unsqueeze(1) - others)).sum(-1)  # [learners, members, states]
            distance = (kl * counts.unsqueeze(1)).sum(-1) / counts.sum(-1, keepdim=True).clamp(min=1)
            return -weight * distance.amin(-1)

        stack.extra_loss = loss

    def responses(self) -> list[dict[str, Tensor]]:
        found = []
        for population, group in self.by_population.items():
            members = self._member(self.stacks[population])
            found += [{name: value[index] for name, value in members.items()} for index in range(len(group))]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"stacks": {str(p): stack.state_dict() for p, stack in self.stacks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for population, saved in state["stacks"].items():
            self.stacks[int(population)].load_state_dict(saved)


def own_moves(episodes: TensorDict, seat: int, first_state: int) -> TensorDict:
    """The moves of one seat, packed to the front.

    Args:
        episodes: ``[learners, episodes]`` with ``info_state``, ``action``, ``player``, ``probability`` ``[.., moves]``
            and ``returns`` ``[.., players]``.
        seat: whose moves.
        first_state: added to its states.

    Returns:
        ``[learners, episodes]`` with ``state``, ``action``, ``probability``, ``next_state`` ``[.., moves]``, states -1
        where there is none, and ``episode_return``.
    """
    own = episodes["player"] == seat
    order = (~own).long().argsort(dim=-1, stable=True)
    own = own.gather(-1, order)
    state = torch.where(own, episodes["info_state"].gather(-1, order) + first_state, -1)
    none = torch.full_like(state[..., :1], -1)
    return TensorDict(
        {
            "state": state,
            "action": episodes["action"].gather(-1, order),
            "probability": episodes["probability"].gather(-1, order),
            "next_state": torch.cat([state[..., 1:], none], -1),
            "episode_return": episodes["returns"][..., seat],
        },
        batch_size=episodes.batch_size,
    )
