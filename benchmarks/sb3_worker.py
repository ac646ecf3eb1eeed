"""Stable-Baselines3's PPO on a MuJoCo task, timed over whole iterations; prints one JSON line.

Runs inside the peer's own environment. :class:`PPOArgs` is what ``control_speed.py`` gives to both sides.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "loops"))

from marl_common import IterationClock, print_line  # noqa: E402

PACKAGES = ("stable_baselines3", "gymnasium", "mujoco", "numpy", "torch")


@dataclass(frozen=True)
class PPOArgs:
    """One run: PPO with separate tanh networks of two layers of 64, a Gaussian policy, normalised observations and
    rewards. An iteration is ``frames`` environment steps and the ``updates`` made from them."""

    environment: str = "Hopper-v5"
    """Gymnasium's name."""
    envs: int = 8
    frames: int = 2048
    """Environment steps of a rollout, over all environments."""
    epochs: int = 10
    minibatches: int = 32
    lr: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    max_grad_norm: float = 0.5
    warmup: int = 2
    iterations: int = 10
    """Timed iterations, after ``warmup`` others."""
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("envs", "frames", "epochs", "minibatches", "warmup", "iterations", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"PPOArgs: {name}: must be >= 1, got {getattr(self, name)}")
        for name in ("envs", "minibatches"):
            if self.frames % getattr(self, name):
                raise ValueError(
                    f"PPOArgs: frames: must be a multiple of {name} ({getattr(self, name)}), got {self.frames}"
                )

    algorithm = "ppo"

    @property
    def updates(self) -> int:
        """Optimiser updates of an iteration."""
        return self.epochs * self.minibatches

    def options(self) -> list[str]:
        """This run as command line."""
        words = ((f"--{one.name.replace('_', '-')}", str(getattr(self, one.name))) for one in fields(self))
        return [word for pair in words for word in pair]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every field of :class:`PPOArgs` as an option."""
    for one in fields(PPOArgs):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)


def parse_ppo_args(argv: list[str] | None = None) -> PPOArgs:
    """Command line of either side; sets the thread count before any work starts."""
    parser = argparse.ArgumentParser(description="One timed PPO run; prints one JSON line.")
    add_options(parser)
    args = PPOArgs(**vars(parser.parse_args(argv)))
    torch.set_num_threads(args.threads)
    return args


def main(args: PPOArgs) -> None:
    """``PPO("MlpPolicy")`` on ``make_vec_env`` and ``VecNormalize``; all that is not in ``args`` is the library's
    default."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    clock = IterationClock(args.warmup, args.iterations)

    class Clock(BaseCallback):
        """A rollout begins where the updates of the one before are done."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                clock.trained()

        def _on_rollout_end(self) -> None:
            clock.collected()

        def _on_training_end(self) -> None:
            clock.trained()

    total = args.frames * (args.warmup + args.iterations)
    env = VecNormalize(
        make_vec_env(args.environment, args.envs, seed=args.seed, vec_env_cls=DummyVecEnv), gamma=args.gamma
    )
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=args.frames // args.envs,
        batch_size=args.frames // args.minibatches,
        n_epochs=args.epochs,
        learning_rate=args.lr,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        device="cpu",
    )
    model.learn(total, callback=Clock())
    updates = max(int(state["step"]) for state in model.policy.optimizer.state.values())  # Adam's own count
    if (model.num_timesteps, updates) != (total, args.updates * (args.warmup + args.iterations)):
        raise RuntimeError(f"sb3: {model.num_timesteps} frames and {updates} updates were made, asked: {args}")
    episodes = [episode["r"] for episode in model.ep_info_buffer or ()]
    print_line(
        clock.line(
            "sb3",
            args,  # pyright: ignore[reportArgumentType]
            parameters=sum(p.numel() for p in model.policy.parameters()),
            last_return=round(sum(episodes) / len(episodes), 2) if episodes else None,
            versions={name: version(name) for name in PACKAGES},
        )
    )


if __name__ == "__main__":
    main(parse_ppo_args())
