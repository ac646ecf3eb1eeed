"""Constrained RLHF through the command line: a module that kills itself inside an iteration, data and rewards that
misbehave.
"""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules import GoldProxyDataModule
from modules.rlhf import ConstrainedRLHF
from modules.rlhf.rewards import Responses, Reward


class KilledRLHF(ConstrainedRLHF):
    """ConstrainedRLHF that ends by SIGKILL.

    Args:
        kill_at: iteration, from 1, in which it kills itself; 0: never.
        kill_phase: ``generation`` (responses made, nothing learnt), ``update`` (in the second minibatch), ``search``
            (in the validation after the iteration, thresholds moved).
        keep_rollout: write the first iteration's rollout to ``<keep_rollout>-<rank>.pt``.
    """

    def __init__(
        self, kill_at: int = 0, kill_phase: str = "generation", keep_rollout: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.kill_at, self.kill_phase, self.keep_rollout, self._seen = kill_at, kill_phase, keep_rollout, 0

    def _kill(self, phase: str) -> None:
        if self.kill_phase == phase and self._iteration + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def collect(self, batch: TensorDict) -> TensorDict:
        self._seen = 0
        rollout = super().collect(batch)
        self._kill("generation")
        return rollout

    def prepare_rollout(self, rollout: TensorDict) -> TensorDict:
        rollout = super().prepare_rollout(rollout)
        if self.keep_rollout is not None and self._iteration == 0:
            torch.save(rollout.to_dict(), f"{self.keep_rollout}-{self.global_rank}.pt")
        return rollout

    def losses(self, rows: TensorDict, advantage: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        self._seen += 1
        if self._seen > 1:
            self._kill("update")
        return super().losses(rows, advantage, tokens)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self._kill("search")


class EmptyPrompts(GoldProxyDataModule):
    """Training batches in which the prompt of the fourth row has no tokens."""

    def on_before_batch_transfer(self, batch: TensorDict, dataloader_idx: int) -> TensorDict:
        batch = batch.clone()
        batch["prompt_length"][3] = 0
        return batch


class NaNReward(Reward):
    """NaN for the response at one place of the batch."""

    def score(self, batch: Responses) -> Tensor:
        scores = torch.zeros(len(batch))
        scores[2] = math.nan
        return scores


class ShortReward(Reward):
    """One score too few."""

    def score(self, batch: Responses) -> Tensor:
        return torch.zeros(len(batch) - 1)


def word_count(
    prompts: list[str], responses: list[str], references: list[str], labels: list[dict[str, int]]
) -> list[float]:
    """Words of each response over 10: a reward by import path."""
    return [len(response.split()) / 10 for response in responses]
