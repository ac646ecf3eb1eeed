"""ASP: adaptive staircase PSRO for neural routing solvers."""

from modules.asp.generator import GeneratorSettings
from modules.asp.module import ASP
from modules.asp.settings import EvaluationSettings, SolverTraining, StaircaseSettings

__all__ = ["ASP", "EvaluationSettings", "GeneratorSettings", "SolverTraining", "StaircaseSettings"]
