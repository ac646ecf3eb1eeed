"""Supervised finetuning on replies, which gives RLHF its start model (Moskovitz et al. 2024; RL4LMs)."""

from __future__ import annotations

from modules.language.finetuning import FinetuningModule


class SFT(FinetuningModule):
    __doc__ = FinetuningModule.__doc__

    task = "sft"
