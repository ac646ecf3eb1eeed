"""What the training loops share: arguments, token windows, the clock and the profile table.

Imported inside each peer's own environment, hence numpy, torch and the standard library only. Every loop calls
``Meter.tick()`` at the start of each optimiser step, so all are timed between the same two points: the start of step
``warmup`` and the start of step ``warmup + steps``, data loading, clipping, logging and callbacks included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OP_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # First match wins, so the specific names stand before the general ones.
    ("fused kernels (compiled)", ("cpp_fused",)),
    ("optimizer and clipping", ("adam", "foreach", "linalg_vector_norm", "::norm", "clip_grad")),
    ("attention", ("scaled_dot_product", "flash_attention", "_efficient_attention")),
    ("cross entropy", ("softmax", "nll_loss", "cross_entropy", "logsumexp", "::gather", "::scatter")),
    ("matmul", ("::mm", "::addmm", "::bmm", "::baddbmm", "::matmul", "::linear", "mkldnn", "onednn")),
    ("embedding", ("embedding", "index_put", "::index", "index_select", "index_add")),
    ("normalisation", ("rms_norm", "layer_norm", "::rsqrt", "::pow", "::mean")),
    (
        "cast, copy and layout",
        (
            "::copy_",
            "::_to_copy",
            "::to",
            "::cat",
            "::clone",
            "::contiguous",
            "::stack",
            "::fill_",
            "::zero_",
            "::zeros",
            "::empty",
            "::slice",
            "::split",
            "::reshape",
            "::transpose",
            "::view",
            "::t",
            "::as_strided",
            "::expand",
            "::unsqueeze",
        ),
    ),
    (
        "element-wise",
        (
            "::mul",
            "::add",
            "::sub",
            "::neg",
            "::silu",
            "::sigmoid",
            "::div",
            "::sum",
            "::exp",
            "::where",
            "::fma",
            "::rsub",
        ),
    ),
)


@dataclass(frozen=True)
class LoopArgs:
    """One run of one loop. Sizes default to the 16.9M-parameter Llama used for the published ratios."""

    tokens: Path
    """uint16 token file, flat."""
    cache: Path = Path(".")
    """Plumbline only: the corpus that the token file belongs to."""
    vocab: int = 8192
    dim: int = 384
    layers: int = 6
    heads: int = 6
    ff: int = 1024
    seq_len: int = 512
    batch: int = 4
    steps: int = 20
    warmup: int = 3
    precision: str = "fp32"
    threads: int = 1
    cpus: str = ""
    compile: bool = False
    profile: bool = False
    lr: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    log_every: int = 10
    seed: int = 0
    mode: str = "full"
    """Plumbline only: ``full`` (Trainer, callbacks, datamodule) or ``bare`` (network and loss in a plain loop)."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps to run: the clock stops at the start of the last one."""
        return self.warmup + self.steps + 1

    @property
    def parameters(self) -> int:
        """Parameters of the untied, bias-free Llama of these sizes."""
        layer = 4 * self.dim**2 + 3 * self.dim * self.ff + 2 * self.dim
        return 2 * self.vocab * self.dim + self.layers * layer + self.dim


def parse_loop_args(argv: list[str] | None = None) -> LoopArgs:
    """Command line of a loop script; pins the process and sets the thread count before any work starts."""
    parser = argparse.ArgumentParser(description="One timed training run; prints one JSON line.")
    parser.add_argument("--tokens", type=Path, required=True, help="flat uint16 token file")
    parser.add_argument("--cache", type=Path, default=LoopArgs.cache, help="cache folder of the corpus (full mode)")
    for name in ("vocab", "dim", "layers", "heads", "ff", "seq_len", "batch", "steps", "warmup", "threads", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(LoopArgs, name))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=LoopArgs.precision)
    parser.add_argument("--cpus", default="", help="cores to pin to, such as 0 or 0,1 (default: not pinned)")
    parser.add_argument("--mode", choices=("full", "bare"), default=LoopArgs.mode)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = LoopArgs(**vars(parser.parse_args(argv)))
    if args.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in args.cpus.split(",")})
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


class Windows(torch.utils.data.Dataset):
    """Windows of ``seq_len + 1`` tokens, stride ``seq_len``, over a memory-mapped uint16 file, in a seeded order."""

    def __init__(self, args: LoopArgs, style: str) -> None:
        self.data = np.memmap(args.tokens, dtype=np.uint16, mode="r")
        self.seq_len = args.seq_len
        count = (len(self.data) - 1) // args.seq_len
        if count < args.batch:
            raise ValueError(f"Windows: {args.tokens} holds {count} windows of {args.seq_len}, fewer than one batch")
        self.order = np.random.default_rng(args.seed).permutation(count)
        self.length = args.total_steps * args.batch
        self.style = style

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        if index >= self.length:
            raise IndexError(index)
        start = int(self.order[index % len(self.order)]) * self.seq_len
        window = torch.from_numpy(self.data[start : start + self.seq_len + 1].astype(np.int64))
        if self.style == "shifted":
            return {"input_ids": window[:-1], "labels": window[1:]}
        if self.style == "hugging_face":  # the model shifts labels itself
            return {"input_ids": window[:-1], "labels": window[:-1]}
        return window


