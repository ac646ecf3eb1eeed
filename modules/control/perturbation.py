"""Perturbations bounded in size and, if temporally coupled, in their change from step to step (GRAD, section 3)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Norm = Literal["inf", "2"]
Space = Literal["state", "action", "params"]


@dataclass(frozen=True)
class PerturbationSettings:
    """What the adversary may change, and by how much.

    Args:
        space: ``state``: what the agent observes, in units of its normalised observation; ``action``: what is executed,
            in units of the environment's actions; ``params``: the environment's dynamics, relative to nominal.
        norm: of a perturbation: ``inf`` or ``2``.
        eps: largest norm of a perturbation; a list, with ``inf`` only, has one bound for each coordinate.
        eps_bar: largest norm of the difference of consecutive perturbations, where ``coupled``.
        coupled: whether ``eps_bar`` binds.
        first_step: ``free``: an episode's first perturbation may be anything within ``eps``; ``zero``: it is coupled to
            a perturbation of 0 before it.
        clip_executed: clip executed actions to the environment's bounds, after the attack.
        train_share: adversaries in training have this share of ``eps`` and ``eps_bar``, 0: they cannot do anything, and
            the agent trains undisturbed; above 1: more than in evaluation, which always has all of both.

    Raises:
        ValueError: an unknown choice, or a budget that is negative or not finite.
    """

    space: Space = "state"
    norm: Norm = "inf"
    eps: float | list[float] = 0.1
    eps_bar: float | list[float] = 0.02
    coupled: bool = True
    first_step: Literal["free", "zero"] = "free"
    clip_executed: bool = True
    train_share: float = 1.0

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("space", self.space, ("state", "action", "params")),
            ("norm", self.norm, ("inf", "2")),
            ("first_step", self.first_step, ("free", "zero")),
        ):
            if value not in choices:
                raise ValueError(f"PerturbationSettings: {field}: one of {', '.join(choices)}, got {value!r}")
        for field, value, name in (("eps", self.eps, "budget"), ("eps_bar", self.eps_bar, "temporal budget")):
            for number in value if isinstance(value, list) else [value]:
                if not (0 <= number < math.inf):
                    raise ValueError(f"PerturbationSettings: {field}: {name} must be >= 0 and finite, got {number}")
            if isinstance(value, list) and (self.norm != "inf" or not value):
                raise ValueError(f"PerturbationSettings: {field}: a list needs norm inf and an entry, got {value}")
        if not 0 <= self.train_share < math.inf:
            raise ValueError(
                f"PerturbationSettings: train_share must be >= 0 and finite, got {self.train_share}: give the share of "
                "the budget in training"
            )
        bounds, steps = (value if isinstance(value, list) else [value] for value in (self.eps, self.eps_bar))
        count = max(len(bounds), len(steps))
        pairs = zip(bounds * (count // len(bounds)), steps * (count // len(steps)), strict=False)
        if self.coupled and max(bounds) > 0 and all(2 * bound <= step for bound, step in pairs):
            warnings.warn(
                f"PerturbationSettings: eps_bar {self.eps_bar} is at least twice eps {self.eps}: coupling is vacuous",
                stacklevel=2,
            )

    def fingerprint(self) -> dict[str, Any]:
        """What a payoff or an attack was measured under."""
        train = {} if self.train_share == 1.0 else {"train_share": self.train_share}
        return train | {
            "space": self.space,
            "norm": self.norm,
            "eps": self.eps,
            "eps_bar": self.eps_bar,
            "coupled": self.coupled,
            "first_step": self.first_step,
        }


class PerturbationSet:
    """The feasible sets of one task's perturbations: ``F_t = B(0, eps)`` and, coupled, ``B(p_{t-1}, eps_bar)``.

    Args:
        settings: budgets.
        size: coordinates of a perturbation.
        coupled: overrides the settings'.
        share: of both budgets.

    Raises:
        ValueError: a list of budgets of another length.
    """

    def __init__(
        self, settings: PerturbationSettings, size: int, coupled: bool | None = None, share: float = 1.0
    ) -> None:
        for field in ("eps", "eps_bar"):
            value = getattr(settings, field)
            if isinstance(value, list) and len(value) != size:
                raise ValueError(
                    f"PerturbationSettings: {field}: has {len(value)} entries, a perturbation of "
                    f"{settings.space} has {size} here"
                )
        self.settings, self.size = settings, size
        self.coupled = settings.coupled if coupled is None else coupled
        width = size if settings.norm == "inf" else 1
        self.eps = torch.as_tensor(settings.eps, dtype=torch.float32).mul(share).expand(width)
        self.eps_bar = torch.as_tensor(settings.eps_bar, dtype=torch.float32).mul(share).expand_as(self.eps)
        self.empty = not bool((self.eps > 0).any())
        # to distances within this no attention need be paid: rounding
        self.tolerance = 1e-6 * (1.0 + float(self.eps.max()))

    def to(self, device: torch.device | str) -> PerturbationSet:
        self.eps, self.eps_bar = self.eps.to(device), self.eps_bar.to(device)
        return self

    def bounds(self, previous: Tensor, fresh: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Least and greatest value of every coordinate over ``F_t``; with norm inf, ``F_t`` is this box.

        Args:
            previous: ``[..., size]``, the perturbation before.
            fresh: bool ``[...]``, where an episode begins: coupling does not bind there (``free``), or ``previous``
                counts as 0 (``zero``). ``None``: nowhere.
        """
        eps = self.eps.expand_as(previous)
        if not self.coupled:
            return -eps, eps
        anchor, reach = self._anchor(previous, fresh)
        return torch.maximum(-eps, anchor - reach), torch.minimum(eps, anchor + reach)

    def _anchor(self, previous: Tensor, fresh: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centre of the coupling ball and its radius (the whole of ``B(0, eps)`` lies in a free first step's)."""
        reach = self.eps_bar
        if fresh is None:
            return previous, reach
        anchor = previous.masked_fill(fresh.unsqueeze(-1), 0.0)
        if self.settings.first_step == "free":
            reach = torch.where(fresh.unsqueeze(-1), torch.maximum(self.eps, reach), reach)
        return anchor, reach

    def project(self, p: Tensor, previous: Tensor, fresh: Tensor | None = None) -> Tensor:
        """The point of ``F_t`` nearest to ``p`` ``[..., size]`` in the Euclidean norm; differentiable in ``p``."""
        if self.settings.norm == "inf":
            if not self.coupled:
                return torch.minimum(torch.maximum(p, -self.eps), self.eps)
            low, high = self.bounds(previous, fresh)
            return torch.minimum(torch.maximum(p, low), high)
        if not self.coupled:
            return _onto_ball(p, self.eps)
        anchor, reach = self._anchor(previous, fresh)
        return project_two_balls(p, self.eps, anchor, reach)

    def norms(self, p: Tensor) -> Tensor:
        """``[...]``: the norm of each perturbation ``[..., size]``, in its own units."""
        if self.settings.norm == "2":
            return p.norm(dim=-1)
        return p.abs().amax(-1)

    def excess(self, p: Tensor, previous: Tensor, fresh: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[...]`` each: how far ``p`` breaks ``eps``, and how far its change breaks ``eps_bar`` (0: it does not)."""
        over = (p.abs() - self.eps).amax(-1) if self.settings.norm == "inf" else p.norm(dim=-1) - self.eps.squeeze(-1)
        if not self.coupled:
            return over.clamp_min(0.0), torch.zeros_like(over)
        anchor, reach = self._anchor(previous, fresh)
        if self.settings.norm == "inf":
            leap = ((p - anchor).abs() - reach).amax(-1)
        else:
            leap = (p - anchor).norm(dim=-1) - reach.squeeze(-1)
        return over.clamp_min(0.0), leap.clamp_min(0.0)


def _onto_ball(p: Tensor, radius: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    offset = p - centre
    length = offset.norm(dim=-1, keepdim=True)
    return torch.where(length > radius, centre + offset * (radius / length.clamp_min(1e-30)), p)


def project_two_balls(p: Tensor, eps: Tensor, centre: Tensor, reach: Tensor) -> Tensor:
    """The point of ``B(0, eps)`` and ``B(centre, reach)`` nearest to ``p``, in closed form.

    If the projection on one ball lies in the other, it is the answer; else the answer lies on the intersection of the
    spheres: the nearest point of an (n - 2)-sphere around the axis from 0 to ``centre``. Computed in float64, and
    finished by a shrink that keeps rounding inside ``B(0, eps)``: a ``centre`` just outside would make what is feasible
    opposite to it depend on rounding.

    Args:
        p, centre: ``[..., size]``; ``centre`` lies in ``B(0, eps)``.
        eps, reach: ``[..., 1]``, radii.
    """
    dtype = p.dtype
    p, centre, eps, reach = p.double(), centre.double(), eps.double(), reach.double()
    slack = 1e-12
    first, second = _onto_ball(p, eps), _onto_ball(p, reach, centre)
    first_fits = (first - centre).norm(dim=-1, keepdim=True) <= reach + slack
    second_fits = second.norm(dim=-1, keepdim=True) <= eps + slack
    distance = centre.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    axis = centre / distance
    along = (distance.square() + eps.square() - reach.square()) / (2 * distance)  # of the plane that holds both spheres
    along = torch.minimum(torch.maximum(along, -eps), eps)
    radius = (eps.square() - along.square()).clamp_min(0.0).sqrt()
    across = p - (p * axis).sum(-1, keepdim=True) * axis
    width = across.norm(dim=-1, keepdim=True)
    corner = along * axis + across * (radius / width.clamp_min(1e-30))
    nearest = torch.where(first_fits, first, torch.where(second_fits, second, corner))
    rounded = nearest.to(dtype)
    outside = rounded.detach().double().norm(dim=-1, keepdim=True) > eps
    return torch.where(outside, (nearest * (1.0 - torch.finfo(dtype).eps)).to(dtype), rounded)
