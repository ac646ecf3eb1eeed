"""Attacks on a policy that need no learning: pure functions of batched observations, random numbers and a feasible set.

Gradient attacks take the policy or critic as a function, and differentiate it themselves, also where the caller runs
without gradients. They never write to a tensor that they are given, and no state of a policy advances in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modules.control.perturbation import Norm, PerturbationSet
from modules.objectives.adversarial import steepest

Mean = Callable[[Tensor], Tensor]
"""What the agent sees ``[rows, size]`` (normalised and perturbed) to its mean action ``[rows, actions]``."""

Value = Callable[[Tensor], Tensor]
"""What the agent sees ``[rows, size]`` to a value ``[rows]``."""

Project = Callable[[Tensor], Tensor]
"""A perturbation ``[rows, size]`` to a feasible one."""

_FAR = 100.0
"""Radii from a point to one whose projection is, nearly (norm 2) or exactly (inf), the farthest feasible point."""

_TINY = 1e-24


def _own(tensor: Tensor) -> Tensor:
    """The tensor as autograd can keep it: tensors made in inference mode have to be copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _as_radius(eps: Tensor | float, like: Tensor) -> Tensor:
    return _own(torch.as_tensor(eps, dtype=like.dtype, device=like.device))


def _slope(objective: Value, p: Tensor) -> tuple[Tensor, Tensor]:
    """The objective ``[rows]`` and its gradient ``[rows, size]``; call where gradients are enabled."""
    p = p.detach().requires_grad_()
    score = objective(p)
    (slope,) = torch.autograd.grad(score.sum(), p)
    return score.detach(), slope


def _climb(
    objective: Value,
    p: Tensor,
    eps: Tensor,
    project: Project,
    steps: int,
    norm: Norm,
    noise: Tensor | None = None,
) -> Tensor:
    """Projected ascent from the feasible ``p`` in ``steps`` of length ``eps / steps``; the best point of each row.

    One candidate more is the feasible point farthest along the last gradient. It costs a step, and is exact for a
    linear objective. ``noise`` ``[steps, rows, size]`` is added to gradients times ``sqrt(2 step) / (i + 2)``.
    """
    step = eps / steps
    best, highest = p, torch.full(p.shape[:-1], -torch.inf, dtype=p.dtype, device=p.device)
    for i in range(steps + 1):
        score, slope = _slope(objective, p)
        better = score >= highest
        best, highest = torch.where(better.unsqueeze(-1), p, best), torch.where(better, score, highest)
        if i == steps:
            p = project(p + _FAR * eps * steepest(slope, norm)).detach()
            break
        if noise is not None:
            slope = slope + noise[i] * ((2.0 * step).sqrt() / (i + 2))
        p = project(p + step * steepest(slope, norm)).detach()
    with torch.no_grad():
        return torch.where((objective(p) >= highest).unsqueeze(-1), p, best)


def maximal_action_difference(
    mean: Mean,
    observation: Tensor,
    std: Tensor,
    eps: Tensor | float,
    project: Project,
    start: Tensor,
    noise: Tensor,
    steps: int = 10,
    norm: Norm = "inf",
) -> Tensor:
    """MAD (SA-MDP, Zhang et al. 2020): the perturbation ``[rows, size]`` that moves the policy's mean most.

    Maximises ``||(mu(s + p) - mu(s)) / sigma_n||^2``, ``sigma_n`` the standard deviations divided by their mean, by
    noisy signed steps (stochastic gradient Langevin dynamics, the noise inside the sign) and one more candidate, see
    :func:`_climb`. It starts one step off 0 in a random direction, as the gradient at 0 is 0.

    Args:
        mean: the policy.
        observation: ``[rows, size]``, unperturbed.
        std: ``[rows, actions]`` or ``[actions]``, > 0.
        eps: ``[size]`` or a number; with norm 2 a number or ``[1]``.
        project: on the feasible set, after every step.
        start: ``[rows, size]``, standard normal or signs.
        noise: ``[steps, rows, size]``, standard normal.
        steps: of length ``eps / steps``.
        norm: ``inf``: signed steps; ``2``: normalised gradients.
    """
    with torch.inference_mode(False), torch.enable_grad():
        observation, std, noise, start = _own(observation), _own(std), _own(noise), _own(start)
        radius = _as_radius(eps, observation)
        scale = std / std.mean(-1, keepdim=True)
        with torch.no_grad():
            at_rest = mean(observation)

        def change(p: Tensor) -> Tensor:
            return policy_divergence(mean(observation + p), at_rest, scale)

        begin = project(steepest(start, norm) * (radius / steps)).detach()
        return _climb(change, begin, radius, project, steps, norm, noise)


