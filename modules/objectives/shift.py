"""Training objectives over groups (domains, environments): one number from the groups' losses ``[G]``.

Cross-distribution aggregation of Ji et al. 2023 (arXiv 2310.19852, section on learning under distribution shift):

- ``erm``: the mean;
- ``dro``: group DRO (Sagawa et al. 2020, arXiv 1911.08731, algorithm 1);
- ``cvar``: the mean of the worst share of groups (Rockafellar and Uryasev 2000);
- ``rex``: V-REx, a penalty on the variance (Krueger et al. 2021, arXiv 2003.00688, section 3);
- ``irm``: IRMv1, a penalty on the gradient of a dummy scale (Arjovsky et al. 2019, arXiv 1907.02893, section 3).

The papers of V-REx and IRM sum losses over groups where we take means. So ``beta`` is V-REx's divided by the number of
groups; ``penalty`` is IRM's, which sums its penalties too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["erm", "dro", "cvar", "rex", "irm"]

ScaledLosses = Callable[[Tensor], Tensor]
"""Dummy scales ``[G]`` of the groups' outputs to the groups' losses ``[G]``; loss g depends on scale g alone."""


def erm(losses: Tensor, shares: Tensor | None = None) -> Tensor:
    """``sum_g shares_g losses_g`` of ``[G]``; without ``shares`` (which sum to 1) the mean over groups."""
    _check_losses(losses)
    return losses.mean() if shares is None else shares.to(losses) @ losses


def dro(losses: Tensor, q: Tensor) -> Tensor:
    """``sum_g q_g losses_g`` of ``[G]``, no gradient to ``q``: the loss of Sagawa et al. 2020, algorithm 1."""
    _check_losses(losses)
    return q.detach().to(losses) @ losses


def exp_weights(q: Tensor, losses: Tensor, eta: float, floor: float = 0.0) -> Tensor:
    """Group weights ``[G]`` after a step of exponentiated gradient: ``q_g exp(eta losses_g)``, normalised.

    Sagawa et al. 2020, algorithm 1. Weights below ``floor`` are put there and the others scaled to the
    rest: the nearest weights in relative entropy that are all at least ``floor``. Equal losses change no bit of
    weights that are. Computed in float64.

    Args:
        q: ``[G]``, at least 0, sum 1.
        losses: ``[G]``, finite; their gradient is not used.
        eta: at least 0, per unit of loss.
        floor: at least 0, at most ``1 / G``.

    Raises:
        ValueError: shapes differ, or ``eta`` or ``floor`` out of range.
    """
    _check_losses(losses)
    groups = len(losses)
    if q.shape != losses.shape:
        raise ValueError(f"exp_weights: q must be [{groups}] like losses, got {tuple(q.shape)}")
    if not 0 <= eta < math.inf or not 0 <= floor * groups <= 1 + 1e-9:
        raise ValueError(
            f"exp_weights: want eta >= 0 and floor in [0, 1/{groups} groups], got eta {eta} and floor {floor}"
        )
    old, worth = q.detach().double(), losses.detach().double()
    # the greatest weight keeps its exponent at 0, so that the sum neither overflows nor vanishes
    exponent = old.log() + eta * worth
    new = (exponent - exponent.amax()).exp()
    new = new / new.sum()
    if floor > 0:
        high = new.sort(descending=True).values
        kept = torch.arange(1, groups + 1, device=new.device, dtype=new.dtype)
        scale = (1.0 - (groups - kept) * floor) / high.cumsum(0)  # if the greatest `kept` stay off the floor
        count = (scale * high >= floor).sum().clamp_min(1)
        new = (scale[count - 1] * new).clamp_min(floor)
    unmoved = (worth == worth[0]).all() & (old >= floor).all()
    return torch.where(unmoved, old, new).to(q.dtype)


def cvar(losses: Tensor, alpha: float, shares: Tensor | None = None) -> Tensor:
    """Mean of the worst share ``alpha`` of the groups ``[G]``; 1 is the mean, and ``1 / G`` or less the maximum.

    A group on the border counts with the part that lies within (Rockafellar and Uryasev 2000).

    Args:
        alpha: in (0, 1].
        shares: ``[G]``, the groups' masses, sum 1; ``None``: equal.

    Raises:
        ValueError: ``alpha`` out of range.
    """
    _check_losses(losses)
    if not 0 < alpha <= 1:
        raise ValueError(f"cvar: alpha, the worst share, must be in (0, 1], got {alpha}")
    worst, order = losses.sort(descending=True)
    mass = torch.full_like(worst, 1.0 / len(worst)) if shares is None else shares.to(losses)[order]
    left = (alpha - (mass.cumsum(0) - mass)).clamp_min(0.0)
    taken = torch.minimum(mass, left)
    return (taken / taken.sum()) @ worst


def rex(losses: Tensor, beta: float, shares: Tensor | None = None) -> Tensor:
    """V-REx (Krueger et al. 2021): :func:`erm` ``+ beta Var(losses)`` of ``[G]``, the population variance."""
    return erm(losses, shares) + beta * losses.var(unbiased=False)


def irm_slopes(losses: ScaledLosses, groups: int, like: Tensor) -> Tensor:
    """``[G]``: derivatives of the groups' losses by a dummy scale of their outputs, at 1; differentiable.

    Args:
        losses: see :data:`ScaledLosses`.
        groups: G.
        like: whose device and dtype the scales have.
    """
    scale = torch.ones(groups, dtype=like.dtype, device=like.device, requires_grad=True)
    return torch.autograd.grad(losses(scale).sum(), scale, create_graph=True)[0]


def irm(losses: Tensor, slopes: Tensor, penalty: float, shares: Tensor | None = None) -> Tensor:
    """IRMv1 (Arjovsky et al. 2019): :func:`erm` ``+ penalty`` times the mean square of ``slopes``, ``[G]`` each.

    The square of a minibatch's slope is biased upwards by its variance: use large batches.
    """
    return erm(losses, shares) + penalty * slopes.square().mean()


class ShiftObjective(nn.Module):
    """One of the objectives by name, with the group weights ``q`` ``[G]`` of ``dro`` as a float64 buffer.

    Args:
        kind: ``erm``, ``dro``, ``cvar``, ``rex`` or ``irm``.
        groups: G.
        eta: of ``dro``: step size of the group weights, per unit of loss.
        floor: of ``dro``: least group weight.
        alpha: of ``cvar``: worst share of groups, in (0, 1].
        beta: of ``rex``: weight of the variance.
        penalty: of ``irm``: weight of the squared slopes.
        shares: masses of the groups in the mean of ``erm``, ``cvar``, ``rex`` and ``irm``; ``null``: equal.

    Raises:
        ValueError: an unknown kind or a value out of range; the message names the key.
    """

    q: Tensor

    def __init__(
        self,
        kind: Kind = "erm",
        groups: int = 1,
        eta: float = 0.01,
        floor: float = 0.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        penalty: float = 1.0,
        shares: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"ShiftObjective: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if groups < 1:
            raise ValueError(f"ShiftObjective: groups must be >= 1, got {groups}")
        for key, value in (("eta", eta), ("floor", floor), ("beta", beta), ("penalty", penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"ShiftObjective: {key} must be >= 0 and finite, got {value}")
        if floor * groups > 1 + 1e-9:
            raise ValueError(f"ShiftObjective: floor must be at most 1/groups = {1 / groups:.4g}, got {floor}")
        if not 0 < alpha <= 1:
            raise ValueError(f"ShiftObjective: alpha must be in (0, 1], got {alpha}")
        if shares is not None:
            ok = len(shares) == groups and min(shares) >= 0 and math.isclose(sum(shares), 1.0, abs_tol=1e-6)
            if not ok:
                raise ValueError(f"ShiftObjective: shares must be {groups} numbers >= 0 of sum 1, got {list(shares)}")
        self.kind: Kind = kind
        self.groups, self.eta, self.floor, self.alpha, self.beta = groups, eta, floor, alpha, beta
        self.penalty, self.shares = penalty, None if shares is None else [float(share) for share in shares]
        self.register_buffer("q", torch.full((groups,), 1.0 / groups, dtype=torch.float64))

    def settings(self) -> dict[str, object]:
        """The arguments it was made with, in plain values."""
        keys = ("kind", "groups", "eta", "floor", "alpha", "beta", "penalty", "shares")
        return {key: getattr(self, key) for key in keys}

    @property
    def needs_slopes(self) -> bool:
        """Whether ``forward`` wants :func:`irm_slopes`."""
        return self.kind == "irm"

    def forward(self, losses: Tensor, slopes: Tensor | None = None) -> Tensor:
        """The scalar to descend. In training mode ``dro`` steps ``q`` first, as in the paper's algorithm.

        Args:
            losses: ``[G]``, over all ranks.
            slopes: ``[G]``, over all ranks, of ``irm``.

        Raises:
            ValueError: another number of groups, or no slopes where they are needed.
        """
        if losses.shape != (self.groups,):
            raise ValueError(f"ShiftObjective: losses must be [{self.groups}], one a group, got {tuple(losses.shape)}")
        shares = None if self.shares is None else losses.new_tensor(self.shares)
        if self.kind == "erm":
            return erm(losses, shares)
        if self.kind == "cvar":
            return cvar(losses, self.alpha, shares)
        if self.kind == "rex":
            return rex(losses, self.beta, shares)
        if self.kind == "irm":
            if slopes is None:
                raise ValueError("ShiftObjective: irm needs slopes, see irm_slopes")
            return irm(losses, slopes, self.penalty, shares)
        if self.training:
            self.q.copy_(exp_weights(self.q, losses, self.eta, self.floor))
        return dro(losses, self.q)


def _check_losses(losses: Tensor) -> None:
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"shift: losses must be [G], one a group, got {tuple(losses.shape)}")
