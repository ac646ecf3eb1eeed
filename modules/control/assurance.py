"""What a control policy offers to be measured by: batched episodes of the deployed policy in all kinds of trouble.

The policy is copied; nothing of the module in training is read later or written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from modules.assurance.probe import Effort
from modules.assurance.subject import CardFacts, DataSource, Subject
from modules.contracts import EpisodesRequest, RolloutRequest, ScalesReturns
from modules.contracts.control import ControlActor
from modules.control.actor import Agent, Attacker, GameActor
from modules.control.adversary import previous_scale
from modules.control.attackers import GradientAttacker, HeuristicAttacker
from modules.control.learner import PPOLearner
from modules.control.perturbation import PerturbationSet
from modules.control.players import OBSERVATION_CLIP, adversary_networks, part
from modules.control.searched import LinearAttacker, SearchSettings, search
from modules.control.suite import HEURISTIC, LEARNED, full_name
from modules.control.trials import (
    BesidesInaction,
    Inspector,
    Look,
    Overridden,
    Replay,
    Scripted,
    Varied,
    random_law,
    recorded,
)
from modules.seeds import stream, stream_seed, text_seed

if TYPE_CHECKING:
    from modules.control.evaluation import RobustEvaluation

KEY = (95,)  # of all episodes here; what differs is the seed
SEED = 20230712  # of what is the same in every suite: the scale of returns, the adversaries' learning
SCALE_EPISODES = 256
CHANGE = 0.3  # relative, of each dynamics parameter
NOISE = 0.1  # standard deviation of noise on actions, in half ranges
SEARCH_ROWS, SEARCH_FRAMES, SEARCH_EPISODES = 512, 200_000, 16


class DeployedPolicy(nn.Module):
    """A copy of the agents that are used, as a module whose state can be guarded, saved and restored.

    Args:
        params: ``[members, ...]`` as members are stored.
        weights: ``[members]`` float64, from which each episode draws.
    """

    def __init__(self, params: Mapping[str, Tensor], weights: Tensor) -> None:
        super().__init__()
        for name, value in params.items():
            copied = nn.Parameter(value.detach().clone(), requires_grad=False)
            self.register_parameter(name.replace(".", "__"), copied)
        self.register_buffer("weights", weights.detach().clone())

    def params(self) -> dict[str, Tensor]:
        """As they were given."""
        return {name.replace("__", "."): value.detach() for name, value in self.named_parameters()}


@contextmanager
def _plain_tensors() -> Any:
    """Attacks differentiate policies and learn, also where the suite runs in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class ControlTrials:
    """The capabilities of a control module, see ``modules/assurance/probes/control.py`` for what each one means.

    Args:
        module: set up, with its datamodule.
    """

    def __init__(self, module: RobustEvaluation) -> None:
        assert module.spec is not None
        self.module, self.spec, self.data = module, module.spec, module.data
        self.device = module.device
        self.settings = module.perturbation
        with _plain_tensors():
            params, weights = module.deployed()
            self.model = DeployedPolicy(params, weights).to(self.device)
        bounds = (torch.tensor(bound, device=self.device) for bound in (self.spec.action_low, self.spec.action_high))
        self.low, self.high = bounds
        self.bounded = bool(self.low.isfinite().all() and self.high.isfinite().all())
        half = (self.high - self.low) / 2
        self.half = torch.where(half.isfinite(), half, torch.full_like(half, module.init_std))
        self.random = random_law(self.low, self.high, module.init_std)
        self.scale = cache(self._scale)
        self.scripted = cache(self._scripted)
        self._attackers: dict[tuple[str, int, int], Attacker] = {}

    # -- playing ------------------------------------------------------------------------------------------------------
    def agent(self) -> Agent:
        return self.module.agent(self.model.params(), cast(Tensor, self.model.weights), sampled=False)

    def policy(self) -> GameActor:
        """Undisturbed."""
        return self.module.game(self.agent(), None)

    def play(self, actor: ControlActor, seed: int, episodes: int, groups: int = 1, trace: int = 0) -> Any:
        """Whole episodes on this rank alone, their random numbers a function of ``seed``."""
        return self.data.episodes(EpisodesRequest(actor, groups, episodes, KEY, trace, seed))

    def outputs(self) -> Tensor:
        """``[members, 64, actions]``: mean actions for fixed observations, without memory."""
        with _plain_tensors():
            params, networks = self.model.params(), self.module.networks
            observation = 2.0 * torch.randn(64, self.spec.observation_size, generator=stream(SEED))
            centre, spread = params["mean"].unsqueeze(1), params["std"].unsqueeze(1)
            seen = (observation.to(self.device) - centre) / spread
            seen = seen.clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
            rest = seen.new_zeros(*seen.shape[:2], networks.inputs - seen.shape[-1])
            width = networks.policy.state_size
            state = seen.new_zeros(*seen.shape[:2], width) if width else None
            return networks.policy.step(part(params, "policy"), torch.cat([seen, rest], -1), state)[0]

    # -- scales -------------------------------------------------------------------------------------------------------
    def _scripted(self, policy: str) -> Mapping[str, Tensor]:
        """``random``, ``idle`` or ``reference``, on episodes that are always the same."""
        idle = torch.zeros_like(self.half).clamp(self.low, self.high)
        laws = {
            "random": Scripted(self.random, self.spec.action_size),
            "idle": Scripted(lambda seen, noise: idle.expand(len(seen), -1)),
            "reference": Scripted(lambda seen, noise: self.data.reference_action(seen)),
        }
        with _plain_tensors():
            episodes = min(SCALE_EPISODES, max(16, SEARCH_FRAMES // self.spec.episode_limit))
            return recorded(self.play(laws[policy], SEED, episodes, trace=episodes))

    def _scale(self) -> tuple[float, float] | str:
        if not isinstance(self.data, ScalesReturns):
            return "the datamodule knows no reference return"
        high = self.data.reference_return
        if high is None:
            if self.data.reference_action(torch.zeros(1, self.spec.observation_size)) is None:
                return f"no reference return of {self.spec.task} is known: set data.init_args.reference_return"
            high = float(self.scripted("reference")["returns"].mean())
        low = float(self.scripted("random")["returns"].mean())
        if not high - low > 1e-6 * (1.0 + abs(high)):
            return f"the reference return {high:.4g} is not above a random policy's {low:.4g}"
        return low, high

    # -- attacks ------------------------------------------------------------------------------------------------------
    def attacks(self, effort: Effort) -> list[str]:
        """Names, ``none`` first; ``deep`` adds those that learn by reinforcement."""
        if self.budget("none").empty:
            return ["none"]
        names = ["constant", "search"] if effort.quick else [*HEURISTIC, "search"]
        if self.settings.space == "state":
            names += ["mad"] if effort.quick else ["mad", "critic"]
            names += ["robust_sarsa", "pa_ad"] if effort.deep else []
        if effort.deep:
            names.append("sa_rl")
        modes = {"both": (False, True), "coupled": (True,), "uncoupled": (False,)}[self.module.attacks.coupled]
        return ["none", *(full_name(name, coupled) for name in names for coupled in modes)]

    def budget(self, attack: str, share: float = 1.0) -> PerturbationSet:
        """What ``attack`` may spend."""
        return self.module.budget(attack.endswith("_coupled"), share)

    def attacked(self, seed: int, episodes: int, attack: str, share: float, effort: Effort) -> Mapping[str, Tensor]:
        with _plain_tensors():
            if attack == "none":
                return recorded(self.play(self.policy(), seed, episodes, trace=episodes))
            budget = self.budget(attack, share)
            actor = self.module.game(self.agent(), self._attacker(attack, budget, effort), budget, detail=True)
            return recorded(self.play(actor, seed, episodes, trace=episodes))

    def _attacker(self, attack: str, budget: PerturbationSet, effort: Effort) -> Attacker:
        """Those that learn are learnt once, under the whole budget; the strongest of several runs is kept."""
        name = attack.removesuffix("_coupled")
        if name in HEURISTIC:
            return HeuristicAttacker(cast(Any, name), budget)
        if name in ("mad", "critic"):
            return GradientAttacker(cast(Any, name), budget, steps=_steps(effort))
        key = (attack, effort.attack_steps, effort.restarts)
        if key not in self._attackers:
            whole = self.budget(attack)
            found = (self._searched if name == "search" else self._learnt)(name, whole, effort)
            returns = []
            for attacker in found if len(found) > 1 else ():
                actor = self.module.game(self.agent(), attacker, whole)
                episodes = min(SCALE_EPISODES, max(16, SEARCH_FRAMES // self.spec.episode_limit))
                returns.append(float(self.play(actor, SEED, episodes)["episode_return"].mean()))
            self._attackers[key] = found[min(range(len(returns)), key=returns.__getitem__)] if returns else found[0]
        return _with_budget(self._attackers[key], budget)

    def _searched(self, name: str, budget: PerturbationSet, effort: Effort) -> list[Attacker]:
        """One linear adversary for each restart."""
        rows = min(SEARCH_ROWS, max(64, SEARCH_FRAMES // self.spec.episode_limit))
        episodes = min(SEARCH_EPISODES, max(2, rows // 16))
        settings = SearchSettings(laws=rows // episodes, generations=max(2, effort.attack_steps // 10))
        found: list[Attacker] = []
        for restart in range(effort.restarts):
            seed = stream_seed(SEED, text_seed(full_name(name, budget.coupled)), restart)

            def scores(laws: Tensor, seed: int = seed) -> Tensor:
                count = len(laws)
                cells = torch.stack([torch.full((count,), -1), torch.arange(count)], 1).to(self.device)
                attacker = LinearAttacker(laws.to(self.device), budget)
                actor = self.module.game(self.agent(), attacker, budget, cells=cells)
                return self.play(actor, seed, episodes, groups=count)["episode_return"].mean(1)

            law = search(scores, budget.size, self.spec.observation_size, settings, seed)
            found.append(LinearAttacker(law.to(self.device), budget))
        return found

    def _learnt(self, name: str, budget: PerturbationSet, effort: Effort) -> list[Attacker]:
        """By reinforcement learning against the frozen policy, on this rank alone."""
        module, params, weights = self.module, self.model.params(), cast(Tensor, self.model.weights)
        if name == "robust_sarsa":
            return [GradientAttacker("critic", budget, module.robust_sarsa(SEED), _steps(effort))]
        assert name in LEARNED
        settings = replace(module.attacks.adversary, kind="pa_ad" if name == "pa_ad" else "direct")
        networks = adversary_networks(self.spec, settings, self.settings)
        learner = PPOLearner(networks, module.attacks.ppo, "adversary", previous_scale=previous_scale(budget))
        learner.to(self.device)
        key = (*KEY, LEARNED.index(name), int(budget.coupled))
        learner.begin(key)
        learner.take_statistics(params, weights)
        agent = self.agent()
        for number in range(module.attacks.steps):
            adversary = module.attacker(networks, learner.stacked(), settings, budget, sampled=True)
            actor = module.game(agent, adversary, budget, "adversary")
            request = RolloutRequest(actor, f"assurance {name}", key, number, learner.settings.gamma, SEED)
            batch = self.data.rollout(request)
            with torch.enable_grad():
                learner.update(batch, (*key, number), module.attacks.steps, 0, batch.numel())
        return [module.attacker(networks, learner.stacked(), settings, budget, sampled) for sampled in (False, True)]

    # -- other trouble ------------------------------------------------------------------------------------------------
    def variants(self, seed: int, episodes: int) -> Mapping[str, Tensor]:
        names, count = ["nominal", "action_noise"], len(self.spec.parameters)
        rows = [torch.zeros(count), torch.zeros(count)]
        for place, name in enumerate(self.spec.parameters):
            for sign, word in ((-1.0, "less"), (1.0, "more")):
                change = torch.zeros(count)
                change[place] = sign * CHANGE
                rows.append(change)
                names.append(f"{name}_{word}")
        noise = torch.zeros(len(rows), self.spec.action_size)
        noise[1] = NOISE * self.half.cpu()
        with _plain_tensors():
            parameters = torch.stack(rows).to(self.device) if count else None
            actor = Varied(self.policy(), parameters, noise.to(self.device), (self.low, self.high))
            returns = self.play(actor, seed, episodes, groups=len(rows))["episode_return"]
        return dict(zip(names, returns.unbind(0), strict=True))

    def inspected(self, seed: int, episodes: int, look: Look) -> Mapping[str, Tensor]:
        with _plain_tensors():
            length = self.play(self.policy(), seed, episodes)["episode_length"][0]
            # eight places in an episode: a look at one step costs as much as at all rows of it
            place = (torch.arange(8) + torch.rand(8, generator=stream(seed))) / 8
            when = (place.to(self.device)[torch.arange(episodes, device=self.device) % 8] * length).long()
            inspector = Inspector(look, when)
            actor = GameActor(self.spec, self.agent(), inspector, None, "state", self.settings.clip_executed)
            self.play(actor, seed, episodes)
        return inspector.found

    def clipped(self, action: Tensor) -> Tensor:
        """As it would be executed."""
        return torch.minimum(torch.maximum(action, self.low), self.high) if self.settings.clip_executed else action

    def overridden(self, seed: int, episodes: int, chance: float) -> Mapping[str, Tensor]:
        low = torch.where(self.low.isfinite(), self.low, -self.half)
        high = torch.where(self.high.isfinite(), self.high, self.half)
        with _plain_tensors():
            actor = Overridden(self.policy(), chance, low, high)
            first = recorded(self.play(actor, seed, episodes, trace=episodes))
            commanded = torch.where(first["override"].isnan(), first["executed"], first["override"])
            again = recorded(self.play(Replay(commanded), seed, episodes, trace=episodes))
        return {**first, "replayed": again["observation"]}

    def effects(self, seed: int, episodes: int) -> Mapping[str, Tensor]:
        idle = torch.zeros_like(self.half).clamp(self.low, self.high)
        size, scale = self.spec.action_size, self.model.params()["std"].mean(0)
        with _plain_tensors():

            def chance(noise: Tensor) -> Tensor:
                return self.random(noise, noise)

            limit = self.spec.episode_limit
            actor = BesidesInaction(self.policy(), chance, size, idle, scale, limit)
            found = self.play(actor, seed, episodes, groups=actor.groups)["max_effect"]
        return {"policy": found[0], "random": found[2]}


def _steps(effort: Effort) -> int:
    """Of a gradient attack, at each of an episode's steps."""
    return max(1, effort.attack_steps // 4)


def _with_budget(attacker: Any, budget: PerturbationSet) -> Attacker:
    """The same adversary with another budget."""
    same = copy.copy(attacker)
    same.budget = budget
    if hasattr(same, "previous_scale"):
        same.previous_scale = previous_scale(budget)
    return same


def assurance_subject(module: RobustEvaluation) -> Subject:
    """The subject of a control module that is set up, with its datamodule, in a run."""
    trials = ControlTrials(module)
    spec = trials.spec
    name = type(module).__name__
    capabilities: dict[str, Callable[..., Any] | Any] = {
        "outputs": trials.outputs,
        "attack_names": trials.attacks,
        "attack_budgets": trials.budget,
        "attacked_episodes": trials.attacked,
        "return_scale": trials.scale,
        "scripted_episodes": trials.scripted,
        "varied_returns": trials.variants,
        "inspected_states": trials.inspected,
        "executed_action": trials.clipped,
        "overridden_episodes": trials.overridden,
        "step_effects": trials.effects,
        "action_range": (trials.low, trials.high, trials.half),
        "safe_states": (spec.safe, spec.settle, spec.fails, spec.episode_limit),
    }
    perturbed = {"state": "observations", "action": "actions", "params": "dynamics"}[module.perturbation.space]
    card = CardFacts(
        title=f"{name} on {spec.task}",
        summary=f"A control policy for {spec.task}, judged under perturbed {perturbed}.",
        intended_use=f"Control of {spec.task} in simulation; comparison of training methods.",
        out_of_scope="Control of physical machines; tasks, budgets and dynamics other than those measured.",
        limitations="Worst cases are over the attacks that were tried; a stronger one may exist.",
        licence="CC0-1.0" if "/" not in spec.task else "unknown",
        data=(DataSource(f"simulated episodes of {spec.task}", "CC0-1.0" if "/" not in spec.task else "unknown"),),
    )
    return Subject("control", trials.model, capabilities, card)
