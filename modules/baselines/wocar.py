"""WocaR-PPO (Liang et al. 2022): a critic of the worst case, learned without an attacker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import ControlSpec
from modules.control.bounds import interval_bounds
from modules.control.learner import Rows
from modules.control.module import ControlModule, stream_key
from modules.control.perturbation import PerturbationSettings
from modules.control.policy import MemorySettings
from modules.control.ppo_settings import PPOSettings
from modules.control.regulariser import RegulariserSettings
from modules.control.sarsa import whole_transitions
from modules.control.suite import AttackSettings
from modules.networks.stacked_mlp import StackedLearners, StackedMLP
from modules.objectives.advantage import standardise
from modules.objectives.ppo import minibatch_of
from modules.seeds import global_seed, stream, stream_seed

_CRITIC = 3  # player number of the critic's first weights, after agent and adversary


class WocaR(ControlModule):
    """Worst-case-aware robust PPO: advantages are joined by the worst-case value of the action taken.

    The worst-case critic's target is ``r + gamma * min over A(s') of Q'(s', a)``. ``A(s')`` bounds the means that the
    policy can be brought to by perturbing ``s'`` within ``eps`` (interval bounds), and ``Q'`` is a slowly moving copy.
    The minimum is taken by signed descent inside the box.

    Args:
        w_max: greatest weight of the worst-case value in the advantage.
        schedule: of the weight: ``linear`` or ``exp`` (the cube of the share of training done, times w_max).
        q_lr: Adam's, of the critic.
        q_epochs, q_minibatches: passes over a rollout, and their parts.
        inner_steps: of the descent.
        polyak: share of the critic that its copy takes over after every minibatch.
        perturbation, ppo, total_frames, hidden, init_std, attacks: as in :class:`~modules.baselines.ppo.PPO`; the space
            must be ``state``.
        memory: ``none`` or ``stack``: an LSTM has no interval bounds.
        regulariser: as in :class:`~modules.baselines.ppo.SAPPO`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        w_max: float = 0.8,
        schedule: Literal["linear", "exp"] = "linear",
        q_lr: float = 4e-4,
        q_epochs: int = 1,
        q_minibatches: int = 32,
        inner_steps: int = 50,
        polyak: float = 1e-3,
        regulariser: RegulariserSettings = RegulariserSettings(kappa=0.1),  # noqa: B008
        perturbation: PerturbationSettings = PerturbationSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        total_frames: int = 2_000_000,
        memory: MemorySettings = MemorySettings(),  # noqa: B008
        hidden: tuple[int, ...] = (64, 64),
        init_std: float = 1.0,
        attacks: AttackSettings = AttackSettings(),  # noqa: B008
    ) -> None:
        super().__init__(perturbation, attacks, memory, hidden, init_std, ppo, total_frames, regulariser=regulariser)
        if not 0 <= w_max < math.inf:
            raise ValueError(f"WocaR: w_max must be >= 0, got {w_max}")
        if schedule not in ("linear", "exp"):
            raise ValueError(f"WocaR: schedule: linear or exp, got {schedule!r}")
        if not q_lr > 0 or not 0 < polyak <= 1:
            raise ValueError(f"WocaR: q_lr must be > 0 and polyak in (0, 1], got {q_lr} and {polyak}")
        if min(q_epochs, q_minibatches, inner_steps) < 1:
            raise ValueError("WocaR: q_epochs, q_minibatches and inner_steps must be >= 1")
        if perturbation.space != "state":
            raise ValueError(f"WocaR: perturbation.space: must be state, got {perturbation.space}")
        if memory.kind == "lstm":
            raise ValueError("WocaR: memory: an LSTM has no interval bounds: use none or stack")
        self.w_max, self.schedule, self.q_epochs, self.q_minibatches = w_max, schedule, q_epochs, q_minibatches
        self.inner_steps, self.polyak, self.q_lr = inner_steps, polyak, q_lr
        self.save_hyperparameters(logger=False)

    def build(self, spec: ControlSpec) -> None:
        super().build(spec)
        self.q_net = StackedMLP(self.networks.inputs + spec.action_size, list(self.hidden), 1, "tanh")
        self.q_learner = StackedLearners({"q": self.q_net}, self.q_lr)
        self.slow = torch.zeros(0)

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self._restored:
            fresh = self.q_learner.fresh(1, stream(global_seed(), *stream_key(0, _CRITIC)))
            self.q_learner.begin(fresh.to(self.device))
            self.slow = self.q_learner.flat.detach().clone()
            theirs = (self._warm or {}).get("method", {})
            if theirs:
                self.q_learner.load_state_dict(theirs["q"], self.device)
                self.q_learner.begin(self.q_learner.flat)  # Adam forgets
                self.slow = theirs["slow"].to(self.device, copy=True)

    @property
    def weight(self) -> float:
        """Of the worst-case value now."""
        share = min(1.0, self.steps_done / max(1, self.total_steps))
        return self.w_max * share if self.schedule == "linear" else (self.w_max * share) ** 3

    def _q(self, flat: Tensor, features: Tensor, action: Tensor) -> Tensor:
        params = self.q_learner.views(flat)["q"]
        return self.q_net.apply(params, torch.cat([features, action], -1).unsqueeze(0))[0, :, 0]

    def worst_value(self, features: Tensor) -> Tensor:
        """``min over A(s) of Q'(s, a)`` ``[rows]`` of ``features`` ``[rows, inputs]``."""
        assert self.learner is not None
        policy = self.learner.policy.views(self.learner.policy.flat.detach())["policy"]
        size = self.networks.observation_size
        share = self.regulariser_settings.share(self.steps_done, self.total_steps)
        reach = torch.zeros_like(features)
        reach[:, :size] = self.training_budget.eps * share
        low, high = interval_bounds(
            self.networks.policy.mlp, policy, (features - reach).unsqueeze(0), (features + reach).unsqueeze(0)
        )
        low, high = low[0].detach(), high[0].detach()
        action, step = (low + high) / 2, (high - low) / 2 / self.inner_steps * 2.0
        for _ in range(self.inner_steps):
            with torch.enable_grad():
                action = action.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._q(self.slow, features, action).sum(), action)
            action = torch.minimum(torch.maximum(action.detach() - step * slope.sign(), low), high)
        return self._q(self.slow, features, action).detach()

    def before_update(self, batch: TensorDict) -> None:
        """The worst-case critic takes the rollout in."""
        assert self.learner is not None
        features, action = cast(Tensor, batch["features"]), cast(Tensor, batch["action"])
        terminated, kept = cast(Tensor, batch["terminated"]), whole_transitions(batch).flatten()
        following = torch.cat([features[:, 1:], features[:, -1:]], 1).flatten(0, 1)
        worst = self.worst_value(following)
        reward = (cast(Tensor, batch["reward"]).float() / float(self.learner.returns.std)).clamp(-10.0, 10.0)
        target = reward.flatten() + self.ppo.gamma * worst * (~terminated.flatten())
        rows, taken = features.flatten(0, 1), action.flatten(0, 1)
        seed = stream_seed(global_seed(), *stream_key(0, _CRITIC), self.steps_done) % (1 << 31)
        first = self.share(batch)[0]
        error = torch.zeros(1)
        for epoch in range(self.q_epochs):
            number = torch.arange(first, first + len(rows))
            part = minibatch_of(number, seed, epoch, self.q_minibatches).to(rows.device)
            for minibatch in range(self.q_minibatches):
                chosen = (part == minibatch) & kept
                count = torch.tensor([float(chosen.sum())], device=rows.device)
                loss = (self._q(self.q_learner.flat, rows[chosen], taken[chosen]) - target[chosen]).square().sum()
                loss = (loss / count.clamp_min(1.0)).reshape(1)
                error = self.q_learner.step(loss, count, {"error": loss.detach()}, self.reducer)["error"]
                self.slow = self.slow.lerp(self.q_learner.flat.detach(), self.polyak)
        self._shown["agent/worst_critic_loss"] = float(error)

    def bonus(self, batch: TensorDict) -> Callable[[Rows], Tensor] | None:
        weight = self.weight
        if weight == 0:
            return None

        def worst(rows: Rows) -> Tensor:
            value = self._q(self.q_learner.flat.detach(), rows.features, rows.action)
            return weight * standardise(value.unsqueeze(0), reduce=self.reducer)[0]

        return worst

    def method_state(self) -> dict[str, Any]:
        return {"q": self.q_learner.state_dict(), "slow": self.slow.clone()}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self.q_learner.load_state_dict(state["q"])
        self.slow = state["slow"]
