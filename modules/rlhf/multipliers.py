"""The multipliers of a constrained method: state in buffers, one hand-written SGD step, and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from modules.objectives.lagrangian import (
    check_constraints,
    effective_multipliers,
    multiplier_loss,
    multiplier_weights,
    project_raw,
    raw_multipliers,
)
from modules.rlhf.history import History
from modules.seeds import global_seed, stream

_DEAD_GRADIENT = 6.0
"""``|raw|`` past which a sigmoid's slope is below 0.0025."""
_SEED_KEY = 0x4C414D42  # "LAMB", keeps the draw of init_std apart from other streams


class Multipliers(nn.Module):
    """Learned multipliers of ``N`` constraints, with their thresholds (Moskovitz et al. 2024, section 4.1).

    Everything that changes is a float64 or integer buffer, so that the state dict alone resumes bitwise; ranks that
    are given the same returns stay identical. The step is ``torch.optim.SGD`` with momentum after
    ``clip_grad_norm_``, by hand: the module that owns the multipliers keeps a single optimiser.

    Args:
        names: of the constrained rewards, for metrics and messages.
        kinds: ``ge``, ``le`` or ``eq``.
        thresholds: in units of the rewards.
        parameterisation: see :func:`modules.objectives.lagrangian.multiplier_weights`.
        lr, momentum: of the SGD step. High momentum makes multipliers oscillate.
        clip: bound on the norm of the gradient vector; ``None``: none.
        init: ``bounded``: first raw value; other forms: first size of each weight, in the rewards' sign (0.5 pushes
            ``ge`` up and ``le`` down). ``None``: 0 and 0.5.
        init_std: standard deviation of one normal draw added to all raw values.
        lambda_max: bound on the unbounded forms' weights; ``None``: none.
        lambda_clip: bound on the bounded form's ``|raw|``; ``None``: none.
        relative: measure violations in shares of the threshold, so that one ``lr`` suits rewards of unlike scales; a
            threshold of 0 counts as 1.
        window: updates over which returns are averaged before the step; 0 and 1: the newest alone. (Safe RLHF averages
            its costs over the last 128 episodes.)
        patience: updates in a row with the weight at its limit and the constraint violated until it is called
            infeasible.
        saturation: share of the limit (1, or ``lambda_max``) from which a weight counts as being there.
        tolerance: violation, relative to the threshold, up to which a constraint counts as satisfied there.
        frozen_weights: signed weights that are kept for good (the weights that a hand would set), in place of learned
            ones; averages and figures go on.

    Raises:
        ValueError: options that do not fit; the message names the config key.
    """

    raw: Tensor
    held: Tensor
    velocity: Tensor
    thresholds: Tensor
    history: Tensor
    updates: Tensor
    averaged: Tensor
    mean_weight: Tensor
    mean_return: Tensor
    last_return: Tensor
    violated_for: Tensor
    warned: Tensor

    def __init__(
        self,
        names: Sequence[str],
        kinds: Sequence[str],
        thresholds: Sequence[float],
        parameterisation: str = "bounded",
        lr: float = 0.1,
        momentum: float = 0.1,
        clip: float | None = 0.5,
        init: float | Sequence[float] | None = None,
        init_std: float = 0.0,
        lambda_max: float | None = None,
        lambda_clip: float | None = None,
        relative: bool = False,
        window: int = 1,
        patience: int = 100,
        saturation: float = 0.95,
        tolerance: float = 0.05,
        frozen_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.kinds = tuple(names), tuple(kinds)
        check_constraints(self.kinds, parameterisation)
        _check_counts(self.names, kinds=self.kinds, thresholds=thresholds)
        for key, value, low, high in (
            ("lr", lr, 0.0, math.inf),
            ("momentum", momentum, 0.0, 1.0),
            ("clip", clip, 1e-12, math.inf),
            ("init_std", init_std, 0.0, math.inf),
            ("lambda_max", lambda_max, 1e-12, math.inf),
            ("lambda_clip", lambda_clip, 1e-12, math.inf),
            ("window", window, 0, math.inf),
            ("patience", patience, 1, math.inf),
            ("saturation", saturation, 0.0, 1.0),
            ("tolerance", tolerance, 0.0, math.inf),
        ):
            if value is not None and not low <= value <= high:
                raise ValueError(f"multiplier.{key}: must be in [{low:g}, {high:g}], got {value}")
        self.parameterisation, self.bounded = parameterisation, parameterisation == "bounded"
        self.lr, self.momentum, self.clip, self.relative = lr, momentum, clip, relative
        self.lambda_max = None if self.bounded else lambda_max
        self.lambda_clip = lambda_clip if self.bounded else None
        self.window, self.patience, self.saturation, self.tolerance = max(1, window), patience, saturation, tolerance
        self.frozen = frozen_weights is not None

        count = len(self.names)
        raw = self._first(init)
        if init_std:
            raw += init_std * torch.randn((), dtype=torch.float64, generator=stream(global_seed(), _SEED_KEY))
        zeros = torch.zeros(count, dtype=torch.float64)
        self.register_buffer("raw", self._projected(raw))
        self.register_buffer("held", self._held(frozen_weights))
        for name in ("velocity", "mean_weight", "mean_return", "last_return", "thresholds"):
            self.register_buffer(name, zeros.clone())
        self.register_buffer("history", torch.zeros(self.window, count, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("averaged", torch.zeros((), dtype=torch.int64))
        self.register_buffer("violated_for", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("warned", torch.zeros(count, dtype=torch.bool))
        self.trace = History(0 if self.frozen else 2 * count)
        self.set_thresholds(thresholds)

    def _first(self, init: float | Sequence[float] | None) -> Tensor:
        if init is None:
            init = 0.0 if self.bounded else 0.5
        values = [float(init)] * len(self.names) if isinstance(init, int | float) else [float(one) for one in init]
        _check_counts(self.names, **{"multiplier.init": values})
        raw = torch.tensor(values, dtype=torch.float64)
        if self.bounded:
            return raw
        sign = torch.tensor([-1.0 if kind == "le" else 1.0 for kind in self.kinds], dtype=torch.float64)
        return raw_multipliers(raw * sign, self.kinds, self.parameterisation)

    def _held(self, weights: Sequence[float] | None) -> Tensor:
        """Frozen weights as float64 ``[N]``; ``[0]`` where they are learned."""
        held = torch.tensor([] if weights is None else list(weights), dtype=torch.float64)
        if weights is None:
            return held
        _check_counts(self.names, weights=held)
        for name, kind, value in zip(self.names, self.kinds, held.tolist(), strict=True):
            limit = 1.0 if self.bounded else math.inf if self.lambda_max is None else self.lambda_max
            low, high = (0.0 if kind == "ge" else -limit), (0.0 if kind == "le" else limit)
            if not low <= value <= high:
                raise ValueError(f"weights.{name}: a frozen {kind} weight must be in [{low:g}, {high:g}], got {value}")
        return held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Multipliers:
        # Training in half precision casts all buffers; multipliers keep their float64, and only change device.
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_wide, recurse)

    def weights(self) -> Tensor:
        """Signed weights ``[N]`` float64 of the constraints' advantage streams."""
        if self.frozen:
            return self.held.clone()
        return multiplier_weights(self.raw, self.kinds, self.parameterisation, self.lambda_max)

    def effective(self) -> Tensor:
        """Effective (classical) multipliers ``rho`` ``[N]`` float64."""
        return effective_multipliers(self.weights(), self.kinds, self.bounded)

    @torch.no_grad()
    def set_weights(self, weights: Tensor | Sequence[float]) -> None:
        """Put the multipliers at signed ``weights`` ``[N]`` and forget their velocity.

        Raises:
            ValueError: weights out of the parameterisation's reach.
        """
        wanted = torch.as_tensor(weights, dtype=torch.float64, device=self.raw.device)
        _check_counts(self.names, **{"multiplier weights": wanted})
        self.raw.copy_(self._projected(raw_multipliers(wanted, self.kinds, self.parameterisation)))
        self.velocity.zero_()

    @torch.no_grad()
    def set_thresholds(self, thresholds: Tensor | Sequence[float]) -> None:
        """Replace the thresholds ``[N]`` and start averages and the watch for infeasible ones afresh.

        Raises:
            ValueError: a wrong count, or a threshold that is not finite.
        """
        wanted = torch.as_tensor(thresholds, dtype=torch.float64, device=self.thresholds.device)
        _check_counts(self.names, thresholds=wanted)
        for name, value in zip(self.names, wanted.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"constraints.{name}.threshold: must be finite, got {value}")
        self.thresholds.copy_(wanted)
        for tensor in (self.averaged, self.mean_weight, self.mean_return, self.violated_for, self.warned):
            tensor.zero_()

    def update(self, returns: Tensor) -> None:
        """One SGD step on :func:`~modules.objectives.lagrangian.multiplier_loss`.

        Args:
            returns: ``[N]``, mean undiscounted returns, already over all ranks.

        Raises:
            ValueError: a return that is not finite.
        """
        observed = returns.detach().to(self.raw)
        if observed.shape != self.raw.shape or not bool(observed.isfinite().all()):
            culprits = ", ".join(f"{name}={value}" for name, value in zip(self.names, observed.tolist(), strict=False))
            raise ValueError(f"multipliers: want {len(self.names)} finite returns, got {culprits}")
        used = self._windowed(observed)
        if not self.frozen:
            self._step(used)
        with torch.no_grad():
            self.updates.add_(1)
            self.averaged.add_(1)
            self.last_return.copy_(observed)
            self.mean_return.add_((observed - self.mean_return) / self.averaged)
            weights = self.weights()
            self.mean_weight.add_((weights - self.mean_weight) / self.averaged)
            self._watch(weights, used)
            if not self.frozen:
                self.trace.add(torch.cat([weights, self._gap(observed)]).tolist())

    def _gap(self, returns: Tensor) -> Tensor:
        """``[N]``: by how much ``returns`` miss the thresholds; at most 0: met (of an ``eq`` only 0 is)."""
        over = returns - self.thresholds
        return torch.stack([-over[index] if kind == "ge" else over[index] for index, kind in enumerate(self.kinds)])

    def recorded(self) -> tuple[Tensor, Tensor]:
        """``[kept, N]`` float64 each: weights after updates spread over the whole run, and how far each constraint was
        from being met (:meth:`_gap`); empty where the weights are frozen."""
        weights, gap = self.trace.values().tensor_split(2, dim=1)
        return weights, gap

    @torch.no_grad()
    def start_anew(self, raw: Tensor | None) -> None:
        """Go on from learnt ``raw`` multipliers ``[N]`` (None: one's own) with everything else as at the start."""
        if raw is not None and raw.shape == self.raw.shape and not self.frozen:
            self.raw.copy_(self._projected(raw.to(self.raw)))
        for tensor in (self.velocity, self.last_return, self.history, self.updates):
            tensor.zero_()
        self.trace.reset()
        self.set_thresholds(self.thresholds.clone())

    @torch.no_grad()
    def _windowed(self, observed: Tensor) -> Tensor:
        self.history[self.updates % self.window] = observed
        if self.window == 1:
            return observed
        return self.history.sum(0) / (self.updates + 1).clamp_max(self.window)

    def _step(self, returns: Tensor) -> None:
        with torch.enable_grad():
            raw = self.raw.clone().requires_grad_()
            weights = multiplier_weights(raw, self.kinds, self.parameterisation, self.lambda_max)
            unit = (
                self.thresholds.abs().where(self.thresholds != 0, torch.ones_like(self.raw)) if self.relative else 1.0
            )
            loss = multiplier_loss(weights, returns / unit, self.thresholds / unit)
            (gradient,) = torch.autograd.grad(loss, raw)
        with torch.no_grad():
            if self.clip is not None:
                gradient = gradient * (self.clip / (gradient.norm() + 1e-6)).clamp_max(1.0)
            self.velocity.mul_(self.momentum).add_(gradient)
            self.raw.copy_(self._projected(self.raw - self.lr * self.velocity))

    def _projected(self, raw: Tensor) -> Tensor:
        return project_raw(raw, self.kinds, self.parameterisation, self.lambda_max, self.lambda_clip)

    def _watch(self, weight: Tensor, returns: Tensor) -> None:
        """Count updates that a weight spent at its limit without the constraint being met, and warn once for each."""
        if self.frozen or not self.bounded and self.lambda_max is None:
            return
        gap = self.thresholds - returns
        # The weight pushes towards the threshold, with all that it has, and the return is still on the wrong side.
        stuck = (weight.abs() >= self.saturation * (self.lambda_max or 1.0)) & (weight * gap > 0)
        stuck &= gap.abs() > self.tolerance * self.thresholds.abs()
        self.violated_for.copy_(torch.where(stuck, self.violated_for + 1, 0))
        fresh = self.infeasible() & ~self.warned
        if not bool(fresh.any()):
            return
        self.warned.logical_or_(fresh)
        for index in fresh.nonzero().flatten().tolist():
            rank_zero_warn(
                f"constraints.{self.names[index]}: threshold {self.thresholds[index].item():g} looks infeasible: the "
                f"return is {returns[index].item():.4g} after {self.patience} updates with the multiplier at its limit "
                f"({weight[index].item():.3g}); move the threshold towards the return",
                stacklevel=3,
            )

    def saturated(self) -> Tensor:
        """``[N]`` bool: where the multiplier hardly moves any more, at either end."""
        if self.bounded:
            limit = _DEAD_GRADIENT if self.lambda_clip is None else min(self.lambda_clip, _DEAD_GRADIENT)
            return self.raw.abs() >= limit
        if self.lambda_max is None:
            return torch.zeros_like(self.warned)
        return self.weights().abs() >= self.saturation * self.lambda_max

    def infeasible(self) -> Tensor:
        """``[N]`` bool: whether the threshold has been out of reach for ``patience`` updates."""
        return self.violated_for >= self.patience

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """Figures by name, 0-dimensional: raw, weight and effective multiplier, violation, averages, warnings.

        ``violation`` is 0 where the constraint holds, else the distance to the threshold (of an ``eq``: signed).
        """
        weight, rho = self.weights(), self.effective()
        over = self.last_return - self.thresholds
        sides = {"ge": (-over).clamp_min(0.0), "le": over.clamp_min(0.0), "eq": over}
        violation = torch.stack([sides[kind][index] for index, kind in enumerate(self.kinds)])
        by_constraint = {
            "multiplier/{}/raw": self.raw,
            "multiplier/{}/w": weight,
            "multiplier/{}/rho": rho,
            "multiplier/{}/saturated": self.saturated().double(),
            "multiplier/{}/mean_w": self.mean_weight,
            "constraint/{}/threshold": self.thresholds,
            "constraint/{}/violation": violation,
            "constraint/{}/mean_return": self.mean_return,
            "constraint/{}/infeasible": self.infeasible().double(),
        }
        return {
            key.format(name): values[index].clone()
            for key, values in by_constraint.items()
            for index, name in enumerate(self.names)
        }


def _check_counts(names: Sequence[str], **columns: Sequence[float] | Sequence[str] | Tensor) -> None:
    for key, values in columns.items():
        if len(values) != len(names):
            raise ValueError(f"{key}: want one for each of the constraints {', '.join(names)}, got {len(values)}")
