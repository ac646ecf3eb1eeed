"""What a population of networks offers to be measured by: games on demand, opponents trained against it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import AssuranceError, Subject
from modules.contracts import PlaysGames
from modules.psd_psro.assurance import SEED, Population, card
from modules.psd_psro.hull import sampled_hull
from modules.psd_psro.policies import SeatedPolicies, learn, own_decisions
from modules.seeds import stream, stream_seed

if TYPE_CHECKING:
    from modules.psd_psro.sampled import SampledPSRO

Against = Literal["solution", "random"]
TRAINING: Mapping[str, tuple[int, int]] = {"quick": (10, 512), "rice": (50, 1024), "deep": (250, 2048)}
"""Updates, and games of each, of a response that a suite trains."""
FIXED_GAMES = 64
"""Games in whose decisions the policies' answers are looked at."""


def played_subject(module: SampledPSRO) -> Subject:
    """The subject of a module that knows its game by play alone; untrained, its population is the first members.

    Raises:
        AssuranceError: data that do not play games on demand.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, PlaysGames):
        raise AssuranceError(
            f"{type(module).__name__}: assurance plays games, which {type(data).__name__} cannot: use "
            "datamodules.GameDataModule with expand: false"
        )
    with torch.inference_mode(False), torch.no_grad():
        if module.payoff_table is None:
            module.initialise()
        tensors: dict[str, Tensor] = {}
        for number, members in enumerate(module.members):
            tensors |= {f"{number}.{name}": value for name, value in members.stacked().items()}
        tensors |= {f"meta_strategy_{p}": sigma for p, sigma in enumerate(module.meta_strategies)}
    population = Population(tensors)
    trials = PlayedGame(module, data, population)
    game = module.the_game
    return Subject("game", population, trials.capabilities(), card(type(module).__name__, game.name, game.num_players))


class PlayedGame:
    """The capabilities of ``modules/assurance/probes/games.py`` by games; nothing about the game is known exactly.

    Args:
        module: set up; it lends its networks and its learner.
        data: plays.
        population: the members' networks ``<population>.<network>.<parameter>`` ``[members, ...]`` and
            ``meta_strategy_<i>``.
    """

    def __init__(self, module: SampledPSRO, data: PlaysGames, population: Population) -> None:
        self.module, self.data, self.population = module, data, population
        self.game, self.networks = module.the_game, module.networks
        self.players = range(self.game.num_players)
        self._responses: dict[tuple[Against, str], list[dict[str, Tensor]]] = {}
        self._seen: TensorDict | None = None

    def capabilities(self) -> dict[str, Any]:
        offered: dict[str, Any] = {
            "response_gains": self.response_gains,
            "games_against_random": self.against_random,
            "solution_games": self.solution_games,
            "member_games": self.member_games,
            "meta_strategies": self.meta_strategies,
            "probability_departures": self.departures,
            "outputs": self.outputs,
        }
        if self.game.zero_sum and self.game.num_players == 2:
            offered["joint_gain"] = lambda: ("two players, zero-sum: 0 by definition", 0.0)
        return offered

    # -- who plays ----------------------------------------------------------------------------------------------------
    def meta_strategies(self) -> list[Tensor]:
        """Per population ``[members]``."""
        return [self.population[f"meta_strategy_{p}"] for p in range(self.module.populations)]

    def _actors(self, population: int) -> dict[str, Tensor]:
        """``[members, ...]`` for :class:`~modules.psd_psro.policies.ActorNetworks`."""
        names = [name for name in self.module.members[population].names if name.startswith("actor.")]
        weights = self.networks.weights({name: self.population[f"{population}.{name}"] for name in names})
        return {name: value.to(self.module.place) for name, value in weights.items()}

    def _of(self, player: int) -> int:
        return 0 if self.game.symmetric else player

    def _size(self, population: int) -> int:
        return len(self.population[f"meta_strategy_{population}"])

    def policy(self, newcomers: Mapping[int, Mapping[str, Tensor]] | None = None) -> Policy:
        """Plays members, and after them in their population a newcomer ``[1, ...]``; seat -1 plays at random."""
        stacks = [self._actors(p) for p in range(self.module.populations)]
        for p, actors in (newcomers or {}).items():
            stacks[p] = {name: torch.cat([value, actors[name]]) for name, value in stacks[p].items()}
        return Policy(SeatedPolicies(self.networks, stacks))

    def _drawn(self, games: int, generator: torch.Generator) -> Tensor:
        """``[games, players]``: members drawn from the meta-strategies."""
        columns = [
            torch.multinomial(self.meta_strategies()[self._of(player)].cpu(), games, True, generator=generator)
            for player in self.players
        ]
        return torch.stack(columns, 1).to(self.module.place)

    # -- games --------------------------------------------------------------------------------------------------------
    def solution_games(self, seed: int, count: int) -> dict[str, Tensor]:
        """``returns`` ``[count, players]``; ``illegal`` ``[count]`` bool: a decision gave an illegal action mass."""
        policy = self.policy()
        batch = self.data.play_games(policy.lawful, self._drawn(count, stream(seed, 0)), stream_seed(seed, 1))
        game, probabilities, legal = self._decisions(policy, batch)
        broken = ((probabilities != 0) & ~legal).any(-1)
        illegal = torch.zeros(count, dtype=torch.bool, device=game.device)
        illegal[game[broken]] = True
        return {"returns": batch["returns"], "illegal": illegal}

    def _decisions(self, policy: Policy, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """Of every decision its game, what the policy says and what is legal."""
        game, move = (batch["player"] >= 0).nonzero(as_tuple=True)
        player, legal = batch["player"][game, move], batch["legal"][game, move]
        seat = batch["seats"][game, player]
        return game, policy(batch["observation"][game, move], legal, player, seat), legal

    def member_games(self, seed: int, count: int) -> dict[str, Tensor]:
        """Each member against the solution, in every game of it: ``gains`` ``[count, members]`` of a population that
        plays both seats, on the scale of NashConv; ``distances`` ``[count]``, log of how much likelier each member's
        own actions are than under the nearest mixture of its population's others, mean over members."""
        gains, distances = [], []
        for population in range(self.module.populations):
            members = self._size(population)
            games = members * count
            who = torch.arange(members, device=self.module.place).repeat_interleave(count)
            seats = self._drawn(games, stream(seed, population, 0))
            own = torch.full((games,), population, device=seats.device)
            if self.game.symmetric:
                own = torch.arange(games, device=seats.device) % 2
            seats[torch.arange(games, device=seats.device), own] = who
            batch = self.data.play_games(self.policy().lawful, seats, stream_seed(seed, population, 1))
            returns = batch["returns"].gather(1, own.unsqueeze(1)).view(members, count)
            gains.append(2 * returns.T)
            if members > 1:
                distances.append(self._distances(population, batch, own).view(members, count))
        return {
            "gains": gains[0] if self.game.symmetric else torch.empty(count, 0),
            "distances": torch.cat(distances).mean(0) if distances else torch.empty(0),
        }

    def _distances(self, population: int, batch: TensorDict, seats: Tensor) -> Tensor:
        """``[members, games of each]``."""
        own = own_decisions(self.networks, batch, seats)
        actors = self._actors(population)
        members = len(actors["weight_0"])
        likely = self.networks.log_likelihoods(
            actors, own.features, own.legal, own.action, own.episode, len(batch)
        ).view(members, members, -1)  # [by whom, played by whom, games]
        found = []
        for member in range(members):
            others = torch.cat([likely[:member, member], likely[member + 1 :, member]])
            found.append(sampled_hull(likely[member, member], others)[0])
        return torch.stack(found)

    def departures(self) -> dict[str, float]:
        found = {"meta-strategies": max(_departure(sigma) for sigma in self.meta_strategies())}
        policy = self.policy()
        seats = self._drawn(FIXED_GAMES, stream(SEED, 0))
        batch = self.data.play_games(policy.lawful, seats, stream_seed(SEED, 1))
        _, probabilities, legal = self._decisions(policy, batch)
        return found | {"members' actions": _departure(probabilities * legal)}

    def outputs(self) -> Tensor:
        """Probabilities of all members' actions in games that were played at random."""
        if self._seen is None:
            seats = torch.full((FIXED_GAMES, len(self.players)), -1, device=self.module.place)
            self._seen = self.data.play_games(self.policy().lawful, seats, stream_seed(SEED, 2))
        batch, parts = self._seen, []
        for player in self.players:
            own = own_decisions(self.networks, batch, torch.full((FIXED_GAMES,), player, device=self.module.place))
            policies = self.networks.log_policies(self._actors(self._of(player)), own.features, own.legal).exp()
            parts.append(torch.einsum("mra,m->ra", policies, self.meta_strategies()[self._of(player)].to(policies)))
        return torch.cat(parts).detach()

    # -- trained opponents --------------------------------------------------------------------------------------------
    def response_gains(self, seed: int, count: int, effort: str) -> tuple[str, Tensor]:
        """How the response was found, and ``[count]``: what responses gain, summed over seats, a game of each."""
        newcomers = self._trained("solution", effort)
        gains = torch.zeros(count, dtype=torch.float64, device=self.module.place)
        for seat in self.players:
            seats = self._drawn(count, stream(seed, seat, 0))
            seats[:, seat] = self._size(self._of(seat))
            batch = self.data.play_games(self.policy(newcomers).lawful, seats, stream_seed(seed, seat, 1))
            gains += batch["returns"][:, seat]
        if not self.game.zero_sum:  # else the solution's own games add up to 0
            gains -= self.solution_games(stream_seed(seed, 99), count)["returns"].sum(1)
        updates, games = TRAINING[effort]
        return f"responses by PPO, {updates} updates of {games} games: a lower bound", gains

    def against_random(self, seed: int, count: int, effort: str) -> dict[str, Tensor]:
        """Returns against random opponents, summed over seats, ``[count]``: ``solution``, ``random``, ``response``."""
        newcomers = self._trained("random", effort)
        found = {}
        for number, name in enumerate(("solution", "random", "response")):
            total = torch.zeros(count, dtype=torch.float64, device=self.module.place)
            for seat in self.players:
                seats = torch.full((count, len(self.players)), -1, device=self.module.place)
                if name == "solution":
                    seats[:, seat] = self._drawn(count, stream(seed, seat, 2))[:, seat]
                elif name == "response":
                    seats[:, seat] = self._size(self._of(seat))
                policy = self.policy(newcomers).lawful
                total += self.data.play_games(policy, seats, stream_seed(seed, number, seat, 3))["returns"][:, seat]
            found[name] = total
        return found

    def _trained(self, against: Against, effort: str) -> dict[int, dict[str, Tensor]]:
        """Population -> the actor of its response; the same whenever it is asked for."""
        if (against, effort) not in self._responses:
            with torch.inference_mode(False), torch.enable_grad():
                self._responses[against, effort] = [
                    self._train(p, against, *TRAINING[effort]) for p in range(self.module.populations)
                ]
        return dict(enumerate(self._responses[against, effort]))

    def _train(self, population: int, against: Against, updates: int, games: int) -> dict[str, Tensor]:
        kind = int(against == "random")
        learner = copy.deepcopy(self.module.response)
        learner.start(*self.module.nothing_seen(), 1, stream(SEED, kind, population), None)
        own = torch.full((games,), population, device=self.module.place)
        if self.game.symmetric:
            own = torch.arange(games, device=self.module.place) % 2
        every = torch.arange(games, device=self.module.place)
        for update in range(updates):
            seats = self._drawn(games, stream(SEED, kind, population, update, 0))
            if against == "random":
                seats.fill_(-1)
            seats[every, own] = self._size(population)
            policy = self.policy({population: self.networks.weights(learner.params())})
            batch = self.data.play_games(policy.lawful, seats, stream_seed(SEED, kind, population, update, 1))
            returns = batch["returns"].gather(1, own.unsqueeze(1)).squeeze(1)
            seed = stream_seed(SEED, kind, population, update, 2) % 2**31
            learn(learner, own_decisions(self.networks, batch, own), returns, seed)
        return {name: value.clone() for name, value in self.networks.weights(learner.params()).items()}


class Policy:
    """Seated members; seat -1 plays all legal actions alike.

    Args:
        members: whoever has another seat.
    """

    def __init__(self, members: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.members = members

    def __call__(self, observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        probabilities = (legal / legal.sum(1, keepdim=True)).to(observation.dtype)
        rows = (seat >= 0).nonzero().squeeze(1)
        if len(rows):
            said = self.members(observation[rows], legal[rows], player[rows], seat[rows])
            probabilities = probabilities.index_copy(0, rows, said.to(probabilities.dtype))
        return probabilities

    def lawful(self, observation: Tensor, legal: Tensor, player: Tensor, seat: Tensor) -> Tensor:
        """The same with what is illegal left out: a game goes on, and what was said is looked at afterwards."""
        said = self(observation, legal, player, seat) * legal
        total = said.sum(1, keepdim=True)
        return torch.where(total > 0, said / total.clamp(min=1e-30), legal / legal.sum(1, keepdim=True))


def _departure(rows: Tensor) -> float:
    """How far rows ``[..., n]`` are from distributions."""
    return float(torch.maximum((rows.sum(-1) - 1).abs().max(), (-rows).max()).clamp(min=0))