def critic_attack(
    value: Value, observation: Tensor, eps: Tensor | float, project: Project, steps: int = 10, norm: Norm = "inf"
) -> Tensor:
    """The perturbation ``[rows, size]`` that lowers ``value`` of what the agent sees most.

    From the feasible point nearest to 0. Robust Sarsa (Zhang et al. 2020, section 3.5) is this attack with ``value``
    the action value of the true observation and the action that the policy takes in the perturbed one.

    Args:
        value: ``[rows, size]`` to ``[rows]``.
        observation, eps, project, steps, norm: as in :func:`maximal_action_difference`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        observation = _own(observation)
        radius = _as_radius(eps, observation)
        begin = project(torch.zeros_like(observation)).detach()
        return _climb(lambda p: -value(observation + p), begin, radius, project, steps, norm)


def director_attack(
    mean: Mean,
    observation: Tensor,
    direction: Tensor,
    eps: Tensor | float,
    project: Project,
    start: Tensor,
    steps: int = 10,
    norm: Norm = "inf",
) -> Tensor:
    """The actor of PA-AD (Sun et al. 2022): a perturbation that pushes the mean action where the director wants it.

    One step of length ``eps`` up ``cos(pi(s + p) - pi(s), d) + ||pi(s + p) - pi(s)||_2``, from a random point within
    ``eps / steps``, or from its opposite where that agrees better with ``d``: with a single action the cosine has no
    gradient, and the start alone decides which way the action goes.

    Args:
        mean: the policy.
        observation: ``[rows, size]``, unperturbed.
        direction: ``[rows, actions]``, the director's; its length does not matter.
        eps, project, norm: as in :func:`maximal_action_difference`.
        start: ``[rows, size]``, uniform in [-1, 1].
        steps: divides the start.
    """
    with torch.inference_mode(False), torch.enable_grad():
        observation, direction, start = _own(observation), _own(direction), _own(start)
        radius = _as_radius(eps, observation)
        wanted = direction / (direction.square().sum(-1, keepdim=True) + _TINY).sqrt()
        with torch.no_grad():
            at_rest = mean(observation)

        def agreement(p: Tensor) -> Tensor:
            change = mean(observation + p) - at_rest
            length = (change.square().sum(-1) + _TINY).sqrt()
            return (change * wanted).sum(-1) / length + length

        offset = start * (radius / steps)
        if norm == "2":  # the cube of starts shrunk into the ball
            offset = offset / observation.shape[-1] ** 0.5
        one, other = project(offset).detach(), project(-offset).detach()
        with torch.no_grad():
            turned = (agreement(other) > agreement(one)).unsqueeze(-1)
        begin = torch.where(turned, other, one)
        _, slope = _slope(agreement, begin)
        return project(begin + radius * steepest(slope, norm)).detach()


def sgld_worst_case(
    mean: Mean,
    observation: Tensor,
    std: Tensor,
    eps: Tensor | float,
    start: Tensor,
    noise: Tensor,
    steps: int = 10,
    inverse_temperature: float = 1e-5,
) -> Tensor:
    """The inner maximum of SA-PPO (Zhang et al. 2020): ``p`` ``[rows, size]``, ``|p| <= eps``, without gradient.

    Noisy signed ascent on :func:`policy_divergence` from one step off 0 in a random direction; the last point counts.
    A lower bound of the maximum.

    Args:
        mean, observation, std, eps: as in :func:`maximal_action_difference`; the norm is inf.
        start: ``[rows, size]``, standard normal or signs.
        noise: ``[steps, rows, size]``, standard normal; gradients are added ``sqrt(2 step * inverse_temperature) /
            (i + 2)`` of it.
        steps: of length ``eps / steps``.
        inverse_temperature: as the authors call it; it scales the noise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        observation, std, noise, start = _own(observation), _own(std), _own(noise), _own(start)
        radius = _as_radius(eps, observation)
        step = radius / steps
        loudness = (2.0 * step * inverse_temperature).sqrt()
        with torch.no_grad():
            at_rest = mean(observation)
        p = start.sign() * step
        for i in range(steps):
            _, slope = _slope(lambda moved: policy_divergence(mean(observation + moved), at_rest, std), p)
            p = p + step * steepest(slope + noise[i] * (loudness / (i + 2)), "inf")
            p = torch.minimum(torch.maximum(p, -radius), radius)
        return p.detach()


