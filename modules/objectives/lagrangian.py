"""Lagrange multipliers of constrained policy optimisation: weights, mixtures of advantage streams, multiplier loss.

Follows "Confronting Reward Model Overoptimization with Constrained RLHF" (Moskovitz et al. 2024, arXiv 2310.04373).
``v_i`` is the expected return of reward ``i``, ``v_0`` that of the KL penalty, ``theta_i`` a threshold; a constraint is
``ge`` (``v_i >= theta_i``), ``le`` or ``eq``.

One sign convention holds throughout: the weight ``w_i`` of a constraint is what its advantage stream is multiplied by.
So ``ge`` weights are positive, ``le`` weights negative, ``eq`` weights of either sign, and whatever the kind,

- the Lagrangian is ``objective + sum_i w_i (v_i - theta_i)``,
- the multiplier loss is ``sum_i w_i (J_i - theta_i)``, to be descended.

An ``le`` constraint on ``r`` is then exactly a ``ge`` constraint on ``-r`` with threshold ``-theta``: the bounded form
takes its ``|w_i|`` off the objective's share, where the literal ``N - sum_j w_j`` would add it and so keep every
``le`` multiplier above ``-1/2`` (one constraint), out of reach of many feasible thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["ge", "le", "eq"]
Parameterisation = Literal["bounded", "softplus", "exp", "projected", "free"]
Objective = Literal["kl", "all", "single", "ppo_lag"]

INEQUALITY_ONLY: tuple[str, ...] = ("softplus", "exp", "projected")
"""Parameterisations whose multiplier has one sign, as an equality's must not."""


def check_constraints(kinds: Sequence[str], parameterisation: str) -> None:
    """Refuse combinations that cannot learn.

    Raises:
        ValueError: no constraint, an unknown kind or parameterisation, or an equality whose multiplier cannot change
            sign. The message names the config key.
    """
    if not kinds:
        raise ValueError("constraints: needs at least one constraint")
    if parameterisation not in get_args(Parameterisation):
        known = ", ".join(get_args(Parameterisation))
        raise ValueError(f"multiplier.parameterisation: must be one of {known}, got {parameterisation!r}")
    for kind in kinds:
        if kind not in get_args(Kind):
            raise ValueError(f"constraints: kind must be ge, le or eq, got {kind!r}")
    if "eq" in kinds and parameterisation in INEQUALITY_ONLY:
        raise ValueError(
            f"multiplier.parameterisation: {parameterisation!r} cannot turn negative, as an eq constraint needs; "
            "use bounded or free, or make the constraint ge or le"
        )


def _signs(kinds: Sequence[str], like: Tensor) -> Tensor:
    return like.new_tensor([-1.0 if kind == "le" else 1.0 for kind in kinds])


def _equalities(kinds: Sequence[str], like: Tensor) -> Tensor:
    return torch.tensor([kind == "eq" for kind in kinds], device=like.device)


def multiplier_weights(
    raw: Tensor,
    kinds: Sequence[str],
    parameterisation: str = "bounded",
    lambda_max: float | None = None,
) -> Tensor:
    """Weights ``w`` ``[N]`` of the constraints' advantage streams, from the learned numbers ``raw`` ``[N]``.

    ==============  ======================  ==================
    form            ge (``le``: negated)    eq
    ==============  ======================  ==================
    ``bounded``     sigmoid(raw)            tanh(raw)
    ``softplus``    log(1 + exp(raw))       refused
    ``exp``         exp(raw)                refused
    ``projected``   max(raw, 0)             refused
    ``free``        max(raw, 0)             raw
    ==============  ======================  ==================

    ``projected`` and ``free`` pass a gradient at 0 but none below: who steps ``raw`` must put it back to 0, as
    :func:`project_raw` does.

    Args:
        raw: ``[..., N]``.
        kinds: ``ge``, ``le`` or ``eq`` for each constraint.
        parameterisation: ``bounded`` (the paper's, section 4.1) or one of the classical unbounded ones.
        lambda_max: bound on ``|w|`` of the unbounded forms; ``None``: none.

    Raises:
        ValueError: as :func:`check_constraints`.
    """
    check_constraints(kinds, parameterisation)
    equality = _equalities(kinds, raw)
    if parameterisation == "bounded":
        return _signs(kinds, raw) * torch.where(equality, raw.tanh(), raw.sigmoid())
    if parameterisation == "softplus":
        size = torch.nn.functional.softplus(raw)
    elif parameterisation == "exp":
        size = raw.exp()
    else:
        size = torch.where(equality, raw, raw.clamp_min(0.0))
    if lambda_max is not None:
        size = size.clamp(-lambda_max, lambda_max)
    return _signs(kinds, raw) * size


