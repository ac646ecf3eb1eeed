"""Checkpoints: atomic writes, last-k and best, per-rank state beside the main file, exact resume."""

from __future__ import annotations

import errno
import hashlib
import pickle
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rng import capture_rng_state, restore_rng_state
from modules.contracts import RankFilesData, RankStatefulData
from modules.files import atomic_directory, atomic_symlink, atomic_write, sha256_file

MANIFEST_KEY = "plumbline"
FORMAT_VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or written; the message names the file and the mend."""


def _load_whole(path: Path, map_location: Any = "cpu") -> Any:
    """``torch.load(weights_only=True)`` with one clear error for a missing, truncated or foreign file."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} does not exist: name one of the run's checkpoints/*.ckpt")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        siblings = sorted(p.name for p in path.resolve().parent.glob("step-*.ckpt") if p.name != path.resolve().name)
        mend = f"resume from {siblings[-1]} beside it" if siblings else "start the run again"
        raise CheckpointError(f"checkpoint {path} is corrupt or not a checkpoint ({reason[:160]}): {mend}") from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint I/O, written to a temporary name, fsynced and renamed; read with ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO: storage_options is not supported, got a value")
        _save_whole(checkpoint, Path(path))

    def load_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return _load_whole(Path(path), map_location if map_location is not None else "cpu")


