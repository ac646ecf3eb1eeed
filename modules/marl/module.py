"""What no method changes of a multi-agent LightningModule: networks by the environment, figures, checkpoint."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from torch import Tensor

from modules.assurance.subject import Subject
from modules.contracts import ActsMultiAgent, MultiAgentSpec, PlaysTeams
from modules.marl.dropout import PartnerDropout, with_missing
from modules.marl.policy import MultiAgentPolicy
from modules.seeds import global_seed, stream

_INIT_STREAM = 41  # keeps initial weights apart from other uses of the run's seed


class MultiAgentModule(LightningModule):
    """Builds its networks when the environment is known, makes a batch's updates by itself, and reports evaluations.

    A subclass implements :meth:`build`, ``begin`` and ``act`` (:class:`~modules.contracts.ActsMultiAgent`), and a
    ``training_step`` by manual optimisation, in which Lightning counts the last update of a batch. Evaluation logs
    ``<stage>/return`` (undiscounted, of the team), ``<stage>/return_iqm`` (interquartile mean over episodes) and
    ``<stage>/length``; beside every metric stands ``frames``, environment steps over all ranks.

    Args:
        dropout: how often agents are missing in training (:class:`~modules.marl.dropout.PartnerDropout`).
        partners: checkpoint files of other runs with the same task and settings (other seeds, say), with whose agents
            assurance lets this module's play.
    """

    work_unit = "frames"
    partner: ClassVar[str] = "datamodules.MARLDataModule"
    """The datamodule that an error names where there is none."""

    def __init__(self, dropout: PartnerDropout | None = None, partners: Sequence[str] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.dropout = dropout or PartnerDropout()
        self.partners = tuple(partners or ())
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

    # -- missing agents -----------------------------------------------------------------------------------------------
    @property
    def carried(self) -> tuple[str, ...]:
        """What data keep of the carry (:class:`~modules.contracts.StoresCarry`)."""
        return ("absent",) if self.dropout.active else ()

    def _begin_dropout(self, rows: int, generator: torch.Generator, frames: int | None) -> dict[str, Tensor]:
        """The carry of ``rows`` fresh episodes: in training, who is missing in each."""
        if frames is None or not self.dropout.active:
            return {}
        assert self.spec is not None
        return {"absent": self.dropout.draw(rows, self.spec, generator)}

    def _drop_out(
        self, action: Tensor, legal: Tensor | None, carry: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """``action`` ``[rows, agents]`` with what missing agents do in place of theirs."""
        if "absent" not in carry:
            return action
        assert self.spec is not None
        idle, actions = self.spec.idle_action, self.spec.num_actions
        return with_missing(action, carry["absent"], legal, idle, actions, generator)

    # -- assurance ----------------------------------------------------------------------------------------------------
    def assurance_subject(self) -> Subject:
        """What suites may ask of this team.

        Raises:
            AssuranceError: data that cannot play episodes on demand, or a partner's checkpoint that does not fit.
        """
        from modules.marl.assurance import team_subject

        return team_subject(self)

    def answers(self, observation: Tensor, state: Tensor) -> Tensor:
        """What the networks say of the first step of episodes, deterministic.

        Args:
            observation: ``[rows, agents, features]``.
            state: ``[rows, state_features]``.
        """
        raise NotImplementedError(f"{type(self).__name__}: answers(observation, state) is the subclass's to write")

    def team_policies(self) -> Mapping[str, ActsMultiAgent]:
        """Other policies that the module holds, by name, each of which acts for whole teams: an ensemble's members."""
        return {}

    def more_capabilities(self, data: PlaysTeams) -> Mapping[str, Any]:
        """What suites may ask of this kind of module beside what they may ask of every team."""
        return {}

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
        if self.spec is None:
            self.build(MultiAgentSpec(**saved), stream(global_seed(), _INIT_STREAM))
            return
        self.check_same_task(checkpoint)

    def check_same_task(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises: ValueError: a checkpoint of a task in which agents see or do something else."""
        saved, here = checkpoint.get("multi_agent_spec"), self.spec
        if saved is None or here is None:
            return
        spec = MultiAgentSpec(**saved)
        for name in ("num_agents", "num_actions", "observation_size", "state_size"):
            if getattr(spec, name) != getattr(here, name):
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is of task {spec.task} with {name} {getattr(spec, name)}, "
                    f"{here.task} has {getattr(here, name)}: name a checkpoint of the same task"
                )

    def warm_start(self, checkpoint: dict[str, Any]) -> None:
        """Take over the networks, target networks and running moments of rewards; the optimiser, schedules over frames
        and replay start anew (:class:`~modules.contracts.WarmStarts`).

        Raises:
            ValueError: a checkpoint of another task; RuntimeError: of other networks.
        """
        self.check_same_task(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.spec is not None:
            checkpoint["multi_agent_spec"] = dataclasses.asdict(self.spec)
