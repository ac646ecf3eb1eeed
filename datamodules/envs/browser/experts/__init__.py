"""Scripted experts by task."""

import importlib

from datamodules.envs.browser.experts.base import EXPERTS, Expert, NoMoveError

for _name in ("clicking", "typing_tasks"):  # each registers its experts
    importlib.import_module(f"{__name__}.{_name}")

__all__ = ["EXPERTS", "Expert", "NoMoveError"]
