"""Linear probes with control tasks: does a representation encode a concept, or has the probe learned it by heart?

Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks": selectivity is the held-out accuracy of a
probe minus that of the same probe on a control task, in which every type (a word, a state, an opponent) has a random
label. Only memory of types can solve the control task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.seeds import stream

_MEMORY = 12  # pairs of steps and gradient changes that L-BFGS keeps
_ARMIJO, _HALVINGS = 1e-4, 40
_CELLS = 2**22  # logits, or entries of metrics, of the seeds fitted together; about eight float64 copies are held


@dataclass(frozen=True)
class Selectivity:
    """Held-out accuracies per seed, all ``[seeds]`` float64 in [0, 1].

    Attributes:
        task: of the probe on the labels.
        control: of the same probe on random labels per type.
        majority: of always saying the training part's most frequent label: what a useless probe reaches.
    """

    task: Tensor
    control: Tensor
    majority: Tensor

    @property
    def selectivity(self) -> Tensor:
        """``task - control``, ``[seeds]``."""
        return self.task - self.control


def probe_selectivity(
    features: Tensor,
    labels: Tensor,
    types: Tensor,
    *,
    seeds: int = 5,
    split: float = 0.7,
    l2: float = 1e-3,
    seed: int = 0,
) -> Selectivity:
    """Accuracy of a linear probe and of its control task, each seed with its own split and control labels.

    Samples are split at random, not by type: the control task can then be learned, by memory of types. A type's control
    label is drawn from the labels' own distribution, so that both tasks have the same majority on average. With few
    types the draw may be lopsided, and a seed's control accuracy high: read all seeds.

    Args:
        features: ``[N, H]``, any floating point type; scaled to variance 1 on each training part.
        labels: ``[N]`` integers, the concept's classes.
        types: ``[N]`` integers, what a control label is drawn for: the word, the state, the level.
        seeds: how many splits.
        split: share of samples that the probe is fitted to.
        l2: weight of the penalty, see :func:`fit_logistic`.
        seed: of splits and control labels.

    Raises:
        ValueError: shapes that do not fit, features that are not finite or all constant, one class, one type, fewer
            than two samples on a side of the split, ``split`` outside (0, 1), ``seeds`` below 1, ``l2`` not above 0.
    """
    classes, of_class, of_type, count = _checked(features, labels, types, seeds, split)
    samples, device = len(features), features.device
    trained, targets = [], []
    for which in range(seeds):
        generator = stream(seed, which)
        chosen = torch.zeros(samples, dtype=torch.bool)
        chosen[torch.randperm(samples, generator=generator)[:count]] = True
        drawn = torch.randint(samples, (int(of_type.max()) + 1,), generator=generator).to(device)
        trained.append(chosen.to(device))
        targets.append(torch.stack([of_class, of_class[drawn][of_type]]))
    accuracies = []
    group = max(1, _CELLS // (2 * max(samples * classes, features.shape[1] ** 2)))  # seeds fitted together
    for first in range(0, seeds, group):
        masks = torch.stack(trained[first : first + group])
        labels_of = torch.stack(targets[first : first + group])  # [seeds, 2, N]
        scores = fit_logistic(features, labels_of.flatten(0, 1), masks.repeat_interleave(2, 0), classes=classes, l2=l2)
        right = (scores.argmax(-1) == labels_of.flatten(0, 1)).double().view(-1, 2, samples)
        accuracies.append((right * ~masks[:, None]).sum(-1) / (samples - count))
    found = torch.cat(accuracies)
    majority = [
        (of_class[~one] == of_class[one].bincount(minlength=classes).argmax()).double().mean() for one in trained
    ]
    return Selectivity(found[:, 0], found[:, 1], torch.stack(majority))


def _checked(
    features: Tensor, labels: Tensor, types: Tensor, seeds: int, split: float
) -> tuple[int, Tensor, Tensor, int]:
    """Number of classes, labels and types ``[N]`` counted from 0, and how many samples a probe is fitted to."""
    if features.dim() != 2 or not features.is_floating_point() or not features.numel():
        raise ValueError(
            f"probe_selectivity: features: must be floating point [N, H] with values, got {features.dtype} "
            f"{tuple(features.shape)}"
        )
    samples = len(features)
    for name, one in (("labels", labels), ("types", types)):
        if one.shape != (samples,) or one.is_floating_point() or one.is_complex():
            raise ValueError(
                f"probe_selectivity: {name}: must be integers [{samples}], got {one.dtype} {tuple(one.shape)}"
            )
    if seeds < 1 or not 0 < split < 1:
        raise ValueError(f"probe_selectivity: needs seeds >= 1 and split in (0, 1), got {seeds} and {split}")
    count = round(split * samples)
    if min(count, samples - count) < 2:
        raise ValueError(f"probe_selectivity: {samples} samples are too few to be split at {split}; give more")
    classes, of_class = labels.to(features.device).unique(return_inverse=True)
    kinds, of_type = types.to(features.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("probe_selectivity: labels: hold one class, so there is nothing to tell apart")
    if len(kinds) < 2:
        raise ValueError("probe_selectivity: types: hold one type, whose control label any probe would know")
    if not features.isfinite().all():
        raise ValueError("probe_selectivity: features: must be finite, got NaN or infinity")
    if (features == features[:1]).all():
        raise ValueError("probe_selectivity: features: are the same for all samples, so a probe has nothing to read")
    return len(classes), of_class, of_type, count


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    trained: Tensor,
    *,
    classes: int,
    l2: float = 1e-3,
    tolerance: float = 1e-6,
    iterations: int = 500,
) -> Tensor:
    """Multinomial logistic regressions on one set of features, fitted together.

    Each problem minimises ``mean over its training samples of cross-entropy + l2 / 2 * |W|^2`` over weights
    ``[H, classes]`` of features scaled to variance 1 on its training samples, and an unpenalised bias. That is
    scikit-learn's ``C = 1 / (l2 * training samples)`` (for two classes, which have weights each here, twice that).

    L-BFGS with the fixed-Hessian bound ``X'X / (2 n) + l2`` of Boehning 1992 as metric, so that features of any
    correlation do; the step search costs no product with the features, as logits are linear in the weights.

    Args:
        features: ``[N, H]``.
        targets: ``[problems, N]`` integers below ``classes``.
        trained: ``[problems, N]`` bool, the samples that a problem is fitted to.
        classes: number of classes.
        l2: weight of the penalty, above 0: separable classes have no finite optimum without it.
        tolerance: largest entry of the gradient at which a problem is solved.
        iterations: at most.

    Returns:
        Logits ``[problems, N, classes]`` float64 of all samples.

    Raises:
        ValueError: ``l2`` not above 0.
        RuntimeError: no convergence.
    """
    if not l2 > 0:
        raise ValueError(f"fit_logistic: l2: must be above 0, got {l2}")
    x = features.detach().double()
    x = x - x.mean(0)  # a shift common to all problems is the bias's business and keeps the metric well conditioned
    problems, samples, size = len(targets), len(x), x.shape[1]
    mask = trained.double()
    share = mask / mask.sum(1, keepdim=True)  # a training sample's weight
    scale, metric = _scaled_metric(x, trained, l2)
    one_hot = torch.zeros(problems, samples, classes, dtype=x.dtype, device=x.device)
    one_hot.scatter_(2, targets[..., None], 1.0)

    def logits(weights: Tensor) -> Tensor:
        slopes = weights[:, :size] * scale[..., None]
        product = x @ slopes.transpose(0, 1).reshape(size, problems * classes)
        return product.view(samples, problems, classes).transpose(0, 1) + weights[:, size:]

    def loss(weights: Tensor, scores: Tensor) -> Tensor:
        missed = scores.logsumexp(-1) - (scores * one_hot).sum(-1)
        return (share * missed).sum(1) + l2 / 2 * weights[:, :size].square().sum((1, 2))

    def gradient(weights: Tensor, scores: Tensor) -> Tensor:
        error = (scores.softmax(-1) - one_hot) * share[..., None]
        product = x.T @ error.transpose(0, 1).reshape(samples, problems * classes)
        slopes = product.view(size, problems, classes).transpose(0, 1) * scale[..., None] + l2 * weights[:, :size]
        return torch.cat([slopes, error.sum(1, keepdim=True)], 1)

    def precondition(slope: Tensor) -> Tensor:
        return torch.cholesky_solve(slope, metric)

    weights = torch.zeros(problems, size + 1, classes, dtype=x.dtype, device=x.device)
    scores = logits(weights)
    value, slope = loss(weights, scores), gradient(weights, scores)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(iterations):
        active = slope.abs().amax((1, 2)) > tolerance
        if not active.any():
            return scores
        way = -_two_loops(slope, memory, precondition) * active[:, None, None]
        ahead = logits(way)
        fall = (way * slope).sum((1, 2))
        step = torch.ones_like(value)
        for _ in range(_HALVINGS):
            at = step[:, None, None]
            trial = loss(weights + at * way, scores + at * ahead)
            high = trial > value + _ARMIJO * step * fall + 1e-15 * value.abs()
            if not high.any():
                break
            step = torch.where(high, step / 2, step)
        at = step[:, None, None]
        weights, scores = weights + at * way, scores + at * ahead
        before, slope = slope, gradient(weights, scores)
        value = loss(weights, scores)
        moved, changed = at * way, slope - before
        curvature = (moved * changed).sum((1, 2))
        # a problem that is solved, or whose step is lost in rounding, adds a pair that the recursion passes over
        memory.append((moved, changed, torch.where(curvature > 1e-300, 1 / curvature, 0.0)))
        del memory[:-_MEMORY]
    raise RuntimeError(f"fit_logistic: no convergence in {iterations} iterations; raise l2 (now {l2:g})")


def _scaled_metric(x: Tensor, trained: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Per problem 1 / standard deviation on its training samples ``[problems, H]`` (0 for a constant feature), and the
    Cholesky factor ``[problems, H + 1, H + 1]`` of the bound on the Hessian of one class's weights and bias."""
    scales, factors = [], []
    previous: Tensor | None = None
    for chosen in trained:
        if previous is None or not torch.equal(chosen, previous):  # a task and its control share their split
            rows = x[chosen]
            spread = rows.std(0, correction=0)
            constant = spread <= 1e-12 * x.abs().amax(0)
            scale = torch.where(constant, 0.0, 1 / spread)
            design = torch.cat([rows * scale, torch.ones_like(rows[:, :1])], 1)
            bound = design.T @ design / (2 * len(rows))
            # the bias's small ridge keeps the bound definite; a metric need not be exact
            bound.diagonal().add_(torch.tensor([l2] * x.shape[1] + [1e-9], dtype=x.dtype, device=x.device))
            factor, previous = torch.linalg.cholesky(bound), chosen
            scales.append(scale)
            factors.append(factor)
        else:
            scales.append(scales[-1])
            factors.append(factors[-1])
    return torch.stack(scales), torch.stack(factors)


def _two_loops(
    slope: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """L-BFGS's inverse Hessian times ``slope`` (Nocedal and Wright 2006, algorithm 7.4), each problem on its own."""
    q, kept = slope, []
    for moved, changed, inverse in reversed(memory):
        alpha = inverse * (moved * q).sum((1, 2))
        kept.append(alpha)
        q = q - alpha[:, None, None] * changed
    if memory:  # the bound overstates the curvature of separated classes by far: scale it by the last pair
        _, changed, inverse = memory[-1]
        q, image = precondition(torch.cat([q, changed], -1)).chunk(2, -1)
        ratio = (changed * image).sum((1, 2)) * inverse
        q = q * torch.where(ratio > 0, 1 / ratio, 1.0)[:, None, None]
    else:
        q = precondition(q)
    for (moved, changed, inverse), alpha in zip(memory, reversed(kept), strict=True):
        beta = inverse * (changed * q).sum((1, 2))
        q = q + (alpha - beta)[:, None, None] * moved
    return q
