"""The instance generator and its best response: a flow over nodes, trained by REINFORCE to make instances hard."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modules.networks.node_flow import NodeFlow, flow_members
from modules.objectives.reinforce import standardised


@dataclass(frozen=True)
class GeneratorSettings:
    """The generator and its training.

    Args:
        layers, hidden: of the flow.
        steps: updates of a best response; the flow starts from uniform each time.
        batch_size: instances per update, over all ranks.
        lr, weight_decay: Adam's.
        reward: what makes an instance good: the solver's ``gap`` to the oracle in percent; ``gap_proxy``, the gap of
            one greedy route to the best of all starts and symmetries (no oracle needed); ``cost``, the solver's cost,
            as in the authors' code, which rewards long instances and not hard ones.
        squash: ``sigmoid`` (exact density) or the authors' ``minmax``.
        estimator: ``score``: the score-function gradient; ``official``: the authors', which differentiates through the
            sample path with the log-determinant's sign reversed (theirs goes with ``baseline: none``).
        baseline: ``mean`` of the batch, with advantages divided by their spread; ``none``.
        normalize: ``unit_box``: solvers see instances scaled to the unit square, so that attacks are of shape.
        max_grad_norm: greatest norm of the whole gradient; ``null``: none.

    Raises:
        ValueError: a number out of range, or settings that do not go together.
    """

    layers: int = 4
    hidden: int = 24
    steps: int = 100
    batch_size: int = 1280
    lr: float = 1e-4
    weight_decay: float = 1e-5
    reward: Literal["gap", "gap_proxy", "cost"] = "gap"
    squash: Literal["sigmoid", "minmax"] = "sigmoid"
    estimator: Literal["score", "official"] = "score"
    baseline: Literal["mean", "none"] = "mean"
    normalize: Literal["none", "unit_box"] = "none"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "steps", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"GeneratorSettings: {key} must be >= 1, got {getattr(self, key)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"GeneratorSettings: lr must be > 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"GeneratorSettings: weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"GeneratorSettings: max_grad_norm must be > 0 or null, got {self.max_grad_norm}")
        known = {
            "reward": ("gap", "gap_proxy", "cost"),
            "squash": ("sigmoid", "minmax"),
            "estimator": ("score", "official"),
            "baseline": ("mean", "none"),
            "normalize": ("none", "unit_box"),
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ValueError(
                    f"GeneratorSettings: {key} must be one of {', '.join(values)}, got {getattr(self, key)!r}"
                )
        if self.squash == "minmax" and self.estimator == "score":
            raise ValueError("GeneratorSettings: squash: minmax has no density to score: set estimator: official")


def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Moments to where the parameters are (a checkpoint loads them on the CPU)."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                state[key] = value.to(device)


class GeneratorLearner:
    """A flow in training, its optimiser, and the best weights so far."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self.settings = settings
        self.flow = NodeFlow(settings.layers, settings.hidden, settings.squash)
        self.flow.requires_grad_(False)
        self.optimizer = self._make_optimizer()
        self.best_reward = -float("inf")
        self.best: dict[str, Tensor] = self.member_now()

    def _make_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.flow.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def to(self, device: torch.device) -> None:
        """Move the flow and its optimiser's state."""
        self.flow.to(device)
        move_optimizer(self.optimizer, device)

    def reset(self, generator: torch.Generator) -> None:
        """A new flow, with weights drawn from ``generator`` and a last layer of zeros: uniform instances."""
        with torch.random.fork_rng(devices=[]):
            # the CPU's alone: torch.manual_seed would leave the streams of accelerators changed
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            fresh = NodeFlow(self.settings.layers, self.settings.hidden, self.settings.squash)
        self.flow.load_state_dict(fresh.state_dict())
        self.optimizer = self._make_optimizer()
        self.best_reward = -float("inf")
        self.best = self.member_now()

    # -- instances ----------------------------------------------------------------------------------------------------
    def coordinates(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Instances of the flow in training: ``[B, N, 2]`` of uniform ``noise``; ``generator`` is not drawn from."""
        device = next(self.flow.parameters()).device
        with torch.no_grad():
            return self.flow(noise.to(device)).to(noise.device)

    def member_coordinates(self, members: Mapping[str, Tensor], numbers: Tensor, noise: Tensor) -> Tensor:
        """Instances ``[B, N, 2]``, number b of the stored flow ``numbers[b]``."""
        return flow_members(self.flow, members, numbers, noise)

    def densities(self, members: Mapping[str, Tensor], side: int, points: int = 40_000) -> Tensor:
        """``[M, side, side]``: where stored flows put their points (histogram, mean 1); x along the first axis."""
        count = len(next(iter(members.values())))
        noise = torch.rand(1, points, 2, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1)
        located = self.member_coordinates(members, torch.arange(count), noise)
        cells = (located * side).long().clamp(0, side - 1)
        flat = cells[..., 0] * side + cells[..., 1] + torch.arange(count).unsqueeze(1) * side * side
        counts = torch.bincount(flat.flatten(), minlength=count * side * side)
        return counts.view(count, side, side) * (side * side / points)

    def uniform_member(self) -> dict[str, Tensor]:
        """A flow that leaves uniform points as they are."""
        return {name: torch.zeros_like(value, device="cpu") for name, value in self.flow.state_dict().items()}

    def member_now(self) -> dict[str, Tensor]:
        """The flow in training, as it is."""
        return {name: value.detach().cpu().clone() for name, value in self.flow.state_dict().items()}

    def member(self) -> dict[str, Tensor]:
        """The flow at its highest batch-mean reward."""
        return {name: value.clone() for name, value in self.best.items()}

    # -- training -----------------------------------------------------------------------------------------------------
    def step(
        self, locs: Tensor, noise: Tensor, reward: Tensor, all_sum: Callable[[Tensor], Tensor] = lambda value: value
    ) -> dict[str, float]:
        """One update from this rank's instances.

        Args:
            locs: ``[b, N, 2]``, as :meth:`coordinates` made them; noise: ``[b, N, 2]``, what it made them of.
            reward: ``[b]``; instances without one (NaN: their oracle's cost is 0) are left out.
            all_sum: sums over ranks; called twice.

        Returns: means over the instances of all ranks that have a reward: ``reward``, ``log_density``; and
        ``grad_norm`` (before it is clipped) and ``left_out``, how many have none.

        Raises:
            ValueError: shapes that differ, no instance has a reward, or the gradient is not finite.
        """
        settings = self.settings
        if locs.shape != noise.shape or reward.shape != locs.shape[:1]:
            raise ValueError(
                "GeneratorLearner: locs and noise must be [b, N, 2] and reward [b], got "
                f"{tuple(locs.shape)}, {tuple(noise.shape)} and {tuple(reward.shape)}"
            )
        device = next(self.flow.parameters()).device
        valid = reward.isfinite().to(device)
        value = reward.to(device, torch.float64).where(valid, 0.0)
        sums = torch.stack([value.sum(), value.square().sum(), valid.sum().double(), (~valid).sum().double()])
        total, squares, count, left_out = all_sum(sums).tolist()
        if not count:
            raise ValueError(
                "GeneratorLearner: no instance of the batch has a reward: all reference costs are 0 or unknown; the "
                "generator has collapsed to a point (set a smaller generator.lr) or the datamodule has no oracle"
            )
        mean = total / count
        advantage = value
        if settings.baseline == "mean":
            spread = max(0.0, squares / count - mean * mean) ** 0.5
            advantage = standardised(value, value.new_tensor(mean), value.new_tensor(spread))
        advantage = advantage.where(valid, 0.0).to(locs.dtype)
        if mean > self.best_reward:  # of the weights that made this batch
            self.best_reward, self.best = mean, self.member_now()
        parameters = list(self.flow.parameters())
        self.flow.requires_grad_(True)
        try:
            if settings.estimator == "score":
                log_density = self.flow.log_prob(locs.detach().to(device)).sum(-1)
            else:  # log p_z = 0 plus log |dx / dz|, through the samples
                log_density = self.flow.transform(noise.to(device))[1].sum(-1)
            loss = -(advantage * log_density).sum() / count
            # the official term does not hold the last shifts
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        finally:
            self.flow.requires_grad_(False)
        shown = (log_density.detach().double().where(valid, 0.0).sum() / count).reshape(1)
        flat = all_sum(torch.cat([*(gradient.flatten().double() for gradient in gradients), shown]))
        flat, shown = flat[:-1], flat[-1]
        norm = flat.norm()
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"GeneratorLearner: the generator's gradient is {float(norm)}: set a smaller generator.lr, or "
                "generator.max_grad_norm"
            )
        if settings.max_grad_norm is not None:
            flat = flat * (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"reward": mean, "log_density": float(shown), "grad_norm": float(norm), "left_out": left_out}

    # -- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "flow": self.member_now(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "best_reward": self.best_reward,
            "best": self.member(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back :meth:`state_dict`.

        Raises:
            ValueError: the state is of a flow of other sizes.
        """
        mine = {name: tuple(value.shape) for name, value in self.flow.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in state["flow"].items()}
        if mine != theirs:
            raise ValueError(
                "GeneratorLearner: the checkpoint's flow has other layers or another hidden width: keep "
                "generator.layers and generator.hidden as they were"
            )
        self.flow.load_state_dict(state["flow"])
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_reward = float(state["best_reward"])
        self.best = {name: value.clone() for name, value in state["best"].items()}
