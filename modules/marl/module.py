"""What no method changes of a multi-agent LightningModule: networks by the environment, figures, checkpoint."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from torch import Tensor

from modules.contracts import MultiAgentSpec
from modules.marl.policy import MultiAgentPolicy
from modules.seeds import global_seed, stream

_INIT_STREAM = 41  # keeps initial weights apart from other uses of the run's seed


class MultiAgentModule(LightningModule):
    """Builds its networks when the environment is known, makes a batch's updates by itself, and reports evaluations.

    A subclass implements :meth:`build`, ``begin`` and ``act`` (:class:`~modules.contracts.ActsMultiAgent`), and a
    ``training_step`` by manual optimisation, in which Lightning counts the last update of a batch. Evaluation logs
    ``<stage>/return`` (undiscounted, of the team), ``<stage>/return_iqm`` (interquartile mean over episodes) and
    ``<stage>/length``; beside every metric stands ``frames``, environment steps over all ranks.
    """

    work_unit = "frames"
    partner: ClassVar[str] = "datamodules.MARLDataModule"
    """The datamodule that an error names where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec: MultiAgentSpec | None = None
        self.policy = MultiAgentPolicy(cast(Any, self))

    @abstractmethod
    def build(self, spec: MultiAgentSpec, generator: torch.Generator) -> None:
        """Set ``self.spec`` and make networks for its environment, with weights drawn from ``generator``."""

    def setup(self, stage: str) -> None:
        if self.spec is not None:
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        spec = getattr(datamodule, "spec", None)
        if not isinstance(spec, MultiAgentSpec):
            raise ValueError(
                f"{type(self).__name__}: needs a datamodule with multi-agent environments ({self.partner}), got "
                f"{type(datamodule).__name__}"
            )
        self.build(spec, stream(global_seed(), _INIT_STREAM))

    def digest(self) -> Mapping[str, str]:
        total = sum((parameter.detach().double().sum() for parameter in self.parameters()), torch.zeros(()))
        return {"weights": f"{float(total):.17g}", "spec": str(self.spec)}

    # -- ranks and counts ---------------------------------------------------------------------------------------------
    @property
    def _world(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def _all_sum(self, value: Tensor) -> Tensor:
        """``value`` summed over ranks."""
        if self._world == 1:
            return value
        return cast(Tensor, self.trainer.strategy.reduce(value.clone(), reduce_op="sum"))

    @property
    def _frames(self) -> int:
        return int(getattr(getattr(self.trainer, "datamodule", None), "frames", 0))

    def _logs_now(self) -> bool:
        """Whether the step that Lightning counted last is one that it logs."""
        if self._trainer is None:
            return False
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return self.trainer.global_step % every == 0

    def work_per_batch(self, batch: TensorDict) -> int:
        """Environment frames of this rank since the batch before."""
        return int(getattr(getattr(self.trainer, "datamodule", None), "frames_of_batch", 0))

    # -- evaluation ---------------------------------------------------------------------------------------------------
    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._log_evaluation(batch, "val")

    def test_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._log_evaluation(batch, "test")

    def _log_evaluation(self, batch: TensorDict, stage: str) -> None:
        returns: Tensor = batch["episode_return"]
        ordered, cut = returns.sort().values, len(returns) // 4
        self.log_dict(
            {
                f"{stage}/return": returns.mean(),
                f"{stage}/return_iqm": ordered[cut : len(ordered) - cut].mean(),
                f"{stage}/length": batch["episode_length"].float().mean(),
                "frames": float(self._frames),
            },
            sync_dist=True,
            batch_size=len(returns),
        )

    def summary_rows(self) -> Mapping[str, str]:
        metrics = self.trainer.callback_metrics
        rows = {name: f"{float(metrics[name]):.4g}" for name in ("val/return", "test/return") if name in metrics}
        return {**rows, "frames": f"{self._frames:,}"}

    # -- checkpoint ---------------------------------------------------------------------------------------------------
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("multi_agent_spec")
        if saved is None:
            return
        spec = MultiAgentSpec(**saved)
        if self.spec is None:
            self.build(spec, stream(global_seed(), _INIT_STREAM))
            return
        for name in ("num_agents", "num_actions", "observation_size", "state_size"):
            if getattr(spec, name) != getattr(self.spec, name):
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is of task {spec.task} with {name} {getattr(spec, name)}, "
                    f"{self.spec.task} has {getattr(self.spec, name)}: name a checkpoint of the same task"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.spec is not None:
            checkpoint["multi_agent_spec"] = dataclasses.asdict(self.spec)
