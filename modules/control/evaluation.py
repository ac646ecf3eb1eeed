"""A control policy under a suite of attacks: what ``test`` and ``validate`` of every control module do."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import ControlSpec, EpisodesRequest, ProvidesRollouts, RolloutRequest
from modules.control.actor import Agent, Attacker, GameActor
from modules.control.adversary import LearnedAttacker, previous_scale
from modules.control.attackers import GradientAttacker, HeuristicAttacker
from modules.control.learner import PPOLearner
from modules.control.perturbation import PerturbationSet, PerturbationSettings
from modules.control.players import (
    AdversarySettings,
    PlayerNetworks,
    adversary_networks,
    agent_networks,
    perturbation_size,
)
from modules.control.policy import MemorySettings
from modules.control.regulariser import RegulariserSettings, StateRegulariser
from modules.control.sarsa import RobustSarsa
from modules.control.suite import ATTACKS, GRADIENT, HEURISTIC, LEARNED, AttackSettings, full_name
from modules.population.ranks import RankModule
from modules.seeds import global_seed, stream, stream_seed

if TYPE_CHECKING:
    from modules.assurance.subject import Subject

_KINDS = {"sa_rl": "direct", "sa_rl_delta": "temporal_delta", "pa_ad": "pa_ad"}
_EPISODES, _TRAINING, _SARSA, _REGULARISER = 86, 87, 88, 92  # what random streams are for


class RobustEvaluation(RankModule):
    """A LightningModule with an agent that is evaluated under attacks.

    A subclass names what is deployed by :meth:`deployed`. ``test`` logs ``test/attack/<name>/return_mean`` and
    ``return_std``, ``test/natural`` and ``test/worst_case`` (the lowest mean return),
    where ``<name>`` ends in ``_coupled`` for the coupled form; validation the same under ``val``.

    Args:
        perturbation: what the adversary may do, in training and in evaluation.
        attacks: the suite.
        memory: what the agent sees of the past.
        hidden: widths of the agent's hidden layers.
        init_std: of the agent's policy at the start, in the environment's units.
    """

    def __init__(
        self,
        perturbation: PerturbationSettings,
        attacks: AttackSettings,
        memory: MemorySettings,
        hidden: tuple[int, ...],
        init_std: float,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"{type(self).__name__}: hidden: needs widths >= 1, got {list(hidden)}")
        if not init_std > 0:
            raise ValueError(f"{type(self).__name__}: init_std must be > 0, got {init_std}")
        self.perturbation, self.attacks, self.memory = perturbation, attacks, memory
        self.hidden, self.init_std = hidden, init_std
        self.spec: ControlSpec | None = None
        self._rows: list[dict[str, Any]] = []
        self._traces: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {}
        self.frames = 0

    # -- what a subclass writes ---------------------------------------------------------------------------------------
    @abstractmethod
    def deployed(self) -> tuple[dict[str, Tensor], Tensor]:
        """``[members, ...]`` of the agents that are used, and their weights ``[members]``."""

    @abstractmethod
    def build(self, spec: ControlSpec) -> None:
        """Make what depends on the task."""

    # -- set-up -------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        if self.spec is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ProvidesRollouts):
            raise ValueError(
                f"{type(self).__name__}: needs a datamodule of control environments (datamodules.ControlDataModule), "
                f"got {type(data).__name__}"
            )
        self._attach(data.spec)
        if self.attacks.episodes % self.world_size:
            raise ValueError(
                f"{type(self).__name__}: attacks.episodes must be a multiple of the {self.world_size} ranks, got "
                f"{self.attacks.episodes}"
            )
        for part_of in ("val", "test"):
            self.attacks.suite(self.perturbation.space, part_of)

    def _attach(self, spec: ControlSpec) -> None:
        self.spec = spec
        self.size = perturbation_size(self.perturbation, spec)
        self.networks = agent_networks(spec, self.memory, self.hidden, self.init_std)
        self.build(spec)

    @property
    def data(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def budget(self, coupled: bool | None = None, share: float = 1.0) -> PerturbationSet:
        """Of evaluation, or a share of it."""
        return PerturbationSet(self.perturbation, self.size, coupled, share).to(self.device)

    @property
    def training_budget(self) -> PerturbationSet:
        """What adversaries may do in training."""
        return self.budget(share=self.perturbation.train_share)

    def agent(self, params: Mapping[str, Tensor], weights: Tensor | None = None, sampled: bool = True) -> Agent:
        """An acting agent of stored or training members ``[members, ...]``."""
        members = next(iter(params.values())).shape[0]
        on_device = {name: value.to(self.device) for name, value in params.items()}
        weights = torch.ones(members, dtype=torch.float64) if weights is None else weights
        return Agent(self.networks, on_device, weights.to(self.device), self.memory, sampled)

    def game(
        self,
        agent: Agent,
        attacker: Attacker | None,
        budget: PerturbationSet | None = None,
        learner: str = "none",
        cells: Tensor | None = None,
        detail: bool = False,
    ) -> GameActor:
        assert self.spec is not None
        settings = self.perturbation
        return GameActor(
            self.spec, agent, attacker, budget, settings.space, settings.clip_executed, learner, cells, detail
        )

    def attacker(
        self,
        networks: PlayerNetworks,
        params: Mapping[str, Tensor],
        settings: AdversarySettings,
        budget: PerturbationSet,
        sampled: bool,
        weights: Tensor | None = None,
    ) -> LearnedAttacker:
        """A learned attacker of stored or training members ``[members, ...]``."""
        assert self.spec is not None
        members = next(iter(params.values())).shape[0]
        on_device = {name: value.to(self.device) for name, value in params.items()}
        weights = torch.ones(members, dtype=torch.float64) if weights is None else weights
        bounds = None
        if settings.mixes:
            low, high = (
                torch.tensor(bound, device=self.device) for bound in (self.spec.action_low, self.spec.action_high)
            )
            bounds = (low, high)
        mixed = None if settings.mixes else budget
        return LearnedAttacker(networks, on_device, weights.to(self.device), settings, mixed, sampled, bounds)

    def state_regulariser(self, settings: RegulariserSettings, share: float, *key: int) -> StateRegulariser | None:
        """Of an update under random numbers of ``key``, its radius a ``share`` of ``eps``; ``None`` where it is off."""
        if settings.kappa == 0 or self.perturbation.space != "state":
            return None
        generator = stream(global_seed(), _REGULARISER, *key, self.global_rank)
        return StateRegulariser(self.networks, settings, self.training_budget.eps * share, generator)

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def evaluation_names(self, stage: str) -> Sequence[str]:
        return [full_name(*one) for one in self.attacks.suite(self.perturbation.space, stage)]

    def on_validation_start(self) -> None:
        self._rows, self._traces = [], {}

    on_test_start = on_validation_start

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._evaluate(int(batch["index"]), "val")

    def test_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._evaluate(int(batch["index"]), "test")

    def on_validation_epoch_end(self) -> None:
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def _evaluate(self, number: int, stage: str) -> None:
        name, coupled = self.attacks.suite(self.perturbation.space, stage)[number]
        # test runs in inference mode: attacks take gradients, and learned ones train
        with torch.inference_mode(False), torch.no_grad():
            row, trace = self._attack(name, coupled)
        full = full_name(name, coupled)
        self._rows.append({"attack": full, "name": name, "coupled": coupled, **row})
        if trace is not None:
            self._traces[full] = trace

    def _attack(self, name: str, coupled: bool) -> tuple[dict[str, Any], Tensor | None]:
        params, weights = self.deployed()
        agent = self.agent(params, weights, sampled=False)
        budget = self.budget(coupled)
        if name == "none":
            return self._play(agent, None, None)
        frames, runs = 0, 1
        if name in HEURISTIC:
            attackers: list[Attacker] = [HeuristicAttacker(cast(Any, name), budget)]
        elif name == "robust_sarsa":
            judge = self.robust_sarsa()
            frames = self.attacks.sarsa_steps * self.data.frames_per_batch
            attackers = [GradientAttacker("critic", budget, judge)]
        elif name in GRADIENT:
            attackers = [GradientAttacker(cast(Any, name), budget)]
        else:
            attackers, runs = self._trained(name, budget), self.attacks.budget
            frames = runs * self.attacks.steps * self.data.frames_per_batch
        best: tuple[dict[str, Any], Tensor | None] | None = None
        for attacker in attackers:
            row, trace = self._play(agent, attacker, budget)
            if best is None or row["return_mean"] < best[0]["return_mean"]:
                best = (row, trace)
        assert best is not None
        return {**best[0], "runs": runs, "frames": frames}, best[1]

    def _play(
        self, agent: Agent, attacker: Attacker | None, budget: PerturbationSet | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Mean return of the suite's episodes against one attacker, and a perturbation's trace."""
        actor = self.game(agent, attacker, budget, detail=True)
        key = (_EPISODES,)
        played = self.data.episodes(
            EpisodesRequest(actor, 1, self.attacks.episodes, key, trace=int(attacker is not None))
        )
        returns, length = played["episode_return"].double(), played["episode_length"].double()
        sums = torch.stack([torch.ones_like(returns).sum(), returns.sum(), length.sum()])
        count, total, steps = self.all_sum(sums.cpu()).tolist()
        mean = total / count
        squares = float(self.all_sum((returns - mean).square().sum().cpu()))
        std = math.sqrt(squares / max(count - 1, 1))
        row: dict[str, Any] = {
            "episodes": int(count),
            "return_mean": mean,
            "return_std": std,
            "return_se": std / math.sqrt(count),
            "length_mean": steps / count,
            "linf": 0.0,
            "step_linf": 0.0,
            "runs": 0,
            "frames": 0,
        }
        if budget is None:
            return row, None
        row["linf"] = self._largest(played["max_linf"])
        row["step_linf"] = self._largest(played["max_step_linf"])
        self.check_budget(budget, played["max_over"], played["max_step_over"])
        trace = played["trace"]
        running = trace["running"][0, 0]
        return row, trace["perturbation"][0, 0][running].cpu()

    def check_budget(self, budget: PerturbationSet, over: Tensor, step_over: Tensor) -> None:
        """Raises: RuntimeError: if ``eps`` or ``eps_bar`` was exceeded, by more than rounding, on any rank."""
        for what, excess in (("eps", over), ("eps_bar", step_over)):
            largest = self._largest(excess)
            if largest > budget.tolerance:
                raise RuntimeError(
                    f"{type(self).__name__}: a perturbation exceeded {what} by {largest:.3g}: its projection is wrong"
                )

    def _largest(self, value: Tensor) -> float:
        largest = value.max().double().cpu()
        if self.world_size > 1:
            largest = largest.to(self.device)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return float(largest)

    # -- attacks that learn -------------------------------------------------------------------------------------------
    def _trained(self, name: str, budget: PerturbationSet) -> list[Attacker]:
        """The attackers that the runs of one learned attack lead to: of each run, its mean and its sampled policy."""
        assert self.spec is not None
        settings = replace(self.attacks.adversary, kind=cast(Any, _KINDS[name]))
        networks = adversary_networks(self.spec, settings, self.perturbation)
        params, weights = self.deployed()
        attackers: list[Attacker] = []
        for run, ppo in enumerate(self.attacks.runs[: self.attacks.budget]):
            learner = PPOLearner(networks, ppo, "adversary", previous_scale=previous_scale(budget))
            learner.to(self.device)
            key = (_TRAINING, ATTACKS.index(name), int(budget.coupled), run)
            learner.begin(key)
            learner.take_statistics(params, weights)
            self._train_attack(learner, settings, budget, params, weights, key)
            for sampled in (False, True):
                attackers.append(self.attacker(networks, learner.stacked(), settings, budget, sampled))
        return attackers

    def _train_attack(
        self,
        learner: PPOLearner,
        settings: AdversarySettings,
        budget: PerturbationSet,
        params: Mapping[str, Tensor],
        weights: Tensor,
        key: tuple[int, ...],
    ) -> None:
        agent = self.agent(params, weights, sampled=False)
        for number in range(self.attacks.steps):
            adversary = self.attacker(learner.networks, learner.stacked(), settings, budget, sampled=True)
            actor = self.game(agent, adversary, budget, "adversary")
            batch = self.data.rollout(RolloutRequest(actor, "attack", key, number, learner.settings.gamma))
            with torch.enable_grad():
                learner.update(batch, (*key, number), self.attacks.steps, *self.share(batch), reduce=self.reducer)

    def robust_sarsa(self, seed: int | None = None) -> RobustSarsa:
        """An action-value function of the deployed policy, learnt from rollouts.

        Args:
            seed: of the rollouts in place of the run's; this rank then learns by itself.
        """
        assert self.spec is not None
        key, shared = (_SARSA,), seed is None and self.world_size > 1
        judge = RobustSarsa(
            self.spec.observation_size, self.spec.action_size, stream(global_seed(), *key), device=self.device
        )
        acting = self.agent(*self.deployed(), sampled=True)
        for number in range(self.attacks.sarsa_steps):
            actor = self.game(acting, None, None, "agent")
            name = "attack" if seed is None else "assurance sarsa"
            batch = self.data.rollout(RolloutRequest(actor, name, key, number, seed=seed))
            if number == 0:
                judge.scale = 1.0 / max(1e-6, float(batch["reward"].abs().mean()))
                if shared:
                    judge.scale = float(self.all_sum(torch.tensor(judge.scale))) / self.world_size
            with torch.enable_grad():
                judge.learn(
                    batch, self.reducer if shared else None, seed=stream_seed(global_seed(), *key, number) % (1 << 31)
                )
        return judge

    @property
    def reducer(self) -> Any:
        return self.all_sum if self.world_size > 1 else None

    def share(self, batch: TensorDict) -> tuple[int, int]:
        """(number of this rank's first row, rows of all ranks) of a rollout."""
        rows = batch.numel()
        return (self.global_rank * rows if self.world_size > 1 else 0), rows * self.world_size

    def assurance_subject(self) -> Subject:
        """What probes may ask of the deployed policy; see :class:`~modules.contracts.Assurable`."""
        from modules.control.assurance import assurance_subject

        return assurance_subject(self)

    # -- what came of it ----------------------------------------------------------------------------------------------
    def _conclude(self, stage: str) -> None:
        rows = self._rows
        if not rows:
            return
        natural = next((row["return_mean"] for row in rows if row["name"] == "none"), None)
        worst = min(rows, key=lambda row: row["return_mean"])
        flags = self._flags()
        self._report = {
            "stage": stage,
            "task": self.spec.task if self.spec else "",
            "attacks": [dict(row) for row in rows],
            "natural": natural,
            "worst_case": worst["return_mean"],
            "worst_attack": worst["attack"],
            "perturbation": self.perturbation.fingerprint(),
            "flags": flags,
            "traces": dict(self._traces),
        }
        if stage == "test":
            for flag in flags:
                rank_zero_warn(f"{type(self).__name__}: {flag}")
            rank_zero_info(f"worst case {worst['return_mean']:.4g} ({worst['attack']}), natural {natural}")
        values = {f"{stage}/worst_case": worst["return_mean"], "frames": float(self.frames)}
        if natural is not None:
            values[f"{stage}/natural"] = natural
        for row in rows:
            values[f"{stage}/attack/{row['attack']}/return_mean"] = row["return_mean"]
            values[f"{stage}/attack/{row['attack']}/return_std"] = row["return_std"]
        self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})

    def _flags(self) -> list[str]:
        """A learned attack that is weaker than noise has failed to learn; it says nothing about robustness."""
        flags = []
        for row in self._rows:
            if row["name"] not in LEARNED:
                continue
            noise = [r for r in self._rows if r["name"] in HEURISTIC and r["coupled"] == row["coupled"]]
            for other in noise:
                slack = 2 * math.hypot(row["return_se"], other["return_se"])
                if row["return_mean"] > other["return_mean"] + slack:
                    flags.append(
                        f"the learned attack {row['attack']} ({row['return_mean']:.4g}) is weaker than "
                        f"{other['attack']} ({other['return_mean']:.4g}): its training failed, raise "
                        "attacks.steps or attacks.budget"
                    )
                    break
        return flags

    def attack_report(self) -> Mapping[str, Any]:
        return self._report

    def summary_rows(self) -> Mapping[str, str]:
        if not self._report:
            return {}
        shown = {"worst case": f"{self._report['worst_case']:.4g} ({self._report['worst_attack']})"}
        if self._report["natural"] is not None:
            shown["natural return"] = f"{self._report['natural']:.4g}"
        return shown

    def budget_figures(self, batch: TensorDict) -> dict[str, float]:
        """``perturb/linf`` and ``perturb/step_linf`` of a rollout over all ranks; ``env/nan_resets``, this rank's.

        Raises:
            RuntimeError: a perturbation beyond its budget.
        """
        resets = getattr(self.data, "nan_resets", 0)
        figures = {"env/nan_resets": float(resets)} if resets else {}
        if "perturbation" not in batch.keys():  # noqa: SIM118 - a TensorDict
            return figures
        p, previous, fresh = batch["perturbation"], batch["previous"], batch["fresh"]
        if p.shape[-1] != self.size or not p.numel():
            return figures
        budget = self.training_budget
        leap = budget.norms(p - previous)
        if self.perturbation.first_step == "free":
            leap = leap.masked_fill(fresh, 0.0)
        if not self.mixed:
            self.check_budget(budget, *budget.excess(p, previous, fresh))
        return {**figures, "perturb/linf": self._largest(budget.norms(p)), "perturb/step_linf": self._largest(leap)}

    mixed = False
    """Whether perturbations are mixed actions, which have no budget."""

    # -- checkpoint ---------------------------------------------------------------------------------------------------
    def learnt(self, checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
        """What another run of this kind learnt, for a warm start: its part ``name`` of the checkpoint.

        Raises:
            ValueError: it was written by another kind of module, or for another task or memory.
        """
        state = checkpoint.get(name)
        if state is None:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint holds no {name} state: it was written by another kind of module"
            )
        self.check_digest(state["digest"], ("task", "networks"))
        return state

    def check_digest(self, saved: Mapping[str, str], fields: Sequence[str] = ()) -> None:
        """Raises: ValueError: if a checkpoint was written for another task or memory (``fields`` alone: all)."""
        for field, mine in self.game_digest().items():
            if saved.get(field) != mine and (not fields or field in fields):
                hint = (
                    "resume with the run's own config" if field != "perturbation" else "budgets must be equal to resume"
                )
                if field == "perturbation" and self.trainer.state.fn != "fit":
                    continue  # a policy may be tested under other budgets than it was trained for
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint was written for {field} {saved.get(field)}, the config "
                    f"names {mine}: {hint}"
                )

    def game_digest(self) -> dict[str, str]:
        """What a payoff was measured under: another task or budget is another game."""
        assert self.spec is not None
        fields = {**self.perturbation.fingerprint(), "horizon": self.spec.episode_limit}
        return {
            "task": self.spec.task,
            "networks": f"{self.memory.kind}-{self.memory.k}-{list(self.hidden)}",
            "perturbation": str(sorted(fields.items())),
        }
