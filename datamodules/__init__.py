"""What the modules learn from. The DataModules are attributes (``datamodules.CorpusDataModule``), loaded on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.browser_data import BrowserDataModule
    from datamodules.control_data import ControlDataModule
    from datamodules.corpus_data import CorpusDataModule
    from datamodules.dialogue_data import DialogueDataModule
    from datamodules.game_data import GameDataModule
    from datamodules.gold_proxy_data import GoldProxyDataModule
    from datamodules.marl_data import MARLDataModule, MARLRolloutDataModule
    from datamodules.math_data import MathTaskDataModule
    from datamodules.preference_data import PreferenceDataModule
    from datamodules.reasoning_data import ReasoningDataModule
    from datamodules.routing_data import RoutingDataModule
    from datamodules.routing_lib_data import RoutingLibDataModule
    from datamodules.sft_data import SFTDataModule

__all__ = [
    "BrowserDataModule",
    "ControlDataModule",
    "CorpusDataModule",
    "DialogueDataModule",
    "GameDataModule",
    "GoldProxyDataModule",
    "MARLDataModule",
    "MARLRolloutDataModule",
    "MathTaskDataModule",
    "PreferenceDataModule",
    "ReasoningDataModule",
    "RoutingDataModule",
    "RoutingLibDataModule",
    "SFTDataModule",
]

_HOMES = {
    "BrowserDataModule": "datamodules.browser_data",
    "ControlDataModule": "datamodules.control_data",
    "CorpusDataModule": "datamodules.corpus_data",
    "DialogueDataModule": "datamodules.dialogue_data",
    "GameDataModule": "datamodules.game_data",
    "GoldProxyDataModule": "datamodules.gold_proxy_data",
    "MARLDataModule": "datamodules.marl_data",
    "MARLRolloutDataModule": "datamodules.marl_data",
    "MathTaskDataModule": "datamodules.math_data",
    "PreferenceDataModule": "datamodules.preference_data",
    "ReasoningDataModule": "datamodules.reasoning_data",
    "RoutingDataModule": "datamodules.routing_data",
    "RoutingLibDataModule": "datamodules.routing_lib_data",
    "SFTDataModule": "datamodules.sft_data",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import datamodules` (every start of the CLI) pays for no text, game or routing stack.
    if name not in _HOMES:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
