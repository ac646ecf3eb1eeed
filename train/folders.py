"""Where things lie: the packages, the shipped configs, the folder of a run and the checkpoint that it goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # holds modules/ and train/, in a checkout and in site-packages
CONFIGS = ROOT / "configs"
PACKAGES = ("modules", "datamodules", "callbacks")
RUN_FOLDER_VARIABLE = "PLUMBLINE_RUN_FOLDER"  # tells ranks that Lightning spawns which folder rank 0 claimed


def claim_folder(parent: Path, prefix: str) -> Path:
    """Make ``<parent>/<prefix>-<n>`` with the next free number; ``mkdir`` decides between concurrent starts."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(m.group(1)) for p in parent.iterdir() if (m := re.fullmatch(rf"{prefix}-(\d+)", p.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / f"{prefix}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


def resolve_checkpoint(parent: Path, wanted: str, flag: str = "--ckpt_path") -> Path:
    """The checkpoint file that ``flag`` means: ``last``, ``best``, a file, or a run's folder.

    Args:
        parent: the experiment's folder, whose ``run-<n>`` are searched for ``last`` and ``best``.

    Raises:
        CheckpointError: no such file, or no whole checkpoint there.
    """
    from callbacks.checkpoint import CheckpointError, newest_whole_checkpoint

    if wanted not in ("last", "best"):
        path = Path(wanted)
        if path.is_dir():
            path = newest_whole_checkpoint(path if path.name == "checkpoints" else path / "checkpoints") or path
        if not path.is_file():
            raise CheckpointError(f"{flag} {wanted}: no such checkpoint file")
        return path.resolve()
    folders = sorted(parent.glob("run-*/checkpoints"), key=lambda f: int(f.parent.name.split("-")[1]))
    for folder in reversed(folders):
        found = folder / "best.ckpt" if wanted == "best" else newest_whole_checkpoint(folder)
        if found is not None and found.exists():
            return found.resolve()
    raise CheckpointError(
        f"{flag} {wanted}: no whole checkpoint under {parent}/run-*/checkpoints; start without {flag}"
    )


def choose_run_folder(parent: Path, verb: str, resume_from: Path | None, unnumbered: bool) -> Path:
    """The folder that this process writes its run into; rank 0 claims it and tells the ranks that it spawns.

    Args:
        parent: the experiment's folder.
        resume_from: the checkpoint that ``--ckpt_path`` led to.
        unnumbered: the verb's one folder, used again each time, instead of the next number.
    """
    from lightning.pytorch.utilities import rank_zero_only

    source = resume_from.parent.parent if verb == "fit" and resume_from else None
    if source is not None and source.parent == parent.resolve():
        return parent / source.name  # the run goes on in its own folder
    if RUN_FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    if unnumbered:
        return parent / verb
    if rank_zero_only.rank in (0, None):
        folder = claim_folder(parent, "run" if verb == "fit" else verb)
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        return folder
    return parent / f"rank-{rank_zero_only.rank}"  # never written: loggers live on rank 0


def checkpoint_step(path: Path) -> int:
    """Optimiser steps done at a checkpoint, from its name or else its content."""
    match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    if match:
        return int(match.group(1))
    from callbacks.checkpoint import AtomicCheckpointIO

    return int(AtomicCheckpointIO().load_checkpoint(path)["global_step"])
