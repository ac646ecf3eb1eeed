"""Compared methods that are methods of their own, on the same contracts."""

from modules.baselines.mappo import MAPPO

__all__ = ["MAPPO"]
