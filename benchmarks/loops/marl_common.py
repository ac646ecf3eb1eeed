"""What the multi-agent training loops share: arguments and the clock.

Imported inside each peer's own environment, hence torch and the standard library only. An *iteration* is: collect
``frames`` environment steps, then make ``updates`` optimiser updates. All loops are timed over ``iterations`` whole
iterations after ``warmup`` others; imports, start-up and warm-up are left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass, field

import torch

ALGORITHMS = ("iql", "vdn", "qmix")
ENVIRONMENTS = ("vmas", "tensor", "pettingzoo", "lbf")


@dataclass(frozen=True)
class MarlArgs:
    """One run of one loop: value learning on a cooperative task, parameters shared among agents."""

    algorithm: str = "vdn"
    envs: int = 10
    """Environments stepped side by side."""
    frames: int = 1000
    """Environment steps an iteration, over all environments."""
    updates: int = 50
    """Optimiser updates an iteration."""
    batch: int = 128
    """Transitions an update learns from."""
    agents: int = 3
    max_steps: int = 100
    """Length of an episode."""
    hidden: tuple[int, ...] = (64, 64)
    memory: int = 100_000
    """Transitions that the replay buffer holds."""
    target_every: int = 200
    """Updates between hard copies of the target network; 0: Polyak averaging at rate 0.005 after every update."""
    lr: float = 5e-4
    gamma: float = 0.99
    clip: float = 10.0
    """Largest norm of the gradient."""
    mixing: int = 32
    """Width of the QMIX mixer; its hypernetworks have one layer, as TorchRL's have."""
    warmup: int = 2
    iterations: int = 5
    environment: str = "vmas"
    """``vmas``: VMAS ``simple_spread``; ``tensor``: Plumbline's tensor environment of the same task; ``pettingzoo``:
    the package that both follow, stepped through the loop's own adapter. Both loops run on all three, so that loops can
    be compared on one environment. ``lbf``: level-based foraging in tensors, two agents, Plumbline only."""
    threads: int = 1
    seed: int = 0
    members: int = 1
    """Plumbline only: members of the ensemble; more than one is EMAX, each with a minibatch of its own."""
    vmas_path: str = ""
    """Plumbline only: folder that holds the package vmas, looked in after everything else."""
    override: tuple[str, ...] = ()
    """Plumbline only: further words of the command line."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"MarlArgs: algorithm: one of {', '.join(ALGORITHMS)}, got '{self.algorithm}'")
        if self.environment not in ENVIRONMENTS:
            raise ValueError(f"MarlArgs: environment: one of {', '.join(ENVIRONMENTS)}, got '{self.environment}'")
        for name in ("envs", "frames", "updates", "batch", "agents", "max_steps", "warmup", "iterations", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"MarlArgs: {name}: must be >= 1, got {getattr(self, name)}")
        if self.frames % self.envs:
            raise ValueError(f"MarlArgs: frames: must be a multiple of envs ({self.envs}), got {self.frames}")

    @property
    def total_iterations(self) -> int:
        """Iterations to run in all: the clock stops at the end of the last one."""
        return self.warmup + self.iterations


def build_parser() -> argparse.ArgumentParser:
    """Every field of :class:`MarlArgs` as an option."""
    parser = argparse.ArgumentParser(description="One timed multi-agent training run; prints one JSON line.")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=MarlArgs.algorithm)
    for name in (
        *("envs", "frames", "updates", "batch", "agents", "max_steps", "memory", "target_every", "mixing"),
        *("warmup", "iterations", "threads", "seed", "members"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(MarlArgs, name))
    for name in ("lr", "gamma", "clip"):
        parser.add_argument(f"--{name}", type=float, default=getattr(MarlArgs, name))
    parser.add_argument("--hidden", type=int, nargs="+", default=list(MarlArgs.hidden))
    parser.add_argument("--environment", choices=ENVIRONMENTS, default=MarlArgs.environment)
    parser.add_argument("--vmas-path", default="")
    parser.add_argument("--override", nargs=argparse.REMAINDER, default=[], help="the rest goes to python -m train")
    return parser


def parse_marl_args(argv: list[str] | None = None) -> MarlArgs:
    """Command line of a loop script; sets the thread count before any work starts."""
    given = build_parser().parse_args(argv)
    given.hidden, given.override = tuple(given.hidden), tuple(given.override)
    args = MarlArgs(**vars(given))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children, user and system."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@dataclass
class IterationClock:
    """Times whole iterations, and how much of each is collection.

    Call :meth:`collected` when an iteration's frames are there and :meth:`trained` when its updates are done. The span
    runs from the end of iteration ``warmup`` to the end of iteration ``warmup + iterations``.
    """

    warmup: int
    iterations: int
    ended: int = 0
    marks: list[tuple[float, float]] = field(default_factory=list)
    collect_s: float = 0.0
    _since: float = 0.0

    def collected(self) -> None:
        """The frames are there."""
        if len(self.marks) == 1:
            self.collect_s += cpu_seconds() - self._since

    def trained(self) -> None:
        """An iteration's updates are done."""
        now = (time.perf_counter(), cpu_seconds())
        self.ended += 1
        if self.ended in (self.warmup, self.warmup + self.iterations):
            self.marks.append(now)
        self._since = now[1]

    def line(self, loop: str, args: MarlArgs, **more: object) -> dict[str, object]:
        """The run's result.

        Raises:
            RuntimeError: if too few iterations ran.
        """
        if len(self.marks) != 2:
            raise RuntimeError(f"{loop}: {self.ended} iterations ran, {self.warmup + self.iterations} needed")
        (wall0, cpu0), (wall1, cpu1) = self.marks
        frames, updates = args.frames * self.iterations, args.updates * self.iterations
        cpu, wall = cpu1 - cpu0, wall1 - wall0
        return {
            "loop": loop,
            "frames": frames,
            "updates": updates,
            "cpu_s": round(cpu, 4),
            "wall_s": round(wall, 4),
            "collect_cpu_s": round(self.collect_s, 4),
            "frames_per_cpu_s": round(frames / cpu, 1),
            "frames_per_wall_s": round(frames / wall, 1),
            "algorithm": args.algorithm,
            "environment": args.environment,
            **more,
        }


def print_line(line: dict[str, object]) -> None:
    """One JSON line on standard output, which a driver looks for."""
    print(json.dumps(line), flush=True)
