"""MAVEN: a joint latent drawn once an episode makes QMIX's agents explore together (Mahajan et al. 2019)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional

from modules.contracts import MultiAgentSpec, PlaysTeams
from modules.emax.module import ValueMARL
from modules.emax.settings import Mixing, check_kinds, check_least
from modules.networks.mixers import QMixer
from modules.networks.stacked_agents import StackedAgents, StackedGRU
from modules.networks.stacked_mlp import StackedMLP

_CARRIED = ("latent", "latent_log_prob", "latent_frames")
_NO_PREFERENCE = -1e9
"""Stands for the utility of what is not available in a softmax: finite, so that a row without any action is uniform."""


@dataclass
class Latent:
    """MAVEN's latent variable: who draws it, and what ties behaviour to it.

    Args:
        size: values of the latent.
        information_weight: of the discriminator's cross-entropy in the loss (lambda_MI).
        value_weight: of the temporal-difference loss (lambda_QL).
        discriminator: ``trajectory``: a recurrent network reads the whole episode and guesses the latent at its end;
            ``step``: a perceptron guesses it from each step alone.
        discriminator_hidden: its width.
        policy_hidden: width of the hierarchical policy and of its baseline.
        entropy_weight: of the hierarchical policy's entropy, in units of return.
        policy_window: the hierarchical policy learns from episodes begun within so many environment frames (over all
            ranks): their returns are of agents much like the present ones.
        max_ratio: greatest importance ratio of an episode.
        evaluation: evaluation takes the policy's most probable latent (``greedy``), or draws from it (``sampled``).
    """

    size: int = 16
    information_weight: float = 0.001
    value_weight: float = 1.0
    discriminator: Literal["trajectory", "step"] = "trajectory"
    discriminator_hidden: int = 64
    policy_hidden: int = 128
    entropy_weight: float = 0.01
    policy_window: int = 25_000
    max_ratio: float = 2.0
    evaluation: Literal["greedy", "sampled"] = "greedy"

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(
            "Latent",
            size=(self.size, 2),
            information_weight=(self.information_weight, 0.0),
            value_weight=(self.value_weight, 0.0),
            discriminator_hidden=(self.discriminator_hidden, 1),
            policy_hidden=(self.policy_hidden, 1),
            entropy_weight=(self.entropy_weight, 0.0),
            policy_window=(self.policy_window, 1),
            max_ratio=(self.max_ratio, 1.0),
        )


class LatentAgents(StackedAgents):
    """Agents of one member whose last layer is generated from the episode's latent and the agent's number.

    ``Q_i(h_i, a; z) = features_i(h_i) . W(z, i)[:, a]`` with ``W(z, i) = W_z + W_i + W_0``: a linear hyper-network on
    the one-hot latent and number, as in the authors' code. The latent, constant within an episode, is the last feature
    of every observation, so that shapes are those of :class:`~modules.networks.stacked_agents.StackedAgents`.

    Args:
        agents, observation_size, num_actions, hidden, recurrent, share_agents, agent_id, output_gain: as there;
            ``observation_size`` without the latent.
        latents: values of the latent.
    """

    def __init__(
        self,
        agents: int,
        observation_size: int,
        num_actions: int,
        latents: int,
        hidden: int = 64,
        recurrent: bool = False,
        share_agents: bool = True,
        agent_id: bool = True,
        output_gain: float = 1.0,
    ) -> None:
        super().__init__(
            1, agents, observation_size, num_actions, hidden, recurrent, share_agents, agent_id, head=False
        )
        self.latents, self.output_gain = latents, output_gain
        self._table = (latents + agents + 1, hidden * num_actions)
        self._trunk = self.size
        self.size += math.prod(self._table)

    def init(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters ``[1, size]``; the three parts of a last layer add up to the variance with which
        ``nn.Linear`` starts."""
        drawn = torch.rand(1, math.prod(self._table), generator=generator, device=generator.device)
        bound = self.output_gain / math.sqrt(3.0 * self.hidden)
        return torch.cat([super().init(generator), (2.0 * drawn - 1.0) * bound], 1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The shared layers' parameters as views of ``flat``, without :meth:`table`."""
        return super().views(flat[:, : self._trunk])

    def table(self, flat: Tensor) -> Tensor:
        """The hyper-network ``[latents + agents + 1, hidden * actions]``, a view of ``flat``."""
        return flat[0, self._trunk :].view(self._table)

    def _head(self, flat: Tensor, features: Tensor, latent: Tensor) -> Tensor:
        """Utilities ``[rows, agents, steps, actions]`` of ``features`` ``[rows, agents, steps, hidden]``; ``latent``
        ``[rows]``."""
        rows, agents, steps, hidden = features.shape
        for_latent, for_agent, bias = self.table(flat).split([self.latents, self.agents, 1])
        # a product with one-hot rows, and not a look-up: its gradient is a product too, the same in every run
        weight = (one_hot(latent, self.latents) @ for_latent).unsqueeze(1) + (for_agent + bias)
        out = torch.bmm(features.reshape(rows * agents, steps, hidden), weight.view(rows * agents, hidden, -1))
        return out.view(rows, agents, steps, -1)

    def apply(self, flat: Tensor, observation: Tensor) -> Tensor:
        """Utilities ``[1, rows, agents, actions]`` of ``observation`` ``[(1,) rows, agents, features + 1]``."""
        features = super().apply(flat, observation[..., :-1])[0]
        latent = observation[..., 0, -1].reshape(-1)
        return self._head(flat, features.unsqueeze(2), latent).squeeze(2).unsqueeze(0)

    def step(self, flat: Tensor, observation: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As there, with ``observation`` ``[rows, agents, features + 1]``."""
        features, hidden = super().step(flat, observation[..., :-1], hidden)
        values = self._head(flat, features[0].unsqueeze(2), observation[:, 0, -1])
        return values.squeeze(2).unsqueeze(0), hidden

    def sequence(self, flat: Tensor, observation: Tensor) -> Tensor:
        """As there, with ``observation`` ``[(1,) rows, time, agents, features + 1]``."""
        seen, rows, time = observation[..., :-1], observation.shape[-4], observation.shape[-3]
        if self.recurrent:
            features = super().sequence(flat, seen)[0]
        else:
            features = super().apply(flat, seen.flatten(-4, -3))[0].unflatten(0, (rows, time))
        latent = observation[..., 0, 0, -1].reshape(-1)
        return self._head(flat, features.transpose(1, 2), latent).transpose(1, 2).unsqueeze(0)


def one_hot(index: Tensor, size: int) -> Tensor:
    """float32 ``[..., size]`` of whole numbers ``[...]`` of any dtype."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).float()


class _Network(nn.Module):
    """One perceptron or recurrent network with weights drawn from a generator."""

    def __init__(self, network: StackedMLP | StackedGRU, generator: torch.Generator) -> None:
        super().__init__()
        self.network = network
        self.weights = nn.ParameterDict({name: nn.Parameter(w) for name, w in network.init(1, generator).items()})

    def forward(self, rows: Tensor) -> Tensor:
        """``[rows, in]`` (or ``[rows, time, in]`` for a recurrent one) to ``[rows, (time,) out]``."""
        weights = cast(Mapping[str, Tensor], self.weights)
        if isinstance(self.network, StackedGRU):
            return self.network.sequence(weights, rows)[0]
        return self.network.apply(weights, rows)[0]


class MAVEN(ValueMARL):
    """QMIX conditioned on a latent that all agents know from the start of an episode (Mahajan et al. 2019).

    A hierarchical policy ``pi(z | s_0)`` draws the latent ``z`` when an episode starts; utilities and mixer are
    functions of it, so that agents explore by whole episodes of one joint behaviour, with epsilon-greedy on top. The
    loss is, with ``sigma(tau)`` the states and the softmax of all agents' utilities at every step::

        value_weight * TD  -  information_weight * log q(z | sigma(tau))            agents, mixer, discriminator q
        - min(pi / pi_then, max_ratio) * log pi(z | s_0) * (return - b(s_0))       hierarchical policy
        - entropy_weight * entropy(pi(. | s_0)) + (return - b(s_0))^2 / 2          ... and its baseline b

    The first line's second term is the part of the mutual information's lower bound ``E[log q(z | sigma(tau)) - log
    p(z)]`` that agents can change. The hierarchical policy is trained by REINFORCE on the undiscounted team return.
    Episodes come from replay: of those in the minibatch only the ones begun within the last ``policy_window`` frames
    count, each weighted by the ratio of today's probability of its latent to the one that it was drawn with (stored
    beside it), cut at ``max_ratio``; without any, only the entropy is trained. The authors keep a separate store of
    the last 512 episodes, without ratios and without a baseline.

    All parameters take part in one loss and one Adam. Items of replay are whole episodes.

    Metrics beside those of :class:`~modules.emax.module.ValueMARL`: ``latent/information`` (nats; mean of ``log q(z |
    sigma(tau)) - log p(z)``, a lower bound of the mutual information), ``latent/entropy`` (of the hierarchical policy,
    nats), ``latent/baseline`` (mean return that it expects), ``latent/recent`` (share of episodes within the window).

    Args:
        latent: see :class:`Latent`.
        mixing: ``qmix`` or ``vdn``; QMIX if left out.
        **kwargs: as in :class:`~modules.emax.module.ValueMARL`; the ensemble has one member.

    Raises:
        ValueError: as there; an ensemble of more than one member or with bootstrap bits; no mixing.
    """

    def __init__(self, latent: Latent | None = None, mixing: Mixing | None = None, **kwargs: Any) -> None:
        super().__init__(mixing=mixing or Mixing(kind="qmix"), **kwargs)
        self.latent = latent or Latent()
        if self.members != 1 or self.bootstrap_p < 1.0:
            raise ValueError(
                "MAVEN: ensemble must be one member that learns from every item (size: 1, bootstrap_p: 1), got "
                f"size {self.members} and bootstrap_p {self.bootstrap_p}"
            )
        if self.mixing.kind == "none":
            raise ValueError("MAVEN: mixing.kind must be qmix or vdn: the latent is the team's, got none")
        self.save_hyperparameters({"latent": dataclasses.asdict(self.latent)}, logger=False)
        self._latent_metrics: dict[str, Tensor] = {}

    @property
    def sequences(self) -> bool:
        return True

    @property
    def carried(self) -> tuple[str, ...]:
        return (*super().carried, *_CARRIED)

    # -- set-up -------------------------------------------------------------------------------------------------------
    def _make_agents(self, spec: MultiAgentSpec) -> LatentAgents:
        net = self.network
        return LatentAgents(
            spec.num_agents,
            spec.observation_size,
            spec.num_actions,
            self.latent.size,
            net.hidden,
            net.recurrent,
            net.share_agents,
            net.agent_id,
            net.output_gain,
        )

    def _mixer_state_size(self, spec: MultiAgentSpec) -> int:
        return spec.state_size + self.latent.size

    def build(self, spec: MultiAgentSpec, generator: torch.Generator) -> None:
        super().build(spec, generator)
        setting, size = self.latent, self.latent.size
        wide, seen = setting.discriminator_hidden, spec.num_agents * spec.num_actions + spec.state_size
        guesser = (
            StackedGRU(seen, wide, size)
            if setting.discriminator == "trajectory"
            else StackedMLP(seen, [wide, wide, wide], size, "relu", "kaiming")
        )
        self.discriminator = _Network(guesser, generator)
        # starts near uniform: every latent is to be tried
        chooser = StackedMLP(spec.state_size, [setting.policy_hidden], size, "relu", "kaiming", output_gain=0.01)
        self.latent_policy = _Network(chooser, generator)
        # starts at 0: where nobody has been paid yet, no latent has an advantage
        critic = StackedMLP(spec.state_size, [setting.policy_hidden], 1, "relu", "kaiming", output_gain=0.0)
        self.baseline = _Network(critic, generator)

    # -- acting -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def begin(
        self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None
    ) -> dict[str, Tensor]:
        carry = super().begin(observation, state, generator, frames)
        log_probs = self.latent_policy(state).log_softmax(-1)
        if frames is None and self.latent.evaluation == "greedy":
            latent = log_probs.argmax(-1)
        else:
            latent = torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)
        carry["latent"] = latent
        carry["latent_log_prob"] = log_probs.gather(1, latent.unsqueeze(1)).squeeze(1)
        carry["latent_frames"] = torch.full_like(latent, frames or 0)
        return carry

    def current_utilities(self, observation: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return super().current_utilities(_joined(observation, carry["latent"]), carry)

    def more_capabilities(self, data: PlaysTeams) -> Mapping[str, Any]:
        return {}  # its utilities are of an observation and a latent, and there is one member

    # -- learning -----------------------------------------------------------------------------------------------------
    def _check_batch(self, batch: TensorDict) -> None:
        if self._checked:
            return
        for name in _CARRIED:
            found = batch.get(f"carry_{name}", None)
            if found is None or found.shape != batch.batch_size:
                got = "nothing" if found is None else list(found.shape)
                raise ValueError(
                    f"MAVEN: batch: 'carry_{name}' must be {list(batch.batch_size)}, got {got}: what the module names "
                    "in carried must be stored with each item (datamodules.MARLDataModule does)"
                )
        super()._check_batch(batch)

    def _states(self, batch: TensorDict) -> Tensor:
        """Global states without the latent, ``[minibatches, items, steps + 1, features]``."""
        assert self.spec is not None
        return batch["state"] if self.spec.own_state else batch["observation"][..., :-1].flatten(-2)

    def _state(self, batch: TensorDict, steps: slice) -> Tensor | None:
        if not isinstance(self.mixer, QMixer):
            return None
        state = self._states(batch)[:, :, steps]
        latent = one_hot(batch["carry_latent"], self.latent.size).unsqueeze(2)
        return torch.cat([state, latent.expand(*state.shape[:3], -1)], -1)

    def losses(self, batch: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """As there, ``batch`` with what was carried; the loss ``[1]`` is the sum of all terms."""
        setting, part = self.latent, cast(TensorDict, batch.clone(recurse=False))
        part["observation"] = _joined(batch["observation"], batch["carry_latent"])
        losses, target, values = super().losses(part)
        guess = self._discriminator_loss(part, values)
        chooser = self._latent_policy_loss(part)
        return setting.value_weight * losses + setting.information_weight * guess + chooser, target, values

    def _mean(self, value: Tensor, weight: Tensor) -> Tensor:
        """Mean of ``value`` weighted by ``weight`` (0 or 1), as all ranks together would take it."""
        count = weight.sum()
        if self._world > 1:
            count = self._all_sum(count) / self._world
        return (value * weight).sum() / count.clamp_min(1.0 / self._world)

    def _discriminator_loss(self, batch: TensorDict, values: Tensor) -> Tensor:
        """Cross-entropy of ``q(z | sigma(tau))``, nats; differentiable in the discriminator and in the utilities
        ``values`` ``[1, items, steps, agents, actions]``."""
        filled, latent = cast(Tensor, batch["filled"])[0], cast(Tensor, batch["carry_latent"])[0]
        preference = values[0]
        if "legal" in batch.keys():  # noqa: SIM118 - a TensorDict
            preference = torch.where(batch["legal"][0, :, :-1], preference, _NO_PREFERENCE)
        seen = torch.cat([preference.softmax(-1).flatten(-2), self._states(batch)[0, :, :-1]], -1)
        logits = self.discriminator(seen if self.latent.discriminator == "trajectory" else seen.flatten(0, 1))
        if self.latent.discriminator == "trajectory":
            last = (filled.sum(-1) - 1).clamp_min(0)
            logits = logits.gather(1, last.view(-1, 1, 1).expand(-1, 1, logits.shape[-1])).squeeze(1)
            weight = filled.any(-1).float()
        else:
            latent, weight = latent.unsqueeze(1).expand_as(filled).flatten(), filled.flatten().float()
        wrong = self._mean(functional.cross_entropy(logits, latent, reduction="none"), weight)
        prior = -cast(Tensor, batch["carry_latent_log_prob"]).mean()
        self._latent_metrics["latent/information"] = prior - wrong.detach()
        return wrong

    def _latent_policy_loss(self, batch: TensorDict) -> Tensor:
        """REINFORCE with a baseline and an entropy bonus; differentiable in the hierarchical policy and its
        baseline."""
        setting, latent = self.latent, cast(Tensor, batch["carry_latent"])[0]
        first = self._states(batch)[0, :, 0]
        paid = self.team_reward(batch["reward"][0])[..., 0]
        returns = torch.where(batch["filled"][0], paid, 0.0).sum(-1)
        log_probs = self.latent_policy(first).log_softmax(-1)
        log_prob = log_probs.gather(1, latent.unsqueeze(1)).squeeze(1)
        expected = self.baseline(first).squeeze(1)
        recent = torch.ones_like(returns)
        if self._trainer is not None:  # without one there is no count of frames, and all episodes count
            begun = cast(Tensor, batch["carry_latent_frames"])[0]
            recent = (begun >= self._frames - setting.policy_window).float()
        with torch.no_grad():
            ratio = (log_prob - batch["carry_latent_log_prob"][0]).exp().clamp_max(setting.max_ratio)
            advantage = ratio * (returns - expected)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        self._latent_metrics |= {
            "latent/entropy": entropy.detach().mean(),
            "latent/baseline": expected.detach().mean(),
            "latent/recent": recent.mean(),
        }
        learnt = 0.5 * (returns - expected).square() - advantage * log_prob
        return self._mean(learnt, recent) - setting.entropy_weight * entropy.mean()

    def clip_gradients_of_members(self) -> None:
        """As there; discriminator, hierarchical policy and baseline are clipped each by itself."""
        super().clip_gradients_of_members()
        if self.clip.norm is not None:
            for network in (self.discriminator, self.latent_policy, self.baseline):
                nn.utils.clip_grad_norm_(network.parameters(), self.clip.norm)

    def _log_training(self, batch: TensorDict, loss: Tensor, target: Tensor, values: Tensor) -> None:
        super()._log_training(batch, loss, target, values)
        self.log_dict(self._latent_metrics)


def _joined(observation: Tensor, latent: Tensor) -> Tensor:
    """``observation`` ``[rows..., (steps,) agents, features]`` with the row's ``latent`` ``[rows...]`` behind."""
    shape = (*latent.shape, *(1,) * (observation.ndim - latent.ndim))
    return torch.cat([observation, latent.to(observation.dtype).view(shape).expand(*observation.shape[:-1], 1)], -1)
