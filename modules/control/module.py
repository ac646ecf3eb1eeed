"""Agent and adversary by turns: the training of every control method without a population."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import ControlSpec, RolloutRequest
from modules.control.actor import GameActor
from modules.control.adversary import previous_scale
from modules.control.evaluation import RobustEvaluation
from modules.control.learner import PPOLearner, Regulariser, Rows
from modules.control.perturbation import PerturbationSettings
from modules.control.players import AdversarySettings, adversary_networks
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.control.suite import AttackSettings
from modules.population.loop import Clock

AGENT, ADVERSARY = 0, 1
_STREAM = 91  # what a random stream is for


def stream_key(iteration: int, player: int) -> tuple[int, ...]:
    """Of a player's environments and of its first weights, in an iteration of the population game (0: before it)."""
    return (_STREAM, iteration, player)


def episode_figures(batch: TensorDict, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """``train/return`` and ``train/length`` of the episodes that ended in a rollout, over all ranks; none: nothing."""
    done = batch["terminated"] | batch["truncated"]
    ended = batch["return_so_far"][done].double()
    sums = torch.stack([ended.sum(), torch.tensor(float(len(ended)), dtype=torch.float64, device=ended.device)])
    total, count = reduce(sums.cpu()).tolist()
    return {"train/return": total / count} if count else {}


class ControlModule(RobustEvaluation):
    """PPO of an agent and, where there is one, of an adversary that perturbs it, by turns.

    A training step is one rollout and its update. Metrics: ``train/return`` (of episodes that ended in the rollout),
    ``agent/{policy_loss,value_loss,kl,clip_fraction,entropy,explained_variance,std,grad_norm}``, ``adversary/...``
    likewise, ``perturb/{linf,step_linf}``, ``frames``.

    Args:
        perturbation, attacks, memory, hidden, init_std: as in
            :class:`~modules.control.evaluation.RobustEvaluation`.
        ppo: the agent's.
        total_frames: environment steps of the whole run, of both players, over all ranks.
        adversary: the adversary; ``None``: there is none.
        adversary_ppo: its PPO.
        agent_steps, adversary_steps: consecutive updates of each player's turn.
        regulariser: the state-adversarial one, of the agent.

    Raises:
        ValueError: a setting out of range.
    """

    work_unit = "frames"

    def __init__(
        self,
        perturbation: PerturbationSettings,
        attacks: AttackSettings,
        memory: MemorySettings,
        hidden: tuple[int, ...],
        init_std: float,
        ppo: PPOSettings,
        total_frames: int,
        adversary: AdversarySettings | None = None,
        adversary_ppo: PPOSettings | None = None,
        agent_steps: int = 1,
        adversary_steps: int = 1,
        regulariser: RegulariserSettings | None = None,
    ) -> None:
        super().__init__(perturbation, attacks, memory, hidden, init_std)
        for field, value in (
            ("total_frames", total_frames),
            ("agent_steps", agent_steps),
            ("adversary_steps", adversary_steps),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {field} must be >= 1, got {value}")
        if regulariser is not None and regulariser.kappa > 0 and perturbation.space != "state":
            raise ValueError(
                f"{type(self).__name__}: regulariser: kappa > 0 smooths the policy in what it observes, the space is "
                f"{perturbation.space}: set kappa to 0"
            )
        self.automatic_optimization = False
        self.clock = torch.nn.Parameter(torch.zeros(()))
        self.ppo, self.total_frames = ppo, total_frames
        self.adversary_settings, self.adversary_ppo = adversary, adversary_ppo or ppo
        self.agent_steps, self.adversary_steps = agent_steps, adversary_steps
        self.mixed = adversary is not None and adversary.mixes
        self.regulariser_settings = regulariser or RegulariserSettings()
        self.learner: PPOLearner | None = None
        self.opponent: PPOLearner | None = None
        self.frames, self.steps_done = 0, 0
        self._shown: dict[str, float] = {}
        self._restored = False
        self._warm: dict[str, Any] | None = None

    # -- set-up -------------------------------------------------------------------------------------------------------
    def build(self, spec: ControlSpec) -> None:
        self.learner = PPOLearner(
            self.networks, self.ppo, "agent", self.memory, perturbs_state=self.perturbation.space == "state"
        )
        budget = self.training_budget
        if self.adversary_settings is not None and (self.mixed or not budget.empty):  # no budget: all turns the agent's
            networks = adversary_networks(spec, self.adversary_settings, self.perturbation)
            scale = 1.0 if self.mixed else previous_scale(budget)
            self.opponent = PPOLearner(networks, self.adversary_ppo, "adversary", previous_scale=scale)

    def configure_optimizers(self) -> Clock:
        return Clock(self.clock)

    def on_train_start(self) -> None:
        assert self.learner is not None
        for player, learner in ((AGENT, self.learner), (ADVERSARY, self.opponent)):
            if learner is None:
                continue
            learner.to(self.device)
            if not self._restored:
                learner.begin(stream_key(0, player))
                theirs = (self._warm or {}).get(learner.role)
                if theirs is not None:
                    learner.take_over(theirs)

    # -- turns --------------------------------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int:
        return max(1, -(-self.total_frames // self.data.frames_per_batch))

    @property
    def turn(self) -> int:
        """Whose update comes next."""
        if self.opponent is None:
            return AGENT
        return AGENT if self.steps_done % (self.agent_steps + self.adversary_steps) < self.agent_steps else ADVERSARY

    def updates_of(self, player: int) -> int:
        """Updates of a player in the whole run."""
        if self.opponent is None:
            return self.total_steps
        cycle = self.agent_steps + self.adversary_steps
        rounds, rest = divmod(self.total_steps, cycle)
        agent = rounds * self.agent_steps + min(rest, self.agent_steps)
        return agent if player == AGENT else self.total_steps - agent

    def rollout_request(self) -> RolloutRequest | None:
        """Of the player whose turn it is."""
        assert self.learner is not None
        player = self.turn
        learner = self.learner if player == AGENT else self.opponent
        assert learner is not None
        actor = self.training_actor(player)
        return RolloutRequest(actor, learner.role, stream_key(0, player), learner.updates, learner.settings.gamma)

    def training_actor(self, player: int) -> GameActor:
        """Both players as they are now, recorded for ``player``."""
        name = "agent" if player == AGENT else "adversary"
        assert self.learner is not None
        agent = self.agent(self.learner.stacked(), sampled=True)
        if self.opponent is None or self.adversary_settings is None:
            return self.game(agent, None, None, name)
        budget = self.training_budget
        attacker = self.attacker(
            self.opponent.networks, self.opponent.stacked(), self.adversary_settings, budget, sampled=True
        )
        return self.game(agent, attacker, None if self.adversary_settings.mixes else budget, name)

    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        assert self.learner is not None
        player = self.turn
        learner = self.learner if player == AGENT else self.opponent
        assert learner is not None
        self.before_update(batch)
        metrics = learner.update(
            batch,
            (*stream_key(0, player), learner.updates),
            self.updates_of(player),
            *self.share(batch),
            reduce=self.reducer,
            regulariser=self.make_regulariser(learner) if player == AGENT else None,
            bonus=self.bonus(batch) if player == AGENT else None,
        )
        if player == AGENT and self.opponent is not None:  # it sees what the agent sees
            self.opponent.moments.load_state_dict(learner.moments.state_dict())
        self.frames += batch.numel() * self.world_size
        self.steps_done += 1
        self.show({f"{learner.role}/{key}": value for key, value in metrics.items()}, batch)
        self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]

    def show(self, metrics: Mapping[str, float], batch: TensorDict) -> None:
        """Log all that was ever logged, again at every step: Lightning goes on showing it, a resumed run would not."""
        self._shown |= {**metrics, **episode_figures(batch, self.all_sum), **self.budget_figures(batch)}
        row = {**self._shown, "frames": float(self.frames)}
        self.log_dict({key: torch.tensor(value, dtype=torch.float32) for key, value in row.items()})

    # -- what a method adds -------------------------------------------------------------------------------------------
    def before_update(self, batch: TensorDict) -> None:
        """Learn something else from the rollout first."""

    def bonus(self, batch: TensorDict) -> Callable[[Rows], Tensor] | None:
        """What is added to the agent's advantages."""
        return None

    def make_regulariser(self, learner: PPOLearner) -> Regulariser | None:
        settings = self.regulariser_settings
        share = settings.share(learner.updates, self.updates_of(AGENT))
        return self.state_regulariser(settings, share, learner.updates)

    # -- evaluation and state -----------------------------------------------------------------------------------------
    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Both players begin with the weights and statistics that they ended with there; the rest is fresh.

        Raises:
            ValueError: a checkpoint of another kind of module, task or memory.
        """
        self._warm = self.learnt(checkpoint, "control")

    def deployed(self) -> tuple[dict[str, Tensor], Tensor]:
        assert self.learner is not None
        return self.learner.stacked(), torch.ones(1, dtype=torch.float64)

    def work_per_batch(self, batch: TensorDict) -> int:
        return batch.numel()

    def summary_rows(self) -> Mapping[str, str]:
        return {**super().summary_rows(), "frames": f"{self.frames:,}"}

    def method_state(self) -> dict[str, Any]:
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`method_state`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.learner is None:
            return
        checkpoint["control"] = {
            "digest": self.game_digest(),
            "agent": self.learner.state_dict(),
            "adversary": None if self.opponent is None else self.opponent.state_dict(),
            "frames": self.frames,
            "steps": self.steps_done,
            "shown": dict(self._shown),
            "method": self.method_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("control")
        name = type(self).__name__
        if state is None:
            raise ValueError(
                f"{name}: the checkpoint holds no control policy: it was written by another kind of module"
            )
        self.check_digest(state["digest"])
        assert self.learner is not None
        self.learner.load_state_dict(state["agent"])
        known = state["adversary"] is not None
        if known != (self.opponent is not None) and self.trainer.state.fn == "fit":
            raise ValueError(f"{name}: the checkpoint and the config differ in whether there is an adversary")
        if self.opponent is not None and known:
            self.opponent.load_state_dict(state["adversary"])
        self.frames, self.steps_done = int(state["frames"]), int(state["steps"])
        self._shown = dict(state["shown"])
        self.load_method_state(state["method"])
        self._restored = True
