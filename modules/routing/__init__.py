"""Routing solvers: decoding, baselines and what modules that train or evaluate them share."""

from modules.routing.trained import TrainedSolver

__all__ = ["TrainedSolver"]