def raw_multipliers(weights: Tensor, kinds: Sequence[str], parameterisation: str = "bounded") -> Tensor:
    """Inverse of :func:`multiplier_weights`: ``[..., N] -> [..., N]``.

    Raises:
        ValueError: a weight that no finite ``raw`` gives, such as a positive one of an ``le`` constraint.
    """
    check_constraints(kinds, parameterisation)
    equality, size = _equalities(kinds, weights), _signs(kinds, weights) * weights
    if parameterisation == "bounded":
        raw = torch.where(equality, size.atanh(), size.logit())
    elif parameterisation == "softplus":
        raw = size.expm1().log()
    elif parameterisation == "exp":
        raw = size.log()
    else:
        raw = torch.where(equality | (size >= 0), size, math.nan)
    if not raw.isfinite().all():
        raise ValueError(
            f"multiplier: no {parameterisation} multiplier of {', '.join(kinds)} has the weights {weights.tolist()}"
        )
    return raw


def project_raw(
    raw: Tensor,
    kinds: Sequence[str],
    parameterisation: str,
    lambda_max: float | None = None,
    lambda_clip: float | None = None,
) -> Tensor:
    """``raw`` ``[..., N]`` back in the range where its gradient is alive, after a step.

    ``projected`` and ``free`` inequalities at least 0; unbounded forms no further than ``lambda_max``, so that they
    come back at once; ``lambda_clip``, for the bounded form, keeps ``|raw|`` off the flat ends of the sigmoid.
    """
    if parameterisation == "bounded":
        return raw if lambda_clip is None else raw.clamp(-lambda_clip, lambda_clip)
    if parameterisation in ("projected", "free"):
        raw = torch.where(_equalities(kinds, raw), raw, raw.clamp_min(0.0))
    if lambda_max is None:
        return raw
    if parameterisation == "softplus":
        return raw.clamp_max(math.log(math.expm1(lambda_max)))
    if parameterisation == "exp":
        return raw.clamp_max(math.log(lambda_max))
    return raw.clamp(-lambda_max, lambda_max)


def objective_weight(weights: Tensor, kinds: Sequence[str], bounded: bool = True) -> Tensor:
    """Weight ``[...]`` of the objective beside the constraints' ``weights`` ``[..., M]``.

    ``M - sum_j w_j`` (``|w_j|`` of ``le``) in the bounded form, in (0, M) for inequalities and (0, 2M) with
    equalities, 1 in the unbounded ones.
    """
    if not bounded:
        return weights.new_ones(weights.shape[:-1])
    return len(kinds) - (_signs(kinds, weights) * weights).sum(-1)


def effective_multipliers(weights: Tensor, kinds: Sequence[str], bounded: bool = True) -> Tensor:
    """Classical multipliers ``rho_i = w_i / (M - sum_j w_j)`` ``[..., M]`` of the objective with weight 1.

    Where streams are standardised, the multiplier in units of rewards is ``rho_i std(A_0) / std(A_i)``: see
    :func:`reward_unit_multipliers`. In the bounded form a ``ge`` multiplier spans (0, inf), but for two constraints
    only (0, 1) while the other's weight is 0; an ``eq`` multiplier's negative side is weak: above -1/3 for two
    constraints while the other's weight is 0, above -1/2 when it is near 1.
    """
    return weights / objective_weight(weights, kinds, bounded).unsqueeze(-1)


def reward_unit_multipliers(rho: Tensor, objective_std: Tensor, stream_std: Tensor, epsilon: float = 1e-8) -> Tensor:
    """``mu_i = rho_i std(A_objective) / std(A_i)`` ``[..., M]``: multipliers of rewards, from those of unit streams.

    Args:
        rho: ``[..., M]``.
        objective_std: ``[...]``, standard deviation of the objective's advantages before they were standardised.
        stream_std: ``[..., M]``, those of the constraints' streams.
        epsilon: what the standardisation added to each.
    """
    return rho * (objective_std.unsqueeze(-1) + epsilon) / (stream_std + epsilon)


