"""Speed of continuous control: PPO against Stable-Baselines3's on one thread, and collection in tensor environments.

``ppo``: both sides train the same networks on the same MuJoCo task with equal rollouts, epochs and minibatches, each
run in a process of its own; the order turns round from round to round, and ratios are taken within a round. CPU
seconds are counted over whole iterations after warm-up, so imports and start-up are left out. ``tensor``: frames that
our datamodule collects with a policy that acts in all environments, no update. See README.md beside this file.

    python benchmarks/control_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "loops"), str(HERE.parent)]

from game_speed import Work, measure  # noqa: E402
from marl_common import IterationClock, print_line  # noqa: E402
from marl_train_speed import command_of, result_line, write_record  # noqa: E402
from peers import default_root, ensure_peer, installed_packages  # noqa: E402
from routing_speed import spread  # noqa: E402
from sb3_worker import PPOArgs, parse_ppo_args  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

PEER = "sb3"
LOOP = "loop"
"""First word of the command line that runs our side of ``ppo``."""
PARTS = ("ppo", "tensor")
TASKS = ("integrator", "pendulum")
SIZES = (1024, 4096, 16384)
STEPS = 64
SHARED = ("warmup", "iterations", "seed")


# -- our PPO, in a process of its own --
class Clock(Callback):
    """One training batch is one iteration: a rollout and all updates from it.

    Between the end of one training batch and the start of the next nothing happens but the rollout and Lightning's
    bookkeeping, so that is the time counted as collection.
    """

    args: PPOArgs
    line: dict[str, object] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock = IterationClock(Clock.args.warmup, Clock.args.iterations)
        self.done: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.collected()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = len(self.clock.marks)
        self.clock.trained()
        if len(self.clock.marks) > before:
            steps = [int(state["step"]) for state in pl_module.learner.policy.optimiser.state.values()]  # Adam's count
            self.done.append((int(pl_module.frames), max(steps)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        learner, args = pl_module.learner, Clock.args
        last = trainer.callback_metrics.get("train/return")
        line = self.clock.line(
            "plumbline",
            args,  # pyright: ignore[reportArgumentType]
            parameters=learner.policy.flat.numel() + learner.value.flat.numel(),
            last_return=None if last is None else round(float(last), 2),
        )
        made = tuple(after - before for before, after in zip(*self.done, strict=True))
        if made != (line["frames"], line["updates"]):
            raise RuntimeError(
                f"plumbline: {made} frames and updates were made in the timed span, "
                f"{(line['frames'], line['updates'])} asked"
            )
        Clock.line = line


def full_config(args: PPOArgs, runs: str) -> dict[str, Any]:
    """The experiment file of our side; whatever is not here is the command line's default."""
    iterations = args.warmup + args.iterations
    return {
        "seed_everything": args.seed,
        "runs": runs,
        "experiment": "benchmark",
        "model": {
            "class_path": "modules.baselines.PPO",
            "init_args": {
                "ppo": {
                    "lr": args.lr,
                    "value_lr": args.lr,
                    "anneal": False,
                    "clip": args.clip,
                    "epochs": args.epochs,
                    "minibatches": args.minibatches,
                    "gamma": args.gamma,
                    "gae_lambda": args.gae_lambda,
                    "max_grad_norm": args.max_grad_norm,
                },
                "total_frames": args.frames * iterations,
                "hidden": [64, 64],
            },
        },
        "data": {
            "class_path": "datamodules.ControlDataModule",
            "init_args": {
                "task": f"mujoco/{args.environment}",
                "envs": args.envs,
                "frames_per_batch": args.frames,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": iterations,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "control_speed.Clock"}],
        },
        "checkpoint": {"every_n_steps": 10**9},
    }


def run_ours(args: PPOArgs) -> dict[str, object]:
    """``python -m train fit`` in process, with its default callbacks and loggers, evaluation and checkpoints off.

    Raises:
        RuntimeError: if the command fails, or makes other numbers of frames or updates than asked.
    """
    import control_speed  # the module that the command line imports, not this script

    import train

    control_speed.Clock.args = args
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "benchmark.yaml"
        config.write_text(json.dumps(full_config(args, folder)), encoding="utf-8")  # JSON is YAML
        with contextlib.redirect_stdout(sys.stderr):
            code = train.main(["fit", "-c", str(config)])
    if code or control_speed.Clock.line is None:
        raise RuntimeError(f"plumbline: python -m train fit ended with exit code {code}")
    return control_speed.Clock.line


# -- PPO against the peer --
def loop_commands(python: Path) -> dict[str, list[str]]:
    """How each side is run, ``python`` being the peer's interpreter."""
    return {
        PEER: [str(python), str(HERE / "sb3_worker.py")],
        "plumbline": [sys.executable, str(HERE / "control_speed.py"), LOOP],
    }


def order_of(loops: Sequence[str], number: int) -> list[str]:
    """The loops of a round, which of them goes first taking turns."""
    return list(loops) if number % 2 == 0 else list(reversed(loops))


def run_loop(name: str, command: Sequence[str]) -> dict[str, Any]:
    """Run one side to its end.

    Raises:
        RuntimeError: with its last lines if it fails or prints no result.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = result_line(done.stdout)
    if done.returncode or found is None:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise RuntimeError(f"control_speed: {name} failed (exit {done.returncode}):\n{tail}")
    return {**found, "loop": name}


def check_equal_work(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: ValueError if the sides differ in task, frames, updates or parameters."""
    for key in ("environment", "frames", "updates", "parameters"):
        found = {name: line[key] for name, line in results.items()}
        if len(set(found.values())) != 1:
            raise ValueError(f"control_speed: the sides differ in {key}: {found}")


def summarise(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rates of each side over the rounds, and of ours over the peer's within a round.

    Args:
        rounds: side -> result line, per round.
    """
    table: dict[str, Any] = {}
    for key in ("frames_per_cpu_s", "frames_per_wall_s"):
        table[key] = {name: spread([one[name][key] for one in rounds], 1) for name in rounds[0]}
    ratios = [round(one["plumbline"]["frames_per_cpu_s"] / one[PEER]["frames_per_cpu_s"], 4) for one in rounds]
    table["ratio"] = spread(ratios, 4) | {"by_round": ratios}
    parts = {
        "collect": lambda line: line["collect_cpu_s"],
        "update": lambda line: line["cpu_s"] - line["collect_cpu_s"],
    }
    for part, seconds in parts.items():
        table[f"{part}_us_per_frame"] = {
            name: spread([1e6 * seconds(one[name]) / one[name]["frames"] for one in rounds], 1) for name in rounds[0]
        }
    return table


def compare_ppo(args: argparse.Namespace, record: dict[str, Any], about: Mapping[str, Any]) -> None:
    """Run the rounds; after each, write what is known to ``args.out``.

    Raises:
        RuntimeError: a side fails. ValueError: the sides did different work.
    """
    commands = loop_commands(ensure_peer(PEER, args.root))
    record["versions"] = {PEER: installed_packages(PEER, args.root), "plumbline": _own_versions()}
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        run = PPOArgs(warmup=args.warmup, iterations=args.iterations, seed=args.seed + number)
        results: dict[str, dict[str, Any]] = {}
        for name in order_of(tuple(commands), number):
            results[name] = line = run_loop(name, [*commands[name], *run.options()])
            rate, last = line["frames_per_cpu_s"], line["last_return"]
            print(f"round {number + 1} {name}: {rate:,.0f} frames/CPU-s, last return {last}", flush=True)
        check_equal_work(results)
        rounds.append(results)
        setting = dataclasses.asdict(dataclasses.replace(run, seed=args.seed))
        record["ppo"] = {**about, "setting": setting, **summarise(rounds), "rounds": list(rounds)}
        write_record(record, args.out)
    print_ppo(record["ppo"])


def print_ppo(found: Mapping[str, Any]) -> None:
    setting = found["setting"]
    print(f"\nPPO on {setting['environment']}, {setting['envs']} environments")
    print(f"{'':<36}{'median':>10}{'min':>10}{'max':>10}")
    for key, what in (
        ("frames_per_cpu_s", "frames per CPU-s"),
        ("collect_us_per_frame", "collection, CPU us a frame"),
        ("update_us_per_frame", "updates, CPU us a frame"),
    ):
        for name, row in found[key].items():
            cells = "".join(f"{row[one]:>10,.0f}" for one in ("median", "min", "max"))
            print(f"{name + ': ' + what:<36}{cells}")
    row = found["ratio"]
    print(f"{'ratio':<36}" + "".join(f"{row[one]:>10.2f}" for one in ("median", "min", "max")), flush=True)


# -- tensor environments --
def collection_work(task: str, envs: int, steps: int) -> Work:
    """Rollouts of ``steps`` steps of ``envs`` environments by the datamodule, as the module in training asks for them:
    sampled actions of a policy with two layers of 64, everything recorded that its update needs. Episodes are cut by
    their time limit and begin anew."""
    from datamodules import ControlDataModule
    from modules.baselines import PPO

    data = ControlDataModule(task, envs=envs, frames_per_batch=envs * steps)
    data.setup("fit")
    module = PPO(hidden=(64, 64))
    module._attach(data.spec)
    assert module.learner is not None
    module.learner.begin((0,))
    request = module.rollout_request()
    number = 0

    def work() -> int:
        nonlocal number
        batch = data.rollout(dataclasses.replace(request, number=number))
        number += 1
        return batch.numel()

    return work


def measure_tensor(args: argparse.Namespace, record: dict[str, Any], about: Mapping[str, Any]) -> None:
    """Frames that are collected in a CPU-second, at each size, and write them to ``args.out``."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tasks: dict[str, Any] = {}
    for task in args.tasks:
        works = {str(size): collection_work(task, size, args.steps) for size in args.sizes}
        found = measure(works, args.rounds, args.budget)
        tasks[task] = {
            size: {f"per_{clock}_s": spread([1.0 / row[f"{clock}_s"] for row in rows], 0) for clock in ("cpu", "wall")}
            for size, rows in found.items()
        }
        print(f"\n{task}: frames per CPU-s, policy included\n{'envs':<10}{'median':>14}{'min':>14}{'max':>14}")
        for size, row in tasks[task].items():
            print(f"{size:<10}" + "".join(f"{row['per_cpu_s'][one]:>14,.0f}" for one in ("median", "min", "max")))
        record["tensor"] = {
            **about,
            "versions": _own_versions(),
            "steps": args.steps,
            "hidden": [64, 64],
            "tasks": tasks,
        }
        write_record(record, args.out)


# -- the script --
public_command = functools.partial(command_of, "control_speed.py")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed of continuous control, one thread.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--warmup", type=int, default=PPOArgs.warmup, help="ppo: iterations before the clock starts")
    parser.add_argument("--iterations", type=int, default=PPOArgs.iterations, help="ppo: timed iterations")
    parser.add_argument("--seed", type=int, default=0, help="ppo: of the first round; counted up by one a round")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="tensor: environments")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="tensor: environments side by side")
    parser.add_argument("--steps", type=int, default=STEPS, help="tensor: steps of a rollout")
    parser.add_argument("--budget", type=float, default=2.0, help="tensor: seconds a work is repeated for in a round")
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "control_speed.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [LOOP]:
        print_line(run_ours(parse_ppo_args(argv[1:])))
        return 0
    args = build_parser().parse_args(argv)
    record: dict[str, Any] = {"benchmark": "control_speed", "threads": 1}
    if args.out.exists():  # a part that is not run again stays
        record = json.loads(args.out.read_text(encoding="utf-8"))
    try:
        for part, run in (("ppo", compare_ppo), ("tensor", measure_tensor)):
            if part in args.parts:
                run(args, record, {"command": public_command(argv), "date": args.date, "machine": machine()})
    except (RuntimeError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
