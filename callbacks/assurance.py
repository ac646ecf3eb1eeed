"""RICE assurance within a run: the suite on a trainer's module, its figures in the loggers, gates during training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from modules.assurance.card import model_card
from modules.assurance.curves import scalars, write_pictures
from modules.assurance.report import build
from modules.assurance.signature import Signature
from modules.assurance.subject import AssuranceError, Subject
from modules.assurance.suites import Ranks, SuiteResult, SuiteSettings, run_suite
from modules.assurance.verdict import Limit, Verdict
from modules.contracts import Assurable


class GateFailure(RuntimeError):
    """A gate failed during training and the config says that this ends the run."""


def check_assurable(module: LightningModule) -> Assurable:
    """The module as one that offers a subject.

    Raises:
        AssuranceError: it offers none.
    """
    if not isinstance(module, Assurable):
        raise AssuranceError(
            f"{type(module).__name__} offers no assurance_subject(): give it one as modules/assurance/subject.py says"
        )
    return module


def subject_of(module: LightningModule) -> Subject:
    """The module's subject.

    Raises:
        AssuranceError: a module that offers none.
    """
    return check_assurable(module).assurance_subject()


def ranks_of(trainer: Trainer) -> Ranks:
    """This process's place among the trainer's."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return Ranks()

    def gather(mine: Any) -> list[Any]:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        return parts

    return Ranks(trainer.global_rank, trainer.world_size, gather)


def log_report(
    trainer: Trainer, report: Mapping[str, Any], card: str, step: int, extra: Mapping[str, float] | None = None
) -> None:
    """Figures to all loggers; layout, card and picture to TensorBoard. For rank 0."""
    for logger in trainer.loggers:
        logger.log_metrics({**scalars(report), **(extra or {})}, step=step)
        if isinstance(logger, TensorBoardLogger):
            write_pictures(logger.experiment, report, card, step)


class AssuranceCallback(Callback):
    """Runs a suite at the end of every n-th validation; weights, modes and random states are as if it had not.

    Figures go to the loggers alone and not to ``trainer.callback_metrics``: choosing a checkpoint by them would spend
    them. ``rice/seconds`` and ``rice/share`` (of the time since training began) say what it costs.

    Args:
        suite: ``quick``, ``rice``, ``deep`` or ``custom``.
        probes: names of probes, for ``custom``.
        limits: gates and watches.
        every_n_validations: how often; the first one counts.
        n0, n_max: units of the first and last look; default: the suite's own.
        gates_stop: a failed gate ends training: ``no``, ``stop`` (as if the last step were reached), ``raise``.

    Raises:
        AssuranceError: at set-up, a module without subject; at the first suite, limits that do not fit it.
        GateFailure: a failed gate with ``gates_stop: raise``.
    """

    def __init__(
        self,
        suite: str = "quick",
        probes: list[str] | None = None,
        limits: list[Limit] | None = None,
        every_n_validations: int = 1,
        n0: int | None = None,
        n_max: int | None = None,
        gates_stop: str = "no",
    ) -> None:
        if every_n_validations < 1:
            raise AssuranceError(f"AssuranceCallback: every_n_validations must be positive, got {every_n_validations}")
        if gates_stop not in ("no", "stop", "raise"):
            raise AssuranceError(f"AssuranceCallback: gates_stop must be no, stop or raise, got '{gates_stop}'")
        self.settings = SuiteSettings(suite, tuple(probes or ()), n0, n_max)
        self.limits = tuple(limits or ())
        self.every = every_n_validations
        self.gates_stop = gates_stop
        self.result: SuiteResult | None = None
        self._validations = 0
        self._verdict: Verdict | None = None
        self._deficits: dict[str, float] = {}
        self._began = 0.0
        self._spent = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "verdict": self._verdict, "deficits": dict(self._deficits)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = int(state_dict["validations"])
        self._verdict = state_dict["verdict"]
        self._deficits = dict(state_dict["deficits"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_assurable(pl_module)
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if (self._validations - 1) % self.every:
            return
        started = time.perf_counter()
        result = self.result = run_suite(subject_of(pl_module), self.settings, self.limits, ranks_of(trainer))
        self._spent += time.perf_counter() - started
        self._verdict = result.verdict
        self._deficits = {one.limit.figure: one.deficit for one in result.judgements if one.deficit is not None}
        if trainer.is_global_zero:
            costs = {
                "rice/seconds": time.perf_counter() - started,
                "rice/share": self._spent / max(1e-9, time.perf_counter() - self._began),
            }
            report = build(result, subject_digest="")
            log_report(trainer, report, model_card(report, Signature("")), trainer.global_step, costs)
        if result.verdict != "fail" or self.gates_stop == "no":
            return
        failed = [one for one in result.judgements if one.limit.kind == "gate" and one.ruling == "fail"]
        said = ", ".join(f"{one.limit.figure} (limit {one.limit.tau:g})" for one in failed)
        if self.gates_stop == "raise":
            raise GateFailure(f"step {trainer.global_step}: gate failed: {said}")
        trainer.should_stop = True
