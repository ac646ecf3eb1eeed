"""Scripted experts by task."""

from datamodules.envs.browser.experts.base import EXPERTS, Expert, NoMoveError

__all__ = ["EXPERTS", "Expert", "NoMoveError"]
