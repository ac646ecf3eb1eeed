"""EMAX and the value-based multi-agent learners under it: IDQN, VDN and QMIX, one or K members of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict
from torch import Tensor, nn

from modules.contracts import ActsMultiAgent, MultiAgentSpec, PlaysTeams
from modules.emax.acting import (
    NEVER,
    best_action,
    boltzmann_action,
    ensemble_moments,
    greedy_value,
    majority_vote,
    member_utilities,
    with_random,
)
from modules.emax.assurance import MemberPolicy, ValueTrials
from modules.emax.batch import check_batch
from modules.emax.clipping import clip_members
from modules.emax.divergence import DivergenceError, check_size
from modules.emax.rewards import RewardScale
from modules.emax.settings import AgentNetwork, Clip, Ensemble, Explorer, Mixing, Reward, Target
from modules.marl import MultiAgentModule, PartnerDropout
from modules.marl.dropout import followed_value
from modules.networks.mixers import QMixer, SumMixer
from modules.networks.stacked_agents import StackedAgents


class ValueMARL(MultiAgentModule):
    """Value-based cooperative multi-agent learning with an ensemble of K members (EMAX; Schaefer et al. 2025).

    With the defaults this is VDN; ``mixing`` makes it IDQN or QMIX, and ``ensemble``, ``explorer``, ``target`` and
    ``evaluator`` make it EMAX: act by ``mean + beta * std`` over members, bootstrap from the ensemble's average, and
    evaluate by majority vote. One Adam serves all members and the mixer. A training step makes all optimiser updates
    that are due after a collection (``batch`` holds their minibatches): the loop around a step costs as much as an
    update.

    Metrics: ``train/loss``; ``q/mean``, ``q/std`` (over members), ``ucb/disagree`` (share of actions in which UCB
    differs from the greedy mean), ``vote/agreement``, ``target/mean``, ``grad/norm`` (mean over members),
    ``train/epsilon``, ``frames``; in evaluation ``val/return`` (undiscounted team return), ``val/return_iqm``,
    ``val/length``.

    Args:
        ensemble, explorer, target, mixing, network, reward, clip: see :mod:`modules.emax.settings`.
        evaluator: how evaluation acts: ``majority_vote``, ``greedy_mean``, or ``greedy_member`` (the first).
        gamma: discount, in [0, 1].
        learning_rate: Adam's.
        adam_eps: Adam's epsilon.
        divergence_limit: stop where the mean absolute target exceeds this multiple of the greatest return that the
            rewards seen allow, ``max |r| / (1 - gamma)``; ``None``: never.
        dropout, partners: see :class:`~modules.marl.MultiAgentModule`. With a joint value, targets follow what missing
            agents go on to do; an independent learner bootstraps greedily, as from any exploration.

    Raises:
        ValueError: a setting out of range, or one that does not fit the environment (at set-up).
    """

    def __init__(
        self,
        ensemble: Ensemble | None = None,
        explorer: Explorer | None = None,
        target: Target | None = None,
        mixing: Mixing | None = None,
        network: AgentNetwork | None = None,
        reward: Reward | None = None,
        clip: Clip | None = None,
        evaluator: Literal["majority_vote", "greedy_mean", "greedy_member"] = "greedy_mean",
        gamma: float = 0.99,
        learning_rate: float = 5e-4,
        adam_eps: float = 1e-8,
        divergence_limit: float | None = 10.0,
        dropout: PartnerDropout | None = None,
        partners: list[str] | None = None,
    ) -> None:
        super().__init__(dropout, partners)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"ValueMARL: gamma must be in [0, 1], got {gamma}")
        if not (learning_rate > 0.0 and adam_eps > 0.0):
            raise ValueError(f"ValueMARL: learning_rate and adam_eps must be > 0, got {learning_rate} and {adam_eps}")
        if divergence_limit is not None and not divergence_limit > 1.0:
            raise ValueError(f"ValueMARL: divergence_limit must be > 1, got {divergence_limit}")
        self.ensemble = ensemble or Ensemble()
        self.explorer = explorer or Explorer()
        self.target = target or Target()
        self.mixing = mixing or Mixing()
        self.network = network or AgentNetwork()
        self.reward = reward or Reward()
        self.clip = clip or Clip()
        self.evaluator = evaluator
        self.gamma, self.learning_rate, self.adam_eps = gamma, learning_rate, adam_eps
        self.divergence_limit = divergence_limit
        if evaluator not in ("majority_vote", "greedy_mean", "greedy_member"):
            raise ValueError(
                f"ValueMARL: evaluator must be one of majority_vote, greedy_mean, greedy_member, got '{evaluator}'"
            )
        if self.mixing.kind != "none" and self.reward.scalarise == "none":
            raise ValueError(
                f"ValueMARL: {self.mixing.kind} needs a common reward: set reward.scalarise to sum or mean, got none"
            )
        self.save_hyperparameters(
            {
                "settings": {
                    name: dataclasses.asdict(getattr(self, name))
                    for name in ("ensemble", "explorer", "target", "mixing", "network", "reward", "clip", "dropout")
                },
                "evaluator": evaluator,
                "gamma": gamma,
                "learning_rate": learning_rate,
            },
            logger=False,
        )
        self.agents: StackedAgents
        self.mixer: SumMixer | QMixer
        self.rewards = RewardScale(self.reward)
        self._gradient_norm: Tensor | None = None
        self._checked = False

    # -- what it asks of its data -------------------------------------------------------------------------------------
    @property
    def members(self) -> int:
        return self.ensemble.size

    @property
    def minibatches(self) -> int:
        return self.members if self.ensemble.separate_batches else 1

    @property
    def sequences(self) -> bool:
        return self.network.recurrent

    @property
    def bootstrap_p(self) -> float:
        return self.ensemble.bootstrap_p

    # -- set-up -------------------------------------------------------------------------------------------------------
    def build(self, spec: MultiAgentSpec, generator: torch.Generator) -> None:
        """Make networks for the environment of ``spec``, with weights drawn from ``generator``."""
        self.dropout.check(spec)
        self.spec = spec
        self.agents = self._make_agents(spec)
        mix = self.mixing
        if mix.kind == "qmix":
            seen = self._mixer_state_size(spec)
            self.mixer = QMixer(spec.num_agents, seen, mix.embed, mix.hypernet_hidden, mix.hypernet_layers)
        else:
            self.mixer = SumMixer()
        self.online = nn.Parameter(self.agents.init(generator))
        mixers = self.members if mix.per_member else 1
        self.online_mixer = nn.Parameter(self.mixer.init(mixers, generator), requires_grad=self.mixer.size > 0)
        lagged = self.target.lagged
        self.register_buffer("lagged", self.online.detach().clone() if lagged else None)
        self.register_buffer("lagged_mixer", self.online_mixer.detach().clone() if lagged else None)
        prior = self.agents.init(generator) if self.ensemble.prior_scale > 0.0 else None
        self.register_buffer("prior", prior)
        self.rewards.build(1 if self.reward.scalarise != "none" else spec.num_agents)
        self.register_buffer("largest_reward", torch.zeros(()))

    def _make_agents(self, spec: MultiAgentSpec) -> StackedAgents:
        net = self.network
        return StackedAgents(
            self.members,
            spec.num_agents,
            spec.observation_size,
            spec.num_actions,
            net.hidden,
            net.recurrent,
            net.share_agents,
            net.agent_id,
            net.output_gain,
        )

    def _mixer_state_size(self, spec: MultiAgentSpec) -> int:
        """Features of what :meth:`_state` gives the mixer."""
        return spec.state_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.Adam(parameters, lr=self.learning_rate, eps=self.adam_eps, fused=fused)

    # -- utilities ----------------------------------------------------------------------------------------------------
    def utilities(self, flat: Tensor, observation: Tensor) -> Tensor:
        """``Q_i^k`` ``[members, items, steps, agents, actions]`` of ``observation`` ``[(members,) items, steps, agents,
        features]``."""
        values = self.agents.sequence(flat, observation)
        if self.ensemble.prior_scale > 0.0:
            with torch.no_grad():
                prior = self.agents.sequence(cast(Tensor, self.prior), observation)
            values = values + self.ensemble.prior_scale * prior
        return values

    # -- acting -------------------------------------------------------------------------------------------------------
    def begin(
        self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None
    ) -> dict[str, Tensor]:
        rows, place = observation.shape[0], observation.device
        carry = self._begin_dropout(rows, generator, frames)
        if self.network.recurrent:
            # the prior network, where there is one, has a history of its own
            nets = self.members * (2 if self.ensemble.prior_scale > 0.0 else 1)
            carry["hidden"] = torch.zeros(rows, nets, self.agents.agents, self.network.hidden, device=place)
        if self.explorer.kind == "thompson_member":
            if frames is None:
                carry["member"] = torch.zeros(rows, dtype=torch.int64, device=place)
            else:
                carry["member"] = torch.randint(self.members, (rows,), generator=generator, device=place)
        return carry

    def current_utilities(self, observation: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Utilities ``[members, envs, agents, actions]`` of the current step."""
        online, scale = self.online.detach(), self.ensemble.prior_scale
        if not self.network.recurrent:
            values = self.agents.apply(online, observation)
            if scale > 0.0:
                values = values + scale * self.agents.apply(cast(Tensor, self.prior), observation)
            return values, carry
        hidden = carry["hidden"]
        values, hidden_online = self.agents.step(online, observation, hidden[:, : self.members])
        if scale > 0.0:
            prior, hidden_prior = self.agents.step(cast(Tensor, self.prior), observation, hidden[:, self.members :])
            values, hidden_online = values + scale * prior, torch.cat([hidden_online, hidden_prior], 1)
        return values, {**carry, "hidden": hidden_online}

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        legal: Tensor | None,
        carry: dict[str, Tensor],
        generator: torch.Generator,
        frames: int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values, carry = self.current_utilities(observation, carry)
        if frames is None:
            return self._evaluation_action(values, legal), carry
        shape = (*values.shape[1:-1], values.shape[-1] + 1)
        drawn = torch.rand(shape, generator=generator, device=generator.device)
        ties, coin = drawn[..., :-1], drawn[..., -1]
        explorer = self.explorer
        if explorer.kind == "boltzmann":
            action = boltzmann_action(values.mean(0), legal, explorer.temperature, ties)
        elif explorer.kind == "thompson_member":
            action = best_action(member_utilities(values, carry["member"]), legal, ties)
        elif explorer.kind == "ucb":
            mean, std = ensemble_moments(values)
            action = best_action(mean + explorer.beta * std, legal, ties)
        else:
            action = best_action(ensemble_moments(values)[0], legal, ties)
        if explorer.kind == "boltzmann" or explorer.epsilon(frames) > 0.0:
            action = with_random(action, legal, explorer.epsilon(frames), coin, ties)
        return self._drop_out(action, legal, carry, generator), carry

    def _evaluation_action(self, values: Tensor, legal: Tensor | None) -> Tensor:
        if self.evaluator == "majority_vote":
            return majority_vote(values, legal)[0]
        scores = values[0] if self.evaluator == "greedy_member" else ensemble_moments(values)[0]
        return torch.where(legal, scores, NEVER).argmax(-1) if legal is not None else scores.argmax(-1)

    def answers(self, observation: Tensor, state: Tensor) -> Tensor:
        carry = self.begin(observation, state, torch.Generator(state.device), None)
        return self.current_utilities(observation, carry)[0]

    def team_policies(self) -> Mapping[str, ActsMultiAgent]:
        if self.members == 1:
            return {}
        return {f"member {k}": MemberPolicy(self, k) for k in range(self.members)}

    def more_capabilities(self, data: PlaysTeams) -> Mapping[str, Any]:
        return ValueTrials(self, data).capabilities()

    # -- learning -----------------------------------------------------------------------------------------------------
    def team_reward(self, reward: Tensor) -> Tensor:
        """What a learner is paid, ``[..., 1]`` for the team or ``[..., agents]``, from each agent's reward."""
        assert self.spec is not None
        if self.reward.scalarise == "none":
            return reward
        if self.spec.common_reward:
            return reward[..., :1]
        total = reward.sum(-1, keepdim=True)
        return total if self.reward.scalarise == "sum" else total / reward.shape[-1]

    def _next_values(self, batch: TensorDict, online_next: Tensor | None) -> Tensor:
        """What an agent expects from the next step on, ``[members, items, steps, agents]``; no gradient.

        ``online_next``: utilities of the online networks at the next steps, each member on its own minibatch, where
        they are known already.
        """
        kind, reduce = self.target.kind, self.target.reduce
        observation: Tensor = batch["observation"]
        # recurrent networks need the whole history, the others only the next steps
        seen = observation if self.sequences else observation[:, :, 1:]
        legal = batch["legal"][:, :, 1:] if "legal" in batch.keys() else None  # noqa: SIM118 - a TensorDict
        flat = cast(Tensor, self.lagged) if self.target.lagged else self.online.detach()
        joint = self.dropout.active and self.mixing.kind != "none"
        absent = batch["carry_absent"].unsqueeze(2) if joint else None
        idle = self.spec.idle_action if self.spec is not None else None

        def worth(values: Tensor, chooser: Tensor | None) -> Tensor:
            return followed_value(values, greedy_value(values, chooser, legal), legal, absent, idle)

        def ahead(parameters: Tensor, all_members: bool) -> Tensor:
            """``[members, minibatches, items, steps, agents, actions]``, minibatches 1 where each sees its own."""
            if all_members and seen.shape[0] > 1:
                values = self.utilities(parameters, seen.flatten(0, 1)).unflatten(1, seen.shape[:2])
            elif all_members:
                values = self.utilities(parameters, seen[0]).unsqueeze(1)
            else:
                values = self.utilities(parameters, seen if seen.shape[0] > 1 else seen[0]).unsqueeze(1)
            return values[:, :, :, 1:] if self.sequences else values

        if kind.startswith("own"):
            known = online_next if kind == "own_online" else None
            values = known if known is not None else ahead(flat, False).squeeze(1)
            chooser = None
            if self.target.double_q and kind == "own_target":
                chooser = online_next if online_next is not None else ahead(self.online.detach(), False).squeeze(1)
            return worth(values, chooser)
        every = ahead(flat, True)
        chooser = None
        if self.target.double_q and kind == "mean_target":
            online = ahead(self.online.detach(), True)
            chooser = online.mean(0) if reduce == "max_of_mean" else online
        if reduce == "max_of_mean":
            return worth(every.mean(0), chooser)
        return worth(every, chooser).mean(0)

    def targets(self, batch: TensorDict, online_next: Tensor | None = None) -> Tensor:
        """Targets ``[members or 1, items, steps, 1 or agents]`` (Schaefer et al. 2025, eq. of sec. 4.2), no gradient.

        Independent learners have one an agent; joint values one for the team, ``r + gamma * mix(next values)``.
        """
        with torch.no_grad():
            reward = self.rewards(self.team_reward(batch["reward"]), batch["filled"], self._all_sum)
            ahead = self._next_values(batch, online_next)
            if self.mixing.kind != "none":
                state = self._state(batch, slice(1, None))
                flat = cast(Tensor, self.lagged_mixer) if self.target.lagged else self.online_mixer.detach()
                ahead = self._mixed(flat, ahead, state, self.target.kind.startswith("mean")).unsqueeze(-1)
            alive = (~batch["terminated"]).unsqueeze(-1)
            return reward + self.gamma * torch.where(alive, ahead, 0.0)

    def _state(self, batch: TensorDict, steps: slice) -> Tensor | None:
        """Global states ``[minibatches, items, steps, features]`` at ``steps``, where the mixer reads them."""
        if not isinstance(self.mixer, QMixer):
            return None
        assert self.spec is not None
        if self.spec.own_state:
            return batch["state"][:, :, steps]
        return batch["observation"][:, :, steps].flatten(-2)

    def _mixed(self, flat: Tensor, utilities: Tensor, state: Tensor | None, average: bool) -> Tensor:
        """Joint values ``[members, items, steps]`` of ``utilities`` ``[members or 1, items, steps, agents]``.

        ``average``: utilities are the ensemble's, and so is the joint value: the mean over members' mixers, if each has
        its own.
        """
        if state is None:
            return self.mixer.mix(flat, utilities, None)
        batches, items, steps = utilities.shape[0], utilities.shape[1], utilities.shape[2]
        if average and flat.shape[0] > 1:
            rows, seen = utilities.reshape(1, -1, utilities.shape[-1]), state.reshape(1, -1, state.shape[-1])
            count = flat.shape[0]
            mixed = self.mixer.mix(flat, rows.expand(count, -1, -1), seen.expand(count, -1, -1)).mean(0)
            return mixed.view(batches, items, steps)
        state = state.expand(batches, -1, -1, -1)
        return self.mixer.mix(flat, utilities.flatten(1, 2), state.flatten(1, 2)).view(batches, items, steps)

    def losses(self, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """Each member's loss ``[members]``, targets, and utilities of the steps ``[members, items, steps, agents,
        actions]``."""
        observation: Tensor = batch["observation"]
        shared = observation.shape[0] == 1
        seen = observation if self.sequences else observation[:, :, :-1]
        values = self.utilities(self.online, seen[0] if shared else seen)
        online_next = None
        if self.sequences:
            online_next = values[:, :, 1:].detach()
            values = values[:, :, :-1]
        action = batch["action"].expand(self.members, -1, -1, -1)
        chosen = values.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        target = self.targets(batch, online_next)
        if self.mixing.kind == "none":
            error = (chosen - target).square().mean(-1)
        else:
            joint = self._mixed(self.online_mixer, chosen, self._state(batch, slice(None, -1)), False)
            error = (joint - target.squeeze(-1)).square()
        filled = cast(Tensor, batch["filled"])
        weight = filled.to(error.dtype).expand(self.members, -1, -1)
        if self.bootstrap_p < 1.0:
            bits = batch["member_mask"].movedim(-1, 0)  # [members, minibatches, items]
            bits = bits[:, 0] if shared else torch.stack([bits[k, k] for k in range(self.members)])
            weight = weight * bits.unsqueeze(-1)
        total = weight.sum((1, 2))
        if self._world > 1:  # a mean over all ranks' steps, though ranks hold unequally many
            total = self._all_sum(total) / self._world
        return (weight * error).sum((1, 2)) / total.clamp_min(1.0 / self._world), target, values

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        self._check_batch(batch)
        optimizer = cast(LightningOptimizer, self.optimizers())
        adam, updates = optimizer.optimizer, batch.batch_size[0]
        total = torch.zeros((), device=self.device)
        for number in range(updates):
            part = cast(TensorDict, batch[number])
            self._update_targets(self.global_step * updates + number)
            losses, target, values = self.losses(part)
            adam.zero_grad()
            self.manual_backward(losses.sum())
            self.clip_gradients_of_members()
            total += losses.detach().sum()
            if number < updates - 1:
                adam.step()
                continue
            optimizer.step()  # Lightning counts this one: its steps are batches
            logging = self._logs_now()
            if (logging or total.device.type == "cpu") and not math.isfinite(float(total)):
                raise DivergenceError(
                    "ValueMARL: the loss is no longer finite: resume from the last checkpoint with a lower "
                    "learning_rate, or target.kind: mean_target"
                )
            if logging:
                self._log_training(part, total / updates, target, values.detach())
        return total / updates

    def _check_batch(self, batch: TensorDict) -> None:
        """The first batch against what the environment and the settings say."""
        if not self._checked:
            assert self.spec is not None
            masked = self.bootstrap_p < 1.0
            carried = self.dropout.active
            check_batch(batch, self.spec, self.minibatches, self.sequences, self.members, masked, carried)
            self._checked = True

    def _update_targets(self, update: int) -> None:
        """Before the optimiser's update number ``update``, counted from 0."""
        rule = self.target
        if rule.lagged and update and update % rule.update_every == 0:
            with torch.no_grad():
                cast(Tensor, self.lagged).lerp_(self.online, rule.tau)
                cast(Tensor, self.lagged_mixer).lerp_(self.online_mixer, rule.tau)

    def _log_training(self, batch: TensorDict, loss: Tensor, target: Tensor, values: Tensor) -> None:
        if self.minibatches > 1:  # members must be compared on the same steps
            with torch.no_grad():
                seen: Tensor = batch["observation"][0]
                values = self.utilities(self.online, seen if self.sequences else seen[:, :-1])
                values = values[:, :, :-1] if self.sequences else values
        filled = cast(Tensor, batch["filled"])
        values, target = values[:, filled[0]], target[filled.expand(*target.shape[:3])]
        mean, std = ensemble_moments(values)
        legal = batch["legal"][0, :, :-1][filled[0]] if "legal" in batch.keys() else None  # noqa: SIM118 - a TensorDict
        ties = torch.zeros_like(mean)
        greedy = best_action(mean, legal, ties)
        bold = best_action(mean + self.explorer.beta * std, legal, ties)
        frames = self._frames
        paid = self.team_reward(batch["reward"])[filled].abs().max()
        largest = torch.maximum(cast(Tensor, self.largest_reward), paid)
        cast(Tensor, self.largest_reward).copy_(largest)
        target_mean = target.mean()
        self.log_dict(
            {
                "train/loss": loss,
                "train/epsilon": self.explorer.epsilon(frames),
                "q/mean": mean.mean(),
                "q/std": std.mean(),
                "ucb/disagree": (greedy != bold).float().mean(),
                "vote/agreement": majority_vote(values, legal)[1].mean(),
                "target/mean": target_mean,
                **({} if self._gradient_norm is None else {"grad/norm": self._gradient_norm.mean()}),
                "frames": float(frames),
            }
        )
        self._check_divergence(target.abs().mean())

    def _check_divergence(self, size: Tensor) -> None:
        if self.divergence_limit is None or self.gamma >= 1.0 or self.reward.norm != "none":
            return
        check_size(float(size), float(cast(Tensor, self.largest_reward)), self.gamma, self.divergence_limit)

    def clip_gradients_of_members(self) -> None:
        """Scale gradients down to ``clip.norm``, each member's by itself or all together."""
        assert self.online.grad is not None
        self._gradient_norm = clip_members(self.online.grad, self.online_mixer.grad, self.clip)
