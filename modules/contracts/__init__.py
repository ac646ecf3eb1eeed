"""The protocols that modules, datamodules and callbacks meet in. Everything else is duck-typed Lightning.

A class takes part by having the member; nothing needs to inherit from these. Callbacks test with ``isinstance``
(the protocols are runtime-checkable) and leave alone what does not offer the capability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from modules.contracts.browsing import ActionPrompts as ActionPrompts
from modules.contracts.browsing import EpisodeSpec as EpisodeSpec
from modules.contracts.browsing import PageView as PageView
from modules.contracts.browsing import ProvidesPages as ProvidesPages
from modules.contracts.control import ControlActor as ControlActor
from modules.contracts.control import ControlSpec as ControlSpec
from modules.contracts.control import ControlStep as ControlStep
from modules.contracts.control import EpisodesRequest as EpisodesRequest
from modules.contracts.control import EvaluatesAttacks as EvaluatesAttacks
from modules.contracts.control import ProvidesRollouts as ProvidesRollouts
from modules.contracts.control import ReportsAttacks as ReportsAttacks
from modules.contracts.control import RequestsRollouts as RequestsRollouts
from modules.contracts.control import RolloutRequest as RolloutRequest
from modules.contracts.control import ScalesReturns as ScalesReturns
from modules.contracts.corpora import DisturbsText as DisturbsText
from modules.contracts.corpora import Excerpts as Excerpts
from modules.contracts.corpora import ProvidesExcerpts as ProvidesExcerpts
from modules.contracts.corpora import ReportsContamination as ReportsContamination
from modules.contracts.episodes import EpisodeSample as EpisodeSample
from modules.contracts.episodes import ReportsEpisodes as ReportsEpisodes
from modules.contracts.games import PlaysGames as PlaysGames
from modules.contracts.prompts import EncodesPrompts as EncodesPrompts
from modules.contracts.prompts import ProvidesPairs as ProvidesPairs
from modules.contracts.prompts import ReplyPair as ReplyPair
from modules.contracts.routing import DrawsRoutingInstances as DrawsRoutingInstances
from modules.contracts.routing import InstanceRequest as InstanceRequest
from modules.contracts.routing import ProvidesRoutingInstances as ProvidesRoutingInstances
from modules.contracts.routing import ReportsGenerators as ReportsGenerators
from modules.contracts.routing import RequestsInstances as RequestsInstances
from modules.contracts.routing import RoutingProblem as RoutingProblem
from modules.contracts.routing import RoutingSpec as RoutingSpec
from modules.contracts.teams import PlaysTeams as PlaysTeams
from modules.contracts.teams import TeamChange as TeamChange

if TYPE_CHECKING:
    from modules.assurance.subject import Subject


@runtime_checkable
class Assurable(Protocol):
    """A module that can be measured by assurance suites."""

    def assurance_subject(self) -> Subject:
        """What probes may ask of this module and its datamodule; called within a run, its data set up."""
        ...


@runtime_checkable
class WarmStarts(Protocol):
    """A module that starts from another run's checkpoint in its own way (``--warm_start``).

    Without it the checkpoint's ``state_dict`` is loaded, and nothing else of it.
    """

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was learnt, with fresh optimisers, counters and schedules; called once set up for ``fit``.

        Raises:
            ValueError: a checkpoint of another kind of module.
        """
        ...


@runtime_checkable
class ActingModule(Protocol):
    """A module whose ``policy`` acts in environments; rollout datamodules bind to it at ``setup()``."""

    policy: TensorDictModuleBase


@runtime_checkable
class PreparesRollout(Protocol):
    """An on-policy module that finishes a collected rollout (values, advantages, returns) before minibatching."""

    def prepare_rollout(self, rollout: TensorDict) -> TensorDict:
        """Add keys to ``rollout`` ``[envs, time, ...]`` and return it."""
        ...


@runtime_checkable
class CountsWork(Protocol):
    """A module that says how much work a training batch holds; read by the throughput callback.

    ``work_unit`` is ``"tokens"`` or ``"frames"``; ``work_per_batch`` counts this rank's share of one micro-batch.
    """

    work_unit: str

    def work_per_batch(self, batch: Any) -> int: ...


