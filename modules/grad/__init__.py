"""GRAD: game-theoretic robust reinforcement learning under temporally-coupled perturbations (Liang et al. 2024)."""

from modules.grad.module import GRAD
from modules.grad.settings import PSROSettings

__all__ = ["GRAD", "PSROSettings"]
