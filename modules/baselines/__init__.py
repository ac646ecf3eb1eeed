"""Compared methods that are methods of their own, on the same contracts."""

from modules.baselines.attention_model import AttentionModel
from modules.baselines.mappo import MAPPO
from modules.baselines.pomo import POMO

__all__ = ["MAPPO", "POMO", "AttentionModel"]
