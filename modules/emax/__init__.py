"""EMAX: ensemble value functions for multi-agent exploration (Schaefer et al. 2025), over IDQN, VDN and QMIX."""

from modules.emax.module import DivergenceError, ValueMARL
from modules.emax.settings import AgentNetwork, Clip, Ensemble, Explorer, Mixing, Reward, Target

__all__ = [
    "AgentNetwork",
    "Clip",
    "DivergenceError",
    "Ensemble",
    "Explorer",
    "Mixing",
    "Reward",
    "Target",
    "ValueMARL",
]
