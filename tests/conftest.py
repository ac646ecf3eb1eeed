"""Shared fixtures: one torch thread, the data folder, and the command line in process or as a subprocess."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_seed_of_an_earlier_test() -> None:
    """A run in process leaves its seed in the environment, where random streams are made from it."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def data_dir() -> Path:
    """Folder with ``math/`` and the other data sets, from ``PLUMBLINE_DATA`` (README, "Data")."""
    value = os.environ.get("PLUMBLINE_DATA")
    if not value:
        pytest.skip("PLUMBLINE_DATA is not set: this test reads real data (README, 'Data')")
    return Path(value)


@pytest.fixture
def support_configs() -> Path:
    return SUPPORT / "configs"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``python -m train`` in process, in a fresh working folder."""
    import train

    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> int:
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):  # handlers keep an earlier test's stderr
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:  # not pytest's own capture, a subclass
                    handler.stream = sys.stderr
        return train.main([str(a) for a in argv])

    return run


@pytest.fixture
def cli_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run ``python -m train`` as a user types it, as a subprocess in a fresh working folder."""

    def run(*argv: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
        paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "train", *map(str, argv)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)

    return run
