"""Environment steps a second of the batched multi-agent environments against the packages they follow, one thread.

All sides play uniformly random actions drawn beforehand and start a new episode where one ends. Ours steps through
``step_and_maybe_reset``, as TorchRL's collectors do, and through ``advance``, ``observe`` and ``restart`` of the
finished rows; a package by its own ``reset`` and ``step``, one environment in a Python loop. Everything runs in this
process, interleaved round by round. See README.md beside this file.

    python benchmarks/marl_env_speed.py
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MKL_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from game_speed import Work, measure, summarise  # noqa: E402
from torch import Tensor  # noqa: E402
from train_tokens import _own_versions, machine  # noqa: E402

from datamodules.envs.base import GROUP, MultiAgentEnv  # noqa: E402
from datamodules.envs.tasks import make_env  # noqa: E402
from modules.files import atomic_write  # noqa: E402
from modules.optional import require  # noqa: E402

POOL = 32
"""Joint actions drawn beforehand and played over and over."""
RAW_STEPS = 100
BATCH_STEPS = 4
"""Steps between looks at the clock."""


@dataclass(frozen=True)
class RawEnv:
    """One environment of a package, in its own API.

    ``reset()`` starts an episode; ``step(actions)`` plays one action an agent and says whether the episode is over.
    ``agents``, ``actions``, ``features``: counts of agents, of actions an agent and of features an agent observes.
    """

    reset: Callable[[], Any]
    step: Callable[[Sequence[int]], bool]
    agents: int
    actions: int
    features: int


# -- the packages --
def raw_foraging(task: str) -> RawEnv:
    return _gym_like(require("gymnasium", extra="marl"), "lbforaging", f"Foraging-{task}-v3")


def raw_warehouse(task: str) -> RawEnv:
    return _gym_like(require("gymnasium", extra="marl"), "rware", f"rware-{task}-v2")


def _gym_like(gymnasium: Any, package: str, name: str) -> RawEnv:
    require(package, extra="marl")  # registers its ids
    env = gymnasium.make(name, disable_env_checker=True).unwrapped  # without Gymnasium's wrappers: faster

    def step(actions: Sequence[int]) -> bool:
        _, _, done, truncated, _ = env.step(actions)
        return done or truncated

    observation, _ = env.reset(seed=0)
    return RawEnv(env.reset, step, len(observation), int(env.action_space[0].n), len(observation[0]))


def raw_spread(task: str) -> RawEnv:
    module = require("mpe2.simple_spread_v3", extra="marl")
    env = module.parallel_env(N=int(task.removeprefix("spread-")), max_cycles=25)
    observations, _ = env.reset(seed=0)
    names = list(observations)

    def step(actions: Sequence[int]) -> bool:
        env.step(dict(zip(names, actions, strict=True)))
        return not env.agents

    return RawEnv(env.reset, step, len(names), int(env.action_space(names[0]).n), len(observations[names[0]]))


PACKAGES: dict[str, Callable[[str], RawEnv] | None] = {
    "lbf": raw_foraging,
    "rware": raw_warehouse,
    "mpe": raw_spread,
    "bpush": None,
}
"""Family of tasks -> maker of its package's environment; boulder pushing has no package."""
DISTRIBUTIONS = ("lbforaging", "rware", "mpe2", "gymnasium", "pettingzoo")
TASKS = (
    "lbf/8x8-2p-2f-coop",
    "lbf/10x10-4p-4f-coop",
    "rware/tiny-2ag",
    "rware/tiny-4ag",
    "rware/small-4ag",
    "mpe/spread-3",
    "bpush/8x8-2ag",
)
SIZES = (1, 64, 256, 1024, 4096)


# -- one unit is one step of one environment --
def raw_work(env: RawEnv, steps: int = RAW_STEPS, seed: int = 0) -> Work:
    """Plays ``steps`` steps of a package's environment, starting episodes as they end."""
    draws = random.Random(seed)
    pool = itertools.cycle([[draws.randrange(env.actions) for _ in range(env.agents)] for _ in range(997)])
    env.reset()

    def work() -> int:
        for actions in itertools.islice(pool, steps):
            if env.step(actions):
                env.reset()
        return steps

    return work


def action_pool(env: MultiAgentEnv, seed: int = 0) -> Iterator[Tensor]:
    """Endless joint actions ``[envs, agents]``."""
    generator = torch.Generator(device=env.device).manual_seed(seed)
    shape = (POOL, env.envs, env.num_agents)
    return itertools.cycle(torch.randint(env.num_actions, shape, generator=generator, device=env.device).unbind())


def stagger(env: MultiAgentEnv, seed: int = 0) -> None:
    """Start all episodes, each at an age of its own, so that some end at every step from the first on."""
    env.restart()
    generator = torch.Generator(device=env.device).manual_seed(seed)
    env.elapsed.copy_(torch.randint(env.episode_limit, (env.envs,), generator=generator, device=env.device))


