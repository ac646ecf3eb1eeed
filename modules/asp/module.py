"""ASP: adaptive staircase PSRO for routing solvers (Wang et al. 2024). One iteration reads like the paper's algorithm.

Explore (distributional exploration): at the newest scale, a two-player zero-sum
game between solvers and instance generators; a generator responds to the mixture of solvers, the solver to the mixture
of generators, missing cells of the payoff table are filled, and the meta-game is solved. Adapt (persistent scale
adaption): the solver trains on a mixture of all scales seen, weighted by how far each is from the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict
from torch import Tensor

from modules.asp.game import Mixture, ScaleGame, weights_of
from modules.asp.generator import GeneratorLearner, GeneratorSettings, move_optimizer
from modules.asp.settings import EvaluationSettings, SolverTraining, StaircaseSettings
from modules.asp.staircase import Staircase, shares
from modules.contracts import InstanceRequest, RoutingSpec
from modules.population.loop import ResponseOracleLoop
from modules.population.members import Members
from modules.population.meta_solvers import MetaSolver, NashLP
from modules.population.payoff_table import PayoffTable
from modules.routing.augmentation import unit_box, with_locs
from modules.routing.baselines import policy_gradient
from modules.routing.evaluation import RoutingEvaluation, optimality_gap
from modules.routing.policy_gradient import build_solver
from modules.routing.solver import Decoding, RoutingSolver, SolverSettings
from modules.seeds import global_seed, stream, stream_seed

GENERATE, SOLVE, SETS, HELD_OUT = 0, 1, 2, 3
_STREAM = 71  # first key of this method's random streams


class ASP(RoutingEvaluation, ResponseOracleLoop):
    """Adaptive staircase PSRO.

    A loop iteration is one round of the game at the newest scale (a generator's response, the solver's response, new
    payoffs) or one adaption; a training step is one batch of instances. Solver ``i``'s payoff against generator ``j``
    is minus its mean gap (percent) on a fixed set of instances of ``j``. The solver in training is what ``test`` and
    ``predict`` use, unless ``evaluation.keep`` names one of the best ones.

    Metrics: ``train/solver/{loss,cost,entropy,grad_norm}``,
    ``train/generator/{reward,log_density,grad_norm,left_out}``,
    ``gap/held_out/<n>``, ``gap/mean_seen``, ``gap/mean_all`` (percent), ``curriculum/{scale,phase,weight_<n>}``,
    ``psro/{value,entropy_solvers,entropy_generators,response_gain}``, ``instances`` (that trained solvers, all ranks).

    Args:
        solver: the network.
        decoding: how routes are decoded to measure gaps.
        training: the solver's own algorithm and its batches.
        generator: the instance generator and its training.
        staircase: scales, threshold, patience.
        evaluation: the instances that gaps are measured on.
        meta_solver: of the game at one scale.
        method: ``asp``; ``explore``: one scale, no staircase; ``adapt``: the staircase on uniform instances, no game.
        rounds: of the game at each scale.
        use_gap, use_std: the two parts of the scales' weights; with neither they are equal.
        max_phases: games and adaptions after which the run ends.
        max_instances: solvers' training instances, over all ranks, after which the run ends, and not before: scales
            seen are adapted to until then. ``null``: it ends with the staircase, the game or ``max_phases``.
        initial: checkpoint or run's folder to take the first solver's weights from; ``null``: random ones.

    Raises:
        ValueError: a setting out of range; at set-up, held-out sets that the datamodule does not have.
    """

    work_unit = "instances"

    def __init__(
        self,
        solver: SolverSettings = SolverSettings(),  # noqa: B008
        decoding: Decoding = Decoding(),  # noqa: B008
        training: SolverTraining = SolverTraining(),  # noqa: B008
        generator: GeneratorSettings = GeneratorSettings(),  # noqa: B008
        staircase: StaircaseSettings = StaircaseSettings(),  # noqa: B008
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008
        meta_solver: MetaSolver | None = None,
        method: Literal["asp", "explore", "adapt"] = "asp",
        rounds: int = 5,
        use_gap: bool = True,
        use_std: bool = True,
        max_phases: int = 100,
        max_instances: int | None = None,
        initial: str | None = None,
    ) -> None:
        super().__init__(decoding=decoding)
        if method not in ("asp", "explore", "adapt"):
            raise ValueError(f"ASP: method must be asp, explore or adapt, got {method!r}")
        for key, value, least in (("rounds", rounds, 0), ("max_phases", max_phases, 1)):
            if value < least:
                raise ValueError(f"ASP: {key} must be >= {least}, got {value}")
        if max_instances is not None and max_instances < training.batch_size:
            raise ValueError(
                f"ASP: max_instances must be at least a batch ({training.batch_size}), got {max_instances}"
            )
        self.settings, self.training_settings, self.evaluation = solver, training, evaluation
        self.generator_settings = generator
        self.meta_solver = meta_solver or NashLP()
        self.method, self.rounds, self.initial = method, rounds, initial
        self.use_gap, self.use_std = use_gap, use_std
        self.max_phases, self.max_instances = max_phases, max_instances
        end = staircase.start if method == "explore" else staircase.end
        self.staircase = Staircase(staircase.start, staircase.step, end, staircase.threshold, staircase.patience)
        self.solver: RoutingSolver | None = None
        self.learner = GeneratorLearner(generator)
        self._rivals: list[RoutingSolver] = []  # a network for stored weights; in a list, so that it is no part of us
        self.game: ScaleGame | None = None
        self.solved: dict[int, tuple[Tensor, Members]] = {}
        """Scale -> meta-strategy over its generators, and these: what the solver adapts to."""
        self.best: dict[str, tuple[float, dict[str, Tensor]]] = {}
        self._gaps: dict[int, float] = {}
        self._plan: list[tuple[int, int]] = []
        self._shown: dict[str, float] = {}
        self.save_hyperparameters(ignore=["meta_solver"], logger=False)

    # -- networks -----------------------------------------------------------------------------------------------------
    def build(self, spec: RoutingSpec) -> None:
        self.solver = build_solver(spec, self.settings, None if self.resuming else self.initial)
        self.baseline = self.training_settings.make_baseline(self.solver)
        # gradients are taken and reduced in the step; DistributedDataParallel must not wait for any
        self.solver.requires_grad_(False)
        self.optimizer = self.training_settings.make_optimizer(self.solver)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        world = self.trainer.world_size
        for key, value in (
            ("training.batch_size", self.training_settings.batch_size),
            ("generator.batch_size", self.generator_settings.batch_size),
            ("evaluation.game_instances", self.evaluation.game_instances),
            ("evaluation.held_out_instances", self.evaluation.held_out_instances),
        ):
            if value % world:
                raise ValueError(f"ASP: {key} must be a multiple of the {world} ranks, got {value}")
        for scale in [*self.staircase.all_scales, *self.held_out_scales]:
            self._held_out_name(scale)

    def _held_out_name(self, scale: int) -> str:
        name = f"{self.evaluation.held_out}/{scale}"
        if name not in self.data.evaluation_sets:
            raise ValueError(
                f"ASP: evaluation.held_out: the datamodule has no held-out set {name}, only "
                f"{', '.join(self.data.evaluation_sets) or 'none'}: add it to data.eval_sets"
            )
        return name

    @property
    def held_out_scales(self) -> list[int]:
        """Sizes of all held-out sets that gaps are measured on."""
        scales = self.evaluation.held_out_scales or self.staircase.all_scales
        return sorted({*scales, *self.staircase.all_scales})

    def on_train_start(self) -> None:
        assert self.solver is not None
        self.learner.to(self.device)
        move_optimizer(self.optimizer, self.device)
        ResponseOracleLoop.on_train_start(self)

    # -- one iteration ------------------------------------------------------------------------------------------------
    @property
    def exploring(self) -> bool:
        return self.staircase.phase == "explore" and self.method != "adapt"

    @property
    def response_steps(self) -> int:
        return sum(kind in (GENERATE, SOLVE) for kind, _ in self._plan)

    @property
    def evaluation_steps(self) -> int:
        return len(self._plan) - self.response_steps

    def check_steps(self, saved: list[int]) -> None:
        """Iterations differ in length; a resumed one follows the plan that the checkpoint holds."""

    def initialise(self) -> None:
        self._open_scale()

    def _open_scale(self) -> None:
        """New populations for the newest scale: the current solver, and the uniform generator."""
        assert self.solver is not None
        self.members = [Members(), Members()]
        self.members[0].append(weights_of(self.solver))
        self.members[1].append(self.learner.uniform_member())
        self.payoff_table = PayoffTable(2)
        for player in (0, 1):
            self.payoff_table.grow(player)
        self.meta_strategies = [torch.ones(1, dtype=torch.float64) for _ in range(2)]
        self.game = ScaleGame()
        if self.method == "adapt":
            self._close_scale()

    def _close_scale(self) -> None:
        self.solved[self.staircase.scales[-1]] = (self.meta_strategies[1].clone(), self.members[1])

    def begin_iteration(self) -> None:
        self._plan = self._make_plan()
        if self._plan[0][0] == GENERATE:
            self.learner.reset(stream(global_seed(), _STREAM, 0, self.iteration))

    def _make_plan(self) -> list[tuple[int, int]]:
        """(kind, number) of every step: scale of a solver's batch or held-out set, generator of a payoff set."""
        training, newest = self.training_settings, self.staircase.scales[-1]
        held_out = [(HELD_OUT, scale) for scale in self.held_out_scales]
        batches = training.epochs * training.epoch_batches
        if self.exploring and self.rounds:
            assert self.game is not None
            made = len(self.members[1])  # the generator about to be made
            sets = [(SETS, 0)] * (made == 1) + [(SETS, made)]
            return [(GENERATE, newest)] * self.generator_settings.steps + [(SOLVE, newest)] * batches + sets + held_out
        if self.exploring:
            return [(SOLVE, newest)] * batches + held_out
        weights = self.staircase.weights(self.use_gap, self.use_std)
        steps = [(SOLVE, scale) for scale, count in shares(weights, batches).items() for _ in range(count)]
        order = torch.randperm(len(steps), generator=stream(global_seed(), _STREAM, 1, self.iteration))
        return [steps[i] for i in order.tolist()] + held_out

    def instance_request(self) -> InstanceRequest | None:
        """The instances of the next step."""
        kind, number = self._plan[self.cursor]
        key = (_STREAM, 2, self.iteration, self.cursor)
        if kind == GENERATE:
            needs_oracle = self.generator_settings.reward == "gap"
            size = self.generator_settings.batch_size
            return InstanceRequest(number, size, key, self.learner.coordinates, references=needs_oracle)
        if kind == SOLVE:
            return InstanceRequest(number, self.training_settings.batch_size, key, self._task(number))
        if kind == SETS:
            scale = self.staircase.scales[-1]
            key = (_STREAM, 3, scale, number)  # the same whenever it is drawn
            coordinates = Mixture(self.learner, self.members[1], torch.tensor([number]), torch.ones(1))
            return InstanceRequest(scale, self.evaluation.game_instances, key, coordinates, references=True)
        count = self.evaluation.held_out_instances
        return InstanceRequest(number, count, key, held_out=self._held_out_name(number), references=True)

    def _task(self, scale: int) -> Mixture:
        """The mixture of generators that the solver trains on at ``scale``."""
        if self.exploring and scale == self.staircase.scales[-1]:
            # the meta-strategy of the round before: the newest generator enters it when payoffs are known
            weights, members = self.meta_strategies[1], self.members[1]
        else:
            weights, members = self.solved[scale]
        return Mixture(self.learner, members, torch.arange(len(weights)), weights)

    def response_step(self, batch: TensorDict, step: int) -> Mapping[str, Any]:
        kind, scale = self._plan[step]
        metrics = self._generator_step(batch, step) if kind == GENERATE else self._solver_step(batch, step)
        if kind == GENERATE and step + 1 == self.generator_settings.steps:
            self.members[1].append(self.learner.member())
            assert self.payoff_table is not None
            self.payoff_table.grow(1)
        # all that was ever logged, again at every step: Lightning goes on showing it, and a resumed run would not
        self._shown |= {**metrics, "curriculum/training_scale": float(scale)}
        return self._shown

    def end_response(self) -> None:
        """Freeze the solver's response into its population."""
        if self.exploring and self.rounds:
            assert self.solver is not None
            assert self.payoff_table is not None
            self.members[0].append(weights_of(self.solver))
            self.payoff_table.grow(0)

    # -- responses ----------------------------------------------------------------------------------------------------
    def _generator_step(self, batch: TensorDict, step: int) -> Mapping[str, float]:
        """One update of the generator in training against a solver drawn from their meta-strategy."""
        draw = stream(global_seed(), _STREAM, 4, self.iteration, step)
        chosen = int(torch.multinomial(self.meta_strategies[0], 1, generator=draw))
        solver = self._solver_number(chosen)
        seen = batch
        if self.generator_settings.normalize == "unit_box":
            seen = with_locs(batch, unit_box(batch["locs"]))
        kind = self.generator_settings.reward
        reward = cost = solver.solve(self.problem, seen, self.decoding)[1]
        if kind == "gap":
            reward = optimality_gap(cost, batch["reference"].to(cost.device))
        elif kind == "gap_proxy":
            best = solver.solve(self.problem, seen, Decoding(starts=True, augment=True))[1]
            one = solver.solve(self.problem, seen, Decoding(starts=False))[1]
            reward = optimality_gap(one, torch.minimum(best, one))
        metrics = self.learner.step(batch["locs"], batch["noise"], reward.to(batch["locs"].dtype), self.all_sum)
        return {f"train/generator/{key}": value for key, value in metrics.items()}

    def _solver_step(self, batch: TensorDict, step: int) -> Mapping[str, float]:
        """One update of the solver by its own algorithm; gradients are averaged over ranks."""
        assert self.solver is not None
        parameters = list(self.solver.parameters())
        seed = stream_seed(global_seed(), _STREAM, 5, self.iteration, step)
        self.solver.requires_grad_(True)
        try:
            loss, metrics = policy_gradient(self.problem, self.solver, self.baseline, batch, seed, self.all_sum)
            gradients = torch.autograd.grad(loss, parameters)
        finally:
            self.solver.requires_grad_(False)
        world = self.trainer.world_size
        flat = self.all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world
        norm = flat.norm()
        limit = self.training_settings.max_grad_norm
        if limit is not None:
            flat = flat * (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.instances += batch.shape[0] * world
        if self.max_instances is not None and self.instances >= self.max_instances:
            self.trainer.should_stop = True
        solves = [index for index, (kind, _) in enumerate(self._plan) if kind == SOLVE]
        done = solves.index(step) + 1
        more: dict[str, float] = {}
        if done % self.training_settings.epoch_batches == 0:
            more = self.baseline.end_epoch(self.problem, self.solver, self._draw, self.all_sum)
        values = self.all_sum(torch.stack([value.double() for value in metrics.values()])) / world
        named = {f"train/solver/{key}": float(value) for key, value in zip(metrics, values.tolist(), strict=True)}
        return {**named, "train/solver/grad_norm": float(norm), **more}

    def _draw(self, count: int, number: int) -> Iterable[TensorDict]:
        """Fresh instances of the mixture in training, for the t-test of a rollout baseline."""
        scales = sorted({scale for kind, scale in self._plan if kind == SOLVE})
        world = self.trainer.world_size
        for scale in scales:
            part = max(world, count // len(scales) // world * world)
            key = (_STREAM, 6, number, scale)
            batch = self.data.batch(InstanceRequest(scale, part, key, self._task(scale)))
            yield cast(TensorDict, batch.to(self.device))

    # -- payoffs and gaps ---------------------------------------------------------------------------------------------
    def evaluation_step(self, batch: TensorDict, step: int) -> Mapping[str, Any]:
        kind, number = self._plan[self.cursor]
        if kind == SETS:
            self._add_set(batch, number)
            return self._shown
        assert self.solver is not None
        self._gaps[number] = self._mean_gap(self.solver, batch)
        return self._shown

    def _add_set(self, batch: TensorDict, number: int) -> None:
        """Keep the instances of generator ``number`` and fill the cells that they allow."""
        assert self.game is not None
        assert self.payoff_table is not None
        self.game.sets[number] = self.gather(batch).to("cpu")
        for row, column in self.payoff_table.missing().tolist():
            if column in self.game.sets:
                gaps = self._gaps_of(self._solver_number(row), self.game.share(column, self.global_rank, self._world))
                cells = torch.tensor([[row, column]]).expand(len(gaps), 2)
                self.payoff_table.add(cells, torch.stack([-gaps, gaps], 1), reduce=self.all_sum)

    @property
    def _world(self) -> int:
        return self.trainer.world_size

    def _gaps_of(self, solver: RoutingSolver, batch: TensorDict) -> Tensor:
        """Gaps in percent of this rank's instances, those without one (reference 0 or unknown) left out."""
        batch = cast(TensorDict, batch.to(self.device))
        cost = solver.solve(self.problem, batch, self.decoding)[1]
        gaps = optimality_gap(cost, batch["reference"].double())
        return gaps[gaps.isfinite()].cpu()

    def _mean_gap(self, solver: RoutingSolver, batch: TensorDict) -> float:
        gaps = self._gaps_of(solver, batch)
        total, count = self.all_sum(torch.stack([gaps.sum(), gaps.new_tensor(float(len(gaps)))])).tolist()
        if not count:
            raise ValueError(
                "ASP: no instance of a held-out set has a reference cost: give the datamodule an oracle (oracle: auto)"
            )
        return total / count

    # -- decisions ----------------------------------------------------------------------------------------------------
    def solve(self) -> Mapping[str, float]:
        """Solve the meta-game or look at the adaption's gaps, and let the staircase decide what comes next."""
        assert self.solver is not None
        seen = list(self.staircase.scales)
        mean_seen = sum(self._gaps[scale] for scale in seen) / len(seen)
        mean_all = sum(self._gaps.values()) / len(self._gaps)
        metrics = {f"gap/held_out/{scale}": gap for scale, gap in self._gaps.items()}
        metrics |= {"gap/mean_seen": mean_seen, "gap/mean_all": mean_all, "instances": float(self.instances)}
        metrics |= {"curriculum/scale": float(seen[-1]), "curriculum/phase": float(not self.exploring)}
        weights = self.staircase.weights(self.use_gap, self.use_std)
        metrics |= {f"curriculum/weight_{scale}": weight for scale, weight in weights.items()}
        for name, gap in (("best_seen", mean_seen), ("best_all", mean_all)):
            if name not in self.best or gap <= self.best[name][0]:
                self.best[name] = (gap, weights_of(self.solver))
        if self.exploring:
            metrics |= self._solve_game(mean_seen)
            assert self.game is not None
            if self.game.rounds_done < max(1, self.rounds):
                return metrics
            best, self._gaps = self.game.best()
            if self.rounds:
                weights_of_best = {name: value[best + 1] for name, value in self.members[0].stacked().items()}
                self.solver.load_state_dict(weights_of_best)
            self._close_scale()
        opened = len(self.staircase.scales)
        self.staircase.observe(self.decide(lambda: {scale: self._gaps[scale] for scale in seen}))
        if len(self.staircase.scales) > opened:
            rank_zero_info(f"ASP: mean gap {mean_seen:.3g} %: next scale {self.staircase.scales[-1]}")
            self._open_scale()
        ended = self.staircase.finished or self.method == "explore" or self.staircase.phases >= self.max_phases
        if ended and self.max_instances is None:
            self.trainer.should_stop = True
        self._check_weights()
        return metrics

    def _solve_game(self, mean_seen: float) -> dict[str, float]:
        assert self.game is not None
        assert self.payoff_table is not None
        self.game.record(mean_seen, self._gaps)
        if not self.rounds:
            return {}
        payoffs, before = self.payoff_table.mean(), self.meta_strategies[1]
        gain = float((payoffs[0, -1, : len(before)] - payoffs[0, -2, : len(before)]) @ before)
        self.meta_strategies = self.decide(lambda: [sigma.double() for sigma in self.meta_solver(payoffs)])
        p, q = self.meta_strategies
        entropies = [float(-(sigma * sigma.clamp_min(1e-300).log()).sum()) for sigma in (p, q)]
        self.check_agreement()
        return {
            "psro/value": float(p @ payoffs[0] @ q),
            "psro/entropy_solvers": entropies[0],
            "psro/entropy_generators": entropies[1],
            "psro/response_gain": gain,  # percent that the solver's response took off the gap that it trained against
        }

    def _check_weights(self) -> None:
        """Raises: RuntimeError if ranks' solvers have come apart."""
        if self._world == 1:
            return
        digests: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(digests, self.digest()["weights"])
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise RuntimeError(f"ASP: solver of rank {rank} differs from rank 0's: resume from the last checkpoint")

    # -- state --------------------------------------------------------------------------------------------------------
    def game_digest(self) -> Mapping[str, str]:
        return {"problem": str(self.spec)}

    def method_state(self) -> dict[str, Any]:
        assert self.game is not None
        return {
            "staircase": self.staircase.state_dict(),
            "generator": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "game": self.game.state_dict(),
            "solved": {scale: [q, members.state_dict()] for scale, (q, members) in self.solved.items()},
            "best": {name: [gap, weights] for name, (gap, weights) in self.best.items()},
            "gaps": dict(self._gaps),
            "shown": dict(self._shown),
            "plan": [list(step) for step in self._plan],
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.staircase.load_state_dict(state["staircase"])
        self.learner.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.game = ScaleGame()
        self.game.load_state_dict(state["game"])
        self.solved = {}
        for scale, (q, saved) in state["solved"].items():
            members = Members()
            members.load_state_dict(saved)
            self.solved[int(scale)] = (q, members)
        if self.staircase.scales[-1] in self.solved:  # one store, not two copies
            self.solved[self.staircase.scales[-1]] = (self.solved[self.staircase.scales[-1]][0], self.members[1])
        self.best = {name: (float(gap), weights) for name, (gap, weights) in state["best"].items()}
        self._gaps = {int(scale): float(gap) for scale, gap in state["gaps"].items()}
        self._shown = dict(state["shown"])
        self._plan = [(int(kind), int(number)) for kind, number in state["plan"]]

    def generator_densities(self, side: int) -> list[tuple[str, Tensor]]:
        """Of the newest scale's generators; see :class:`~modules.contracts.ReportsGenerators`."""
        q = self.meta_strategies[1]
        maps = self.learner.densities(self.members[1].stacked(), side)
        shares_of = [*q.tolist(), *[0.0] * (len(maps) - len(q))]
        return [(f"generator {i}: {100 * shares_of[i]:.0f} %", one) for i, one in enumerate(maps)]

    def _use_kept(self) -> None:
        keep = self.evaluation.keep
        if keep == "last" or self.solver is None:
            return
        if keep not in self.best:
            raise ValueError(f"ASP: evaluation.keep: the checkpoint has no {keep} solver yet: set it to last")
        self.solver.load_state_dict(self.best[keep][1])

    on_test_start = on_predict_start = _use_kept

    def _solver_number(self, number: int) -> RoutingSolver:
        """A solver with the weights of member ``number``."""
        if not self._rivals:
            assert self.spec is not None
            self._rivals.append(build_solver(self.spec, self.settings).requires_grad_(False))
        rival = self._rivals[0].to(self.device)
        rival.load_state_dict({name: value[number] for name, value in self.members[0].stacked().items()})
        return rival
