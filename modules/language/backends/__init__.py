"""Language models that can be asked: our own, a server's, a recording's. Attributes are loaded on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.language.backends.base import Backend, BackendError, PromptTooLongError, Reply, Request, Turn
    from modules.language.backends.http import HTTPBackend
    from modules.language.backends.local import LocalBackend, NetworkBackend
    from modules.language.backends.metering import BudgetExceededError, MeteredBackend, Usage
    from modules.language.backends.recording import RecordingBackend, ReplayBackend
    from modules.language.backends.scripted import ScriptedBackend

__all__ = [
    "Backend",
    "BackendError",
    "BudgetExceededError",
    "HTTPBackend",
    "LocalBackend",
    "MeteredBackend",
    "NetworkBackend",
    "PromptTooLongError",
    "RecordingBackend",
    "ReplayBackend",
    "Reply",
    "Request",
    "ScriptedBackend",
    "Turn",
    "Usage",
]

_HOMES = {
    **dict.fromkeys(("Backend", "BackendError", "PromptTooLongError", "Reply", "Request", "Turn"), "base"),
    "HTTPBackend": "http",
    **dict.fromkeys(("LocalBackend", "NetworkBackend"), "local"),
    **dict.fromkeys(("BudgetExceededError", "MeteredBackend", "Usage"), "metering"),
    **dict.fromkeys(("RecordingBackend", "ReplayBackend"), "recording"),
    "ScriptedBackend": "scripted",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that who asks a server or a recording pays for no torch and no transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'modules.language.backends' has no attribute {name!r}")
    return getattr(importlib.import_module(f"modules.language.backends.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
