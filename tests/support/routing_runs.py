"""Routing runs that kill themselves."""

from __future__ import annotations

from killed import Killed

from modules.asp import ASP
from modules.baselines import POMO, AttentionModel


class KilledASP(Killed, ASP):
    """ASP that ends by SIGKILL."""


class _KilledGradient(Killed):
    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        super(Killed, self).on_train_batch_end(outputs, batch, batch_idx)  # the baseline's epochs


class KilledPOMO(_KilledGradient, POMO):
    """POMO that ends by SIGKILL."""


class KilledAM(_KilledGradient, AttentionModel):
    """AttentionModel that ends by SIGKILL."""
