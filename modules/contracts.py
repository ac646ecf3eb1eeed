"""The protocols that modules, datamodules and callbacks meet in. Everything else is duck-typed Lightning.

A class takes part by having the member; nothing needs to inherit from these. Callbacks test with ``isinstance``
(the protocols are runtime-checkable) and leave alone what does not offer the capability.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase


@runtime_checkable
class ActingModule(Protocol):
    """A module whose ``policy`` acts in environments; rollout datamodules bind to it at ``setup()``."""

    policy: TensorDictModuleBase


@runtime_checkable
class PreparesRollout(Protocol):
    """An on-policy module that finishes a collected rollout (values, advantages, returns) before minibatching."""

    def prepare_rollout(self, rollout: TensorDict) -> TensorDict:
        """Add keys to ``rollout`` ``[envs, time, ...]`` and return it."""
        ...


@runtime_checkable
class CountsWork(Protocol):
    """A module that says how much work a training batch holds; read by the throughput callback.

    ``work_unit`` is ``"tokens"`` or ``"frames"``; ``work_per_batch`` counts this rank's share of one micro-batch.
    """

    work_unit: str

    def work_per_batch(self, batch: Any) -> int: ...


@runtime_checkable
class KnowsFlops(Protocol):
    """A module for which model-FLOPs utilisation has a meaning."""

    def flops_per_work_unit(self) -> float:
        """Forward + backward floating-point operations per token or frame, recomputation not counted."""
        ...


@runtime_checkable
class Summarises(Protocol):
    """A module that adds rows to the summary table printed at the end of a run."""

    def summary_rows(self) -> Mapping[str, str]: ...


@runtime_checkable
class Exports(Protocol):
    """A module that can be written in its ecosystem's own format (for language models: a Hugging Face directory)."""

    def export_pretrained(self, folder: str | Path) -> None:
        """Write ``folder`` as a whole, replacing an older one atomically; called on all ranks, rank 0 writes."""
        ...


@runtime_checkable
class StatefulData(Protocol):
    """A datamodule whose exact position is saved: what is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class RankStatefulData(Protocol):
    """A datamodule with state that differs by rank (environments, replay): saved in the ``rank-<k>`` files.

    The dictionary must be loadable by ``torch.load(weights_only=True)``.
    """

    def rank_state_dict(self) -> dict[str, Any]: ...

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@runtime_checkable
class HasDigest(Protocol):
    """A datamodule or module whose identity must agree on all ranks before training starts.

    Keys name the field (``"weights"``, ``"tokenizer"``), values are short strings; the first field that differs
    between ranks is named in the error.
    """

    def digest(self) -> Mapping[str, str]: ...


@runtime_checkable
class DescribesBatch(Protocol):
    """A datamodule that states its batch's keys, shapes and dtypes, for checks and for the docs."""

    def describe(self) -> Mapping[str, str]: ...
