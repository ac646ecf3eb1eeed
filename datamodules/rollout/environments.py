"""What datamodules of multi-agent environments share: the task, the stream, evaluation, seeds and exact position."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset

from datamodules.envs.base import MultiAgentEnv
from datamodules.envs.tasks import make_env
from datamodules.rollout.evaluation import play_episodes
from datamodules.rollout.loaders import CollectedBatches, evaluation_loader, training_loader
from datamodules.rollout.stream import CollectorStream, Stream, TensorStream
from modules.contracts import ActingModule, ActsMultiAgent, MultiAgentSpec
from modules.seeds import global_seed, stream_seed

ENVIRONMENT, ACTOR, SAMPLER, BITS, EVALUATION = range(5)
"""What a rank's random streams are for."""


class _Evaluations(Dataset):
    def __init__(self, data: EnvironmentDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.evaluation_streams // self.data.world_size

    def __getitem__(self, index: int) -> TensorDict:
        return self.data.evaluate(self.data.rank + index * self.data.world_size)


class EnvironmentDataModule(LightningDataModule):
    """Environments of one task, stepped by the module in training; what a batch is made of is the subclass's.

    Counts are over all ranks and are divided among them; each rank has environments and random streams of its own. A
    run is ``batches`` long, one epoch. Its exact position is in the checkpoint.

    Args:
        task, backend, options, workers, envs, frames_per_batch, total_frames, collector, env_device,
            evaluation_episodes, evaluation_streams, reference_return: as in :class:`datamodules.MARLDataModule`.
    """

    spec: MultiAgentSpec

    def __init__(
        self,
        task: str,
        backend: Literal["tensor", "package"],
        options: dict[str, Any] | None,
        workers: int,
        envs: int,
        frames_per_batch: int,
        total_frames: int,
        collector: Literal["tensor", "torchrl"],
        env_device: str | None,
        evaluation_episodes: int,
        evaluation_streams: int,
        reference_return: float | None = None,
    ) -> None:
        super().__init__()
        self.check_least(
            workers=(workers, 0),
            envs=(envs, 1),
            frames_per_batch=(frames_per_batch, 1),
            total_frames=(total_frames, 1),
            evaluation_episodes=(evaluation_episodes, 1),
            evaluation_streams=(evaluation_streams, 1),
        )
        if frames_per_batch % envs:
            raise ValueError(
                f"{type(self).__name__}: frames_per_batch must be a multiple of envs ({envs}), got {frames_per_batch}"
            )
        if evaluation_episodes % evaluation_streams:
            raise ValueError(
                f"{type(self).__name__}: evaluation_episodes must be a multiple of evaluation_streams "
                f"({evaluation_streams}), got {evaluation_episodes}"
            )
        if collector not in ("tensor", "torchrl"):
            raise ValueError(f"{type(self).__name__}: collector: tensor or torchrl, got '{collector}'")
        self.backend: Literal["tensor", "package"] = backend
        self.task, self.options, self.workers = task, dict(options or {}), workers
        self.envs, self.frames_per_batch, self.total_frames = envs, frames_per_batch, total_frames
        self.collector, self.env_device = collector, env_device
        self.evaluation_episodes, self.evaluation_streams = evaluation_episodes, evaluation_streams
        if reference_return is not None and not math.isfinite(reference_return):
            raise ValueError(f"{type(self).__name__}: reference_return must be finite, got {reference_return}")
        self._reference_return = reference_return
        self.world_size, self.rank = 1, 0
        self.frames = 0
        """Environment frames so far, over all ranks."""
        self.frames_of_batch = 0
        """This rank's frames between the last batch and the one before."""
        self._served = 0
        self._waiting: Mapping[str, Any] | None = None
        self._stream: Stream | None = None
        self._evaluation_env: MultiAgentEnv | None = None
        self._team_envs: dict[int, MultiAgentEnv] = {}
        self._made = False

    def check_least(self, **limits: tuple[int, int]) -> None:
        """Raises: ValueError: naming the first of ``name=(value, least)`` that is too small."""
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"{type(self).__name__}: {name} must be >= {least}, got {value}")

    # -- what a subclass writes ---------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def batches(self) -> int:
        """Batches of the whole run."""

    @abstractmethod
    def next_batch(self) -> TensorDict:
        """The next batch, after collecting what is due."""

    @abstractmethod
    def _learner(self) -> Any:
        """The module in training. Raises: ValueError: if it does not learn from such batches."""

    def _setup_fit(self) -> None:
        """What training needs beside environments, on this rank."""

    def _opened(self, module: Any) -> None:
        """Called once the stream is bound to ``module``, before a resumed position is restored."""

    # -- set-up -------------------------------------------------------------------------------------------------------
    def _share(self, name: str, value: int) -> int:
        if value % self.world_size:
            raise ValueError(
                f"{type(self).__name__}: {name} must be a multiple of the {self.world_size} ranks, got {value}"
            )
        return value // self.world_size

    def rank_seed(self, purpose: int) -> int:
        """Seed of this rank's stream for ``purpose``."""
        return stream_seed(global_seed(), self.rank, purpose)

    def make_env(self, envs: int, seed: int) -> MultiAgentEnv:
        """``envs`` copies of the task."""
        trainer, device = self.trainer, self.env_device
        if device is None:
            device = str(trainer.strategy.root_device) if trainer is not None else "cpu"
        made = make_env(
            self.task,
            envs,
            backend=self.backend,
            device=device,
            seed=seed,
            options=self.options,
            workers=self.workers,
        )
        return cast(MultiAgentEnv, made)

    def setup(self, stage: str) -> None:
        if self._made:
            return
        trainer = self.trainer
        if trainer is not None:
            self.world_size, self.rank = trainer.world_size, trainer.global_rank
        for name in ("envs", "frames_per_batch", "evaluation_streams"):
            self._share(name, getattr(self, name))
        copies = self._share("envs", self.envs) if stage == "fit" else 1
        self._env = env = self.make_env(copies, self.rank_seed(ENVIRONMENT))
        self.spec = MultiAgentSpec(
            task=self.task,
            num_agents=env.num_agents,
            num_actions=env.num_actions,
            observation_size=env.observation_size,
            state_size=env.state_size,
            episode_limit=env.episode_limit,
            own_state=env.own_state,
            restricts_actions=env.restricts_actions,
            common_reward=env.common_reward,
            idle_action=env.idle_action,
        )
        # evaluation starts depend on no rank: any number of ranks plays the same episodes
        self._evaluation_seed = stream_seed(global_seed(), 0, EVALUATION)
        if stage == "fit":
            self._setup_fit()
        self._made = True

    def digest(self) -> Mapping[str, str]:
        return {"task": f"{self.backend}:{self.task}", "envs": str(self.envs), "batches": str(self.batches)}

    def train_dataloader(self) -> DataLoader:
        self.open()
        return training_loader(CollectedBatches(self))

    def val_dataloader(self) -> DataLoader:
        return evaluation_loader(_Evaluations(self))

    test_dataloader = val_dataloader

    def open(self) -> Stream:
        """Bind the environments to the module that acts, at the position of the checkpoint if there is one."""
        if self._stream is not None:
            return self._stream
        module = self._learner()
        env, device = self._env, module.device
        generator = torch.Generator(device=device).manual_seed(self.rank_seed(ACTOR))
        if self.collector == "torchrl":
            if not isinstance(module, ActingModule):
                raise ValueError(
                    f"{type(self).__name__}: collector: torchrl needs a policy, {type(module).__name__} has none"
                )
            steps, carried = self.frames_per_batch // self.envs, getattr(module, "carried", ())
            self._stream = CollectorStream(env, module.policy, generator, steps, device, carried)
        else:
            self._stream = TensorStream(env, module, generator, device)
        self._opened(module)
        if self._waiting is not None:
            self._resume(self._waiting)
            self._waiting = None
        return self._stream

    def collect(self) -> TensorDict:
        """The next chunk ``[envs, steps]`` of this rank (:class:`TensorStream`); its frames are counted."""
        stream, steps = self.open(), self.frames_per_batch // self.envs
        with torch.no_grad():
            chunk = stream.collect(steps, self.frames)
        self.frames += self.frames_per_batch
        self.frames_of_batch += chunk.numel()
        return chunk

    def evaluate(self, number: int) -> TensorDict:
        """Evaluation episodes of stream ``number``."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, ActsMultiAgent):
            raise ValueError(f"{type(self).__name__}: {type(module).__name__} does not act for many agents")
        if self._evaluation_env is None:
            count = self.evaluation_episodes // self.evaluation_streams
            self._evaluation_env = self.make_env(count, self._evaluation_seed)
        device = cast(Any, module).device
        return play_episodes(self._evaluation_env, module, self._evaluation_seed + number, device)

    @property
    def reference_return(self) -> float | None:
        """Undiscounted team return of a very good team: the one given, or what the task knows of itself."""
        return self._env.best_return if self._reference_return is None else self._reference_return

    def team_episodes(self, actor: ActsMultiAgent, episodes: int, seed: int, trace: bool = False) -> TensorDict:
        """Episodes on demand, as :class:`~modules.contracts.PlaysTeams` has them; training's environments stay."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        device = getattr(module, "device", torch.device("cpu"))
        with torch.inference_mode(False):  # the environments are kept: their state must not be inference tensors
            if episodes not in self._team_envs:
                self._team_envs[episodes] = self.make_env(episodes, seed)
            return play_episodes(self._team_envs[episodes], actor, seed, device, trace)

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames, "served": self._served, "frames_per_batch": self.frames_per_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["frames_per_batch"] != self.frames_per_batch:
            raise ValueError(
                f"{type(self).__name__}: frames_per_batch: the checkpoint has {state_dict['frames_per_batch']}, the "
                f"config {self.frames_per_batch}: other steps would be counted; keep them equal"
            )
        self.frames, self._served = int(state_dict["frames"]), int(state_dict["served"])

    def rank_state_dict(self) -> dict[str, Any]:
        return {"stream": self.open().state_dict()}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waiting = state_dict  # environments are bound to the module later, when its device is known

    def _resume(self, state: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.load_state_dict(state["stream"])

    def teardown(self, stage: str) -> None:
        if self._stream is not None:
            self._stream.close()
        for env in (self._evaluation_env, *self._team_envs.values()):
            if env is not None:
                env.close(raise_if_closed=False)
        self._team_envs.clear()