@runtime_checkable
class KnowsFlops(Protocol):
    """A module for which model-FLOPs utilisation has a meaning."""

    def flops_per_work_unit(self) -> float:
        """Forward + backward floating-point operations per token or frame, recomputation not counted."""
        ...


@runtime_checkable
class Summarises(Protocol):
    """A module that adds rows to the summary table printed at the end of a run."""

    def summary_rows(self) -> Mapping[str, str]: ...


@runtime_checkable
class Exports(Protocol):
    """A module that can be written in its ecosystem's own format (for language models: a Hugging Face directory)."""

    def export_pretrained(self, folder: str | Path) -> None:
        """Write ``folder`` as a whole, replacing an older one atomically; called on all ranks, rank 0 writes."""
        ...


@runtime_checkable
class StatefulData(Protocol):
    """A datamodule whose exact position is saved: what is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class RankStatefulData(Protocol):
    """A datamodule with state that differs by rank (environments, replay): saved in the ``rank-<k>`` files.

    The dictionary must be loadable by ``torch.load(weights_only=True)``.
    """

    def rank_state_dict(self) -> dict[str, Any]: ...

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class RankFilesData(Protocol):
    """A datamodule with state too large for the ``rank-<k>`` file: a folder of its own beside it (replay)."""

    def save_rank_files(self, folder: Path, previous: Path | None) -> None:
        """Write everything into ``folder`` (empty, renamed into place when all is on disk).

        ``previous``: the folder of this run's last save, whose unchanged files may be hard-linked.
        """
        ...

    def rank_files_saved(self, folder: Path) -> None:
        """What :meth:`save_rank_files` wrote last now stands whole at ``folder``."""
        ...

    def load_rank_files(self, folder: Path) -> None:
        """Go on from what :meth:`save_rank_files` wrote; called before training.

        Raises:
            ValueError: naming a missing or damaged file.
        """
        ...


@dataclass(frozen=True)
class MultiAgentSpec:
    """What a multi-agent module must know of its environment before it can build networks.

    ``state_size`` is that of ``state`` where the environment has one of its own (``own_state``), else
    ``num_agents * observation_size``. ``restricts_actions``: available actions vary. ``common_reward``: all agents
    always get the same. ``idle_action``: that of doing nothing, where there is one.
    """

    task: str
    num_agents: int
    num_actions: int
    observation_size: int
    state_size: int
    episode_limit: int
    own_state: bool = False
    restricts_actions: bool = False
    common_reward: bool = False
    idle_action: int | None = None


@runtime_checkable
class ActsMultiAgent(Protocol):
    """A module that acts for all agents of many environment copies at once, in tensors.

    ``carry`` is what a policy remembers within an episode (hidden state, drawn member, latent): tensors
    ``[envs, ...]``. Random numbers come from ``generator`` alone. ``frames``: environment steps so far over all ranks,
    for schedules; ``None``: evaluation, no exploration.
    """

    def begin(
        self, observation: torch.Tensor, state: torch.Tensor, generator: torch.Generator, frames: int | None
    ) -> dict[str, torch.Tensor]:
        """The carry of fresh episodes whose first ``observation`` is ``[envs, agents, features]``."""
        ...

    def act(
        self,
        observation: torch.Tensor,
        legal: torch.Tensor | None,
        carry: dict[str, torch.Tensor],
        generator: torch.Generator,
        frames: int | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Available actions ``[envs, agents]`` int64 under ``legal`` ``[envs, agents, actions]``, and the carry."""
        ...


@runtime_checkable
class LearnsFromReplay(Protocol):
    """An off-policy module that says which minibatches it wants.

    A batch is a TensorDict ``[updates, minibatches, items]``, one part after the other for as many optimiser updates:
    ``observation`` ``[.., steps + 1, agents, features]``, ``legal`` likewise (only where the environment restricts
    actions), ``state`` ``[.., steps + 1, features]`` (only where the environment has one of its own), ``action``
    ``[.., steps, agents]``, ``reward`` ``[.., steps, agents]`` (each agent's), ``terminated`` ``[.., steps]`` (no value
    beyond), ``filled`` ``[.., steps]`` (False: padding) and ``member_mask`` ``[.., members]`` bool (bootstrap bits of
    the item). An item is one step, or with ``sequences`` a whole episode, padded.
    """

    minibatches: int
    sequences: bool
    members: int
    bootstrap_p: float


