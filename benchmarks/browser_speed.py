"""Speed of live browser tasks: our pages against the miniwob package and BrowserGym, each through its own calls.

All sides solve the same MiniWoB++ tasks in the same Chromium, each run in a process of its own; the order turns round
from round to round, and ratios are taken within a round. The clock runs over whole episodes, a reset and the actions
that solve it, and every episode must be solved. See README.md beside this file.

    python benchmarks/browser_speed.py --rounds 5
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "loops"), str(HERE.parent)]

from browser_worker import (  # noqa: E402
    TASKS,
    BrowserArgs,
    Move,
    Outcome,
    adopt_orphans,
    chromium,
    measure,
    parse_browser_args,
    print_line,
)
from control_speed import order_of, run_loop  # noqa: E402
from marl_train_speed import command_of, write_record  # noqa: E402
from peers import default_root, ensure_peer  # noqa: E402
from routing_speed import spread  # noqa: E402
from train_tokens import machine  # noqa: E402

LOOP = "loop"
"""First word of the command line that runs one of our sides."""
OURS: dict[str, tuple[int, bool]] = {
    "plumbline": (1, False),
    "plumbline_8": (8, False),
    "plumbline_env": (1, True),
    "plumbline_env_8": (8, True),
}
"""Our sides: pages in the one browser, and whether they act through the TorchRL environment."""
THEIRS = {"miniwob": "miniwob", "miniwob_no_images": "miniwob", "browsergym": "browsergym"}
"""Their sides, and the environment (see ``peers.py``) of each."""
SLOW = ("browsergym",)
SAME_SEEDS = ("plumbline", "plumbline_8", "plumbline_env", "plumbline_env_8", "miniwob", "miniwob_no_images")
"""Sides that seed a page alike, so that equal seeds must give equal instructions."""
PACKAGES = ("torch", "torchrl", "tensordict", "miniwob")


def texts(values: Sequence[str]) -> Any:
    """One text for each page, as a TensorDict entry."""
    from tensordict import NonTensorStack

    return NonTensorStack(*values)  # pyright: ignore[reportAbstractUsage]


class OurPages:
    """Pages of ours in one browser, straight or through ``MiniWoBEnv``."""

    def __init__(self, name: str) -> None:
        from datamodules.envs.browser import MiniWoBEnv, MiniWoBPool

        self.name = name
        self.pages, through_env = OURS[name]
        self.pool = MiniWoBPool(browsers=1, pages=self.pages, browser=chromium())
        self.env = MiniWoBEnv(self.pool, TASKS) if through_env else None
        self.task = TASKS[0]

    def open(self, task: str) -> None:
        self.task = task

    def reset(self, seeds: Sequence[int]) -> Outcome:
        from tensordict import TensorDict

        from modules.contracts.browsing import EpisodeSpec

        if self.env is None:
            views = self.pool.reset_pages({slot: EpisodeSpec(self.task, str(seed)) for slot, seed in enumerate(seeds)})
            return self._outcome(views)
        chosen = {"task": texts([self.task] * self.pages), "seed": texts(list(map(str, seeds)))}
        self.state = self.env.reset(TensorDict(chosen, batch_size=[self.pages]))
        return Outcome(self.state.get("utterance").tolist(), [False] * self.pages, [0.0] * self.pages)

    def _outcome(self, views: Mapping[int, Any]) -> Outcome:
        seen = [views[slot] for slot in range(self.pages)]
        return Outcome([v.utterance for v in seen], [v.done for v in seen], [v.reward for v in seen])

    def actions(self, plans: Sequence[Sequence[Move]]) -> list[list[str]]:
        found = []
        for plan in plans:
            texts: list[str] = []
            for kind, text in plan:
                if kind == "click":
                    texts.append(f'clickxpath //button[text()="{text}"]')
                else:  # theirs focus and type in one action
                    texts += ["clickxpath //input", f"type {text}"]
            found.append(texts)
        return found

    def step(self, actions: Sequence[str]) -> Outcome:
        if self.env is None:
            return self._outcome(self.pool.step_pages(dict(enumerate(actions))))
        self.state.set("action", texts(actions))
        self.state = self.env.step(self.state)["next"]
        reward, done = (self.state[key].flatten().tolist() for key in ("reward", "done"))
        return Outcome(self.state.get("utterance").tolist(), done, reward)

    def miss(self) -> None:
        """An instruction whose XPath has no match."""
        text = 'clickxpath //button[text()="not there"]'
        if self.env is None:
            statuses = [view.status for view in self.pool.step_pages(dict.fromkeys(range(self.pages), text)).values()]
        else:
            self.step([text] * self.pages)
            statuses = self.state.get("status").tolist()
        if set(statuses) != {"no_match"}:
            raise RuntimeError(f"{self.name}: a miss was told as {statuses}")

    def close(self) -> None:
        (self.env or self.pool).close()

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {**{name: version(name) for name in PACKAGES}, "browser": self.pool.version}


def side_commands(names: Sequence[str], root: Path) -> dict[str, list[str]]:
    """The command of each side, its environment built where that is missing.

    Raises:
        RuntimeError: an environment can't be built.
    """
    pythons = {peer: ensure_peer(peer, root) for peer in sorted({THEIRS[name] for name in names if name in THEIRS})}
    worker, own = str(HERE / "browser_worker.py"), str(Path(__file__).resolve())
    return {
        name: [str(pythons[THEIRS[name]]), worker, name] if name in THEIRS else [sys.executable, own, LOOP, name]
        for name in names
    }


def check_equal_episodes(lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Sides that seed alike must have been asked the same.

    Raises:
        ValueError: naming the sides, the task and the seed's place.
    """
    alike = [name for name in lines if name in SAME_SEEDS]
    for other in alike[1:]:
        for task, goals in lines[alike[0]]["goals"].items():
            for place, (one, two) in enumerate(zip(goals, lines[other]["goals"][task], strict=True)):
                if one != two:
                    raise ValueError(
                        f"browser_speed: {task}, episode {place}: {alike[0]} asked {one!r}, {other} {two!r}"
                    )


