"""Response oracles that are neural networks: several independent learners of one player, trained as one stack.

A network sees an information state as a row of features and its outputs are tabulated over all information states of
the player, so that games are played by table look-up and no network runs while they are played. One policy class
serves acting, payoffs and diversity: what :meth:`NeuralResponse.tables` returns is what acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from modules.networks.stacked_mlp import StackedLearners, StackedMLP, take_rows
from modules.objectives import td
from modules.objectives.advantage import reverse_scan, standardise
from modules.objectives.ppo import entropy, masked_log_softmax, minibatch_of, ppo_loss, weighted_mean

BATCH_KEYS = ("state", "action", "probability", "episode_return", "next_state", "valid")
Views = Mapping[str, Mapping[str, Tensor]]
"""Network -> parameter -> ``[L, ...]``."""


def _mean_metrics(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([step[key] for step in steps]).mean(0) for key in steps[0]}


class NeuralResponse:
    """What both oracles share: stacked parameters, one Adam over the stack, the reduction over ranks, the state.

    Learners never mix (:class:`~modules.networks.stacked_mlp.StackedLearners`).

    ``reduce`` adds (or averages) a flat tensor over ranks and returns it (``None``: one rank); set it before
    :meth:`update`. It is called equally often, with equally long tensors, on every rank.

    ``extra_loss`` is added to each minibatch's loss: called with the log-policy ``[L, states, actions]`` of the acting
    policy and the minibatch ``[L, rows]``, it returns ``[L]``, to be read as a mean over the valid rows.
    Illegal actions have log-probability -1e9.

    Args:
        hidden: widths of the hidden layers of every network.
        learning_rate: Adam's.
        activation: see :class:`~modules.networks.stacked_mlp.StackedMLP`.
        max_grad_norm: the gradient of each learner and network is scaled down to this Euclidean norm; ``None``: never.

    Raises:
        ValueError: for a value out of range.
    """

    acting: str  # the network whose outputs the policy is made of

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        learning_rate: float = 1e-3,
        activation: str = "relu",
        max_grad_norm: float | None = 1.0,
    ) -> None:
        self._require("learning_rate", learning_rate > 0, "must be above 0", learning_rate)
        self._require("max_grad_norm", max_grad_norm is None or max_grad_norm > 0, "must be above 0", max_grad_norm)
        self.hidden = tuple(hidden)
        self.learning_rate = learning_rate
        self.activation = activation
        self.max_grad_norm = max_grad_norm
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.extra_loss: Callable[[Tensor, TensorDict], Tensor] | None = None
        self._bound = False
        self._stack = StackedLearners({}, learning_rate)

    def _require(self, field: str, holds: bool, rule: str, value: object) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {field}: {rule}, got {value}")

    def _positive(self, **counts: int) -> None:
        for field, value in counts.items():
            self._require(field, value >= 1, "must be at least 1", value)

    def _make_networks(self, features: int, actions: int) -> dict[str, StackedMLP]:
        raise NotImplementedError

    def _log_policy(self, outputs: Tensor, legal: Tensor) -> Tensor:
        """Log-probabilities ``[L, rows, actions]`` from the acting network's outputs; differentiable."""
        raise NotImplementedError

    def _policy(self, outputs: Tensor, frozen: bool) -> Tensor:
        return self._log_policy(outputs, self._legal).exp()

    def _reset(self) -> None:
        """Forget all that is neither weights nor optimiser."""

    def _weights_replaced(self) -> None:
        """Called when new weights meet what was kept."""

    def update(self, batch: TensorDict, seed: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Learn from the decisions of one batch of episodes.

        Args:
            batch: ``[L, N]``, decisions of each learner in any number of episodes: ``state`` and ``action`` int64,
                ``probability`` (float, with which the action was taken), ``episode_return`` (float, the terminal
                return of that decision's episode, bonuses included, undiscounted), ``next_state`` (int64, the
                learner's next decision in the episode, -1 if there is none), ``valid`` (bool, False for padding).
            seed: of this update's own random choices; the same on every rank.
            rows: int64 ``[N]``, numbers of the columns over all ranks, so that minibatches do not depend on the
                number of ranks; ``None``: 0 to N - 1.

        Returns:
            Metrics ``[L]``, without gradient, over the rows of all ranks.

        Raises:
            ValueError: for a missing key, a wrong shape, an illegal action or a return that is not finite.
        """
        raise NotImplementedError

    def bind(self, observations: Tensor, legal: Tensor) -> None:
        """Say which information states there are; :meth:`start` does it, :meth:`load_state_dict` needs it done.

        ``observations`` float32 ``[states, features]``, whose device becomes the learners'; ``legal`` bool
        ``[states, actions]``. ``ValueError`` for shapes that do not fit, or a state without a legal action.
        """
        fits = legal.ndim == 2 and observations.ndim == 2 and len(legal) == len(observations)
        shapes = f"{tuple(legal.shape)} for {tuple(observations.shape)}"
        self._require("legal", fits, "[states, actions] for observations [states, features]", shapes)
        self._require("legal", bool(legal.any(-1).all()), "every state needs a legal action", "a state without")
        self._observations, self._legal = observations.float(), legal.to(observations.device)
        networks = self._make_networks(observations.shape[1], legal.shape[1])
        self._stack = StackedLearners(networks, self.learning_rate, self.max_grad_norm, observations.device)
        self._bound = True

    def start(
        self,
        observations: Tensor,
        legal: Tensor,
        count: int,
        generator: torch.Generator,
        params: Mapping[str, Tensor] | None = None,
        keep: bool = False,
    ) -> None:
        """Begin ``count`` learners.

        Args:
            observations: float32 ``[states, features]``.
            legal: bool ``[states, actions]``.
            count: learners, L.
            generator: of fresh weights.
            params: weights ``[L, ...]`` to go on from, as :meth:`params` returns them; ``None``: fresh ones, or with
                ``keep`` those at hand.
            keep: keep optimiser, replay and counters of an earlier start, if there was one.

        Raises:
            ValueError: for weights of other names or shapes, or ``keep`` with other learners than before.
        """
        self._positive(count=count)
        before = self._stack if keep and self.count else None
        self.bind(observations, legal)
        if before is not None:
            old, new = before.flat.shape, (count, self._stack.flat.shape[1])
            self._stack = before
            self._require("keep", old == new, f"[learners, parameters] must stay {list(old)}", list(new))
        if before is not None and params is None:
            return
        flat = self._stack.fresh(count, generator) if params is None else self._stack.flatten(params)
        self._require("params", len(flat) == count, f"must be of {count} learners", len(flat))
        if before is None:
            self._stack.begin(flat.to(self._observations.device))
            self._reset()
        else:
            self._stack.flat.data.copy_(flat)
            self._weights_replaced()

    @property
    def count(self) -> int:
        """Learners, L; 0 before :meth:`start`."""
        return len(self._stack.flat) if self._bound else 0

    def params(self) -> dict[str, Tensor]:
        """Copies of the weights, ``network.parameter`` -> ``[L, ...]`` float32."""
        return self._stack.params()

    @torch.no_grad()
    def tables(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Action probabilities ``[L, states, actions]`` float32 of the acting policy in every information state.

        Illegal actions have exactly 0. ``params``: weights of any number of members, as :meth:`params` returns them;
        ``None``: the learners'.
        """
        flat = self._stack.flat if params is None else self._stack.flatten(params)
        views = self._stack.views(flat)[self.acting]
        return self._policy(self._stack.networks[self.acting].apply(views, self._observations), params is not None)

    def state_dict(self, rank: bool = True) -> dict[str, Any]:
        """Weights, optimiser, counters and, with ``rank``, what differs by rank (replay); weights_only-loadable."""
        self._require("state_dict", self.count > 0, "call start() first", "no learners")
        state = self._stack.state_dict()
        return {**state, "rank": self.rank_state_dict()} if rank else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken; :meth:`bind` or :meth:`start` comes first."""
        self._require("load_state_dict", self._bound, "call bind() or start() first", "no observations")
        self._stack.load_state_dict(state, self._observations.device)
        self._reset()
        if "rank" in state:
            self.load_rank_state_dict(state["rank"])

    def rank_state_dict(self) -> dict[str, Any]:
        """What differs by rank; empty where nothing does."""
        return {}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`rank_state_dict` returned on this rank."""

    def _checked(self, batch: TensorDict) -> TensorDict:
        """The batch's own keys on the learners' device, padding made harmless to index with."""
        self._require("update", self.count > 0, "call start() first", "no learners")
        for key in BATCH_KEYS:
            self._require("batch", key in batch, f"needs key '{key}'", sorted(map(str, batch.keys())))
        shape = tuple(batch["state"].shape)
        self._require("batch", len(shape) == 2 and shape[0] == self.count, f"[{self.count}, rows]", shape)
        rows = {key: batch[key].to(self._observations.device) for key in BATCH_KEYS}
        valid = rows["valid"]
        for key in ("state", "action"):
            rows[key] = torch.where(valid, rows[key], 0)
        for key, filler in (("probability", 1.0), ("episode_return", 0.0)):
            rows[key] = torch.where(valid, rows[key].float(), filler)
        rows["next_state"] = torch.where(valid, rows["next_state"], -1)
        legal = self._legal[rows["state"], rows["action"]] | ~valid
        sound = legal & rows["episode_return"].isfinite() & (rows["probability"] > 0)
        if not bool(sound.all()):
            learner, row = (~sound).nonzero()[0].tolist()
            found = ", ".join(f"{key} {rows[key][learner, row].item()}" for key in BATCH_KEYS[:4])
            rule = "actions must be legal, probabilities above 0 and returns finite"
            self._require("batch", False, rule, f"{found} (learner {learner}, row {row})")
        return TensorDict(rows, batch_size=shape)

    def _outputs(self, network: str, views: Views, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs of a network in ``state`` ``[L, n]``: ``[L, n, outputs]``, and in all states where it was run there.

        Running all states and looking rows up is less work once rows outnumber states.
        """
        mlp = self._stack.networks[network]
        if self.extra_loss is None and state.shape[1] < len(self._observations):
            return mlp.apply(views[network], self._observations[state]), None
        table = mlp.apply(views[network], self._observations)
        return take_rows(table, state), table

    def _step(self, parts: dict[str, Tensor], table: Tensor | None, rows: TensorDict) -> dict[str, Tensor]:
        """Descend on ``parts["loss"]`` and the extra loss; ``table``: the acting network's outputs in all states."""
        if self.extra_loss is not None and table is not None:
            parts["extra_loss"] = self.extra_loss(self._log_policy(table, self._legal), rows)
            parts["loss"] = parts["loss"] + parts["extra_loss"]
        return self._stack.step(parts["loss"], rows["valid"].sum(-1), parts, self.reduce)


class PPOResponse(NeuralResponse):
    """Proximal policy optimisation with an actor and a critic of their own; the policy is the actor's legal softmax.

    Advantages are the episode's return minus the critic's value (gamma 1), or lambda-returns over the learner's own
    decisions, standardised over the batch.

    Args:
        hidden, learning_rate, activation, max_grad_norm: see :class:`NeuralResponse`.
        entropy_weight: coefficient of the policy's entropy in the objective.
        value_weight: coefficient of the critic's loss.
        clip: half-width of the interval of the probability ratio.
        value_clip: largest counted change of a value in an update, in units of return; ``None``: no clipping.
        epochs: passes over a batch.
        minibatches: parts of a pass; sizes vary a little, since a row's part is a hash of its number.
        lambda_: 1 for Monte Carlo returns; below 1, rows of an episode must be adjacent and in order.
    """

    acting = "actor"

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        learning_rate: float = 1e-3,
        activation: str = "relu",
        max_grad_norm: float | None = 1.0,
        entropy_weight: float = 0.01,
        value_weight: float = 0.5,
        clip: float = 0.2,
        value_clip: float | None = None,
        epochs: int = 4,
        minibatches: int = 4,
        lambda_: float = 1.0,
    ) -> None:
        super().__init__(hidden, learning_rate, activation, max_grad_norm)
        self._require("entropy_weight", entropy_weight >= 0, "must be at least 0", entropy_weight)
        self._require("clip", 0 < clip < 1, "must lie between 0 and 1", clip)
        for field, value in (("value_weight", value_weight), ("value_clip", value_clip)):
            self._require(field, value is None or value > 0, "must be above 0", value)
        self._positive(epochs=epochs, minibatches=minibatches)
        self._require("lambda_", 0 <= lambda_ <= 1, "must lie in [0, 1]", lambda_)
        self.coefficients: dict[str, Any] = {"clip": clip, "value_clip": value_clip}
        self.coefficients |= {"value_weight": value_weight, "entropy_weight": entropy_weight}
        self.epochs, self.minibatches, self.lambda_ = epochs, minibatches, lambda_

    def _make_networks(self, features: int, actions: int) -> dict[str, StackedMLP]:
        # A small last layer: the policy starts nearly uniform and explores (Andrychowicz et al. 2021, section 3.2).
        actor = StackedMLP(features, self.hidden, actions, self.activation, output_gain=0.01)
        return {"actor": actor, "critic": StackedMLP(features, self.hidden, 1, self.activation)}

    def _log_policy(self, outputs: Tensor, legal: Tensor) -> Tensor:
        return masked_log_softmax(outputs, legal)

    def _targets(self, batch: TensorDict, value: Tensor) -> Tensor:
        """Lambda-returns ``[L, N]``: the episode's return where no own decision follows, else a blend with values."""
        if self.lambda_ == 1.0:
            return batch["episode_return"]
        follows = batch["next_state"] >= 0
        adjacent = torch.zeros_like(follows)
        adjacent[:, :-1] = (batch["next_state"][:, :-1] == batch["state"][:, 1:]) & batch["valid"][:, 1:]
        rule = "below 1 needs the rows of an episode adjacent and in order"
        self._require("lambda_", bool((adjacent | ~follows).all()), rule, "a next_state that the next row is not in")
        next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
        here = torch.where(follows, (1.0 - self.lambda_) * next_value, batch["episode_return"])
        return reverse_scan(here, self.lambda_ * follows.to(here.dtype), dim=1)

    def update(self, batch: TensorDict, seed: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        batch = self._checked(batch)
        with torch.no_grad():
            value = self._outputs("critic", self._stack.views(self._stack.flat), batch["state"])[0].squeeze(-1)
            target = self._targets(batch, value)
            batch["advantage"] = standardise(target - value, batch["valid"], self.reduce)
            batch["target"], batch["old_value"] = target, value
            batch["old_log_probability"] = batch["probability"].log()
        numbers = (torch.arange(batch.shape[1]) if rows is None else rows).to(self._legal.device)
        steps = []
        for epoch in range(self.epochs):
            part = minibatch_of(numbers, seed, epoch, self.minibatches)
            sizes = torch.bincount(part, minlength=self.minibatches).tolist()  # one look an epoch, not a minibatch
            steps += [self._minibatch(batch[:, columns]) for columns in part.argsort(stable=True).split(sizes)]
        return _mean_metrics(steps)

    def _minibatch(self, rows: TensorDict) -> dict[str, Tensor]:
        views = self._stack.views(self._stack.flat)
        logits, table = self._outputs("actor", views, rows["state"])
        log_policy = masked_log_softmax(logits, self._legal[rows["state"]])
        parts = ppo_loss(
            log_policy.gather(-1, rows["action"].unsqueeze(-1)).squeeze(-1),
            rows["old_log_probability"],
            rows["advantage"],
            self._outputs("critic", views, rows["state"])[0].squeeze(-1),
            rows["target"],
            entropy(log_policy),
            rows["valid"],
            old_value=rows["old_value"],
            **self.coefficients,
        )
        return self._step(parts, table, rows)


class DQNResponse(NeuralResponse):
    """Deep Q-learning (Mnih et al. 2015) from a ring replay, undiscounted, the reward at the episode's end.

    Args:
        hidden, learning_rate, activation, max_grad_norm: see :class:`NeuralResponse`.
        policy: the one policy class: ``boltzmann``, the softmax of Q / temperature, or ``epsilon_greedy``, which has
            no gradient and so admits no ``extra_loss``.
        temperature: in units of return; other members' weights (``tables(params)``) always act at this one.
        initial_temperature: learners start here and cool geometrically over ``anneal_steps`` optimiser steps, for a
            cold start commits to the first values it learns; they act, and are measured, at the temperature reached.
        anneal_steps: 0 for a constant temperature.
        epsilon: probability spread evenly over the legal actions.
        capacity: decisions of each learner that the replay holds, the newest.
        batch_size: decisions drawn (with replacement) for a step.
        steps: optimiser steps an update.
        target_every: optimiser steps between copies into the target network.
        double: let the online network choose the next action (van Hasselt et al. 2016).
        loss: ``mse``, or ``huber``, whose fixed point is not the mean where returns are random beyond 1 unit.
    """

    acting = "q"

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        learning_rate: float = 1e-3,
        activation: str = "relu",
        max_grad_norm: float | None = 10.0,
        policy: Literal["boltzmann", "epsilon_greedy"] = "boltzmann",
        temperature: float = 0.1,
        initial_temperature: float = 1.0,
        anneal_steps: int = 400,
        epsilon: float = 0.05,
        capacity: int = 10_000,
        batch_size: int = 512,
        steps: int = 8,
        target_every: int = 5,
        double: bool = True,
        loss: Literal["huber", "mse"] = "mse",
    ) -> None:
        super().__init__(hidden, learning_rate, activation, max_grad_norm)
        self._require("policy", policy in ("boltzmann", "epsilon_greedy"), "boltzmann or epsilon_greedy", policy)
        self._require("temperature", temperature > 0, "must be above 0", temperature)
        self._require("initial_temperature", initial_temperature > 0, "must be above 0", initial_temperature)
        self._require("anneal_steps", anneal_steps >= 0, "must be at least 0", anneal_steps)
        self._require("epsilon", 0 <= epsilon <= 1, "must lie in [0, 1]", epsilon)
        self._require("loss", loss in ("huber", "mse"), "huber or mse", loss)
        self._positive(capacity=capacity, batch_size=batch_size, steps=steps, target_every=target_every)
        self.policy, self.temperature, self.epsilon = policy, temperature, epsilon
        self.hot, self.anneal_steps = initial_temperature, anneal_steps
        self.capacity, self.batch_size, self.steps = capacity, batch_size, steps
        self.target_every, self.double, self.loss = target_every, double, loss

    def _make_networks(self, features: int, actions: int) -> dict[str, StackedMLP]:
        return {"q": StackedMLP(features, self.hidden, actions, self.activation, output_gain=0.1)}

    def _weights_replaced(self) -> None:
        self._target = self._stack.flat.detach().clone()

    def _reset(self) -> None:
        super()._reset()
        self.steps_taken = 0
        self._weights_replaced()
        shape, device = (self.count, self.capacity), self._observations.device
        self._replay = {key: torch.zeros(shape, dtype=torch.int32, device=device) for key in ("state", "action")}
        self._replay["next_state"] = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._replay["reward"] = torch.zeros(shape, device=device)
        self._written = torch.zeros(self.count, dtype=torch.int64, device=device)  # ever; the ring's position follows

    def state_dict(self, rank: bool = True) -> dict[str, Any]:
        state = super().state_dict(rank)
        return {**state, "target": self._target.clone(), "steps_taken": self.steps_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._target = state["target"].to(self._observations.device, copy=True)
        self.steps_taken = int(state["steps_taken"])

    def rank_state_dict(self) -> dict[str, Any]:
        """The replay of this rank."""
        return {"written": self._written.clone(), **{key: ring.clone() for key, ring in self._replay.items()}}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, ring in self._replay.items():
            rule = f"replay '{key}' must be [learners, capacity] {tuple(ring.shape)}"
            self._require("load_state_dict", state[key].shape == ring.shape, rule, tuple(state[key].shape))
            self._replay[key] = state[key].to(self._observations.device, copy=True)
        self._written = state["written"].to(self._observations.device, copy=True)

    def _log_policy(self, outputs: Tensor, legal: Tensor) -> Tensor:
        done = min(1.0, self.steps_taken / self.anneal_steps) if self.anneal_steps else 1.0
        return td.boltzmann_log_policy(outputs, legal, self.hot ** (1.0 - done) * self.temperature**done)

    def _policy(self, outputs: Tensor, frozen: bool) -> Tensor:
        if self.policy == "epsilon_greedy":
            return td.epsilon_greedy_policy(outputs, self._legal, self.epsilon)
        frozen_policy = td.boltzmann_log_policy(outputs, self._legal, self.temperature)
        return (frozen_policy if frozen else self._log_policy(outputs, self._legal)).exp()

    def _remember(self, batch: TensorDict) -> None:
        valid = batch["valid"]
        nth = valid.cumsum(1) - 1
        # Of more rows than the ring holds the newest stay; no slot is written twice, so the order cannot matter.
        kept = valid & (nth >= valid.sum(1, keepdim=True) - self.capacity)
        learner, row = kept.nonzero(as_tuple=True)
        slot = (self._written[learner] + nth[learner, row]) % self.capacity
        reward = torch.where(batch["next_state"] < 0, batch["episode_return"], 0.0)
        for key, ring in self._replay.items():
            ring[learner, slot] = (reward if key == "reward" else batch[key])[learner, row].to(ring.dtype)
        self._written += valid.sum(1)

    def update(self, batch: TensorDict, seed: int, rows: Tensor | None = None) -> dict[str, Tensor]:
        gradient = self.extra_loss is None or self.policy == "boltzmann"
        self._require("policy", gradient, "extra_loss needs a policy with a gradient (boltzmann)", self.policy)
        batch = self._checked(batch)
        self._remember(batch)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        draws = torch.rand(self.steps, self.batch_size, generator=generator, dtype=torch.float64)
        size = self._written.clamp_max(self.capacity).unsqueeze(1)
        metrics = []
        for draw in draws.to(self._legal.device):  # one draw for all: no learner's course hangs on the others
            index = (draw * size).long()  # a draw is at most 1 - 2^-53: below size
            sample = {key: ring.gather(1, index) for key, ring in self._replay.items()}
            sample |= {key: sample[key].long() for key in ("state", "action", "next_state")}
            sample["valid"] = (size > 0).expand_as(index)
            metrics.append(self._replay_step(TensorDict(sample, batch_size=index.shape)))
        return _mean_metrics(metrics)

    def _replay_step(self, rows: TensorDict) -> dict[str, Tensor]:
        views = self._stack.views(self._stack.flat)
        q, table = self._outputs("q", views, rows["state"])
        following, terminated = rows["next_state"].clamp_min(0), rows["next_state"] < 0
        legal = self._legal[following]
        with torch.no_grad():
            next_q, _ = self._outputs("q", self._stack.views(self._target), following)
            chooser = next_q  # choosing by the values themselves is the plain maximum
            if self.double:
                chooser = self._outputs("q", views, following)[0] if table is None else take_rows(table, following)
            target = td.double_q_target(rows["reward"], next_q, chooser, terminated, 1.0, legal)
        loss = weighted_mean(td.td_loss(q, rows["action"], target, self.loss), rows["valid"])
        parts = {"loss": loss, "td_loss": loss.detach(), "target": weighted_mean(target, rows["valid"])}
        done = self._step(parts, table, rows)
        self.steps_taken += 1
        if self.steps_taken % self.target_every == 0:
            self._weights_replaced()
        return done
