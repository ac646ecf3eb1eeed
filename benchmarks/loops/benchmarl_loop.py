"""BenchMARL's own training loop: ``Experiment.run`` with IQL, VDN or QMIX on ``simple_spread`` of VMAS or PettingZoo.

Evaluation, loggers, JSON and checkpoints are off. Everything else is what ``Experiment`` does by itself: its
collector, replay buffer, losses and target updater.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarl.algorithms import IqlConfig, QmixConfig, VdnConfig
from benchmarl.environments import PettingZooTask, VmasTask
from benchmarl.environments.common import TaskClass
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.experiment.callback import Callback
from benchmarl.models.mlp import MlpConfig
from marl_common import IterationClock, MarlArgs, parse_marl_args, print_line

PACKAGES = ("benchmarl", "vmas", "pettingzoo", "torchrl", "tensordict", "torch")
WARNINGS = (
    "No episode terminated this iteration",  # iterations may be shorter than an episode
    "PettingZoo failed to load all modules",  # of which only the particles are installed and needed
    r"\w+ environments failed to load with error message",
)


class Clock(Callback):
    """Tells the clock where iterations end; BenchMARL pickles its callbacks, so this one can be pickled."""

    def __init__(self, warmup: int, iterations: int) -> None:
        super().__init__()
        self.clock = IterationClock(warmup, iterations)
        self.losses: list[float] = []

    def on_batch_collected(self, batch: Any) -> None:
        self.clock.collected()
        self.frames = batch.numel()

    def on_train_end(self, training_td: Any, group: str) -> None:
        self.clock.trained()
        self.updates = len(training_td)
        self.losses.append(training_td["loss"].mean().item())


class TensorTask(TaskClass):
    """Plumbline's tensor environment as a BenchMARL task."""

    def get_env_fun(self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any) -> Callable[[], Any]:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from datamodules.envs.particles import Spread

        return lambda: Spread(num_envs, **copy.deepcopy(self.config), device=device, seed=seed or 0)

    def supports_continuous_actions(self) -> bool:
        return False

    def supports_discrete_actions(self) -> bool:
        return True

    def has_render(self, env: Any) -> bool:
        return False

    def max_steps(self, env: Any) -> int:
        return env.episode_limit

    def group_map(self, env: Any) -> dict[str, list[str]]:
        return env.group_map

    def state_spec(self, env: Any) -> None:
        return None  # the observations side by side, as for VMAS

    def action_mask_spec(self, env: Any) -> None:
        return None

    def observation_spec(self, env: Any) -> Any:
        spec = env.full_observation_spec_unbatched.clone()
        del spec["state"]
        del spec["agents", "action_mask"]
        return spec

    def info_spec(self, env: Any) -> None:
        return None

    def action_spec(self, env: Any) -> Any:
        return env.full_action_spec_unbatched

    @staticmethod
    def env_name() -> str:
        return "plumbline"


def make_task(args: MarlArgs) -> TaskClass:
    """Raises: ValueError for a task that BenchMARL does not have."""
    if args.environment == "lbf":
        raise ValueError("benchmarl: environment: vmas, tensor or pettingzoo, got 'lbf'")
    if args.environment == "tensor":
        return TensorTask("spread", {"agents": args.agents, "episode_limit": args.max_steps})
    if args.environment == "pettingzoo":
        task = PettingZooTask.SIMPLE_SPREAD.get_from_yaml()
        task.config = {**task.config, "N": args.agents, "max_cycles": args.max_steps}
        return task
    task = VmasTask.SIMPLE_SPREAD.get_from_yaml()
    task.config = {"max_steps": args.max_steps, "obs_agents": True, "n_agents": args.agents}
    return task


def make_config(args: MarlArgs, folder: str) -> ExperimentConfig:
    """BenchMARL's defaults but for sizes, optimiser, target rule and what the comparison switches off."""
    config = ExperimentConfig.get_from_yaml()
    changes = {
        "prefer_continuous_actions": False,
        "gamma": args.gamma,
        "lr": args.lr,
        "adam_eps": 1e-8,
        "clip_grad_val": args.clip,
        "soft_target_update": not args.target_every,
        "hard_target_update_frequency": args.target_every or 1,
        "max_n_frames": None,
        "max_n_iters": args.total_iterations,
        "off_policy_collected_frames_per_batch": args.frames,
        "off_policy_n_envs_per_worker": args.envs,
        "off_policy_n_optimizer_steps": args.updates,
        "off_policy_train_batch_size": args.batch,
        "off_policy_memory_size": args.memory,
        "exploration_anneal_frames": args.frames * args.total_iterations,
        "evaluation": False,
        "render": False,
        "evaluation_episodes": 1,
        "loggers": [],
        "create_json": False,
        "save_folder": folder,
    }
    for name, value in changes.items():
        if not hasattr(config, name):
            raise RuntimeError(f"benchmarl: its experiment config has no '{name}'; the pins have moved")
        setattr(config, name, value)
    return config


def make_algorithm(args: MarlArgs) -> Any:
    if args.algorithm == "qmix":
        return QmixConfig(mixing_embed_dim=args.mixing, delay_value=True, loss_function="l2")
    return {"iql": IqlConfig, "vdn": VdnConfig}[args.algorithm](delay_value=True, loss_function="l2")


def main(args: MarlArgs) -> None:
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    clock = Clock(args.warmup, args.iterations)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        experiment = Experiment(
            task=make_task(args),
            algorithm_config=make_algorithm(args),
            model_config=MlpConfig(
                num_cells=list(args.hidden), layer_class=torch.nn.Linear, activation_class=torch.nn.ReLU
            ),
            seed=args.seed,
            config=make_config(args, folder),
            callbacks=[clock],
        )
        experiment.run()
    if (clock.frames, clock.updates) != (args.frames, args.updates):
        raise RuntimeError(f"benchmarl: {clock.frames} frames and {clock.updates} updates an iteration, asked: {args}")
    (group,) = experiment.group_map
    env_spec = experiment.observation_spec[group, "observation"]
    print_line(
        clock.clock.line(
            "benchmarl",
            args,
            parameters=sum(p.numel() for p in experiment.losses[group].parameters()),
            observation=env_spec.shape[-1],
            actions=experiment.action_spec[group, "action"].space.n,
            losses=[round(loss, 5) for loss in (clock.losses[0], clock.losses[-1])],
            versions={name: version(name) for name in PACKAGES},
        )
    )


if __name__ == "__main__":
    main(parse_marl_args())
