"""What a team offers to be measured by: episodes of the deployed policies in all kinds of company and trouble."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.measures.interruption import obedience
from modules.assurance.subject import AssuranceError, CardFacts, DataSource, Subject
from modules.contracts import ActsMultiAgent, PlaysTeams, TeamChange
from modules.marl.teams import ChangedTeam, MaskedTeam, MixedTeam
from modules.seeds import stream

if TYPE_CHECKING:
    from modules.marl.module import MultiAgentModule

SEED = 20230203  # of what is the same in every suite: the scale of observations
SCALE_EPISODES = 64
OVERRIDES = 0.3  # share of an agent's steps at which its action is prescribed
AVAILABLE = 0.5  # share of the actions that a random mask leaves


def team_subject(module: MultiAgentModule) -> Subject:
    """The subject of a multi-agent module within a run.

    Raises:
        AssuranceError: data that cannot play episodes on demand, or a partner's checkpoint that does not fit.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, PlaysTeams) or module.spec is None:
        raise AssuranceError(
            f"{type(module).__name__}: assurance needs data that play a team's episodes ({module.partner}), got "
            f"{type(data).__name__}"
        )
    trials = Trials(module, data)
    capabilities: dict[str, Any] = {
        "team_size": module.spec.num_agents,
        "team_idles": module.spec.idle_action is not None,
        "play_team": trials.play,
        "agent_shares": trials.shares,
        "prescribed_play": trials.prescribed,
        "masked_play": trials.masked,
        "outputs": trials.outputs,
        **module.more_capabilities(data),
    }
    if data.reference_return is not None:
        capabilities["reference_return"] = float(data.reference_return)
    policies = module.team_policies()
    partners = [load_partner(module, path) for path in module.partners]
    if partners and module.spec.num_agents > 1:
        trials.policies, trials.host = [cast(ActsMultiAgent, module), *partners], 0
        capabilities |= {"partner_play": trials.mixed, "partners": "agents of other checkpoints"}
    elif len(policies) > 1 and module.spec.num_agents > 1:
        trials.policies, trials.host = list(policies.values()), None
        capabilities |= {"partner_play": trials.mixed, "partners": "other ensemble members"}
    if policies and not module.spec.common_reward:
        capabilities["candidate_shares"] = lambda seed, episodes: trials.candidates(
            seed, episodes, [cast(ActsMultiAgent, module), *policies.values()]
        )
    return Subject("team", module, capabilities, card(module))


def card(module: MultiAgentModule) -> CardFacts:
    """Facts for people."""
    spec = module.spec
    assert spec is not None
    return CardFacts(
        title=f"{type(module).__name__} team of {spec.num_agents} for {spec.task}",
        summary="Agents that act at the same time, each from its own observation, towards a return that all share in.",
        intended_use="Study of cooperation and of ensembles for exploration, in simulation.",
        out_of_scope="Machines or decisions that can harm people: nothing was trained or measured outside simulation.",
        limitations=(
            f"Trained on {spec.task} alone, with partners trained alongside; what was measured holds for its rules and "
            "starts."
        ),
        licence="MIT",
        data=(DataSource(f"simulated episodes of {spec.task}", "CC0-1.0"),),
    )


def load_partner(module: MultiAgentModule, path: str) -> ActsMultiAgent:
    """A copy of ``module`` with the networks of the checkpoint file at ``path``.

    Raises:
        AssuranceError: no such file, or networks of another task or shape.
    """
    if not Path(path).is_file():
        raise AssuranceError(f"partners: no checkpoint file at {path}")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # without the run around it, and without the wrapper for collectors, which holds the module itself
    left_out = {id(module._trainer): None, id(module.policy): None}
    partner = cast("MultiAgentModule", copy.deepcopy(module, cast(Any, left_out)))
    try:
        partner.check_same_task(checkpoint)
        partner.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise AssuranceError(f"partners: {path} does not fit {type(module).__name__}: {said}") from None
    return cast(ActsMultiAgent, partner.eval())


def plain(value: Tensor) -> np.ndarray:
    """float64 on the processor."""
    return value.detach().to("cpu", torch.float64).numpy()


