"""Tokens or frames per second, model-FLOPs utilisation, and the share of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from modules.contracts import CountsWork, KnowsFlops

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40": 181e12, "4090": 165e12}
"""Dense bf16 peaks of one device, FLOP/s, by a part of the device's name (vendor data sheets)."""


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of ``device`` in FLOP/s, or ``None`` where it is not known (CPUs: MFU is not reported)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


class Throughput(Callback):
    """Logs ``speed/<unit>_per_s`` over all ranks, ``speed/mfu`` and ``speed/data_wait`` (share of wall time, 0 to 1).

    Windows end at the trainer's logging steps; validation and checkpoint time are not counted. ``<unit>_seen`` counts
    over all ranks and is part of the checkpoint.

    Args:
        warmup_steps: optimiser steps left out of the first window (allocation, compilation, cold caches).
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self.seen = 0
        self.mean_rate: float | None = None
        self._window_work = 0
        self._window_wall = 0.0
        self._window_wait = 0.0
        self._total_work = 0
        self._total_wall = 0.0
        self._batch_start = 0.0
        self._previous_end: float | None = None
        self._first_step = 0
        self._logged_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = int(state_dict["seen"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._logged_step = trainer.global_step
        self._previous_end = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._previous_end = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, CountsWork):
            return
        # every rank runs the same shapes: counting locally and multiplying keeps collectives out of the loop
        work = pl_module.work_per_batch(batch) * trainer.world_size
        self.seen += work
        stepped = trainer.global_step > self._logged_step
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        log_now = stepped and trainer.global_step % every == 0
        if log_now and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if trainer.global_step - self._first_step > self.warmup_steps:
            began = self._previous_end if self._previous_end is not None else self._batch_start
            self._window_wall += now - began
            self._window_wait += self._batch_start - began
            self._window_work += work
        self._previous_end = now
        if log_now:
            self._logged_step = trainer.global_step
            pl_module.log(f"{pl_module.work_unit}_seen", float(self.seen), rank_zero_only=True)
            if self._window_work:
                self._log_speed(trainer, pl_module, pl_module.work_unit)

    def _log_speed(self, trainer: Trainer, pl_module: LightningModule, unit: str) -> None:
        rate = self._window_work / max(self._window_wall, 1e-9)
        values = {
            f"speed/{unit}_per_s": rate,
            "speed/data_wait": self._window_wait / max(self._window_wall, 1e-9),
        }
        peak = device_peak_flops(pl_module.device)
        if peak is not None and isinstance(pl_module, KnowsFlops):
            values["speed/mfu"] = rate * pl_module.flops_per_work_unit() / (peak * trainer.world_size)
        self._total_work += self._window_work
        self._total_wall += self._window_wall
        self.mean_rate = self._total_work / max(self._total_wall, 1e-9)
        pl_module.log_dict(values, rank_zero_only=True)
        self._window_work, self._window_wall, self._window_wait = 0, 0.0, 0.0

    def summary_rows(self, pl_module: LightningModule) -> dict[str, str]:
        """Rows for the end-of-run table; empty if the module does not count work."""
        if not isinstance(pl_module, CountsWork) or not self.seen:
            return {}
        rows = {f"{pl_module.work_unit} seen": f"{self.seen:,}"}
        if self.mean_rate is not None:
            rows[f"{pl_module.work_unit} per second"] = f"{self.mean_rate:,.0f}"
        return rows
