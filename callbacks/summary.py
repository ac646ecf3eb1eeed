"""A table at the end of a run: where it lies, how far it came, what it measured."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.throughput import Throughput
from modules.contracts import Summarises


class RunSummary(Callback):
    """Prints the summary table after ``fit``, ``validate`` and ``test`` on rank 0 and writes ``<run>/summary.txt``.

    ``fit`` shows validation metrics at the start of the run (from a full sanity check, ``num_sanity_val_steps: -1``)
    beside the last ones.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._start_metrics: dict[str, float] = {}
        self._metrics: dict[str, float] = {}
        self._folder = Path()

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"start_metrics": dict(self._start_metrics)}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        self._start_metrics = dict(state_dict["start_metrics"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._began = time.monotonic()
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on all ranks, here

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if trainer.sanity_checking:
            if trainer.num_sanity_val_steps == float("inf"):
                self._start_metrics = values
                if trainer.is_global_zero:
                    for logger in trainer.loggers:
                        logger.log_metrics({f"start/{key}": value for key, value in values.items()}, step=0)
            return
        self._metrics = values

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer, pl_module, "fit")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("validate", "test") and self._metrics:
            self._print(trainer, pl_module, str(getattr(stage, "value", stage)))

    @rank_zero_only
    def _print(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = self._folder
        rows: list[tuple[str, str]] = [("run folder", str(folder))]
        if stage == "fit":
            rows.append(("optimiser steps", f"{trainer.global_step:,}"))
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, Throughput):
                    rows.extend(callback.summary_rows(pl_module).items())
        rows.append(("wall time", f"{time.monotonic() - self._began:,.1f} s"))
        for key in sorted(self._metrics):
            start = self._start_metrics.get(key) if stage == "fit" else None
            value = _figure(self._metrics[key])
            rows.append((key, value if start is None else f"{_figure(start)} -> {value}"))
        if isinstance(pl_module, Summarises):
            rows.extend(pl_module.summary_rows().items())
        width = max(len(name) for name, _ in rows)
        title = f" Plumbline {stage}: {type(pl_module).__name__} "
        lines = [title.center(78, "="), *(f"{name:<{width}}  {value}" for name, value in rows), "=" * 78]
        print("\n".join(lines), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"summary_{stage}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _figure(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
