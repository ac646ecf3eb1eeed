"""Random-number state: capture, restore, per-rank seeds, and evaluation that leaves training's streams untouched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def capture_rng_state() -> dict[str, Any]:
    """State of the python, numpy, torch and (where present) CUDA generators of this process.

    Returns:
        A dictionary that ``torch.load(weights_only=True)`` accepts: numpy's key array is stored as a tensor.
    """
    name, key, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "bit_generator": str(name),
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached_gaussian),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`capture_rng_state` took."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    numpy_state = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (
            numpy_state["bit_generator"],
            numpy_state["key"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_rank_streams(seed: int, rank: int) -> None:
    """Seed this process's sampling streams from ``SeedSequence([seed, rank])``.

    ``seed_everything`` gives every rank the same seed; ranks would then draw the same dropout masks, actions and
    samples. Call it after the (identical) initial weights exist.
    """
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))


class RankSeeds(Callback):
    """Give each rank its own streams at the start of a fit, and validation a stream of its own.

    During validation the generators are seeded from the run's seed alone, so sampled evaluation does not depend on
    training's progress; afterwards training's state is put back, so a run with more evaluation trains identically.

    Args:
        seed: the run's global seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._training_state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_rank_streams(self.seed, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training_state = capture_rng_state()
        seed_rank_streams(self.seed + 1, trainer.global_rank)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training_state is not None:
            restore_rng_state(self._training_state)
            self._training_state = None
