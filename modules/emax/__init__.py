"""EMAX: ensemble value functions for multi-agent exploration (Schaefer et al. 2025), over IDQN, VDN and QMIX."""

from modules.emax.divergence import DivergenceError
from modules.emax.maven import MAVEN, Latent
from modules.emax.module import ValueMARL
from modules.emax.settings import AgentNetwork, Clip, Ensemble, Explorer, Mixing, Reward, Target

__all__ = [
    "AgentNetwork",
    "Clip",
    "MAVEN",
    "DivergenceError",
    "Ensemble",
    "Explorer",
    "Latent",
    "Mixing",
    "Reward",
    "Target",
    "ValueMARL",
]