def _save_whole(content: Any, path: Path) -> None:
    try:
        with atomic_write(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a failed stream write into a RuntimeError that hides the errno
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _no_space(path.parent)
        reason = "no space left on the disk" if full else str(error).splitlines()[0]
        raise CheckpointError(
            f"could not write checkpoint {path}: {reason}; earlier checkpoints in {path.parent} are whole: "
            "free space (or point --runs elsewhere) and resume with --ckpt_path last"
        ) from error


def _no_space(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 1 << 20


class RunCheckpoint(Checkpoint):
    """Saves ``<run>/checkpoints/step-<n>.ckpt`` so that a killed run resumes bitwise where it was.

    At a step where validation is due the save waits until validation has finished, so that a resumed run neither
    repeats nor skips it. What differs by rank (generators, environments) is written first, one ``.rank-<k>.pt`` file a
    rank, and a folder of the same name where the datamodule has bulk (replay); the main file names them, with the
    files' SHA-256; last of all the links ``last.ckpt`` and ``best.ckpt`` move.
    A kill at any instant leaves ``last.ckpt`` pointing at a whole checkpoint. SIGINT and SIGTERM save at the next
    optimiser step.

    Args:
        every_n_steps: optimiser steps between saves.
        keep_last: how many of the newest checkpoints to keep.
        monitor: metric logged in validation that ranks checkpoints, e.g. ``val/loss``; ``None``: no ``best.ckpt``.
        mode: whether a smaller (``min``) or larger (``max``) ``monitor`` is better.
        keep_best: how many of the best checkpoints to keep.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep_last: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last), ("keep_best", keep_best)):
            if value < 1:
                raise ValueError(f"RunCheckpoint: {name} must be >= 1, got {value}")
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self.scores: dict[str, float] = {}
        self.folder = Path()
        self._saved_step = 0
        self._seen_step = 0
        self._deferred = False
        self._manifest: dict[str, Any] | None = None
        self._rank_folder: Path | None = None
        self._rng_to_restore: dict[str, Any] | None = None
        self._signal: int | None = None
        self._old_handlers: dict[int, Any] = {}

    # -- state of this callback ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = {str(name): float(score) for name, score in state_dict["scores"].items()}

    @property
    def best_model_path(self) -> str:
        """Path of the best whole checkpoint (``--ckpt_path best``), or an empty string."""
        best = self.folder / "best.ckpt"
        return str(best) if best.exists() else ""

    # -- hooks -----------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._saved_step = self._seen_step = int(checkpoint["global_step"])
        manifest = checkpoint.get(MANIFEST_KEY)
        if manifest is None:
            rank_zero_warn("This checkpoint holds no generator state: the run resumes, but not bitwise.")
            return
        if manifest["format"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {trainer.ckpt_path} has format {manifest['format']}, this version reads {FORMAT_VERSION}"
            )
        if manifest["world_size"] != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {manifest['world_size']} ranks and is read by {trainer.world_size}: "
                "generators start afresh, the run resumes but not bitwise."
            )
            return
        state = self._load_rank_file(Path(str(trainer.ckpt_path)).resolve().parent, manifest, trainer.global_rank)
        self._rng_to_restore = state["rng"]
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, RankStatefulData) and "data" in state:
            datamodule.load_rank_state_dict(state["data"])
        folder = manifest["rank_files"][trainer.global_rank].get("folder")
        if isinstance(datamodule, RankFilesData) and folder is not None:
            path = Path(str(trainer.ckpt_path)).resolve().parent / folder
            if not path.is_dir():
                raise CheckpointError(f"rank folder {path} is missing: copy it beside its checkpoint or use another")
            datamodule.load_rank_files(path)

    @staticmethod
    def _load_rank_file(folder: Path, manifest: dict[str, Any], rank: int) -> dict[str, Any]:
        entry = manifest["rank_files"][rank]
        path = folder / entry["name"]
        if not path.is_file():
            raise CheckpointError(f"rank file {path} is missing: copy it beside its checkpoint or resume from another")
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"rank file {path} does not match its checkpoint (SHA-256): resume from another")
        return _load_whole(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the loader's iterator exists by now and no batch is fetched yet: the very point at which the save was taken
        if self._rng_to_restore is not None:
            restore_rng_state(self._rng_to_restore)
            self._rng_to_restore = None
        self._install_signal_handlers()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:
            return  # inside an accumulation window: gradients are not state
        self._seen_step = step
        stop = self._stop_requested(trainer)
        last = trainer.max_steps is not None and 0 <= trainer.max_steps <= step
        due = step // self.every_n_steps > self._saved_step // self.every_n_steps or last or stop
        if _validation_follows(trainer):
            self._deferred = due
        elif due:
            # a checkpoint must not outrun the log: a kill between the two would lose this step's row for good
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
            self._leave_if(stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = None
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                raise ValueError(
                    f"RunCheckpoint: monitor '{self.monitor}' was not logged in validation; logged: "
                    f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
                )
            score = float(trainer.callback_metrics[self.monitor])
        if self._deferred or (score is not None and self._is_among_best(score)):
            self._deferred = False
            self._save(trainer, score)
            self._leave_if(self._stop_requested(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step:  # stopped early by another callback
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._manifest is not None:
            checkpoint[MANIFEST_KEY] = self._manifest

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()

    # -- signals ---------------------------------------------------------------------------------------------------
    def _install_signal_handlers(self) -> None:
        def note(number: int, frame: Any) -> None:
            if self._signal is not None:  # a second Ctrl-C means now
                raise KeyboardInterrupt
            self._signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old_handlers[number] = signal.signal(number, note)
            except ValueError:  # not in the main thread: the embedding program owns signals
                return

    def _stop_requested(self, trainer: Trainer) -> bool:
        mine = self._signal is not None
        if trainer.world_size == 1:
            return mine
        return trainer.strategy.reduce_boolean_decision(mine, all=False)

    def _leave_if(self, stop: bool) -> None:
        if stop:
            raise KeyboardInterrupt if self._signal in (None, signal.SIGINT) else SystemExit(128 + signal.SIGTERM)

    # -- saving ----------------------------------------------------------------------------------------------------
    def _is_among_best(self, score: float) -> bool:
        kept = sorted(self.scores.values(), reverse=self.mode == "max")[: self.keep_best]
        if score != score:
            return False
        return len(kept) < self.keep_best or (score < kept[-1] if self.mode == "min" else score > kept[-1])

    def _save(self, trainer: Trainer, score: float | None = None) -> None:
        name = f"step-{trainer.global_step:08d}"
        if score is not None and score == score:
            self.scores[f"{name}.ckpt"] = score
        state: dict[str, Any] = {"rng": capture_rng_state()}
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, RankStatefulData):
            state["data"] = datamodule.rank_state_dict()
        rank_path = self.folder / f"{name}.rank-{trainer.global_rank}.pt"
        entry, problem = None, None
        try:
            _save_whole(state, rank_path)
            entry = {"name": rank_path.name, "sha256": sha256_file(rank_path)}
            if isinstance(datamodule, RankFilesData):
                entry["folder"] = self._save_folder(datamodule, rank_path.with_suffix(""))
        except (CheckpointError, OSError) as error:
            problem = str(error)
        entries = _gather_objects(trainer, (entry, problem))
        for _, other in entries:  # every rank fails together: a lone failure would leave the rest in a collective
            if other is not None:
                raise CheckpointError(other)
        self._manifest = {
            "format": FORMAT_VERSION,
            "world_size": trainer.world_size,
            "rank_files": [entry for entry, _ in entries],
        }
        try:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)
        finally:
            self._manifest = None
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            atomic_symlink(f"{name}.ckpt", self.folder / "last.ckpt")
            self._prune()
        trainer.strategy.barrier("RunCheckpoint")

    def _save_folder(self, datamodule: RankFilesData, path: Path) -> str:
        """Write a rank's folder, its unchanged files linked to those of the save before."""
        with atomic_directory(path) as folder:
            datamodule.save_rank_files(folder, self._rank_folder)
        datamodule.rank_files_saved(path)
        self._rank_folder = path
        return path.name

    def _prune(self) -> None:
        present = sorted(path.name for path in self.folder.glob("step-*.ckpt"))
        ranked = sorted(
            (name for name in self.scores if name in present),
            key=lambda name: self.scores[name] if self.mode == "min" else -self.scores[name],
        )
        best = ranked[: self.keep_best]
        if best:
            atomic_symlink(best[0], self.folder / "best.ckpt")
        keep = set(present[-self.keep_last :]) | set(best)
        for name in present:
            if name not in keep:
                stem = name.removesuffix(".ckpt")
                (self.folder / name).unlink()
                for rank_file in self.folder.glob(f"{stem}.rank-*"):
                    shutil.rmtree(rank_file) if rank_file.is_dir() else rank_file.unlink()
        self.scores = {name: score for name, score in self.scores.items() if name in keep}


def _gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning runs validation right after the current batch (its own private rule, so that we agree)."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def newest_whole_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``last.ckpt`` names, or the newest whole one if the link was lost.

    Args:
        folder: a run's ``checkpoints`` folder.

    Returns:
        A resolved path, or ``None`` if the folder holds no checkpoint.
    """
    folder = Path(folder)
    link = folder / "last.ckpt"
    if link.exists():
        return link.resolve()
    found = sorted(path for path in folder.glob("step-*.ckpt") if zipfile.is_zipfile(path))
    return found[-1].resolve() if found else None