def direct_work(env: MultiAgentEnv, steps: int = BATCH_STEPS) -> Work:
    """Plays ``steps`` steps of every copy without TensorDicts, up to the observations to act on next."""
    pool = action_pool(env)

    def work() -> int:
        for actions in itertools.islice(pool, steps):
            _, terminated, truncated = env.advance(actions)
            seen = env.observe()
            rows = (terminated | truncated).nonzero().squeeze(1)
            if len(rows):
                env.restart(rows)
                for old, new in zip(seen, env.observe(rows), strict=True):
                    old.index_copy(0, rows, new)
        return steps * env.envs

    return work


def torchrl_work(
    env: MultiAgentEnv, steps: int = BATCH_STEPS, prepare: Callable[[MultiAgentEnv], None] = stagger
) -> Work:
    """Plays ``steps`` steps of every copy by TorchRL's ``step_and_maybe_reset``."""
    pool = action_pool(env)
    carrier = env.reset()
    prepare(env)

    def work() -> int:
        nonlocal carrier
        for actions in itertools.islice(pool, steps):
            carrier.set((GROUP, "action"), actions)
            _, carrier = env.step_and_maybe_reset(carrier)
        return steps * env.envs

    return work


def check_interface(task: str, raw: RawEnv, env: MultiAgentEnv) -> None:
    """Raises: ValueError if the two sides are not the same task as far as shapes tell."""
    theirs = (raw.agents, raw.actions, raw.features)
    ours = (env.num_agents, env.num_actions, env.observation_size)
    if theirs != ours:
        raise ValueError(f"marl_env_speed: {task}: agents, actions and features are {ours} here, {theirs} there")


def task_section(task: str, sizes: Sequence[int], rounds: int, budget: float, together: bool) -> dict[str, Any]:
    """Steps a second of one task at each number of environments, and the package's.

    Args:
        task: id as in ``datamodules.envs.tasks``.
        sizes: environments side by side.
        rounds, budget: see ``game_speed.measure``.
        together: all episodes start at once, instead of each at an age of its own.
    """
    family, _, name = task.partition("/")
    make_raw = PACKAGES[family]
    works: dict[str, Work] = {}
    if make_raw is not None:
        raw = make_raw(name)
        check_interface(task, raw, _tensor_env(task, 1))
        works["package"] = raw_work(raw)
    prepare: Callable[[MultiAgentEnv], None] = MultiAgentEnv.restart if together else stagger
    for size in sizes:
        env = _tensor_env(task, size)
        prepare(env)
        works[f"direct_{size}"] = direct_work(env)
        works[f"torchrl_{size}"] = torchrl_work(_tensor_env(task, size), prepare=prepare)
    reference = next(iter(works))
    section = summarise(measure(works, rounds, budget), reference, rate=True)
    print(
        f"\n{task}{'' if make_raw else ' (no package)'}\n{'':<16}{'steps/CPU-s':>14}{'x ' + reference:>14}", flush=True
    )
    for way, row in section.items():
        print(f"{way:<16}{row['per_cpu_s']:>14,.0f}{row['speedup']:>14.4g}", flush=True)
    return section if make_raw else {way: _without_ratio(row) for way, row in section.items()}


def _without_ratio(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("speedup")}


def _tensor_env(task: str, size: int) -> MultiAgentEnv:
    env = make_env(task, size, seed=0)
    if not isinstance(env, MultiAgentEnv):
        raise ValueError(f"marl_env_speed: '{task}' has no tensor environment")
    return env


# -- the script --
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Steps a second of multi-agent environments, one thread, interleaved.")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(PACKAGES)}; tensor environments"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="environments side by side")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a work is repeated for in a round")
    parser.add_argument("--together", action="store_true", help="all episodes start at once (default: staggered ages)")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="date written into the result")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "marl_env_speed.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    unknown = [task for task in args.tasks if task.partition("/")[0] not in PACKAGES]
    if unknown:
        print(f"marl_env_speed: --tasks: families are {', '.join(PACKAGES)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")  # the packages warn of their own dependencies
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "benchmark": "marl_env_speed",
        "command": " ".join(["python benchmarks/marl_env_speed.py", *argv]).split(" --out")[0],
        "date": args.date,
        "machine": machine(),
        "versions": {**_own_versions(), **{name: version(name) for name in DISTRIBUTIONS}},
        "threads": 1,
        "rounds": args.rounds,
        "episodes": "together" if args.together else "staggered",
        "unit": "steps of one environment (all agents act once)",
    }
    try:
        with torch.no_grad():
            record["tasks"] = {
                task: task_section(task, args.sizes, args.rounds, args.budget, args.together) for task in args.tasks
            }
    except (RuntimeError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    with atomic_write(args.out, "w") as stream:
        stream.write(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
