"""Constrained RLHF on composite reward models (Moskovitz et al. 2024), and what it starts from."""

from modules.rlhf.intent import IntentClassifier
from modules.rlhf.module import ConstrainedRLHF
from modules.rlhf.reward_model import PreferenceRewardModel, RewardModel, load_reward_model
from modules.rlhf.sft import SFT

__all__ = ["SFT", "ConstrainedRLHF", "IntentClassifier", "PreferenceRewardModel", "RewardModel", "load_reward_model"]
