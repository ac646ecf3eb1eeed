"""Population games through the command line: what a run left behind, and a run that kills itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from killed import Killed
from torch import Tensor

from datamodules.games import KuhnPoker
from modules.psd_psro import PSDPSRO


class KilledPSRO(Killed, PSDPSRO):
    """PSDPSRO that ends by SIGKILL."""


class BrokenKuhn(KuhnPoker):
    """Kuhn poker whose payoff is NaN where the first player holds the highest card."""

    def returns(self, state: Tensor) -> Tensor:
        return torch.where((state[:, 0] == 2).unsqueeze(1), torch.nan, super().returns(state))


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def population(folder: Path) -> dict[str, Any]:
    """The population part of a run's last checkpoint."""
    return checkpoint(folder)["population"]


def rows(folder: Path, first: int = 0) -> list[dict[str, Any]]:
    """What the run logged from step ``first`` on, without speeds."""
    found = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in found if row["step"] >= first]


def iterations(folder: Path, key: str = "meta/nashconv") -> list[float]:
    """A metric after each iteration."""
    return [value for _, _, value in population(folder)["history"][key]]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Nested dictionaries, lists and tensors equal, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}/{index}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
        assert torch.equal(one.isnan(), other.isnan()), where
    else:
        assert one == other or (one != one and other != other), where


def assert_same_games(one: dict[str, Any], other: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Members, payoff table, meta-strategies and history equal, bit for bit."""
    for key in ("members", "payoff_table", "meta_strategies", "iteration", "cursor", "frames", "episodes", "history"):
        if key not in skip:
            assert_same(one[key], other[key], key)
