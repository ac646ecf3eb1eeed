"""Multi-agent environments as data: minibatches from replay, or whole rollouts of the newest policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import Checkpoint
from tensordict import TensorDict

from datamodules.rollout.environments import BITS, SAMPLER, EnvironmentDataModule
from datamodules.rollout.episodes import EpisodeBuilder, steps_as_items
from datamodules.rollout.replay import Replay
from modules.contracts import ActsMultiAgent, LearnsFromReplay, PreparesRollout


class MARLDataModule(EnvironmentDataModule):
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
        reference_return: undiscounted team return of a very good team, for normalised figures; ``null``: the task's
            own bound, where it knows one.

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
        envs: int = 32,
        frames_per_batch: int = 128,
        updates_per_batch: int = 8,
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
        reference_return: float | None = None,
    ) -> None:
        super().__init__(
            task,
            backend,
            options,
            workers,
            envs,
            frames_per_batch,
            total_frames,
            collector,
            env_device,
            evaluation_episodes,
            evaluation_streams,
            reference_return,
        )
        self.check_least(
            updates_per_batch=(updates_per_batch, 1),
            learning_starts=(learning_starts, 0),
            batch_size=(batch_size, 1),
            capacity=(capacity, 1),
        )
        self.updates_per_batch, self.learning_starts = updates_per_batch, learning_starts
        self.batch_size, self.capacity = batch_size, capacity
        self.storage: Literal["memory", "memmap"] = storage
        self.save_replay = save_replay
        self._builder: EpisodeBuilder | None = None
        self._waiting_folder: Path | None = None

    # -- set-up -------------------------------------------------------------------------------------------------------
    def _setup_fit(self) -> None:
        self._share("batch_size", self.batch_size)
        if self.batches == 0:
            raise ValueError(
                f"MARLDataModule: total_frames must exceed learning_starts ({self.learning_starts}), "
                f"got {self.total_frames}: nothing would be learnt"
            )
        self._bits = torch.Generator().manual_seed(self.rank_seed(BITS))
        trainer, folder = self.trainer, None
        if trainer is not None:
            folder = Path(trainer.log_dir or trainer.default_root_dir) / f"replay-rank-{self.rank}"
        self._replay = Replay(self.capacity, self.storage, folder, self.rank_seed(SAMPLER))

    @property
    def batches(self) -> int:
        warm = -(-self.learning_starts // self.frames_per_batch)
        chunks = -(-self.total_frames // self.frames_per_batch)
        # the chunk that ends the warm-up is followed by updates as the later ones are
        return max(chunks - max(warm, 1) + 1, 0)

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
            "carry_<name>": "[updates, minibatches, items, ...], what the module carries into replay, if anything",
        }

    def _learner(self) -> Any:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not (isinstance(module, LearnsFromReplay) and isinstance(module, ActsMultiAgent)):
            raise ValueError(
                f"MARLDataModule: {type(module).__name__} does not learn multi-agent values from replay: use "
                "modules.emax.ValueMARL, or a module with the members of LearnsFromReplay and ActsMultiAgent"
            )
        return module

    def _opened(self, module: Any) -> None:
        if module.sequences:
            self._builder = EpisodeBuilder(self._env.envs, self._env.episode_limit)
        if self._waiting_folder is not None:
            self._replay.load(self._waiting_folder)
            self._waiting_folder = None

    # -- batches ------------------------------------------------------------------------------------------------------
    def _fill(self, module: Any) -> None:
        """One chunk into replay."""
        chunk = self.collect()
        items = self._builder.items(chunk) if self._builder is not None else steps_as_items(chunk)
        if items is None:
            return
        if module.bootstrap_p < 1.0:
            items["member_mask"] = torch.rand(len(items), module.members, generator=self._bits) < module.bootstrap_p
        items = cast(TensorDict, items.to("cpu"))
        if self._replay.written == 0:
            tensors = cast(dict[str, torch.Tensor], items.to_dict())
            size = sum(value[0].numel() * value.element_size() for value in tensors.values())
            self._replay.require_room(size, 2 if self.save_replay and self._saves_checkpoints() else 0)
        self._replay.extend(items)

    def _saves_checkpoints(self) -> bool:
        callbacks = getattr(self.trainer, "callbacks", [])
        return any(isinstance(callback, Checkpoint) for callback in callbacks)

    def next_batch(self) -> TensorDict:
        module = self._learner()
        self.open()
        self.frames_of_batch = 0
        self._fill(module)
        while self.frames < self.learning_starts or len(self._replay) == 0:
            self._fill(module)
        self._served += 1
        shape = (self.updates_per_batch, module.minibatches, self._share("batch_size", self.batch_size))
        batch = cast(TensorDict, self._replay.sample(math.prod(shape)).unflatten(0, shape))
        if "filled" not in batch.keys():  # noqa: SIM118 - a TensorDict
            batch["filled"] = torch.ones_like(batch["terminated"])
        return batch

    # -- exact position -----------------------------------------------------------------------------------------------
    def rank_state_dict(self) -> dict[str, Any]:
        return {
            **super().rank_state_dict(),
            "builder": None if self._builder is None else self._builder.state_dict(),
            "replay": self._replay.state_dict(),
            "bits": self._bits.get_state(),
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        super()._resume(state)
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
        super().teardown(stage)
        if stage == "fit" and self._made:
            self._replay.close()


class MARLRolloutDataModule(EnvironmentDataModule):
    """Environments of one task, stepped by the module in training; on-policy.

    A batch is a rollout ``[envs, steps]`` of the newest policy, finished by the module's ``prepare_rollout`` and dealt
    out as ``[epochs * minibatches, rows]``: every epoch is a new random division of all steps.

    Args:
        epochs: passes over a rollout.
        minibatches: parts of a pass.
        task, backend, options, workers, envs, frames_per_batch, total_frames, collector, env_device,
            evaluation_episodes, evaluation_streams, reference_return: as in :class:`MARLDataModule`.

    Raises:
        ValueError: as there, or a rollout that is not divided equally into minibatches.
    """

    def __init__(
        self,
        task: str,
        backend: Literal["tensor", "package"] = "tensor",
        options: dict[str, Any] | None = None,
        workers: int = 0,
        envs: int = 64,
        frames_per_batch: int = 3_200,
        epochs: int = 4,
        minibatches: int = 4,
        total_frames: int = 500_000,
        collector: Literal["tensor", "torchrl"] = "tensor",
        env_device: str | None = "cpu",
        evaluation_episodes: int = 100,
        evaluation_streams: int = 1,
        reference_return: float | None = None,
    ) -> None:
        super().__init__(
            task,
            backend,
            options,
            workers,
            envs,
            frames_per_batch,
            total_frames,
            collector,
            env_device,
            evaluation_episodes,
            evaluation_streams,
            reference_return,
        )
        self.check_least(epochs=(epochs, 1), minibatches=(minibatches, 1))
        self.epochs, self.minibatches = epochs, minibatches

    def _setup_fit(self) -> None:
        rows = self.frames_per_batch // self.world_size
        if rows % self.minibatches:
            raise ValueError(
                f"MARLRolloutDataModule: minibatches must divide the {rows} frames of a rank's rollout, "
                f"got {self.minibatches}"
            )
        self._shuffle = torch.Generator().manual_seed(self.rank_seed(SAMPLER))

    @property
    def batches(self) -> int:
        return -(-self.total_frames // self.frames_per_batch)

    def describe(self) -> Mapping[str, str]:
        return {
            "observation": "[updates, rows, agents, features] float32",
            "action": "[updates, rows, agents] int64",
            "and": "what prepare_rollout adds, [updates, rows, ...]",
        }

    def _learner(self) -> Any:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not (isinstance(module, PreparesRollout) and isinstance(module, ActsMultiAgent)):
            raise ValueError(
                f"MARLRolloutDataModule: {type(module).__name__} does not learn from rollouts: use "
                "modules.baselines.MAPPO, or a module with the members of PreparesRollout and ActsMultiAgent"
            )
        return module

    def next_batch(self) -> TensorDict:
        module = self._learner()
        self.frames_of_batch = 0
        with torch.no_grad():
            rows = module.prepare_rollout(self.collect().to(module.device)).flatten(0, 1)
        self._served += 1
        orders = [torch.randperm(len(rows), generator=self._shuffle) for _ in range(self.epochs)]
        dealt = rows[torch.cat(orders).to(rows.device)]
        updates = self.epochs * self.minibatches
        return cast(TensorDict, dealt.unflatten(0, (updates, len(dealt) // updates)))

    def rank_state_dict(self) -> dict[str, Any]:
        return {**super().rank_state_dict(), "shuffle": self._shuffle.get_state()}

    def _resume(self, state: Mapping[str, Any]) -> None:
        super()._resume(state)
        self._shuffle.set_state(state["shuffle"])
