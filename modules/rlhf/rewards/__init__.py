"""Component rewards and held-out evaluations. Importing this loads no optional package."""

from modules.rlhf.rewards.base import Evaluation, Responses, Reward
from modules.rlhf.rewards.composite import RewardError, check_bounds, score_all
from modules.rlhf.rewards.evaluation import DialogueEvaluation
from modules.rlhf.rewards.gold_proxy import ContentShare, GoldScore, MarkerSaturation
from modules.rlhf.rewards.meteor import Meteor
from modules.rlhf.rewards.models import CallableReward, HFClassifier, IntentReward, PreferenceReward
from modules.rlhf.rewards.overlap import Bleu, DistinctNgrams, Repetition, ResponseLength, Rouge, SacreBleu

__all__ = [
    "Bleu",
    "CallableReward",
    "ContentShare",
    "DialogueEvaluation",
    "DistinctNgrams",
    "Evaluation",
    "GoldScore",
    "HFClassifier",
    "IntentReward",
    "MarkerSaturation",
    "Meteor",
    "PreferenceReward",
    "Repetition",
    "ResponseLength",
    "Responses",
    "Reward",
    "RewardError",
    "Rouge",
    "SacreBleu",
    "check_bounds",
    "score_all",
]
