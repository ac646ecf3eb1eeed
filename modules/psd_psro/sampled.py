"""PSRO and PSD-PSRO on games whose tree is too large: networks act on observations and everything is sampled."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import Subject
from modules.contracts import PlayRequest, RulesGame
from modules.files import atomic_directory, write_json
from modules.population.members import Members
from modules.population.meta_solvers import MetaSolver, NashLP, deviation_payoffs, meta_values
from modules.population.neural import PPOResponse
from modules.population.payoff_table import PayoffTable
from modules.psd_psro.game_loop import GameLoop
from modules.psd_psro.hull import sampled_hull
from modules.psd_psro.oracles import EVALUATE, INITIAL, PLAY, UPDATE
from modules.psd_psro.played_assurance import played_subject
from modules.psd_psro.policies import ActorNetworks, SeatedPolicies, learn, own_decisions
from modules.psd_psro.schemes import solve as solve_meta_game
from modules.seeds import global_seed, stream


class SampledPSRO(GameLoop):
    """Policy-space response oracles by play alone: PPO responses, sampled payoff cells, a sampled hull distance.

    For games played by their rules (``GameDataModule`` with ``expand: false``). Each iteration every population trains
    one PPO learner against the meta-strategies, opponents drawn anew for every episode; its networks join the
    population, the cells that they miss are estimated from games, and the meta-game is solved. The policy that acts, in
    training, in payoffs and in the diversity term, is the actor's softmax over legal actions.

    Policy-space diversity (Yao et al. 2023, eq. 6) is paid at the end of each of the learner's episodes as
    ``weight * (ln r_learner - ln sum_k sigma_k r_k)``, ``r`` being the probability of the episode's own actions and
    ``sigma`` the mixture of members (or the one member) nearest to the learner on the batch; by the chain rule its mean
    estimates the distance to the hull in nats.

    Nothing here is exact. Metrics per iteration: ``meta/nashconv_lower``, what the iteration's responses gained over
    the meta-strategies that they were trained against, summed over players, from the games that estimated their
    payoffs: in expectation a lower bound of those meta-strategies' NashConv, as good as the responses are, and
    ``meta/nashconv_lower_error``, its standard error; ``meta/value``, ``meta/entropy``, ``meta/support``,
    ``meta/members``; ``meta/standard_error``, the largest of a payoff cell. Per response step: ``oracle/return``,
    ``oracle/bonus`` (as added), ``oracle/hull_distance`` (nats), and those of PPO.

    Args:
        response: the learner; every member has its networks.
        meta_solver: solves the meta-game.
        updates: PPO updates an iteration.
        episodes: episodes per population and update, over all ranks; a multiple of the datamodule's streams (twice
            that where one population plays both seats).
        init: responses start from ``fresh`` networks or from the ``previous`` member's.
        hull_distance: ``none`` (PSRO), ``mixture`` (to the hull), or ``vertices`` (to the nearest member).
        weight: lambda, in units of return per nat.
        max_bonus: bounds an episode's distance on both sides, in nats, before ``weight``.
        simulations: games per payoff cell, over all ranks.
        evaluation_steps: batches that these games are played in.

    Raises:
        ValueError: a value out of range, a datamodule without played rules, or a solver that does not fit the game.
    """

    game: RulesGame | None
    summary_metrics = ("meta/nashconv_lower", "meta/support", "meta/members")
    plays_rules = True  # what GameDataModule asks for before it leaves out the tree

    def __init__(
        self,
        response: PPOResponse | None = None,
        meta_solver: MetaSolver | None = None,
        updates: int = 100,
        episodes: int = 1024,
        init: Literal["fresh", "previous"] = "fresh",
        hull_distance: Literal["none", "vertices", "mixture"] = "none",
        weight: float = 0.02,
        max_bonus: float = 10.0,
        simulations: int = 1000,
        evaluation_steps: int = 1,
    ) -> None:
        super().__init__()
        counts = (("updates", updates, 1), ("episodes", episodes, 1), ("evaluation_steps", evaluation_steps, 1))
        for name, value, least in (*counts, ("simulations", simulations, 2)):
            if value < least:
                raise ValueError(f"SampledPSRO: {name} must be >= {least}, got {value}")
        if simulations % evaluation_steps:
            raise ValueError(
                f"SampledPSRO: simulations must be a multiple of evaluation_steps ({evaluation_steps}), "
                f"got {simulations}"
            )
        if not 0 <= weight < math.inf:
            raise ValueError(f"SampledPSRO: weight must be finite and >= 0, got {weight}")
        if not max_bonus > 0:
            raise ValueError(f"SampledPSRO: max_bonus must be > 0, got {max_bonus}")
        self.response = response or PPOResponse()
        self.meta_solver = meta_solver or NashLP()
        self.updates, self.episodes_per_update, self.init = updates, episodes, init
        self.hull_distance: Literal["none", "vertices", "mixture"] = hull_distance
        self.weight, self.max_bonus = weight, max_bonus
        self.simulations, self._evaluation_steps = simulations, evaluation_steps
        self.learners: list[PPOResponse] = []

    # -- set-up -------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        game = getattr(data, "rules_game", None)
        if not isinstance(game, RulesGame):
            raise ValueError(
                f"SampledPSRO: data: needs a game played by its rules, got {type(data).__name__} without: use "
                "datamodules.GameDataModule with expand: false"
            )
        if isinstance(self.meta_solver, NashLP) and not (game.zero_sum and game.num_players == 2):
            raise ValueError(
                f"SampledPSRO: meta_solver: NashLP needs two players and zero sum, got {game.name}: use AlphaRank or "
                "ProjectedReplicator"
            )
        asked = {
            "episodes": self.episodes_per_update,
            "simulations / evaluation_steps": self.simulations // self.evaluation_steps,
        }
        self.check_shares(2 if game.symmetric else 1, **asked)
        self.game = game
        self.networks = ActorNetworks(game, self.response)
        # groups of episodes: which population learns, and in which seat
        self._groups = [(0, 0), (0, 1)] if game.symmetric else [(player, player) for player in range(game.num_players)]
        self.place = torch.device(self.trainer.strategy.root_device)

    @property
    def response_steps(self) -> int:
        return self.updates

    def digest(self) -> Mapping[str, str]:
        if self.game is None:
            return {}
        return {**self.game.digest(), "networks": f"{self.networks.mlp.widths} {self.response.activation}"}

    # -- members ------------------------------------------------------------------------------------------------------
    def initialise(self) -> None:
        game = self.the_game
        if self._take_over():
            assert self.payoff_table is not None
            payoffs = self.payoff_table.mean()
            if not len(self.payoff_table.missing()):
                self.meta_strategies = self.decide(lambda: solve_meta_game(self.meta_solver, payoffs, self.symmetric))
            return
        self.members = [Members() for _ in range(self.populations)]
        self.payoff_table = PayoffTable(game.num_players, symmetric_zero_sum=self.symmetric)
        for population in range(self.populations):
            self._append(population, self._learner(population, stream(global_seed(), INITIAL, 1 << 30, population)))
        self.meta_strategies = [torch.ones(1, dtype=torch.float64) for _ in self.members]

    def _learner(self, population: int, generator: torch.Generator, previous: bool = False) -> PPOResponse:
        learner = copy.deepcopy(self.response)
        params = {name: value[-1:] for name, value in self.members[population].stacked().items()} if previous else None
        learner.start(*self.nothing_seen(), 1, generator, params)
        return learner

    def nothing_seen(self) -> tuple[Tensor, Tensor]:
        """One row of observations and legal actions, from which a learner knows its networks' sizes."""
        inputs, actions = self.networks.inputs, self.networks.actions
        return torch.zeros(1, inputs, device=self.place), torch.ones(1, actions, dtype=torch.bool, device=self.place)

    def _append(self, population: int, learner: PPOResponse) -> None:
        assert self.payoff_table is not None
        self.members[population].extend(learner.params())
        self.payoff_table.grow(population)

    def actors(self, population: int) -> dict[str, Tensor]:
        """The members' policies, ``[members, ...]`` for :class:`~modules.psd_psro.policies.ActorNetworks`."""
        weights = self.networks.weights(self.members[population].stacked())
        return {name: value.to(self.place) for name, value in weights.items()}

    # -- playing ------------------------------------------------------------------------------------------------------
    def begin_iteration(self) -> None:
        self.learners = [
            self._learner(p, stream(global_seed(), INITIAL, self.iteration, p), self.init == "previous")
            for p in range(self.populations)
        ]

    def _population(self, player: int) -> int:
        return 0 if self.symmetric else player

    def play_request(self) -> PlayRequest:
        return self._training_games() if self.responding else self._evaluation_games()

    def _training_games(self) -> PlayRequest:
        """Groups: for each learner one per seat that its population takes; the learner comes after the members."""
        stacks = []
        for population, learner in enumerate(self.learners):
            members, own = self.actors(population), self.networks.weights(learner.params())
            stacks.append({name: torch.cat([value, own[name]]) for name, value in members.items()})
        weights = []
        for player in range(self.the_game.num_players):
            sigma = self.meta_strategies[self._population(player)]
            rows = torch.zeros(len(self._groups), len(sigma) + 1, dtype=torch.float64)
            for group, (_, seat) in enumerate(self._groups):
                if player == seat:
                    rows[group, -1] = 1.0
                else:
                    rows[group, :-1] = sigma
            weights.append(rows.to(self.place))
        episodes = self.episodes_per_update // (2 if self.symmetric else 1)
        policy = SeatedPolicies(self.networks, stacks)
        return PlayRequest((), weights, episodes, (PLAY, self.iteration, self.cursor), policy=policy)

    def _evaluation_games(self) -> PlayRequest:
        weights, episodes = self.cell_weights()
        weights = [rows.to(self.place) for rows in weights]
        policy = SeatedPolicies(self.networks, [self.actors(p) for p in range(self.populations)])
        key = (EVALUATE, self.iteration, self.cursor)
        return PlayRequest((), weights, episodes, key, returns_only=True, policy=policy)

    # -- one iteration ------------------------------------------------------------------------------------------------
    def response_step(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        batch = self.gather_episodes(batch)
        self.frames += int((batch["player"] >= 0).sum())
        self.episodes += len(batch)
        learning, seats = torch.tensor(self._groups, device=batch["group"].device)[batch["group"]].unbind(1)
        metrics: dict[str, list[Tensor]] = {}
        for population in range(self.populations):
            mine = learning == population
            for key, value in self._learn(population, batch[mine], seats[mine], step).items():
                metrics.setdefault(f"oracle/{key}", []).append(value.double().mean())
        return {key: torch.stack(values).mean() for key, values in metrics.items()}

    def _learn(self, population: int, batch: TensorDict, seats: Tensor, step: int) -> dict[str, Tensor]:
        """One PPO update from the decisions of the learner in ``seats`` ``[episodes]``."""
        own = own_decisions(self.networks, batch, seats)
        returns = batch["returns"].gather(1, seats.unsqueeze(1)).squeeze(1)
        metrics = {"return": returns.mean()}
        if self.hull_distance != "none":
            chances = own.probability.double().log()
            likelihood = torch.zeros_like(returns).index_add_(0, own.episode, chances)
            distance = self._distances(population, likelihood, own.features, own.legal, own.action, own.episode)
            bonus = self.weight * distance.clamp(-self.max_bonus, self.max_bonus)
            metrics |= {"hull_distance": distance.mean(), "bonus": bonus.mean()}
            returns = returns + bonus
        seed = stream(global_seed(), UPDATE, self.iteration, step, population).initial_seed() % 2**31
        return {**metrics, **learn(self.learners[population], own, returns, seed)}

    def _distances(
        self, population: int, own: Tensor, features: Tensor, legal: Tensor, action: Tensor, episode: Tensor
    ) -> Tensor:
        """Log of how much likelier than under the nearest mixture each episode's own actions are, ``[episodes]``."""
        assert self.hull_distance != "none"
        actors = self.actors(population)
        members = self.networks.log_likelihoods(actors, features, legal, action, episode, len(own))
        return sampled_hull(own, members, self.hull_distance)[0]

    def end_response(self) -> None:
        for population, learner in enumerate(self.learners):
            self._append(population, learner)

    def evaluation_step(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        self.add_games(batch)
        return {}

    def solve(self) -> dict[str, float]:
        assert self.payoff_table is not None
        self.check_agreement()
        gain, error = self.response_gain()
        payoffs = self.payoff_table.mean()
        self.meta_strategies = self.decide(lambda: solve_meta_game(self.meta_solver, payoffs, self.symmetric))
        return {"meta/nashconv_lower": gain, "meta/nashconv_lower_error": error, **self.measure()}

    def response_gain(self) -> tuple[float, float]:
        """What the newest members gain over the meta-strategies before them, summed over players; standard error.

        The error is that of the newest members' cells; in a zero-sum game no others enter the sum.
        """
        assert self.payoff_table is not None
        payoffs, squares = self.payoff_table.mean(), self.payoff_table.standard_error().square()
        sizes = self.payoff_table.sizes
        mixtures = self._per_player(self.meta_strategies)
        padded = [torch.cat([s, s.new_zeros(size - len(s))]) for s, size in zip(mixtures, sizes, strict=True)]
        values = meta_values(payoffs, padded)
        squared = [sigma.square() for sigma in padded]
        gains = [deviation_payoffs(payoffs, padded, p)[-1] - values[p] for p in range(len(sizes))]
        errors = [deviation_payoffs(squares, squared, p)[-1] for p in range(len(sizes))]
        error = 2 * errors[0].sqrt() if self.symmetric else torch.stack(errors).sum().sqrt()  # both seats: one sample
        return float(sum(gains)), float(error)

    def measure(self) -> dict[str, float]:
        """Figures of the meta-strategies."""
        assert self.payoff_table is not None
        values = meta_values(self.payoff_table.mean(), self._per_player(self.meta_strategies))
        return {"meta/value": float(values[0]), **self.meta_figures(), **self.largest_error()}

    def final_figures(self) -> dict[str, float]:
        return self.measure()

    def assurance_subject(self) -> Subject:
        """What suites may ask of the population, by play; of the first members before any training.

        Raises:
            AssuranceError: data that do not play games on demand.
        """
        return played_subject(self)

    def export_pretrained(self, folder: str | Path) -> None:
        """Write the solution without pickled objects, replacing ``folder`` atomically.

        ``solution.npz``: ``payoffs`` ``[players, members_0, ...]``, per population ``meta_strategy_<i>`` ``[members]``
        and the members' networks, ``members_<i>.<network>.<parameter>`` ``[members, ...]``; ``solution.json``: the
        game, the networks' widths and activation, and the figures.
        """
        assert self.payoff_table is not None
        if not self.trainer.is_global_zero:
            return
        arrays = {"payoffs": self.payoff_table.mean()}
        for index, (sigma, members) in enumerate(zip(self.meta_strategies, self.members, strict=True)):
            arrays[f"meta_strategy_{index}"] = sigma
            arrays |= {f"members_{index}.{name}": value for name, value in members.stacked().items()}
        figures = {"iteration": self.iteration, "frames": self.frames, "episodes": self.episodes, **self.measure()}
        with atomic_directory(folder) as target, open(target / "solution.npz", "wb") as stream:
            content: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
            np.savez_compressed(stream, **content)
            about = {"game": self.the_game.name, "widths": self.networks.mlp.widths, "symmetric": self.symmetric}
            write_json(target / "solution.json", {**about, "activation": self.response.activation, **figures})

    # -- state --------------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        return {"learners": [learner.state_dict() for learner in self.learners] if self.responding else []}

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.learners = []
        for saved in state["learners"]:
            learner = copy.deepcopy(self.response)
            learner.bind(*self.nothing_seen())
            learner.load_state_dict(saved)
            self.learners.append(learner)
