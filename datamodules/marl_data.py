"""Multi-agent environments as data: collected by the module in training, replayed to it in minibatches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset

from datamodules.envs.base import MultiAgentEnv
from datamodules.envs.tasks import make_env
from datamodules.rollout.episodes import EpisodeBuilder, steps_as_items
from datamodules.rollout.evaluation import play_episodes
from datamodules.rollout.replay import Replay
from datamodules.rollout.stream import CollectorStream, Stream, TensorStream
from modules.contracts import ActingModule, ActsMultiAgent, LearnsFromReplay, MultiAgentSpec
from modules.seeds import global_seed

ENVIRONMENT, ACTOR, SAMPLER, BITS, EVALUATION = range(5)
"""What a rank's random streams are for."""


def _same(batch: Any) -> Any:
    return batch


def rank_seed(seed: int, rank: int, purpose: int) -> int:
    """Seed of one of a rank's random streams."""
    import numpy as np

    words = np.random.SeedSequence([seed, rank, purpose]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


class _Batches(Dataset):
    """A batch per collection of the whole run, made when it is asked for.

    Which step it is the datamodule knows: a run resumed in the middle takes what is left.
    """

    def __init__(self, data: MARLDataModule) -> None:
        self.data = data

    def __len__(self) -> int:  # sized, or the loader would fetch one batch ahead, collected by the policy before
        return self.data.batches

    def __getitem__(self, index: int) -> TensorDict:
        return self.data.next_batch()


class _Evaluations(Dataset):
    def __init__(self, data: MARLDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.evaluation_streams // self.data.world_size

    def __getitem__(self, index: int) -> TensorDict:
        return self.data.evaluate(self.data.rank + index * self.data.world_size)


class MARLDataModule(LightningDataModule):
    """Environments of one task, stepped by the module in training, with replay; off-policy.

    After every ``frames_per_batch`` environment frames a batch is served, with the minibatches of ``updates_per_batch``
    optimiser updates, as :class:`~modules.contracts.LearnsFromReplay` describes it. Counts are over all ranks and are
    divided among them; each rank has environments, replay and random streams of its own. A run is ``batches`` long, one
    epoch; its exact position (environments, episodes in the making, replay, generators) is in the checkpoint.

    Args:
        task: e.g. ``lbf/8x8-2p-2f-coop``; see :func:`datamodules.envs.tasks.known_tasks`.
        backend: ``tensor``, our batched environments, or ``package``, the original ones.
        options: constructor arguments of the environment that differ from the task's.
        workers: processes that step package environments; 0: this one.
        envs: parallel environments.
        frames_per_batch: environment frames between batches; a multiple of ``envs``.
        updates_per_batch: optimiser updates between collections.
        total_frames: environment frames of the whole run.
        learning_starts: frames collected before the first update.
        batch_size: items (steps or episodes) of a minibatch.
        capacity: items that replay keeps.
        storage: replay in ``memory``, or in memory-mapped files (``memmap``) in the run's folder.
        save_replay: keep replay in checkpoints; without it a resumed run starts with an empty one.
        collector: ``tensor`` steps without TensorDicts; ``torchrl`` is TorchRL's collector. The data are equal.
        env_device: where environments live; ``None``: with the module.
        evaluation_episodes: played per evaluation, the same starts each time.
        evaluation_streams: parts that they are played in; a multiple of the number of ranks.

    Raises:
        ValueError: a count out of range or not shared equally by the ranks, an unknown task (with the nearest names),
            or a replay larger than memory or disk.
    """

    def __init__(
        self,
        task: str,
        backend: Literal["tensor", "package"] = "tensor",
        options: dict[str, Any] | None = None,
        workers: int = 0,
        envs: int = 16,
        frames_per_batch: int = 16,
        updates_per_batch: int = 1,
        total_frames: int = 100_000,
        learning_starts: int = 1_000,
        batch_size: int = 128,
        capacity: int = 50_000,
        storage: Literal["memory", "memmap"] = "memory",
        save_replay: bool = True,
        collector: Literal["tensor", "torchrl"] = "tensor",
        env_device: str | None = "cpu",
        evaluation_episodes: int = 100,
        evaluation_streams: int = 1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("workers", workers, 0),
            ("envs", envs, 1),
            ("frames_per_batch", frames_per_batch, 1),
            ("updates_per_batch", updates_per_batch, 1),
            ("total_frames", total_frames, 1),
            ("learning_starts", learning_starts, 0),
            ("batch_size", batch_size, 1),
            ("capacity", capacity, 1),
            ("evaluation_episodes", evaluation_episodes, 1),
            ("evaluation_streams", evaluation_streams, 1),
        ):
            if value < least:
                raise ValueError(f"MARLDataModule: {name} must be >= {least}, got {value}")
        if frames_per_batch % envs:
            raise ValueError(
                f"MARLDataModule: frames_per_batch must be a multiple of envs ({envs}), got {frames_per_batch}"
            )
        if evaluation_episodes % evaluation_streams:
            raise ValueError(
                f"MARLDataModule: evaluation_episodes must be a multiple of evaluation_streams ({evaluation_streams}), "
                f"got {evaluation_episodes}"
            )
        if collector not in ("tensor", "torchrl"):
            raise ValueError(f"MARLDataModule: collector: tensor or torchrl, got '{collector}'")
        self.task, self.backend, self.options, self.workers = task, backend, dict(options or {}), workers
        self.envs, self.frames_per_batch, self.updates_per_batch = envs, frames_per_batch, updates_per_batch
        self.total_frames, self.learning_starts = total_frames, learning_starts
        self.batch_size, self.capacity = batch_size, capacity
        self.storage: Literal["memory", "memmap"] = storage
        self.save_replay, self.collector = save_replay, collector
        self.env_device = env_device
        self.evaluation_episodes, self.evaluation_streams = evaluation_episodes, evaluation_streams
        self.world_size, self.rank = 1, 0
        self.frames = 0
        """Environment frames so far, over all ranks."""
        self.frames_of_batch = 0
        """This rank's frames between the last batch and the one before."""
        self._served = 0
        self._waiting: Mapping[str, Any] | None = None
        self._waiting_folder: Path | None = None
        self._made = False

    # -- set-up -------------------------------------------------------------------------------------------------------
    def _share(self, name: str, value: int) -> int:
        if value % self.world_size:
            raise ValueError(
                f"MARLDataModule: {name} must be a multiple of the {self.world_size} ranks, got {value}"
            )
        return value // self.world_size

    def make_env(self, envs: int, seed: int) -> MultiAgentEnv:
        """``envs`` copies of the task."""
        trainer = self.trainer
        device = self.env_device
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
        for name in ("envs", "frames_per_batch", "batch_size", "evaluation_streams"):
            self._share(name, getattr(self, name))
        seed = global_seed()
        self._env_seed = self.rank_seed(ENVIRONMENT)
        self._env = self.make_env(self._share("envs", self.envs) if stage == "fit" else 1, self._env_seed)
        env = self._env
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
        )
        # evaluation starts depend on no rank: any number of ranks plays the same episodes
        self._evaluation_seed = rank_seed(seed, 0, EVALUATION)
        self._evaluation_env: MultiAgentEnv | None = None
        self._stream: Stream | None = None
        self._builder: EpisodeBuilder | None = None
        self._bits = torch.Generator().manual_seed(self.rank_seed(BITS))
        folder = None
        if trainer is not None:
            folder = Path(trainer.log_dir or trainer.default_root_dir) / f"replay-rank-{self.rank}"
        if stage == "fit":
            self._replay = Replay(self.capacity, self.storage, folder, self.rank_seed(SAMPLER))
        self._made = True

    def rank_seed(self, purpose: int) -> int:
        """Seed of this rank's stream for ``purpose``."""
        return rank_seed(global_seed(), self.rank, purpose)

    @property
    def batches(self) -> int:
        """Batches of the whole run."""
        warm = -(-self.learning_starts // self.frames_per_batch)
        chunks = -(-self.total_frames // self.frames_per_batch)
        # the chunk that ends the warm-up is followed by updates as the later ones are
        return max(chunks - max(warm, 1) + 1, 0)

    def digest(self) -> Mapping[str, str]:
        return {"task": f"{self.backend}:{self.task}", "envs": str(self.envs), "batches": str(self.batches)}

    def describe(self) -> Mapping[str, str]:
        return {
            "observation": "[updates, minibatches, items, steps + 1, agents, features] float32",
            "legal": "[updates, minibatches, items, steps + 1, agents, actions] bool, where actions are restricted",
            "state": "[updates, minibatches, items, steps + 1, features] float32, where the environment has its own",
            "action": "[updates, minibatches, items, steps, agents] int64",
            "reward": "[updates, minibatches, items, steps, agents] float32",
            "terminated": "[updates, minibatches, items, steps] bool",
            "filled": "[updates, minibatches, items, steps] bool, False for padding",
            "member_mask": "[updates, minibatches, items, members] bool, where items are for some members only",
        }

    def _learner(self) -> Any:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not (isinstance(module, LearnsFromReplay) and isinstance(module, ActsMultiAgent)):
            raise ValueError(
                f"MARLDataModule: {type(module).__name__} does not learn multi-agent values from replay: use "
                "modules.emax.ValueMARL, or a module with the members of LearnsFromReplay and ActsMultiAgent"
            )
        return module

    def train_dataloader(self) -> DataLoader:
        module = self._learner()
        if self.batches == 0:
            raise ValueError(
                f"MARLDataModule: total_frames must exceed learning_starts ({self.learning_starts}), "
                f"got {self.total_frames}: nothing would be learnt"
            )
        self._open(module)
        # a generator of its own, or every epoch would draw a seed from the global stream
        return DataLoader(
            _Batches(self), batch_size=None, collate_fn=_same, num_workers=0, generator=torch.Generator()
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Evaluations(self), batch_size=None, collate_fn=_same, num_workers=0)

    test_dataloader = val_dataloader

    def _open(self, module: Any) -> None:
        """Bind the environments to the module that acts, at the position of the checkpoint if there is one."""
        if self._stream is not None:
            return
        env, device = self._env, module.device
        generator = torch.Generator(device=device).manual_seed(self.rank_seed(ACTOR))
        if self.collector == "torchrl":
            if not isinstance(module, ActingModule):
                raise ValueError(f"MARLDataModule: collector: torchrl needs a policy, {type(module).__name__} has none")
            steps = self.frames_per_batch // self.envs
            self._stream = CollectorStream(env, module.policy, generator, steps, device)
        else:
            self._stream = TensorStream(env, module, generator, device)
        if module.sequences:
            self._builder = EpisodeBuilder(env.envs, env.episode_limit)
        if self._waiting is not None:
            self._resume(self._waiting)
            self._waiting = None
        if self._waiting_folder is not None:
            self._replay.load(self._waiting_folder)
            self._waiting_folder = None

    # -- batches ------------------------------------------------------------------------------------------------------
    def _collect(self, module: Any) -> int:
        """One chunk into replay; this rank's frames."""
        assert self._stream is not None
        steps = self.frames_per_batch // self.envs
        with torch.no_grad():
            chunk = self._stream.collect(steps, self.frames)
        frames = self._env.envs * steps
        self.frames += self.frames_per_batch
        items = self._builder.items(chunk) if self._builder is not None else steps_as_items(chunk)
        if items is not None:
            if module.bootstrap_p < 1.0:
                drawn = torch.rand(len(items), module.members, generator=self._bits)
                items["member_mask"] = drawn < module.bootstrap_p
            items = cast(TensorDict, items.to("cpu"))
            if len(self._replay) == 0 and self._replay.written == 0:
                size = sum(value[0].numel() * value.element_size() for value in items.values())
                self._replay.require_room(size, 2 if self.save_replay and self._saves_checkpoints() else 0)
            self._replay.extend(items)
        return frames

    def _saves_checkpoints(self) -> bool:
        from lightning.pytorch.callbacks import Checkpoint

        return self.trainer is not None and any(isinstance(c, Checkpoint) for c in self.trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]

    def next_batch(self) -> TensorDict:
        """The next batch, after collecting what is due."""
        module = self._learner()
        self._open(module)
        self.frames_of_batch = self._collect(module)
        while self.frames < self.learning_starts or len(self._replay) == 0:
            self.frames_of_batch += self._collect(module)
        self._served += 1
        shape = (self.updates_per_batch, module.minibatches, self.batch_size // self.world_size)
        batch = self._replay.sample(math.prod(shape)).unflatten(0, shape)
        if "filled" not in batch.keys():  # noqa: SIM118 - a TensorDict
            batch["filled"] = torch.ones_like(batch["terminated"])
        return cast(TensorDict, batch)

    def evaluate(self, number: int) -> TensorDict:
        """Evaluation episodes of stream ``number``."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, ActsMultiAgent):
            raise ValueError(f"MARLDataModule: {type(module).__name__} does not act for many agents")
        if self._evaluation_env is None:
            count = self.evaluation_episodes // self.evaluation_streams
            self._evaluation_env = self.make_env(count, self._evaluation_seed)
        device = cast(Any, module).device
        return play_episodes(self._evaluation_env, module, self._evaluation_seed + number, device)

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames, "served": self._served, "frames_per_batch": self.frames_per_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["frames_per_batch"] != self.frames_per_batch:
            raise ValueError(
                f"MARLDataModule: frames_per_batch: the checkpoint has {state_dict['frames_per_batch']}, the config "
                f"{self.frames_per_batch}: other steps would be counted; keep them equal"
            )
        self.frames, self._served = int(state_dict["frames"]), int(state_dict["served"])

    def rank_state_dict(self) -> dict[str, Any]:
        assert self._stream is not None
        return {
            "stream": self._stream.state_dict(),
            "builder": None if self._builder is None else self._builder.state_dict(),
            "replay": self._replay.state_dict(),
            "bits": self._bits.get_state(),
        }

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waiting = state_dict  # environments are bound to the module later, when its device is known

    def _resume(self, state: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.load_state_dict(state["stream"])
        if self._builder is not None and state["builder"] is not None and self._env.exact_resume:
            self._builder.load_state_dict(state["builder"])
        self._replay.load_state_dict(state["replay"])
        self._bits.set_state(state["bits"])

    def save_rank_files(self, folder: Path, previous: Path | None) -> None:
        if self.save_replay:
            self._replay.save(folder, previous)

    def rank_files_saved(self, folder: Path) -> None:
        self._replay.saved_as(folder)

    def load_rank_files(self, folder: Path) -> None:
        if self.save_replay:
            self._waiting_folder = folder

    def teardown(self, stage: str) -> None:
        if not self._made:
            return
        if self._stream is not None:
            self._stream.close()
        if self._evaluation_env is not None:
            self._evaluation_env.close(raise_if_closed=False)
        if stage == "fit":
            self._replay.close()
