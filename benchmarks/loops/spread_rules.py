"""What the package's own ``simple_spread`` does, as one JSON line: a digest of its rules, and its bare speed.

Runs in each environment: PettingZoo 1.24 holds the package as ``pettingzoo.mpe``, later it is ``mpe2``. Equal digests
mean that the same seeds and actions gave the same observations and rewards, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import time
from importlib.metadata import version
from typing import Any

import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
SOURCES = (("mpe2", "mpe2"), ("pettingzoo.mpe", "pettingzoo"))
"""Module and distribution; the first that is there is taken."""


def package() -> tuple[Any, str]:
    """Module of the scenario, and distribution with version.

    Raises:
        ModuleNotFoundError: if neither source is installed.
    """
    for module, distribution in SOURCES:
        try:
            return importlib.import_module(f"{module}.simple_spread_v3"), f"{distribution} {version(distribution)}"
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("spread_rules: neither pettingzoo.mpe nor mpe2 is installed")


def play(env: Any, seed: int, agents: int, steps: int) -> list[bytes]:
    """One episode of ``steps`` random steps: observations and rewards of all agents after each."""
    draws = random.Random(seed)
    seen, _ = env.reset(seed=seed)
    names = list(seen)
    if len(names) != agents:
        raise ValueError(f"spread_rules: {len(names)} agents, {agents} asked")
    found = [np.stack([seen[name] for name in names]).tobytes()]
    for _ in range(steps):
        seen, reward, ended, cut, _ = env.step({name: draws.randrange(5) for name in names})
        found.append(np.stack([seen[name] for name in names]).tobytes())
        found.append(np.array([(reward[name], ended[name], cut[name]) for name in names], np.float64).tobytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Digest of the rules of simple_spread, and its bare speed.")
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    module, name = package()
    env = module.parallel_env(N=args.agents, max_cycles=args.max_steps)
    digest = hashlib.sha256()
    start = time.process_time()
    for seed in range(args.episodes):
        for part in play(env, seed, args.agents, args.max_steps):
            digest.update(part)
    spent = time.process_time() - start
    line = {
        "loop": "spread_rules",
        "package": name,
        "sha256": digest.hexdigest(),
        "steps_per_cpu_s": round(args.episodes * args.max_steps / spent, 1),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
