"""Worst cases of a differentiable per-sample loss within a norm ball: gradient attacks, random search, closed form.

Threat model of Madry et al. 2018 (arXiv 1706.06083, eq. 2.1): ``max loss(x + p)`` over ``||p|| <= eps``, each sample
by itself. An attack gives a lower bound of that maximum. All attacks here keep the best point that they have
evaluated, the unperturbed one included, so that the loss found

- is never below the loss at ``x``,
- never falls with more ``steps`` at the same ``step_size``, nor with more ``restarts`` from a generator in the same
  state: a longer search begins with the shorter one's points,
- never falls with ``eps`` where the smaller budget's result is given as ``start`` (:func:`eps_curve`).

The loss must give row b from row b of ``x`` alone, and the same each time: put dropout and batch norm in evaluation
mode. Gradients flow to ``x`` only, those of parameters are not touched; random numbers come from the generator given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Norm = Literal["inf", "2"]

Loss = Callable[[Tensor], Tensor]
"""Samples ``[B, ...]`` to a loss ``[B]``, which the attack raises."""

Bounds = tuple[Tensor | float, Tensor | float]
"""Least and greatest value of valid samples: numbers, or tensors that broadcast with a sample."""

_SLACK = 1e-5  # relative, of feasibility: rounding
_SHORTEST = 0.02  # moves of random search in norm 2, as a share of the step size


class Attack(Protocol):
    """What :func:`pgd` and :func:`random_search` have in common."""

    def __call__(
        self, loss: Loss, x: Tensor, eps: float, *, norm: Norm = ..., steps: int = ..., step_size: float | None = ...,
        restarts: int = ..., generator: torch.Generator | None = ..., start: Tensor | None = ...,
        bounds: Bounds | None = ...,
    ) -> Tensor: ...  # fmt: skip


def steepest(slope: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of length 1 in the norm ``[..., D]``: signs, or a unit vector; 0 where the gradient is 0 or NaN.

    Args:
        slope: ``[..., D]``, a gradient.
        norm: ``inf``, or ``2`` over the last dimension.
    """
    slope = slope.nan_to_num(nan=0.0)
    if norm == "inf":
        return slope.sign()
    # dividing by the largest entry first keeps squares of small and large gradients representable
    slope = slope / slope.abs().amax(-1, keepdim=True).clamp_min(1e-37)
    return slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def linear_worst_margin(margin: Tensor, weight: Tensor, eps: float, norm: Norm = "inf") -> Tensor:
    """``margin - eps ||w||``, dual norm: a linear model's least margin ``y f(x + p)`` over ``||p|| <= eps``, ``[B]``.

    Exact, without box bounds. The dual of ``inf`` is the 1-norm, that of ``2`` itself.

    Args:
        margin: ``[B]``, ``y f(x)`` for labels of -1 and 1.
        weight: ``[D]``, the gradient of ``f``.
    """
    _check(eps, norm)
    return margin - eps * torch.linalg.vector_norm(weight.flatten(), 1 if norm == "inf" else 2)


def fgsm(loss: Loss, x: Tensor, eps: float, *, norm: Norm = "inf", bounds: Bounds | None = None) -> Tensor:
    """One step of length ``eps`` up the gradient (Goodfellow et al. 2015, arXiv 1412.6572, section 4), ``[B, ...]``.

    Exact for a loss that rises with a linear function. Where the step lowers the loss, the sample stays as it is.

    Args, Raises: as :func:`pgd`.
    """
    return pgd(loss, x, eps, norm=norm, steps=1, step_size=eps or None, bounds=bounds)