def probe_batch(args: LoopArgs) -> tuple[Tensor, Tensor]:
    """The first training batch as (input [B, T], target [B, T]): every loop's loss on it must fall alike."""
    data = Windows(args, "window")
    window = torch.stack([data[i] for i in range(args.batch)])
    return window[:, :-1], window[:, 1:]


def group_of(name: str) -> str:
    """Op group of a profiler event name."""
    operator = name.rsplit("::", 1)[-1].rstrip("_")
    for group, patterns in OP_GROUPS:
        for pattern in patterns:
            # A pattern with the namespace mark is a whole operator name ("::t" must not swallow "tanh").
            if operator == pattern[2:].rstrip("_") if pattern.startswith("::") else pattern in name.lower():
                return group
    return "other"


@dataclass
class Meter:
    """Clock of one run. Call ``tick()`` at the start of every optimiser step, ``report()`` at the end."""

    args: LoopArgs
    loop: str
    parameters: int
    logits: Callable[[Tensor], Tensor]
    """Model forward: input ids [B, T] -> logits [B, T, V]; used outside the timed span only."""
    ticks: int = 0
    marks: list[tuple[float, float]] = field(default_factory=list)
    loss_before: float = math.nan
    profiler: torch.profiler.profile | None = None
    table: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parameters != self.args.parameters:
            raise ValueError(f"{self.loop}: {self.parameters:,} parameters, expected {self.args.parameters:,}")
        self.loss_before = self.probe_loss()

    @torch.no_grad()
    def probe_loss(self) -> float:
        """Mean loss (nats) on the first training batch, forward pass of this loop's own model."""
        inputs, targets = probe_batch(self.args)
        logits = self.logits(inputs).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

    def tick(self) -> None:
        """Mark the start of an optimiser step."""
        first, last = self.args.warmup, self.args.warmup + self.args.steps
        if self.ticks == last:
            self.marks.append((time.perf_counter(), _cpu_seconds()))
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                self.table = self._profile_table()
        if self.ticks == first:
            if self.args.profile:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                self.profiler.__enter__()
            self.marks.append((time.perf_counter(), _cpu_seconds()))
        self.ticks += 1

    def _profile_table(self) -> dict[str, float]:
        assert self.profiler is not None
        wall = self.marks[1][0] - self.marks[0][0]
        groups: dict[str, float] = {}
        for event in self.profiler.key_averages():
            if "::" in event.key or "cpp_fused" in event.key:  # operators, not the ranges that frame them
                group = group_of(event.key)
                groups[group] = groups.get(group, 0.0) + event.self_cpu_time_total * 1e-6
        groups["outside ops (Python, framework, data)"] = max(wall - sum(groups.values()), 0.0)
        return {name: seconds / self.args.steps for name, seconds in sorted(groups.items(), key=lambda kv: -kv[1])}

    def report(self) -> None:
        """Print the run's JSON line on standard output.

        Raises: RuntimeError if the loop ran too few steps, or did not learn (loss on the first batch did not fall).
        """
        if len(self.marks) != 2:
            raise RuntimeError(f"{self.loop}: {self.ticks} steps ran, {self.args.total_steps} needed")
        loss_after = self.probe_loss()
        if not loss_after < self.loss_before:
            raise RuntimeError(f"{self.loop}: loss on the first batch went {self.loss_before:.4f} -> {loss_after:.4f}")
        (wall0, cpu0), (wall1, cpu1) = self.marks
        tokens = self.args.steps * self.args.batch * self.args.seq_len
        line = {
            "loop": self.loop,
            "tokens": tokens,
            "steps": self.args.steps,
            "wall_s": round(wall1 - wall0, 4),
            "cpu_s": round(cpu1 - cpu0, 4),
            "tok_per_cpu_s": round(tokens / (cpu1 - cpu0), 1),
            "tok_per_wall_s": round(tokens / (wall1 - wall0), 1),
            "parameters": self.parameters,
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "loss_before": round(self.loss_before, 4),
            "loss_after": round(loss_after, 4),
            "torch": torch.__version__,
        }
        if self.table:
            line["profile_s_per_step"] = {name: round(seconds, 6) for name, seconds in self.table.items()}
        print(json.dumps(line), flush=True)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the children it has waited for (all threads)."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
