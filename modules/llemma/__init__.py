"""Llemma: an open language model for mathematics (Azerbayev et al. 2024)."""

from modules.language.specs import LoraSpec, ModelSpec
from modules.llemma.evaluation import EvaluationSettings
from modules.llemma.module import Llemma

__all__ = ["EvaluationSettings", "Llemma", "LoraSpec", "ModelSpec"]
