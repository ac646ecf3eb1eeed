"""Compared methods that are methods of their own, on the same contracts."""

from modules.baselines.atla import ATLA, ActionRobust
from modules.baselines.attention_model import AttentionModel
from modules.baselines.mappo import MAPPO
from modules.baselines.pomo import POMO
from modules.baselines.ppo import PPO, SAPPO
from modules.baselines.wocar import WocaR

__all__ = ["ATLA", "MAPPO", "POMO", "PPO", "SAPPO", "ActionRobust", "AttentionModel", "WocaR"]