@runtime_checkable
class StoresCarry(Protocol):
    """An acting module that wants some of what it carries in replay.

    ``carried`` names entries of the carry of :class:`ActsMultiAgent`. An item of replay then has ``carry_<name>``
    ``[.., ...]``: the entry as it was when the item's first step was acted on.
    """

    carried: tuple[str, ...]


@runtime_checkable
class HasDigest(Protocol):
    """A datamodule or module whose identity must agree on all ranks before training starts.

    Keys name the field (``"weights"``, ``"tokenizer"``), values are short strings; the first field that differs
    between ranks is named in the error.
    """

    def digest(self) -> Mapping[str, str]: ...


@runtime_checkable
class DescribesBatch(Protocol):
    """A datamodule that states its batch's keys, shapes and dtypes, for checks and for the docs."""

    def describe(self) -> Mapping[str, str]: ...


@runtime_checkable
class PlanGame(Protocol):
    """A game in which every player's expected payoff is linear in the player's own *plan*, the others' held fixed.

    A *strategy* is what a member stores: a behaviour table ``[states, actions]`` of an extensive-form game, a row
    ``[1, actions]`` of probabilities of a normal-form game, a point of a continuous game. Its *plan* ``[sequences]``
    is the realisation plan of the sequence form (von Stengel 1996), the probability vector, or the feature vector.
    Mixing members once at the start of an episode is mixing their plans linearly, so a population's policy hull is the
    convex hull of its plans. All tensors are float64 unless stated. ``player`` counts from 0.

    ``zero_sum``: payoffs add up to 0. ``symmetric``: two players with the same strategies and
    ``u_1(x, y) = u_0(y, x)``, so that one population serves both.
    """

    name: str
    num_players: int
    zero_sum: bool
    symmetric: bool

    def strategy_shape(self, player: int) -> tuple[int, ...]: ...

    def random_strategies(self, player: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """``[count, *strategy_shape]`` strategies to start a population from."""
        ...

    def plans(self, player: int, strategies: torch.Tensor) -> torch.Tensor:
        """``[..., *strategy_shape] -> [..., sequences]``; differentiable."""
        ...

    def strategy_of(self, player: int, plan: torch.Tensor) -> torch.Tensor:
        """The strategy whose plan is ``plan`` ``[..., sequences]`` (uniform over legal actions where it never comes).

        Raises:
            ValueError: if the game's plans are not closed under mixing (continuous games).
        """
        ...

    def payoffs(self, plans: Sequence[torch.Tensor]) -> torch.Tensor:
        """``plans[i]`` ``[members_i, sequences_i]`` -> payoffs of all profiles ``[players, members_0, ...]``."""
        ...

    def payoff_vector(self, player: int, plans: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[sequences]``; ``plan @ vector`` is ``player``'s payoff. ``plans[j]`` ``[sequences_j]``, own ignored."""
        ...

    def reach(self, player: int, plans: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Probability ``[sequences]`` that chance and the others lead to a terminal history of each own sequence.

        ``sum(reach * plan) = 1``. ``plans``: the others' (own ignored), ``None``: uniformly random legal play.
        """
        ...

    def best_response(self, player: int, payoff_vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The strategy that maximises ``plan @ payoff_vector``, and the maximum; ties go to the first action."""
        ...

    def digest(self) -> Mapping[str, str]:
        """What identifies the game, for checkpoints and for the agreement of ranks."""
        ...


@runtime_checkable
class TabularGame(PlanGame, Protocol):
    """A :class:`PlanGame` with finitely many information states, which networks can observe."""

    def legal(self, player: int) -> torch.Tensor:
        """``[states, actions]`` bool."""
        ...

    def observations(self, player: int) -> torch.Tensor:
        """``[states, features]`` float32: what a network sees in each information state."""
        ...


@runtime_checkable
class RulesGame(Protocol):
    """A game that is played by its rules alone, move by move, where its tree would be too large.

    ``symmetric``: two players, zero-sum, and one population plays both seats (half of the games each), so that
    policies must be told the seat. ``max_moves`` bounds the moves of one game, chance included.
    """

    name: str
    num_players: int
    num_actions: int
    observation_size: int
    max_moves: int
    zero_sum: bool
    symmetric: bool

    def digest(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class PlayRequest:
    """Episodes that a module wants before its next step; see :class:`RequestsPlay`.

    Args:
        tables: per player ``[members, states, actions]``, the policies that may sit down; empty with ``policy``.
        weights: per player ``[groups, members]``, from which each episode of a group draws its members.
        episodes: episodes per group, over all ranks.
        key: identifies the step, for random streams that depend on nothing else.
        returns_only: leave out the moves.
        policy: plays a :class:`RulesGame` on the device of ``weights``, in place of ``tables``:
            ``(observation [rows, features], legal [rows, actions], player [rows], seat [rows])`` to probabilities
            ``[rows, actions]``, where ``seat`` is the member drawn for the mover.
    """

    tables: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    episodes: int
    key: tuple[int, ...]
    returns_only: bool = False
    policy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


@runtime_checkable
class RequestsPlay(Protocol):
    """A module that says which episodes it needs for its next step.

    The batch is a TensorDict ``[episodes]`` with ``group``, ``returns`` ``[episodes, players]``, ``seats``
    ``[episodes, players]`` (member per player), ``stream`` (random stream that it was played with) and, unless left
    out, ``info_state``, ``action``, ``player`` (-1: past the end) and ``probability``, each ``[episodes, moves]``.
    Episodes of a ``policy`` have ``observation`` ``[.., features]`` and ``legal`` ``[.., actions]`` for ``info_state``.
    """

    steps_per_iteration: int

    def play_request(self) -> PlayRequest | None:
        """``None``: the next step needs no episodes and gets an empty batch."""
        ...


@runtime_checkable
class ReportsPopulation(Protocol):
    """A module that grows populations and shows where they stand, for figures and files."""

    def population_report(self) -> Mapping[str, Any]:
        """Equal on all ranks, and cheap: it is asked for after every batch.

        ``iteration`` int; ``payoffs`` ``[players, members_0, ...]``, means; ``meta_strategies``: one ``[members]`` per
        population (a single one where players share it); ``history``: metric name to ``[(iteration, frames, value)]``.
        """
        ...


@dataclass(frozen=True)
class PromptSample:
    """One prompt as text, and what a reward may compare its response with.

    ``labels``: whole numbers by name, e.g. ``{"act": 1, "emotion": 0}`` of the human reply.
    """

    prompt: str
    reference: str = ""
    labels: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class ProvidesPrompts(Protocol):
    """A datamodule of prompts to respond to.

    A batch is a TensorDict ``[B]`` with ``prompt_ids`` int64 ``[B, P]`` (padded on the right, any token id as padding),
    ``prompt_length`` int64 ``[B]`` (at least 1) and ``index`` int64 ``[B]``, the row in ``samples(split)``; -1: a row
    that only fills the batch up, so that every rank has as many. Training batches are of ``samples("train")``, the
    validation and test loaders' of ``"val"`` and ``"test"``. ``tokenizer`` has ``hash``, ``vocab_size``, ``eod_id``
    (the token that ends a response; -1: there is none), ``encode(text)``, ``decode(ids)`` and, where it is a Hugging
    Face directory, ``directory``. Where prompts repeat in evaluation, ``row`` int64 ``[B]`` tells their rows apart.
    """

    tokenizer: Any

    def samples(self, split: str) -> Sequence[PromptSample]: ...


@runtime_checkable
class ReportsSamples(Protocol):
    """A module that shows texts of its last evaluation; equal keys in every entry, control characters removed."""

    def sample_texts(self) -> Sequence[Mapping[str, str]]: ...
