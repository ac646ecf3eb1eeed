"""What the RLHF loops share: arguments, prompts, the reward, and the clock.

Imported inside each peer's own environment, hence torch and the standard library only. A *step* is: respond to
``prompts`` prompts ``group`` times each, score the responses, compute the reference's log-probabilities, and make one
update of the policy on all of them. Steps are timed from the end of one to the end of the next, so data loading,
hooks and bookkeeping are in; imports, loading and the ``warmup`` first steps are not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from marl_common import cpu_seconds
from torch import Tensor

PROMPTS_FILE = "prompts.json"
_COUNTS = ("prompts", "group", "prompt_tokens", "new_tokens", "top_k", "warmup", "steps", "threads", "seed")
_NUMBERS = ("beta", "clip", "lr", "weight_decay", "grad_norm")


@dataclass(frozen=True)
class RlhfArgs:
    """One run of one loop."""

    model: Path = Path(".")
    """Hugging Face directory: weights, tokenizer, and :data:`PROMPTS_FILE`, a JSON list of texts."""
    prompts: int = 4
    """Different prompts a step."""
    group: int = 4
    """Responses to each, whose mean reward is the baseline."""
    prompt_tokens: int = 32
    new_tokens: int = 32
    """Tokens of every response: the token that would end it is forbidden."""
    top_k: int = 20
    warmup: int = 1
    steps: int = 3
    """Timed steps."""
    beta: float = 0.04
    """Weight of the KL to the reference."""
    clip: float = 0.2
    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    grad_norm: float = 1.0
    threads: int = 1
    seed: int = 0
    profile: bool = False
    """Record the timed steps with torch's profiler; the times are no result then."""

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens", "top_k", "warmup", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"RlhfArgs: {name}: must be >= 1, got {getattr(self, name)}")
        if self.group < 2:
            raise ValueError(f"RlhfArgs: group: must be >= 2, as its mean is the baseline, got {self.group}")

    @property
    def total_steps(self) -> int:
        """Steps to run in all: the clock stops at the end of the last one."""
        return self.warmup + self.steps

    @property
    def responses(self) -> int:
        """Responses a step."""
        return self.prompts * self.group


def build_parser() -> argparse.ArgumentParser:
    """Every field of :class:`RlhfArgs` but ``betas`` as an option."""
    parser = argparse.ArgumentParser(description="One timed RLHF run; prints one JSON line.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory, prompts beside the weights")
    for names, kind in ((_COUNTS, int), (_NUMBERS, float)):
        for name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(RlhfArgs, name))
    parser.add_argument("--profile", action="store_true")
    return parser


def parse_rlhf_args(argv: list[str] | None = None) -> RlhfArgs:
    """Command line of a loop script; sets the thread count before any work starts."""
    args = RlhfArgs(**vars(build_parser().parse_args(argv)))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def read_prompts(args: RlhfArgs) -> list[str]:
    """The run's prompts, ``prompts`` a step.

    Raises:
        ValueError: the file holds too few.
    """
    wanted = args.prompts * args.total_steps
    texts = json.loads((args.model / PROMPTS_FILE).read_text(encoding="utf-8"))
    if len(texts) < wanted:
        raise ValueError(
            f"read_prompts: {args.total_steps} steps need {wanted} prompts, {PROMPTS_FILE} has {len(texts)}"
        )
    return texts[:wanted]


def even_share(tokens: Sequence[int]) -> float:
    """The reward: share of even token ids in a response."""
    return sum(token % 2 == 0 for token in tokens) / max(1, len(tokens))


def probe_tokens(vocab_size: int) -> Tensor:
    """Fixed tokens int64 ``[2, 48]``, on which both sides' start models must agree."""
    return (torch.arange(96).view(2, 48) * 7919 + 13) % vocab_size