def pgd(
    loss: Loss,
    x: Tensor,
    eps: float,
    *,
    norm: Norm = "inf",
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018, section 2.1): the worst samples found, ``[B, ...]``.

    Costs ``restarts * steps`` gradients and as many evaluations, and up to two evaluations more.

    Args:
        loss: see :data:`Loss`. One that saturates (cross-entropy of a confident model) has no gradient to climb in
            float32: a negative margin ``-y f(x)`` has the same worst case.
        x: ``[B, ...]``, floating point; not written to.
        eps: radius of the ball, in units of ``x``; 0 returns ``x`` bit for bit.
        norm: ``inf``, or ``2`` over a whole sample.
        steps: per restart, at least 1.
        step_size: in units of ``x``; ``None``: ``2.5 * eps / steps``, which differs between numbers of steps.
        restarts: searches; the worst of them counts.
        generator: of the random points, uniform in the ball, that searches begin at, the first but where ``start`` is
            given; ``None``: the one search begins at ``start``, or else at ``x``.
        start: ``[B, ...]``, samples within the ball, such as the result at a smaller ``eps``: where the first search
            begins; the result is at least as bad.
        bounds: ``(lo, hi)`` that samples stay within.

    Raises:
        ValueError: a budget, count or bound out of range, samples outside ``bounds``, a ``start`` outside the ball, a
            loss that is not ``[B]`` or has no gradient, or several restarts without a generator.
    """
    search = _Search("pgd", loss, x, eps, norm, steps, step_size, restarts, start, bounds)
    if restarts > 1 and generator is None:
        raise ValueError(f"pgd: {restarts} restarts need a generator to begin at different points: give generator")
    if eps == 0:
        return x.detach().clone()
    length = 2.5 * eps / steps if step_size is None else step_size
    with torch.inference_mode(False), torch.enable_grad():
        search.begin(clean=generator is not None)
        for number in range(restarts):
            at_start = generator is None or (number == 0 and start is not None)
            p = search.origin if at_start else search.random_point(generator)  # type: ignore[arg-type]
            for _ in range(steps):
                p = search.project(p + length * steepest(search.slope(p), norm))
            with torch.no_grad():
                search.offer(p)
    return search.worst


def random_search(
    loss: Loss,
    x: Tensor,
    eps: float,
    *,
    norm: Norm = "inf",
    steps: int = 100,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """Random local search, which needs no gradient: the worst samples found, ``[B, ...]``.

    Finds what a masked gradient hides: a random search that does better than :func:`pgd` says that the gradient
    attack's figures flatter the model (Carlini et al. 2019, arXiv 1902.06705). Each step moves a random part of the
    coordinates (the share is drawn log-uniformly from 1 coordinate to all) by ``step_size`` up or down (``inf``), or
    by up to ``step_size`` in a random direction (``2``, lengths log-uniform), and keeps the move where the loss rises.

    Args:
        loss, x, eps, norm, restarts, start, bounds: as in :func:`pgd`; the loss need not be differentiable.
        steps: evaluations per restart.
        step_size: ``None``: ``2 * eps``, from face to face of the ball (``inf``), or ``eps`` (``2``).
        generator: of everything drawn; required. The first search begins at ``start``, or else at ``x``, the others
            at random points.

    Raises:
        ValueError: as :func:`pgd`, or no generator.
    """
    search = _Search("random_search", loss, x, eps, norm, steps, step_size, restarts, start, bounds)
    if generator is None:
        raise ValueError("random_search: all moves are random: give a generator")
    if eps == 0:
        return x.detach().clone()
    length = step_size or (2.0 if norm == "inf" else 1.0) * eps
    with torch.inference_mode(False), torch.no_grad():
        search.begin(clean=False)  # the first search begins there
        for number in range(restarts):
            # its own stream: with more steps a search must not shift what the next one draws
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            drawn = torch.Generator(generator.device).manual_seed(seed)
            p = search.origin if number == 0 else search.random_point(drawn)
            highest = search.offer(p)
            for _ in range(steps):
                moved = search.project(p + length * search.random_move(drawn))
                score = search.offer(moved)
                better = score > highest
                p, highest = torch.where(better.unsqueeze(-1), moved, p), torch.where(better, score, highest)
    return search.worst


def eps_curve(
    loss: Loss, x: Tensor, epsilons: Sequence[float], attack: Attack = pgd, **options: object
) -> tuple[Tensor, Tensor]:
    """Worst losses ``[E, B]`` and samples ``[E, B, ...]`` at rising budgets; losses never fall with the budget.

    Args:
        epsilons: not falling, each at least 0.
        attack: :func:`pgd` or :func:`random_search`; the generator goes on from one budget to the next.
        options: of the attack.

    Raises:
        ValueError: falling budgets, or as the attack.
    """
    if list(epsilons) != sorted(epsilons) or not epsilons:
        raise ValueError(f"eps_curve: epsilons must rise and not be empty, got {list(epsilons)}")
    losses, samples, worst = [], [], None
    for eps in epsilons:
        worst = attack(loss, x, eps, start=None if eps == 0 else worst, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            losses.append(loss(worst))
        samples.append(worst)
    return torch.stack(losses), torch.stack(samples)


def _check(eps: float, norm: str) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"adversarial: eps must be >= 0 and finite, got {eps}")
    if norm not in get_args(Norm):
        raise ValueError(f"adversarial: norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")


class _Search:
    """The best points of one attack so far. Perturbations are rows ``[B, D]``, points have the samples' shape."""

    def __init__(
        self, name: str, loss: Loss, x: Tensor, eps: float, norm: Norm, steps: int, step_size: float | None,
        restarts: int, start: Tensor | None, bounds: Bounds | None,
    ) -> None:  # fmt: skip
        _check(eps, norm)
        for key, count in (("steps", steps), ("restarts", restarts)):
            if count < 1:
                raise ValueError(f"{name}: {key} must be >= 1, got {count}")
        if step_size is not None and not 0 < step_size < math.inf:
            raise ValueError(f"{name}: step_size must be > 0 and finite, got {step_size}")
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"{name}: x must be floating-point samples [B, ...], got {x.dtype} {tuple(x.shape)}")
        self._name, self._loss, self._eps, self._bounds = name, loss, eps, bounds
        self._norm: Norm = norm
        self._x, self._start = x, start

    def begin(self, clean: bool = True) -> None:
        """Evaluate the clean samples (unless they are where the search begins) and the start."""
        # tensors made in inference mode cannot be kept by autograd: their copies can
        self._x = x = self._x.detach().clone()
        if self._bounds is not None:
            low, high = (torch.as_tensor(side, dtype=x.dtype, device=x.device) for side in self._bounds)
            self._bounds = (low, high)
            if bool((low > high).any()) or bool((x < low).any()) or bool((x > high).any()):
                raise ValueError(f"{self._name}: want lo <= x <= hi for bounds (lo, hi), samples lie outside")
        self.worst, self._highest = x, torch.full(x.shape[:1], -torch.inf, dtype=x.dtype, device=x.device)
        self.origin = torch.zeros_like(x.flatten(1))
        with torch.no_grad():
            if clean or self._start is not None:
                self._keep(x, self._score(x))
            if self._start is not None:
                self._begin_at(self._start.detach().clone())

    def _begin_at(self, start: Tensor) -> None:
        if start.shape != self._x.shape:
            raise ValueError(f"{self._name}: start must be {tuple(self._x.shape)} like x, got {tuple(start.shape)}")
        p = (start - self._x).flatten(1)
        reach = p.abs().amax(-1) if self._norm == "inf" else p.norm(dim=-1)
        # subtraction rounds in units of x
        slack = _SLACK * (self._eps + self._x.flatten(1).abs().amax(-1))
        if bool((reach > self._eps + slack).any()):
            raise ValueError(f"{self._name}: start lies {float(reach.max()):g} from x, further than eps {self._eps:g}")
        self._keep(start, self._score(start))
        self.origin = self.project(p)

    def _point(self, p: Tensor) -> Tensor:
        point = self._x + p.view_as(self._x)
        return self._within(point)

    def _within(self, point: Tensor) -> Tensor:
        if self._bounds is None:
            return point
        return torch.minimum(torch.maximum(point, self._bounds[0]), self._bounds[1])  # type: ignore[arg-type]

    def _score(self, point: Tensor) -> Tensor:
        score = self._loss(point)
        if score.shape != point.shape[:1]:
            raise ValueError(
                f"{self._name}: loss must give one number a sample, [{len(point)}], got {tuple(score.shape)}"
            )
        return score

    def _keep(self, point: Tensor, score: Tensor) -> Tensor:
        score = score.detach()
        score = torch.where(score.isnan(), torch.inf, score)  # a model that breaks is the worst case
        better = score > self._highest
        shape = (-1, *[1] * (point.ndim - 1))
        self.worst = torch.where(better.view(shape), point.detach(), self.worst)
        self._highest = torch.where(better, score, self._highest)
        return score

    def offer(self, p: Tensor) -> Tensor:
        """``[B]``: the loss at ``x + p``, which is kept where it is the worst so far."""
        point = self._point(p)
        return self._keep(point, self._score(point))

    def slope(self, p: Tensor) -> Tensor:
        """``[B, D]``: the loss's gradient at ``x + p``, which is offered along the way."""
        point = self._point(p).requires_grad_()
        score = self._score(point)
        self._keep(point, score)
        if not score.requires_grad:
            raise ValueError(f"{self._name}: loss has no gradient in x; use random_search")
        return torch.autograd.grad(score.sum(), point)[0].flatten(1)

    def project(self, p: Tensor) -> Tensor:
        """The perturbation in the ball and the bounds; with norm 2 and bounds feasible, though not the nearest."""
        if self._norm == "inf":
            p = p.clamp(-self._eps, self._eps)
        else:
            p = p * (self._eps / p.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
        if self._bounds is None:
            return p
        # the samples lie within the bounds, so that this moves every coordinate towards 0
        return (self._point(p) - self._x).flatten(1)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Uniform in the ball, then within the bounds."""
        uniform = self._uniform(generator, self.origin.shape)
        if self._norm == "inf":
            return self.project((2.0 * uniform - 1.0) * self._eps)
        radius = self._uniform(generator, self.origin.shape[:1]).unsqueeze(-1) ** (1.0 / self.origin.shape[1])
        return self.project(steepest(self._normal(generator), "2") * radius * self._eps)

    def random_move(self, generator: torch.Generator) -> Tensor:
        """Of length at most 1 in the norm: a random share of the coordinates, drawn anew for each sample."""
        size = self.origin.shape[1]
        drawn = self._uniform(generator, self.origin.shape[:1]).unsqueeze(-1)
        chosen = self._uniform(generator, self.origin.shape) < float(size) ** -drawn
        move = steepest(self._normal(generator) * chosen, self._norm)
        if self._norm == "inf":
            return move
        # a search that nears the ball's worst point must turn by less and less
        return move * _SHORTEST ** self._uniform(generator, self.origin.shape[:1]).unsqueeze(-1)

    def _uniform(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=self._x.dtype, device=generator.device).to(self._x.device)

    def _normal(self, generator: torch.Generator) -> Tensor:
        shape = self.origin.shape
        return torch.randn(shape, generator=generator, dtype=self._x.dtype, device=generator.device).to(self._x.device)
