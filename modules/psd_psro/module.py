"""PSD-PSRO and its relatives on games whose payoffs are linear in plans (Yao et al. 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import Subject
from modules.contracts import PlanGame, PlayRequest
from modules.population.exploitability import mixture_plans, nash_conv, population_exploitability
from modules.population.export import export_solution
from modules.population.members import Members
from modules.population.meta_solvers import MetaSolver, NashLP
from modules.population.payoff_table import PayoffTable
from modules.psd_psro.assurance import solved_subject
from modules.psd_psro.diversity import Diversity, DiversityContext, NoDiversity, PolicySpaceDiversity
from modules.psd_psro.game_loop import GameLoop
from modules.psd_psro.neural_oracle import NeuralOracle, PlayedGame
from modules.psd_psro.oracles import COIN, EVALUATE, INITIAL, ExactResponse, Oracle, Round, Task
from modules.psd_psro.schemes import Learner, MetaGame, Scheme, Sequential, solve
from modules.seeds import global_seed, stream


class PSDPSRO(GameLoop):
    """Policy-space response oracles with a diversity term; the defaults are plain PSRO with exact responses.

    Every iteration: the scheme names learners and their opponents, the oracle trains them to maximise
    ``payoff + lambda * diversity``, the new members' payoff cells are evaluated, the meta-game is solved, and
    exploitability is measured exactly. The metrics, per iteration: ``meta/nashconv`` (sum over players of what a best
    response gains against the meta-strategies), ``meta/exploitability`` (half of it for two players),
    ``meta/population_exploitability`` (NashConv scale), ``meta/value``, ``meta/entropy`` and ``meta/support`` of the
    meta-strategies, ``meta/members``, ``oracle/br_gap`` (what the exact response would gain over the learnt one) and
    ``diversity/hull_distance`` (nats, from a response to the hull of the members that it is told apart from).

    Args:
        oracle: how responses are trained.
        diversity: the term added to what they maximise; NoDiversity is PSRO.
        scheme: who learns against whom.
        meta_solver: the meta-game's solution, whose exploitability is reported.
        response_solver: what responses are trained against, if it is not the meta-solver: ``Last`` is self-play,
            ``Uniform`` fictitious self-play.
        evaluation: payoff cells exactly, or by sampled play.
        simulations: games per payoff cell, if sampled.
        evaluation_steps: batches that the sampled games are played in.
        population_exploitability_every: iterations between measurements of PE; 0: only at the end of the run.
        initial_members: random members to start with; 0: as many as the scheme needs.
        init: start from random strategies, from uniformly random play, or (``pure``, which XDO needs) from best
            responses to uniformly random play.

    Raises:
        ValueError: a value out of range; at set-up, settings that the game does not admit.
    """

    game: PlanGame | None
    summary_metrics = ("meta/nashconv", "meta/population_exploitability", "meta/members")

    def __init__(
        self,
        oracle: Oracle | None = None,
        diversity: Diversity | None = None,
        scheme: Scheme | None = None,
        meta_solver: MetaSolver | None = None,
        response_solver: MetaSolver | None = None,
        evaluation: Literal["exact", "sampled"] = "exact",
        simulations: int = 1000,
        evaluation_steps: int = 1,
        population_exploitability_every: int = 1,
        initial_members: int = 0,
        init: Literal["random", "uniform", "pure"] = "random",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("simulations", simulations, 2),
            ("evaluation_steps", evaluation_steps, 1),
            ("population_exploitability_every", population_exploitability_every, 0),
            ("initial_members", initial_members, 0),
        ):
            if value < least:
                raise ValueError(f"PSDPSRO: {name} must be >= {least}, got {value}")
        if evaluation == "sampled" and simulations % evaluation_steps:
            raise ValueError(
                f"PSDPSRO: simulations must be a multiple of evaluation_steps ({evaluation_steps}), got {simulations}"
            )
        self.oracle = oracle or ExactResponse()
        self.diversity = diversity or NoDiversity()
        self.scheme = scheme or Sequential()
        self.meta_solver = meta_solver or NashLP()
        self.response_solver = response_solver or self.meta_solver
        self.evaluation = evaluation
        self.simulations = simulations
        self._evaluation_steps = evaluation_steps if evaluation == "sampled" else 1
        self.population_exploitability_every = population_exploitability_every
        self.initial_members = initial_members or self.scheme.initial_members
        if self.initial_members < self.scheme.initial_members:
            raise ValueError(
                f"PSDPSRO: initial_members must be >= {self.scheme.initial_members} for "
                f"{type(self.scheme).__name__}, got {initial_members}"
            )
        self.init = init
        self.learners: list[Learner] = []
        self._cuts: list[Tensor] | None = None
        self._response_metrics: dict[str, float] = {}
        self._distance = PolicySpaceDiversity()
        self._plans: list[Tensor] | None = None  # of members, per population; rebuilt from strategies

    # -- set-up -------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        game = getattr(getattr(self.trainer, "datamodule", None), "game", None)
        if not isinstance(game, PlanGame):
            raise ValueError(
                f"PSDPSRO: needs a datamodule with a game (datamodules.GameDataModule), got "
                f"{type(getattr(self.trainer, 'datamodule', None)).__name__}"
            )
        self.game = game
        if not game.zero_sum and isinstance(self.meta_solver, NashLP):
            raise ValueError(
                f"PSDPSRO: {game.name} is not zero-sum: NashLP does not apply, use meta_solver: AlphaRank or "
                "ProjectedReplicator"
            )
        if self.evaluation == "sampled" and not isinstance(game, PlayedGame):
            raise ValueError(f"PSDPSRO: {game.name} is not played move by move: use evaluation: exact")
        asked = {}
        if isinstance(self.oracle, NeuralOracle):
            asked["oracle.episodes"] = self.oracle.episodes
        if self.evaluation == "sampled":
            asked["simulations / evaluation_steps"] = self.simulations // self.evaluation_steps
        if isinstance(game, PlayedGame):
            self.check_shares(2 if game.symmetric else 1, **asked)

    @property
    def the_game(self) -> PlanGame:
        return cast(PlanGame, super().the_game)  # checked at set-up; a protocol check is slow

    @property
    def response_steps(self) -> int:
        return self.oracle.steps

    def digest(self) -> Mapping[str, str]:
        return {} if self.game is None else self.game.digest()

    # -- members ------------------------------------------------------------------------------------------------------
    def member_plans(self) -> list[Tensor]:
        """Per population ``[members, sequences]``."""
        if self._plans is None:
            self._plans = [self.the_game.plans(p, members["strategy"]) for p, members in enumerate(self.members)]
        return self._plans

    def initialise(self) -> None:
        game = self.the_game
        if self._take_over():
            self._plans = None
            if self.evaluation == "exact":
                self._evaluate_exactly()
            if not len(self.payoff_table.missing()):  # pyright: ignore[reportOptionalMemberAccess]
                self._solve_meta_game()
            return
        self.members, self._plans = [], None
        self.payoff_table = PayoffTable(game.num_players, symmetric_zero_sum=self.symmetric)
        for population in range(self.populations):
            self.members.append(Members())
            self._append_fresh(population, self.initial_members, 0)
        if self.evaluation == "exact":
            self._evaluate_exactly()
        self._solve_meta_game()

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`GameLoop.warm_start`.

        Raises:
            ValueError: also members of another oracle, or fewer than the scheme starts from.
        """
        super().warm_start(checkpoint)
        for saved in checkpoint["population"]["members"]:
            mine = self.oracle.initial(self.the_game, 0, 1, stream(0))
            if saved["members"].keys() != mine.keys():
                raise ValueError(
                    f"PSDPSRO: its members hold {', '.join(sorted(saved['members']))}, those of this run's oracle "
                    f"{', '.join(sorted(mine))}: give the run the oracle that they were trained by"
                )
            if saved["count"] < self.scheme.initial_members:
                raise ValueError(
                    f"PSDPSRO: its population has {saved['count']} members, {type(self.scheme).__name__} starts from "
                    f"{self.scheme.initial_members}: train it further"
                )

    def _append_fresh(self, population: int, count: int, number: int) -> None:
        generator = stream(global_seed(), INITIAL, 1 << 30, number, population)
        fresh = self.oracle.initial(self.the_game, population, count, generator)
        if self.init != "random":
            first = self._uniform(population)
            if self.init == "pure":
                game = self.the_game
                others = [game.plans(p, self._uniform(p)) for p in range(game.num_players)]
                first, _ = game.best_response(population, game.payoff_vector(population, others))
            fresh = {**fresh, "strategy": first.expand(count, *first.shape)}
        assert self.payoff_table is not None
        self.members[population].extend(fresh)
        self.payoff_table.grow(population, count)
        self._plans = None

    def _uniform(self, player: int) -> Tensor:
        """Uniformly random play, which is what a plan of zeros means."""
        game = self.the_game
        some = game.random_strategies(player, 1, stream(0))[0]
        return game.strategy_of(player, torch.zeros_like(game.plans(player, some)))

    # -- one iteration ------------------------------------------------------------------------------------------------
    def _meta_game(self) -> MetaGame:
        assert self.payoff_table is not None
        response_sigma = self.meta_strategies
        if self.response_solver is not self.meta_solver:
            payoffs = self._known_payoffs()
            response_sigma = self.decide(lambda: solve(self.response_solver, payoffs, self.symmetric))
        return MetaGame(
            self.the_game,
            self._known_payoffs(),
            self.member_plans(),
            [members["strategy"] for members in self.members],
            self.meta_strategies,
            response_sigma,
            self.symmetric,
            self.response_solver,
        )

    def _known_payoffs(self) -> Tensor:
        assert self.payoff_table is not None
        return self.payoff_table.mean().nan_to_num(0.0)

    def begin_iteration(self) -> None:
        meta = self._meta_game()
        self.learners = self.decide(lambda: self.scheme.learners(meta))
        self._begin_oracle(resume=False)

    def _begin_oracle(self, resume: bool) -> None:
        turn = Round(self.the_game, self.iteration, global_seed(), [members.stacked() for members in self.members])
        self.oracle.begin([self._task(k, learner) for k, learner in enumerate(self.learners)], turn, resume)

    def _opponent_plans(self, learner: Learner) -> list[Tensor]:
        if learner.plans is not None:
            return learner.plans
        return self._per_player(mixture_plans(self.member_plans(), learner.opponents))

    def _task(self, key: int, learner: Learner) -> Task:
        game, p = self.the_game, learner.population
        vector = game.payoff_vector(p, self._opponent_plans(learner))
        plans = self.member_plans()
        if learner.member is not None:
            start = self.members[p]["strategy"][learner.member]
        else:
            start = game.random_strategies(p, 1, stream(global_seed(), INITIAL, self.iteration, 1, key))[0]
        other = -1 - p if len(plans) > 1 else 0
        visible = slice(0, learner.visible)
        sigma = self.meta_strategies[p][visible]
        total = sigma.sum()
        columns = None
        if game.num_players != 2:
            columns = vector.unsqueeze(-1)  # of many players: payoffs against the opponents' joint mixture
        context = DiversityContext(
            game,
            p,
            plans[p][visible],
            sigma / total if bool(total > 0) else torch.full_like(sigma, 1 / len(sigma)),
            plans[other][visible] if self.symmetric else plans[other],
            learner.opponents[other][visible] if self.symmetric else learner.opponents[other],
            game.plans(p, start),
            iteration=self.iteration,
            generator=stream(global_seed(), COIN, self.iteration, key),
            payoff_columns=columns,
        )
        return Task(learner, p, vector, context, start, key)

    def response_step(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        if "player" in batch.keys():  # noqa: SIM118 - a TensorDict is no dictionary
            batch = self.gather_episodes(batch)
            self.frames += int((batch["player"] >= 0).sum())
            self.episodes += len(batch)
        return self.oracle.step(batch, step, self.diversity)

    def end_response(self) -> None:
        assert self.payoff_table is not None
        game, gains, gaps, distances = self.the_game, [], [], []
        for task, response in zip(self.oracle.tasks, self.oracle.responses(), strict=True):
            plan = game.plans(task.player, response["strategy"])
            value = plan @ task.vector
            gains.append(float(value))
            distances.append(float(self._distance.measure(plan, task.context)))
            gaps.append(float(game.best_response(task.player, task.vector)[1] - value))
            p, member = task.learner.population, task.learner.member
            if member is None:
                self.members[p].append(response)
                self.payoff_table.grow(p)
            else:
                self.members[p].replace(member, response)
                self.payoff_table.reset(p, member)
        self._plans = None
        self._response_metrics = {
            "oracle/br_gap": sum(gaps) / len(gaps),
            "diversity/hull_distance": sum(distances) / len(distances),
        }
        # learners may be grouped by population within the oracle: the scheme gets them in its own order
        order = {id(task.learner): gain for task, gain in zip(self.oracle.tasks, gains, strict=True)}
        if self.decide(lambda: self.scheme.fresh([order[id(learner)] for learner in self.learners])):
            for population in range(self.populations):
                self._append_fresh(population, 1, self.iteration + 1)

    def evaluation_step(self, batch: TensorDict, step: int) -> dict[str, Tensor]:
        if self.evaluation == "exact":
            self._evaluate_exactly()
            return {}
        self.add_games(batch)
        return {}

    def _evaluate_exactly(self) -> None:
        assert self.payoff_table is not None
        missing = self.payoff_table.missing()
        if not len(missing):
            return
        payoffs = self.the_game.payoffs(self._per_player(self.member_plans()))
        self.payoff_table.set_exact(payoffs[(slice(None), *missing.T)].T, missing)

    def play_request(self) -> PlayRequest | None:
        if self.responding:
            return self.oracle.play_request(self.cursor)
        if self.evaluation == "exact":
            return None
        game = self.the_game
        assert isinstance(game, PlayedGame)
        tables = []
        for player, (population, first) in enumerate(
            (p, first) for p in range(self.populations) for _, first in game.seats(p)
        ):
            members = self.members[population]["strategy"]
            tables.append(members[:, first : first + game.num_states(player)])
        weights, episodes = self.cell_weights()
        return PlayRequest(tables, weights, episodes, (EVALUATE, self.iteration, self.cursor), returns_only=True)

    def _solve_meta_game(self) -> None:
        assert self.payoff_table is not None
        payoffs = self._known_payoffs()
        plans, members = self.member_plans(), self.members

        def make() -> list[Tensor]:
            if self.payoff_table is not None and len(self.payoff_table.missing()):  # only before the first evaluation
                return [torch.full((len(m),), 1 / len(m), dtype=torch.float64) for m in members]
            meta = MetaGame(
                self.the_game,
                payoffs,
                plans,
                [m["strategy"] for m in members],
                [],
                [],
                self.symmetric,
                self.meta_solver,
            )
            return self.scheme.meta_strategies(meta) or solve(self.meta_solver, payoffs, self.symmetric)

        self.meta_strategies = self.decide(make)

    def solve(self) -> dict[str, float]:
        assert self.payoff_table is not None
        self.check_agreement()
        self._solve_meta_game()
        return {**self.measure(self._due()), **self._response_metrics}

    def _due(self) -> bool:
        every = self.population_exploitability_every
        last = self.trainer.max_epochs is not None and self.iteration + 1 == self.trainer.max_epochs
        return last or bool(every and (self.iteration + 1) % every == 0)

    def profile(self) -> list[Tensor]:
        """Per player ``[sequences]``, the plans of the meta-strategies (or of the scheme's own solution)."""
        return self.scheme_plans() or self._per_player(mixture_plans(self.member_plans(), self.meta_strategies))

    def scheme_plans(self) -> list[Tensor] | None:
        """Per player ``[sequences]``, the scheme's own solution, where it is no mixture of members."""
        if type(self.scheme).plans is Scheme.plans:
            return None
        return self.scheme.plans(self._meta_game())

    def measure(self, population: bool) -> dict[str, float]:
        """Exploitability of the meta-strategies and, where asked for and defined, of the populations."""
        game = self.the_game
        plans = self.profile()
        total, _ = nash_conv(game, plans)
        metrics = {
            "meta/nashconv": float(total),
            "meta/exploitability": float(total) / game.num_players,
            "meta/value": float(plans[0] @ game.payoff_vector(0, plans)),
            **self.meta_figures(),
        }
        if self.evaluation == "sampled":
            metrics |= self.largest_error()
        if population and game.zero_sum and game.num_players == 2:
            found = population_exploitability(game, self.member_plans(), cuts=self._cuts)
            self._cuts = found.cuts
            metrics["meta/population_exploitability"] = found.value
        return metrics

    def final_figures(self) -> dict[str, float]:
        return self.measure(population=True)

    def assurance_subject(self) -> Subject:
        """What suites may ask of the solution, the members and the game; of the first members before any training."""
        return solved_subject(self)

    def export_pretrained(self, folder: str | Path) -> None:
        """Write the solution: policies, members, payoffs; see :func:`modules.population.export.export_solution`."""
        assert self.payoff_table is not None
        if self.trainer.is_global_zero:
            strategies = [members["strategy"] for members in self.members]
            figures = {"iteration": self.iteration, "episodes": self.episodes, **self.measure(False)}
            payoffs = self._known_payoffs()
            export_solution(folder, self.the_game, self.profile(), payoffs, self.meta_strategies, strategies, figures)

    # -- state --------------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme.state_dict(),
            "oracle": self.oracle.state_dict() if self.responding else {},
            "learners": [vars(learner) for learner in self.learners],
            "cuts": self._cuts,
            "response_metrics": dict(self._response_metrics),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        self._plans = None
        self.scheme.load_state_dict(state["scheme"])
        self.learners = [Learner(**saved) for saved in state["learners"]]
        self._cuts = state["cuts"]
        self._response_metrics = dict(state["response_metrics"])
        if self.responding:
            self._begin_oracle(resume=True)
            self.oracle.load_state_dict(state["oracle"])
