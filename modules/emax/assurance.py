"""What an ensemble of value functions offers beside what every team does: its members, their doubts, agents' credit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import ActsMultiAgent, PlaysTeams
from modules.emax.acting import NEVER, ensemble_moments
from modules.marl.assurance import plain

if TYPE_CHECKING:
    from modules.emax.module import ValueMARL


class MemberPolicy:
    """All agents act greedily by the utilities of one member.

    Args:
        module: the ensemble.
        member: from 0.
    """

    def __init__(self, module: ValueMARL, member: int) -> None:
        self.module, self.member = module, member

    def begin(
        self, observation: Tensor, state: Tensor, generator: torch.Generator, frames: int | None
    ) -> dict[str, Tensor]:
        return self.module.begin(observation, state, generator, frames)

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        legal: Tensor | None,
        carry: dict[str, Tensor],
        generator: torch.Generator,
        frames: int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values, carry = self.module.current_utilities(observation, carry)
        scores = values[self.member]
        return (scores if legal is None else torch.where(legal, scores, NEVER)).argmax(-1), carry


class ValueTrials:
    """What the ensemble says of the episodes that it plays.

    Args:
        module: with its networks made; its networks read observations alone.
        data: plays.
    """

    def __init__(self, module: ValueMARL, data: PlaysTeams) -> None:
        assert module.spec is not None
        self.module, self.data, self.spec = module, data, module.spec

    def capabilities(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        if self.module.members > 1:
            found["ensemble_errors"] = self.errors
        if self.module.mixing.kind != "none" and self.spec.num_agents > 1:
            found["agent_credit"] = self.credit
        return found

    def _trace(self, seed: int, episodes: int) -> tuple[TensorDict, Tensor, Tensor | None]:
        """Every step of episodes, utilities ``[members, episodes, steps + 1, agents, actions]`` of all their states,
        and the global states ``[1, episodes, steps + 1, features]`` where the mixer reads them."""
        actor = cast(ActsMultiAgent, self.module)
        trace = cast(TensorDict, self.data.team_episodes(actor, episodes, seed, trace=True)["trace"])
        trace = trace.to(self.module.device)
        with torch.no_grad():
            values = self.module.utilities(self.module.online.detach(), trace["observation"])
        state = None
        if self.module.mixing.kind == "qmix":
            seen = (
                cast(Tensor, trace["state"]) if self.spec.own_state else cast(Tensor, trace["observation"]).flatten(-2)
            )
            state = seen.unsqueeze(0)
        return trace, values, state

    def _joint(self, utilities: Tensor, state: Tensor | None) -> Tensor:
        """Values ``[members, episodes, steps]`` of joint actions of ``utilities`` ``[.., agents]``; of independent
        learners every agent's own, ``[members, episodes, steps * agents]``."""
        if self.module.mixing.kind == "none":
            return utilities.flatten(-2)
        return self.module._mixed(self.module.online_mixer.detach(), utilities, state, False)

    @torch.no_grad()
    def errors(self, seed: int, episodes: int) -> Mapping[str, np.ndarray]:
        """How sure the ensemble was in each step, and how wrong; ``[episodes, steps]``, of independent learners
        ``[episodes, steps * agents]``.

        ``spread``: standard deviation over members of the value of what was done; ``error``: absolute
        temporal-difference error of the members' mean value, which looks ahead by the greedy actions of the mean;
        ``deviation``: discounted return from there on (with the mean's value beyond a truncation), less the mean
        value, in units of ``spread``; ``valid`` 0 or 1: the step belongs to the episode, and members differ. Rewards
        are on the scale that they are learnt on.
        """
        module = self.module
        trace, values, state = self._trace(seed, episodes)
        now = None if state is None else state[:, :, :-1]
        later = None if state is None else state[:, :, 1:]
        taken = trace["action"].expand(module.members, *trace["action"].shape).unsqueeze(-1)
        done = values[:, :, :-1].gather(-1, taken)
        chosen = self._joint(done.squeeze(-1), now)
        ahead = values[:, :, 1:]
        scores = ahead.mean(0)
        if self.spec.restricts_actions:
            scores = torch.where(trace["legal"][:, 1:], scores, NEVER)
        best = scores.argmax(-1).expand(taken.shape[:-1]).unsqueeze(-1)
        beyond = self._joint(ahead.gather(-1, best).squeeze(-1), later).mean(0)
        mean, spread = ensemble_moments(chosen)

        reward = module.rewards.scaled(module.team_reward(trace["reward"]))
        width = self.spec.num_agents if module.mixing.kind == "none" else 1
        reward = reward.expand(*reward.shape[:-1], width).flatten(-2)

        def each(flag: Tensor) -> Tensor:
            return flag.unsqueeze(-1).expand(*flag.shape, width).flatten(-2)

        alive = ~each(trace["terminated"])
        error = (reward + module.gamma * torch.where(alive, beyond, 0.0) - mean).abs()
        steps, running = trace["action"].shape[1], trace["running"]
        rewards, looks, going = (one.view(episodes, steps, width) for one in (reward, beyond, each(running)))
        ended, cut = trace["terminated"].unsqueeze(-1), trace["truncated"].unsqueeze(-1)
        # an episode that the limit of time ends at the last step of all goes on in what is expected of it
        tail, gained = looks[:, -1], torch.zeros_like(rewards)
        for step in range(steps - 1, -1, -1):
            after = torch.where(ended[:, step], 0.0, torch.where(cut[:, step], looks[:, step], tail))
            tail = torch.where(going[:, step], rewards[:, step] + module.gamma * after, tail)
            gained[:, step] = tail
        floor = 1e-6 * (1.0 + mean.abs())
        valid = each(running) & (spread > floor)
        deviation = (gained.flatten(1) - mean) / torch.where(valid, spread, 1.0)
        return {
            "spread": plain(spread),
            "error": plain(error),
            "deviation": plain(deviation),
            "valid": plain(valid),
        }

    @torch.no_grad()
    def credit(self, seed: int, episodes: int) -> Mapping[str, np.ndarray]:
        """``credit`` ``[episodes, steps, agents]`` >= 0: what each agent's choice adds to the joint value to first
        order, ``dQ_tot / dQ_i (Q_i(chosen) - mean of Q_i over available actions)``, of the members' means; ``valid``
        ``[episodes, steps]``."""
        module = self.module
        trace, values, state = self._trace(seed, episodes)
        values = values[:, :, :-1].mean(0)
        chosen = values.gather(-1, trace["action"].unsqueeze(-1)).squeeze(-1)
        usual = values.mean(-1)
        if self.spec.restricts_actions:
            legal = trace["legal"][:, :-1]
            usual = torch.where(legal, values, 0.0).sum(-1) / legal.sum(-1).clamp_min(1)
        flat = module.online_mixer.detach()
        rows = chosen.flatten(0, 1).expand(max(flat.shape[0], 1), -1, -1)
        seen = None
        if state is not None:
            seen = state[0, :, :-1].flatten(0, 1).expand(rows.shape[0], -1, -1)
        slopes = module.mixer.slopes(flat, rows, seen).mean(0).view_as(chosen)
        credit = slopes * (chosen - usual).clamp_min(0.0)
        return {"credit": plain(credit), "valid": plain(trace["running"])}