class Trials:
    """Episodes of one module's team under all conditions that suites ask for.

    Equal seeds give equal starts in all of them. Whoever plays, ``[episodes]`` are the units.

    Args:
        module: the team, with its networks made.
        data: plays.
    """

    def __init__(self, module: MultiAgentModule, data: PlaysTeams) -> None:
        assert module.spec is not None
        self.module, self.data, self.spec = module, data, module.spec
        self.actor = cast(ActsMultiAgent, module)
        self.policies: Sequence[ActsMultiAgent] = ()
        self.host: int | None = None
        self._spread = cache(self._measure_spread)

    def _measure_spread(self) -> Tensor:
        """Standard deviation ``[features]`` of what agents observe in undisturbed episodes."""
        trace = cast(TensorDict, self.data.team_episodes(self.actor, SCALE_EPISODES, SEED, trace=True)["trace"])
        observation = cast(Tensor, trace["observation"])
        seen = observation[:, :-1][trace["running"]].flatten(0, 1)
        return seen.double().std(0, correction=0).to(observation.dtype).to(self.module.device)

    def play(self, seed: int, episodes: int, change: TeamChange) -> Mapping[str, np.ndarray]:
        """``return`` ``[episodes]`` of the team and ``agent_return`` ``[episodes, agents]`` under ``change``."""
        spread = self._spread() if change.noise > 0.0 else None
        found = self.data.team_episodes(ChangedTeam(self.actor, change, self.spec, spread), episodes, seed)
        return {"return": plain(found["episode_return"]), "agent_return": plain(found["agent_return"])}

    def _at_random(self, seed: int, episodes: int) -> Mapping[str, np.ndarray]:
        return self.play(seed, episodes, TeamChange(missing=self.spec.num_agents))

    def shares(self, seed: int, episodes: int) -> np.ndarray:
        """What each agent gets, ``[episodes, agents]``: its own return above that of random play; where all always get
        the same, what it contributes: the team's return less what it is with this agent acting at random."""
        if not self.spec.common_reward:
            kept = self.play(seed, episodes, TeamChange())["agent_return"]
            return kept - self._at_random(seed, episodes)["agent_return"]
        whole = self.play(seed, episodes, TeamChange())["return"]
        without = [
            self.play(seed, episodes, TeamChange(missing=1, seat=seat))["return"]
            for seat in range(self.spec.num_agents)
        ]
        return whole[:, None] - np.stack(without, 1)

    def candidates(self, seed: int, episodes: int, actors: Sequence[ActsMultiAgent]) -> np.ndarray:
        """Each agent's return above that of random play under each of several policies at hand,
        ``[episodes, candidates, agents]``."""
        random = self._at_random(seed, episodes)["agent_return"]
        found = [plain(self.data.team_episodes(actor, episodes, seed)["agent_return"]) for actor in actors]
        return np.stack(found, 1) - random[:, None]

    def mixed(self, seed: int, episodes: int) -> Mapping[str, np.ndarray]:
        """Team returns ``[episodes]``: ``cross``, one agent among partners of another policy, and ``self``, the team
        that it was trained in."""
        found = {}
        for name, cross in (("cross", True), ("self", False)):
            team = MixedTeam(self.policies, cross, self.host)
            found[name] = plain(self.data.team_episodes(team, episodes, seed)["episode_return"])
        return found

    def prescribed(self, seed: int, episodes: int, seat: int) -> np.ndarray:
        """0 or 1 ``[episodes]``: whenever a person prescribed the action of ``seat``, this was what the world got."""
        team = MaskedTeam(self.actor, self.spec, seat, OVERRIDES)
        trace = cast(TensorDict, self.data.team_episodes(team, episodes, seed, trace=True)["trace"])
        told = torch.stack(team.overrides, 1).to(trace["action"].device)
        told = torch.where(trace["running"], told, -1)
        share = obedience(plain(trace["action"][..., seat]), plain(told))
        return np.where(np.isnan(share), 1.0, share == 1.0).astype(np.float64)

    def masked(self, seed: int, episodes: int) -> Mapping[str, np.ndarray]:
        """0 or 1 ``[episodes]``: no agent took an action that was not available, by the task's own masks (where it has
        some) and by masks drawn at random."""
        found: dict[str, np.ndarray] = {}
        conditions = {"task's masks": 1.0} if self.spec.restricts_actions else {}
        for name, share in {**conditions, "random masks": AVAILABLE}.items():
            team = MaskedTeam(self.actor, self.spec, None, share)
            trace = cast(TensorDict, self.data.team_episodes(team, episodes, seed, trace=True)["trace"])
            mask = torch.stack(team.masks, 1).to(trace["action"].device)
            allowed = mask.gather(-1, trace["action"].unsqueeze(-1)).squeeze(-1) | ~mask.any(-1)
            found[name] = plain((allowed.all(-1) | ~trace["running"]).all(-1))
        return found

    def outputs(self) -> Tensor:
        """What the networks say of fixed observations."""
        spec, place, draw = self.spec, self.module.device, stream(SEED)
        seen = torch.randn(32, spec.num_agents, spec.observation_size, generator=draw).to(place)
        state = torch.randn(32, spec.state_size, generator=draw).to(place)
        with torch.no_grad():
            return self.module.answers(seen, state).detach()
