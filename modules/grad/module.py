"""GRAD (Liang et al. 2024, algorithm 1): a double oracle of agents and temporally-coupled adversaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import ControlSpec, EpisodesRequest, RolloutRequest
from modules.control.adversary import previous_scale
from modules.control.evaluation import RobustEvaluation
from modules.control.learner import PPOLearner, Regulariser
from modules.control.module import ADVERSARY, AGENT, episode_figures, stream_key
from modules.control.perturbation import PerturbationSettings
from modules.control.players import AdversarySettings, adversary_networks
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.control.suite import AttackSettings
from modules.grad.settings import PSROSettings
from modules.population.loop import ResponseOracleLoop
from modules.population.members import Members
from modules.population.meta_solvers import MetaSolver, NashLP
from modules.population.payoff_table import PayoffTable

_PAYOFF = 93  # what a random stream is for


class GRAD(RobustEvaluation, ResponseOracleLoop):
    """Populations of agents and adversaries; each grows by PPO responses to the other's meta-strategy.

    Loop iteration 0 trains the first agent against the first adversary. Every later one trains a response of each
    player to the meta-strategy of the iteration before (an opponent is drawn for every episode, and frozen), estimates
    the missing payoffs, and solves the meta-game. A training step is one rollout and its PPO update, or one estimate
    of payoffs. The deployed policy draws an agent from the meta-strategy for every episode.

    Agent ``i``'s payoff against adversary ``j`` is its mean return; agents act by their means there and when they are
    deployed, adversaries draw.

    Metrics: those of :class:`~modules.control.module.ControlModule`, and
    ``psro/{epoch,gap,gap_se,meta_value,support_a,support_v,payoff_se_max}``. The gap is
    ``u(br_a, sigma_v) - u(sigma_a, br_v)`` under the meta-strategies that the responses were trained against: a lower
    bound of exploitability.

    Args:
        perturbation: what the adversary may do.
        adversary: how its output becomes a perturbation.
        psro: the loop.
        ppo, adversary_ppo: of responses.
        meta_solver: of the empirical game.
        regulariser: the state-adversarial one, of agents.
        memory, hidden, init_std, attacks: as in
            :class:`~modules.control.evaluation.RobustEvaluation`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        perturbation: PerturbationSettings = PerturbationSettings(),  # noqa: B008
        adversary: AdversarySettings = AdversarySettings(),  # noqa: B008
        psro: PSROSettings = PSROSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        adversary_ppo: PPOSettings = PPOSettings(),  # noqa: B008
        meta_solver: MetaSolver | None = None,
        regulariser: RegulariserSettings = RegulariserSettings(),  # noqa: B008
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        super().__init__(perturbation, attacks, memory, hidden, init_std)
        if adversary.mixes:
            raise ValueError(
                f"GRAD: adversary.kind: {adversary.kind} has no budget: use direct, temporal_delta or pa_ad"
            )
        if perturbation.coupled and not adversary.observe_previous:
            rank_zero_warn(
                "GRAD: adversary.observe_previous is false under coupled perturbations: what the adversary may do next "
                "depends on what it cannot see"
            )
        self.adversary_settings, self.psro = adversary, psro
        self.ppo, self.adversary_ppo = ppo, adversary_ppo
        self.meta_solver = meta_solver or NashLP()
        self.regulariser_settings = regulariser
        self.learner: PPOLearner | None = None
        self.opponent: PPOLearner | None = None
        self._shown: dict[str, float] = {}
        self._warm: dict[str, Any] | None = None
        self._old_payoffs: Tensor | None = None
        self.save_hyperparameters(ignore=["meta_solver"], logger=False)

    # -- set-up -------------------------------------------------------------------------------------------------------
    def build(self, spec: ControlSpec) -> None:
        state = self.perturbation.space == "state"
        self.learner = PPOLearner(self.networks, self.ppo, "agent", self.memory, perturbs_state=state)
        networks = adversary_networks(spec, self.adversary_settings, self.perturbation)
        scale = previous_scale(self.training_budget)
        self.opponent = PPOLearner(networks, self.adversary_ppo, "adversary", previous_scale=scale)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.psro.eval_episodes % self.world_size:
            raise ValueError(
                f"GRAD: psro.eval_episodes must be a multiple of the {self.world_size} ranks, got "
                f"{self.psro.eval_episodes}"
            )

    def on_train_start(self) -> None:
        for learner in (self.learner, self.opponent):
            assert learner is not None
            learner.to(self.device)
        ResponseOracleLoop.on_train_start(self)

    # -- the plan -----------------------------------------------------------------------------------------------------
    def _steps(self, frames: int) -> int:
        return max(1, -(-frames // self.data.frames_per_batch))

    @property
    def agent_steps(self) -> int:
        """Updates of the agent's response in this iteration."""
        return self._steps(self.psro.br_frames if self.iteration else self.psro.init_frames)

    @property
    def adversary_steps(self) -> int:
        return self._steps(self.psro.adversary_frames or self.psro.br_frames) if self.iteration else 0

    @property
    def response_steps(self) -> int:
        return self.agent_steps + self.adversary_steps

    @property
    def total_steps(self) -> int:
        first = self._steps(self.psro.init_frames) + 1
        later = self._steps(self.psro.br_frames) + self._steps(self.psro.adversary_frames or self.psro.br_frames) + 1
        return first + self.psro.epochs * later

    @property
    def player(self) -> int:
        """Whose response the next step trains."""
        return AGENT if self.cursor < self.agent_steps else ADVERSARY

    def check_steps(self, saved: list[int]) -> None:
        """The first iteration differs in length: what counts are the frames of each, which the config states."""

    # -- one iteration ------------------------------------------------------------------------------------------------
    def initialise(self) -> None:
        """An adversary that does nothing, or noise; the first agent is iteration 0's response.

        A warm start keeps the members of the last meta-strategies, and the first adversary; iteration 0's response is
        to that mixture, and all payoffs are estimated anew: they were measured under another run's budget.
        """
        assert self.opponent is not None
        if self._warm is not None:
            self._take_over(self._warm)
            return
        self.members = [Members(), Members()]
        first = self.opponent.networks.null_member()
        if self.psro.initial_adversary == "random":
            first["active"] = torch.ones(())
        self.members[1].append(first)
        self.payoff_table = PayoffTable(2)
        self.payoff_table.grow(1)
        self.meta_strategies = [torch.zeros(0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]

    def _take_over(self, state: Mapping[str, Any]) -> None:
        assert self.learner is not None
        assert self.opponent is not None
        for learner, role in ((self.learner, "agent"), (self.opponent, "adversary")):
            learner.take_over(state["method"][role])
        payoffs = PayoffTable.from_state_dict(state["payoff_table"]).mean()
        self.members, self.meta_strategies, kept = [Members(), Members()], [], []
        for player, (saved, sigma) in enumerate(zip(state["members"], state["meta_strategies"], strict=True)):
            everyone = Members()
            everyone.load_state_dict(saved)
            chosen = (sigma > 1e-6).nonzero().squeeze(1)
            if player == ADVERSARY:  # the first one is known to have learnt nothing
                chosen = torch.cat([torch.zeros(1, dtype=torch.int64), chosen[chosen > 0]])
            self.members[player].extend(everyone.gather(chosen))
            share = sigma.to(torch.float64)[chosen]
            self.meta_strategies.append(share / share.sum())
            kept.append(chosen)
        self.payoff_table = PayoffTable(2)
        for player in (AGENT, ADVERSARY):
            self.payoff_table.grow(player, len(kept[player]))
        self._old_payoffs = payoffs[:, kept[0]][:, :, kept[1]]

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`initialise`.

        Raises:
            ValueError: a checkpoint of another kind of module, task or memory, or one without a trained agent.
        """
        state = self.learnt(checkpoint, "population")
        if not len(state["meta_strategies"][AGENT]):
            raise ValueError("GRAD: the checkpoint's population has no agent yet: take a later one")
        self._warm = state

    def begin_iteration(self) -> None:
        """Learners where their responses start."""
        assert self.learner is not None
        assert self.opponent is not None
        self._begin(self.learner, AGENT)
        if self.iteration:
            self._begin(self.opponent, ADVERSARY)
            self.opponent.take_statistics(self.members[0].stacked(), self.meta_strategies[0])

    def _begin(self, learner: PPOLearner, player: int) -> None:
        members = self.members[player]
        start: dict[str, Tensor] | None = None
        kind = self.psro.warm_start
        if player == ADVERSARY and self.psro.adversary_warm_start is not None:
            kind = self.psro.adversary_warm_start
        if kind != "scratch" and len(members):  # without members: the first agent of a fresh run
            number = len(members) - 1
            if kind == "best_response_to_sigma":
                assert self.payoff_table is not None
                old = self._old_payoffs if self.iteration == 0 else None
                gain = (self.payoff_table.mean() if old is None else old)[player]
                other = self.meta_strategies[1 - player]
                number = int((gain @ other if player == AGENT else other @ gain).argmax())
            start = {name: value[number] for name, value in members.stacked().items()}
            if player == ADVERSARY and number == 0:  # the first one has learnt nothing
                start = None
        if start is not None and self.psro.response_std is not None:
            least = math.log(self.psro.response_std)
            start = {**start, "policy.log_std": start["policy.log_std"].clamp_min(least)}
        learner.begin(stream_key(self.iteration, player), start)

    def rollout_request(self) -> RolloutRequest | None:
        """Of the response in training; none for payoffs, whose episodes are asked for in the step."""
        if not self.responding:
            return None
        assert self.learner is not None
        assert self.opponent is not None
        budget = self.training_budget
        settings = self.adversary_settings
        sigma_a, sigma_v = self.meta_strategies
        if self.player == AGENT:
            agent = self.agent(self.learner.stacked(), sampled=True)
            chosen = sigma_v.nonzero().squeeze(1)
            null = self.psro.initial_adversary == "null" and chosen.tolist() == [0]
            attacker = None
            if not null and not budget.empty:
                params = self.members[1].gather(chosen)
                attacker = self.attacker(self.opponent.networks, params, settings, budget, True, sigma_v[chosen])
            learner = self.learner
        else:
            chosen = sigma_a.nonzero().squeeze(1)
            agent = self.agent(self.members[0].gather(chosen), sigma_a[chosen], sampled=False)
            attacker = self.attacker(self.opponent.networks, self.opponent.stacked(), settings, budget, True)
            learner = self.opponent
        actor = self.game(agent, attacker, budget, learner.role)
        return RolloutRequest(
            actor, learner.role, stream_key(self.iteration, self.player), learner.updates, learner.settings.gamma
        )

    def response_step(self, batch: TensorDict, step: int) -> Mapping[str, Any]:
        player = self.player
        learner = self.learner if player == AGENT else self.opponent
        assert learner is not None
        metrics = learner.update(
            batch,
            (*stream_key(self.iteration, player), learner.updates),
            self.agent_steps if player == AGENT else self.adversary_steps,
            *self.share(batch),
            reduce=self.reducer,
            regulariser=self._regulariser(learner) if player == AGENT else None,
        )
        self.frames += batch.numel() * self.world_size
        # all that was ever logged, again at every step: Lightning goes on showing it, and a resumed run would not
        self._shown |= {f"{learner.role}/{key}": value for key, value in metrics.items()}
        self._shown |= {**episode_figures(batch, self.all_sum), **self.budget_figures(batch)}
        return {**self._shown, "frames": float(self.frames)}

    def _regulariser(self, learner: PPOLearner) -> Regulariser | None:
        settings = self.regulariser_settings
        share = settings.share(learner.updates, self.agent_steps) if not self.iteration else 1.0
        return self.state_regulariser(settings, share, self.iteration, learner.updates)

    def end_response(self) -> None:
        """Freeze the responses, with their normalisers, into their populations."""
        assert self.learner is not None
        assert self.opponent is not None
        assert self.payoff_table is not None
        for player, learner in ((AGENT, self.learner), (ADVERSARY, self.opponent)):
            if player == AGENT or self.iteration:
                self.members[player].append({key: value.cpu() for key, value in learner.member().items()})
                self.payoff_table.grow(player)

    def evaluation_step(self, batch: TensorDict, step: int) -> Mapping[str, Any]:
        """Fill the missing cells: every cell's episodes are rows of one batch, and begin alike."""
        assert self.payoff_table is not None
        assert self.opponent is not None
        cells = self.payoff_table.missing()
        budget = self.training_budget
        agent = self.agent(self.members[0].stacked(), sampled=False)
        attacker = self.attacker(
            self.opponent.networks, self.members[1].stacked(), self.adversary_settings, budget, sampled=True
        )
        actor = self.game(agent, attacker, budget, cells=cells.to(self.device))
        played = self.data.episodes(EpisodesRequest(actor, len(cells), self.psro.eval_episodes, (_PAYOFF,)))
        returns = played["episode_return"].cpu()
        self.episodes += returns.numel() * self.world_size
        games = cells.repeat_interleave(returns.shape[1], 0)
        gain = returns.flatten()
        self.payoff_table.add(games, torch.stack([gain, -gain], 1), reduce=self.all_sum)
        self.check_budget(budget, played["max_over"], played["max_step_over"])
        return {**self._shown, "frames": float(self.frames)}

    def solve(self) -> Mapping[str, float]:
        assert self.payoff_table is not None
        payoffs, errors = self.payoff_table.mean(), self.payoff_table.standard_error()[0]
        metrics = {"psro/epoch": float(self.iteration), "psro/payoff_se_max": float(errors.max())}
        if self.iteration:
            metrics |= self._gap(payoffs[0], errors)
        self.meta_strategies = self.decide(lambda: [sigma.double() for sigma in self.meta_solver(payoffs)])
        sigma_a, sigma_v = self.meta_strategies
        metrics["psro/meta_value"] = float(sigma_a @ payoffs[0] @ sigma_v)
        metrics["psro/support_a"] = float((sigma_a > 1e-6).sum())
        metrics["psro/support_v"] = float((sigma_v > 1e-6).sum())
        self.check_agreement()
        small = self.psro.tolerance is not None and metrics.get("psro/gap", math.inf) < self.psro.tolerance
        if small or self.iteration == self.psro.epochs:
            self.trainer.should_stop = True
        return metrics

    def _gap(self, payoffs: Tensor, errors: Tensor) -> dict[str, float]:
        """``u(br_a, sigma_v) - u(sigma_a, br_v)`` under the meta-strategies before, and its standard error."""
        sigma_a, sigma_v = self.meta_strategies
        rows, columns = len(sigma_a), len(sigma_v)
        gap = float(payoffs[-1, :columns] @ sigma_v - sigma_a @ payoffs[:rows, -1])
        squares = (errors[-1, :columns].square() @ sigma_v.square()) + (sigma_a.square() @ errors[:rows, -1].square())
        error = math.sqrt(float(squares))
        if gap < -2 * error:
            rank_zero_warn(
                f"GRAD: the gap of epoch {self.iteration} is {gap:.4g}, below 0 by more than two standard errors "
                f"({error:.2g}): a response did worse than the mixture it answers, give responses more frames"
            )
        return {"psro/gap": gap, "psro/gap_se": error}

    # -- evaluation and state -----------------------------------------------------------------------------------------
    def deployed(self) -> tuple[dict[str, Tensor], Tensor]:
        """Agents of the meta-strategy; before there is one, the agent in training."""
        assert self.learner is not None
        if not self.meta_strategies or not len(self.meta_strategies[0]):
            return self.learner.stacked(), torch.ones(1, dtype=torch.float64)
        chosen = (self.meta_strategies[0] > 1e-6).nonzero().squeeze(1)
        return self.members[0].gather(chosen), self.meta_strategies[0][chosen]

    def work_per_batch(self, batch: Any) -> int:
        return int(batch.numel()) if "reward" in batch.keys() else 0  # noqa: SIM118 - a TensorDict

    def summary_rows(self) -> Mapping[str, str]:
        rows = {**super().summary_rows(), "frames": f"{self.frames:,}"}
        for name in ("psro/gap", "psro/meta_value"):
            if name in self.history:
                rows[name.removeprefix("psro/").replace("_", " ")] = f"{self.history[name][-1][-1]:.4g}"
        return rows

    def method_state(self) -> dict[str, Any]:
        assert self.learner is not None
        assert self.opponent is not None
        return {
            "agent": self.learner.state_dict(),
            "adversary": self.opponent.state_dict(),
            "shown": dict(self._shown),
            "frames_of": [self.agent_steps, self.adversary_steps],
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        assert self.learner is not None
        assert self.opponent is not None
        if self.trainer.state.fn == "fit" and state["frames_of"] != [self.agent_steps, self.adversary_steps]:
            raise ValueError(
                f"GRAD: the checkpoint's responses take {state['frames_of']} updates of agent and adversary, the "
                f"config's {[self.agent_steps, self.adversary_steps]}: keep init_frames, br_frames "
                "and frames_per_batch equal"
            )
        self.learner.load_state_dict(state["agent"])
        self.opponent.load_state_dict(state["adversary"])
        self._shown = dict(state["shown"])
