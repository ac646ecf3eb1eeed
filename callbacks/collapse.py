"""A warning when a figure falls far below what the run began with."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class CollapseWarning(Callback):
    """Warns once when ``metric`` falls below ``share`` of its first validation's value, as distinct trigrams do when a
    language model collapses onto a few rewarded phrases.

    Args:
        metric: logged in validation; higher is healthier.
        share: in (0, 1).
    """

    def __init__(self, metric: str = "val/vocab_3", share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise ValueError(f"CollapseWarning: share must be in (0, 1), got {share}")
        self.metric, self.share = metric, share
        self.first: float | None = None
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.warned = state_dict["first"], bool(state_dict["warned"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        value = float(value)
        if self.first is None:
            self.first = value
        if not self.warned and value < self.share * self.first:
            self.warned = True
            rank_zero_warn(
                f"step {trainer.global_step}: {self.metric} fell from {self.first:.4g} to {value:.4g}, below "
                f"{self.share:g} of where it began: the policy may be overoptimising its rewards; look at the samples"
            )