def policy_divergence(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """``[rows]``: squared distance of two means ``[rows, actions]`` in standard deviations, twice the Gaussian KL."""
    return ((mean - other) / std).square().sum(-1)


def random_uniform(previous: Tensor, fresh: Tensor | None, uniform: Tensor, budget: PerturbationSet) -> Tensor:
    """Noise ``[rows, size]``, feasible: uniform in ``[-eps, eps]``; coupled, a walk of uniform steps.

    A walk moves by up to ``eps_bar`` in every coordinate and is projected; a free first step is uniform in
    ``[-eps, eps]``. With norm 2 the cubes are projected on the balls.

    Args:
        previous: ``[rows, size]``, the perturbation before.
        fresh: bool ``[rows]``, where an episode begins; ``None``: nowhere.
        uniform: ``[rows, size]`` in [-1, 1].
        budget: feasible perturbations.
    """
    if not budget.coupled:
        return budget.project(budget.eps * uniform, previous, fresh)
    p = previous + budget.eps_bar * uniform
    if fresh is not None:
        first = budget.eps if budget.settings.first_step == "free" else budget.eps_bar
        p = torch.where(fresh.unsqueeze(-1), first * uniform, p)
    return budget.project(p, previous, fresh)


def ornstein_uhlenbeck(
    path: Tensor, normal: Tensor, eps: Tensor | float, theta: float = 0.15, sigma: Tensor | float | None = None
) -> Tensor:
    """One step of a path ``[rows, size]`` that drifts and returns: ``(1 - theta) path + sigma normal``.

    The path itself is not bounded; the perturbation is its projection.

    Args:
        path: ``[rows, size]``, 0 where an episode begins.
        normal: ``[rows, size]``, standard normal.
        eps: ``[size]``, ``[1]`` or a number.
        theta: rate of return, in (0, 1].
        sigma: of a step; ``None``: so that the path's standard deviation is ``eps`` in the long run.
    """
    if sigma is None:
        sigma = eps * math.sqrt(theta * (2.0 - theta))
    return (1.0 - theta) * path + sigma * normal


def constant_bias(
    target: Tensor, fresh: Tensor | None, normal: Tensor, budget: PerturbationSet
) -> tuple[Tensor, Tensor]:
    """A bias of full size, drawn where an episode begins and held: (perturbation, target), ``[rows, size]`` each.

    A corner of the box with norm inf, a point of the sphere with norm 2. The projection on the feasible set makes a
    coupled perturbation approach the target as fast as it may.

    Args:
        target: ``[rows, size]``, as returned before.
        fresh: bool ``[rows]``; ``None``: nowhere.
        normal: ``[rows, size]``, standard normal.
        budget: feasible perturbations.
    """
    if fresh is not None:
        drawn = budget.eps * steepest(normal, budget.settings.norm)
        target = torch.where(fresh.unsqueeze(-1), drawn, target)
    return target, target
