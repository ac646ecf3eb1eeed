"""What a run was: its resolved config, code revision, package versions, command and machine, kept in its folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from modules.files import atomic_write

RECORDED_PACKAGES = (
    "torch", "lightning", "torchrl", "tensordict", "transformers", "tokenizers", "bitsandbytes", "omegaconf",
    "jsonargparse", "tensorboard", "numpy", "sympy", "peft",
)  # fmt: skip


def environment_record(root: Path) -> dict[str, Any]:
    """Versions, revision and machine as plain JSON values. ``root`` is the folder whose git revision is recorded."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    status = git("status", "--porcelain")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": versions,
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` (fully resolved, re-runnable) and ``environment.json`` into the run folder.

    A resumed run adds ``config-2.yaml``, ``environment-2.json`` and so on: what earlier parts ran with stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(getattr(trainer.loggers[0], "log_dir", None) or ".") if trainer.loggers else None
        if folder is None:
            return
        number = 1
        while (folder / _numbered("config", number, "yaml")).exists():
            number += 1
        text = self.parser.dump(self.config, skip_none=False)
        with atomic_write(folder / _numbered("config", number, "yaml"), "w") as stream:
            stream.write(text)
        with atomic_write(folder / _numbered("environment", number, "json"), "w") as stream:
            json.dump(environment_record(Path(__file__).resolve().parent.parent), stream, indent=1)


def _numbered(stem: str, number: int, suffix: str) -> str:
    return f"{stem}.{suffix}" if number == 1 else f"{stem}-{number}.{suffix}"
