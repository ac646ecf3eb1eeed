"""PPO for one player (Schulman et al. 2017): its networks, its normalisers, and updates from rollouts.

Both policy and critic take the minibatches of every epoch together, each by an optimiser of its own; as they share no
weight, that equals two separate loops. Episodes that were cut off by a time limit, and the end of a rollout, are
continued by the critic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.control.fused import policy_gradient, value_gradient
from modules.control.normaliser import Reduce, RunningMoments
from modules.control.players import OBSERVATION_CLIP, PlayerNetworks
from modules.control.policy import MemorySettings, gaussian_entropy, gaussian_log_probability
from modules.control.ppo_settings import PPOSettings
from modules.networks.stacked_mlp import StackedLearners
from modules.objectives.advantage import gae, standardise
from modules.objectives.ppo import approximate_kl, clipped_surrogate, value_loss
from modules.seeds import global_seed, stream

_SHUFFLE = 85  # what a random stream is for


@dataclass
class Rows:
    """A finished rollout as rows: features of the policy, what it did, and what came of it.

    ``features`` ``[rows, inputs]`` and ``action``; ``log_probability``, ``advantage``, ``target``, ``value``
    ``[rows]``; with an LSTM every row is a sequence, ``[rows, time, ...]``, with ``fresh`` and the states before.
    """

    features: Tensor
    action: Tensor
    log_probability: Tensor
    advantage: Tensor
    target: Tensor
    value: Tensor
    extra: Tensor | None = None
    fresh: Tensor | None = None
    state: Tensor | None = None
    value_state: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: Tensor) -> Rows:
        def at(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return Rows(*(cast(Any, at(getattr(self, name))) for name in self.__dataclass_fields__))


Regulariser = Callable[[Mapping[str, Tensor], "Rows", Tensor], Tensor]
"""(policy's parameters, minibatch, its means) -> loss to be added, a mean over the minibatch's rows."""


def _of(batch: TensorDict, name: str) -> Tensor:
    return cast(Tensor, batch[name])


class PPOLearner:
    """One player in training.

    Args:
        networks: its policy and critic.
        settings: PPO's.
        role: ``agent``, or ``adversary``, whose reward is minus the agent's.
        memory: of an agent; gradients of an LSTM flow through ``memory.history`` steps.
        perturbs_state: whether what an agent observes is perturbed.
        previous_scale: factor by which an adversary's networks see the perturbation before, a number or ``[size]``.
    """

    def __init__(
        self,
        networks: PlayerNetworks,
        settings: PPOSettings,
        role: Literal["agent", "adversary"],
        memory: MemorySettings | None = None,
        perturbs_state: bool = False,
        previous_scale: Tensor | float = 1.0,
    ) -> None:
        self.networks, self.settings, self.role = networks, settings, role
        self.memory = memory or MemorySettings()
        self.perturbs_state, self.previous_scale = perturbs_state, previous_scale
        limit = settings.max_grad_norm
        self.policy = StackedLearners({"policy": networks.policy}, settings.lr, limit)
        self.value = StackedLearners({"value": networks.value}, settings.value_lr, limit)
        self.moments = RunningMoments(networks.observation_size)
        self.returns = RunningMoments(1)
        self.updates = 0

    # -- members ------------------------------------------------------------------------------------------------------
    def begin(self, key: tuple[int, ...], member: Mapping[str, Tensor] | None = None) -> None:
        """Start a new training: fresh weights drawn under ``key``, or those of ``member`` with its statistics.

        The count behind the statistics goes on, so that a few new rows do not overturn them.
        """
        device = self.policy.flat.device
        if member is None:
            generator = stream(global_seed(), *key)
            self.policy.begin(self.policy.fresh(1, generator).to(device))
            self.value.begin(self.value.fresh(1, generator).to(device))
        else:
            params = {name: value.unsqueeze(0) for name, value in member.items()}
            self.policy.begin(self.policy.flatten(params))
            self.value.begin(self.value.flatten(params))
            if self.settings.normalise_observations and float(self.moments.count) > 0:
                where = self.moments.mean.device
                self.moments.mean = member["mean"].to(where, torch.float64)
                self.moments.squares = member["std"].to(where, torch.float64).square() * self.moments.count
        self.updates = 0

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Start a new training from the weights and statistics of another learner's :meth:`state_dict`.

        The standard deviation is raised to that of a fresh policy: at the end of a training it is small, and steps of
        a fresh optimiser would be huge in units of it.
        """
        for mine, theirs in ((self.policy, state["policy"]), (self.value, state["value"])):
            device = mine.flat.device
            mine.load_state_dict(theirs, device)
            mine.begin(mine.flat)  # Adam forgets
        with torch.no_grad():
            self.policy.views(self.policy.flat)["policy"]["log_std"].clamp_min_(math.log(self.networks.policy.init_std))
        self.moments.load_state_dict(state["moments"])
        self.returns.load_state_dict(state["returns"])
        self.updates = 0

    def member(self) -> dict[str, Tensor]:
        """Copies of what a population stores."""
        params = {**self.policy.params(), **self.value.params()}
        return {name: value[0].clone() for name, value in params.items()} | self.statistics()

    def statistics(self) -> dict[str, Tensor]:
        device = self.policy.flat.device
        if not self.settings.normalise_observations:
            size = self.networks.observation_size
            return {
                "mean": torch.zeros(size, device=device),
                "std": torch.ones(size, device=device),
                "active": torch.ones((), device=device),
            }
        return {
            "mean": self.moments.mean.float().clone(),
            "std": self.moments.std.float().clone(),
            "active": torch.ones((), device=device),
        }

    def stacked(self) -> dict[str, Tensor]:
        """Itself as a population of one, ``[1, ...]``; views of the weights as they are now."""
        params: dict[str, Tensor] = {}
        for name, learners in (("policy", self.policy), ("value", self.value)):
            views = learners.views(learners.flat.detach())[name]
            params.update({f"{name}.{key}": value for key, value in views.items()})
        return params | {name: value.unsqueeze(0) for name, value in self.statistics().items()}

    def take_statistics(self, params: Mapping[str, Tensor], weights: Tensor) -> None:
        """See observations as the agents ``[members, ...]`` on average do: an adversary's normaliser is frozen."""
        share = (weights / weights.sum()).to(params["mean"].device, torch.float64).unsqueeze(-1)
        mean = (share * params["mean"].double()).sum(0)
        second = (share * (params["std"].double().square() + params["mean"].double().square())).sum(0)
        device = self.moments.mean.device
        self.moments.count = torch.ones((), dtype=torch.float64, device=device)
        self.moments.mean = mean.to(device)
        self.moments.squares = (second - mean.square()).clamp_min(0.0).to(device)

    def to(self, device: torch.device) -> None:
        for learners in (self.policy, self.value):
            if learners.flat.device != device:
                learners.load_state_dict(learners.state_dict(), device)
        self.moments.to(device)
        self.returns.to(device)

    # -- updates ------------------------------------------------------------------------------------------------------
    def _next_features(self, batch: TensorDict, where: Tensor) -> Tensor:
        """Features after the steps ``where`` ``[envs, steps]``, of the same episode, the last perturbation kept: it is
        feasible again, whatever the budget."""
        statistics = self.statistics()
        after = _of(batch, "next_observation")[where].float()
        seen = ((after - statistics["mean"]) / statistics["std"]).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        features = _of(batch, "features" if self.role == "agent" else "adversary_features")[where]
        size = self.networks.observation_size
        if self.role == "adversary":
            if features.shape[-1] == size:
                return seen
            return torch.cat([seen, _of(batch, "perturbation")[where] * self.previous_scale], -1)
        if self.perturbs_state and "perturbation" in batch.keys():  # noqa: SIM118 - a TensorDict
            seen = seen + _of(batch, "perturbation")[where]
        if self.memory.kind != "stack":
            return seen
        memory = self.memory.remembered(features[:, size:], features[:, :size], _of(batch, "action")[where])
        return torch.cat([seen, memory], -1)

    def prepare(self, batch: TensorDict, reduce: Reduce | None) -> Rows:
        """Values, advantages and targets of a rollout ``[envs, steps]``; the reward's normaliser takes it in."""
        settings, agent = self.settings, self.role == "agent"
        features = _of(batch, "features" if agent else "adversary_features")
        action = _of(batch, "action" if agent else "adversary_action")
        reward = _of(batch, "reward").float() if agent else -_of(batch, "reward").float()
        terminated, truncated = _of(batch, "terminated"), _of(batch, "truncated")
        done = terminated | truncated
        if settings.normalise_rewards:
            self.returns.merge(_of(batch, "discounted_return").flatten().unsqueeze(-1), reduce)
            reward = (reward / float(self.returns.std)).clamp(-10.0, 10.0)
        policy, value_net = self._views()
        shape = features.shape[:2]
        state, value_state = self._states(batch)
        with torch.no_grad():
            flat = features.flatten(0, 1).unsqueeze(0)
            value = self.networks.value.step(value_net, flat, value_state)[0].view(shape)
            mean = self.networks.policy.step(policy, flat, state)[0].view(*shape, -1)
            log_probability = gaussian_log_probability(action, mean, policy["log_std"][0])
            cut = truncated.clone()
            cut[:, -1] |= ~done[:, -1]
            next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
            if bool(cut.any()):
                after = self._next_features(batch, cut).unsqueeze(0)
                beyond = _of(batch, "value_state_after")[cut].unsqueeze(0) if self.networks.recurrent else None
                next_value[cut] = self.networks.value.step(value_net, after, beyond)[0].view(-1)
            advantage, target = gae(reward, value, next_value, terminated, done, settings.gamma, settings.gae_lambda)
        spread = standardise(advantage.flatten().unsqueeze(0), reduce=reduce).view(shape)
        rows = Rows(features, action, log_probability, spread, target, value)
        if not self.networks.recurrent:
            return Rows(
                *(getattr(rows, name).flatten(0, 1) for name in ("features", "action")),
                *(getattr(rows, name).flatten() for name in ("log_probability", "advantage", "target", "value")),
            )
        return self._sequences(rows, batch)

    def _states(self, batch: TensorDict) -> tuple[Tensor | None, Tensor | None]:
        if not self.networks.recurrent:
            return None, None
        return tuple(_of(batch, name).flatten(0, 1).unsqueeze(0) for name in ("state", "value_state"))  # pyright: ignore[reportReturnType]

    def _sequences(self, rows: Rows, batch: TensorDict) -> Rows:
        """Pieces of ``memory.history`` steps, a row each. Raises: ValueError: if they do not divide a rollout."""
        steps = rows.features.shape[1]
        length = min(self.memory.history, steps)
        if steps % length:
            raise ValueError(
                f"PPO: memory.history must divide the {steps} steps of a rollout per environment, got {length}"
            )

        def cut(value: Tensor) -> Tensor:
            return value.unflatten(1, (steps // length, length)).flatten(0, 1)

        names = ("features", "action", "log_probability", "advantage", "target", "value")
        parts = [cut(getattr(rows, name)) for name in names]
        state, value_state = (cut(_of(batch, name))[:, 0] for name in ("state", "value_state"))
        return Rows(*parts, fresh=cut(_of(batch, "fresh")), state=state, value_state=value_state)

    def _views(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            self.policy.views(self.policy.flat.detach())["policy"],
            self.value.views(self.value.flat.detach())["value"],
        )

    def update(
        self,
        batch: TensorDict,
        key: tuple[int, ...],
        total: int,
        first: int,
        rows_of_all: int,
        reduce: Reduce | None = None,
        regulariser: Regulariser | None = None,
        bonus: Callable[[Rows], Tensor] | None = None,
    ) -> dict[str, float]:
        """All epochs over one rollout.

        Args:
            batch: this rank's, ``[envs, steps]``.
            key: of the order in which rows are taken.
            total: updates over which learning rates are annealed.
            first: number over all ranks of the first row here (environment times steps).
            rows_of_all: rows of all ranks.
            reduce: sums over ranks; ``None`` for one.
            regulariser: a loss added to the policy's.
            bonus: added to the advantages, ``[rows]``.

        Returns:
            Metrics of the last epoch, means over its minibatches and over all ranks.

        Raises:
            ValueError: a loss that is no longer finite.
        """
        settings = self.settings
        rows = self.prepare(batch, reduce)
        if bonus is not None:
            rows.advantage = rows.advantage + bonus(rows)
        remaining = max(0.0, 1.0 - self.updates / max(1, total)) if settings.anneal else 1.0
        self.policy.optimiser.param_groups[0]["lr"] = settings.lr * remaining
        self.value.optimiser.param_groups[0]["lr"] = settings.value_lr * remaining
        if self.networks.recurrent:  # rows are sequences
            length = rows.features.shape[1]
            first, rows_of_all = first // length, rows_of_all // length
        minibatches = min(settings.minibatches, rows_of_all)
        share = rows_of_all / minibatches
        edges = [round(i * share) for i in range(minibatches + 1)]
        kl, metrics = 0.0, {}
        generator = stream(global_seed(), _SHUFFLE, *key)
        for epoch in range(settings.epochs):
            last = epoch == settings.epochs - 1 or settings.target_kl is not None
            order = torch.randperm(rows_of_all, generator=generator)
            sums: dict[str, Tensor] = {}
            whole = rows if reduce is not None else rows.take(order.to(rows.features.device))
            for low, high in zip(edges[:-1], edges[1:], strict=True):
                if reduce is None:
                    piece = whole.take(slice(low, high))  # pyright: ignore[reportArgumentType]
                else:
                    mine = order[low:high] - first
                    mine = mine[(mine >= 0) & (mine < len(rows))]
                    piece = rows.take(mine.to(rows.features.device))
                parts = self._step(piece, reduce, regulariser, last)
                for name, number in parts.items():
                    sums[name] = sums.get(name, torch.zeros_like(number)) + number
            if sums:
                metrics = {name: float(value) / minibatches for name, value in sums.items()}
                kl = metrics["kl"]
            if settings.target_kl is not None and kl > settings.target_kl:
                break
        self.updates += 1
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(
                f"PPO: the {self.role}'s loss is no longer finite after {self.updates} updates: lower its learning "
                "rates"
            )
        self._absorb(batch, reduce)
        variance = self._explained(rows, reduce)
        return {**metrics, "explained_variance": variance, "std": float(self._views()[0]["log_std"].exp().mean())}

    def _explained(self, rows: Rows, reduce: Reduce | None) -> float:
        """Share of the targets' variance that the critic explained when the rollout was collected."""
        target, error = rows.target.double().flatten(), (rows.target - rows.value).double().flatten()
        sums = torch.stack(
            [torch.ones_like(target).sum(), target.sum(), target.square().sum(), error.sum(), error.square().sum()]
        )
        if reduce is not None:
            sums = reduce(sums)
        count, total, squares, off, off_squares = sums.tolist()
        variance = squares / count - (total / count) ** 2
        return 1.0 - (off_squares / count - (off / count) ** 2) / variance if variance > 0 else 0.0

    def _absorb(self, batch: TensorDict, reduce: Reduce | None) -> None:
        """The normaliser takes the rollout in when the update is over: the rollout's features stay what they were."""
        if self.settings.normalise_observations and self.role == "agent":
            self.moments.merge(_of(batch, "observation").flatten(0, 1), reduce)

    def _step(
        self, rows: Rows, reduce: Reduce | None, regulariser: Regulariser | None, report: bool
    ) -> dict[str, Tensor]:
        """One minibatch: an Adam step of the policy and one of the critic."""
        if self.networks.recurrent or regulariser is not None or not len(rows):
            return self._autograd_step(rows, reduce, regulariser, report)
        return self._closed_step(rows, reduce, report)

    @torch.no_grad()
    def _closed_step(self, rows: Rows, reduce: Reduce | None, report: bool) -> dict[str, Tensor]:
        """The same with gradients in closed form."""
        settings, nets = self.settings, self.networks
        n = len(rows)
        policy, value_net = self._views()
        slopes = [torch.empty_like(self.policy.flat), torch.empty_like(self.value.flat)]
        log_ratio, losses = policy_gradient(
            policy,
            nets.policy.mlp.layers,
            self.policy.views(slopes[0])["policy"],
            rows.features,
            rows.action,
            rows.log_probability,
            rows.advantage,
            settings.clip,
            settings.entropy,
        )
        errors = value_gradient(
            value_net,
            nets.value.mlp.layers,
            self.value.views(slopes[1])["value"],
            rows.features,
            rows.target,
            rows.value,
            settings.value_clip,
        )
        count = torch.full((1,), float(n), device=losses.device)
        if not report:
            self.policy.descend(slopes[0], count, None, reduce)
            self.value.descend(slopes[1], count, None, reduce)
            return {}
        log_std = policy["log_std"][0]
        metrics = {
            "policy_loss": losses.mean().reshape(1),
            "kl": approximate_kl(log_ratio).mean().reshape(1),
            "clip_fraction": ((log_ratio.exp() - 1.0).abs() > settings.clip).float().mean().reshape(1),
            "entropy": gaussian_entropy(log_std).reshape(1),
        }
        shown = self.policy.descend(slopes[0], count, metrics, reduce)
        shown_value = self.value.descend(slopes[1], count, {"value_loss": errors.mean().reshape(1)}, reduce)
        norm = shown.pop("gradient_norm")
        return {**shown, "grad_norm": norm, "value_loss": shown_value["value_loss"]}

    def _autograd_step(
        self, rows: Rows, reduce: Reduce | None, regulariser: Regulariser | None, report: bool
    ) -> dict[str, Tensor]:
        """The same by autograd: with memory, a regulariser, or no rows on this rank."""
        settings = self.settings
        policy = self.policy.views(self.policy.flat)["policy"]
        value_net = self.value.views(self.value.flat)["value"]
        if self.networks.recurrent:
            assert self.networks.policy.lstm is not None
            assert self.networks.value.lstm is not None
            fresh, features = cast(Tensor, rows.fresh), rows.features.unsqueeze(0)
            mean = self.networks.policy.lstm.sequence(policy, features, fresh, cast(Tensor, rows.state).unsqueeze(0))
            value = self.networks.value.lstm.sequence(
                value_net, features, fresh, cast(Tensor, rows.value_state).unsqueeze(0)
            )
        else:
            features = rows.features.unsqueeze(0)
            mean = self.networks.policy.step(policy, features, None)[0]
            value = self.networks.value.step(value_net, features, None)[0]
        log_std = policy["log_std"][0]
        log_ratio = gaussian_log_probability(rows.action, mean[0], log_std) - rows.log_probability
        surrogate = clipped_surrogate(log_ratio, rows.advantage, settings.clip)
        count = torch.tensor([float(surrogate.numel())], device=surrogate.device)
        empty = surrogate.numel() == 0
        loss = surrogate.sum() * 0.0 if empty else surrogate.mean()
        entropy = gaussian_entropy(log_std)
        if settings.entropy:
            loss = loss - settings.entropy * entropy
        extra: dict[str, Tensor] = {}
        if regulariser is not None and not empty:
            penalty = regulariser(policy, rows, mean[0])
            loss = loss + penalty
            extra["sa_reg"] = penalty.detach().reshape(1)
        old = rows.value if settings.value_clip is not None else None
        errors = value_loss(value[0, ..., 0], rows.target, old, settings.value_clip)
        error = errors.sum() * 0.0 if empty else errors.mean()
        metrics: dict[str, Tensor] = {}
        if report and not empty:
            with torch.no_grad():
                outside = ((log_ratio.exp() - 1.0).abs() > settings.clip).float().mean()
                metrics = {
                    "policy_loss": surrogate.mean().reshape(1),
                    "kl": approximate_kl(log_ratio).mean().reshape(1),
                    "clip_fraction": outside.reshape(1),
                    "entropy": entropy.detach().reshape(1),
                    **extra,
                }
        elif report:
            names = ["policy_loss", "kl", "clip_fraction", "entropy"] + (["sa_reg"] if regulariser is not None else [])
            metrics = {name: torch.zeros(1, device=count.device) for name in names}
        shown = self.policy.step(loss.reshape(1), count, metrics, reduce)
        value_metrics = {"value_loss": error.detach().reshape(1)} if report else {}
        shown_value = self.value.step(error.reshape(1), count, value_metrics, reduce)
        if not report:
            return {}
        norm = shown.pop("gradient_norm")
        return {**shown, "grad_norm": norm, "value_loss": shown_value["value_loss"]}

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "moments": self.moments.state_dict(),
            "returns": self.returns.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.policy.flat.device
        self.policy.load_state_dict(state["policy"], device)
        self.value.load_state_dict(state["value"], device)
        self.moments.load_state_dict(state["moments"])
        self.returns.load_state_dict(state["returns"])
        self.updates = int(state["updates"])