def mean_log_probability(logits: Tensor, tokens: Tensor) -> float:
    """Mean log-probability of ``tokens`` ``[B, T]`` but the first, given logits ``[B, T, V]``."""
    scores = torch.log_softmax(logits[:, :-1].float(), -1)
    return float(scores.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean())


@dataclass
class StepClock:
    """CPU and wall seconds of every step, its tokens, and how the CPU time divides.

    Call :meth:`responded` with the lengths of a step's responses when the rewards see them, :meth:`add` with the CPU
    seconds of a phase, and :meth:`ended` when the step is over.
    """

    args: RlhfArgs
    marks: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=lambda: [{}])
    updates: list[int] = field(default_factory=list)
    profiler: torch.profiler.profile | None = None

    def responded(self, lengths: Sequence[int]) -> None:
        """Rewards have seen the step's responses."""
        self.tokens.append(sum(lengths))

    def add(self, phase: str, seconds: float) -> None:
        """Some CPU time of this step went into ``phase``."""
        self.phases[-1][phase] = self.phases[-1].get(phase, 0.0) + seconds

    def ended(self, updates: int) -> None:
        """The step is over; ``updates`` were made of the policy since the run's start, by the optimiser's own count."""
        self.marks.append((time.perf_counter(), cpu_seconds()))
        self.updates.append(updates)
        self.phases.append({})
        if self.args.profile and len(self.marks) == self.args.warmup:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()
        elif self.profiler is not None and len(self.marks) == self.args.total_steps:
            self.profiler.stop()

    def line(self, loop: str, **more: object) -> dict[str, object]:
        """The run's result.

        Raises:
            RuntimeError: too few steps, or other numbers of tokens or updates than asked.
        """
        args, warmup = self.args, self.args.warmup
        if not len(self.marks) == len(self.tokens) == args.total_steps:
            raise RuntimeError(
                f"{loop}: {len(self.marks)} steps and {len(self.tokens)} scorings ran, {args.total_steps} wanted"
            )
        expected = args.responses * args.new_tokens
        updates = self.updates[-1] - self.updates[warmup - 1]
        if set(self.tokens) != {expected} or updates != args.steps:
            raise RuntimeError(
                f"{loop}: {sorted(set(self.tokens))} tokens a step and {updates} updates were made, {expected} and "
                f"{args.steps} wanted"
            )
        (wall0, cpu0), (wall1, cpu1) = self.marks[warmup - 1], self.marks[-1]
        cpu, wall = cpu1 - cpu0, wall1 - wall0
        timed = self.phases[warmup : args.total_steps]
        found: dict[str, object] = {
            "loop": loop,
            "steps": args.steps,
            "tokens": expected * args.steps,
            "updates": updates,
            "cpu_s": round(cpu, 3),
            "wall_s": round(wall, 3),
            "cpu_s_per_step": round(cpu / args.steps, 3),
            "tokens_per_cpu_s": round(expected * args.steps / cpu, 2),
            "tokens_per_wall_s": round(expected * args.steps / wall, 2),
            "step_cpu_s": [round(b[1] - a[1], 3) for a, b in itertools.pairwise(self.marks[warmup - 1 :])],
            "phases_cpu_s": {
                name: round(sum(one.get(name, 0.0) for one in timed) / args.steps, 3)
                for name in sorted({name for one in timed for name in one})
            },
            **more,
        }
        if self.profiler is not None:
            found["profile_s_per_step"] = op_table(self.profiler, args.steps)
        return found


def op_table(profiler: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Self CPU seconds a step by op group, as ``common.py`` groups them."""
    from common import group_of

    table: dict[str, float] = {}
    for event in profiler.key_averages():
        if "::" in event.key or event.key.startswith("graph_"):
            group = group_of(event.key)
            table[group] = table.get(group, 0.0) + event.self_cpu_time_total / 1e6 / steps
    return {group: round(seconds, 4) for group, seconds in sorted(table.items(), key=lambda one: -one[1])}
