"""RCI: language models that criticise and improve their own output (Kim, Baldi, McAleer 2023)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.rci.module import RCIAgent
    from modules.rci.reasoning import RCIReasoning

__all__ = ["RCIAgent", "RCIReasoning"]

_HOMES = {"RCIAgent": "modules.rci.module", "RCIReasoning": "modules.rci.reasoning"}


def __getattr__(name: str) -> Any:
    # Lazy: the pure loop can be had without Lightning and the language core.
    if name not in _HOMES:
        raise AttributeError(f"module 'modules.rci' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