def stream_coefficients(
    weights: Tensor,
    kinds: Sequence[str],
    objective: str = "kl",
    rewards: int | None = None,
    maximise: int | None = None,
    constrained: Sequence[int] | None = None,
    bounded: bool = True,
) -> Tensor:
    """What each advantage stream is multiplied by, ``[..., N + 1]``: ``N`` rewards in their order, the KL stream last.

    With ``K`` = :func:`objective_weight` of the ``M`` constraints, ``w`` their signed weights:

    - ``kl`` (mu-PPO: ``ge``, xi-PPO: ``eq``, or mixed): ``A = K A_0 + sum_i w_i A_i``. Least KL subject to the
      constraints. Rewards without a constraint get 0.
    - ``all`` (All-PPO, all ``le``): ``A = K (A_0 + sum_i A_i) + sum_i w_i A_i``. It is most ``v_0 + sum_i v_i``
      subject to ``v_i <= theta_i``, with the multiplier ``-rho_i``. Every stream of the authors' code has the KL
      reward inside and there is no other KL stream, so that theirs is ``sum_i (K + w_i) (A_i + A_0)``: our rewards'
      coefficients, with ``sum_i (K + w_i)`` for KL. That constrains ``v_i + v_0``; ours constrains ``v_i``.
    - ``single``: ``A = K A_k + sum_i w_i A_i``, ``k = maximise``, no KL: most ``v_k`` subject to the constraints.
    - ``ppo_lag``: ``A = (A_k + sum_i w_i A_i) / (1 + sum_i |w_i|) + A_0``, unbounded weights; with one ``le``
      constraint it is the ``(A_R - lambda A_C) / (1 + lambda)`` of Safe RLHF (Dai et al. 2024, eq. 31). There the KL
      penalty sits in the reward and, negated, in the cost, where it comes out as a stream of its own.

    Args:
        weights: ``[..., M]``, from :func:`multiplier_weights`.
        kinds: of the ``M`` constraints.
        objective: ``kl``, ``all``, ``single`` or ``ppo_lag``.
        rewards: ``N``; ``None``: ``M``, and one more where a reward is maximised.
        maximise: ``k``, index of the reward that ``single`` and ``ppo_lag`` maximise; ``None``: the first.
        constrained: reward index of each constraint; ``None``: all rewards in order, but for ``maximise``.
        bounded: whether the weights are of the bounded form; ``ppo_lag`` ignores it.

    Raises:
        ValueError: unknown objective, or counts and indices that do not fit.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective: must be one of {', '.join(get_args(Objective))}, got {objective!r}")
    count, one_reward = len(kinds), objective in ("single", "ppo_lag")
    maximise = maximise or 0
    rewards = count + one_reward if rewards is None else rewards
    if constrained is None:
        constrained = [index for index in range(rewards) if not (one_reward and index == maximise)]
    if weights.shape[-1:] != (count,) or len(constrained) != count or len(set(constrained)) != count:
        raise ValueError(
            f"constraints: want one weight and one reward for each of {count} constraints, got weights "
            f"{tuple(weights.shape)}, rewards {list(constrained)} of {rewards}"
        )
    if not all(0 <= index < rewards for index in [*constrained, maximise]) or one_reward and maximise in constrained:
        raise ValueError(
            f"constraints: rewards {list(constrained)}, maximised reward {maximise}: want indices below {rewards}, "
            "and no constraint on the maximised reward"
        )
    base = objective_weight(weights, kinds, bounded)
    columns = [weights.new_zeros(weights.shape[:-1])] * (rewards + 1)
    for place, index in enumerate(constrained):
        columns[index] = weights[..., place]
    if objective == "kl":
        columns[rewards] = base
    elif objective == "all":
        columns = [column + base for column in columns]
    elif objective == "single":
        columns[maximise] = base
    else:
        scale = 1.0 + weights.abs().sum(-1)
        columns[maximise] = torch.ones_like(scale)
        columns = [column / scale for column in columns]
        columns[rewards] = torch.ones_like(scale)
    return torch.stack(columns, dim=-1)


def fixed_coefficients(alpha: Tensor) -> Tensor:
    """``[..., N] -> [..., N + 1]``: ``A = sum_i alpha_i A_i + A_0``, PPO on rewards with fixed weights ``alpha``."""
    return torch.cat([alpha, torch.ones_like(alpha[..., :1])], dim=-1)


def weights_of_fixed(alpha: Tensor) -> Tensor:
    """Bounded weights ``N alpha_i / (1 + sum_j alpha_j)`` ``[..., N]`` whose ``kl`` mixture is that of ``alpha``.

    The mixture is ``N / (1 + sum_j alpha_j)`` times :func:`fixed_coefficients`'. Weights above 1 are out of a
    sigmoid's reach.
    """
    return alpha.shape[-1] * alpha / (1.0 + alpha.sum(-1, keepdim=True))


def multiplier_loss(weights: Tensor, returns: Tensor, thresholds: Tensor) -> Tensor:
    """``sum_i w_i (J_i - theta_i)`` ``[...]``, differentiable in ``weights`` only; descended by the multipliers.

    Too little reward raises the weight of ``ge`` and ``eq``; too much lowers it, and makes the weight of ``le`` more
    negative. All-PPO's ``sum_i sigmoid_i (theta_i - J_i)`` is the same with ``w_i = -sigmoid_i``.

    Args:
        weights: ``[..., M]``, from :func:`multiplier_weights`.
        returns: ``[..., M]``, undiscounted, over all ranks.
        thresholds: ``[..., M]``.
    """
    return (weights * (returns - thresholds).detach()).sum(-1)


def mix_advantages(streams: Tensor, coefficients: Tensor) -> Tensor:
    """``[..., N + 1]``, ``[N + 1]`` -> ``[...]``: the mixture's advantage; no gradient flows to the multipliers."""
    return streams @ coefficients.detach().to(streams)