def summarise(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rates and latencies of each side over the rounds, and ours over theirs within a round.

    Args:
        rounds: side -> result line, per round.
    """
    names = list(rounds[0])
    table: dict[str, Any] = {
        key: {name: spread([one[name][key] for one in rounds], digits) for name in names}
        for key, digits in (("episodes_per_wall_s", 3), ("episodes_per_cpu_s", 3), ("miss_ms", 2))
        if all(one[name][key] is not None for one in rounds for name in names)
    }
    table["calls_ms"] = {
        task: {
            name: {
                key: spread([one[name]["tasks"][task][f"{key}_ms"] for one in rounds], 2) for key in ("reset", "step")
            }
            for name in names
        }
        for task in rounds[0][names[0]]["tasks"]
    }
    for clock in ("wall", "cpu"):
        key = f"episodes_per_{clock}_s"
        if key in table:
            table[f"ratio_{clock}"] = {
                f"{ours} / {theirs}": spread([one[ours][key] / one[theirs][key] for one in rounds], 3)
                for ours in names
                for theirs in names
                if ours in OURS and theirs in THEIRS
            }
    return table


def compare(args: argparse.Namespace, about: Mapping[str, Any]) -> dict[str, Any]:
    """Run the rounds; after each, write what is known to ``args.out``.

    Raises:
        RuntimeError: a side fails. ValueError: the sides played different episodes.
    """
    commands = side_commands(args.sides, args.root)
    rounds: list[dict[str, dict[str, Any]]] = []
    record: dict[str, Any] = {}
    for number in range(args.rounds):
        results: dict[str, dict[str, Any]] = {}
        for name in order_of(args.sides, number):
            episodes = args.slow_episodes if name in SLOW else args.episodes
            warmup = 1 if name in SLOW else BrowserArgs.warmup
            run = BrowserArgs(tuple(args.tasks), episodes, warmup, args.misses, args.seed + number * args.episodes)
            line = run_loop(name, [*commands[name], *run.options()])
            results[name] = line = {**line, "load_1m": round(os.getloadavg()[0], 2)}
            print(
                f"round {number + 1} {name}: {line['episodes_per_wall_s']:.2f} episodes/s, "
                f"{line['episodes_per_cpu_s'] or float('nan'):.2f} per CPU-s, miss {line['miss_ms']} ms",
                flush=True,
            )
        check_equal_episodes(results)
        rounds.append({name: {k: v for k, v in results[name].items() if k != "goals"} for name in args.sides})
        record = {
            "benchmark": "browser_speed",
            **about,
            "setting": {
                "tasks": list(args.tasks),
                "episodes": args.episodes,
                "slow_episodes": args.slow_episodes,
                "misses": args.misses,
                "seed": args.seed,
            },
            "versions": {name: results[name]["versions"] for name in args.sides},
            **summarise(rounds),
            "rounds": [
                {name: {k: v for k, v in one[name].items() if k != "versions"} for name in args.sides} for one in rounds
            ],
        }
        write_record(record, args.out)
    return record


def print_table(record: Mapping[str, Any]) -> None:
    print(f"\n{'':<44}{'median':>10}{'min':>10}{'max':>10}")
    for key in ("episodes_per_wall_s", "episodes_per_cpu_s", "miss_ms", "ratio_wall", "ratio_cpu"):
        for name, row in record.get(key, {}).items():
            cells = "".join(f"{row[one]:>10,.2f}" for one in ("median", "min", "max"))
            print(f"{f'{key} {name}':<44}{cells}")
    for task, sides in record["calls_ms"].items():
        for name, row in sides.items():
            print(f"{f'{task} {name}':<44}reset {row['reset']['median']:,.1f} ms, step {row['step']['median']:,.1f} ms")


# -- the script --
public_command = functools.partial(command_of, "browser_speed.py")


def browser_version() -> str:
    done = subprocess.run([chromium(), "--version"], capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:2])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed of live browser tasks.")
    parser.add_argument("--sides", nargs="+", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--episodes", type=int, default=BrowserArgs.episodes, help="timed, each task; a multiple of 8")
    parser.add_argument("--slow-episodes", type=int, default=4, help="timed, each task, of browsergym")
    parser.add_argument("--misses", type=int, default=3, help="actions on nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the first round's first episode")
    parser.add_argument("--root", type=Path, default=default_root(), help="peer environments (see peers.py)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "browser_speed.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [LOOP]:
        name, run = parse_browser_args(tuple(OURS), argv[1:])
        warnings.filterwarnings("ignore")
        adopt_orphans()
        print_line(measure(OurPages(name), run))
        return 0
    args = build_parser().parse_args(argv)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        about = {"command": public_command(argv), "date": args.date, "machine": machine(), "browser": browser_version()}
        print_table(compare(args, about))
    except (RuntimeError, ValueError, ImportError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
