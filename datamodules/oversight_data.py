"""Oversight worlds as data: steps of many learners with and without interruptions, and whole evaluation episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.envs.oversight.base import ACT, OversightEnv
from datamodules.envs.oversight.worlds import make_world
from datamodules.rollout.loaders import CollectedBatches, evaluation_loader, training_loader
from modules.contracts.oversight import ActsOnStates, OversightDynamics, OversightSpec
from modules.seeds import global_seed, stream_seed

_TRAINING = 95  # what the run's seed is used for


class _Evaluations(Dataset):
    """One empty batch: the module asks for the episodes that it wants."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> TensorDict:
        return TensorDict({"index": torch.tensor(index)}, [])


class OversightDataModule(LightningDataModule):
    """Copies of one oversight world, stepped by the learners in training (:class:`ProvidesOversight`).

    With ``interruption`` above 0 every learner has a twin in a second arm that is never interrupted and sees the same
    random numbers, so that one run measures what interruptions taught (``control_arm: false`` leaves the twins out).
    Interrupted episodes go on to their end and stay in the data. A run is one epoch of ``batches``; the exact position
    of all environments is in the checkpoint.

    Args:
        world: ``off_switch``, ``vase``, ``supervisor`` or ``story/<name>``.
        options: constructor arguments of the world that differ from its defaults.
        penalties: signal -> what one unit of it costs the learner in training (``side_effect``, ``avoided``, ...).
        interruption: probability of an override, per step at which one is possible.
        control_arm: with interruptions, also train twins without.
        learners: independent learners in each arm.
        copies: environments of each learner, over all ranks.
        steps: of every environment in a batch.
        batches: of the whole run.
        evaluation_episodes: per policy and evaluation.
        env_device: where environments live; ``None``: with the module.

    Raises:
        ValueError: a count below 1 or not shared equally by the ranks, a probability outside [0, 1], an unknown world.
    """

    spec: OversightSpec
    dynamics: OversightDynamics

    def __init__(
        self,
        world: str,
        options: dict[str, Any] | None = None,
        penalties: dict[str, float] | None = None,
        interruption: float = 0.0,
        control_arm: bool = True,
        learners: int = 16,
        copies: int = 32,
        steps: int = 25,
        batches: int = 200,
        evaluation_episodes: int = 64,
        env_device: str | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "learners": learners,
            "copies": copies,
            "steps": steps,
            "batches": batches,
            "evaluation_episodes": evaluation_episodes,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"OversightDataModule: {name} must be >= 1, got {value}")
        if not 0.0 <= interruption <= 1.0:
            raise ValueError(f"OversightDataModule: interruption must be in [0, 1], got {interruption}")
        self.world, self.options, self.penalties = world, dict(options or {}), dict(penalties or {})
        self.arms = (0.0, interruption) if interruption and control_arm else (interruption,)
        self.learners, self.copies, self.steps, self.batches = learners, copies, steps, batches
        self.evaluation_episodes, self.env_device = evaluation_episodes, env_device
        self.world_size, self.rank = 1, 0
        self.frames = 0
        """Environment steps so far, over all ranks."""
        self._env: OversightEnv | None = None
        self._evaluation_env: OversightEnv | None = None
        self._intended: Tensor | None = None
        self._waiting: Mapping[str, Any] | None = None
        self._made = False

    # -- set-up -------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        if self._made:
            return
        if self.trainer is not None:
            self.world_size, self.rank = self.trainer.world_size, self.trainer.global_rank
        if self.copies % self.world_size:
            raise ValueError(
                f"OversightDataModule: copies must be a multiple of the {self.world_size} ranks, got {self.copies}"
            )
        probe = make_world(self.world, 1, self.options, penalties=self.penalties, device=self._place)
        self.dynamics = probe.dynamics()
        self.spec = OversightSpec(
            world=self.world,
            num_states=probe.num_states,
            num_actions=probe.num_actions,
            observation_size=probe.observation_size,
            episode_limit=probe.episode_limit,
            arms=self.arms,
            learners=self.learners,
            copies=self.copies,
            signals=probe.signal_names,
        )
        self._made = True

    @property
    def _place(self) -> torch.device:
        if self.env_device is not None:
            return torch.device(self.env_device)
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    @property
    def _device(self) -> torch.device:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return torch.device("cpu") if module is None else torch.device(module.device)

    def learner(self) -> ActsOnStates:
        """The module in training. Raises: ValueError: if it does not act on numbered states."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, ActsOnStates):
            raise ValueError(
                f"OversightDataModule: {type(module).__name__} does not act on numbered states: use "
                "modules.baselines.tabular.TabularModule, or a module with act(state, draws)"
            )
        return module

    def digest(self) -> Mapping[str, str]:
        return {"world": self.world, "options": str(sorted(self.options.items())), "arms": str(self.arms)}

    def describe(self) -> Mapping[str, str]:
        return {
            "state": "[groups, copies, steps] int64, and executed, next_state, next_executed, next_intended",
            "reward": "[groups, copies, steps] float32",
            "terminated": "[groups, copies, steps] bool, and next_overridden",
        }

    def train_dataloader(self) -> DataLoader:
        return training_loader(CollectedBatches(self))

    def val_dataloader(self) -> DataLoader:
        return evaluation_loader(_Evaluations())

    test_dataloader = val_dataloader

    # -- training -----------------------------------------------------------------------------------------------------
    def _open(self) -> OversightEnv:
        """This rank's environments, at the position of the checkpoint if there is one."""
        if self._env is not None:
            return self._env
        arms, learners, share = len(self.arms), self.learners, self.copies // self.world_size
        mine = torch.arange(self.rank * share, (self.rank + 1) * share)
        number = torch.arange(learners).unsqueeze(1) * self.copies + mine  # twins in all arms have the same number
        chance = torch.tensor(self.arms, dtype=torch.float64).repeat_interleave(learners * share)
        self._env = env = make_world(
            self.world,
            arms * learners * share,
            self.options,
            penalties=self.penalties,
            interruption=chance,
            index=number.flatten().repeat(arms),
            seed=stream_seed(global_seed(), _TRAINING),
            device=self._place,
        )
        if self._waiting is None:
            env.restart()
        else:
            env.restore(self._waiting["env"])
            self._intended = self._waiting["intended"]
            self._waiting = None
        return env

    def _act(self, env: OversightEnv, state: Tensor) -> Tensor:
        groups, device = self.spec.groups, self._device
        draws = env.uniforms(ACT, 1).to(device).view(groups, -1)
        return self.learner().act(state.to(device).view(groups, -1), draws).flatten().to(env.device)

    @torch.no_grad()
    def next_batch(self) -> TensorDict:
        """The next ``steps`` of every environment; see :class:`~modules.contracts.oversight.ProvidesOversight`."""
        env = self._open()
        state = env.state_index()
        intended = self._act(env, state) if self._intended is None else self._intended
        lists: dict[str, list[Tensor]] = {}
        for _ in range(self.steps):
            reward, terminated, truncated = env.advance(intended)
            executed, after = env.executed, env.state_index()
            following, override = self._act(env, after), env.override
            row = {
                "state": state,
                "executed": executed,
                "reward": reward,
                "next_state": after,
                "terminated": terminated,
                "next_intended": following,
                "next_executed": torch.where(override >= 0, override, following),
                "next_overridden": override >= 0,
            }
            for name, value in row.items():
                lists.setdefault(name, []).append(value)
            over = terminated | truncated
            if bool(over.any()):
                env.restart(over.nonzero().squeeze(1))
                after = env.state_index()
                following = torch.where(over, self._act(env, after), following)
            state, intended = after, following
        self._intended = intended
        self.frames += self.steps * self.spec.groups * self.copies
        shape = (self.spec.groups, self.copies // self.world_size, self.steps)
        batch = {name: torch.stack(values, 1).view(shape).to(self._device) for name, values in lists.items()}
        return TensorDict(batch, shape)

    # -- evaluation ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def episodes(self, policies: Tensor, interruption: Sequence[float], episodes: int, seed: int) -> TensorDict:
        """See :class:`~modules.contracts.oversight.ProvidesOversight`.

        Raises:
            ValueError: policies of another shape, or not one probability for each.
        """
        count, wanted = len(policies), (self.spec.num_states, self.spec.num_actions)
        if policies.shape != (count, *wanted) or len(interruption) != count:
            raise ValueError(
                f"OversightDataModule: episodes: policies must be [policies, {wanted[0]}, {wanted[1]}] with an "
                f"interruption each, got {list(policies.shape)} and {len(interruption)}"
            )
        env = self._evaluation_env
        if env is None or env.envs != count * episodes:
            index = torch.arange(episodes).repeat(count)
            env = self._evaluation_env = make_world(
                self.world, count * episodes, self.options, index=index, device=self._place
            )
        place = env.device
        env.set_interruption(torch.tensor(interruption, dtype=torch.float64).repeat_interleave(episodes))
        env.rewind(seed)
        env.restart()
        chances = policies.to(place).double()
        left = chances.flip(-1).cumsum(-1).flip(-1) - chances  # chance of the later actions
        ladder = chances.cumsum(-1).masked_fill(left <= 1e-12, 2.0)  # exceeds every draw, whatever the rounding
        policy = torch.arange(count, device=place).repeat_interleave(episodes)
        total = torch.zeros(env.envs, dtype=torch.float64, device=place)
        signals = torch.zeros(env.envs, len(env.signal_names), dtype=torch.float64, device=place)
        length, overrides, obeyed = (torch.zeros(env.envs, dtype=torch.int64, device=place) for _ in range(3))
        visits = torch.zeros(count * wanted[0], dtype=torch.float64, device=place)
        running = torch.ones(env.envs, dtype=torch.bool, device=place)
        for _ in range(env.episode_limit):
            state, override = env.state_index(), env.override
            draw = env.uniforms(ACT, 1)
            action = (draw >= ladder[policy, state]).sum(-1)
            free = running & (override < 0)
            visits.index_add_(0, policy * wanted[0] + state, free.double())
            reward, terminated, truncated = env.advance(action)
            total += torch.where(running, reward.double(), 0.0)
            signals += torch.where(running.unsqueeze(1), env.signals.double(), 0.0)
            length += running
            overrides += running & ~free
            obeyed += running & ~free & (env.executed == override)
            running = running & ~(terminated | truncated)
            if not bool(running.any()):
                break
        shape, device = (count, episodes), self._device
        values = {
            "episode_return": total,
            "episode_length": length,
            "overrides": overrides,
            "obeyed": obeyed,
            **{name: signals[:, number] for number, name in enumerate(env.signal_names)},
        }
        played = {name: value.view(shape).to(device) for name, value in values.items()}
        return TensorDict({**played, "visits": visits.view(count, -1).to(device)}, [count])

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames, "world": self.world, "learners": self.learners, "copies": self.copies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("world", "learners", "copies"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"OversightDataModule: {name}: the checkpoint has {state_dict[name]}, the config "
                    f"{getattr(self, name)}: keep them equal"
                )
        self.frames = int(state_dict["frames"])

    def rank_state_dict(self) -> dict[str, Any]:
        return {"env": self._open().snapshot(), "intended": self._intended}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waiting = state_dict  # put back when the environments are made

    def teardown(self, stage: str) -> None:
        for env in (self._env, self._evaluation_env):
            if env is not None:
                env.close(raise_if_closed=False)
        self._env = self._evaluation_env = None
