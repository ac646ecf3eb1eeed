"""MAPPO and IPPO: proximal policy optimisation for cooperating agents (Yu et al. 2022; de Witt et al. 2020)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict
from torch import Tensor, nn

from modules.contracts import MultiAgentSpec
from modules.marl import MultiAgentModule, PartnerDropout
from modules.marl.dropout import PRESENT
from modules.networks.stacked_agents import StackedAgents
from modules.networks.stacked_mlp import StackedMLP
from modules.objectives.advantage import gae
from modules.objectives.ppo import entropy, masked_log_softmax, ppo_loss


class MAPPO(MultiAgentModule):
    """PPO with one policy network for all agents, and a critic of the global state (MAPPO) or of observations (IPPO).

    A training step is one rollout: all epochs' minibatches, one Adam step each. Metrics: ``train/policy_loss``,
    ``train/value_loss``, ``train/entropy``, ``train/approximate_kl``, ``train/clip_fraction``, ``frames``, and in
    evaluation ``val/return`` (undiscounted team return) and ``val/length``.

    Args:
        critic: ``central`` reads the global state and values the team's reward (MAPPO); ``local`` reads each agent's
            observation and values its own (IPPO).
        hidden: width of both hidden layers of policy and critic.
        share_agents: one policy for all agents, told apart by a one-hot number; else one each.
        gamma, lambda_: discount and GAE's lambda, in [0, 1].
        clip: half-width of the probability ratio's interval.
        entropy_weight, value_weight: coefficients of the loss.
        learning_rate: Adam's.
        max_grad_norm: greatest norm of the whole gradient.
        evaluator: act in evaluation by the likeliest action, or draw.
        dropout, partners: see :class:`~modules.marl.MultiAgentModule`. What missing agents do is no action of the
            policy: it enters neither the policy's loss nor the local critic's.

    Raises:
        ValueError: a setting out of range; at set-up, a datamodule without multi-agent environments.
    """

    partner = "datamodules.MARLRolloutDataModule"

    def __init__(
        self,
        critic: Literal["central", "local"] = "central",
        hidden: int = 64,
        share_agents: bool = True,
        gamma: float = 0.99,
        lambda_: float = 0.95,
        clip: float = 0.2,
        entropy_weight: float = 0.01,
        value_weight: float = 0.5,
        learning_rate: float = 5e-4,
        max_grad_norm: float = 10.0,
        evaluator: Literal["likeliest", "draw"] = "likeliest",
        dropout: PartnerDropout | None = None,
        partners: list[str] | None = None,
    ) -> None:
        super().__init__(dropout, partners)
        for name, value in (("gamma", gamma), ("lambda_", lambda_)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"MAPPO: {name} must be in [0, 1], got {value}")
        for name, value in (
            ("hidden", hidden),
            ("clip", clip),
            ("learning_rate", learning_rate),
            ("max_grad_norm", max_grad_norm),
        ):
            if not value > 0:
                raise ValueError(f"MAPPO: {name} must be > 0, got {value}")
        for name, value in (("entropy_weight", entropy_weight), ("value_weight", value_weight)):
            if not value >= 0:
                raise ValueError(f"MAPPO: {name} must be >= 0, got {value}")
        self.save_hyperparameters(logger=False, ignore=["dropout", "partners"])
        self.save_hyperparameters({"dropout": dataclasses.asdict(self.dropout)}, logger=False)
        self.critic, self.hidden, self.share_agents = critic, hidden, share_agents
        self.gamma, self.lambda_, self.clip = gamma, lambda_, clip
        self.entropy_weight, self.value_weight = entropy_weight, value_weight
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.evaluator = evaluator

    # -- set-up -------------------------------------------------------------------------------------------------------
    def build(self, spec: MultiAgentSpec, generator: torch.Generator) -> None:
        """Make networks for the environment of ``spec``, with weights drawn from ``generator``."""
        self.dropout.check(spec)
        self.spec = spec
        # a small last layer: a policy that starts near uniform commits to nothing yet
        self.actor = StackedAgents(
            1,
            spec.num_agents,
            spec.observation_size,
            spec.num_actions,
            self.hidden,
            share_agents=self.share_agents,
            output_gain=0.01,
        )
        self.actor_weights = nn.Parameter(self.actor.init(generator))
        seen = spec.state_size if self.critic == "central" else spec.observation_size + spec.num_agents
        self.value_network = StackedMLP(seen, [self.hidden, self.hidden], 1, "relu", "kaiming")
        drawn = self.value_network.init(1, generator)
        self.critic_weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in drawn.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, eps=1e-5, fused=True)

    # -- acting -------------------------------------------------------------------------------------------------------
    def begin(
        self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None
    ) -> dict[str, Tensor]:
        return self._begin_dropout(len(observation), generator, frames)

    def answers(self, observation: Tensor, state: Tensor) -> Tensor:
        return self.log_policy(observation, None)

    def log_policy(self, observation: Tensor, legal: Tensor | None) -> Tensor:
        """``[rows, agents, actions]`` of ``observation`` ``[rows, agents, features]``."""
        return masked_log_softmax(self.actor.apply(self.actor_weights, observation)[0], legal)

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        legal: Tensor | None,
        carry: dict[str, Tensor],
        generator: torch.Generator,
        frames: int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_policy = self.log_policy(observation, legal)
        if frames is None and self.evaluator == "likeliest":
            return log_policy.argmax(-1), carry
        drawn = torch.rand(log_policy.shape, generator=generator, device=generator.device).clamp_min(1e-12)
        action = (log_policy - torch.log(-torch.log(drawn))).argmax(-1)  # Gumbel's trick
        return self._drop_out(action, legal, carry, generator), carry

    # -- learning -----------------------------------------------------------------------------------------------------
    def values(self, observation: Tensor, state: Tensor) -> Tensor:
        """``[rows, 1]`` of the team, or ``[rows, agents]``, from observations ``[rows, agents, features]``."""
        params = dict(self.critic_weights.items())
        if self.critic == "central":
            return self.value_network.apply(params, state)[0]
        agents = observation.shape[-2]
        identity = torch.eye(agents, device=observation.device).expand(*observation.shape[:-1], agents)
        seen = torch.cat([observation, identity], -1)
        return self.value_network.apply(params, seen.flatten(0, 1))[0].view(-1, agents)

    def prepare_rollout(self, rollout: TensorDict) -> TensorDict:
        """Log-probabilities, values, advantages and value targets of a chunk ``[envs, steps]``."""
        assert self.spec is not None
        shape = rollout.batch_size
        seen = cast(dict[str, Tensor], cast(TensorDict, rollout.flatten(0, 1)).to_dict())
        observation, after, action = seen["observation"], seen["next_observation"], seen["action"]
        state, next_state = seen.get("state", observation.flatten(1)), seen.get("next_state", after.flatten(1))
        legal = seen.get("legal")
        log_policy = self.log_policy(observation, legal)
        value, next_value = self.values(observation, state), self.values(after, next_state)
        reward: Tensor = rollout["reward"]
        if self.critic == "central":
            reward = reward[..., :1] if self.spec.common_reward else reward.sum(-1, keepdim=True)
        terminated: Tensor = rollout["terminated"]
        done = (terminated | rollout["truncated"]).unsqueeze(-1).expand_as(reward)
        terminated = terminated.unsqueeze(-1).expand_as(reward)
        value, next_value = value.view_as(reward), next_value.view_as(reward)
        advantage, target = gae(reward, value, next_value, terminated, done, self.gamma, self.lambda_)
        ready = {
            "observation": observation.unflatten(0, shape),
            "state": state.unflatten(0, shape),
            "action": rollout["action"],
            "log_probability": log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1).unflatten(0, shape),
            "advantage": advantage.expand(*shape, self.spec.num_agents),
            "target": target,
        }
        if legal is not None:
            ready["legal"] = rollout["legal"]
        if self.dropout.active:
            ready["present"] = (rollout["carry_absent"] == PRESENT).float()
        return TensorDict(ready, list(shape))

    def _loss(self, batch: TensorDict) -> dict[str, Tensor]:
        legal = batch["legal"] if "legal" in batch.keys() else None  # noqa: SIM118 - a TensorDict
        log_policy = self.log_policy(batch["observation"], legal)
        taken = log_policy.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        advantage: Tensor = batch["advantage"]
        present = cast(Tensor, batch["present"]) if self.dropout.active else None
        acted = advantage if present is None else advantage[present > 0]
        advantage = (advantage - acted.mean()) / (acted.std(correction=0) + 1e-8)
        parts = ppo_loss(
            taken.flatten(),
            batch["log_probability"].flatten(),
            advantage.flatten(),
            policy_entropy=entropy(log_policy).flatten(),
            weights=None if present is None else present.flatten(),
            clip=self.clip,
            entropy_weight=self.entropy_weight,
        )
        error = 0.5 * (self.values(batch["observation"], batch["state"]) - batch["target"]).square()
        if present is not None and self.critic == "local":
            error = error[present > 0]
        error = error.mean()
        return {**parts, "loss": parts["loss"] + self.value_weight * error, "value_loss": error.detach()}

    def training_step(self, batch: TensorDict, batch_idx: int) -> Tensor:
        optimizer = cast(LightningOptimizer, self.optimizers())
        adam, updates = optimizer.optimizer, batch.batch_size[0]
        parts: dict[str, Tensor] = {}
        for number in range(updates):
            parts = self._loss(cast(TensorDict, batch[number]))
            adam.zero_grad()
            self.manual_backward(parts["loss"])
            nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm, foreach=True)
            # Lightning counts the last one: its steps are batches
            adam.step() if number < updates - 1 else optimizer.step()
        if not math.isfinite(float(parts["loss"].detach())):
            raise ValueError("MAPPO: the loss is no longer finite: resume with a lower learning_rate")
        if self._logs_now():
            named = ("policy_loss", "value_loss", "entropy", "approximate_kl", "clip_fraction")
            self.log_dict({**{f"train/{n}": parts[n] for n in named}, "frames": float(self._frames)})
        return parts["loss"].detach()
