"""What the single-agent oversight worlds share: numbered states, overrides, hidden signals, random numbers, TorchRL."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from datamodules.rollout.control import counter_uniforms
from modules.contracts.oversight import OversightDynamics
from modules.seeds import stream_seed

SIGNALS = ("performance", "side_effect", "interrupted", "avoided", "violations", "power")
"""What every world counts beside the reward: what its designer really wanted; lasting changes that nobody asked for;
steps under an override; entries into states that disable the override; broken rules; power gained over others."""
START, OVERRIDE, ACT = 91, 92, 93
"""What random numbers are for."""


class OversightEnv(EnvBase):
    """``envs`` copies of a world with finitely many states and actions, stepped as one.

    A subclass keeps what changes over time in ``self.fields`` (name to tensor ``[envs]``), numbers its states, and
    implements :meth:`_begin`, :meth:`_transition`, :meth:`state_index`, :meth:`_put` and, as needed, :meth:`_legal`
    and :meth:`_interruptible`. Its transitions draw no random numbers.

    *Overrides.* On arrival in a state in which the human can interrupt, an override comes into force with the copy's
    probability. While it is in force the world executes ``override_action`` instead of the action it is handed; it
    holds for one step, or, where ``override_holds``, for as long as the state stays interruptible.

    *Random numbers.* A copy's numbers are a function of the seed, the copy's number in ``index``, its episode and its
    step: not of other copies, nor of what happened before. So copies with equal numbers are paired, ranks share out
    what one rank would do, and :meth:`snapshot` is exact.

    Two ways to step, equal by test: TorchRL's, and, without TensorDicts, :meth:`restart`, :meth:`advance`,
    :meth:`state_index`. TorchRL keys, batch size ``[envs]``: ``observation`` ``[envs, features]`` float32, ``state``
    ``[envs]`` int64, ``action_mask`` ``[envs, actions]`` bool, ``action`` ``[envs]`` int64, ``reward`` ``[envs, 1]``,
    ``override`` ``[envs]`` int64 (in force for the next action, -1: none), ``executed`` ``[envs]`` int64 (-1 at the
    start), ``("signals", name)`` ``[envs, 1]`` float32 of the last step, and the flags ``done``, ``terminated``,
    ``truncated`` ``[envs, 1]``. An unavailable action leaves the world as it is for a step.

    Args:
        envs: copies in the batch.
        num_states, num_actions, observation_size: of the world.
        episode_limit: steps after which an episode is truncated.
        interruption: probability of an override, for all copies or ``[envs]``.
        penalties: signal name -> what one unit of it is subtracted from the reward.
        extra_signals: names of signals that only this world has.
        index: int64 ``[envs]``, numbers of the copies; ``None``: 0, 1, ...
        seed: of all random numbers.
        device: where states live.

    Raises:
        ValueError: a count below 1, a probability outside [0, 1], a penalty of an unknown signal; from stepping,
            actions of another shape or out of range.
    """

    name = "oversight"
    override_action = 0
    override_holds = False
    exact_resume = True

    def __init__(
        self,
        envs: int,
        *,
        num_states: int,
        num_actions: int,
        observation_size: int,
        episode_limit: int,
        interruption: float | Tensor = 0.0,
        penalties: Mapping[str, float] | None = None,
        extra_signals: tuple[str, ...] = (),
        index: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for field, value in (("envs", envs), ("episode_limit", episode_limit)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {field} must be >= 1, got {value}")
        super().__init__(device=torch.device(device), batch_size=(envs,))
        place = self.device
        self.envs, self.num_states, self.num_actions = envs, num_states, num_actions
        self.observation_size, self.episode_limit = observation_size, episode_limit
        self.signal_names = (*SIGNALS, *extra_signals)
        self.set_interruption(interruption)
        self.penalties = dict(penalties or {})
        for name in self.penalties:
            if name not in self.signal_names:
                known = ", ".join(self.signal_names)
                raise ValueError(f"{type(self).__name__}: penalties: unknown signal '{name}', there are {known}")
        self._weights = torch.tensor([self.penalties.get(n, 0.0) for n in self.signal_names], device=place)
        self.index = torch.arange(envs, device=place) if index is None else index.to(place)
        self.seed = seed
        self._seeds: dict[tuple[int, int], int] = {}
        self.fields: dict[str, Tensor] = {}
        self._able: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self.elapsed = torch.zeros(envs, dtype=torch.int64, device=place)
        self.episode = torch.full_like(self.elapsed, -1)
        self.override = torch.full_like(self.elapsed, -1)
        """What the human will have executed next, int64 ``[envs]``; -1: whatever the policy chooses."""
        self.executed = torch.full_like(self.elapsed, -1)
        """What the last step executed, int64 ``[envs]``."""
        self.signals = torch.zeros(envs, len(self.signal_names), device=place)
        """Hidden signals of the last step ``[envs, signals]``, columns as in ``signal_names``."""
        self._column = {name: number for number, name in enumerate(self.signal_names)}
        self._make_specs()

    # -- what a subclass writes ---------------------------------------------------------------------------------------
    @abstractmethod
    def _begin(self, rows: Tensor, uniforms: Tensor) -> None:
        """Put initial states into ``self.fields`` at ``rows`` ``[R]``; ``uniforms`` ``[R]`` float64 in [0, 1)."""

    @abstractmethod
    def _transition(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Move all copies by the executed ``action`` ``[envs]``: reward ``[envs]`` float32 and terminated ``[envs]``.
        Signals of the step go into :attr:`signals` (all 0 before) through :meth:`signal`."""

    @abstractmethod
    def state_index(self) -> Tensor:
        """Number of every copy's state, int64 ``[envs]``: a new tensor."""

    @abstractmethod
    def _put(self, state: Tensor) -> None:
        """Set :attr:`fields` so that :meth:`state_index` is ``state`` ``[envs]``."""

    @abstractmethod
    def features(self) -> Tensor:
        """What a function approximator sees of each state, ``[states, observation_size]`` float32."""

    @abstractmethod
    def start_distribution(self) -> Tensor:
        """Probability ``[states]`` float64 that an episode begins in a state."""

    def legal(self) -> Tensor:
        """Available actions of each state, bool ``[states, actions]``; all unless overridden."""
        return torch.ones(self.num_states, self.num_actions, dtype=torch.bool, device=self.device)

    def interruptible(self) -> Tensor:
        """States in which an override may come into force, bool ``[states]``; all unless overridden."""
        return torch.ones(self.num_states, dtype=torch.bool, device=self.device)

    def signal(self, name: str) -> Tensor:
        """Column of :attr:`signals` to write to, ``[envs]``."""
        return self.signals[:, self._column[name]]

    def set_interruption(self, interruption: float | Tensor) -> None:
        """Let overrides come with another probability, for all copies or ``[envs]``.

        Raises:
            ValueError: outside [0, 1].
        """
        chance = torch.as_tensor(interruption, dtype=torch.float64, device=self.device)
        if not bool(((chance >= 0) & (chance <= 1)).all()):
            raise ValueError(f"{type(self).__name__}: interruption must be in [0, 1], got {interruption}")
        self.interruption = chance.expand(self.envs).clone()
        self._disturbed = bool((chance > 0).any())

    # -- random numbers -----------------------------------------------------------------------------------------------
    def uniforms(self, purpose: int, count: int, rows: Tensor | None = None) -> Tensor:
        """``[envs or R, count]`` float64 in [0, 1), of the copies' present episode and step."""
        index, episode, elapsed = self.index, self.episode, self.elapsed
        if rows is not None:
            index, episode, elapsed = index[rows], episode[rows], elapsed[rows]
        moment = episode * (self.episode_limit + 1) + elapsed
        key = (self.seed, purpose)
        if key not in self._seeds:
            self._seeds[key] = stream_seed(*key)
        return counter_uniforms(self._seeds[key], index, moment, count)

    # -- stepping without TensorDicts ---------------------------------------------------------------------------------
    def rewind(self, seed: int | None = None) -> None:
        """Before the first episode again, with ``seed`` where given; :meth:`restart` comes next."""
        self.seed = self.seed if seed is None else seed
        self.episode.fill_(-1)

    def restart(self, rows: Tensor | None = None) -> None:
        """Start new episodes in all copies, or in ``rows`` ``[R]`` int64."""
        rows = torch.arange(self.envs, device=self.device) if rows is None else rows
        self.episode[rows] += 1
        self.elapsed[rows] = 0
        self._begin(rows, self.uniforms(START, 1, rows).squeeze(1))
        # not in place: whoever holds the last step's results keeps them
        self.executed = self.executed.index_fill(0, rows, -1)
        self.override = self.override.index_fill(0, rows, -1)
        self.signals = self.signals.index_fill(0, rows, 0.0)
        self._arrive(rows)

    def _arrive(self, rows: Tensor | None = None) -> None:
        """Decide whether an override is in force in the states just reached."""
        if not self._disturbed:
            return
        state, chance, override = self.state_index(), self.interruption, self.override
        if rows is not None:
            state, chance, override = state[rows], chance[rows], override[rows]
        comes = self.uniforms(OVERRIDE, 1, rows).squeeze(1) < chance
        if self.override_holds:
            comes = comes | (override >= 0)
        value = torch.where(self._may_interrupt[state] & comes, self.override_action, -1)
        self.override = value if rows is None else self.override.index_copy(0, rows, value)

    @property
    def _may_interrupt(self) -> Tensor:
        if self._able is None:  # a subclass knows its map only after this class's __init__
            self._able = self.interruptible()
        return self._able

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step all copies: reward (penalties subtracted) ``[envs]`` float32, terminated and truncated ``[envs]`` bool.

        Args:
            action: int64 ``[envs]``, what the policy intends; under an override it has no effect.
        """
        self.executed = torch.where(self.override >= 0, self.override, action)
        self.signals = torch.zeros_like(self.signals)
        reward, terminated = self._transition(self.executed)
        self.signal("interrupted").copy_(self.override >= 0)
        if self.penalties:
            reward = reward - self.signals @ self._weights
        self.elapsed += 1
        self._arrive()
        return reward, terminated, (self.elapsed >= self.episode_limit) & ~terminated

    def check_actions(self, action: Tensor) -> None:
        """Raises: ValueError: for another shape or an action out of range."""
        if action.shape != (self.envs,):
            raise ValueError(f"{type(self).__name__}: action must be [{self.envs}], got {list(action.shape)}")
        if action.dtype != torch.int64 or bool(((action < 0) | (action >= self.num_actions)).any()):
            raise ValueError(
                f"{type(self).__name__}: action must be int64 in [0, {self.num_actions}), got {action.dtype} in "
                f"[{int(action.min())}, {int(action.max())}]"
            )

    # -- the world as a table -----------------------------------------------------------------------------------------
    def dynamics(self) -> OversightDynamics:
        """The undisturbed world, found by stepping every action in every state; penalties are in the reward."""
        states, actions, place = self.num_states, self.num_actions, self.device
        twin = self.like(states * actions)
        legal = self.legal()
        twin.rewind()
        twin.restart()
        twin._put(torch.arange(states, device=place).repeat_interleave(actions))
        reward, terminated, _ = twin.advance(torch.arange(actions, device=place).repeat(states))
        shape = (states, actions)
        after, over = twin.state_index().view(shape), terminated.view(shape)
        start = self.start_distribution()
        reachable, size = start > 0, -1
        while size != int(reachable.sum()):
            size = int(reachable.sum())
            goes = legal & ~over & reachable.unsqueeze(1)
            reachable = reachable.index_fill(0, after[goes], True)
        return OversightDynamics(
            next_state=after,
            reward=reward.view(shape).double(),
            terminated=over,
            legal=legal,
            start=start,
            interruptible=self.interruptible(),
            reachable=reachable,
            features=self.features(),
        )

    @abstractmethod
    def like(self, envs: int) -> OversightEnv:
        """``envs`` copies of the same world, never interrupted, with the same penalties."""

    # -- exact position -----------------------------------------------------------------------------------------------
    def snapshot(self) -> dict[str, Any]:
        """Everything that decides how the batch goes on; loadable by ``torch.load(weights_only=True)``."""
        return {
            "fields": {name: value.clone() for name, value in self.fields.items()},
            "elapsed": self.elapsed.clone(),
            "episode": self.episode.clone(),
            "override": self.override.clone(),
            "index": self.index.clone(),
            "seed": self.seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`snapshot` was taken.

        Raises:
            ValueError: it is of another world or number of copies.
        """
        mine = {name: list(value.shape) for name, value in self.fields.items()}
        theirs = {name: list(value.shape) for name, value in state["fields"].items()}
        if mine != theirs:
            raise ValueError(f"{type(self).__name__}: the snapshot has fields {theirs}, this batch has {mine}")
        self.fields = {name: value.to(self.device, copy=True) for name, value in state["fields"].items()}
        for name in ("elapsed", "episode", "override", "index"):
            setattr(self, name, state[name].to(self.device, copy=True))
        self.seed = int(state["seed"])

    # -- TorchRL ------------------------------------------------------------------------------------------------------
    def _make_specs(self) -> None:
        each, place = torch.Size([self.envs]), self.device
        single = torch.Size([self.envs, 1])
        number = Bounded(-1, self.num_actions - 1, each, dtype=torch.int64, device=place)
        seen = torch.Size([self.envs, self.observation_size])
        legal = torch.Size([self.envs, self.num_actions])
        self.observation_spec = Composite(
            observation=Unbounded(seen, dtype=torch.float32, device=place),
            state=Categorical(self.num_states, each, dtype=torch.int64, device=place),
            action_mask=Binary(self.num_actions, legal, dtype=torch.bool, device=place),
            override=number.clone(),
            executed=number.clone(),
            signals=Composite({n: Unbounded(single, device=place) for n in self.signal_names}, shape=each),
            shape=each,
        )
        self.action_spec = Categorical(self.num_actions, each, dtype=torch.int64, device=place)
        self.reward_spec = Unbounded(single, device=place)
        flag = Categorical(2, single, dtype=torch.bool, device=place)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=each)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.rewind(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        chosen = tensordict.get("_reset", None) if tensordict is not None else None
        self.restart(None if chosen is None else chosen.reshape(self.envs).nonzero().squeeze(1))
        off = torch.zeros(self.envs, dtype=torch.bool, device=self.device)
        return self._seen(off, off)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        self.check_actions(action)
        reward, terminated, truncated = self.advance(action)
        return self._seen(terminated, truncated).set("reward", reward.unsqueeze(-1))

    def _seen(self, terminated: Tensor, truncated: Tensor) -> TensorDict:
        state = self.state_index()
        if self._tables is None:
            self._tables = self.features(), self.legal()
        features, legal = self._tables
        signals = {name: self.signals[:, number : number + 1].clone() for name, number in self._column.items()}
        return TensorDict(
            {
                "observation": features[state],
                "state": state,
                "action_mask": legal[state],
                "override": self.override.clone(),
                "executed": self.executed.clone(),
                "signals": TensorDict(signals, [self.envs], device=self.device),
                "done": (terminated | truncated).unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1).clone(),
                "truncated": truncated.unsqueeze(-1).clone(),
            },
            [self.envs],
            device=self.device,
        )
