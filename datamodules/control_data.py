"""Continuous-control environments as data: rollouts that the module in training asks for, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.envs.control.base import ControlEnv
from datamodules.envs.control.tasks import make_control_env
from datamodules.rollout.control import ControlStream, play_episodes
from datamodules.rollout.loaders import evaluation_loader, training_loader
from modules.contracts import EpisodesRequest, EvaluatesAttacks, RequestsRollouts, RolloutRequest
from modules.seeds import global_seed, stream_seed

_ENVIRONMENT = 84  # what a random stream is for


class _Batches(Dataset):
    """The rollouts of the whole run, each made when it is asked for; which one it is the module knows."""

    def __init__(self, data: ControlDataModule) -> None:
        self.data = data

    def __len__(self) -> int:  # sized, or the loader would fetch one batch ahead, collected by the policy before
        return self.data.learner().total_steps

    def __getitem__(self, index: int) -> TensorDict:
        request = self.data.learner().rollout_request()
        return TensorDict({}, []) if request is None else self.data.rollout(request)


class _Evaluations(Dataset):
    def __init__(self, data: ControlDataModule, stage: str) -> None:
        self.data, self.stage = data, stage

    def __len__(self) -> int:
        return len(self.data.evaluator().evaluation_names(self.stage))

    def __getitem__(self, index: int) -> TensorDict:
        return TensorDict({"index": torch.tensor(index)}, [])


class ControlDataModule(LightningDataModule):
    """Copies of one control task, stepped by whatever actor the module in training asks for.

    Counts are over all ranks and are divided among them. The exact position of all environments is in the checkpoint.

    Args:
        task: see :func:`datamodules.envs.control.tasks.known_tasks`, or ``gym/<id>``.
        options: constructor arguments of the environment.
        envs: parallel environments.
        frames_per_batch: environment steps of a rollout; a multiple of ``envs``.
        env_device: where tensor environments live; ``null``: with the module.
        reference_return: of a very good policy, undisturbed, by which assurance scales returns; ``null``: the task's
            optimum or hand-made controller, where it has one.

    Raises:
        ValueError: a count out of range or not shared equally by the ranks, or an unknown task (with the nearest
            names).
    """

    def __init__(
        self,
        task: str,
        options: dict[str, Any] | None = None,
        envs: int = 8,
        frames_per_batch: int = 2048,
        env_device: str | None = None,
        reference_return: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("envs", envs), ("frames_per_batch", frames_per_batch)):
            if value < 1:
                raise ValueError(f"ControlDataModule: {name} must be >= 1, got {value}")
        if frames_per_batch % envs:
            raise ValueError(
                f"ControlDataModule: frames_per_batch must be a multiple of envs ({envs}), got {frames_per_batch}"
            )
        self.task, self.options = task, dict(options or {})
        self.envs, self.frames_per_batch, self.env_device = envs, frames_per_batch, env_device
        self.world_size, self.rank = 1, 0
        self.reference_return = reference_return
        self._streams: dict[str, ControlStream] = {}
        self._own: dict[str, ControlStream] = {}
        self._waiting: dict[str, Any] = {}
        self._evaluation_envs: dict[int, ControlEnv] = {}
        self._made = False

    def setup(self, stage: str) -> None:
        if self._made:
            return
        if self.trainer is not None:
            self.world_size, self.rank = self.trainer.world_size, self.trainer.global_rank
        if self.envs % self.world_size:
            raise ValueError(
                f"ControlDataModule: envs must be a multiple of the {self.world_size} ranks, got {self.envs}"
            )
        probe = self._make(1)
        self.spec = probe.control_spec
        if self.reference_return is None:
            self.reference_return = probe.best_return
        self._reference = probe.reference_action
        rank_zero_info(f"ControlDataModule: {self.task}: {probe.how}")
        probe.close(raise_if_closed=False)
        self._made = True

    @property
    def nan_resets(self) -> int:
        """Episodes of this rank's training environments that ended because the simulation failed."""
        return sum(int(getattr(one.env, "nan_resets", 0)) for one in self._streams.values())

    def _make(self, envs: int) -> ControlEnv:
        device = self.env_device
        if device is None:
            device = str(self.trainer.strategy.root_device) if self.trainer is not None else "cpu"
        seed = stream_seed(global_seed(), _ENVIRONMENT, self.rank)
        return make_control_env(self.task, envs, options=self.options, device=device, seed=seed)

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    @property
    def _device(self) -> torch.device:
        return cast(torch.device, self._module.device) if self._module is not None else torch.device("cpu")

    def learner(self) -> RequestsRollouts:
        """The module in training. Raises: ValueError: if it does not say which rollouts it needs."""
        if not isinstance(self._module, RequestsRollouts):
            raise ValueError(
                f"ControlDataModule: {type(self._module).__name__} does not learn from control rollouts: use "
                "modules.grad.GRAD, a baseline such as modules.baselines.PPO, or a module with rollout_request()"
            )
        return self._module

    def evaluator(self) -> EvaluatesAttacks:
        """The module in evaluation. Raises: ValueError: if it does not say what is to be evaluated."""
        if not isinstance(self._module, EvaluatesAttacks):
            raise ValueError(f"ControlDataModule: {type(self._module).__name__} has no evaluation_names()")
        return self._module

    def digest(self) -> Mapping[str, str]:
        return {"task": self.task, "options": str(sorted(self.options.items())), "envs": str(self.envs)}

    def describe(self) -> Mapping[str, str]:
        return {
            "observation": "[envs, steps, observation_size] float32, and next_observation",
            "reward": "[envs, steps] float32",
            "terminated": "[envs, steps] bool, and truncated, fresh",
            "and": "what the actor records, [envs, steps, ...]",
        }

    def train_dataloader(self) -> DataLoader:
        return training_loader(_Batches(self))

    def val_dataloader(self) -> DataLoader:
        return evaluation_loader(_Evaluations(self, "val"))

    def test_dataloader(self) -> DataLoader:
        return evaluation_loader(_Evaluations(self, "test"))

    def reference_action(self, observation: Tensor) -> Tensor | None:
        """See :class:`~modules.contracts.ScalesReturns`."""
        return self._reference(observation)

    # -- rollouts -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def rollout(self, request: RolloutRequest) -> TensorDict:
        """See :class:`~modules.contracts.ProvidesRollouts`."""
        if request.seed is not None:
            if request.stream not in self._own:
                self._own[request.stream] = ControlStream(self._make(self.envs), 0, self.envs, self._device)
            return self._own[request.stream].collect(request, self.frames_per_batch // self.envs)
        share = self.envs // self.world_size
        if request.stream not in self._streams:
            env = self._make(share)
            self._streams[request.stream] = made = ControlStream(env, self.rank * share, self.envs, self._device)
            if request.stream in self._waiting:
                made.load_state_dict(self._waiting.pop(request.stream))
        return self._streams[request.stream].collect(request, self.frames_per_batch // self.envs)

    @torch.no_grad()
    def episodes(self, request: EpisodesRequest) -> TensorDict:
        """See :class:`~modules.contracts.ProvidesRollouts`.

        Raises:
            ValueError: episodes that the ranks cannot share equally.
        """
        world = 1 if request.seed is not None else self.world_size
        if request.episodes % world:
            raise ValueError(
                f"ControlDataModule: episodes must be a multiple of the {self.world_size} ranks, got {request.episodes}"
            )
        copies = request.groups * request.episodes // world
        if copies not in self._evaluation_envs:
            for env in self._evaluation_envs.values():  # one at a time: payoff tables ask for many sizes
                env.close(raise_if_closed=False)
            self._evaluation_envs = {copies: self._make(copies)}
        return play_episodes(self._evaluation_envs[copies], request, self.rank, self.world_size, self._device)

    # -- exact position -----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task, "envs": self.envs, "frames_per_batch": self.frames_per_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("task", "envs", "frames_per_batch"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"ControlDataModule: {name}: the checkpoint has {state_dict[name]}, the config "
                    f"{getattr(self, name)}: keep them equal"
                )

    def rank_state_dict(self) -> dict[str, Any]:
        return {**self._waiting, **{name: one.state_dict() for name, one in self._streams.items()}}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waiting = dict(state_dict)  # each is put back when its stream is asked for

    def teardown(self, stage: str) -> None:
        for one in (*self._streams.values(), *self._own.values()):
            one.env.close(raise_if_closed=False)
        for env in self._evaluation_envs.values():
            env.close(raise_if_closed=False)
        self._streams, self._own, self._evaluation_envs = {}, {}, {}
