"""Plumbline's multi-agent training: ``python -m train fit`` in process, with its default callbacks and loggers.

Off, as for the peer: evaluation and checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from marl_common import MarlArgs, parse_marl_args, print_line

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MIXING = {"iql": "none", "vdn": "vdn", "qmix": "qmix"}


def full_config(args: MarlArgs, runs: Path) -> dict[str, Any]:
    """The experiment file; whatever is not here is the command line's default."""
    lagged = {"update_every": args.target_every or 1, "tau": 1.0 if args.target_every else 0.005}
    emax = args.members > 1
    options: dict[str, Any]
    task, options = f"mpe/spread-{args.agents}", {"episode_limit": args.max_steps}
    if args.environment == "vmas":
        task, options = "vmas/simple_spread", {**options, "scenario_options": {"n_agents": args.agents}}
    elif args.environment == "lbf":
        task, options = "lbf/8x8-2p-2f-coop", {}  # episodes of 50, as registered
    return {
        "seed_everything": args.seed,
        "runs": str(runs),
        "experiment": "benchmark",
        "model": {
            "class_path": "modules.emax.ValueMARL",
            "init_args": {
                "mixing": {"kind": MIXING[args.algorithm], "embed": args.mixing, "hypernet_layers": 1},
                "ensemble": {"size": args.members},
                "explorer": {"kind": "ucb" if emax else "epsilon_greedy"},
                "target": {"kind": "mean_target" if emax else "own_target", "double_q": False, **lagged},
                "network": {"hidden": args.hidden[0], "agent_id": False},
                "reward": {"scalarise": "mean"},
                "clip": {"norm": args.clip},
                "gamma": args.gamma,
                "learning_rate": args.lr,
            },
        },
        "data": {
            "class_path": "datamodules.MARLDataModule",
            "init_args": {
                "task": task,
                "backend": "tensor" if args.environment in ("tensor", "lbf") else "package",
                "options": options,
                "envs": args.envs,
                "frames_per_batch": args.frames,
                "updates_per_batch": args.updates,
                "total_frames": args.frames * args.total_iterations,
                "learning_starts": 0,
                "batch_size": args.batch,
                "capacity": args.memory,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": args.total_iterations,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "plumbline_marl_clock.Clock"}],
        },
        "checkpoint": {"every_n_steps": 10**9},
    }


def main(args: MarlArgs) -> None:
    """The command line, its trainer, callbacks, loggers and data.

    Raises:
        RuntimeError: if the command fails, or makes other numbers of frames or updates than asked.
        ValueError: for layers that the agents' network cannot have.
    """
    if len(args.hidden) != 2 or args.hidden[0] != args.hidden[1]:
        raise ValueError(f"plumbline: hidden: two layers of one width, got {list(args.hidden)}")
    from plumbline_marl_clock import Clock

    import train

    if args.vmas_path:
        sys.path.append(args.vmas_path)  # last, so that only what this environment lacks comes from there
    Clock.args = args
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "benchmark.yaml"
        config.write_text(json.dumps(full_config(args, Path(folder))), encoding="utf-8")  # JSON is YAML
        with contextlib.redirect_stdout(sys.stderr):
            code = train.main(["fit", "-c", str(config), *args.override])
    if code or Clock.clock is None:
        raise RuntimeError(f"plumbline: python -m train fit ended with exit code {code}")
    line = Clock.clock.line("plumbline", args, parameters=Clock.parameters, members=args.members)
    done = tuple(after - before for before, after in zip(*Clock.done, strict=True))
    if done != (line["frames"], line["updates"]):
        raise RuntimeError(
            f"plumbline: {done} frames and updates were made in the timed span, "
            f"{(line['frames'], line['updates'])} asked"
        )
    print_line(line)


if __name__ == "__main__":
    main(parse_marl_args())
