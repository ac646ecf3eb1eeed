"""What an agent and an adversary are made of: networks, normaliser statistics, and how members are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.contracts import ControlSpec
from modules.control.perturbation import PerturbationSettings
from modules.control.policy import Body, GaussianPolicy, MemorySettings

OBSERVATION_CLIP = 10.0
"""Normalised observations are clipped to this many standard deviations."""

AdversaryKind = Literal["direct", "temporal_delta", "pa_ad", "nr", "pr"]


@dataclass(frozen=True)
class AdversarySettings:
    """How a learned adversary's output becomes a perturbation (GRAD; SA-RL, Zhang et al. 2021; PA-AD, Sun et al. 2022).

    Args:
        kind: ``direct``: the perturbation itself, as a share of ``eps``; ``temporal_delta``: its change, as a share of
            ``eps_bar``; ``pa_ad``: a direction in which the agent's action shall go, that a gradient step on the
            observation follows; ``nr``, ``pr``: an action that is mixed into the agent's, or replaces it at random
            (Tessler et al. 2019), without budget.
        observe_previous: whether the adversary sees the perturbation before; needed for the Markov property if coupled.
        hidden: widths of hidden layers.
        init_std: standard deviation at the start, in shares of the budget.
        steps: the start noise of ``pa_ad`` is eps over this.
        alpha: share of the adversary's action (``nr``) or its probability (``pr``).

    Raises:
        ValueError: an unknown kind, or a number out of range.
    """

    kind: AdversaryKind = "direct"
    observe_previous: bool = True
    hidden: tuple[int, ...] = (64, 64)
    init_std: float = 1.0
    steps: int = 10
    alpha: float = 0.1

    def __post_init__(self) -> None:
        kinds = ("direct", "temporal_delta", "pa_ad", "nr", "pr")
        if self.kind not in kinds:
            raise ValueError(f"AdversarySettings: kind: one of {', '.join(kinds)}, got {self.kind!r}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"AdversarySettings: hidden: needs widths >= 1, got {list(self.hidden)}")
        if not self.init_std > 0:
            raise ValueError(f"AdversarySettings: init_std must be > 0, got {self.init_std}")
        if self.steps < 1:
            raise ValueError(f"AdversarySettings: steps must be >= 1, got {self.steps}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"AdversarySettings: alpha must be in [0, 1], got {self.alpha}")

    @property
    def mixes(self) -> bool:
        return self.kind in ("nr", "pr")


def perturbation_size(settings: PerturbationSettings, spec: ControlSpec) -> int:
    """Coordinates of a perturbation.

    Raises:
        ValueError: dynamics parameters of a task that has none to change, or actions that are discrete.
    """
    if settings.space == "state":
        return spec.observation_size
    if settings.space == "params":
        if not spec.parameters:
            raise ValueError(
                f"PerturbationSettings: space: params needs dynamics parameters that can change, {spec.task} has none: "
                "use state or action"
            )
        return len(spec.parameters)
    if spec.discrete:
        raise ValueError(f"PerturbationSettings: space: action needs continuous actions, those of {spec.task} are not")
    return spec.action_size


class PlayerNetworks:
    """A policy and a critic on the same inputs.

    Args:
        inputs: features of both.
        outputs: of the policy.
        hidden: widths of hidden layers.
        recurrent: LSTMs.
        init_std: of the policy, at the start.
        observation_size: coordinates that the normaliser looks at.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: list[int], recurrent: bool, init_std: float, observation_size: int
    ) -> None:
        self.policy = GaussianPolicy(inputs, hidden, outputs, recurrent, init_std)
        self.value = Body(inputs, hidden, 1, recurrent, output_gain=1.0)
        self.inputs, self.outputs, self.observation_size = inputs, outputs, observation_size
        self.recurrent = recurrent

    def null_member(self) -> dict[str, Tensor]:
        """A member of zeros that does nothing, with statistics that change nothing."""
        nets = {"policy": self.policy.shapes, "value": self.value.shapes}
        member = {f"{net}.{name}": torch.zeros(shape) for net, shapes in nets.items() for name, shape in shapes.items()}
        size = self.observation_size
        return {**member, "mean": torch.zeros(size), "std": torch.ones(size), "active": torch.zeros(())}


def agent_networks(
    spec: ControlSpec, memory: MemorySettings, hidden: tuple[int, ...], init_std: float
) -> PlayerNetworks:
    """Raises: ValueError: discrete actions."""
    if spec.discrete:
        raise ValueError(
            f"PPO: the actions of {spec.task} are discrete, the policy is Gaussian: take a continuous task"
        )
    inputs = memory.features(spec.observation_size, spec.action_size)
    recurrent = memory.kind == "lstm"
    return PlayerNetworks(inputs, spec.action_size, list(hidden), recurrent, init_std, spec.observation_size)


def adversary_networks(
    spec: ControlSpec, settings: AdversarySettings, perturbation: PerturbationSettings
) -> PlayerNetworks:
    """Raises: ValueError: a kind of adversary that does not go with what it may perturb."""
    if settings.kind == "pa_ad" and perturbation.space != "state":
        raise ValueError(
            f"AdversarySettings: kind: pa_ad perturbs observations through the policy's gradient, space is "
            f"{perturbation.space}: use direct or temporal_delta"
        )
    if settings.mixes and perturbation.space != "action":
        raise ValueError(
            f"AdversarySettings: kind: {settings.kind} mixes actions, space is {perturbation.space}: set it to action"
        )
    size = perturbation_size(perturbation, spec)
    inputs = spec.observation_size + (size if settings.observe_previous else 0)
    outputs = spec.action_size if settings.kind == "pa_ad" or settings.mixes else size
    return PlayerNetworks(inputs, outputs, list(settings.hidden), False, settings.init_std, spec.observation_size)


def part(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries named ``<prefix>.<name>``, by their names."""
    return {key.removeprefix(f"{prefix}."): value for key, value in params.items() if key.startswith(f"{prefix}.")}
